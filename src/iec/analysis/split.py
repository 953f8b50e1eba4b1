"""The error of an efficient model, split: what it has in common at nearby inputs, and what averages out.

Let e(x) = ε̃(x, t) − ε(x, t) be what the efficient model ε̃ adds to the full-precision model ε at the same input. A step of IEC
with K = 1 is

    x¹ = A x + B [(1−λ) ε̃(x) + λ ε̃(x⁰)]
       = A x + B [(1−λ) ε(x) + λ ε(x⁰)]        what the corrected full-precision model would do
             + B [(1−λ) e(x) + λ e(x⁰)]        the error that is left

With ‖e(x⁰)‖ = ‖e(x)‖ and c their correlation ⟨e(x), e(x⁰)⟩/(‖e(x)‖ ‖e(x⁰)‖), the error that is left has the square

    ‖(1−λ) e(x) + λ e(x⁰)‖² = ‖e‖² [(1−λ)² + λ² + 2λ(1−λ) c],    at λ = ½:  ‖e‖² (1 + c)/2 = ‖e‖² [c + (1−c)/2].

So the shared part c‖e‖² stays whole, and of the decorrelated part (1−c)‖e‖² one half stays, at λ = ½: two evaluations average it,
which is all that IEC can do about it. At c = 1 (a bias, the same at both inputs) a correction changes the error not at all; what
it does to the sample, B λ [ε(x⁰) − ε(x)], it does to a model without error as well. Averaging needs no x⁰: another input near x
serves as well. That is why random ones are measured beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iec.analysis.course import Progress, check_pair, check_timesteps, parts
from iec.analysis.recording import Step
from iec.analysis.spread import mean, norms, quartiles, roundings

Row = dict[str, Any]
DISTANCES = (0.003, 0.01, 0.03, 0.1)
TOLD = ("distance", "error", "correlation", "kept", "correlation_median", "kept_median")


class Point(NamedTuple):
    """Where the error is compared with that at x: `kind` "estimate" is IEC's x⁰; "random" lies in a random direction, at
    `distance` times ‖x‖, or (None) as far as x⁰."""

    kind: str
    distance: float | None = None


def split(
    full: Any,
    efficient: Any,
    seeds: Sequence[int],
    num_inference_steps: int,
    batch_size: int = 16,
    *,
    distances: Sequence[float] = DISTANCES,
    steps: Sequence[int] | None = None,
    progress: Progress | None = None,
    **kwargs: Any,
) -> list[Row]:
    """How far the errors of `efficient` at nearby inputs agree, at every step of its own runs.

    Args:
        full: the pipeline in full precision.
        efficient: the same model, quantized or cached, without IEC, with a denoiser of its own. Under a cache every input is
            evaluated as the step is: by a whole pass, or with the feature that the step found.
        distances: of random points, ‖x′ − x‖/‖x‖; x⁰, and a random point as far as it, are always among them.
        steps: which steps; None: all. A step costs two evaluations for x and for every further point.
        progress: called as progress("split", steps done, steps).

    Returns rows: point ("estimate" or "random"), nominal (the distance asked for, None for that of x⁰), step, timestep;
    `distance`, the mean ‖x′ − x‖/‖x‖ of the model's inputs; `error`, the mean ‖e(x)‖/‖ε(x)‖; `correlation`, c, and `kept`,
    ‖(e(x) + e(x′))/2‖²/‖e(x)‖²: the part of the square error that averaging the two leaves (1 where all is shared, ½ where
    nothing is and both are equally large); both as the mean with its standard error `…_sem`, and as the median with the quartiles
    (`…_median`, `…_median_low`, `…_median_high`), because a few samples may be of another kind; `num`. Samples at which the
    efficient model makes no error (whole passes of a cache that is not quantized) are left out, and steps of such samples only.

    Raises ValueError for a distance not above 0, a step out of range, pipelines that do not fit together (see
    `course.check_pair`); RuntimeError where the denoiser cannot be evaluated aside (see `denoising.Denoise`).
    """
    check_pair(full, efficient)
    bad = [distance for distance in distances if not distance > 0]
    if bad:
        raise ValueError(
            f"distances are {list(distances)}, expected numbers above 0, such as 0.01 of the sample's norm"
        )
    points = [Point("estimate"), Point("random"), *(Point("random", float(distance)) for distance in distances)]
    every = parts(full, seeds, num_inference_steps, batch_size, kwargs)
    found: dict[tuple[Point, int], list[Tensor]] = {}
    timesteps: tuple[float, ...] = ()
    done = 0
    for part in every:
        ideal, real = part.record(full), part.record(efficient)
        timesteps = tuple(step.timestep for step in real)
        check_timesteps((step.timestep for step in ideal), timesteps)
        chosen = _chosen(steps, len(timesteps))
        for number in chosen:
            with torch.no_grad():
                for point, values in _errors(real[number], ideal[number], points):
                    found.setdefault((point, number), []).append(values)
            done += 1
            if progress is not None:
                progress("split", done, len(every) * len(chosen))
    return [row for (point, number), of in found.items() for row in _rows(point, number, torch.cat(of, 1), timesteps)]


def _chosen(steps: Sequence[int] | None, num_steps: int) -> list[int]:
    chosen = list(range(num_steps)) if steps is None else sorted(set(steps))
    if not chosen or chosen[0] < 0 or chosen[-1] >= num_steps:
        raise ValueError(f"steps are {chosen}, expected some of 0 … {num_steps - 1}")
    return chosen


def _errors(real: Step, ideal: Step, points: Sequence[Point]) -> Iterator[tuple[Point, Tensor]]:
    """For each point the distance, ‖e(x)‖/‖ε(x)‖, c, and what averaging keeps: (4, B), float64, NaN where there is no error."""
    x, exact = real.x, ideal.denoise(real.x)
    error = _difference(real.denoise(x), exact)
    size = norms(error)
    relative = size / norms(exact)
    relative = relative.where(relative > roundings(exact.dtype), torch.nan)
    # A correction evaluates the model at the estimate; of schedulers that scale the model's inputs, at that of another level.
    estimate = real.estimates[0] * real.denoise_estimate.ratio
    own = norms(estimate - x)
    for point in points:
        if point.kind == "estimate":
            other = estimate
        else:
            length = own if point.distance is None else point.distance * norms(x)
            other = x + (_directions(real, point) * length.view(-1, *(1,) * (x.dim() - 1))).to(x)
        beside = _difference(real.denoise(other), ideal.denoise(other))
        inner = (error * beside).flatten(1).sum(1)
        kept = norms(error + beside).square() / (4 * size.square())
        yield point, torch.stack([norms(other - x) / norms(x), relative, inner / (size * norms(beside)), kept]).cpu()


def _difference(real: Tensor, exact: Tensor) -> Tensor:
    return real.double() - exact.double()


def _directions(step: Step, point: Point) -> Tensor:
    """Random directions of norm 1 (B, …), float64, each from the seed of its sample, the step and the distance."""
    shape = step.x.shape[1:]
    salt = 0 if point.distance is None else 1 + int(1e6 * point.distance)

    def drawn(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed((salt << 40) + (seed << 16) + step.index)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = torch.stack([drawn(seed) for seed in step.seeds]).to(step.x.device)
    return made / norms(made).view(-1, *(1,) * len(shape))


def _rows(point: Point, number: int, values: Tensor, timesteps: Sequence[float]) -> list[Row]:
    """The row of a point at a step; none where the model makes no error."""
    values = values[:, values.isfinite().all(0)]
    if not values.shape[1]:
        return []
    row: Row = {
        "point": point.kind,
        "nominal": point.distance,
        "step": number,
        "timestep": timesteps[number],
        "distance": mean(values[0]).value,
        "error": mean(values[1]).value,
    }
    for name, each in (("correlation", values[2]), ("kept", values[3])):
        average, middle = mean(each), quartiles(each)
        row |= {name: average.value, f"{name}_sem": average.sem, f"{name}_median": middle.value}
        row |= {f"{name}_median_low": middle.low, f"{name}_median_high": middle.high}
    return [{**row, "num": values.shape[1]}]


def totals(rows: Sequence[Row]) -> dict[tuple[str, float | None], Mapping[str, float]]:
    """Means over the steps, by point: distance, error, correlation, kept, and of the medians of the last two."""
    points = dict.fromkeys((row["point"], row["nominal"]) for row in rows)
    found: dict[tuple[str, float | None], Mapping[str, float]] = {}
    for point in points:
        of = [row for row in rows if (row["point"], row["nominal"]) == point]
        found[point] = {name: sum(row[name] for row in of) / len(of) for name in TOLD}
    return found
