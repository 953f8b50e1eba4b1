"""The demo: its arms leave the model as it was, its numbers are measured, its picture and page are whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image

import iec
from iec.artifact.calibration import Calibration
from iec.artifact.describe import bundled
from iec.bench.arms import Outcome, run_arm
from iec.bench.demo import ARMS, demo
from iec.bench.page import mib, spent
from iec.bench.reading import reading
from iec.caches import DeepCache
from iec.evaluate.arms import Arm, calibration_name, rescheduled
from iec.evaluate.sampling import sample
from iec.pipeline.models import calibrations
from iec.pipeline.origin import origin
from iec.pipeline.unconditional import UnconditionalPipeline
from iec.quant.kernels import choose


def tiny() -> DDIMPipeline:
    torch.manual_seed(0)
    down, up = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 8), down_block_types=down, up_block_types=up, norm_num_groups=4)
    pipe = DDIMPipeline(unet.eval(), DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("arm", "evaluations", "reused"),
    [
        (Arm("plain", "plain", 10), 10, 0),
        (Arm("corrected", "corrected", 10, steps="first:3", relax=(0.5, 0.5)), 16, 0),
        (Arm("cached", "plain", 10, cache=DeepCache(5)), 10, 8),
        (Arm("both", "corrected", 10, cache=DeepCache(5), steps="refresh"), 12, 8),
        (Arm("other", "control", 10, scheduler="HeunDiscreteScheduler"), 19, 0),
    ],
    ids=lambda value: value.name if isinstance(value, Arm) else "",
)
def test_an_arm_is_counted_and_leaves_the_model_as_it_was(arm: Arm, evaluations: int, reused: int) -> None:
    pipe = tiny()
    before = sample(pipe, [1, 2, 3], 4)
    scheduler = pipe.scheduler
    outcome = run_arm(pipe, arm, [1, 2, 3], 2, reference=before)
    assert (outcome.evaluations, outcome.reused) == (evaluations, reused)
    assert outcome.images.shape == before.shape and outcome.rmse is not None
    assert pipe.scheduler is scheduler
    assert torch.equal(sample(pipe, [1, 2, 3], 4), before)


def test_a_quantized_arm_is_counted_weighed_and_taken_off() -> None:
    pipe = tiny()
    before = sample(pipe, [1, 2, 3], 10)
    calibration = iec.calibrate(pipe, num_inference_steps=10, num_samples=2)
    plain = run_arm(pipe, Arm("plain", "plain", 10), [1, 2, 3], 2, before)
    arm = Arm("corrected", "corrected", 10, quant="w8a8", steps="first:3")
    outcome = run_arm(pipe, arm, [1, 2, 3], 2, before, calibration)
    assert outcome.evaluations == 13
    assert outcome.kernel == choose("auto", "cpu").name and plain.kernel is None
    assert plain.weights == 4 * sum(p.numel() for p in pipe.unet.parameters())
    assert outcome.weights == plain.weights - calibration.float_bytes + calibration.weight_bytes
    with iec.quantize(pipe, calibration), iec.enable(pipe, steps="first:3"):
        assert torch.equal(sample(pipe, [1, 2, 3], 10, 2), outcome.images)
    assert torch.equal(sample(pipe, [1, 2, 3], 10), before)
    with pytest.raises(
        ValueError, match="'corrected' is quantized, or cached by CacheQuant, so it needs a calibration"
    ):
        run_arm(pipe, arm, [1], 1)
    assert torch.equal(sample(pipe, [1, 2, 3], 10), before)


def test_the_bundled_calibrations_are_those_of_the_demo_and_no_weights_of_the_model() -> None:
    pipe, found = iec.load("fashion-mnist"), calibrations("fashion-mnist")
    needed = {calibration_name(arm): arm for arm in ARMS if arm.calibrated}
    fields = ("w8a8-50", "w8a8-60-euler")
    assert set(found) == set(needed) == {*fields, *(f"{field}-cachequant5" for field in fields)}
    for name, arm in needed.items():
        calibration = Calibration.load(found[name])
        made = calibration.origin
        here = rescheduled(pipe, arm)
        here.scheduler.set_timesteps(arm.num_inference_steps)
        assert made.mismatch(origin(here, here.scheduler.timesteps.tolist())) == []
        assert calibration.weight_bytes < 0.27 * calibration.float_bytes
        assert (calibration.cache is not None) == name.endswith("-cachequant5")
    about = bundled()["fashion-mnist"]
    assert list(about["values"]) == ["unet/diffusion_pytorch_model.safetensors"]
    assert about["calibrations"] == [f"calibration-{name}" for name in sorted(found)]
    assert calibrations("no such model") == {}


def test_the_unconditional_pipeline_is_diffusers_own_with_ddim() -> None:
    pipe = tiny()
    assert torch.equal(sample(UnconditionalPipeline(pipe.unet, pipe.scheduler), [0, 1], 5), sample(pipe, [0, 1], 5))
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        UnconditionalPipeline(pipe.unet, pipe.scheduler)(3, [torch.Generator()] * 2)


def test_the_demo_writes_numbers_picture_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    tiny().save_pretrained(folder)
    shorter = [replace(arm, num_inference_steps=arm.num_inference_steps // 5) for arm in ARMS]
    monkeypatch.setattr("iec.bench.demo.ARMS", shorter)
    monkeypatch.setattr("iec.bench.calibrations.SAMPLES", 2)
    monkeypatch.setattr("iec.bench.demo.FINE", Arm("fine", "reference", 12, scheduler="DPMSolverMultistepScheduler"))
    names: list[str] = []
    report = demo(str(folder), num=3, out=tmp_path / "out", progress=lambda name, *_: names.append(name))
    rows = json.loads(report.results.read_text())
    assert [row["name"] for row in rows] == ["fine", *(arm.name for arm in ARMS)]
    fields = ("W8A8, 50 steps", "W8A8, 60 steps (Euler)")
    made = [f"calibrating {kind}{field}" for kind in ("", "CacheQuant 1:5, ") for field in fields]
    assert [name for name in names if name in made] == made
    assert [name for name in names if name not in made] == [row["name"] for row in rows]
    assert rows[0]["psnr"] is None and all(row["psnr"] > 0 for row in rows[1:])
    by_name = {row["name"]: row for row in rows}
    assert by_name["DDIM, 50 steps + IEC all"]["evaluations"] == 20
    assert by_name["W8A8, 50 steps + IEC first:1/10"]["evaluations"] == 11
    assert by_name["W8A8, 60 steps (Euler)"]["weights"] < by_name["DDIM, 50 steps"]["weights"]
    kernel = choose("auto", "cpu").name
    assert all(row["kernel"] == (kernel if row["quant"] == "w8a8" else None) for row in rows)
    with Image.open(report.grid) as picture:
        assert picture.height > len(rows) * 16
        assert len(set(picture.convert("L").tobytes())) > 50
    page = report.html.read_text()
    assert all(arm.name.replace("&", "&amp;") in page for arm in ARMS)
    assert f"“{kernel}”" in page
    assert "http" not in page.replace("http://www.w3.org", ""), "the page must be self-contained"
    assert "data:image/png;base64," in page
    with pytest.raises(ValueError, match="at least one image"):
        demo(str(folder), num=0)


def outcome(name: str, kind: str, evaluations: int, psnr: float | None, seconds: float = 1.0, **arm: Any) -> Outcome:
    weights = 1_000_000 if arm.get("quant") else 4_000_000
    shown = Arm(name, kind, 50, **arm)  # pyright: ignore[reportArgumentType]
    return Outcome(shown, torch.zeros(1), evaluations, 0, seconds, weights, rmse=0.1, psnr=psnr)


def test_the_reading_follows_the_numbers() -> None:
    outcomes = [
        outcome("fine", "reference", 200, None),
        outcome("plain", "plain", 50, 30.0),
        outcome("helps", "corrected", 60, 31.0),
        outcome("hurts", "corrected", 60, 28.0),
        outcome("even", "corrected", 60, 30.04),
        outcome("more steps", "control", 60, 30.5),
        outcome("far more steps", "control", 100, 40.0),
    ]
    helps, hurts, even = reading(outcomes)
    assert helps.startswith(
        "helps (60 evaluations): 1.0 dB closer than without the correction, and 0.5 dB closer than more"
    )
    assert "2.0 dB farther than without" in hurts and "2.5 dB farther than more steps" in hurts
    assert "no closer and no farther than without" in even
    assert spent(outcomes[1]) == "50"


def test_the_reading_compares_quantized_arms_with_their_like() -> None:
    outcomes = [
        outcome("fine", "reference", 200, None),
        outcome("plain", "plain", 50, 30.0, seconds=2.0),
        outcome("far more steps", "control", 100, 40.0),
        outcome("w8a8", "plain", 50, 28.0, quant="w8a8"),
        outcome("a few", "corrected", 60, 29.0, quant="w8a8"),
        outcome("more w8a8 steps", "control", 60, 28.5, quant="w8a8"),
        outcome("all", "corrected", 100, 27.0, quant="w8a8"),
    ]
    assert reading(outcomes) == [
        "w8a8: 2.0 times as fast as plain, with 0.25 times its weights, and 2.0 dB farther from the fine solution.",
        "a few (60 evaluations): 1.0 dB closer than without the correction, and 0.5 dB closer than more w8a8 steps "
        "(60 evaluations).",
        "all (100 evaluations): 1.0 dB farther than without the correction, and 13.0 dB farther than far more steps "
        "(100 evaluations).",
    ]
    assert mib(outcomes[1]) == "3.8"
