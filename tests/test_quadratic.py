"""DDIM at quadratically spaced timesteps: the timesteps of the released code, the step of the DDIM paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

import iec
from iec.evaluate.sampling import sample, with_scheduler
from iec.schedule import QuadraticDDIMScheduler
from tiny import CASES


def test_the_timesteps_are_the_released_ones_without_those_that_repeat() -> None:
    scheduler = QuadraticDDIMScheduler()
    scheduler.set_timesteps(100)
    released = [int((place * 800**0.5 / 99) ** 2 + 1e-9) for place in range(100)]
    assert [value for value in released if released.count(value) > 1] == [0, 0, 0, 0, 2, 2]
    assert scheduler.timesteps.tolist() == sorted(set(released), reverse=True)
    assert len(scheduler.timesteps) == 96


@pytest.mark.parametrize(
    "options", [{}, {"clip_sample": False}, {"prediction_type": "v_prediction"}, {"thresholding": True}]
)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_a_step_is_diffusers_own_where_both_go_to_the_same_timestep(options: dict[str, Any], eta: float) -> None:
    ours, theirs = QuadraticDDIMScheduler(**options), DDIMScheduler(**options)
    ours.set_timesteps(5)
    assert ours.timesteps.tolist() == [800, 450, 200, 50, 0]
    theirs.set_timesteps(4)  # steps of 250: from 450 to 200
    x, output, noise = torch.randn(3, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for clipped in (False, True):
        given = {"eta": eta, "variance_noise": noise, "use_clipped_model_output": clipped}
        one, other = (each.step(output, 450, x, **given) for each in (ours, theirs))
        assert torch.equal(one.prev_sample, other.prev_sample)
        assert torch.equal(one.pred_original_sample, other.pred_original_sample)


def test_a_model_that_knows_the_image_is_sampled_exactly() -> None:
    scheduler = QuadraticDDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    image, x = torch.randn(2, 1, 1, 4, 4, generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[t].double()
        x = scheduler.step((x - alpha**0.5 * image) / (1 - alpha) ** 0.5, t, x).prev_sample
    assert torch.allclose(x, image, atol=1e-6)


def test_in_a_pipeline_with_a_cache_and_a_correction() -> None:
    pipe = with_scheduler(CASES["ddim"].build(), "QuadraticDDIMScheduler")
    plain = sample(pipe, range(2), 30)
    count = len(pipe.scheduler.timesteps)
    assert count < 30
    with iec.enable(pipe, steps="all", relax=(0.0,)) as session:
        assert torch.equal(sample(pipe, range(2), 30), plain)
        assert session.evaluations == 2 * count
    calibration = iec.calibrate(
        pipe, iec.QuantConfig(), iec.CacheQuant(interval=3), num_inference_steps=30, num_samples=2, batch_size=2, seed=9
    )
    iec.quantize(pipe, calibration)
    iec.cache(pipe, None, calibration)
    iec.enable(pipe, steps="refresh")
    assert not torch.equal(sample(pipe, range(2), 30), plain)
    assert iec.summary(pipe).refreshed == 2 * len(calibration.cache.refresh)
    iec.undo(pipe)


def test_a_saved_pipeline_has_it_again(tmp_path: Path) -> None:
    pipe = with_scheduler(CASES["ddim"].build(), "QuadraticDDIMScheduler")
    pipe.save_pretrained(tmp_path)
    again = iec.load(tmp_path)
    assert type(again.scheduler) is QuadraticDDIMScheduler
    again.set_progress_bar_config(disable=True)
    assert torch.equal(sample(again, range(2), 10), sample(pipe, range(2), 10))


@pytest.mark.parametrize("count", [1, 1001])
def test_numbers_of_steps_that_cannot_be(count: int) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps is {count}, expected 2 … 1000"):
        QuadraticDDIMScheduler().set_timesteps(count)


def test_a_timestep_of_another_list_and_two_noises_are_refused() -> None:
    scheduler = QuadraticDDIMScheduler()
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        scheduler.step(x, 3, x)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="timestep is 3, expected one of"):
        scheduler.step(x, 3, x)
    with pytest.raises(ValueError, match="either generator or variance_noise"):
        scheduler.step(x, 450, x, generator=torch.Generator(), variance_noise=x)
