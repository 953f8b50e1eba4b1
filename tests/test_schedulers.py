"""The laws of the scheduler that repeats timesteps, on every scheduler it supports."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import threading
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from torch import Tensor

import iec
from iec import IECScheduler
from iec.schedule.support import REFUSED, REFUSED_PIPELINES, TESTED
from sampling import SHAPE, SPECS, Spec, Toy, deviation, generators, missing, reference, residuals, sample, start

BY_NAME = {spec.name: spec for spec in SPECS}
ALIKE = 1e-5


@pytest.fixture(params=SPECS, ids=lambda spec: spec.name)
def spec(request: pytest.FixtureRequest) -> Spec:
    if package := missing(request.param):
        pytest.skip(f"needs {package}")
    return request.param


def count(spec: Spec) -> int:
    """Entries of the scheduler's own list: evaluations of the plain run."""
    scheduler = spec.make()
    scheduler.set_timesteps(spec.steps)
    return len(scheduler.timesteps)


def go(spec: Spec, scheduler: Any, dtype: torch.dtype = torch.float64, **other: Any) -> tuple[Tensor, int]:
    torch.manual_seed(21)
    toy = Toy()
    return sample(scheduler, spec, toy, start(dtype), spec.draws(), **other), toy.evaluations


def go_reference(spec: Spec, corrected: Any, relax: Any, tol: float | None = None, denoise: Any = None) -> Tensor:
    torch.manual_seed(21)
    return reference(spec.make(), spec, denoise or Toy(), start(), corrected, relax, tol, spec.draws())


# --- nothing to correct: the plain scheduler, bit for bit -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize(
    "options",
    [{"steps": "none"}, {"steps": "all", "relax": (0.0,)}, {"steps": "all", "relax": (0.0, 0.0)}],
    ids=["none", "zero", "zero-twice"],
)
def test_plain_bit_for_bit(spec: Spec, options: dict[str, Any], dtype: torch.dtype) -> None:
    plain, evaluations = go(spec, spec.make(), dtype)
    found, spent = go(spec, IECScheduler(spec.make(), **options), dtype)
    assert found.dtype == plain.dtype
    assert torch.equal(found, plain)
    assert plain.isfinite().all()
    assert spent == evaluations * (1 + len(options.get("relax", ())))


# --- the correction is the one of the method --------------------------------------------------------------------------

PLANS = [
    ("all", (0.5,)),
    ("first:1 + last:1", (0.5,)),
    ("at:1,2", (0.7,)),
    ("all", (1.0, 0.5)),
    ("at:0,3", (1.0, 0.5)),
]


@pytest.mark.parametrize(("steps", "relax"), PLANS, ids=lambda value: str(value).replace(" ", ""))
def test_agrees_with_the_independent_loop(spec: Spec, steps: str, relax: tuple[float, ...]) -> None:
    plan = iec.plan.resolve(steps, num_steps=count(spec))
    expected = go_reference(spec, plan.steps, relax)
    plain, evaluations = go(spec, spec.make())
    found, spent = go(spec, IECScheduler(spec.make(), steps=steps, relax=relax))
    assert deviation(found, expected) <= ALIKE
    assert deviation(expected, plain) > 100 * ALIKE  # a correction that does nothing would prove nothing
    assert spent == evaluations + len(relax) * len(plan.steps)


# The others draw noise, which differs between the precisions.
@pytest.mark.parametrize(
    "spec",
    [s for s in SPECS if not s.random and s.name not in ("dpm-sde", "flow-euler-sde")],
    indirect=True,
    ids=lambda s: s.name,
)
def test_single_precision_agrees_with_the_double_loop(spec: Spec) -> None:
    expected = go_reference(spec, range(count(spec)), (0.5,))
    found, _ = go(spec, IECScheduler(spec.make(), steps="all"), torch.float32)
    assert found.dtype == torch.float32
    assert deviation(found, expected) <= ALIKE


@pytest.mark.parametrize("relax", [(0.5,), (1.0, 0.5), (0.3, 0.6, 0.9)], ids=str)
def test_ddim_closed_form(relax: tuple[float, ...]) -> None:
    """METHOD 1.1 with eta = 0, written out: no scheduler takes part in the expected value."""
    scheduler, steps, toy = DDIMScheduler(clip_sample=False), 6, Toy()
    products = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    stride = 1000 // steps
    x = start()
    for t in range((steps - 1) * stride, -1, -stride):
        a = products[t]
        n = products[t - stride] if t >= stride else torch.tensor(1.0, dtype=torch.float64)
        keep, turn = (n / a).sqrt(), (1 - n).sqrt() - (n * (1 - a) / a).sqrt()
        y = keep * x + turn * toy(x, t)
        for factor in relax:
            y = y + factor * (keep * x + turn * toy(y, t) - y)
        x = y
    spec = Spec("ddim", "DDIMScheduler", steps=steps)
    found = sample(IECScheduler(scheduler, steps="all", relax=relax), spec, Toy(), start())
    assert deviation(found, x) <= ALIKE


def test_euler_and_ddim_are_corrected_alike() -> None:
    """The same ODE step in two parametrisations: only with the right input scale do the corrections agree."""
    spec = Spec("", "DDIMScheduler", steps=6)
    options: dict[str, Any] = {"steps": "all", "relax": (0.8,)}
    ddim = sample(IECScheduler(DDIMScheduler(clip_sample=False), **options), spec, Toy(), start())
    euler = EulerDiscreteScheduler(timestep_spacing="leading")
    euler.set_timesteps(spec.steps)
    # Euler's x is the variance-exploding one; both start from the same point.
    vp_to_ve = float((1 + euler.sigmas[0] ** 2).sqrt() / euler.init_noise_sigma)
    found = sample(IECScheduler(euler, **options), spec, Toy(), start() * vp_to_ve)
    assert deviation(found, ddim) <= ALIKE


def test_other_outputs_are_blended_too() -> None:
    """LCM's picture is the second output of its step."""
    spec = BY_NAME["lcm"]
    options: dict[str, Any] = {"steps": "all", "relax": (1.0,)}

    def last(scheduler: Any) -> Any:
        scheduler.set_timesteps(2)
        x, toy, generator = start(), Toy(), generators()
        for t in scheduler.timesteps:
            output = scheduler.step(toy(scheduler.scale_model_input(x, t), t), t, x, generator=generator)
            x = output.prev_sample
        return output

    plain, found = last(spec.make()), last(IECScheduler(spec.make(), **options))
    assert deviation(found.denoised, plain.denoised) > 1e-3
    assert torch.equal(found.denoised, found.prev_sample)  # the last step adds no noise


# --- counting, repeating, noise ---------------------------------------------------------------------------------------


def test_runs_repeat(spec: Spec) -> None:
    scheduler = IECScheduler(spec.make(), steps="first:1 + last:1", relax=(1.0, 0.5))
    assert torch.equal(go(spec, scheduler)[0], go(spec, scheduler)[0])


def test_repeats_after_an_abandoned_run(spec: Spec) -> None:
    scheduler = IECScheduler(spec.make(), steps="all")
    expected, _ = go(spec, scheduler)

    class Stop(Exception):
        pass

    for visits in (1, 2, 3):
        seen: list[Any] = []

        def stop(t: Any, _: Tensor, seen: list[Any] = seen, visits: int = visits) -> None:
            seen.append(t)
            if len(seen) == visits:
                raise Stop

        with pytest.raises(Stop):
            go(spec, scheduler, on_step=stop)
        assert torch.equal(go(spec, scheduler)[0], expected)


def test_noise_is_the_plain_runs(spec: Spec) -> None:
    """After every visit the generators stand where the plain run's stand after that step: corrections draw nothing."""

    def states(scheduler: Any) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(21)
        draws, found = spec.draws(), []

        def note(*_: Any) -> None:
            found.append(torch.cat([*(held.get_state() for held in draws or []), torch.get_rng_state()]))

        sample(scheduler, spec, Toy(), start(), draws, on_step=note)
        return found, torch.rand(3)

    plain, plain_next = states(spec.make())
    found, found_next = states(IECScheduler(spec.make(), steps="all", relax=(1.0, 0.5)))
    assert len(found) == 3 * len(plain)
    for index, state in enumerate(found):
        assert torch.equal(state, plain[index // 3])
    assert torch.equal(found_next, plain_next)


@pytest.mark.parametrize("name", ["ddim-eta", "ddpm", "euler-ancestral", "dpm++2m-sde", "lcm"])
def test_noise_from_one_generator_or_none(name: str) -> None:
    """The same law with one generator for the batch, and with torch's own."""
    spec = BY_NAME[name]
    for generator in (None, "one"):
        rows = []
        for scheduler in (
            spec.make(),
            IECScheduler(spec.make(), steps="all", relax=(0.0,)),
            IECScheduler(spec.make(), steps="all", relax=(1.0,)),
        ):
            torch.manual_seed(4)
            one = None if generator is None else torch.Generator().manual_seed(8)
            scheduler.set_timesteps(3)
            x, toy = start() * scheduler.init_noise_sigma, Toy()
            for t in scheduler.timesteps:
                x = scheduler.step(
                    toy(scheduler.scale_model_input(x, t), t), t, x, **spec.extra, generator=one
                ).prev_sample
            rows.append((x, torch.get_rng_state() if one is None else one.get_state()))
        assert torch.equal(rows[0][0], rows[1][0])
        assert deviation(rows[2][0], rows[0][0]) > 1e-3
        assert torch.equal(rows[0][1], rows[1][1]) and torch.equal(rows[0][1], rows[2][1])


def test_given_noise_is_used_again() -> None:
    """`variance_noise` handed to step() is kept for the corrections, even if the pipeline does not hand it in again."""
    extra = {"eta": 1.0, "variance_noise": torch.ones(SHAPE, dtype=torch.float64)}
    spec = Spec("", "DDIMScheduler", {"clip_sample": False}, extra)
    expected = go_reference(spec, range(5), (0.5,))
    found, _ = go(spec, IECScheduler(spec.make(), steps="all"))
    assert deviation(found, expected) <= ALIKE


# --- tolerance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++2m", "unipc", "ddpm"])
def test_tolerance_freezes_as_the_reference(name: str) -> None:
    spec, relax = BY_NAME[name], (0.9, 0.9, 0.9)
    # Between the residuals of the samples, so that some freeze early and others late.
    seen: list[Tensor] = []
    state = spec.make()
    state.set_timesteps(spec.steps)
    for tol in (0.3, 0.1, 0.03, 0.01):
        expected = go_reference(spec, range(spec.steps), relax, tol)
        found, _ = go(spec, IECScheduler(spec.make(), steps="all", relax=relax, tol=tol))
        assert deviation(found, expected) <= ALIKE
        seen.append(found)
    assert any(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++2m", "ddpm"])
def test_tolerance_does_not_depend_on_the_batch(name: str) -> None:
    spec, options = BY_NAME[name], {"steps": "all", "relax": (0.9, 0.9, 0.9), "tol": 0.05}

    def alone(index: int) -> Tensor:
        draws = [spec.draws()[index]] if spec.draws() else None
        return sample(IECScheduler(spec.make(), **options), spec, Toy(), start()[index : index + 1], draws)

    together = sample(IECScheduler(spec.make(), **options), spec, Toy(), start(), spec.draws())
    assert deviation(torch.cat([alone(index) for index in range(len(together))]), together) <= 1e-12


def test_huge_tolerance_still_takes_the_first_update() -> None:
    """The update whose residual falls below the tolerance is taken; what follows is frozen."""
    spec = BY_NAME["ddim"]
    once, _ = go(spec, IECScheduler(spec.make(), steps="all", relax=(0.5,)))
    frozen, _ = go(spec, IECScheduler(spec.make(), steps="all", relax=(0.5, 0.9, 0.9), tol=1e9))
    assert torch.equal(once, frozen)


# --- numbers that are none --------------------------------------------------------------------------------------------


class Spoilt(Toy):
    """Gives a NaN (or an infinity) in one sample at chosen evaluations."""

    def __init__(self, at: set[int], row: int = 1, value: float = float("nan")) -> None:
        super().__init__()
        self.at, self.row, self.value = at, row, value

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        m = super().__call__(x, t)
        if self.evaluations - 1 in self.at:
            m[self.row, 0, 0, 0] = self.value
        return m


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++2m", "unipc", "pndm-plms", "heun"])
def test_stands_back_from_what_is_not_finite(name: str, value: float) -> None:
    """The sample concerned keeps its ordinary step, the others are corrected; one warning for the run."""
    spec = BY_NAME[name]
    spoilt = Spoilt({1, 3}, value=value)  # the corrections of the first two steps
    with pytest.warns(RuntimeWarning, match="not finite") as caught:
        found = sample(IECScheduler(spec.make(), steps="all"), spec, spoilt, start(), spec.draws())
    assert len([w for w in caught if "not finite" in str(w.message)]) == 1
    assert found.isfinite().all()
    total = range(count(spec))
    assert deviation(found[[0, 2]], go_reference(spec, total, (0.5,))[[0, 2]]) <= ALIKE
    assert deviation(found[[1]], go_reference(spec, list(total)[2:], (0.5,))[[1]]) <= ALIKE


# --- the face of the inner scheduler ----------------------------------------------------------------------------------


def test_signatures_are_the_inner_ones(spec: Spec) -> None:
    inner = spec.make()
    wrapped = IECScheduler(inner)
    assert inspect.signature(wrapped.step) == inspect.signature(inner.step)
    assert inspect.signature(wrapped.set_timesteps) == inspect.signature(inner.set_timesteps)
    assert isinstance(wrapped, type(inner))
    assert wrapped.config == inner.config
    assert wrapped.order == inner.order
    assert getattr(wrapped, "init_noise_sigma", None) == getattr(inner, "init_noise_sigma", None)
    with pytest.raises(AttributeError):
        wrapped.no_such_attribute  # noqa: B018
    assert not hasattr(wrapped, "no_such_attribute")


def test_the_list_repeats_the_corrected_entries(spec: Spec) -> None:
    inner = spec.make()
    inner.set_timesteps(spec.steps)
    logical = inner.timesteps.tolist()
    wrapped = IECScheduler(spec.make(), steps="at:0,2", relax=(1.0, 0.5))
    wrapped.set_timesteps(spec.steps)
    expected = [t for index, t in enumerate(logical) for _ in range(3 if index in (0, 2) else 1)]
    assert wrapped.timesteps.tolist() == expected
    assert wrapped.timesteps.dtype == inner.timesteps.dtype
    if hasattr(inner, "sigmas") and len(inner.sigmas) in (len(logical), len(logical) + 1):
        assert len(wrapped.sigmas) - len(inner.sigmas) == 4
        for index, t in enumerate(expected):
            assert wrapped.sigmas[index] == inner.sigmas[logical.index(t)] or logical.count(t) > 1


def test_tuples_and_dataclasses_say_the_same(spec: Spec) -> None:
    rows = []
    for as_dict in (True, False):
        torch.manual_seed(5)
        scheduler, toy, draws = IECScheduler(spec.make(), steps="all"), Toy(), spec.draws()
        scheduler.set_timesteps(spec.steps)
        x = start() * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            output = scheduler.step(toy(scaled, t), t, x, **spec.arguments(draws), return_dict=as_dict)
            x = output.prev_sample if as_dict else output[0]
        rows.append(x)
    assert torch.equal(*rows)


def _tau(t: Any) -> float:
    return 0.5


@pytest.mark.parametrize(
    "how", [copy.deepcopy, copy.copy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "copy", "pickle"]
)
def test_copies_and_pickles(spec: Spec, how: Any) -> None:
    inner = spec.make()
    if spec.kind == "SASolverScheduler":
        inner.tau_func = _tau  # its own is a lambda, so that the plain scheduler cannot be pickled either
    original = IECScheduler(inner, steps="at:0,2", relax=(1.0, 0.5), tol=1e-9)
    again = how(original)
    expected, evaluations = go(spec, original)
    assert again is not original
    assert isinstance(again, type(original)) and "IECScheduler" in repr(again)
    found, spent = go(spec, again)
    assert torch.equal(found, expected) and spent == evaluations


def test_a_deep_copy_has_a_state_of_its_own() -> None:
    spec = BY_NAME["dpm++2m"]
    original = IECScheduler(spec.make(), steps="all")
    other = copy.deepcopy(original)
    expected, _ = go(spec, original)
    # A run of the copy in the middle of a run of the original disturbs nothing.
    found, _ = go(spec, original, on_step=lambda t, x: other.set_timesteps(7))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy])
def test_a_copy_before_the_loop_runs_along(spec: Spec, how: Any) -> None:
    """Pipelines for two modalities copy their scheduler after set_timesteps and step both in one loop."""
    expected, evaluations = go(spec, IECScheduler(spec.make(), steps="at:0,2", relax=(1.0, 0.5)))
    torch.manual_seed(21)
    first = IECScheduler(spec.make(), steps="at:0,2", relax=(1.0, 0.5))
    first.set_timesteps(spec.steps)
    second = how(first)
    assert torch.equal(second.timesteps, first.timesteps) and len(first.timesteps) == evaluations
    toy, draws = Toy(), spec.draws()
    x = start() * getattr(first, "init_noise_sigma", 1.0)
    for t in first.timesteps:
        scaled = second.scale_model_input(x, t) if hasattr(second, "scale_model_input") else x
        x = second.step(toy(scaled, t), t, x, **spec.arguments(draws), return_dict=False)[0]
    assert torch.equal(x, expected)


def test_writing_through() -> None:
    inner = DDIMScheduler()
    wrapped = IECScheduler(inner)
    wrapped.some_mark = 3
    assert inner.some_mark == 3 and wrapped.some_mark == 3
    del wrapped.some_mark
    assert not hasattr(inner, "some_mark")
    assert len(wrapped) == len(inner)
    assert set(dir(inner)) <= set(dir(wrapped))


def test_loops_that_rebind_the_scaled_sample() -> None:
    """`sample = scheduler.scale_model_input(sample)` before step(), as some loops do: λ = 0 is still the plain loop."""

    def loop(scheduler: Any) -> Tensor:
        scheduler.set_timesteps(4)
        x, toy = start() * scheduler.init_noise_sigma, Toy()
        for t in scheduler.timesteps:
            x = scheduler.scale_model_input(x, t)
            x = scheduler.step(toy(x, t), t, x).prev_sample
        return x

    for make in (EulerDiscreteScheduler, DDIMScheduler):
        assert torch.equal(loop(IECScheduler(make(), steps="all", relax=(0.0,))), loop(make()))


def test_a_model_that_reuses_its_output_buffer() -> None:
    """CUDA graphs and ONNX bindings hand out the same memory every time."""

    class Buffered(Toy):
        buffer = torch.empty(SHAPE, dtype=torch.float64)

        def __call__(self, x: Tensor, t: Any) -> Tensor:
            return self.buffer.copy_(super().__call__(x, t))

    for name in ("ddim", "euler", "ddpm", "dpm++2m", "unipc"):
        spec = BY_NAME[name]
        expected, _ = go(spec, IECScheduler(spec.make(), steps="all", relax=(1.0, 0.5)))
        torch.manual_seed(21)
        found = sample(
            IECScheduler(spec.make(), steps="all", relax=(1.0, 0.5)), spec, Buffered(), start(), spec.draws()
        )
        assert torch.equal(found, expected)


def test_a_loop_that_works_in_place() -> None:
    """The proxy keeps x_t itself: what the pipeline does to its tensors afterwards does not reach it."""
    spec = BY_NAME["ddim"]
    expected, _ = go(spec, IECScheduler(spec.make(), steps="all"))
    scheduler, toy, x = IECScheduler(spec.make(), steps="all"), Toy(), start()
    scheduler.set_timesteps(spec.steps)
    for t in scheduler.timesteps:
        x.copy_(scheduler.step(toy(x, t), t, x).prev_sample)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Plain bits at λ = 0; the blend is made in float32, so it is the correctly rounded one."""
    spec = BY_NAME["ddim-v"]
    plain, _ = go(spec, spec.make(), dtype)
    assert torch.equal(go(spec, IECScheduler(spec.make(), steps="all", relax=(0.0,)), dtype)[0], plain)
    found, _ = go(spec, IECScheduler(spec.make(), steps="all"), dtype)
    assert found.dtype == plain.dtype
    exact = go_reference(spec, range(5), (0.5,))
    assert deviation(found, exact) < (0.1 if dtype == torch.bfloat16 else 0.02)


# --- passing through and refusing -------------------------------------------------------------------------------------


def test_step_without_set_timesteps_passes_through() -> None:
    x, m = start(), Toy()(start(), 3)
    expected = DDPMScheduler().step(m, 500, x, generator=generators()).prev_sample
    found = IECScheduler(DDPMScheduler(), steps="all").step(m, 500, x, generator=generators()).prev_sample
    assert torch.equal(found, expected)


def test_training_uses_pass_through() -> None:
    x, t = start(), torch.tensor([3, 500, 900])
    noise = start().flip(0)
    for how in ("add_noise", "get_velocity"):
        plain = getattr(DDPMScheduler(), how)(x, noise, t)
        assert torch.equal(getattr(IECScheduler(DDPMScheduler(), steps="all"), how)(x, noise, t), plain)


def test_a_timestep_of_no_run_passes_through() -> None:
    plain, wrapped = DDIMScheduler(), IECScheduler(DDIMScheduler(), steps="all")
    x, m = start(), Toy()(start(), 3)
    for scheduler in (plain, wrapped):
        scheduler.set_timesteps(5)
    assert torch.equal(wrapped.step(m, 123, x).prev_sample, plain.step(m, 123, x).prev_sample)


def test_a_loop_that_goes_its_own_way_is_told_once() -> None:
    """It iterates over a list of its own: every step is ordinary, nothing is corrected silently in the wrong place."""

    def loop(scheduler: Any) -> Tensor:
        own, toy, x = DDIMScheduler(), Toy(), start()
        own.set_timesteps(5)
        scheduler.set_timesteps(5)
        for t in own.timesteps:
            x = scheduler.step(toy(x, t), t, x).prev_sample
        return x

    with pytest.warns(UserWarning, match="left a step before its corrections") as caught:
        found = loop(IECScheduler(DDIMScheduler(), steps="all"))
    assert len(caught) == 1
    assert torch.equal(found, loop(DDIMScheduler()))


def test_a_step_from_another_thread_is_refused() -> None:
    scheduler = IECScheduler(DDIMScheduler(), steps="all")
    scheduler.set_timesteps(5)
    x, raised = start(), []

    def other() -> None:
        try:
            scheduler.step(x, scheduler.timesteps[0], x)
        except RuntimeError as error:
            raised.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(raised) == 1 and "thread" in raised[0]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: diffusers.ScoreSdeVeScheduler(), r"no step\(\)"),
        (lambda: diffusers.RePaintScheduler(), "back in time"),
        (lambda: diffusers.UnCLIPScheduler(), "next timestep"),
        (lambda: diffusers.VQDiffusionScheduler(num_vec_classes=8), "discrete"),
        (lambda: diffusers.AmusedScheduler(mask_token_id=1), "discrete"),
        (lambda: diffusers.SCMScheduler(), "last entry"),
        (lambda: diffusers.DDIMInverseScheduler(), "data to noise"),
        (lambda: diffusers.DPMSolverMultistepInverseScheduler(), "data to noise"),
        (lambda: DDIMScheduler, "class"),
        (lambda: IECScheduler(DDIMScheduler()), "already"),
        (lambda: object(), "no diffusers scheduler"),
        (lambda: None, "no diffusers scheduler"),
    ],
)
def test_refused_with_the_reason(make: Any, reason: str) -> None:
    with pytest.raises(TypeError, match=reason):
        IECScheduler(make())


@pytest.mark.skipif(diffusers.__version__ < "0.42", reason="earlier releases lack some of them")
def test_what_is_refused_exists() -> None:
    """A name with a slip in it would refuse nothing."""
    known = {*dir(diffusers), *dir(diffusers.schedulers), *dir(iec.schedule)}
    assert {*REFUSED, *TESTED} <= known
    for prefix in REFUSED_PIPELINES:
        assert any(name.startswith(prefix) and "Pipeline" in name for name in known), prefix


def test_an_unknown_scheduler_is_taken_with_a_warning() -> None:
    class Mine(DDIMScheduler):
        pass

    with pytest.warns(UserWarning, match="Mine"):
        scheduler = IECScheduler(Mine(clip_sample=False), steps="all")
    spec = BY_NAME["ddim"]
    assert torch.equal(go(spec, scheduler)[0], go(spec, IECScheduler(spec.make(), steps="all"))[0])


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"relax": (-0.1,)}, ValueError, "at least 0"),
        ({"relax": ()}, ValueError, "K = 0"),
        ({"relax": (float("nan"),)}, ValueError, "finite"),
        ({"relax": "papper"}, ValueError, "paper"),
        ({"relax": [None]}, TypeError, "relax"),
        ({"tol": -1.0}, ValueError, "tol"),
        ({"tol": float("nan")}, ValueError, "tol"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        IECScheduler(DDIMScheduler(), **options)


@pytest.mark.parametrize("steps", ["sometimes", "first:9", "at:7", "refresh", "all & at:"])
def test_bad_steps_leave_the_scheduler_usable(steps: str) -> None:
    """Where the plan can only be refused when the run begins, nothing is left behind."""
    inner = DDIMScheduler(clip_sample=False)
    with pytest.raises(ValueError, match="steps"):
        IECScheduler(inner, steps=steps).set_timesteps(5)
    spec = BY_NAME["ddim"]
    assert torch.equal(go(spec, inner)[0], go(spec, spec.make())[0])


def test_presets() -> None:
    spec = BY_NAME["ddim"]
    by_name, _ = go(spec, IECScheduler(spec.make(), steps="all", relax="released-ldm"))
    by_hand, _ = go(spec, IECScheduler(spec.make(), steps="all", relax=(1.0, 0.5), tol=1e-6))
    assert torch.equal(by_name, by_hand)


def test_the_default_is_the_ends() -> None:
    scheduler = IECScheduler(DDIMScheduler())
    scheduler.set_timesteps(20)
    logical = [t for t in range(950, -1, -50)]
    assert scheduler.timesteps.tolist() == [950, 950, 900, 900, *logical[2:-2], 50, 50, 0, 0]


# --- no-op steps ------------------------------------------------------------------------------------------------------


def test_steps_that_do_not_move_are_not_corrected() -> None:
    """With set_alpha_to_one=False the last step at t = 0 has A = 1, B = 0: nothing to correct."""
    spec = Spec("", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False})
    plain, _ = go(spec, spec.make())
    found, _ = go(spec, IECScheduler(spec.make(), steps="last:1", relax=(1.0,)))
    assert deviation(found, plain) <= 1e-6
    assert residuals(found, plain).max() <= 1e-6
