"""The demo: its arms leave the model as it was, its numbers are measured, its picture and page are whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image

from iec.bench.arms import Arm, Outcome, run_arm
from iec.bench.demo import ARMS, demo
from iec.bench.page import spent
from iec.bench.reading import reading
from iec.caches import DeepCache
from iec.evaluate.sampling import sample
from iec.pipeline.unconditional import UnconditionalPipeline


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


def test_the_unconditional_pipeline_is_diffusers_own_with_ddim() -> None:
    pipe = tiny()
    assert torch.equal(sample(UnconditionalPipeline(pipe.unet, pipe.scheduler), [0, 1], 5), sample(pipe, [0, 1], 5))
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        UnconditionalPipeline(pipe.unet, pipe.scheduler)(3, [torch.Generator()] * 2)


def test_the_demo_writes_numbers_picture_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    tiny().save_pretrained(folder)
    monkeypatch.setattr("iec.bench.demo.FINE", Arm("fine", "reference", 12, scheduler="DPMSolverMultistepScheduler"))
    names: list[str] = []
    report = demo(str(folder), num=3, out=tmp_path / "out", progress=lambda name, *_: names.append(name))
    rows = json.loads(report.results.read_text())
    assert [row["name"] for row in rows] == names == ["fine", *(arm.name for arm in ARMS)]
    assert rows[0]["psnr"] is None and all(row["psnr"] > 0 for row in rows[1:])
    by_name = {row["name"]: row for row in rows}
    assert by_name["DDIM, 50 steps + IEC all"]["evaluations"] == 100
    with Image.open(report.grid) as picture:
        assert picture.height > len(rows) * 16
        assert len(set(picture.convert("L").tobytes())) > 50
    page = report.html.read_text()
    assert all(arm.name.replace("&", "&amp;") in page for arm in ARMS)
    assert "http" not in page.replace("http://www.w3.org", ""), "the page must be self-contained"
    assert "data:image/png;base64," in page
    with pytest.raises(ValueError, match="at least one image"):
        demo(str(folder), num=0)


def test_the_reading_follows_the_numbers() -> None:
    def outcome(name: str, kind: str, evaluations: int, psnr: float | None) -> Outcome:
        arm = Arm(name, kind, 50)  # pyright: ignore[reportArgumentType]
        return Outcome(arm, torch.zeros(1), evaluations, 0, 1.0, 0.1, psnr)

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
