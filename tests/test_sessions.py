"""iec.enable, disable, summary on a pipeline: idempotent, refusing, unharmed by what goes wrong in between."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import json
import threading
import warnings
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import ConfigMixin, DDIMPipeline, DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

import iec
from sampling import deviation
from tiny import CASES, Record, noise, recorded, run, unet

DDIM, SD = CASES["ddim"], CASES["sd"]
PLAN: dict[str, Any] = {"steps": "at:0,2", "relax": (1.0, 0.5)}


@pytest.fixture
def pipe() -> DiffusionPipeline:
    return DDIM.build()


def expected(**options: Any) -> Record:
    """What the pipeline gives with these options, from a pipeline that nothing else happens to."""
    other = DDIM.build()
    with iec.enable(other, **{**PLAN, **options}):
        return run(DDIM, other)


def plain() -> Record:
    return run(DDIM, DDIM.build())


# --- on and off -------------------------------------------------------------------------------------------------------


def test_enabling_again(pipe: DiffusionPipeline) -> None:
    session = iec.enable(pipe, **PLAN)
    assert iec.enable(pipe, **PLAN) is session
    assert iec.enable(pipe, steps="at:0,2", relax=[1, 0.5]) is session
    for other in ({"steps": "all"}, {"relax": (0.5,)}, {"tol": 0.1}):
        with pytest.raises(ValueError, match=r"iec\.disable"):
            iec.enable(pipe, **{**PLAN, **other})
    assert torch.equal(run(DDIM, pipe).image, expected().image)  # the first one is unharmed
    iec.disable(pipe)
    assert not session.active
    assert iec.enable(pipe, **PLAN) is not session
    assert torch.equal(run(DDIM, pipe).image, expected().image)


def test_disabling_is_idempotent(pipe: DiffusionPipeline) -> None:
    scheduler = pipe.scheduler
    iec.disable(pipe)  # never enabled
    iec.undo(pipe)
    session = iec.enable(pipe)
    for _ in range(2):
        iec.disable(pipe)
        session.disable()
        iec.undo(pipe)
        assert pipe.scheduler is scheduler and "_iec" not in vars(pipe)
        assert "forward" not in vars(pipe.unet)
    iec.disable(object())  # nothing to take off


def test_as_a_context_manager(pipe: DiffusionPipeline) -> None:
    scheduler = pipe.scheduler
    with iec.enable(pipe, **PLAN) as session:
        assert session.active and session.pipe is pipe and session.scheduler is pipe.scheduler
        assert torch.equal(run(DDIM, pipe).image, expected().image)
    assert pipe.scheduler is scheduler and not session.active

    class Boom(Exception):
        pass

    with pytest.raises(Boom), iec.enable(pipe, **PLAN):
        raise Boom
    assert pipe.scheduler is scheduler
    assert torch.equal(run(DDIM, pipe).image, plain().image)


def test_all_ways_off_are_one(pipe: DiffusionPipeline) -> None:
    for off in (lambda s: s.disable(), lambda s: iec.disable(pipe), lambda s: iec.undo(pipe), lambda s: s.__exit__()):
        off(iec.enable(pipe, **PLAN))
        assert type(pipe.scheduler) is DDIMScheduler
        assert torch.equal(run(DDIM, pipe).image, plain().image)


def test_a_scheduler_assigned_later_stays(pipe: DiffusionPipeline) -> None:
    iec.enable(pipe, **PLAN)
    new = diffusers.EulerDiscreteScheduler()
    pipe.scheduler = new
    assert not iec.summary(pipe).enabled
    iec.disable(pipe)
    assert pipe.scheduler is new and "forward" not in vars(pipe.unet)

    iec.enable(pipe, **PLAN)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # as its user would, with IEC still on
    session = iec.enable(pipe, steps="all")  # on the new one
    assert session.active and isinstance(pipe.scheduler, DDIMScheduler)
    iec.disable(pipe)
    assert type(pipe.scheduler) is DDIMScheduler and "forward" not in vars(pipe.unet)


def test_a_scheduler_made_from_the_wrapped_one(pipe: DiffusionPipeline) -> None:
    """The ways to change the scheduler that users know give a plain one."""
    iec.enable(pipe)
    made = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    assert type(made) is diffusers.UniPCMultistepScheduler
    for again in (pipe.scheduler.__class__, pipe.scheduler):
        assert type(again.from_config(pipe.scheduler.config)) is DDIMScheduler
    assert diffusers.UniPCMultistepScheduler in pipe.scheduler.compatibles


# --- what it says -----------------------------------------------------------------------------------------------------


def test_summary(pipe: DiffusionPipeline) -> None:
    assert "not enabled" in str(iec.summary(pipe)) and not iec.summary(pipe).enabled
    iec.enable(pipe, **PLAN, tol=1e-7)
    before = iec.summary(pipe)
    assert before.enabled and before.evaluations is None and "none yet" in str(before)
    found = run(DDIM, pipe)
    summary = iec.summary(pipe)
    assert summary.evaluations == found.evaluations == 8
    assert summary.corrections == 4 and summary.steps == (0, 2) and summary.num_steps == 4
    assert (summary.pipeline, summary.scheduler) == ("DDIMPipeline", "DDIMScheduler")
    assert (summary.relax, summary.tol, summary.spec) == ((1.0, 0.5), 1e-7, "at:0,2")
    assert summary.residuals is not None and {step: len(v) for step, v in summary.residuals.items()} == {0: 2, 2: 2}
    assert all(0 < value < 10 for values in summary.residuals.values() for value in values)
    assert summary.seconds is not None and summary.correction_seconds is not None
    assert 0 < summary.correction_seconds < summary.seconds
    text = str(summary)
    for part in ("DDIMPipeline", "at:0,2", "2 of 4", "8 (4 corrections)", "1, 0.5"):
        assert part in text
    assert json.loads(json.dumps(summary.as_dict()))["evaluations"] == 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        summary.evaluations = 3  # pyright: ignore[reportAttributeAccessIssue]
    iec.disable(pipe)
    assert not iec.summary(pipe).enabled


def test_a_session_that_has_ended_tells_its_last_run(pipe: DiffusionPipeline) -> None:
    with iec.enable(pipe, **PLAN) as session:
        found = run(DDIM, pipe)
        during = session.summary()
    ended = session.summary()
    assert ended == dataclasses.replace(during, enabled=False) and ended.evaluations == found.evaluations
    assert str(ended).splitlines()[0] == "IEC on DDIMPipeline (DDIMScheduler), switched off since"
    assert str(ended).splitlines()[1:] == str(during).splitlines()[1:]
    with iec.enable(pipe, steps="none"):  # what comes later is not its own
        run(DDIM, pipe, num_inference_steps=3)
    assert session.summary() == ended and session.evaluations == found.evaluations
    with iec.enable(pipe, **PLAN) as unused:
        pass
    assert str(unused.summary()) == "IEC is not enabled on this DDIMPipeline." and unused.evaluations == 0


def test_residuals_are_those_of_the_method(pipe: DiffusionPipeline) -> None:
    """The residual of the first correction: ‖y' − y‖ / ‖y‖, averaged over the batch."""
    iec.enable(pipe, steps="first:1", relax=(1.0,))
    found = run(DDIM, pipe)
    y, corrected = found.inputs[1], found.inputs[2]  # with λ = 1 the corrected state is y' itself
    expected_value = ((corrected - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).mean()
    residuals = iec.summary(pipe).residuals
    assert residuals is not None and residuals[0][0] == pytest.approx(float(expected_value), rel=1e-4)


# --- converged samples cost nothing -----------------------------------------------------------------------------------


def test_converged_steps_are_spared(pipe: DiffusionPipeline) -> None:
    iec.enable(pipe, steps="all", relax=(0.5, 0.5, 0.5), tol=1e9)
    found, once = run(DDIM, pipe), expected(steps="all", relax=(0.5,))
    assert torch.equal(found.image, once.image)
    summary = iec.summary(pipe)
    assert found.evaluations == summary.evaluations == 8  # 4 steps, one correction each
    assert summary.corrections == 4 and summary.spared == 8
    assert "8 spared" in str(summary)


@pytest.mark.parametrize("name", ["ddim", "sd", "sd3", "sd-img2img"])
def test_tolerance_does_not_depend_on_the_batch(name: str) -> None:
    case = CASES[name]
    options: dict[str, Any] = {"steps": "all", "relax": (0.9, 0.9), "tol": {"ddim": 0.3, "sd3": 0.02}.get(name, 0.1)}
    per_image = ("prompt", "negative_prompt", "image", "generator", "prompt_embeds", "pooled_prompt_embeds")
    per_image += ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
    pipe = case.build()
    session = iec.enable(pipe, **options)
    together = run(case, pipe)
    alone, evaluations = [], []
    for index in range(2):
        kwargs = case.kwargs()
        changes = {key: kwargs[key][index : index + 1] for key in per_image if key in kwargs}
        if "batch_size" in kwargs:
            changes["batch_size"] = 1
        alone.append(run(case, pipe, **changes).image)
        evaluations.append(session.evaluations)
    assert deviation(together.image, torch.cat(alone)) <= 1e-4  # a batch of one is summed in another order
    assert max(evaluations) <= together.evaluations < 3 * case.steps  # something froze


def test_steps_that_do_not_move_cost_nothing() -> None:
    """The last DDIM step at t = 0 with set_alpha_to_one=False is the identity (A = 1, B = 0)."""
    pipe = DDIM.build()
    pipe.scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    before = run(DDIM, pipe)
    iec.enable(pipe, steps="last:1", relax=(0.5, 0.5))
    found = run(DDIM, pipe)
    assert found.evaluations == 4 and iec.summary(pipe).spared == 2
    assert deviation(found.image, before.image) <= 1e-6


# --- what goes wrong --------------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


@contextlib.contextmanager
def outputs(pipe: DiffusionPipeline, change: Any) -> Any:
    """`change(n, output)` of the n-th evaluation of the denoiser replaces its output."""
    count = 0

    def hook(_: Any, __: Any, output: Any) -> Any:
        nonlocal count
        count += 1
        return change(count - 1, output)

    handle = pipe.unet.conv_out.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("at", range(8))
def test_an_exception_leaves_nothing_half_done(pipe: DiffusionPipeline, at: int, error: type[BaseException]) -> None:
    def fail(index: int, output: Tensor) -> Tensor:
        if index == at:
            raise error
        return output

    iec.enable(pipe, **PLAN)
    with outputs(pipe, fail), pytest.raises(error):
        run(DDIM, pipe)
    found, right = run(DDIM, pipe), expected()
    assert torch.equal(found.image, right.image) and found.evaluations == iec.summary(pipe).evaluations == 8
    with outputs(pipe, fail), pytest.raises(error):
        run(DDIM, pipe)
    iec.disable(pipe)
    assert torch.equal(run(DDIM, pipe).image, plain().image)


def test_after_an_exception_the_model_is_free(pipe: DiffusionPipeline) -> None:
    """An abandoned run in a corrected step must not make the gate answer for the model."""

    def fail(index: int, output: Tensor) -> Tensor:
        if index == 2:
            raise Boom
        return output

    iec.enable(pipe, steps="all", relax=(0.5, 0.5, 0.5), tol=1e9)
    with outputs(pipe, fail), pytest.raises(Boom):
        run(DDIM, pipe)
    for seed in range(3):
        x = noise(2, 3, 8, 8, seed=seed)
        with torch.no_grad():
            assert torch.equal(pipe.unet(x, 500).sample, DDIM.build(fresh=True).unet(x, 500).sample)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_in_a_correction_keeps_the_ordinary_step(pipe: DiffusionPipeline, value: float) -> None:
    def spoil(index: int, output: Tensor) -> Tensor:
        return torch.full_like(output, value) if index in (1, 4) else output  # corrections of steps 0 and 2

    iec.enable(pipe, steps="at:0,2", relax=(0.5,))
    with outputs(pipe, spoil), pytest.warns(RuntimeWarning, match="not finite") as caught:
        found = run(DDIM, pipe)
    assert len(caught) == 1
    assert torch.equal(found.image, plain().image)
    assert torch.equal(run(DDIM, pipe).image, expected(relax=(0.5,)).image)  # the next call is as if nothing had been


def test_a_nan_in_one_image_is_its_own_matter(pipe: DiffusionPipeline) -> None:
    def spoil(index: int, output: Tensor) -> Tensor:
        if index == 1:
            output = output.clone()
            output[1, 0, 0, 0] = float("nan")
        return output

    iec.enable(pipe, steps="first:1", relax=(0.5,))
    with outputs(pipe, spoil), pytest.warns(RuntimeWarning, match="step 0"):
        found = run(DDIM, pipe)
    assert torch.equal(found.image[1], plain().image[1])
    assert torch.equal(found.image[0], expected(steps="first:1", relax=(0.5,)).image[0])


def test_a_nan_in_the_ordinary_step_is_the_plain_pipelines(pipe: DiffusionPipeline) -> None:
    def spoil(index: int, output: Tensor) -> Tensor:
        return output * float("nan") if index == 0 else output

    iec.enable(pipe, steps="last:1", relax=(0.5,))
    with outputs(pipe, spoil), pytest.warns(RuntimeWarning):
        assert run(DDIM, pipe).image.isnan().all()


# --- what is refused --------------------------------------------------------------------------------------------------


class NoDenoiser(DiffusionPipeline):
    def __init__(self, model: torch.nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler)


class NoScheduler(DiffusionPipeline):
    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.register_modules(unet=unet)


class LEditsPPLike(DDIMPipeline):
    pass


LEditsPPLike.__name__ = "LEditsPPPipelineStableDiffusion"


class MeanFlow(ModelMixin, ConfigMixin):
    config_name = "config.json"

    @register_to_config
    def __init__(self, use_meanflow: bool = True) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DDIMPipeline(MeanFlow(), DDIMScheduler()), "mean-flow"),
        (lambda: None, r"iec\.correct"),
        (object, r"iec\.correct"),
        (lambda: unet(), r"iec\.correct"),
        (DDIMScheduler, "scheduler"),
        (lambda: DDIMPipeline, "from_pretrained"),
        (lambda: NoScheduler(unet()), r"iec\.correct"),
        (lambda: NoDenoiser(unet(), DDIMScheduler()), "IECScheduler"),
        (lambda: LEditsPPLike(unet(), DDIMScheduler()), "inversion"),
    ],
)
def test_a_wrong_pipeline_is_told_what_to_do(make: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        iec.enable(make())


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"steps": "sometimes"}, ValueError),
        ({"steps": "first:0"}, ValueError),
        ({"steps": "at:x"}, ValueError),
        ({"steps": 3}, TypeError),
        ({"steps": [1.5]}, TypeError),
        ({"relax": ()}, ValueError),
        ({"relax": (-1.0,)}, ValueError),
        ({"relax": (float("nan"),)}, ValueError),
        ({"relax": "papper"}, ValueError),
        ({"tol": -1.0}, ValueError),
    ],
    ids=str,
)
def test_bad_options_leave_the_pipeline_as_it_was(pipe: DiffusionPipeline, options: Any, kind: type[Exception]) -> None:
    scheduler, before = pipe.scheduler, sorted(vars(pipe))
    with pytest.raises(kind):
        iec.enable(pipe, **options)
    assert pipe.scheduler is scheduler and sorted(vars(pipe)) == before and "forward" not in vars(pipe.unet)


@pytest.mark.parametrize("steps", ["first:9", "at:7", "refresh", [7]], ids=str)
def test_a_plan_that_does_not_fit_the_run(pipe: DiffusionPipeline, steps: Any) -> None:
    """It can only be refused when the number of steps is known; then nothing has been evaluated."""
    iec.enable(pipe, steps=steps)
    with pytest.raises(ValueError, match="steps"), recorded(pipe.unet) as record:
        pipe(**DDIM.kwargs())
    assert record.evaluations == 0
    if steps != "refresh":
        assert run(DDIM, pipe, num_inference_steps=10).image.isfinite().all()
    iec.disable(pipe)
    assert torch.equal(run(DDIM, pipe).image, plain().image)


def test_a_refused_scheduler_leaves_the_pipeline_as_it_was(pipe: DiffusionPipeline) -> None:
    pipe.scheduler = diffusers.RePaintScheduler()
    before = sorted(vars(pipe))
    with pytest.raises(TypeError, match="RePaint"):
        iec.enable(pipe)
    assert sorted(vars(pipe)) == before and "forward" not in vars(pipe.unet)


# --- callbacks, saving, copies ----------------------------------------------------------------------------------------


def test_callbacks_fire_at_every_visit() -> None:
    pipe, seen = SD.build(), []

    def callback(_: Any, index: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((index, float(t), tuple(tensors["latents"].shape)))
        return tensors

    iec.enable(pipe, **PLAN)
    found = run(SD, pipe, callback_on_step_end=callback)
    assert [index for index, _, _ in seen] == list(range(8))
    assert [t for _, t, _ in seen] == found.times
    assert torch.equal(found.image, run(SD, pipe).image)


def test_a_callback_may_interrupt() -> None:
    pipe = SD.build()
    iec.enable(pipe, **PLAN)

    def callback(own: Any, index: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own._interrupt = index == 1
        return tensors

    assert run(SD, pipe, callback_on_step_end=callback).evaluations == 2
    other = SD.build()
    with iec.enable(other, **PLAN):
        right = run(SD, other)
    assert torch.equal(run(SD, pipe).image, right.image)


@pytest.mark.parametrize("name", ["ddim", "sd"])
def test_saving_and_loading(name: str, tmp_path: Path) -> None:
    """A pipeline that carries IEC saves as the plain one: portable, and without IEC."""
    case = CASES[name]
    pipe = case.build()
    before = run(case, pipe)
    session = iec.enable(pipe, **PLAN)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert "iec" not in (tmp_path / "scheduler" / "scheduler_config.json").read_text().lower()
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is DDIMScheduler
    assert torch.equal(run(case, loaded).image, before.image)
    assert session.active  # saving took nothing off
    corrected = run(case, pipe)
    iec.enable(loaded, **PLAN)
    assert torch.equal(run(case, loaded).image, corrected.image)


def test_pipelines_made_from_it() -> None:
    """from_pipe shares the components; the wrapped scheduler comes along and corrects there too."""
    pipe = SD.build()
    iec.enable(pipe, **PLAN)
    right = run(SD, pipe)
    other = diffusers.StableDiffusionPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(run(SD, other).image, right.image)
    own = diffusers.StableDiffusionPipeline.from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler))
    own.set_progress_bar_config(disable=True)
    assert torch.equal(run(SD, own).image, right.image)
    assert torch.equal(run(SD, pipe).image, right.image)


def test_a_copy_of_the_model_is_its_own(pipe: DiffusionPipeline) -> None:
    iec.enable(pipe, **PLAN)
    other = copy.deepcopy(pipe.unet)
    for parameter in other.parameters():
        parameter.data.zero_()
    x = noise(2, 3, 8, 8)
    assert not other(x, 3).sample.any() and pipe.unet(x, 3).sample.any()
    assert torch.equal(run(DDIM, pipe).image, expected().image)
    iec.disable(pipe)
    assert not other(x, 3).sample.any()


def test_a_copy_of_the_pipeline_is_refused(pipe: DiffusionPipeline) -> None:
    iec.enable(pipe, **PLAN)
    with pytest.raises(RuntimeError, match=r"iec\.undo"):
        copy.deepcopy(pipe)
    assert torch.equal(run(DDIM, pipe).image, expected().image)
    iec.disable(pipe)
    assert torch.equal(run(DDIM, copy.deepcopy(pipe)).image, plain().image)


def test_signature_of_the_denoiser(pipe: DiffusionPipeline) -> None:
    """Pipelines ask the denoiser what it takes."""
    before = inspect.signature(pipe.unet.forward)
    iec.enable(pipe)
    assert inspect.signature(pipe.unet.forward) == before


# --- threads ----------------------------------------------------------------------------------------------------------


def in_threads(*calls: Any) -> list[Any]:
    """The results, or the exceptions, of calls that run at the same time."""
    results: list[Any] = [None] * len(calls)

    def work(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_pipelines_in_two_threads() -> None:
    """Each with its own models, and both on shared ones."""
    for fresh in (True, False):
        pipes = [DDIM.build(fresh=fresh) for _ in range(2)]
        options: list[dict[str, Any]] = [PLAN, {"steps": "all", "relax": (0.5, 0.5, 0.5), "tol": 0.2}]
        for pipe, each in zip(pipes, options, strict=True):
            iec.enable(pipe, **each)
        right = [pipe(**DDIM.kwargs()).images for pipe in pipes]
        for _ in range(3):
            found = in_threads(*(lambda pipe=pipe: pipe(**DDIM.kwargs()).images for pipe in pipes))
            assert all((a == b).all() for a, b in zip(found, right, strict=True))
        for pipe in reversed(pipes):
            iec.undo(pipe)


def test_one_pipeline_in_two_threads(pipe: DiffusionPipeline) -> None:
    """It holds one trajectory: a second call in another thread is refused, or ends the first; no result is wrong."""
    iec.enable(pipe, **PLAN)
    right = pipe(**DDIM.kwargs()).images
    entered, go_on = threading.Event(), threading.Event()

    def wait(index: int, output: Tensor) -> Tensor:
        if index == 1:
            entered.set()
            go_on.wait(20)
        return output

    def second() -> Any:
        entered.wait(20)
        try:
            return pipe(**DDIM.kwargs()).images
        finally:
            go_on.set()

    with outputs(pipe, wait):
        found = in_threads(lambda: pipe(**DDIM.kwargs()).images, second)
    errors = [result for result in found if isinstance(result, Exception)]
    assert errors and all(isinstance(error, RuntimeError) and "thread" in str(error) for error in errors)
    assert all((result == right).all() for result in found if not isinstance(result, Exception))
    assert (pipe(**DDIM.kwargs()).images == right).all()


def test_enabling_in_many_threads_gives_one_session(pipe: DiffusionPipeline) -> None:
    sessions = in_threads(*(lambda: iec.enable(pipe, **PLAN) for _ in range(8)))
    assert len({id(session) for session in sessions}) == 1
    in_threads(*(lambda: iec.disable(pipe) for _ in range(8)))
    assert type(pipe.scheduler) is DDIMScheduler and "forward" not in vars(pipe.unet)


def test_two_pipelines_on_shared_weights_end_in_any_order() -> None:
    first, second = DDIM.build(), DDIM.build()
    iec.enable(first, **PLAN)
    iec.enable(second, steps="all")
    with contextlib.suppress(RuntimeWarning):
        iec.disable(first)
    assert torch.equal(run(DDIM, first).image, plain().image)
    assert torch.equal(run(DDIM, second).image, expected(steps="all", relax=(0.5,)).image)
    iec.disable(second)
    assert torch.equal(run(DDIM, second).image, plain().image)
    assert "forward" not in vars(first.unet)


# --- compiled and offloaded denoisers ---------------------------------------------------------------------------------


class Small(ModelMixin, ConfigMixin):
    """A denoiser that compiles in a moment."""

    @register_to_config
    def __init__(self, in_channels: int = 3, sample_size: int = 8) -> None:
        super().__init__()
        self.conv_out = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Any, return_dict: bool = True) -> Any:
        return UNet2DOutput(sample=torch.tanh(self.conv_out(sample) + timestep / 500))


def small() -> DiffusionPipeline:
    torch.manual_seed(0)
    pipe = DDIMPipeline(Small(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("how", ["wrapped", "in-place"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled(how: str, when: str) -> None:
    pipe, other = small(), small()
    before = run(DDIM, other)
    with iec.enable(other, **PLAN):
        right = run(DDIM, other)

    def compile_it() -> None:
        if how == "wrapped":
            pipe.unet = torch.compile(pipe.unet, backend="eager")
        else:
            pipe.unet.compile(backend="eager")

    if when == "before":
        compile_it()
    session = iec.enable(pipe, **PLAN)
    if when == "after":
        compile_it()
    with warnings.catch_warnings():
        # A wrapper that is compiled along with the model interrupts the graph.
        warnings.filterwarnings("ignore", "Dynamo does not know how to trace")
        found = run(DDIM, pipe)
    assert deviation(found.image, right.image) <= 1e-6
    assert found.evaluations == session.evaluations == 8
    iec.disable(pipe)
    found = run(DDIM, pipe)
    assert deviation(found.image, before.image) <= 1e-6 and found.evaluations == 4


class Tracing(ModelHook):
    """What offloading puts on a model: work before and after its forward."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_accelerate(when: str) -> None:
    pipe, hook, right = DDIM.build(fresh=True), Tracing(), expected()
    if when == "before":
        add_hook_to_module(pipe.unet, hook)
    session = iec.enable(pipe, **PLAN)
    if when == "after":
        add_hook_to_module(pipe.unet, hook)
    assert torch.equal(run(DDIM, pipe).image, right.image)
    assert hook.calls == session.evaluations == 8
    if when == "after":
        remove_hook_from_module(pipe.unet)
    iec.disable(pipe)
    assert torch.equal(run(DDIM, pipe).image, plain().image)
    if when == "before":
        assert hook.calls == 12
        remove_hook_from_module(pipe.unet)
    left = vars(pipe.unet).get("forward")  # accelerate puts back what it found, as a bound method
    assert left is None or left.__func__ is type(pipe.unet).forward


def test_a_hook_over_the_gate_is_left_alone() -> None:
    """Something wrapped the model after enable: disable says so, and the gate under it does nothing any more."""
    pipe = DDIM.build(fresh=True)
    iec.enable(pipe, **PLAN)
    add_hook_to_module(pipe.unet, Tracing())
    with pytest.warns(RuntimeWarning, match="wrapped again"):
        iec.disable(pipe)
    assert torch.equal(run(DDIM, pipe).image, plain().image)


def test_offloaded() -> None:
    """The weights are on the meta device between the calls of their layers."""
    pipe, right = DDIM.build(fresh=True), expected()
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    assert next(pipe.unet.parameters()).device.type == "meta"
    session = iec.enable(pipe, **PLAN)
    found = pipe(**DDIM.kwargs()).images
    assert (torch.as_tensor(found) == right.image).all() and session.evaluations == 8
    iec.disable(pipe)
    assert (torch.as_tensor(pipe(**DDIM.kwargs()).images) == plain().image).all()


def test_a_denoiser_assigned_later(pipe: DiffusionPipeline) -> None:
    """`pipe.unet = another` with IEC on: it is corrected, but the summary claims no number of evaluations."""
    iec.enable(pipe, **PLAN)
    pipe.unet = DDIM.build(fresh=True).unet
    assert torch.equal(run(DDIM, pipe).image, expected().image)
    assert iec.summary(pipe).evaluations is None and "not counted" in str(iec.summary(pipe))
    iec.disable(pipe)
    assert torch.equal(run(DDIM, pipe).image, plain().image)
