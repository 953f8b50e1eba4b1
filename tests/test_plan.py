"""The grammar of `steps`, relaxation presets, and the step clock."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

import iec
from iec.plan import PRESETS, CorrectionPlan, Relaxation, StepClock, Tick, resolve, resolve_relaxation
from sampling import SPECS, Toy, start


def steps(spec: Any, num_steps: int = 10, refresh: Any = None) -> tuple[int, ...]:
    return resolve(spec, num_steps=num_steps, refresh=refresh).steps


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", tuple(range(10))),
        ("none", ()),
        ("first:1", (0,)),
        ("first:3", (0, 1, 2)),
        ("last:3", (7, 8, 9)),
        ("ends:2", (0, 1, 8, 9)),
        ("ends:1/10", (0, 9)),
        ("first:1/3", (0, 1, 2)),  # rounded down
        ("last:1/3", (7, 8, 9)),
        ("first:1/100", (0,)),  # at least one
        ("ends:10/10", tuple(range(10))),
        ("first:10", tuple(range(10))),
        ("ends:6", tuple(range(10))),  # the ends overlap
        ("at:0", (0,)),
        ("at:9,3,0,3", (0, 3, 9)),  # sorted, each once
        ("first:2 + last:1", (0, 1, 9)),
        ("first:5 & last:7", (3, 4)),
        ("first:1 + first:5 & last:7", (0, 3, 4)),  # & binds more tightly
        ("first:5 & last:7 + first:1", (0, 3, 4)),
        ("all & at:2,4 & at:4,6 + none", (4,)),
        ("none + at:5", (5,)),
        ("  ALL ", tuple(range(10))),
        ("First : 1 / 5", (0, 1)),
        ("at: 1 , 2", (1, 2)),
        ([3, 1], (1, 3)),
        ((), ()),
        (range(0, 10, 4), (0, 4, 8)),
        (torch.tensor([2, 5]), (2, 5)),
    ],
    ids=str,
)
def test_every_form(spec: Any, expected: tuple[int, ...]) -> None:
    plan = resolve(spec, num_steps=10)
    assert plan.steps == expected
    assert plan.num_steps == 10 and len(plan) == len(expected)
    assert [step in plan for step in range(10)] == [step in expected for step in range(10)]
    assert resolve(plan, num_steps=10) == plan
    # What it says of itself means the same.
    assert resolve(plan.spec, num_steps=10).steps == expected


@pytest.mark.parametrize(("top", "bottom"), [(1, 3), (2, 3), (1, 7), (1, 10), (29, 100), (57, 100), (1, 1)])
@pytest.mark.parametrize("num_steps", [1, 3, 7, 10, 50, 100, 250])
def test_fractions_are_exact(num_steps: int, top: int, bottom: int) -> None:
    """Rounded down, but at least one; without the rounding of floats (0.29 · 100 = 28.999…)."""
    count = max(1, int(Fraction(top, bottom) * num_steps))
    assert steps(f"first:{top}/{bottom}", num_steps) == tuple(range(count))
    assert steps(f"last:{top}/{bottom}", num_steps) == tuple(range(num_steps - count, num_steps))
    assert steps(f"ends:{top}/{bottom}", num_steps) == tuple(
        sorted({*range(count), *range(num_steps - count, num_steps)})
    )


def test_the_papers_ablation() -> None:
    """T = 100, refreshing every tenth step: all, 1/4, 1/8, 1/10, 1/20 give 10, 5, 3, 2, 1 corrections (METHOD 1.3)."""
    refresh = range(0, 100, 10)
    counts = [len(steps(f"ends:{part} & refresh", 100, refresh)) for part in ("1/1", "1/4", "1/8", "1/10", "1/20")]
    assert counts == [10, 5, 3, 2, 1]
    assert steps("refresh", 100, refresh) == tuple(refresh)
    assert steps("refresh + last:1", 100, refresh) == (*refresh, 99)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "not understood"),
        ("sometimes", "not understood"),
        ("al", "not understood"),
        ("all all", "not understood"),
        ("first", "neither a count nor a fraction"),
        ("first:", "neither a count nor a fraction"),
        ("first:x", "neither a count nor a fraction"),
        ("first:-1", "neither a count nor a fraction"),
        ("first:0.1", "neither a count nor a fraction"),
        ("first:10%", "neither a count nor a fraction"),
        ("first:0", "0"),
        ("first:0/5", "fraction"),
        ("first:1/0", "fraction"),
        ("first:3/2", "fraction"),
        ("ends:1/2/3", "neither"),
        ("first:11", "11"),
        ("at:", "not a step index"),
        ("at:1,", "not a step index"),
        ("at:1.5", "not a step index"),
        ("at:10", "10"),
        ("at:-1", "-1"),
        ([10], "10"),
        ("all +", "not understood"),
        ("& all", "not understood"),
        ("all + + all", "not understood"),
        ("first:2 & last:2", "none"),
        ("all & none", "none"),
        ("none + none", "none"),
        ("refresh", "cache"),
        ("first:1 + refresh", "cache"),
        ("first", "first"),  # what was found is repeated
    ],
    ids=str,
)
def test_nonsense_is_refused(spec: Any, said: str) -> None:
    with pytest.raises(ValueError, match="steps") as caught:
        resolve(spec, num_steps=10)
    assert said in str(caught.value)


@pytest.mark.parametrize("spec", [5, None, [None], ["x"], [1.5], [True, False], object], ids=str)
def test_what_is_no_plan_is_refused(spec: Any) -> None:
    with pytest.raises(TypeError, match="steps"):
        resolve(spec, num_steps=10)


@pytest.mark.parametrize("num_steps", [0, -3])
def test_a_run_has_steps(num_steps: int) -> None:
    with pytest.raises(ValueError, match="num_steps"):
        resolve("all", num_steps=num_steps)


def test_refresh_steps() -> None:
    assert steps("refresh", 10, (0, 5)) == (0, 5)
    assert steps("refresh & first:1/2", 10, iter((0, 5))) == (0,)
    with pytest.raises(ValueError, match="10"):
        steps("refresh", 10, (0, 10))
    with pytest.raises(ValueError, match="none"):
        steps("refresh", 10, ())


def test_a_plan_for_another_run_is_refused() -> None:
    plan = resolve("ends:1/10", num_steps=100)
    with pytest.raises(ValueError, match="100 steps"):
        resolve(plan, num_steps=50)


def test_plans_are_plain_data() -> None:
    plan = resolve("at:1,2", num_steps=5)
    assert plan == CorrectionPlan((1, 2), 5, "at:1,2")
    assert hash(plan) == hash(resolve("at:1,2", num_steps=5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.steps = ()  # pyright: ignore[reportAttributeAccessIssue]
    assert iec.plan.resolve is resolve


# --- relaxation -------------------------------------------------------------------------------------------------------


def test_presets() -> None:
    assert resolve_relaxation("paper", None) == Relaxation((0.5,), 1e-5)
    assert resolve_relaxation("released-ddpm", None) == Relaxation((0.5,), 1e-3)
    assert resolve_relaxation("released-ldm", None) == Relaxation((1.0, 0.5), 1e-6)
    assert resolve_relaxation("paper", 0.1).tol == 0.1
    assert set(PRESETS) == {"paper", "released-ddpm", "released-ldm"}


@pytest.mark.parametrize("relax", [0.5, 1, (0.5,), [0.5], torch.tensor([0.5])], ids=str)
def test_ways_to_write_relax(relax: Any) -> None:
    assert resolve_relaxation(relax, None) == Relaxation((float(torch.as_tensor(relax).reshape(-1)[0]),), None)


# --- the clock --------------------------------------------------------------------------------------------------------


def test_the_clock_by_itself() -> None:
    clock = StepClock()
    assert clock.now is None
    clock.start(3)
    assert clock.now is None and clock.num_steps == 3
    clock.move(2, 1, True)
    assert clock.now == Tick(2, 1, True) and clock.now.correction
    clock.move(0, 0, False)
    assert not clock.now.correction
    for step, visit in ((3, 0), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="no such tick"):
            clock.move(step, visit, True)
    clock.stop()
    assert clock.now is None
    with pytest.raises(ValueError, match="at least one"):
        clock.start(0)


@pytest.mark.parametrize(
    "spec", SPECS[:1] + [s for s in SPECS if s.name in ("euler", "heun", "unipc")], ids=lambda s: s.name
)
def test_the_clock_during_a_run(spec: Any) -> None:
    """At every evaluation it says the step and the visit; outside a run it says nothing."""
    scheduler = iec.IECScheduler(spec.make(), steps="at:0,2", relax=(1.0, 0.5))
    clock, ticks, toy, x = scheduler.iec.clock, [], Toy(), start()
    assert clock.now is None
    scheduler.set_timesteps(4)
    count = clock.num_steps
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        ticks.append(clock.now)
        x = scheduler.step(toy(scaled, t), t, x).prev_sample
    expected = []
    for step in range(count):
        visits = 3 if step in (0, 2) else 1
        expected += [Tick(step, visit, visit == visits - 1) for visit in range(visits)]
    assert ticks == expected
    assert clock.now is None


def test_the_clock_of_a_new_run() -> None:
    scheduler = iec.IECScheduler(DDIMScheduler(), steps="all")
    scheduler.set_timesteps(4)
    x = start()
    scheduler.step(x, scheduler.timesteps[0], x)
    assert scheduler.iec.clock.now == Tick(0, 1, True)
    scheduler.set_timesteps(6)
    assert scheduler.iec.clock.now == Tick(0, 0, False)
    assert scheduler.iec.clock.num_steps == 6
