"""Cache plans: schedules, their grammar, windows, and how plans are shown."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import iec
from iec.bench.plans import plot_plans
from iec.core.segmentation import group_costs
from iec.plan import (
    CachePlan,
    Schedule,
    bounds,
    centred,
    check_window,
    dps,
    make_plan,
    parse_schedule,
    quadratic,
    resolve_window,
    uniform,
)

# --- the plan itself ------------------------------------------------------------------------------------------------


def test_reference() -> None:
    plan = CachePlan((0, 3, 4), 7)
    assert [plan.reference(step) for step in range(7)] == [0, 0, 0, 3, 4, 4, 4]
    for step in (-1, 7):
        with pytest.raises(ValueError, match=r"not in 0\.\.6"):
            plan.reference(step)


@pytest.mark.parametrize(
    ("refresh", "num_steps", "text", "bar"),
    [
        ((0,), 1, "1 steps, 1 whole: 0", "|"),
        ((0, 5), 8, "8 steps, 2 whole: 0, 5", "|....|.."),
        ((0, 1, 4, 5, 6, 7), 8, "8 steps, 6 whole: 0, 1, 4-7", "||..||||"),
        (tuple(range(12)), 12, "12 steps, 12 whole: 0-11", "||||||||||||"),
    ],
)
def test_shown(refresh: tuple[int, ...], num_steps: int, text: str, bar: str) -> None:
    plan = CachePlan(refresh, num_steps)
    assert str(plan) == text and plan.bar() == bar


def test_long_plans_are_shown_short() -> None:
    plan = uniform(5, 250)
    assert str(plan) == "250 steps, 50 whole: 0, 5, 10, 15, 20, 25, 30, 35, 40, 45, …, 245"
    assert "…" not in str(uniform(5, 60)) and str(uniform(5, 60)).endswith("50, 55")  # twelve are not yet many
    assert len(plan.bar()) == 250 and plan.bar().count("|") == 50


def test_plans_are_plain_data() -> None:
    plan = make_plan("quadratic", 5, 100)
    assert plan == CachePlan(plan.refresh, 100) and hash(plan) == hash(quadratic(5, 100))
    assert dataclasses.asdict(plan) == {"refresh": plan.refresh, "num_steps": 100}


# --- schedules ------------------------------------------------------------------------------------------------------


def test_quadratic_by_hand() -> None:
    """T = 64, k = 4, p = 2: (8 j/4)² = 0, 4, 16, 36. For 9 steps and p = 3, k = 5: 9 (j/5)³ = 0, 0.07, 0.6, 1.9, 4.6."""
    assert quadratic(16, 64, 2.0).refresh == (0, 4, 16, 36)
    assert quadratic(2, 9, 3.0).refresh == (0, 1, 4)
    assert quadratic(5, 100) == make_plan("quadratic:1.5", 5, 100) == make_plan("quadratic", 5, 100)
    assert quadratic(5, 50, 1.0).refresh == uniform(5, 50).refresh


def test_centred_at_step_0_is_by_hand() -> None:
    """With c = 0 all is real: v = T (j/k)^p. T = 64, k = 4, p = 2: 4, 16, 36."""
    assert centred(16, 64, 0, 2.0).refresh == (0, 4, 16, 36)


@pytest.mark.parametrize(
    ("num_steps", "interval", "centre", "power", "expected"),
    [
        (50, 5, 15, 1.4, (0, 5, 9, 13, 17, 21, 26, 31, 37, 43)),  # the demonstration of DeepCache on Stable Diffusion
        (100, 10, 15, 1.4, (0, 7, 14, 20, 29, 38, 49, 60, 73, 86)),
        (250, 20, 15, 1.4, (0, 10, 19, 32, 47, 64, 83, 103, 124, 147, 171, 196, 222)),
        (50, 5, 10, 3.0, (0, 2, 4, 7, 10, 15, 21, 27, 34, 41)),
        (20, 5, 15, 3.0, (0, 8, 14, 17)),
        (100, 15, 0, 1.2, (0, 9, 22, 36, 51, 66, 83)),
    ],
)
def test_centred_is_the_released_list(
    num_steps: int, interval: int, centre: int, power: float, expected: tuple[int, ...]
) -> None:
    """What `sample_from_quad_center` of DeepCache returns."""
    assert centred(interval, num_steps, centre, power) == CachePlan(expected, num_steps)


def reference_centred(
    interval: int, num_steps: int, centre: int, power: float, nudge: float = 0.0
) -> tuple[tuple[int, ...], float] | None:
    """METHOD 3.1 in Python's complex numbers; None where no power gives the number asked for.

    `nudge` is a relative change of the values before they are cut to integers.
    """
    count = -(-num_steps // interval)
    while power > 1:
        low, high = (-centre) ** (1 / power), (num_steps - centre) ** (1 / power)
        line = [low + (high - low) * j / count for j in range(count + 1)]
        values = sorted({int(complex(z**power).real * (1 + nudge)) for z in line})
        steps = (0, *(value + centre for value in values[1:-1]))
        if len(steps) == count:
            return steps, power
        power -= 0.02
    return None


@pytest.mark.parametrize("power", [1.05, 1.2, 1.4, 2.0, 3.0])
def test_centred_is_the_specification(power: float) -> None:
    """Wherever rounding does not decide; the lists need no repair to be valid plans."""
    compared = reduced = failed = 0
    for num_steps, interval, centre in itertools.product((10, 20, 50, 100, 250), (2, 3, 5, 10, 20), (0, 3, 7, 15, 40)):
        if interval >= num_steps or centre >= num_steps:
            continue
        expected, *others = (
            reference_centred(interval, num_steps, centre, power, nudge) for nudge in (0.0, 1e-9, -1e-9)
        )
        if others != [expected, expected]:
            continue
        found = centred(interval, num_steps, centre, power)
        if expected is None:
            failed += 1
            assert len(found) < -(-num_steps // interval)
            continue
        compared += 1
        reduced += expected[1] < power
        assert found == CachePlan(expected[0], num_steps), (num_steps, interval, centre)
    assert compared > 50 and (reduced > 10 or power < 1.3), (compared, reduced, failed)


def test_a_signed_power_would_give_other_steps() -> None:
    """The demonstration of DeepCache: c = 15, p = 1.4, T = 50 (METHOD 3.1)."""
    found = centred(5, 50, 15, 1.4)
    assert len(found) == 10 and found == make_plan("centred", 5, 50)
    ends = [-(15 ** (1 / 1.4)), 35 ** (1 / 1.4)]
    line = [ends[0] + (ends[1] - ends[0]) * j / 10 for j in range(10)]
    signed = {15 + int(np.sign(z) * abs(z) ** 1.4) for z in line}
    assert set(found.refresh) != signed
    gaps = [after - before for before, after in itertools.pairwise(found.refresh)]
    assert gaps.index(min(gaps)) in range(1, 4) and max(gaps) == gaps[-1]  # densest near the centre


def test_where_no_power_gives_the_number_the_nearest_is_taken() -> None:
    """The released code stops there without a result."""
    misses = [
        (num_steps, interval, centre, power)
        for num_steps in (3, 5, 8, 10)
        for interval in range(1, num_steps)
        for centre in range(num_steps)
        for power in (1.02, 1.2, 1.4, 2.2)
        if interval > 1 and reference_centred(interval, num_steps, centre, power) is None
    ]
    assert misses
    for num_steps, interval, centre, power in misses:
        count = -(-num_steps // interval)
        assert 1 <= len(centred(interval, num_steps, centre, power)) < count


@pytest.mark.parametrize("text", ["uniform", "quadratic", "quadratic:3", "centred:2,1.4", "centred:0,3", "dps"])
def test_interval_1_and_beyond_the_end(text: str) -> None:
    """Interval 1 is a whole pass at every step; an interval of the whole run is one at its beginning only."""
    for num_steps in (3, 7, 50):
        costs = group_costs(torch.rand(num_steps, 2 * num_steps + 20))
        assert make_plan(text, 1, num_steps, costs=costs).refresh == tuple(range(num_steps))
        for interval in (num_steps, num_steps + 3):
            assert make_plan(text, interval, num_steps, costs=costs).refresh == (0,)


def test_every_plan_is_about_as_many() -> None:
    for interval, num_steps in itertools.product((2, 3, 5, 10, 15), (20, 50, 100, 250)):
        count = len(uniform(interval, num_steps))
        assert len(make_plan("centred", interval, num_steps)) == count
        assert count / 2 < len(make_plan("quadratic", interval, num_steps)) <= count


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quadratic(5, 50, 0.05), "power of a quadratic schedule is 0.05"),
        (lambda: quadratic(5, 50, float("nan")), "nan"),
        (lambda: centred(5, 50, 15, 1.0), "power of a centred schedule is 1.0, expected above 1"),
        (lambda: centred(5, 50, 15, 1e6), "up to 10"),
        (lambda: centred(5, 50, 50), r"centre 50 not in 0\.\.49"),
        (lambda: centred(5, 50, -1), "centre -1"),
        (lambda: make_plan("centred", 5, 15), r"centre 15 not in 0\.\.14"),
        (lambda: make_plan("at:0,3,50", 5, 50), r"50 not in 0\.\.49"),
        (lambda: make_plan("dps", 5, 50), "iec.CacheQuant with a calibration"),
        (lambda: make_plan("dps", 5, 50, costs=torch.zeros(49, 10)), "those of 49 steps, the run has 50"),
        (lambda: make_plan("uniform", 0, 50), "interval is 0"),
        (lambda: make_plan("uniform", 5, 0), "num_steps is 0"),
        (lambda: quadratic(5, 0), "num_steps is 0"),
        (lambda: bounds(5, 0), "num_steps is 0"),
    ],
)
def test_impossible_plans_are_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


# --- dynamic programming --------------------------------------------------------------------------------------------


def test_bounds() -> None:
    """⌈T/N⌉ groups of ⌈N/2⌉ … 2N steps, and some split always keeps them (the released code fails at 2N > T)."""
    assert bounds(10, 100) == (10, 5, 20) and bounds(15, 100) == (7, 8, 30) and bounds(20, 250) == (13, 10, 40)
    for num_steps, interval in itertools.product(range(1, 60), range(1, 70)):
        groups, shortest, longest = bounds(interval, num_steps)
        assert groups == len(uniform(interval, num_steps))
        assert groups * shortest <= num_steps <= groups * longest and 1 <= shortest <= longest <= num_steps


def test_dps_refreshes_where_the_feature_jumps() -> None:
    """A feature that is constant but for three jumps: the plan's groups begin at them, and cost nothing."""
    jumps = (0, 7, 12, 21)
    feature = torch.tensor([float(sum(step >= jump for jump in jumps)) for step in range(30)])
    distances = torch.zeros(30, 16)
    for start in range(30):
        for ahead in range(min(16, 30 - start)):
            distances[start, ahead] = (feature[start + ahead] - feature[start]).abs()
    plan = dps(group_costs(distances), 8)
    assert plan == CachePlan(jumps, 30)
    assert make_plan("dps", 8, 30, costs=group_costs(distances)) == plan


def test_dps_within_a_window() -> None:
    """The window's own ⌈T/N⌉ groups, which do not reach out of it: what happens outside is not looked at."""
    costs = group_costs(torch.rand(30, 16, generator=torch.Generator().manual_seed(0)))
    expected = [step + 6 for step in dps(costs[6:24], 8).refresh]
    assert len(expected) == 3 and expected != list(range(6, 24, 8))
    plan = make_plan("dps", 8, 30, (6, 24), costs)
    assert plan.refresh == (*range(6), *expected, *range(24, 30))
    costs[:6], costs[24:] = torch.nan, torch.nan
    assert make_plan("dps", 8, 30, (6, 24), costs) == plan


# --- the grammar ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uniform", Schedule("uniform")),
        (" Uniform ", Schedule("uniform")),
        ("dps", Schedule("dps")),
        ("quadratic", Schedule("quadratic", 1.5)),
        ("quadratic:2", Schedule("quadratic", 2.0)),
        ("quadratic: .5 ", Schedule("quadratic", 0.5)),
        ("centred", Schedule("centred", 1.4, 15)),
        ("centred:7", Schedule("centred", 1.4, 7)),
        ("centred : 7 , 1.2", Schedule("centred", 1.2, 7)),
        ("at:0", Schedule("at", steps=(0,))),
        ("at:9,0,3,9", Schedule("at", steps=(0, 3, 9))),
    ],
)
def test_every_form(text: str, expected: Schedule) -> None:
    assert parse_schedule(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not understood; expected one of uniform, quadratic"),
        ("sometimes", "'sometimes' is not understood"),
        ("uniform:5", "not understood"),
        ("dps:1", "not understood"),
        ("quadratic:", "'' is not a number"),
        ("quadratic:x", "'x' is not a number"),
        ("quadratic:-1", "'-1' is not a number"),
        ("quadratic:nan", "'nan' is not a number"),
        ("quadratic:0", "is 0.0, expected"),
        ("quadratic:1,2", "not understood"),
        ("centred:1.5", "'1.5' is not a step index"),
        ("centred:-3", "'-3' is not a step index"),
        ("centred:15,1", "is 1.0, expected above 1"),
        ("centred:15,1.4,2", "not understood"),
        ("at", "'' is not a step index"),
        ("at:", "'' is not a step index"),
        ("at:0,x", "'x' is not a step index"),
        ("at:3,9", "lacks step 0"),
    ],
)
def test_nonsense_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_schedule(text)


@pytest.mark.parametrize("text", [None, 5, ("uniform",)])
def test_what_is_no_text_is_refused(text: Any) -> None:
    with pytest.raises(TypeError, match="expected a text"):
        parse_schedule(text)


# --- windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ((0, 100), (0, 100)),
        ((0.0, 1.0), (0, 100)),
        ((10, 11), (10, 11)),
        ((0.1, 0.9), (10, 90)),
        ((0.29, 0.57), (29, 57)),  # floats: 28.999… and 56.999…
        ((0.105, 0.999), (10, 99)),  # rounded down
        ((5, 0.5), (5, 50)),
        ((0.5, 60), (50, 60)),
        ([20, 30], (20, 30)),
    ],
)
def test_windows(window: Any, expected: tuple[int, int]) -> None:
    assert resolve_window(window, 100) == expected


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("uniform", (0, 1, 2, 6, 8, 9)),
        ("at:0,4,9", (0, 1, 2, 4, 8, 9)),
        ("at:0,2", (0, 1, 2, 8, 9)),
        ("quadratic:2", (0, 1, 2, 3, 8, 9)),  # 2 + (√6 · 1/2)² = 3.5
        ("centred:2,2", (0, 1, 2, 3, 8, 9)),  # the same, as the centre is the first step inside
    ],
)
def test_nothing_is_reused_outside_the_window(schedule: str, expected: tuple[int, ...]) -> None:
    """Steps 2 … 7 of 10, interval 4 (3 for the quadratic ones)."""
    interval = 4 if schedule[0] in "ua" else 3
    plan = make_plan(schedule, interval, 10, (2, 8))
    assert plan == CachePlan(expected, 10)
    assert make_plan(schedule, interval, 10, (0.2, 0.8)) == plan


def test_a_window_of_everything_changes_nothing() -> None:
    costs = group_costs(torch.rand(50, 20, generator=torch.Generator().manual_seed(0)))
    for schedule in ("uniform", "quadratic", "centred", "at:0,7", "dps"):
        plan = make_plan(schedule, 5, 50, costs=costs)
        assert make_plan(schedule, 5, 50, (0, 50), costs) == make_plan(schedule, 5, 50, (0.0, 1.0), costs) == plan


def test_the_centre_is_counted_from_the_beginning_of_the_run() -> None:
    plan = make_plan("centred:15", 5, 100, (10, 60))
    shifted = centred(5, 50, 5)
    assert plan.refresh == (*range(10), *(10 + step for step in shifted.refresh), *range(60, 100))
    with pytest.raises(ValueError, match=r"centre 15 not in 20\.\.59"):
        make_plan("centred:15", 5, 100, (20, 60))


@pytest.mark.parametrize(
    ("window", "kind", "words"),
    [
        ("10", TypeError, "expected \\(begin, end\\)"),
        ((10,), TypeError, "expected \\(begin, end\\)"),
        ((1, 2, 3), TypeError, "expected \\(begin, end\\)"),
        (5, TypeError, "expected \\(begin, end\\)"),
        ((True, 5), TypeError, "True"),
        ((0, None), TypeError, "None"),
        ((0.0, 1.5), ValueError, "fraction 1.5"),
        ((float("nan"), 0.5), ValueError, "nan"),
        ((-1, 5), ValueError, "step -1"),
        ((5, 5), ValueError, "no step"),
        ((0.5, 0.2), ValueError, "no step"),
    ],
)
def test_windows_that_no_run_can_have(window: Any, kind: type[Exception], words: str) -> None:
    for refused in (check_window, lambda window: iec.DeepCache(window=window)):
        with pytest.raises(kind, match=words):
            refused(window)


@pytest.mark.parametrize("window", [(0, 51), (60, 70), (30, 0.5), (0.11, 0.115)])
def test_windows_that_this_run_cannot_have(window: Any) -> None:
    """Beyond the end, the wrong way round, or of no step at all."""
    assert check_window(window) == window
    with pytest.raises(ValueError, match="in a run of 50 steps"):
        make_plan("uniform", 5, 50, window)


# --- DeepCache ------------------------------------------------------------------------------------------------------


def test_deepcache_takes_schedule_and_window() -> None:
    assert iec.DeepCache(5).plan(12) == uniform(5, 12)
    assert iec.DeepCache(5, schedule="centred:3").plan(50) == centred(5, 50, 3)
    assert iec.DeepCache(5, window=(0.2, 0.8)).plan(50) == make_plan("uniform", 5, 50, (10, 40))
    assert iec.DeepCache(schedule="at:0,7").plan(9) == CachePlan((0, 7), 9)
    config = iec.DeepCache(3, window=[2, 8])  # type: ignore[arg-type]
    assert config == iec.DeepCache(3, window=(2, 8)) and hash(config) == hash(iec.DeepCache(3, window=(2, 8)))
    assert repr(config) == "DeepCache(interval=3, branch=None, window=(2, 8))"
    assert repr(iec.DeepCache(3, 1)) == "DeepCache(interval=3, branch=1)"


def test_deepcache_refuses_what_it_cannot_plan() -> None:
    with pytest.raises(ValueError, match=r"use iec\.CacheQuant"):
        iec.DeepCache(schedule="dps")
    with pytest.raises(ValueError, match="not understood"):
        iec.DeepCache(schedule="often")
    with pytest.raises(TypeError, match="expected a text"):
        iec.DeepCache(schedule=None)  # type: ignore[arg-type]


# --- the drawing ----------------------------------------------------------------------------------------------------

NO_PLOT = "matplotlib is an optional extra"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_plot(tmp_path: Path) -> None:
    """A row for each plan, dark where a pass is whole; nothing is left in matplotlib's global state."""
    pytest.importorskip("matplotlib", reason=NO_PLOT)
    had = "matplotlib.pyplot" in sys.modules
    path = tmp_path / "plans.png"
    assert plot_plans({"often": uniform(1, 50)}, path) == path
    often = pixels(path)
    rare = pixels(plot_plans({"often": uniform(10, 50)}, str(path)))
    assert often.shape == rare.shape
    dark = [int((image[..., 2] > image[..., 0] + 60).sum()) for image in (often, rare)]
    assert dark[1] > 0 and 7 < dark[0] / dark[1] < 11  # 50 whole passes to 5, less the seams between neighbours
    three = {"often": uniform(1, 50), "rare": uniform(10, 50), "of another length": centred(5, 100)}
    assert len(pixels(plot_plans(three, path))) > len(often) + 80
    assert ("matplotlib.pyplot" in sys.modules) == had
    assert path.read_bytes() == plot_plans(three, tmp_path / "again.png").read_bytes()


def test_plot_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no plans"):
        plot_plans({}, tmp_path / "plans.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'iec-diffusion\[plot\]'"):
        plot_plans({"a": uniform(5, 50)}, tmp_path / "plans.png")
    assert not list(tmp_path.iterdir())
