"""Which steps are corrected, and how strongly.

The grammar of `steps`, where N is a count or a fraction such as 1/10 of the steps (rounded down, at least one):

    all   none   first:N   last:N   ends:N   at:0,3,99   refresh
    a + b   joins,   a & b   intersects and binds more tightly

`refresh` are the steps at which an active cache runs the whole model. Step 0 is the first (noisiest) one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from iec.core.correction import check_relax, check_tol

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
    """How a step is corrected: `factors` (λ₁ … λ_K) and the tolerance `tol` at which a sample is frozen (None: never)."""

    factors: tuple[float, ...]
    tol: float | None


PRESETS = {
    "paper": Relaxation((0.5,), 1e-5),
    "released-ddpm": Relaxation((0.5,), 1e-3),
    "released-ldm": Relaxation((1.0, 0.5), 1e-6),
}


def resolve_relaxation(relax: Sequence[float] | float | str, tol: float | None) -> Relaxation:
    """Check `relax` and `tol`; a preset's name stands for its factors, and for its tolerance where `tol` is None.

    Raises ValueError or TypeError for an unknown preset, an empty or negative `relax`, a negative `tol`.
    """
    if isinstance(relax, str):
        if relax not in PRESETS:
            raise ValueError(f"unknown relax preset {relax!r}; known: {', '.join(PRESETS)}; or give factors such as (0.5,)")
        preset = PRESETS[relax]
        return Relaxation(preset.factors, preset.tol if tol is None else check_tol(tol))
    return Relaxation(check_relax(relax), check_tol(tol))


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
            raise ValueError(f"the plan was made for {steps.num_steps} steps, the run has {num_steps}; resolve its spec {steps.spec!r} anew")
        return steps
    if not isinstance(steps, str):
        try:
            listed = [int(step) for step in steps]
        except (TypeError, ValueError) as error:
            raise TypeError(f"steps is {steps!r}; expected a string ({FORMS}) or step indices") from error
        steps = "at:" + ",".join(map(str, listed)) if listed else "none"
    held = None if refresh is None else frozenset(refresh)
    chosen: set[int] = set()
    for joined in steps.split("+"):
        parts = [_atom(part.strip().lower(), steps, num_steps, held) for part in joined.split("&")]
        chosen |= frozenset.intersection(*parts)
    if not chosen and steps.strip().lower() != "none":
        raise ValueError(f"steps {steps!r} selects none of the {num_steps} steps; use 'none' if that is meant")
    return CorrectionPlan(tuple(sorted(chosen)), num_steps, steps)


def _atom(atom: str, spec: str, num_steps: int, refresh: frozenset[int] | None) -> frozenset[int]:
    every = range(num_steps)
    if atom == "all":
        return frozenset(every)
    if atom == "none":
        return frozenset()
    if atom == "refresh":
        if refresh is None:
            raise ValueError(f"steps {spec!r}: 'refresh' needs an active cache, and this pipeline has none")
        outside = sorted(step for step in refresh if step not in every)
        if outside:
            raise ValueError(f"steps {spec!r}: the cache refreshes at {outside}, but the run has only {num_steps} steps")
        return refresh
    kind, colon, argument = (part.strip() for part in atom.partition(":"))
    if colon and kind in ("first", "last", "ends"):
        count = _count(argument, spec, num_steps)
        first, last = frozenset(every[:count]), frozenset(every[num_steps - count :])
        return {"first": first, "last": last, "ends": first | last}[kind]
    if colon and kind == "at":
        return frozenset(_index(item.strip(), spec, num_steps) for item in argument.split(","))
    raise ValueError(f"steps {spec!r}: {atom!r} is not understood; expected {FORMS}")


def _count(text: str, spec: str, num_steps: int) -> int:
    if re.fullmatch(r"\d+", text):
        count = int(text)
        if not 1 <= count <= num_steps:
            raise ValueError(f"steps {spec!r}: the count {count} is not in 1..{num_steps}, the steps of this run")
        return count
    if re.fullmatch(r"\d+\s*/\s*\d+", text):
        top, bottom = (int(number) for number in text.split("/"))
        if bottom == 0 or not 0 < top <= bottom:
            raise ValueError(f"steps {spec!r}: the fraction {text} is not above 0 and at most 1")
        return max(1, int(Fraction(top, bottom) * num_steps))
    raise ValueError(f"steps {spec!r}: {text!r} is neither a count nor a fraction such as 1/10")


def _index(text: str, spec: str, num_steps: int) -> int:
    if not re.fullmatch(r"-?\d+", text):
        raise ValueError(f"steps {spec!r}: {text!r} is not a step index")
    step = int(text)
    if not 0 <= step < num_steps:
        raise ValueError(f"steps {spec!r}: step {step} is not in 0..{num_steps - 1}, the steps of this run")
    return step
