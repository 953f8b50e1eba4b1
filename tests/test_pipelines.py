"""IEC in every family of pipelines: nothing changes when nothing is corrected, and the corrections are the method's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import iec
from sampling import Spec, deviation, reference
from tiny import CASES, Case, Record, noise, run, seeds

ALIKE = 1e-5
IMAGE_TO_IMAGE = ("sd-img2img", "sd-inpaint4", "sd-inpaint9", "sdxl-img2img", "flux-img2img")


@pytest.fixture(params=list(CASES.values()), ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def same(found: Record, plain: Record) -> bool:
    """The same picture, and first visits with the same inputs, bit for bit."""
    return torch.equal(found.image, plain.image)


def visits(times: list[float], corrected: Any, extra: int) -> list[float]:
    return [time for index, time in enumerate(times) for _ in range(1 + extra if index in corrected else 1)]


def lasting(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What of a pipeline IEC could leave behind."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        "attributes": sorted(vars(pipe)),
        "config": dict(pipe.config),
        "scheduler": id(pipe.scheduler),
        "type": type(pipe.scheduler),
        "modules": {
            name: (sorted(vars(part)), len(part._forward_hooks), len(part._forward_pre_hooks))
            for name, part in modules.items()
        },
    }


# --- nothing corrected ------------------------------------------------------------------------------------------------


def test_none_is_the_plain_pipeline(case: Case) -> None:
    plain, pipe = run(case, case.build()), case.build()
    assert plain.evaluations == case.steps and plain.image.isfinite().all()
    iec.enable(pipe, steps="none")
    found = run(case, pipe)
    assert same(found, plain) and found.times == plain.times
    assert all(torch.equal(a, b) for a, b in zip(found.inputs, plain.inputs, strict=True))
    assert iec.summary(pipe).evaluations == found.evaluations == case.steps


@pytest.mark.parametrize(("steps", "relax"), [("all", (0.0,)), ("ends:1", (0.0, 0.0))], ids=str)
def test_zero_is_the_plain_pipeline(case: Case, steps: str, relax: tuple[float, ...]) -> None:
    plain, pipe = run(case, case.build()), case.build()
    iec.enable(pipe, steps=steps, relax=relax)
    found = run(case, pipe)
    assert same(found, plain)
    corrected = iec.plan.resolve(steps, num_steps=case.steps).steps
    assert found.times == visits(plain.times, corrected, len(relax))
    assert found.evaluations == case.steps + len(corrected) * len(relax)


def test_disable_restores_bit_for_bit(case: Case) -> None:
    pipe = case.build()
    plain = run(case, pipe)
    before = lasting(pipe)  # a call leaves attributes of its own
    iec.enable(pipe, steps="all")
    assert type(pipe.scheduler) is iec.IECScheduler and isinstance(pipe.scheduler, before["type"])
    assert not same(run(case, pipe), plain)
    iec.disable(pipe)
    assert lasting(pipe) == before
    assert same(run(case, pipe), plain)


def test_evaluations_are_counted(case: Case) -> None:
    for steps, relax in (("all", (0.5,)), ("at:0,2", (1.0, 0.5)), ("last:1", (0.5, 0.5, 0.5)), (None, (0.5,))):
        pipe = case.build()
        session = iec.enable(pipe, steps=steps, relax=relax)
        found = run(case, pipe)
        corrected = iec.plan.resolve(steps or "ends:1/10", num_steps=case.steps).steps
        summary = iec.summary(pipe)
        assert found.evaluations == case.steps + len(corrected) * len(relax)
        assert summary.evaluations == session.evaluations == found.evaluations
        assert summary.corrections == len(corrected) * len(relax)
        assert summary.steps == corrected and summary.num_steps == case.steps
        assert set(summary.residuals or ()) == set(corrected)
        assert all(len(values) == len(relax) for values in (summary.residuals or {}).values())


def test_calls_repeat(case: Case) -> None:
    pipe = case.build()
    iec.enable(pipe, steps="at:0,2", relax=(1.0, 0.5))
    first = run(case, pipe)
    assert same(run(case, pipe), first)
    if case.name != "flux-img2img":  # it derives its list from both
        run(case, pipe, num_inference_steps=8)  # a run of another length in between
    assert same(run(case, pipe), first)


def test_by_hand_is_the_same(case: Case) -> None:
    """Wrapping the scheduler by hand gives what enable gives, except where only enable can follow the pipeline."""
    if case.name in IMAGE_TO_IMAGE:
        return
    enabled, by_hand = case.build(), case.build()
    iec.enable(enabled, steps="at:0,2", relax=(1.0, 0.5))
    by_hand.scheduler = iec.IECScheduler(by_hand.scheduler, steps="at:0,2", relax=(1.0, 0.5))
    assert same(run(case, by_hand), run(case, enabled))


@pytest.mark.parametrize("name", IMAGE_TO_IMAGE)
def test_by_hand_says_what_it_cannot_follow(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    pipe.scheduler = iec.IECScheduler(pipe.scheduler, steps="all")
    with (
        pytest.warns(UserWarning, match=r"iec\.enable")
        if name.startswith("sd-")
        else pytest.raises(RuntimeError, match=r"iec\.enable")
    ):
        run(case, pipe)


# --- image to image, with schedulers that count in different ways -----------------------------------------------------

KARRAS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    "ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    "lcm": ("LCMScheduler", {}),
}


def other_scheduler(pipe: DiffusionPipeline, name: str) -> None:
    kind, config = KARRAS[name]
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipe.scheduler = getattr(diffusers, kind)(**betas, **config)


@pytest.mark.parametrize("scheduler", KARRAS)
@pytest.mark.parametrize("name", ["sd-img2img", "sd-inpaint4", "sdxl-img2img"])
def test_image_to_image_on_other_schedulers(name: str, scheduler: str) -> None:
    case = CASES[name]
    pipe = case.build()
    other_scheduler(pipe, scheduler)
    plain = run(case, pipe)
    for relax in ((0.0,), (0.0, 0.0)):
        with iec.enable(pipe, steps="all", relax=relax):
            found = run(case, pipe)
        assert same(found, plain)
        assert found.times == visits(plain.times, range(len(plain.times)), len(relax))
    with iec.enable(pipe, steps="first:1", relax=(0.5, 0.5)):
        found = run(case, pipe)
    assert found.times == visits(plain.times, [0], 2)  # step 0 is the first that runs
    assert not same(found, plain)


@pytest.mark.parametrize("relax", [(0.0,), (0.0, 0.0)])
def test_sdxl_handed_over_in_the_middle(relax: tuple[float, ...]) -> None:
    """denoising_end of the base and denoising_start of the refiner cut the list by timesteps, not by strength."""
    base, refiner = CASES["sdxl"], CASES["sdxl-img2img"]
    for scheduler in ("euler", "heun", "ddim"):
        rows = []
        for options in (None, {"steps": "all", "relax": relax}):
            pipes = base.build(), refiner.build()
            for pipe in pipes:
                other_scheduler(pipe, scheduler)
                if options is not None:
                    iec.enable(pipe, **options)
            first = run(base, pipes[0], denoising_end=0.5, num_inference_steps=8)
            second = run(refiner, pipes[1], denoising_start=0.5, num_inference_steps=8, image=first.image)
            rows.append((first, second))
        (plain, plain_second), (found, found_second) = rows
        assert same(found, plain) and same(found_second, plain_second)
        assert found.evaluations == plain.evaluations * (1 + len(relax))
        assert found_second.evaluations == plain_second.evaluations * (1 + len(relax))


# --- the independent loop ---------------------------------------------------------------------------------------------

PLANS = [("all", (0.5,)), ("first:1 + last:1", (0.5,)), ("all", (1.0, 0.5))]


def compared(
    case: Case,
    pipe: DiffusionPipeline,
    denoise: Callable[[Tensor, Any], Tensor],
    x: Tensor,
    steps: str,
    relax: tuple[float, ...],
    spec: Spec | None = None,
    length: int | None = None,
    begin: int | None = None,
    decode: Callable[[Tensor], Tensor] = lambda x: x,
    **other: Any,
) -> float:
    """The deviation of the pipeline from the independent loop, after it was seen that the correction matters."""
    spec = spec or Spec("", "", steps=case.kwargs()["num_inference_steps"])
    plain = run(case, pipe)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(spec.steps)
    count = len(scheduler.timesteps) - (begin or 0)
    corrected = [step + (begin or 0) for step in iec.plan.resolve(steps, num_steps=count).steps]
    expected = reference(scheduler, spec, denoise, x.double(), corrected, relax, begin=begin, **other)
    iec.enable(pipe, steps=steps, relax=relax)
    found = run(case, pipe)
    iec.disable(pipe)
    assert found.evaluations == plain.evaluations + len(relax) * len(corrected)
    assert deviation(found.image, plain.image) > 100 * ALIKE
    return deviation(found.image, decode(expected))


def drawn(*shape: int) -> Tensor:
    """The initial noise of a call with the generators of the cases."""
    return torch.cat([torch.randn(1, *shape, generator=generator) for generator in seeds(1, 2)])


def double(module: torch.nn.Module) -> Any:
    return copy.deepcopy(module).double()


@pytest.mark.parametrize(("steps", "relax"), PLANS, ids=str)
def test_unconditional_agrees(steps: str, relax: tuple[float, ...]) -> None:
    case = CASES["ddim"]
    pipe = case.build()
    unet = double(pipe.unet)
    decode = lambda x: (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)  # noqa: E731
    x = drawn(3, 8, 8)
    assert compared(case, pipe, lambda y, t: unet(y, t).sample, x, steps, relax, decode=decode) <= ALIKE


def guided(pipe: DiffusionPipeline, scale: float = 5.0, rescale: float = 0.0) -> Callable[[Tensor, Any], Tensor]:
    """Classifier-free guidance on the model input, by hand, in float64."""
    unet, kwargs = double(pipe.unet), CASES["sd"].kwargs()
    cond, uncond = pipe.encode_prompt(kwargs["prompt"], "cpu", 1, True, kwargs["negative_prompt"])

    def denoise(y: Tensor, t: Any) -> Tensor:
        without = unet(y, t, encoder_hidden_states=uncond.double()).sample
        text = unet(y, t, encoder_hidden_states=cond.double()).sample
        both = without + scale * (text - without)
        spread = text.flatten(1).std(dim=1) / both.flatten(1).std(dim=1)
        return both * (rescale * spread + 1 - rescale)[:, None, None, None]

    return denoise


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "heun", "dpm++2m", "unipc", "pndm"])
@pytest.mark.parametrize(("steps", "relax"), PLANS, ids=str)
def test_stable_diffusion_agrees(scheduler: str, steps: str, relax: tuple[float, ...]) -> None:
    case = CASES["sd"]
    pipe = case.build()
    other_scheduler(pipe, scheduler)
    assert compared(case, pipe, guided(pipe, rescale=0.7), drawn(4, 8, 8), steps, relax) <= ALIKE


@pytest.mark.parametrize(("steps", "relax"), PLANS, ids=str)
def test_flow_matching_agrees(steps: str, relax: tuple[float, ...]) -> None:
    case = CASES["sd3"]
    pipe, kwargs = case.build(), case.kwargs()
    transformer = double(pipe.transformer)

    def predict(y: Tensor, t: Any, sign: str) -> Tensor:
        embeds, pooled = kwargs[f"{sign}prompt_embeds"].double(), kwargs[f"{sign}pooled_prompt_embeds"].double()
        times = torch.as_tensor(t).expand(len(y))
        return transformer(y, timestep=times, encoder_hidden_states=embeds, pooled_projections=pooled).sample

    def denoise(y: Tensor, t: Any) -> Tensor:
        without = predict(y, t, "negative_")
        return without + 4.0 * (predict(y, t, "") - without)

    assert compared(case, pipe, denoise, drawn(4, 8, 8), steps, relax) <= ALIKE


def noised(case: Case, pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """The clean latents and the noise that an image to image pipeline mixes."""
    seen: list[Any] = []
    plain = pipe.scheduler.add_noise
    with monkeypatch.context() as patch:
        patch.setattr(pipe.scheduler, "add_noise", lambda *args: seen.append(args) or plain(*args), raising=False)
        run(case, pipe)
    return seen[0][0].double(), seen[0][1].double()


def at_level(scheduler: Any, clean: Tensor, mixed: Tensor, index: int) -> Tensor:
    """Clean latents with the noise that the 6-step run has before step `index`."""
    fresh = copy.deepcopy(scheduler)
    fresh.set_timesteps(6)
    if index == len(fresh.timesteps):
        return clean
    if hasattr(fresh, "set_begin_index"):
        fresh.set_begin_index(index)
    return fresh.add_noise(clean, mixed, fresh.timesteps[index : index + 1])


BEGIN = 2  # of 6 steps, 70 % run


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++2m"])
@pytest.mark.parametrize(("steps", "relax"), PLANS, ids=str)
def test_image_to_image_agrees(
    scheduler: str, steps: str, relax: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["sd-img2img"]
    pipe = case.build()
    other_scheduler(pipe, scheduler)
    clean, mixed = noised(case, pipe, monkeypatch)
    x = at_level(pipe.scheduler, clean, mixed, BEGIN)
    assert compared(case, pipe, guided(pipe), x, steps, relax, begin=BEGIN) <= ALIKE


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++2m"])
@pytest.mark.parametrize(("steps", "relax"), PLANS, ids=str)
def test_inpainting_agrees(
    scheduler: str, steps: str, relax: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The known part of every estimate has the noise level of the step it leads to."""
    case = CASES["sd-inpaint4"]
    pipe = case.build()
    other_scheduler(pipe, scheduler)
    clean, mixed = noised(case, pipe, monkeypatch)
    mask = torch.nn.functional.interpolate(case.kwargs()["mask_image"], size=(8, 8)).double()
    plain = pipe.scheduler

    def project(y: Tensor, following: int) -> Tensor:
        return (1 - mask) * at_level(plain, clean, mixed, following) + mask * y

    x = at_level(plain, clean, mixed, BEGIN)
    assert compared(case, pipe, guided(pipe), x, steps, relax, begin=BEGIN, project=project) <= ALIKE


def test_iec_correct_is_the_pipelines_step() -> None:
    """The pure function and the pipeline say the same about one step."""
    case = CASES["ddim"]
    pipe = case.build()
    iec.enable(pipe, steps="first:1", relax=(1.0, 0.5))
    with torch.no_grad():
        found = run(case, pipe)
        scheduler = iec.IECScheduler(case.build().scheduler, steps="none")
        scheduler.set_timesteps(4)
        x, t = drawn(3, 8, 8), scheduler.timesteps[0]
        expected = iec.correct(
            lambda e: scheduler.iec.inner.step(e, t, x).prev_sample, lambda y: pipe.unet(y, t).sample, x, (1.0, 0.5)
        )
    assert deviation(found.inputs[3], expected) <= ALIKE  # what the second step begins with


def test_the_cases_are_lively() -> None:
    """A denoiser that hardly depends on its input would prove nothing."""
    for case in CASES.values():
        first = run(case, case.build())
        second = run(case, case.build(), generator=seeds(3, 4))
        assert deviation(first.image, second.image) > 0.01
    assert noise(2, 3).shape == (2, 3)
