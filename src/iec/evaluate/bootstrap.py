"""Bootstrap over images: how far a metric would move had other seeds been drawn.

Two arms of a comparison share their seeds, so image i of the one belongs to image i of the other. The resamples depend on
the number of images and a seed only: every arm is resampled alike, and the difference of two arms is resampled as a pair,
which takes out what their images have in common. Most differences that matter are far smaller than the two metrics' own
intervals, so compare by `difference`, not by whether two intervals overlap.

Intervals are centred: a Fréchet distance grows in a resample, as repeated images make it look like a smaller set. Its
quantiles therefore say how it spreads, not where it lies. They are taken about their own mean and put about the value.

Of few images there is none: resamples of n spread too little, by (n − 1)/n and what Student's t has more in its tails, so that
the 95 % interval of a mean would hold it in 89 % of all cases for 8 images, 81 % for 4, and none for 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

LEVEL = 0.95
DRAWS = 200
FEWEST = 8  # images, for an interval


class Interval(NamedTuple):
    """A metric and the ends of its interval, in the unit of the metric; NaN where there is no interval."""

    value: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the interval, or may as there is none; of a difference, `holds(0)` says that it may be none."""
        return not (value < self.low or value > self.high)


class Scheme(NamedTuple):
    """What rows were drawn: of `count`, with `seed`; `kind` is "bootstrap", "linear" (the same, to first order) or "halves"."""

    kind: str
    count: int
    seed: int


@dataclasses.dataclass(frozen=True, eq=False)
class Resampled:
    """A metric's `value` and its values `draws` (D,), float64, in the resamples of `scheme`; between which `bounds` all lie."""

    value: float
    draws: np.ndarray
    scheme: Scheme
    bounds: tuple[float, float] = (-math.inf, math.inf)

    def interval(self, level: float = LEVEL) -> Interval:
        """The value with its interval, see `interval`, as far as that lies within the bounds.

        No interval (NaN) without draws, of fewer than `FEWEST` images, and where no draw has left a bound: that all of 12 images
        are inside does not say how many of 1,000 would be.
        """
        stuck = math.isfinite(self.value) and self.value in self.bounds and bool(np.all(self.draws == self.value))
        if len(self.draws) == 0 or self.scheme.count < FEWEST or stuck:
            return Interval(self.value, math.nan, math.nan)
        found = interval(self.value, self.draws, level)
        return found._replace(low=max(found.low, self.bounds[0]), high=min(found.high, self.bounds[1]))

    def minus(self, other: Resampled) -> Resampled:
        """This metric less the same one of another arm, resample by resample.

        Raises ValueError unless both were resampled alike: the same number of images, draws and seed.
        """
        if self.scheme != other.scheme or len(self.draws) != len(other.draws):
            raise ValueError(
                f"a difference needs the same resamples on both sides, found {len(self.draws)} of {self.scheme} "
                f"and {len(other.draws)} of {other.scheme}; measure both with equal images, draws and seed"
            )
        return Resampled(
            float(_subtract(np.array(self.value), np.array(other.value))),
            _subtract(self.draws, other.draws),
            self.scheme,
        )


def _subtract(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a - b; two equal infinities (PSNR of equal images) do not differ."""
    same = np.isinf(a) & (a == b)
    return np.where(same, 0.0, a) - np.where(same, 0.0, b)


def interval(value: float, draws: np.ndarray, level: float = LEVEL) -> Interval:
    """`value` with the central `level` of the resampled values `draws` (D,), shifted so that their mean lies at `value`.

    Infinite draws (PSNR where resamples hold nothing but equal images) have no mean; their plain quantiles are given.
    Raises ValueError for fewer than 2 draws, NaN, or a level outside 0..1.
    """
    draws = np.asarray(draws, dtype=np.float64)
    if draws.ndim != 1 or len(draws) < 2:
        raise ValueError(f"an interval needs at least 2 resampled values, found an array of {draws.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected 0 < level < 1")
    if np.isnan(draws).any() or np.isnan(value):
        raise ValueError(f"an interval about {value} from draws of which {int(np.isnan(draws).sum())} are NaN")
    ends = [(1 - level) / 2, (1 + level) / 2]
    if np.isinf(draws).any() or np.isinf(value):
        low, high = np.quantile(draws, ends, method="nearest")
    else:
        low, high = value + np.quantile(draws - draws.mean(), ends)
    return Interval(float(value), float(low), float(high))


def difference(a: Resampled, b: Resampled, level: float = LEVEL) -> Interval:
    """a - b, paired, with its interval. Raises ValueError unless both were resampled alike."""
    return a.minus(b).interval(level)


def resamples(count: int, draws: int = DRAWS, seed: int = 0) -> Iterator[np.ndarray]:
    """`draws` times `count` row numbers (count,), int64, drawn from 0..count-1 with replacement.

    They depend on `count`, `seed` and the number of the draw, so more draws begin with the same ones. Raises ValueError
    for fewer than 1 row or draw, or a negative seed.
    """
    _check(count, 1, draws, seed)
    return (np.random.default_rng((seed, draw)).integers(count, size=count) for draw in range(draws))


def halves(count: int, draws: int = DRAWS, seed: int = 0) -> Iterator[np.ndarray]:
    """`draws` times count // 2 different row numbers, ascending, int64: for metrics that repeated rows would spoil.

    A mean over a random half has the error (1/(count/2) - 1/count) σ² = σ²/count about that of the whole, which is the
    error of the whole itself. Raises ValueError for fewer than 2 rows, 1 draw, or a negative seed.
    """
    _check(count, 2, draws, seed)
    return (
        np.sort(np.random.default_rng((seed, draw)).permutation(count)[: count // 2]).astype(np.int64)
        for draw in range(draws)
    )


def _check(count: int, least: int, draws: int, seed: int) -> None:
    if count < least or draws < 1 or seed < 0:
        raise ValueError(
            f"resamples of {count} rows, {draws} draws, seed {seed}: expected at least {least} rows, 1 draw and a seed >= 0"
        )


def weights(count: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """How often each row occurs in each of the `resamples` (draws, count), float64; every row sums to `count`."""
    return np.stack(
        [np.bincount(rows, minlength=count) for rows in resamples(count, draws, seed)],
    ).astype(np.float64)


def of_rows(statistic: Callable[[torch.Tensor], float], rows: torch.Tensor, draws: int, seed: int) -> Resampled:
    """Any statistic of `rows` (N, ...): its value, and its values in the resamples of the rows.

    A statistic that compares rows with one another (nearest neighbours, pairs) sees repeated rows in a resample.
    """
    drawn = [statistic(rows[torch.from_numpy(chosen)]) for chosen in resamples(len(rows), draws, seed)]
    return Resampled(float(statistic(rows)), np.array(drawn, dtype=np.float64), Scheme("bootstrap", len(rows), seed))


def of_mean(
    values: torch.Tensor,
    draws: int,
    seed: int,
    then: Callable[[np.ndarray], np.ndarray] = lambda mean: mean,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Resampled:
    """`then` of the mean of `values` (N,), which lies within `bounds`: for RMSE `then` is a root, of squared errors. `then` works
    on arrays.

    Raises ValueError for another rank, no values, or values that are not finite.
    """
    held = np.asarray(values, dtype=np.float64)
    if held.ndim != 1 or len(held) == 0 or not np.isfinite(held).all():
        raise ValueError(f"values of the shape {held.shape}: expected (N,), N >= 1, all finite")
    drawn = np.array([held[rows].mean() for rows in resamples(len(held), draws, seed)])
    return Resampled(float(then(np.array(held.mean()))), then(drawn), Scheme("bootstrap", len(held), seed), bounds)


def of_influence(
    value: float,
    influence: torch.Tensor,
    draws: int,
    seed: int,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Resampled:
    """A metric's `value` and, to first order, its values in the resamples of N images: plus their `influence` (N,), summed.

    `influence` is the derivative by each image's weight, see `iec.evaluate.influence`; it sums to 0.
    """
    held = np.asarray(influence, dtype=np.float64)
    drawn = np.array([held[rows].sum() for rows in resamples(len(held), draws, seed)])
    return Resampled(float(value), value + drawn, Scheme("linear", len(held), seed), bounds)
