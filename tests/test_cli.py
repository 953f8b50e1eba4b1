"""The command line: what it prints, writes and returns. The commands run in this process, on tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from iec.cli.app import app
from synthetic import TINY_FEATURES, write_dataset
from tiny import CASES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    CASES["ddim"].build().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def iec(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", [[], ["sample"], ["train"], ["info"]])
def test_help_fits_eighty_columns(command: list[str]) -> None:
    result = iec(*command, "--help")
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80


def test_version() -> None:
    assert iec("--version").output.strip() == __import__("iec").__version__


def test_sample_writes_a_grid(model: Path, tmp_path: Path) -> None:
    result = iec("sample", model, "--num", 5, "--batch-size", 3, "--num-inference-steps", 3)
    assert result.exit_code == 0, result.output
    assert "5 images, 6 evaluations = 2 batches of 3" in result.stdout
    assert result.stdout.splitlines()[-1] == "out/samples.png"
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.size == (3 * 66 + 2, 2 * 66 + 2)


def test_what_is_of_the_last_batch_alone_is_marked(model: Path) -> None:
    common = ("sample", model, "--num", 5, "--num-inference-steps", 4)
    for options, marked in (
        (("--steps", "all"), "Of the last of 2 batches:\nIEC on DDIMPipeline"),
        (("--cache", "deepcache:2"), "2 whole passes, 2 reused in the last of 2 batches\n"),
    ):
        several = iec(*common, *options, "--batch-size", 3)
        assert several.exit_code == 0 and marked in several.stdout
        assert "the last of" not in iec(*common, *options, "--batch-size", 5).stdout


def test_sample_as_json_with_corrections_and_single_images(model: Path, tmp_path: Path) -> None:
    result = iec(
        *(
            "sample",
            model,
            "--num",
            2,
            "--seed",
            7,
            "--num-inference-steps",
            4,
            "--steps",
            "ends:1",
            "--relax",
            "1.0,0.5",
        ),
        *("--probe", "start:0.5"),
        *("--columns", 1, "--save-images", "each", "--out", "grid.png", "--json"),
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["seeds"] == [7, 8] and told["scheduler"] == "DDIMScheduler" and told["out"] == "grid.png"
    assert told["evaluations"] == 4 + 2 * 2
    assert told["iec"]["steps"] == [0, 3] and told["iec"]["relax"] == [1.0, 0.5]
    assert told["iec"]["probe"] == "start:0.5"
    assert sorted(p.name for p in (tmp_path / "each").iterdir()) == ["000007.png", "000008.png"]


def test_sample_with_another_scheduler(model: Path) -> None:
    result = iec(
        "sample", model, "--num", 1, "--num-inference-steps", 3, "--scheduler", "DPMSolverMultistepScheduler", "--json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["scheduler"] == "DPMSolverMultistepScheduler"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "somewhere"], "somewhere"),
        (["--steps", "all", "--relax", "wrong"], "wrong"),
        (["--steps", "all", "--probe", "end"], "probe 'end' is not understood"),
        (["--scheduler", "NoSuch"], "diffusers has no scheduler 'NoSuch'"),
        (["--prompt", "a cat"], "takes no prompt"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    ],
)
def test_errors_are_one_line_and_exit_code_two(model: Path, arguments: list[str], message: str) -> None:
    result = iec("sample", model, "--num", 1, "--num-inference-steps", 2, *arguments)
    assert result.exit_code == 2
    assert result.stderr.strip().startswith("error: ") and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output
    assert not Path("out").exists()


def test_debug_shows_the_traceback_wherever_it_stands(model: Path) -> None:
    for arguments in (["--debug", "sample", model], ["sample", model, "--debug"]):
        result = iec(*arguments, "--steps", "somewhere")
        assert isinstance(result.exception, ValueError)


def test_usage_errors_are_typers_own(model: Path) -> None:
    result = iec("sample", model, "--num", 0)
    assert result.exit_code == 2 and "--num" in result.stderr
    assert iec("nothing").exit_code == 2


def test_train_runs_and_resumes(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    (tmp_path / "tiny.toml").write_text(TINY_FEATURES)
    arguments = ("train", "tiny.toml", "--data", data, "--device", "cpu", "--threads", 1)
    first = iec(*arguments, "--steps", 4)
    assert first.exit_code == 0, first.output
    assert first.stdout == "Trained tiny-features: runs/tiny-features/model\n"
    assert "step 4: test accuracy" in first.stderr
    second = iec(*arguments)
    assert second.exit_code == 0, second.output
    assert "resumed tiny-features at step 4 of 8" in second.stderr
    assert Path("runs/tiny-features/model/model.safetensors").is_file()


def test_an_interrupted_training_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("iec.train.start.train", interrupted)
    (tmp_path / "tiny.toml").write_text(TINY_FEATURES)
    result = iec("train", "tiny.toml", "--data", write_dataset(tmp_path / "data"), "--device", "cpu")
    assert result.exit_code == 130
    assert "The same command resumes from it." in result.stderr


def test_train_without_data_says_what_to_do(tmp_path: Path) -> None:
    result = iec("train", "fashion-mnist", "--data", tmp_path)
    assert result.exit_code == 2
    assert "error: dataset 'fashion-mnist': no train-images-idx3-ubyte.gz" in result.stderr
    unknown = iec("train", "nothing")
    assert unknown.exit_code == 2 and "unknown training recipe 'nothing'" in unknown.stderr


def test_info_about_this_installation() -> None:
    result = iec("info")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    told = json.loads(iec("info", "--json").stdout)
    assert set(told) == {"versions", "models", "machine"}
    assert {"iec", "python", "torch", "diffusers"} <= set(told["versions"])


def test_info_about_folders(model: Path, tmp_path: Path) -> None:
    about = json.loads(iec("info", model, "--json").stdout)["folder"]
    assert about["kind"] == "pipeline" and about["class"] == "DDIMPipeline"
    assert about["components"] == {"unet": "UNet2DModel", "scheduler": "DDIMScheduler"}
    assert about["values"]["unet/diffusion_pytorch_model.safetensors"] > 1000
    data = write_dataset(tmp_path / "data")
    (tmp_path / "tiny.toml").write_text(TINY_FEATURES)
    iec("train", "tiny.toml", "--data", data, "--out", "run", "--steps", 4, "--device", "cpu")
    run = json.loads(iec("info", "run", "--json").stdout)["folder"]
    assert run["kind"] == "training run" and run["step"] == 4 and run["finished"]
    features = json.loads(iec("info", "run/model", "--json").stdout)["folder"]
    assert features["kind"] == "features" and features["classes"][1] == "trouser"
    assert json.loads(iec("info", data, "--json").stdout)["folder"]["kind"] == "other"
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    damaged = iec("info", "run")
    assert damaged.exit_code == 2 and "truncated or damaged checkpoint" in damaged.stderr
    absent = iec("info", "absent")
    assert absent.exit_code == 2 and "absent: no such folder" in absent.stderr


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, iec.cli.app; print(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
