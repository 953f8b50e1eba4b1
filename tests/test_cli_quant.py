"""`iec calibrate`, `iec sample --quant`, `iec info` of a calibration. The commands run in this process, on tiny models."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import iec as package
import quantized
from iec.artifact.calibration import Calibration
from iec.cli.app import app
from tiny import CASES

QUICK = ("--num-inference-steps", 3, "--num-samples", 4, "--batch-size", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    CASES["ddim"].build().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def calibration(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration") / "w8a8"
    assert iec("calibrate", model, "--out", folder, *QUICK).exit_code == 0
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def iec(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# --- iec calibrate ----------------------------------------------------------------------------------------------------


def test_calibrate_writes_a_calibration(model: Path) -> None:
    result = iec("calibrate", model, "--out", "c", *QUICK)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"W8A8 of DDIMPipeline: 51 layers, 0\.\d\d MiB of weights for 0\.\d\d MiB", lines[0])
    assert lines[1:] == ["for 3 steps of DDIMScheduler, from 4 samples", "c"]
    assert "samples: 2 of 4" in result.stderr and "samples: 4 of 4" in result.stderr
    made = Calibration.load("c")
    assert (made.origin.num_samples, made.origin.num_steps, made.origin.seed) == (4, 3, 0)
    assert [file.suffix for file in Path("c").iterdir() if "unfinished" in file.name] == []


def test_calibrate_passes_its_options_on(model: Path) -> None:
    result = iec(
        *("calibrate", model, "--out", "c", *QUICK, "--json", "--seed", 7, "--weight-bits", 4, "--act-bits", 6),
        *("--layers", "*", "--layers", "!down_blocks.*", "--scheduler", "DPMSolverMultistepScheduler"),
    )
    assert result.exit_code == 0, result.output
    about = json.loads(result.stdout)["folder"]
    assert about == json.loads(iec("info", "c", "--json").stdout)["folder"]
    config = about["quantization"]
    assert (config["weight_bits"], config["act_bits"], config["layers"]) == (4, 6, ["*", "!down_blocks.*"])
    assert about["scheduler"] == "DPMSolverMultistepScheduler" and about["seed"] == 7
    assert about["settings"] == {"batch_size": 2}
    assert any(name.startswith("unet.down_blocks.") for name in about["skipped"])


def test_calibrate_with_class_labels_in_turns(tmp_path: Path) -> None:
    CASES["dit"].build().save_pretrained("dit", safe_serialization=True)
    labels = ("--class-label", 1, "--class-label", 5)
    result = iec("calibrate", "dit", "--out", "c", *QUICK, *labels, "--num-samples", 3, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["folder"]["settings"]["class_labels"] == [1, 5, 1]
    sampled = iec("sample", "dit", "--quant", "c", "--class-label", 1, "--num", 1, "--num-inference-steps", 3)
    assert sampled.exit_code == 0, sampled.output


def test_defaults_are_those_of_the_package() -> None:
    text = " ".join(iec("calibrate", "--help").output.replace("│", " ").split())
    config = package.QuantConfig()
    arguments = inspect.signature(package.calibrate).parameters
    for option, default in (
        ("weight-bits", config.weight_bits),
        ("act-bits", config.act_bits),
        ("num-samples", arguments["num_samples"].default),
        ("batch-size", arguments["batch_size"].default),
        ("seed", arguments["seed"].default),
    ):
        found = re.search(rf"--{option} .*?\[default: ([^\]]+)\]", text)
        assert found is not None and found[1] == str(default), option
    assert "down_blocks.*" in text and "!mid_block.*" in text


@pytest.mark.parametrize("unit", ["layer", "block"])
def test_calibrate_with_reconstruction(model: Path, unit: str) -> None:
    options = ("--weight-bits", 4, "--reconstruct", unit, "--iters", 2, "--tuples", 6)
    result = iec("calibrate", model, "--out", "c", *QUICK, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("W4A8, reconstructed, of DDIMPipeline: 51 layers")
    assert "reconstruction: 1 of " in result.stderr
    made = Calibration.load("c").quant
    assert made is not None and made.reconstruction is not None
    sampled = iec("sample", model, "--quant", "c", "--num", 1, "--num-inference-steps", 3)
    assert sampled.exit_code == 0 and "W4A8, reconstructed" in sampled.stdout


def test_an_interrupted_calibration_goes_on(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from iec.artifact import checkpoint

    whole = iec("calibrate", model, "--out", "whole", *QUICK)
    assert whole.exit_code == 0
    saved, count = checkpoint.save, [0]

    def interrupted(*args: Any, **kwargs: Any) -> None:
        saved(*args, **kwargs)
        count[0] += 1
        if count[0] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    result = iec("calibrate", model, "--out", "c", *QUICK)
    assert result.exit_code == 130 and "The same command goes on" in result.stderr
    assert not Path("c/calibration.json").exists() and len(list(Path("c").iterdir())) == 1
    changed = iec("calibrate", model, "--out", "c", *QUICK, "--seed", 3)
    assert changed.exit_code == 2 and "belongs to another run" in changed.stderr
    again = iec("calibrate", model, "--out", "c", *QUICK)
    assert again.exit_code == 0 and "samples: 2 of 4" not in again.stderr
    assert quantized.same(Calibration.load("c").quant, Calibration.load("whole").quant)
    assert {file.name for file in Path("c").iterdir()} == {file.name for file in Path("whole").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "nowhere"], "no layer is named 'nowhere'"),
        (["--reconstruct", "model"], "unit is 'model', expected 'block' or 'layer'"),
        (["--iters", 3], "add --reconstruct"),
        (["--prompt", "a cat"], "takes no prompt"),
        (["--scheduler", "NoSuch"], "diffusers has no scheduler 'NoSuch'"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    ],
)
def test_calibrate_errors_are_one_line(model: Path, arguments: list[Any], message: str) -> None:
    result = iec("calibrate", model, "--out", "c", *QUICK, *arguments)
    assert result.exit_code == 2
    assert result.stderr.strip().startswith("error: ") and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not Path("c/calibration.json").exists()


def test_a_calibration_is_not_written_over(model: Path, calibration: Path) -> None:
    result = iec("calibrate", model, "--out", calibration, *QUICK)
    assert result.exit_code == 2 and "holds a calibration already" in result.stderr


def test_bits_out_of_range_are_a_usage_error(model: Path) -> None:
    result = iec("calibrate", model, "--out", "c", "--weight-bits", 9)
    assert result.exit_code == 2 and "--weight-bits" in result.stderr


# --- iec sample --quant, iec info -------------------------------------------------------------------------------------


def test_sample_quantized(model: Path, calibration: Path) -> None:
    sample = ("sample", model, "--num", 2, "--num-inference-steps", 3)
    result = iec(*sample, "--quant", calibration, "--kernel", "reference")
    assert result.exit_code == 0, result.output
    first, *_, last = result.stdout.splitlines()
    assert re.fullmatch(r"W8A8, kernel reference, 51 layers, weights [\d.]+ MiB for [\d.]+ MiB", first)
    assert last == "out/samples.png"
    assert iec(*sample, "--out", "plain.png").exit_code == 0
    assert Path("plain.png").read_bytes() != Path("out/samples.png").read_bytes()


def test_sample_quantized_and_corrected_as_json(model: Path, calibration: Path) -> None:
    result = iec(
        *("sample", model, "--num", 2, "--num-inference-steps", 3, "--steps", "all"),
        *("--quant", calibration, "--kernel", "reference", "--json"),
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["quant"].startswith("W8A8, kernel reference") and told["iec"]["quant"] == told["quant"]
    assert told["evaluations"] == 6
    plain = json.loads(iec("sample", model, "--num", 1, "--num-inference-steps", 2, "--json").stdout)
    assert plain["quant"] is None and plain["iec"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quant", "nowhere"], "nowhere"),
        (["--quant", "{calibration}", "--kernel", "fast"], "kernel is 'fast'"),
        (["--quant", "{calibration}", "--num-inference-steps", 4], "quantized for 3 steps"),
        (["--quant", "{calibration}", "--scheduler", "DDPMScheduler"], "scheduler: calibrated on DDIMScheduler"),
        (["--kernel", "onednn"], "add --quant DIR"),
    ],
)
def test_sample_errors_are_one_line(model: Path, calibration: Path, arguments: list[Any], message: str) -> None:
    given = [str(argument).format(calibration=calibration) for argument in arguments]
    result = iec("sample", model, "--num", 1, "--num-inference-steps", 3, *given)
    assert result.exit_code == 2
    assert result.stderr.strip().startswith("error: ") and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_info_of_a_calibration_fits_eighty_columns(calibration: Path) -> None:
    result = iec("info", calibration)
    assert result.exit_code == 0 and max(map(len, result.stdout.splitlines())) <= 80
    assert "weights_to_float" in result.stdout
    assert max(map(len, iec("calibrate", "--help").output.splitlines())) <= 80
