"""Ways to choose the refresh steps of a cache (METHOD 3.1 and 4.1), and their grammar.

    uniform            0, N, 2N, …
    quadratic[:p]      denser at the beginning by the power p, 0.1 … 10 (1.5); p = 1 is nearly uniform
    centred[:c[,p]]    denser around step c (15) by the power p, above 1 and up to 10 (1.4)
    at:0,3,9           these steps
    dps                least change of the feature within the groups, by dynamic programming on calibrated features

N is the interval; all but `at` spend about T/N whole passes on T steps. A window restricts caching to a part of the run: the
schedule is laid out over the steps of the window, and every step outside is a whole pass.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from torch import Tensor

from iec.core.segmentation import segment
from iec.plan.cache import CachePlan, check_interval

FORMS = "uniform, quadratic[:p], centred[:c[,p]], at:0,3,9, dps"
DECREMENT = 0.02  # of the power, in the search of the centred schedule

Window = tuple[int | float, int | float]


class Schedule(NamedTuple):
    """A form of the grammar with its numbers: `power` of quadratic and centred, `centre` of centred, `steps` of at."""

    kind: str
    power: float = 0.0
    centre: int = 0
    steps: tuple[int, ...] = ()


class Bounds(NamedTuple):
    """What a DPS plan keeps: the number of groups, each from one refresh to the next, and their permitted lengths."""

    groups: int
    shortest: int
    longest: int


def parse_schedule(text: str) -> Schedule:
    """Read the grammar above. Raises TypeError for what is no text, ValueError for what is not in the grammar."""
    if not isinstance(text, str):
        raise TypeError(f"schedule is {text!r}, expected a text: {FORMS}")
    kind, colon, argument = (part.strip() for part in text.strip().lower().partition(":"))
    items = [item.strip() for item in argument.split(",")] if colon else []
    if kind in ("uniform", "dps") and not colon:
        return Schedule(kind)
    if kind == "quadratic" and len(items) <= 1:
        power = _number(items[0], text) if items else 1.5
        return Schedule(kind, _quadratic_power(power))
    if kind == "centred" and len(items) <= 2:
        centre = _step(items[0], text) if items else 15
        power = _number(items[1], text) if len(items) == 2 else 1.4
        return Schedule(kind, _centred_power(power), centre)
    if kind == "at":
        steps = tuple(sorted({_step(item, text) for item in items or [""]}))
        if steps[0] != 0:
            raise ValueError(
                f"schedule {text!r} lacks step 0, which is always a whole pass as there is nothing to reuse"
            )
        return Schedule(kind, steps=steps)
    raise ValueError(f"schedule {text!r} is not understood; expected one of {FORMS}")


def make_plan(
    schedule: str, interval: int, num_steps: int, window: Window | None = None, costs: Tensor | None = None
) -> CachePlan:
    """The plan of a run of `num_steps`.

    Args:
        schedule: the grammar above.
        interval: N, at least 1; `at` has no use for it.
        num_steps: T, at least 1.
        window: (begin, end), each a step or, as a float, a fraction of T in 0 … 1 rounded down: nothing is reused outside
            begin … end − 1. The steps of `at` and the centre of `centred` are counted from the beginning of the run.
        costs: for `dps`: (T, L) with L ≥ min(2N, T), see `iec.core.segmentation`.

    Raises ValueError or TypeError for a schedule, interval or window that cannot be, and `dps` without costs.
    """
    chosen, interval = parse_schedule(schedule), check_interval(interval)
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, expected at least 1")
    begin, end = (0, num_steps) if window is None else resolve_window(window, num_steps)
    if chosen.kind == "at":
        if chosen.steps[-1] >= num_steps:
            raise ValueError(
                f"schedule {schedule!r}: {chosen.steps[-1]} not in 0..{num_steps - 1}, the steps of this run"
            )
        inside = {begin, *(step for step in chosen.steps if begin <= step < end)}
    else:
        if chosen.kind == "uniform":
            plan = uniform(interval, end - begin)
        elif chosen.kind == "quadratic":
            plan = quadratic(interval, end - begin, chosen.power)
        elif chosen.kind == "centred":
            if not begin <= chosen.centre < end:
                raise ValueError(f"schedule {schedule!r}: the centre {chosen.centre} not in {begin}..{end - 1}")
            plan = centred(interval, end - begin, chosen.centre - begin, chosen.power)
        elif costs is None:
            raise ValueError(
                "schedule 'dps' is computed from the features of a calibration: use iec.CacheQuant with a calibration; without "
                "one, choose another schedule"
            )
        elif len(costs) != num_steps:
            raise ValueError(
                f"the costs are those of {len(costs)} steps, the run has {num_steps}; calibrate for {num_steps}"
            )
        else:
            plan = dps(costs[begin:end], interval)
        inside = {begin + step for step in plan.refresh}
    return CachePlan((*range(begin), *sorted(inside), *range(end, num_steps)), num_steps)


def uniform(interval: int, num_steps: int) -> CachePlan:
    """Refresh at 0, N, 2N, … (METHOD 3.1). Raises ValueError unless `interval` N and `num_steps` are at least 1."""
    return CachePlan(tuple(range(0, num_steps, check_interval(interval))), num_steps)


def quadratic(interval: int, num_steps: int, power: float = 1.5) -> CachePlan:
    """Refresh at ⌊(T^{1/p} j/k)^p⌋, j < k = ⌈T/N⌉ (METHOD 3.1). Where these coincide there are fewer than k.

    Raises ValueError for a power outside 0.1 … 10.
    """
    count = _count(interval, num_steps)
    power = _quadratic_power(power)
    if count == num_steps:  # every step, which coinciding values would miss
        return uniform(1, num_steps)
    line = np.linspace(0, num_steps ** (1 / power), count + 1)[:-1]
    return CachePlan(tuple(np.unique((line**power).astype(np.int64)).tolist()), num_steps)


def centred(interval: int, num_steps: int, centre: int = 15, power: float = 1.4) -> CachePlan:
    """Refresh most often around step `centre`, k = ⌈T/N⌉ times, by the first power that gives so many (METHOD 3.1).

    It goes down from `power` in steps of 0.02 while above 1. Where none gives k steps, the nearest number is taken, the
    smaller of two.

    Raises ValueError for a power that is not above 1 and at most 10, and a centre outside the run.
    """
    count = _count(interval, num_steps)
    power = _centred_power(power)
    if not 0 <= centre < num_steps:
        raise ValueError(f"centre {centre} not in 0..{num_steps - 1}, the steps of this run")
    if count == num_steps:
        return uniform(1, num_steps)
    nearest: tuple[int, ...] = ()
    while power > 1:
        steps = _centred_steps(count, num_steps, centre, power)
        if not nearest or _off(steps, count) < _off(nearest, count):
            nearest = steps
        if len(steps) == count:
            break
        power -= DECREMENT
    return CachePlan(nearest, num_steps)


def _centred_steps(count: int, num_steps: int, centre: int, power: float) -> tuple[int, ...]:
    """The refresh steps for one power.

    (−c)^{1/p} is the complex principal power: a signed one gives other steps. The first value is −c but for rounding, which
    decides whether it is cut to −c or −c + 1, and in 3 % of cases so the plan. NumPy's rounding gives the released lists.
    """
    line = np.linspace((-centre) ** (1 / power), (num_steps - centre) ** (1 / power), count + 1)
    values = np.unique((line**power).real.astype(np.int64))[1:-1]
    return (0, *(int(value) + centre for value in values))


def _off(steps: tuple[int, ...], count: int) -> tuple[int, int]:
    return abs(len(steps) - count), len(steps)


def dps(costs: Tensor, interval: int) -> CachePlan:
    """CacheQuant's plan (METHOD 4.1): the least total cost of the groups, within `bounds`.

    costs: (T, L) with L ≥ min(2N, T): costs[s, l − 1] is that of reusing the feature of step s at s + 1 … s + l − 1; see
    `iec.core.segmentation`. Raises ValueError for costs of another shape, or not finite.
    """
    return CachePlan(segment(costs, *bounds(interval, len(costs))), len(costs))


def bounds(interval: int, num_steps: int) -> Bounds:
    """The bounds of a DPS plan (METHOD 4.1): ⌈T/N⌉ groups of ⌈N/2⌉ … 2N steps; a run that is shorter is one group."""
    count = _count(interval, num_steps)
    return Bounds(count, min(-(-interval // 2), num_steps), min(2 * interval, num_steps))


def resolve_window(window: Window, num_steps: int) -> tuple[int, int]:
    """The window's steps begin … end − 1 of a run of `num_steps`, as (begin, end).

    Raises TypeError or ValueError as `check_window` does, and ValueError where nothing is left or the run is shorter.
    """
    begin, end = (
        math.floor(Fraction(str(float(edge))) * num_steps) if isinstance(edge, float) else edge  # 0.29 is 29/100
        for edge in check_window(window)
    )
    if not 0 <= begin < end <= num_steps:
        raise ValueError(
            f"window {window} is begin {begin} and end {end} in a run of {num_steps} steps; expected "
            f"0 ≤ begin < end ≤ {num_steps}"
        )
    return begin, end


def check_window(window: Window) -> Window:
    """`window`, if some run may have it. Raises TypeError for what is no pair of numbers, ValueError for numbers out of range."""
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"window is {window!r}, expected (begin, end), steps such as 10 or fractions such as 0.1")
    for edge in window:
        if not isinstance(edge, int | float) or isinstance(edge, bool):
            raise TypeError(f"window holds {edge!r}, expected a step such as 10 or a fraction such as 0.1")
        if isinstance(edge, float) and not 0 <= edge <= 1:
            raise ValueError(f"window holds the fraction {edge}, expected 0.0 … 1.0 (a step is an integer)")
        if edge < 0:
            raise ValueError(f"window holds the step {edge}, expected at least 0")
    begin, end = window
    if type(begin) is type(end) and begin >= end:
        raise ValueError(f"window is ({begin}, {end}), which holds no step; expected begin < end")
    return begin, end


def _count(interval: int, num_steps: int) -> int:
    """⌈T/N⌉, how many whole passes a run is worth."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, expected at least 1")
    return -(-num_steps // check_interval(interval))


def _quadratic_power(power: float) -> float:
    if not 0.1 <= power <= 10:
        raise ValueError(f"the power of a quadratic schedule is {power}, expected 0.1 … 10, usually 1.5")
    return power


def _centred_power(power: float) -> float:
    if not 1 < power <= 10:
        raise ValueError(f"the power of a centred schedule is {power}, expected above 1 and up to 10, usually 1.4")
    return power


def _number(text: str, schedule: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text):
        raise ValueError(f"schedule {schedule!r}: {text!r} is not a number such as 1.5")
    return float(text)


def _step(text: str, schedule: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise ValueError(f"schedule {schedule!r}: {text!r} is not a step index")
    return int(text)
