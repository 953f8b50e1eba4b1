"""Per-channel affine fits from moments gathered batch by batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from iec.core.regression import PIECE, PairMoments

DATA = "data/dec_regression.npz"


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def moments_of(x: Tensor, y: Tensor, channel_dim: int = 1) -> PairMoments:
    moments = PairMoments(x.shape[channel_dim])
    moments.update(x, y, channel_dim=channel_dim)
    return moments


def exact(x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Gain and offset by numpy's two-pass covariance in extended precision; x, y (B, C, …)."""
    wide = [v.movedim(1, 0).flatten(1).double().numpy().astype(np.longdouble) for v in (x, y)]
    means = [v.mean(1, keepdims=True) for v in wide]
    dx, dy = (v - mean for v, mean in zip(wide, means, strict=True))
    gain = (dx * dy).sum(1) / (dx * dx).sum(1)
    return gain.astype(float), (means[1][:, 0] - gain * means[0][:, 0]).astype(float)


@pytest.mark.parametrize(
    ("shape", "channel_dim"),
    [((50, 3), 1), ((50, 3), -1), ((4, 3, 5, 6), 1), ((4, 7, 3), -1), ((3, 40), 0), ((2, 3, 4, 5, 2), 1)],
)
def test_recovers_affine_maps(shape: tuple[int, ...], channel_dim: int) -> None:
    """Gains of either sign, and zero; in every layout."""
    x = random(*shape)
    gain, offset = torch.tensor([-1.5, 0.0, 3.25]), torch.tensor([10.0, -2.0, 0.5])
    wide = [1] * x.dim()
    wide[channel_dim] = 3
    fit = moments_of(x, gain.reshape(wide) * x + offset.reshape(wide), channel_dim).fit()
    torch.testing.assert_close(fit.gain, gain.double(), rtol=0, atol=1e-13)
    torch.testing.assert_close(fit.offset, offset.double(), rtol=0, atol=1e-13)


def test_the_same_is_the_identity_exactly() -> None:
    x = 1e3 + random(8, 5, 4, 4, dtype=torch.float32)
    fit = moments_of(x, x).fit()
    assert (fit.gain == 1).all() and (fit.offset == 0).all()


def test_is_the_least_squares_fit() -> None:
    x, y = random(30, 4), random(30, 4, seed=1)
    fit = moments_of(x, y).fit()
    for channel in range(4):
        design = torch.stack([x[:, channel], torch.ones(30, dtype=torch.float64)], 1)
        solved = torch.linalg.lstsq(design, y[:, channel]).solution
        torch.testing.assert_close(torch.stack([fit.gain[channel], fit.offset[channel]]), solved)


def test_shift() -> None:
    """The best offset where the gain is held at 1."""
    x, y = random(30, 4), 2 + random(30, 4, seed=1)
    fit = moments_of(x, y).shift()
    assert (fit.gain == 1).all()
    torch.testing.assert_close(fit.offset, (y - x).mean(0))
    assert (PairMoments(4).shift().offset == 0).all()


def test_merged_is_at_once() -> None:
    """In whatever pieces, and in whatever order."""
    x, y = 5 + random(24, 3, 4, 4), random(24, 3, 4, 4, seed=1)
    whole = moments_of(x, y)
    one, two, three = (moments_of(x[part], y[part]) for part in (slice(0, 1), slice(1, 9), slice(9, 24)))
    two.merge(three)
    two.merge(one)
    batched = PairMoments(3)
    batched.merge(PairMoments(3))  # nothing and nothing
    for part in (slice(0, 16), slice(16, 23), slice(23, 24)):
        batched.update(x[part], y[part])
    batched.merge(PairMoments(3))
    empty = PairMoments(3)
    empty.merge(whole)
    for other in (two, batched, empty):
        assert other.count == 24 * 16
        for name, value in whole.state().items():
            torch.testing.assert_close(other.state()[name], value, rtol=1e-13, atol=1e-13)


def test_large_tensors_are_taken_in_pieces() -> None:
    """Along the batch, or along the rest where the channels come first."""
    x = 3 + random(5, 2, PIECE // 4, dtype=torch.float32)
    y = 0.5 * x + random(5, 2, PIECE // 4, seed=1, dtype=torch.float32)
    gain, offset = exact(x, y)
    for fit in (moments_of(x, y).fit(), moments_of(x.movedim(1, 0), y.movedim(1, 0), 0).fit()):
        np.testing.assert_allclose(fit.gain.numpy(), gain, rtol=1e-12)
        np.testing.assert_allclose(fit.offset.numpy(), offset, rtol=1e-11)


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4, -1e6])
def test_large_means_cost_no_digits(mean: float) -> None:
    """Streamed float32 batches with a mean far above the spread: the fit is that of the very same numbers in extended precision.

    Uncentred float64 sums would be off by mean²·1e-16 relative to the variance, 1e-4 for the largest; float32 ones by everything.
    """
    batches = []
    for seed in range(20):
        x = (mean + random(6, 3, 4, 4, seed=seed)).float()
        batches.append((x, (0.8 * (x - mean) + 0.3 * random(6, 3, 4, 4, seed=100 + seed) + mean).float()))
    moments = PairMoments(3)
    for x, y in batches:
        moments.update(x, y)
    gain, offset = exact(*(torch.cat(values) for values in zip(*batches, strict=True)))
    fit = moments.fit()
    np.testing.assert_allclose(fit.gain.numpy(), gain, rtol=1e-11)
    np.testing.assert_allclose(fit.offset.numpy(), offset, rtol=1e-11, atol=1e-11 * max(1.0, abs(mean)))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-30, -12345.678])
def test_constant_inputs_are_shifted(value: float) -> None:
    """0.1 has no exact mean: without care its rounding would be a variance to divide by."""
    moments = PairMoments(2)
    y = random(7, 2, 3, 3)
    for part in (slice(0, 3), slice(3, 7)):
        moments.update(torch.full_like(y[part], value), y[part])
    fit = moments.fit()
    assert (fit.gain == 1).all()
    torch.testing.assert_close(fit.offset, y.mean((0, 2, 3)) - value)


def test_the_least_spread_of_float32_is_no_constant() -> None:
    """One number among many that differs by one unit in the last place."""
    x = torch.full((10_000, 1), 1000.0)
    x[0] = torch.nextafter(x[0], x[1] * 2)
    fit = moments_of(x, 3 * x.double() + 1).fit()
    torch.testing.assert_close(fit.gain, torch.tensor([3.0], dtype=torch.float64), rtol=1e-4, atol=0)


def test_a_table_of_steps() -> None:
    """Rows are on their own; one never seen is the identity."""
    table, batches = PairMoments(3, (4,)), {}
    for row in (1, 3, 1, 2):
        x, y = random(5, 3, 2, 2, seed=row), random(5, 3, 2, 2, seed=10 + row + len(batches))
        batches.setdefault(row, []).append((x, y))
        table.update(x, y, row)
    fit = table.fit()
    assert fit.gain.shape == fit.offset.shape == (4, 3) and fit.gain.dtype == torch.float64
    assert table.count.tolist() == [0, 40, 20, 20] and table.rows == (4,) and table.channels == 3
    assert (fit.gain[0] == 1).all() and (fit.offset[0] == 0).all()
    for row, pairs in batches.items():
        alone = moments_of(*(torch.cat(values) for values in zip(*pairs, strict=True))).fit()
        torch.testing.assert_close(fit.gain[row], alone.gain, rtol=1e-13, atol=0)
        torch.testing.assert_close(fit.offset[row], alone.offset, rtol=1e-13, atol=1e-15)

    other = PairMoments(3, (4,))
    other.update(*batches[2][0], row=2)
    other.update(*batches[1][0], row=0)
    table.merge(other)
    assert table.count.tolist() == [20, 40, 40, 20]
    torch.testing.assert_close(table.fit().gain[2], fit.gain[2])
    deep = PairMoments(3, (2, 2))
    deep.update(*batches[2][0], row=(1, 0))
    torch.testing.assert_close(deep.fit().gain[1, 0], fit.gain[2])
    assert deep.count.tolist() == [[0, 0], [20, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_inputs_are_widened(dtype: torch.dtype) -> None:
    x, y = (100 + random(64, 2)).to(dtype), random(64, 2, seed=1).to(dtype)
    gain, offset = exact(x, y)
    fit = moments_of(x.requires_grad_(), y).fit()
    assert not fit.gain.requires_grad
    np.testing.assert_allclose(fit.gain.numpy(), gain, rtol=1e-12)
    np.testing.assert_allclose(fit.offset.numpy(), offset, rtol=1e-12)


def test_state() -> None:
    table = PairMoments(3, (2,))
    table.update(random(4, 3), random(4, 3, seed=1), 1)
    state = table.state()
    again = PairMoments.from_state(state)
    assert all(torch.equal(again.state()[name], value) for name, value in state.items())
    again.update(random(4, 3), random(4, 3), 0)
    assert table.count.tolist() == [0, 4] and state["count"].tolist() == [0, 4]  # copies both ways
    assert all(type(value) is Tensor for value in state.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mean_y": None}, "lack mean_y"),
        ({"mean_x": torch.tensor(0.0, dtype=torch.float64)}, "no dimension"),
        ({"count": torch.zeros(2)}, "count is torch.float32"),
        ({"count": torch.tensor([0, -1])}, "negative"),
        ({"sum_xy": torch.zeros(2, 4, dtype=torch.float64)}, r"sum_xy is torch.float64 of shape \(2, 4\)"),
        ({"sum_xx": torch.full((2, 3), -1.0, dtype=torch.float64)}, "negative"),
        ({"mean_y": torch.full((2, 3), float("nan"), dtype=torch.float64)}, "NaN"),
    ],
)
def test_state_is_checked(change: dict[str, Any], words: str) -> None:
    state = {**PairMoments(3, (2,)).state(), **change}
    with pytest.raises(ValueError, match=words):
        PairMoments.from_state({name: value for name, value in state.items() if value is not None})


def test_refuses() -> None:
    for channels, rows in ((0, ()), (3, (0,)), (-1, (2,))):
        with pytest.raises(ValueError, match="at least 1"):
            PairMoments(channels, rows)
    moments, table = PairMoments(3), PairMoments(3, (4,))
    for x, y in (((5, 3), (4, 3)), ((5, 2), (5, 2)), ((3,), (3,)), ((0, 3), (0, 3)), ((5, 3), (5, 3, 1))):
        with pytest.raises(ValueError, match="3 channels in dimension 1"):
            moments.update(torch.zeros(x), torch.zeros(y))
    for row in ((), 4, -1, (0, 0)):
        with pytest.raises(IndexError, match="no row"):
            table.update(torch.zeros(5, 3), torch.zeros(5, 3), row)
    with pytest.raises(IndexError, match="no row"):
        moments.update(torch.zeros(5, 3), torch.zeros(5, 3), 0)
    with pytest.raises(ValueError, match="shape"):
        moments.merge(table)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_values_that_are_not_finite(bad: float, which: int) -> None:
    """They are refused, and leave the moments as they were."""
    moments = moments_of(random(5, 3), random(5, 3, seed=1))
    before = moments.state()
    pair = [random(5, 3), random(5, 3)]
    pair[which][2, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        moments.update(*pair)
    assert all(torch.equal(moments.state()[name], value) for name, value in before.items())


# --- the authors' code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(4))
def test_against_the_released_regression(case: int, request: pytest.FixtureRequest) -> None:
    """It divides the covariance by n and the variance by n − 1, so its gain is low by (n − 1)/n (METHOD 4.3)."""
    data = np.load(request.path.parent / DATA)
    x, y = (torch.from_numpy(data[f"reg{case}_{name}"]) for name in "XY")
    moments = moments_of(x, y)
    compare(moments, data[f"reg{case}_a"], data[f"reg{case}_b"])
    off = moments.fit().gain.numpy() / data[f"reg{case}_a"] - 1
    np.testing.assert_allclose(off, 1 / (int(moments.count) - 1), atol=5e-7)  # n from 8 to 1024: 14 % to 0.1 %


def test_against_the_released_tables(request: pytest.FixtureRequest) -> None:
    """The gain and offset of every step of a run, by the feature of its last whole pass."""
    data = np.load(request.path.parent / DATA)
    features, refresh = torch.from_numpy(data["features"]), data["refresh"].tolist()
    table = PairMoments(features.shape[2], (len(features),))
    for step, feature in enumerate(features):
        if step not in refresh:
            table.update(features[max(r for r in refresh if r < step)], feature, step)
    assert (table.fit().gain[refresh] == 1).all() and (table.fit().offset[refresh] == 0).all()
    compare(table, data["cache_a"], data["cache_b"])


def compare(moments: PairMoments, released_gain: np.ndarray, released_offset: np.ndarray) -> None:
    """Equal, once the variance has the authors' normaliser."""
    count = moments.count[..., None].double()
    gain = moments.fit().gain * torch.where(count > 0, (count - 1) / count.clamp(min=1), 1.0)
    offset = moments.mean_y - gain * moments.mean_x
    np.testing.assert_allclose(gain.numpy(), released_gain, rtol=0, atol=5e-7)
    np.testing.assert_allclose(offset.numpy(), released_offset, rtol=0, atol=5e-7)
