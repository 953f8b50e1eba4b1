"""Controls of what IEC gains: corrections that evaluate the denoiser elsewhere, and an output that is scaled."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from torch import Tensor

import iec
from iec import IECScheduler
from iec.pipeline.scaling import Scaling, scale
from iec.plan import Probe, Tick, parse_probe
from quantized import calibration
from sampling import SPECS, Spec, Toy, deviation, generators, missing, reference, sample, start
from tiny import CASES, run

BY_NAME = {spec.name: spec for spec in SPECS}


@pytest.fixture(params=SPECS, ids=lambda spec: spec.name)
def spec(request: pytest.FixtureRequest) -> Spec:
    if package := missing(request.param):
        pytest.skip(f"needs {package}")
    return request.param


class Seen(Toy):
    """Keeps what it was evaluated at."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []
        self.times: list[float] = []

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        self.inputs.append(x.clone())
        self.times.append(float(t))
        return super().__call__(x, t)


def go(spec: Spec, scheduler: Any, dtype: torch.dtype = torch.float64, batch: int = 3) -> tuple[Tensor, Seen]:
    torch.manual_seed(21)
    toy = Seen()
    draws = spec.draws()
    found = sample(scheduler, spec, toy, start(dtype, batch), None if draws is None else draws[:batch])
    return found, toy


# --- the grammar ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "probe", "spelled"),
    [
        ("estimate", Probe(), "estimate"),
        (" Next ", Probe("next"), "next"),
        ("start", Probe("start", 0.0), "start"),
        ("start:0", Probe("start", 0.0), "start"),
        ("start: 1.50", Probe("start", 1.5), "start:1.5"),
        (Probe("start", 1.0), Probe("start", 1.0), "start:1"),
    ],
)
def test_the_grammar(text: Any, probe: Probe, spelled: str) -> None:
    assert parse_probe(text) == probe and str(parse_probe(text)) == spelled
    assert parse_probe(spelled) == probe


@pytest.mark.parametrize("text", ["", "before", "next:1", "estimate:0", "start:", "start:-1", "start:nan", "start:1e9"])
def test_what_is_not_in_the_grammar(text: str) -> None:
    with pytest.raises(ValueError, match="expected estimate, next, start"):
        IECScheduler(DDIMScheduler(), probe=text)
    with pytest.raises(TypeError, match="expected a text"):
        IECScheduler(DDIMScheduler(), probe=1)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("probe", ["next", "start:2"])
def test_copies_carry_the_probe(probe: str) -> None:
    made = IECScheduler(DDIMScheduler(), steps="all", probe=probe)
    for other in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other.iec.relaxation == made.iec.relaxation
        assert f"probe={probe!r}" in repr(other)
    assert "probe" not in repr(IECScheduler(DDIMScheduler(), steps="all"))


# --- start: again where the step began --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("relax", "dtype"), [((0.5,), torch.float64), ((1.0, 0.7), torch.float32)], ids=["once", "twice"]
)
def test_asking_twice_at_x_t_is_the_plain_run_bit_for_bit(
    spec: Spec, relax: tuple[float, ...], dtype: torch.dtype
) -> None:
    plain, before = go(spec, spec.make(), dtype)
    found, after = go(spec, IECScheduler(spec.make(), steps="all", relax=relax, probe="start"), dtype)
    assert torch.equal(found, plain)
    assert after.evaluations == before.evaluations * (1 + len(relax))
    seen = [one for each in before.inputs for one in [each] * (1 + len(relax))]
    assert all(torch.equal(a, b) for a, b in zip(after.inputs, seen, strict=True))


def test_the_displacement_is_as_long_as_iecs_and_random(spec: Spec) -> None:
    ways, distance = [], 0.3
    for step in range(3):
        _, iec_ = go(spec, IECScheduler(spec.make(), steps=f"at:{step}"))
        _, other = go(spec, IECScheduler(spec.make(), steps=f"at:{step}", probe=f"start:{distance}"))
        assert iec_.times == other.times
        x, y, point = iec_.inputs[step], iec_.inputs[step + 1], other.inputs[step + 1]
        assert torch.equal(other.inputs[step], x)
        moved, way = (y - x).flatten(1), (point - x).flatten(1)
        if not bool((moved.norm(dim=1) > 1e-6).all()):
            continue  # a second-order solver's own first stage
        assert torch.allclose(way.norm(dim=1), distance * moved.norm(dim=1), rtol=1e-5)
        ways.append(way / way.norm(dim=1, keepdim=True))
        assert bool((torch.nn.functional.cosine_similarity(way, moved).abs() < 0.8).all())
    assert len(ways) >= 2
    every = torch.cat(ways)
    assert float((every @ every.T - torch.eye(len(every))).abs().max()) < 0.8, "directions differ by sample and step"


def test_a_displaced_correction_is_that_of_the_formula() -> None:
    spec = BY_NAME["ddim"]
    found, seen = go(spec, IECScheduler(spec.make(), steps="at:2", relax=(0.7, 0.4), probe="start:1"))
    toy, plain = Toy(), spec.make()
    plain.set_timesteps(spec.steps)
    x = start()
    for index, t in enumerate(plain.timesteps):
        y = plain.step(toy(x, t), t, x).prev_sample
        if index == 2:
            for factor, point in zip((0.7, 0.4), seen.inputs[3:5], strict=True):
                y = y + factor * (plain.step(toy(point, t), t, x).prev_sample - y)
        x = y
    assert deviation(found, x) < 1e-12
    first, second = (seen.inputs[i] - seen.inputs[2] for i in (3, 4))
    assert float(torch.nn.functional.cosine_similarity(first.flatten(1), second.flatten(1)).abs().max()) < 0.8


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++2m"])
def test_directions_belong_to_the_sample_and_not_to_the_batch(name: str) -> None:
    spec = BY_NAME[name]

    def displaced(batch: int) -> Tensor:
        return go(spec, IECScheduler(spec.make(), steps="at:1,3", probe="start:1"), batch=batch)[0]

    whole = displaced(3)
    assert torch.equal(displaced(3), whole)
    assert deviation(displaced(1), whole[:1]) < 1e-6
    assert deviation(whole, go(spec, IECScheduler(spec.make(), steps="at:1,3"))[0]) > 1e-3


def test_ddim_and_euler_are_displaced_alike() -> None:
    ways = []
    for name, extra in (("DDIMScheduler", {"clip_sample": False}), ("EulerDiscreteScheduler", {})):
        spec = Spec("", name, {"timestep_spacing": "trailing", **extra}, steps=5, generator=True)
        inputs = go(spec, IECScheduler(spec.make(), steps="at:1", probe="start:1"))[1].inputs
        ways.append((inputs[2] - inputs[1]).flatten(1).norm(dim=1))
    assert torch.allclose(*ways, rtol=1e-3), "Euler's samples are 60 times as large there, the model's inputs are not"


def test_a_frozen_sample_is_spared_and_ends_at_its_estimate() -> None:
    pipe = CASES["ddim"].build()
    plain = run(CASES["ddim"], pipe)
    with iec.enable(pipe, steps="all", relax=(0.5, 0.5, 0.5), tol=1e-9, probe="start") as session:
        found = run(CASES["ddim"], pipe)
        assert torch.equal(found.image, plain.image)
        assert session.evaluations == 8, "the first correction changes nothing, so two of three are spared"
        assert session.summary().spared == 8


# --- next: at the next timestep ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "relax"), [("at:0,2", (0.5,)), ("all", (1.0, 0.5))], ids=["once", "twice"])
def test_next_agrees_with_the_independent_loop(spec: Spec, steps: str, relax: tuple[float, ...]) -> None:
    plain, toy = go(spec, spec.make())
    count = toy.evaluations
    plan = tuple(step for step in iec.plan.resolve(steps, count).steps if step < count - 1)
    torch.manual_seed(21)
    other = Seen()
    expected = reference(spec.make(), spec, other, start(), plan, relax, None, spec.draws(), ahead=1)
    found, seen = go(spec, IECScheduler(spec.make(), steps=steps, relax=relax, probe="next"))
    assert seen.times == other.times
    assert deviation(found, expected) <= 1e-5
    assert seen.evaluations == count + len(relax) * len(plan)
    assert deviation(expected, plain) > 1e-3


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_next_by_half_is_heuns_method_on_eulers_solver(spacing: str) -> None:
    config = {"beta_start": 0.001, "beta_end": 0.02, "timestep_spacing": spacing}
    euler = Spec("", "EulerDiscreteScheduler", config, steps=6, generator=True)
    heun = Spec("", "HeunDiscreteScheduler", config, steps=6)
    expected, one = go(heun, HeunDiscreteScheduler(**config))
    found, other = go(euler, IECScheduler(EulerDiscreteScheduler(**config), steps="all", relax=(0.5,), probe="next"))
    assert other.times == one.times and one.evaluations == 11
    assert deviation(found, expected) < 1e-5
    by_itself, _ = go(euler, EulerDiscreteScheduler(**config))
    assert deviation(found, by_itself) > 1e-2


def test_next_by_half_is_heuns_method_on_ddim() -> None:
    """DDIM's step is Euler's in other coordinates, where diffusers takes it right: T divides 1000."""
    config = {"beta_start": 0.0001, "beta_end": 0.02, "timestep_spacing": "trailing"}
    ddim = Spec("", "DDIMScheduler", {**config, "clip_sample": False}, steps=20, generator=True)
    heun = Spec("", "HeunDiscreteScheduler", config, steps=20)
    expected, one = go(heun, HeunDiscreteScheduler(**config))
    made = DDIMScheduler(**config, clip_sample=False)
    found, other = go(ddim, IECScheduler(made, steps="all", relax=(0.5,), probe="next"))
    assert other.times == one.times
    assert deviation(found, expected) < 1e-3 < 1e-1 * deviation(go(ddim, made)[0], expected)


def test_the_list_of_next() -> None:
    made = IECScheduler(EulerDiscreteScheduler(timestep_spacing="trailing"), steps="at:0,2,4", probe="next")
    made.set_timesteps(5)
    own, sigmas = made.iec.inner.timesteps.tolist(), made.iec.inner.sigmas.tolist()
    order = [0, 1, 1, 2, 3, 3, 4]
    assert made.timesteps.tolist() == [own[index] for index in order]
    assert made.sigmas.tolist() == [sigmas[index] for index in (*order, 5)]
    assert made.iec.plan.steps == (0, 2), "the last step has no next timestep, as in Heun's method"
    with pytest.raises(ValueError, match="the last step alone"):
        IECScheduler(DDIMScheduler(), steps="last:1", probe="next").set_timesteps(5)


def test_the_clock_of_next_says_the_step_whose_input_it_is() -> None:
    pipe = CASES["ddim"].build()
    seen: list[Tick | None] = []
    with iec.enable(pipe, steps="at:0,2", probe="next") as session:
        hook = pipe.unet.register_forward_pre_hook(lambda *_: seen.append(session.clock.now))
        run(CASES["ddim"], pipe)
        hook.remove()
    assert [(tick.step, tick.visit) for tick in seen if tick] == [(0, 0), (1, 1), (1, 0), (2, 0), (3, 1), (3, 0)]


def test_next_of_a_quantized_model_has_the_scales_of_its_input() -> None:
    """At the next timestep of the estimate the model's error is that of the next step, by the next step's scales."""
    case, made = CASES["ddim"], calibration("ddim")
    pipe = case.build()
    inputs, outputs = [], []
    iec.quantize(pipe, made, kernel="reference")

    def note(_: Any, args: Any, output: Any) -> None:
        inputs.append(args[0].clone())
        outputs.append(output[0].clone())

    with iec.enable(pipe, steps="at:0", relax=(0.0,), probe="next"):
        hook = pipe.unet.register_forward_hook(note)
        run(case, pipe)
        hook.remove()
    assert len(inputs) == 5
    assert torch.equal(inputs[1], inputs[2]), "with λ = 0 the next step begins at the estimate"
    assert torch.equal(outputs[1], outputs[2]), "and finds there what the correction found"


def test_probes_beside_a_cache() -> None:
    case = CASES["ddim"]
    pipe = case.build()
    iec.cache(pipe, iec.DeepCache(2))
    plain = run(case, pipe)
    with iec.enable(pipe, steps="refresh", probe="start"):
        assert torch.equal(run(case, pipe).image, plain.image), "what is cached at x_t again is what was cached"
        assert (iec.summary(pipe).refreshed, iec.summary(pipe).reused) == (4, 2)
    with iec.enable(pipe, steps="refresh", probe="next"):
        assert not torch.equal(run(case, pipe).image, plain.image)
        assert (iec.summary(pipe).refreshed, iec.summary(pipe).reused) == (4, 2)
    with iec.enable(pipe, steps="at:0", relax=(0.0,), probe="next"):
        # The feature that step 1 reuses was computed from step 1's own input: reuse has no error there.
        found = run(case, pipe)
    iec.undo(pipe)
    with iec.cache(pipe, iec.DeepCache(1, schedule="at:0,1,2")):
        assert torch.allclose(found.image, run(case, pipe).image, atol=1e-5)


# --- on pipelines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_probes_on_every_pipeline(case: Any) -> None:
    pipe = case.build()
    plain = run(case, pipe)
    with iec.enable(pipe, steps="all", probe="start") as session:
        assert torch.equal(run(case, pipe).image, plain.image)
        assert session.evaluations == 2 * case.steps
    for probe, evaluations in (("start:1", 2 * case.steps), ("next", 2 * case.steps - 1)):
        with iec.enable(pipe, steps="all", probe=probe) as session:
            assert not torch.equal(run(case, pipe).image, plain.image)
            assert session.evaluations == evaluations
            assert session.summary().probe == probe and f"probe={probe}" in str(session.summary())
    assert torch.equal(run(case, pipe).image, plain.image)


def test_another_probe_is_another_session() -> None:
    pipe = CASES["ddim"].build()
    session = iec.enable(pipe, steps="all", probe="start")
    assert iec.enable(pipe, steps="all", probe="start:0") is session
    with pytest.raises(ValueError, match=r"probe='start'.*iec\.disable"):
        iec.enable(pipe, steps="all")


# --- scaling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "sd", "sdxl", "sd-img2img"])
def test_a_factor_of_one_changes_no_bit_and_undo_restores(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    plain, scheduler = run(case, pipe), pipe.scheduler
    with scale(pipe, 1.0):
        assert torch.equal(run(case, pipe).image, plain.image)
    part = scale(pipe, 0.9)
    assert isinstance(part, Scaling) and "0.9" in repr(part)
    assert not torch.equal(run(case, pipe).image, plain.image)
    assert iec.summary(pipe).scale == 0.9 and "times 0.9" in str(iec.summary(pipe))
    part.undo()
    part.undo()
    assert pipe.scheduler is scheduler
    assert torch.equal(run(case, pipe).image, plain.image)
    scale(pipe, 0.9)
    with iec.enable(pipe, steps="all"):
        pass
    assert not torch.equal(run(case, pipe).image, plain.image), "the session took itself off, not the scaling"
    iec.undo(pipe)
    assert torch.equal(run(case, pipe).image, plain.image) and iec.summary(pipe).scale == 1.0


class Scaled(Toy):
    def __call__(self, x: Tensor, t: Any) -> Tensor:
        return super().__call__(x, t) * 0.75


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++2m", "heun", "unipc"])
def test_it_is_the_denoisers_output_that_is_scaled(name: str) -> None:
    spec = BY_NAME[name]
    torch.manual_seed(21)
    expected = reference(spec.make(), spec, Scaled(), start(), (0, 2), (0.5,), None, spec.draws())
    made = IECScheduler(spec.make(), steps="at:0,2")
    made.iec.scale = 0.75
    assert deviation(go(spec, made)[0], expected) < 1e-5


def test_a_learned_variance_is_left_alone() -> None:
    config = {"variance_type": "learned_range", "clip_sample": False}
    given = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    half = torch.cat([given[:, :3] * 0.5, given[:, 3:]], 1)
    found = []
    for factor, output in ((0.5, given), (1.0, half)):
        made = IECScheduler(diffusers.DDPMScheduler(**config), steps="none")
        made.iec.scale = factor
        made.set_timesteps(10)
        found.append(made.step(output, made.timesteps[3], x, generator=generators()[0]).prev_sample)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DDIMScheduler(prediction_type="v_prediction"), "prediction_type 'v_prediction'"),
        (lambda: DDIMScheduler(prediction_type="sample"), "prediction_type 'sample'"),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(), "prediction_type 'none'"),
        (lambda: diffusers.EDMEulerScheduler(), "EDM's preconditioned output"),
    ],
    ids=["v", "sample", "flow", "edm"],
)
def test_what_is_no_noise_is_not_scaled(make: Any, said: str) -> None:
    pipe = CASES["ddim"].build()
    pipe.scheduler = scheduler = make()
    with pytest.raises(TypeError, match=said):
        scale(pipe, 0.99)
    assert pipe.scheduler is scheduler


def test_a_copied_scheduler_scales_too() -> None:
    """As it corrects: pipelines copy theirs within a run, users for another thread."""
    pipe = CASES["ddim"].build()
    with scale(pipe, 0.9):
        own, *others = pipe.scheduler, copy.copy(pipe.scheduler), copy.deepcopy(pipe.scheduler)
        sample, output = torch.ones(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.5)
        made = []
        for scheduler in (own, *others):
            scheduler.set_timesteps(4)
            made.append(scheduler.step(output, scheduler.timesteps[0], sample).prev_sample)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("factor", "kind"),
    [(0, ValueError), (-1, ValueError), (float("nan"), ValueError), ("1", TypeError), (True, TypeError)],
)
def test_bad_factors(factor: Any, kind: type[Exception]) -> None:
    pipe = CASES["ddim"].build()
    with pytest.raises(kind, match="the factor is"):
        scale(pipe, factor)
    with scale(pipe, 0.99), pytest.raises(ValueError, match=r"scaled already, by 0\.99"):
        scale(pipe, 0.98)
