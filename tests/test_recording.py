"""Recorded steps: the run is as without recording, and the denoiser of a step is the pipeline's own."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import iec
from iec.analysis.recording import Step, record
from iec.pipeline.scaling import scale
from iec.pipeline.unconditional import UnconditionalPipeline
from planted import pipeline as planted
from quantized import calibration
from tiny import CASES, Case, noise, run

SET = ("batch_size", "generator", "num_inference_steps", "output_type")


def arguments(case: Case, **changes: Any) -> dict[str, Any]:
    return {**{key: value for key, value in case.kwargs().items() if key not in SET}, **changes}


def recorded(case: Case, pipe: Any, **changes: Any) -> list[Step]:
    """The steps of the seeds 1 and 2, as in the case's own call."""
    return list(record(pipe, (1, 2), case.kwargs()["num_inference_steps"], 2, **arguments(case, **changes)))


def ddim(steps: int = 4, scheduler: Any = None, **options: Any) -> Any:
    pipe = CASES["ddim"].build()
    kind = scheduler or diffusers.DDIMScheduler
    pipe.scheduler = kind.from_config(pipe.scheduler.config, clip_sample=False, **options)
    if scheduler is not None:
        pipe = UnconditionalPipeline(pipe.unet, pipe.scheduler)
        pipe.set_progress_bar_config(disable=True)
    return pipe


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", ["ldm", "dit", "sd-img2img", "sd-inpaint9", "sdxl", "sd3", "flux"])
def test_denoise_is_the_pipelines_own(name: str) -> None:
    """At another sample than the recorded one: the corrections' outputs, which the pipeline's own loop has made."""
    case = CASES[name]
    pipe = case.build()
    iec.enable(pipe, steps="all", relax=(0.5, 1.0))
    steps = recorded(case, pipe)
    assert len(steps) == case.steps
    for step in steps:
        assert (len(step.outputs), len(step.estimates), len(step.residuals)) == (3, 3, 2)
        assert apart(step.denoise(step.x), step.eps) < 1e-5
        for k in (0, 1):
            assert apart(step.estimates[k], step.x) > 1e-5
            assert apart(step.denoise_estimate(step.estimates[k]), step.outputs[k + 1]) < 1e-5


def test_inputs_scaled_by_the_noise_level() -> None:
    """Euler scales the model's inputs: at an estimate by the next level, as in the pipeline's loop; DDIM does not."""
    case = CASES["sdxl"]
    pipe = case.build()
    iec.enable(pipe, steps="all")
    step = recorded(case, pipe)[0]
    assert apart(step.denoise(step.estimates[0]), step.outputs[1]) > 1e-2
    plain = next(iter(record(ddim(), (1, 2), 4, 2)))
    assert plain.denoise_estimate is plain.denoise


@pytest.mark.parametrize("name", ["ddim", "ddim-eta", "sdxl"])
@pytest.mark.parametrize("corrected", [False, True])
def test_the_run_is_as_without(name: str, corrected: bool) -> None:
    case = CASES[name]
    pipes = case.build(), case.build()
    for pipe in pipes:
        if corrected:
            iec.enable(pipe, steps="first:2")
    plain = run(case, pipes[0], output_type="latent").image
    scheduler = pipes[1].scheduler
    steps = recorded(case, pipes[1])
    last = steps[-1].y if name == "sdxl" else (steps[-1].y / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(last, plain, rtol=0, atol=0)
    assert [len(step.estimates) for step in steps] == ([2, 2, 1, 1] if corrected else [1] * 4)
    assert [step.index for step in steps] == [0, 1, 2, 3]
    for step, following in itertools.pairwise(steps):
        torch.testing.assert_close(step.y, following.x, rtol=0, atol=0)
    assert pipes[1].scheduler is scheduler and "step" not in vars(getattr(scheduler, "iec", scheduler))
    if corrected:
        assert iec.summary(pipes[1]).evaluations == 6


def test_batches_and_seeds() -> None:
    """The steps of one batch after the other; a sample is what it is in a batch of its own; batches can be left out."""
    pipe = ddim()
    steps = list(record(pipe, range(5), 3, 2))
    assert [step.seeds for step in steps[::3]] == [(0, 1), (2, 3), (4,)]
    alone = list(record(pipe, (3,), 3, 1))
    for step, one in zip(steps[3:6], alone, strict=True):
        torch.testing.assert_close(step.y[1:], one.y, rtol=1e-5, atol=1e-5)
    asked: list[tuple[int, ...]] = []
    chosen = list(record(pipe, range(5), 3, 2, wanted=lambda seeds: bool(asked.append(seeds)) or 3 in seeds))
    assert asked == [(0, 1), (2, 3), (4,)] and {step.seeds for step in chosen} == {(2, 3)}


def test_evaluations_leave_no_trace() -> None:
    """Evaluating within the run changes neither images nor counts, with a quantized, cached and corrected model."""
    case = CASES["ddim"]

    def pipe() -> Any:
        made = case.build(fresh=True)
        iec.quantize(made, calibration("ddim"), kernel="reference")
        iec.cache(made, iec.DeepCache(interval=2))
        iec.enable(made, steps="refresh")
        return made

    plain, watched = pipe(), pipe()
    image = run(case, plain).image
    told = iec.summary(plain)
    seen: list[float] = []

    def look(step: Step) -> None:
        step.denoise(noise(*step.x.shape, seed=7))
        seen.append(apart(step.denoise(step.x), step.eps))

    steps = list(record(watched, (1, 2), 4, 2, change=look))
    last = (steps[-1].y / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(last, image, rtol=0, atol=0)
    assert seen == [0.0] * 4
    again = iec.summary(watched)
    assert (again.evaluations, again.refreshed, again.reused) == (told.evaluations, told.refreshed, told.reused)
    assert told.reused == 2
    # and afterwards, in any order, with what each step found in the cache; other runs in between do not matter
    list(record(watched, (8, 9), 4, 2))
    for step in reversed(steps):
        assert apart(step.denoise(step.x), step.eps) == 0.0
    deep: list[int] = []
    hook = watched.unet.mid_block.resnets[0].norm1.register_forward_hook(lambda *_: deep.append(1))
    for step in steps:
        step.denoise(step.x)
    hook.remove()
    assert len(deep) == 2  # the reuse steps leave it out


def test_refuses_a_model_that_was_changed() -> None:
    pipe = ddim()
    (step, *_) = record(pipe, (1,), 4, 1)
    caching = iec.cache(pipe, iec.DeepCache(interval=2))
    with pytest.raises(RuntimeError, match="was changed since it was recorded"):
        step.denoise(step.x)
    caching.undo()
    iec.enable(pipe)  # corrections change nothing in the model
    step.denoise(step.x)
    other = CASES["ddim"].build(fresh=True)
    (step, *_) = record(other, (1,), 4, 1)
    other.unet.conv_out.weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="differs from the recorded one by"):
        step.denoise(step.x)


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("sd", {}, "guidance_rescale"),
        ("sd-controlnet", {}, "down_block_additional_residuals.*ControlNet"),
    ],
)
def test_refuses_what_calls_do_not_tell(name: str, changes: dict[str, Any], told: str) -> None:
    """The steps are recorded all the same; only evaluating them elsewhere is refused, with the reason."""
    case = CASES[name]
    steps = recorded(case, case.build(), **changes)
    assert len(steps) == case.steps
    for step in steps:
        assert step.denoise.reason is not None
        with pytest.raises(RuntimeError, match=f"(?s)step {step.index} cannot be evaluated again.*{told}"):
            step.denoise(step.x)


def test_guidance_is_found() -> None:
    """One rescaled by 0 is the plain guidance: weights 1 − s and s."""
    case = CASES["sd"]
    step = recorded(case, case.build(), guidance_rescale=0.0)[0]
    (piece,) = step.denoise._pieces
    assert piece.weights == pytest.approx((-4.0, 5.0), abs=1e-5)
    without = recorded(case, case.build(), guidance_rescale=0.0, guidance_scale=1.0)[0]
    assert without.denoise._pieces[0].weights == (1.0,)
    assert apart(without.denoise(without.x), without.eps) == 0.0


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_and_b_of_ddim(eta: float) -> None:
    """METHOD 1.1; with noise, it is what remains."""
    pipe = ddim()
    steps = list(record(pipe, (1, 2), 4, 2, eta=eta))
    ab = pipe.scheduler.alphas_cumprod.double()
    for step in steps:
        t = int(step.timestep)
        a, n = ab[t], ab[t - 250] if t >= 250 else torch.tensor(1.0).double()
        sigma = eta * ((1 - a / n) * (1 - n) / (1 - a)).sqrt()
        assert step.a == pytest.approx(float((n / a).sqrt()), rel=1e-6)
        b = (1 - n - sigma**2).clamp(min=0).sqrt() - (n * (1 - a) / a).sqrt()
        assert step.b == pytest.approx(float(b), rel=1e-5, abs=1e-6)
        rest = step.y - step.a * step.x - step.b * step.eps
        expected = float(sigma) * rest.numel() ** 0.5
        assert float(rest.norm()) == pytest.approx(expected, rel=0.15, abs=1e-5 * float(step.y.norm()))


def test_a_and_b_of_euler() -> None:
    pipe = ddim(scheduler=diffusers.EulerDiscreteScheduler)
    steps = list(record(pipe, (1, 2), 4, 2))
    sigmas = pipe.scheduler.sigmas.double()
    for step in steps:
        assert step.a == pytest.approx(1.0, abs=1e-6)
        assert step.b == pytest.approx(float(sigmas[step.index + 1] - sigmas[step.index]), rel=1e-5)
        torch.testing.assert_close(step.a * step.x + step.b * step.eps, step.y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [
        (diffusers.DPMSolverMultistepScheduler, "history"),
        (diffusers.HeunDiscreteScheduler, "history"),
        (diffusers.UniPCMultistepScheduler, "history"),
        (None, "clip_sample=False"),
    ],
)
def test_steps_that_are_not_affine(scheduler: Any, told: str) -> None:
    pipe = CASES["ddim"].build() if scheduler is None else ddim(scheduler=scheduler)
    steps = list(record(pipe, (1, 2), 4, 2))
    assert any(step.a is None for step in steps)
    for step in steps:
        assert (step.a is None) == (step.b is None) == (step.reason is not None)
        assert step.reason is None or told in step.reason
        assert apart(step.denoise(step.x), step.eps) < 1e-5


def test_a_learned_variance_is_told_and_hinders_no_recording() -> None:
    """DDPM's step with the variance among the model's outputs cannot be taken with a noise alone."""
    pipe = planted(lambda x, t: torch.cat([0.3 * x, 0.1 * torch.sin(x)], 1))
    pipe.scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    for step in record(pipe, (1, 2), 4, 2):
        assert step.a is None and step.b is None and "learned variance" in step.reason
        with pytest.raises(RuntimeError, match="learned variance"):
            step.denoise(step.x)


def test_change_takes_the_place_of_the_next_sample() -> None:
    pipe = ddim()
    push = functools.partial(noise, 2, 3, 8, 8, seed=5)
    steps = list(record(pipe, (1, 2), 4, 2, change=lambda step: step.y + push() if step.index == 1 else None))
    plain = list(record(pipe, (1, 2), 4, 2))
    torch.testing.assert_close(steps[1].y, plain[1].y + push())
    torch.testing.assert_close(steps[2].x, steps[1].y, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"change returned \(1,\)"):
        list(record(pipe, (1, 2), 4, 2, change=lambda step: torch.zeros(1)))
    assert not pipe.unet._forward_hooks


def test_scaled_outputs() -> None:
    """With an ε-scaling, ε is what the scheduler steps with."""
    pipe = ddim()
    with scale(pipe, 0.9):
        scaled = list(record(pipe, (1, 2), 4, 2))
        for step in scaled:
            torch.testing.assert_close(step.a * step.x + step.b * step.eps, step.y, rtol=1e-4, atol=1e-4)
            assert apart(step.denoise(step.x), step.eps) < 1e-6
    plain = list(record(pipe, (1, 2), 4, 2))
    torch.testing.assert_close(scaled[0].eps, 0.9 * plain[0].eps)


def test_samples_that_are_not_finite() -> None:
    pipe = ddim()

    def spoil(step: Step) -> Tensor | None:
        bad = step.y.clone()
        bad[1, 0, 0, 0] = torch.nan
        return bad if step.index == 0 else None

    with pytest.raises(RuntimeError, match=r"after step 1 the samples of seeds \[2\]"):
        list(record(pipe, (1, 2), 4, 2, change=spoil))


def test_another_shape() -> None:
    (step, *_) = record(ddim(), (1, 2), 4, 2)
    with pytest.raises(ValueError, match="recorded with"):
        step.denoise(step.x[:1])
