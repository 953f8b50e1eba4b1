"""`iec sample --cache`, `iec calibrate --cache`, `iec info` of a cache. The commands run in this process, on tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import iec as package
import quantized
from iec.artifact.calibration import Calibration
from iec.cli.app import app
from iec.evaluate.images import save_grid
from iec.evaluate.sampling import sample
from tiny import CASES

STEPS = 6
QUICK = ("--num-inference-steps", STEPS, "--num-samples", 2, "--batch-size", 2)
SAMPLE = ("--num", 2, "--num-inference-steps", STEPS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    CASES["ddim"].build().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def both(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration of quantizers and a cache."""
    folder = tmp_path_factory.mktemp("calibration") / "both"
    result = iec("calibrate", model, "--out", folder, *QUICK, "--cache", "cachequant:2")
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration of a cache, with nothing quantized."""
    folder = tmp_path_factory.mktemp("calibration") / "alone"
    options = ("--no-quant", "--cache", "cachequant:3,branch=0,schedule=at:0,2,3,compensate=cache")
    result = iec("calibrate", model, "--out", folder, *QUICK, *options)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def iec(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def sampled(model: Path, *arguments: object) -> dict[str, Any]:
    """What `iec sample --json` says."""
    result = iec("sample", model, *SAMPLE, "--json", *arguments)
    assert result.exit_code == 0, result.output
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def picture(images: torch.Tensor, at: Path) -> bytes:
    save_grid(images, at)
    return at.read_bytes()


# --- deepcache --------------------------------------------------------------------------------------------------------


def test_sample_with_deepcache(model: Path, tmp_path: Path) -> None:
    result = iec("sample", model, *SAMPLE, "--cache", "deepcache:5,branch=0,schedule=at:0,2,3", "--out", "cached.png")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "DeepCache(interval=5, branch=0, schedule='at:0,2,3'): 3 whole passes, 3 reused"
    assert lines[1].startswith("2 images, 6 evaluations, ") and lines[2:] == ["cached.png"]
    pipe = package.load(str(model))
    pipe.set_progress_bar_config(disable=True)
    plain = picture(sample(pipe, range(2), STEPS), tmp_path / "plain.png")
    package.cache(pipe, package.DeepCache(branch=0, schedule="at:0,2,3"))
    assert Path("cached.png").read_bytes() == picture(sample(pipe, range(2), STEPS), tmp_path / "api.png") != plain


def test_a_cache_alone_switches_no_correction_on(model: Path) -> None:
    told = sampled(model, "--cache", "deepcache:3")
    assert told["iec"] is None and told["evaluations"] == STEPS
    assert (told["cache"], told["refreshed"], told["reused"]) == ("DeepCache(interval=3, branch=None)", 2, 4)
    plain = sampled(model)
    assert plain["cache"] is plain["refreshed"] is plain["reused"] is None


def test_corrections_at_the_refresh_steps(model: Path) -> None:
    told = sampled(model, "--cache", "deepcache:3", "--steps", "refresh")
    assert told["iec"]["steps"] == [0, 3] and told["evaluations"] == STEPS + 2
    assert told["refreshed"] == told["iec"]["refreshed"] == 4 and told["reused"] == 4
    result = iec("sample", model, *SAMPLE, "--cache", "deepcache:3", "--steps", "refresh")
    assert "cache        DeepCache(interval=3, branch=None): 4 whole passes, 4 reused" in result.stdout
    assert result.stdout.count("DeepCache") == 1


# --- cachequant -------------------------------------------------------------------------------------------------------


def test_calibrate_a_cache_and_quantizers(model: Path) -> None:
    result = iec("calibrate", model, "--out", "c", *QUICK, "--cache", "cachequant:2")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"W8A8 of DDIMPipeline: \d+ layers, 0\.\d\d MiB of weights for 0\.\d\d MiB", lines[0])
    assert re.fullmatch(r"cache of DDIMPipeline: branch \d, 6 steps, 3 whole: 0[\d, -]+", lines[1])
    assert lines[2:] == ["for 6 steps of DDIMScheduler, from 2 samples", "c"]
    for what in ("features", "samples", "compensation"):
        assert f"{what}: 2 of 2" in result.stderr
    made = Calibration.load("c")
    assert made.quant is not None and made.cache is not None
    assert made.cache.config == package.CacheQuant(2).as_dict()
    assert [file.suffix for file in Path("c").iterdir() if "unfinished" in file.name] == []


def test_calibrate_a_cache_alone(model: Path, alone: Path) -> None:
    made = Calibration.load(alone)
    assert made.quant is None and made.cache is not None
    assert (made.cache.refresh, made.cache.branch) == ((0, 2, 3), 0)
    assert made.cache.config == package.CacheQuant(3, 0, "at:0,2,3", compensate="cache").as_dict()
    pipe = package.load(str(model))
    pipe.set_progress_bar_config(disable=True)
    cache = package.CacheQuant(3, 0, "at:0,2,3", compensate="cache")
    same = package.calibrate(pipe, cache=cache, num_inference_steps=STEPS, num_samples=2, batch_size=2).cache
    assert same is not None
    assert torch.equal(same.gain, made.cache.gain) and torch.equal(same.offset, made.cache.offset)
    shown = iec("calibrate", model, "--out", "c", *QUICK, "--no-quant", "--cache", "cachequant:3,schedule=at:0,2,3")
    assert shown.exit_code == 0, shown.output
    told = ["for 6 steps of DDIMScheduler, from 2 samples", "c"]
    assert shown.stdout.splitlines()[0].startswith("cache of DDIMPipeline: branch ")
    assert shown.stdout.splitlines()[1:] == told and "samples: " not in shown.stderr


def test_info_of_a_cache(both: Path, alone: Path) -> None:
    about = json.loads(iec("info", alone, "--json").stdout)["folder"]
    assert about["quantization"] == "none" and about["cache"]["plan"] == "6 steps, 3 whole: 0, 2, 3"
    assert about["cache"]["whole_passes"] == "|.||.." and about["cache"]["schedule"] == "at:0,2,3"
    for folder in (both, alone):
        result = iec("info", folder)
        assert result.exit_code == 0 and max(map(len, result.stdout.splitlines())) <= 80
        assert "largest_gain_deviation" in result.stdout


def test_sample_quantized_with_the_cache_of_the_calibration(model: Path, both: Path, tmp_path: Path) -> None:
    quant = ("--quant", both, "--kernel", "reference")
    told = sampled(model, *quant, "--cache", "cachequant", "--out", "cached.png")
    assert told["quant"].startswith("W8A8, kernel reference") and told["cache"].startswith("CacheQuant(interval=2")
    assert (told["refreshed"], told["reused"], told["evaluations"]) == (3, 3, STEPS)
    pipe = package.load(str(model))
    pipe.set_progress_bar_config(disable=True)
    calibration = Calibration.load(both)
    package.quantize(pipe, calibration, kernel="reference")
    uncached = picture(sample(pipe, range(2), STEPS), tmp_path / "uncached.png")
    package.cache(pipe, None, calibration)
    assert Path("cached.png").read_bytes() == picture(sample(pipe, range(2), STEPS), tmp_path / "api.png") != uncached
    assert calibration.cache is not None
    corrected = sampled(model, *quant, "--cache", "cachequant:2", "--steps", "refresh")
    assert corrected["iec"]["steps"] == list(calibration.cache.refresh)
    assert sampled(model, *quant, "--cache", "deepcache:3")["reused"] == 4
    assert sampled(model, *quant)["cache"] is None


def test_sample_with_the_cache_alone(model: Path, alone: Path) -> None:
    told = sampled(model, "--quant", alone, "--cache", "cachequant")
    assert told["quant"] is None and (told["refreshed"], told["reused"]) == (3, 3)
    assert "schedule='at:0,2,3'" in told["cache"]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache", "teacache:5"], "cache 'teacache:5' is not understood"),
        (["--cache", "deepcache:0"], "interval is 0"),
        (["--cache", "deepcache:3,branch=9"], "branch is 9; this UNet2DModel has branches"),
        (["--cache", "deepcache:3,schedule=at:0,9"], "9 not in 0..5"),
        (["--cache", "cachequant:2"], "takes its plan from a calibration; add --quant DIR"),
        (["--quant", "{both}", "--cache", "cachequant:3"], "but the calibration was made for CacheQuant(interval=2"),
        (["--quant", "{alone}"], "holds no quantization; its cache is used by --cache cachequant"),
        (["--quant", "{alone}", "--cache", "deepcache:3"], "holds no quantization"),
        (["--quant", "{alone}", "--cache", "cachequant", "--kernel", "reference"], "holds no quantization"),
        (["--quant", "{both}", "--cache", "cachequant", "--num-inference-steps", 4], "for 6 steps"),
        (["--quant", "{alone}", "--cache", "cachequant", "--num-inference-steps", 4], "cached for 6 steps"),
        (["--steps", "refresh"], "refresh"),
    ],
)
def test_sample_errors_are_one_line(model: Path, both: Path, alone: Path, arguments: list[Any], message: str) -> None:
    given = [str(argument).format(both=both, alone=alone) for argument in arguments]
    result = iec("sample", model, *SAMPLE, *given)
    assert result.exit_code == 2, result.output
    assert result.stderr.strip().startswith("error: ") and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not Path("out").exists()


def test_a_calibration_without_a_cache_plans_none(model: Path) -> None:
    assert iec("calibrate", model, "--out", "w8a8", *QUICK, "--num-samples", 1).exit_code == 0
    result = iec("sample", model, *SAMPLE, "--quant", "w8a8", "--cache", "cachequant:2")
    assert result.exit_code == 2
    assert "w8a8 holds none: calibrate with --cache cachequant:2" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache", "deepcache:3"], "--cache deepcache:3: this cache needs no calibration"),
        (["--cache", "cachequant:3,deep=1"], "cachequant has no option 'deep'"),
        (["--cache", "cachequant:3,branch=9"], "branch is 9"),
        (["--no-quant"], "--no-quant leaves nothing to calibrate; add --cache"),
        (["--no-quant", "--cache", "cachequant:3", "--weight-bits", 4], "--no-quant leaves out what --weight-bits"),
        (["--no-quant", "--cache", "cachequant:3", "--reconstruct", "block"], "--no-quant leaves out what"),
    ],
)
def test_calibrate_errors_are_one_line(model: Path, arguments: list[Any], message: str) -> None:
    result = iec("calibrate", model, "--out", "c", *QUICK, *arguments)
    assert result.exit_code == 2
    assert result.stderr.strip().startswith("error: ") and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not Path("c/calibration.json").exists()


@pytest.mark.parametrize("command", ["sample", "calibrate"])
def test_help_names_the_caches(command: str) -> None:
    text = iec(command, "--help").output
    assert "cachequant" in text and "…" not in text and max(map(len, text.splitlines())) <= 80


def test_an_interrupted_calibration_of_a_cache_goes_on(
    model: Path, both: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iec.artifact import checkpoint

    saved, count = checkpoint.save, [0]

    def interrupted(*args: Any, **kwargs: Any) -> None:
        saved(*args, **kwargs)
        count[0] += 1
        if count[0] == 2:  # features are done, samples too
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    command = ("calibrate", model, "--out", "c", *QUICK, "--cache", "cachequant:2")
    result = iec(*command)
    assert result.exit_code == 130 and "The same command goes on" in result.stderr
    again = iec(*command)
    assert again.exit_code == 0 and "features: " not in again.stderr and "compensation: 2 of 2" in again.stderr
    whole, made = Calibration.load(both), Calibration.load("c")
    assert whole.cache is not None and made.cache is not None and made.cache.refresh == whole.cache.refresh
    assert torch.equal(made.cache.gain, whole.cache.gain) and torch.equal(made.cache.offset, whole.cache.offset)
    assert quantized.same(made.quant, whole.quant)
