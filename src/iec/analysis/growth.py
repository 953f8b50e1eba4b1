"""How a small error grows along the rest of the trajectory: injected, and watched, without and with IEC.

After step i the sample is moved by δ_i = h·d, and the run goes on; ‖δ_j‖/‖δ_i‖ is the growth until after step j. The paper
bounds it by the product of the norms ‖A_k + B_k J_k‖ of the steps k = i+1 … j (Fig. 1a), and calls what it sees there
exponential; the product takes the worst direction anew at every step, so that the growth of an error that is really there lies
below it, often far. `spectral` measures the norms.

For a step with IEC, K = 1, the derivative is (1−λ)M + λ(A + B J′M), M = A + B J, J′ that at the estimate: the error that a
sample carries already comes through both terms, since A x_t and the estimate both hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from iec.analysis.course import (
    Correction,
    Course,
    Part,
    Progress,
    beside,
    check_pair,
    check_plain,
    check_timesteps,
    everywhere,
    follow,
    parts,
)
from iec.analysis.spread import geometric, norms, roundings

Row = dict[str, Any]
DIRECTIONS = ("random", "error")


def growth(
    pipe: Any,
    seeds: Sequence[int],
    num_inference_steps: int,
    batch_size: int = 16,
    *,
    efficient: Any = None,
    after: Sequence[int] | None = None,
    directions: Sequence[str] | None = None,
    size: float = 1e-2,
    correction: Correction | None = None,
    bound: Mapping[int, float] | None = None,
    progress: Progress | None = None,
    **kwargs: Any,
) -> list[Row]:
    """Growth of an error injected into runs of `pipe`.

    Args:
        pipe: the pipeline whose dynamics are measured, in full precision: rounding answers a small change of its input by a
            jump, so a quantized model shows its own noise instead.
        efficient: the efficient model, needed for the direction "error".
        after: the steps after which an error is injected, each in a run of its own; None: after the first, and after a quarter,
            half and three quarters of the steps.
        directions: "random" (Gaussian, per sample) and/or "error" (what the efficient model's step i makes wrong at the
            full-precision sample: efficient − full, a direction that errors really take); None: what can be had of them.
        size: ‖δ_i‖/‖x‖ as injected; small, so that the growth is that of the linearised run.
        correction: arguments of `iec.enable`; None: without IEC only.
        bound: ‖A + B J‖ of steps, averaged over samples, by step.
        progress: called as progress("growth", runs done, runs).

    Returns rows: corrected, direction, after, step, timestep; `growth`, the geometric mean over samples of
    ‖δ_step‖/‖δ_after‖, with `growth_low` … `growth_high`; `bound`, the product of the norms of the steps in between (without
    IEC and where they are given, else None); `size`; `num`. The first row of an injection has step = after and growth 1.

    Raises ValueError for a step out of range, an unknown direction, "error" without an efficient model, a size not above 0, and
    pipelines that do not fit together (see `course.check_pair`).
    """
    if efficient is not None:
        check_pair(pipe, efficient)
    check_plain(pipe)
    if directions is None:
        directions = DIRECTIONS if efficient is not None else DIRECTIONS[:1]
    unknown = [name for name in directions if name not in DIRECTIONS]
    if unknown or not directions:
        raise ValueError(f"directions are {list(directions)}, expected some of {', '.join(DIRECTIONS)}")
    if "error" in directions and efficient is None:
        raise ValueError("the direction 'error' is that of an efficient model; give one, or directions=('random',)")
    if not size > 0:
        raise ValueError(f"size is {size}, expected above 0, for example 1e-2 of the sample's norm")
    correction = everywhere(correction, [pipe] if efficient is None else [efficient], num_inference_steps)
    every = parts(pipe, seeds, num_inference_steps, batch_size, kwargs)
    modes = [None] if correction is None else [None, correction]
    found: dict[tuple[bool, str, int], list[Tensor]] = {}
    timesteps: tuple[float, ...] = ()
    places: list[int] = []
    done = 0
    for part in every:
        plain = follow(pipe, part)
        timesteps = plain.timesteps
        wrong = _errors(plain, efficient, part) if efficient is not None and "error" in directions else None
        # The first batch chooses for all: which steps have no error at all does not depend on the samples.
        places = places or _places(after, plain, wrong)
        moves: dict[str, Mapping[int, Tensor] | Tensor] = {"random": _random(plain, part.seeds, places)}
        if wrong is not None:
            moves["error"] = wrong
        for mode in modes:
            base = plain if mode is None else follow(pipe, part, mode)
            for direction in directions:
                for place in places:
                    move = size * _scaled(moves[direction][place], base.states[place])
                    moved = follow(pipe, part, mode, _injecting(place, move))
                    found.setdefault((mode is not None, direction, place), []).append(_grown(base, moved, place, move))
                    done += 1
                    if progress is not None:
                        progress("growth", done, len(every) * len(modes) * len(directions) * len(places))
    return [
        row
        for (corrected, direction, place), of in found.items()
        for row in _rows(
            torch.cat(of, 1),
            timesteps,
            None if corrected else bound,
            corrected=corrected,
            direction=direction,
            after=place,
            size=size,
        )
    ]


def _places(after: Sequence[int] | None, course: Course, wrong: Tensor | None) -> list[int]:
    """The steps after which is injected; those not asked for by number lie where the efficient model is wrong at all."""
    num_steps, silent = len(course.timesteps), set()
    if wrong is not None:
        least = roundings(course.states.dtype)
        pairs = enumerate(zip(wrong, course.states, strict=True))
        silent = {step for step, (local, state) in pairs if not bool((norms(local) > least * norms(state)).all())}
    if after is None:
        able = [step for step in range(num_steps) if step not in silent]
        wanted = [min(num_steps * quarter // 4, num_steps - 1) for quarter in range(4)]
        after = [step for want in wanted for step in [next((s for s in able if s >= want), None)] if step is not None]
    outside = [place for place in after if not 0 <= place < num_steps]
    if outside:
        raise ValueError(f"after is {list(after)}, expected steps in 0 … {num_steps - 1}")
    if not after or silent & set(after):
        raise ValueError(
            f"the efficient model makes no error at all at steps {sorted(silent & set(after)) or 'of this run'} (whole passes of "
            "a cache make none), so there is no direction of it; inject after other steps, or in directions=('random',)"
        )
    return sorted(set(after))


def _random(course: Course, seeds: Sequence[int], places: Sequence[int]) -> dict[int, Tensor]:
    """Gaussian directions, each from the sample's seed and the step, so that they do not depend on the batch."""
    shape = course.states.shape[2:]

    def drawn(seed: int, place: int) -> Tensor:
        generator = torch.Generator().manual_seed((1 << 48) + (seed << 16) + place)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {place: torch.stack([drawn(seed, place) for seed in seeds]) for place in places}


def _errors(course: Course, efficient: Any, part: Part) -> Tensor:
    """What each step of the efficient model makes wrong, begun at the full-precision sample: (T, B, …), float64."""
    found = follow(efficient, part, None, beside(course))
    check_timesteps(course.timesteps, found.timesteps)
    return found.states.double() - course.states.double()


def _scaled(direction: Tensor, sample: Tensor) -> Tensor:
    """The direction (B, …), of the norm of each sample, float64."""
    shape = (-1, *(1,) * (sample.dim() - 1))
    return direction * (norms(sample) / norms(direction)).view(shape)


def _injecting(place: int, move: Tensor) -> Callable[[int, Tensor], Tensor | None]:
    """A `change` that moves the sample once."""
    return lambda step, y: (y.double() + move.to(y.device)).to(y.dtype) if step == place else None


def _grown(base: Course, moved: Course, place: int, move: Tensor) -> Tensor:
    """‖δ_j‖/‖δ_place‖ for j = place … T − 1, as (T − place, B); δ_place as it was after rounding to the sample's dtype."""
    injected = (base.states[place].double() + move).to(base.states.dtype).double() - base.states[place].double()
    start = norms(injected)
    apart = moved.states[place + 1 :].double() - base.states[place + 1 :].double()
    return torch.stack([torch.ones_like(start), *(norms(each) / start for each in apart)])


def _rows(grown: Tensor, timesteps: Sequence[float], bound: Mapping[int, float] | None, **about: Any) -> list[Row]:
    rows: list[Row] = []
    product: float | None = None if bound is None else 1.0
    for offset, values in enumerate(grown):
        step, found = about["after"] + offset, geometric(values)
        if offset and product is not None and bound is not None:
            product = product * bound[step] if step in bound else None
        numbers = {"growth": found.value, "growth_low": found.low, "growth_high": found.high, "bound": product}
        rows.append({**about, "step": step, "timestep": timesteps[step], **numbers, "num": len(values)})
    return rows
