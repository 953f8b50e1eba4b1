"""Which steps are corrected, and how strongly.

The grammar of `steps`, where N is a count or a fraction such as 1/10 of the steps (rounded down, at least one):

    all   none   first:N   last:N   ends:N   at:0,3,99   refresh
    a + b   joins,   a & b   intersects and binds more tightly

`refresh` are the steps at which an active cache runs the whole model. Step 0 is the first (noisiest) one.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from iec.core.correction import check_relax, check_tol
from iec.plan.probe import Probe, parse_probe

FORMS = "all, none, first:N, last:N, ends:N (N a count or a fraction like 1/10), at:0,3,99, refresh, joined by + and &"


@dataclass(frozen=True)
class CorrectionPlan:
    """The corrected steps of a run: `steps` sorted, each in 0 … num_steps − 1; `spec` is what they were resolved from."""

    steps: tuple[int, ...]
    num_steps: int
    spec: str

    def __contains__(self, step: object) -> bool:
        return step in self.steps

    def __len__(self) -> int:
        return len(self.steps)


class Relaxation(NamedTuple):
    """How a step is corrected: `factors` (λ₁ … λ_K), the tolerance `tol` at which a sample is frozen (None: never), and the
    `probe`, where the denoiser is evaluated.
    """

    factors: tuple[float, ...]
    tol: float | None
    probe: Probe = Probe()


PRESETS = {
    "paper": Relaxation((0.5,), 1e-5),
    "released-ddpm": Relaxation((0.5,), 1e-3),
    "released-ldm": Relaxation((1.0, 0.5), 1e-6),
}


def resolve_relaxation(
    relax: Sequence[float] | float | str, tol: float | None, probe: str | Probe = "estimate"
) -> Relaxation:
    """Check `relax`, `tol` and `probe`; a preset's name stands for its factors, and for its tolerance where `tol` is None.

    Raises ValueError or TypeError for an unknown preset, an empty or negative `relax`, a negative `tol`, an unknown probe.
    """
    place = parse_probe(probe)
    if isinstance(relax, str):
        if relax not in PRESETS:
            raise ValueError(
                f"unknown relax preset {relax!r}; known: {', '.join(PRESETS)}; or give factors such as (0.5,)"
            )
        preset = PRESETS[relax]
        return Relaxation(preset.factors, preset.tol if tol is None else check_tol(tol), place)
    return Relaxation(check_relax(relax), check_tol(tol), place)


def resolve(
    steps: str | Iterable[int] | CorrectionPlan, num_steps: int, refresh: Iterable[int] | None = None
) -> CorrectionPlan:
    """Turn `steps` into the sorted steps of a run of `num_steps`.

    Args:
        steps: the grammar above, or step indices.
        num_steps: length of the run, at least 1.
        refresh: the refresh steps of an active cache; None when there is no cache.

    Raises ValueError for a spelling that is not in the grammar, a step or count out of range, `refresh` without a cache,
    and a result that is empty though `none` was not asked for.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, expected at least 1")
    if isinstance(steps, CorrectionPlan):
        if steps.num_steps != num_steps:
            raise ValueError(
                f"the plan was made for {steps.num_steps} steps, the run has {num_steps}; resolve its spec {steps.spec!r} anew"
            )
        return steps
    steps = spell(steps)
    held = None if refresh is None else frozenset(refresh)
    chosen: set[int] = set()
    for parts in parse(steps):
        chosen |= frozenset.intersection(*(_select(atom, steps, num_steps, held) for atom in parts))
    if not chosen and steps.strip().lower() != "none":
        raise ValueError(f"steps {steps!r} selects none of the {num_steps} steps; use 'none' if that is meant")
    return CorrectionPlan(tuple(sorted(chosen)), num_steps, steps)


def spell(steps: str | Iterable[int]) -> str:
    """Write step indices in the grammar, and check what no run, however long, could mean.

    Raises TypeError for what is neither a string nor step indices, ValueError as `parse` does.
    """
    if not isinstance(steps, str):
        try:
            listed = [_index(step) for step in steps]
        except TypeError as error:
            raise TypeError(f"steps is {steps!r}; expected a string ({FORMS}) or step indices") from error
        steps = "at:" + ",".join(map(str, listed)) if listed else "none"
    parse(steps)
    return steps


def _index(step: object) -> int:
    """A step index as an int; a mask of booleans, or 1.5, is no list of steps."""
    if isinstance(step, bool):
        raise TypeError("a boolean is no step index")
    return operator.index(step)  # pyright: ignore[reportArgumentType]


class Atom(NamedTuple):
    """One form of the grammar: `argument` is the N of first, last and ends, and the indices of at."""

    kind: str
    argument: int | Fraction | tuple[int, ...] | None = None


def parse(steps: str) -> list[list[Atom]]:
    """Read the grammar: a union of intersections of atoms. Raises ValueError for what no run, however long, could mean."""
    return [[_atom(part.strip().lower(), steps) for part in joined.split("&")] for joined in steps.split("+")]


def _atom(text: str, spec: str) -> Atom:
    if text in ("all", "none", "refresh"):
        return Atom(text)
    kind, _, argument = (part.strip() for part in text.partition(":"))
    if kind in ("first", "last", "ends"):
        if re.fullmatch(r"\d+", argument):
            if int(argument) == 0:
                raise ValueError(f"steps {spec!r}: the count 0 selects nothing; use 'none' if that is meant")
            return Atom(kind, int(argument))
        if re.fullmatch(r"\d+\s*/\s*\d+", argument):
            top, bottom = (int(number) for number in argument.split("/"))
            if bottom == 0 or not 0 < top <= bottom:
                raise ValueError(f"steps {spec!r}: the fraction {argument} is not above 0 and at most 1")
            return Atom(kind, Fraction(top, bottom))
        raise ValueError(f"steps {spec!r}: {argument!r} is neither a count nor a fraction such as 1/10")
    if kind == "at":
        items = [item.strip() for item in argument.split(",")]
        for item in items:
            if not re.fullmatch(r"-?\d+", item):
                raise ValueError(f"steps {spec!r}: {item!r} is not a step index")
        return Atom(kind, tuple(map(int, items)))
    raise ValueError(f"steps {spec!r}: {text!r} is not understood; expected {FORMS}")


def _select(atom: Atom, spec: str, num_steps: int, refresh: frozenset[int] | None) -> frozenset[int]:
    every = range(num_steps)
    kind, argument = atom
    if kind == "none":
        return frozenset()
    if kind == "refresh":
        if refresh is None:
            raise ValueError(f"steps {spec!r}: 'refresh' needs an active cache, and this pipeline has none")
        argument = tuple(refresh)
    if isinstance(argument, tuple):
        outside = sorted(step for step in argument if step not in every)
        if outside:
            raise ValueError(f"steps {spec!r}: {outside} not in 0..{num_steps - 1}, the steps of this run")
        return frozenset(argument)
    if argument is None:  # all
        argument = num_steps
    count = max(1, int(argument * num_steps)) if isinstance(argument, Fraction) else argument
    if count > num_steps:
        raise ValueError(f"steps {spec!r}: the count {count} is not in 1..{num_steps}, the steps of this run")
    first, last = frozenset(every[:count]), frozenset(every[num_steps - count :])
    return {"all": first, "first": first, "last": last, "ends": first | last}[kind]
