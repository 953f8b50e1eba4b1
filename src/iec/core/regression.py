"""Per-channel affine fit y ≈ a x + b from moments gathered batch by batch (DEC of CacheQuant, METHOD 4.3 and 4.4).

The moments are centred and merged by the update of Chan, Golub and LeVeque (1983), in float64: a mean that is large against the
spread costs no digits, and the order of the batches matters to the last bits only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

PIECE = 2**18  # numbers converted to float64 at a time: they stay in the cache, which makes it 3 times as fast
CONSTANT = 1e-12  # a spread below this fraction of the mean is rounding: float32 cannot even represent it


class Fit(NamedTuple):
    """y ≈ `gain`·x + `offset`; float64 (*rows, C) each."""

    gain: Tensor
    offset: Tensor


class PairMoments:
    """Moments of pairs (x, y) per channel, for one fit or a table of them.

    Args:
        channels: C ≥ 1.
        rows: shape of the table, () for a single fit; (T,) for one row per step.

    Attributes: `count` int64 (*rows,), pairs per channel; float64 (*rows, C): `mean_x`, `mean_y`, and the sums of products of
    deviations `sum_xx` = Σ(x − x̄)², `sum_xy` = Σ(x − x̄)(y − ȳ).
    """

    def __init__(self, channels: int, rows: tuple[int, ...] = ()) -> None:
        if channels < 1 or any(length < 1 for length in rows):
            raise ValueError(f"channels is {channels}, rows {rows}; expected at least 1 each")
        shape = (*rows, channels)
        self.count = torch.zeros(rows, dtype=torch.int64)
        self.mean_x, self.mean_y, self.sum_xx, self.sum_xy = torch.zeros(4, *shape, dtype=torch.float64).unbind()

    @property
    def rows(self) -> tuple[int, ...]:
        """Shape of the table."""
        return tuple(self.count.shape)

    @property
    def channels(self) -> int:
        """C."""
        return self.mean_x.shape[-1]

    def update(self, x: Tensor, y: Tensor, row: int | tuple[int, ...] = (), channel_dim: int = 1) -> None:
        """Take pairs into account: `x` and `y` of one shape, such as (N, C) or (B, C, H, W), on any device, any dtype.

        `row` is the row of the table that they belong to; `channel_dim` the dimension of the channels, −1 for tokens (B, N, C).
        Raises ValueError for another shape or values that are not finite (the moments are then as they were), IndexError for a
        row that is not there.
        """
        if x.shape != y.shape or x.dim() < 2 or x.shape[channel_dim] != self.channels or x.numel() == 0:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, y {tuple(y.shape)}; expected the same for both, with {self.channels} channels "
                f"in dimension {channel_dim} and at least one more dimension"
            )
        row = (row,) if isinstance(row, int) else row
        if len(row) != len(self.rows) or not all(0 <= k < length for k, length in zip(row, self.rows, strict=True)):
            raise IndexError(f"no row {row} in a table of {self.rows} rows")
        batch = PairMoments(self.channels)
        channel_dim %= x.dim()
        along = 0 if channel_dim else 1
        size = max(1, PIECE * x.shape[along] // x.numel())
        for part_x, part_y in zip(x.detach().split(size, along), y.detach().split(size, along), strict=True):
            batch._merge((), _moments(part_x, part_y, channel_dim))
        self._merge(row, batch)

    def merge(self, other: PairMoments) -> None:
        """Take in everything that `other` has seen. Raises ValueError for a table of another shape."""
        if other.mean_x.shape != self.mean_x.shape:
            raise ValueError(
                f"the other moments have shape {tuple(other.mean_x.shape)}, expected {tuple(self.mean_x.shape)}"
            )
        self._merge((), other)

    def fit(self) -> Fit:
        """The least-squares fit: gain = cov(x, y)/var(x), offset = ȳ − gain·x̄, both moments with the same normaliser.

        Where x is constant: gain 1, offset the difference of the means. Where nothing was seen: gain 1, offset 0.
        """
        spread = CONSTANT * self.mean_x.abs()
        constant = self.sum_xx <= self.count[..., None] * spread**2
        gain = torch.where(constant, 1.0, self.sum_xy / torch.where(constant, 1.0, self.sum_xx))
        return Fit(gain, self.mean_y - gain * self.mean_x)

    def shift(self) -> Fit:
        """The fit with gain 1: offset = ȳ − x̄."""
        return Fit(torch.ones_like(self.mean_x), self.mean_y - self.mean_x)

    def state(self) -> dict[str, Tensor]:
        """Plain tensors, from which `from_state` makes the same moments."""
        return {name: getattr(self, name).clone() for name in NAMES}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> PairMoments:
        """The moments that `state()` described. Raises ValueError for what is missing, or does not fit together."""
        missing = [name for name in NAMES if name not in state]
        if missing:
            raise ValueError(f"the moments lack {', '.join(missing)}; expected {', '.join(NAMES)}")
        shape = tuple(state["mean_x"].shape)
        if not shape:
            raise ValueError("mean_x has no dimension; expected (*rows, C)")
        moments = cls(shape[-1], shape[:-1])
        for name in NAMES:
            given, own = state[name], getattr(moments, name)
            if given.shape != own.shape or given.dtype != own.dtype:
                raise ValueError(
                    f"{name} is {given.dtype} of shape {tuple(given.shape)}; expected {own.dtype} of shape {tuple(own.shape)}"
                )
            own.copy_(given)
        numbers = torch.stack([moments.mean_x, moments.mean_y, moments.sum_xx, moments.sum_xy])
        if not bool(numbers.isfinite().all()) or bool((moments.count < 0).any()) or bool((moments.sum_xx < 0).any()):
            raise ValueError("the moments hold NaN, infinity, or a negative count or sum_xx, which no data have")
        return moments

    def _merge(self, row: tuple[int, ...], other: PairMoments) -> None:
        """Chan's update of a row (all of them: ()) by moments of that row's shape."""
        ours, theirs = self.count[row].double(), other.count.double()
        total = (ours + theirs)[..., None]
        part = torch.where(total > 0, theirs[..., None] / total.clamp(min=1.0), 0.0)
        shift_x, shift_y = other.mean_x - self.mean_x[row], other.mean_y - self.mean_y[row]
        between = ours[..., None] * part
        self.sum_xx[row] += other.sum_xx + between * shift_x * shift_x
        self.sum_xy[row] += other.sum_xy + between * shift_x * shift_y
        self.mean_x[row] += part * shift_x
        self.mean_y[row] += part * shift_y
        self.count[row] += other.count


NAMES = ("count", "mean_x", "mean_y", "sum_xx", "sum_xy")


def _moments(x: Tensor, y: Tensor, channel_dim: int) -> PairMoments:
    """The moments of one piece, by two passes."""
    if x.device.type == "mps":  # has no float64
        x, y = x.cpu(), y.cpu()
    x, y = x.double(), y.double()
    others = [dim for dim in range(x.dim()) if dim != channel_dim]
    mean_x, mean_y = x.mean(others, keepdim=True), y.mean(others, keepdim=True)
    deviation_x, deviation_y = x - mean_x, y - mean_y
    moments = PairMoments(x.shape[channel_dim])
    moments.count.fill_(x.numel() // x.shape[channel_dim])
    moments.mean_x, moments.mean_y = mean_x.flatten().cpu(), mean_y.flatten().cpu()
    moments.sum_xx = (deviation_x * deviation_x).sum(others).cpu()
    moments.sum_xy = (deviation_x * deviation_y).sum(others).cpu()
    if not math.isfinite(float((moments.sum_xx + moments.sum_xy + moments.mean_y).sum())):
        raise ValueError(
            "x or y holds NaN or infinity; a fit needs finite values (often float16 overflow in the model)"
        )
    return moments
