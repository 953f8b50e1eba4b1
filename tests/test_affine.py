"""`iec.core.affine`: codes, straight-through gradients, the search for scales, packing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from iec.core import affine
from iec.core.affine import (
    FACTORS,
    ZERO_LIMIT,
    Affine,
    check_bits,
    dequantize,
    fake_quantize,
    pack,
    quantize,
    search,
    unpack,
)

ORACLE = Path(__file__).parent / "data" / "affine_search.npz"  # the released code's scales of some rows of weights
ALL_BITS = tuple(range(2, 9))
METHODS = ("mse", "max", "percentile:99", "percentile:100")
f32 = np.float32


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def rows_of_all_kinds(size: int = 41) -> Tensor:
    """(11, size): Gaussian, skewed, one-signed, with outliers, sparse, nearly constant."""
    noise = randn(11, size, seed=3)
    rows = [
        noise[0],
        0.02 * noise[1] + 0.01,
        noise[2].abs() + 0.3,
        -noise[3].abs() - 0.3,
        noise[4].abs(),
        noise[5].exp(),
        torch.where(torch.arange(size) == 7, 40.0, noise[6]),
        torch.where(torch.arange(size) == 7, -40.0, noise[7]),
        torch.where(torch.arange(size) % 3 == 0, noise[8], 0.0),
        5.0 + 0.1 * noise[9],
        1e4 * noise[10],
    ]
    return torch.stack(rows)


def values(found: Affine, rows: Tensor, bits: int) -> Tensor:
    scale, zero = found.scale[:, None], found.zero[:, None]
    return dequantize(quantize(rows, scale, zero, bits), scale, zero)


def loss(rows: Tensor, found: Affine, bits: int) -> Tensor:
    scale, zero = found.scale[:, None].double(), found.zero[:, None].double()
    exact = dequantize(quantize(rows.double(), scale, zero, bits), scale, zero)
    return (rows.double() - exact).abs().pow(2.4).mean(1)


# Codes -------------------------------------------------------------------------------------------------------------


def test_halves_go_to_the_even_code() -> None:
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 0.49999997, 0.50000006])
    assert quantize(x, torch.tensor(1.0), torch.tensor(8.0), 4).tolist() == [6, 8, 8, 10, 10, 12, 8, 9]


def test_the_value_and_the_zero_point_are_rounded_apart() -> None:
    x, scale = torch.tensor([0.4, 0.6, 1.4]), torch.tensor(1.0)
    assert quantize(x, scale, torch.tensor(3.3), 4).tolist() == [3, 4, 4]  # not round(x/d + z) = 4, 4, 5
    assert torch.equal(dequantize(torch.tensor([3.0]), scale, torch.tensor(3.3)), torch.tensor([0.0]))


@pytest.mark.parametrize("bits", ALL_BITS)
def test_within_the_range_the_error_is_at_most_half_a_step(bits: int) -> None:
    rows = rows_of_all_kinds()
    found = search(rows, bits, "max")
    error = (values(found, rows, bits) - rows).abs()
    assert (error <= found.scale[:, None] / 2 * (1 + 1e-4)).all()


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("zero", [-300.0, 0.0, 2.0, 3.0, 700.0])
def test_codes_are_fixed_points(bits: int, zero: float) -> None:
    codes = torch.arange(2**bits, dtype=torch.float32)
    scale, z = torch.tensor(0.0173), torch.tensor(zero)
    assert torch.equal(quantize(dequantize(codes, scale, z), scale, z, bits), codes)


def test_codes_are_clamped() -> None:
    codes = quantize(torch.tensor([-1e6, 1e6, -math.inf, math.inf]), torch.tensor(0.1), torch.tensor(2.0), 3)
    assert codes.tolist() == [0, 7, 0, 7]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_low_precision_inputs_are_quantized_in_float32(dtype: torch.dtype) -> None:
    x = (3 * randn(1000)).to(dtype)
    scale, zero = torch.tensor(0.031), torch.tensor(120.0)  # of no dimension: they would not promote float16
    codes = quantize(x, scale, zero, 8)
    assert codes.dtype == dtype
    assert torch.equal(codes.float(), quantize(x.float(), scale, zero, 8))
    found = fake_quantize(x, scale, zero, 8)
    assert found.dtype == dtype
    assert torch.equal(
        found, dequantize(codes.to(torch.float64 if dtype == torch.float64 else torch.uint8), scale, zero).to(dtype)
    )


def test_dequantize_takes_stored_codes() -> None:
    codes, zero = torch.tensor([[0, 255], [3, 7]], dtype=torch.uint8), torch.tensor([[4], [-9]], dtype=torch.int16)
    found = dequantize(codes, torch.tensor([[0.5], [2.0]]), zero)
    assert found.dtype == torch.float32
    assert found.tolist() == [[-2.0, 125.5], [24.0, 32.0]]


# Straight-through gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [5.0, 4.7])
def test_fake_quantize_is_quantize_and_dequantize(zero: float) -> None:
    x, scale, z = randn(200), torch.tensor(0.21), torch.tensor(zero)
    assert torch.equal(fake_quantize(x, scale, z, 4), dequantize(quantize(x, scale, z, 4), scale, z))


@pytest.mark.parametrize("zero", [5.0, 4.7])
def test_gradients(zero: float) -> None:
    x = torch.cat([randn(60), torch.tensor([40.0, -40.0])]).requires_grad_()
    scale, z = torch.full_like(x, 0.21).requires_grad_(), torch.full_like(x, zero).requires_grad_()
    fake_quantize(x, scale, z, 4).sum().backward()
    u, middle = (x / scale).detach(), round(zero)
    code = torch.round(u) + middle
    inside = (code >= 0) & (code <= 15)
    assert 2 <= int((~inside).sum()) < 40
    assert torch.equal(x.grad, inside.float())
    assert torch.allclose(scale.grad, torch.where(inside, torch.round(u) - u, code.clamp(0, 15) - middle), atol=1e-6)
    assert torch.allclose(z.grad, torch.where(inside, 0.0, -0.21))


def test_gradients_of_broadcast_scales_are_summed() -> None:
    x = randn(3, 50)
    scale, zero = torch.full((3, 1), 0.3).requires_grad_(), torch.full((3, 1), 5.0).requires_grad_()
    fake_quantize(x, scale, zero, 3).square().sum().backward()
    assert scale.grad.shape == zero.grad.shape == (3, 1)
    assert (scale.grad != 0).all() and (zero.grad != 0).all()


def test_gradients_let_a_scale_be_learned() -> None:
    x = randn(2000)
    scale, zero = torch.tensor(0.02, requires_grad=True), torch.tensor(8.0)
    optimizer = torch.optim.Adam([scale], lr=5e-3)
    errors = []
    for _ in range(120):
        optimizer.zero_grad()
        error = (fake_quantize(x, scale, zero, 4) - x).square().mean()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < errors[0] / 20


# The search --------------------------------------------------------------------------------------------------------


def written_out(row: list[float], bits: int) -> tuple[float, float]:
    """The released search for one row: scales in float32 as there, errors in float64, one number at a time."""
    top = 2**bits - 1
    mx, mn = f32(max(row)), f32(min(row))
    best, answer = math.inf, (math.nan, math.nan)
    for s in range(0, 80, 2):
        f = f32(1.0 - 0.01 * s)
        lo, hi = min(f * mn, f32(0)), max(f * mx, f32(0))
        d = max((hi - lo) / f32(top), f32(1e-8))
        z = min(max(float(-np.round(lo / d)), 0.0), top)
        score = 0.0
        for x in row:
            code = min(max(round(x / float(d)) + z, 0.0), top)
            score += abs(x - (code - z) * float(d)) ** 2.4
        if score < best:
            d = (f * mx - f * mn) / f32(top)
            best, answer = score, (float(d), float(np.round(-f * mn / d)))
    return answer


@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_search_is_the_method(bits: int) -> None:
    rows = rows_of_all_kinds()
    found = search(rows, bits)
    expected = [written_out(row, bits) for row in rows.tolist()]
    assert found.scale.dtype == found.zero.dtype == torch.float32
    assert list(zip(found.scale.tolist(), found.zero.tolist(), strict=True)) == expected


def test_the_search_gives_the_released_codes_scales() -> None:
    """Bit by bit, for weights of the authors' CIFAR-10 and ImageNet layers and a tiny DDPM, whole or split at a concat."""
    data = np.load(ORACLE)
    names = sorted(key.removesuffix("_rows") for key in data.files if key.endswith("_rows"))
    assert len(names) == 11
    for name in names:
        found = search(torch.from_numpy(data[f"{name}_rows"]), int(name[-1]))
        assert found.scale.tolist() == data[f"{name}_scale"].tolist(), name
        assert found.zero.tolist() == data[f"{name}_zero"].tolist(), name


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_search_is_never_worse_than_the_extremes(bits: int, symmetric: bool) -> None:
    rows = rows_of_all_kinds(500)[[0, 1, 4, 5, 6, 7, 8, 10]]  # zero within the range or near it: scored = returned
    rows[[2, 3], 0] = 0.0
    best, whole = (loss(rows, search(rows, bits, method, symmetric), bits) for method in ("mse", "max"))
    assert (best <= whole * (1 + 1e-4)).all()
    if bits == 3:
        assert (best < 0.95 * whole).any()


@pytest.mark.parametrize("bits", ALL_BITS)
def test_symmetric_search_takes_the_best_factor(bits: int) -> None:
    rows = rows_of_all_kinds()
    found, whole = search(rows, bits, "mse", symmetric=True), search(rows, bits, "max", symmetric=True)
    scales = whole.scale[:, None] * torch.tensor(FACTORS)
    losses = torch.stack([loss(rows, Affine(scale, whole.zero), bits) for scale in scales.unbind(1)], dim=1)
    assert torch.equal(found.scale, scales.gather(1, losses.argmin(1, keepdim=True))[:, 0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_zero_points_are_in_the_middle(bits: int, method: str) -> None:
    half = 2 ** (bits - 1)
    rows = torch.cat([rows_of_all_kinds(), torch.full((1, 41), -2.0), torch.zeros(1, 41)])
    found = search(rows, bits, method, symmetric=True)
    assert (found.zero == half).all() and (found.scale > 0).all()
    # multiples of d about zero, and zero among them
    assert (dequantize(torch.tensor(float(half)), found.scale, found.zero) == 0).all()


def test_symmetric_max_uses_every_level_of_the_side_that_needs_them() -> None:
    rows = torch.tensor([[-4.0, 1.0], [-1.0, 3.0], [-4.0, 3.0], [-5.0, -2.0], [2.0, 6.0]])
    assert search(rows, 3, "max", symmetric=True).scale.tolist() == [1.0, 1.0, 1.0, 1.25, 2.0]


def test_max_holds_zero_and_the_extremes() -> None:
    rows = torch.tensor([[-1.0, 2.0], [1.0, 3.0], [-3.0, -1.0], [0.0, 1.5]])
    found = search(rows, 2, "max")
    assert found.scale.tolist() == [1.0, 1.0, 1.0, 0.5]
    assert found.zero.tolist() == [1.0, 0.0, 3.0, 0.0]


@pytest.mark.parametrize("percentile", [99.9, 99.0, 75.0, 100.0, 50.5])
@pytest.mark.parametrize("size", [2, 7, 1001])
def test_percentiles(percentile: float, size: int) -> None:
    rows = randn(5, size, seed=size)
    found = search(rows, 8, f"percentile:{percentile}")
    low, high = np.percentile(rows.numpy().astype(np.float64), [100 - percentile, percentile], axis=1)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    assert np.allclose(found.scale.numpy(), (high - low) / 255, rtol=1e-4)
    assert np.abs(found.zero.numpy() + low / found.scale.double().numpy()).max() <= 0.5 + 1e-3


def test_a_percentile_cuts_off_an_outlier() -> None:
    row = randn(1, 4000)
    row[0, 5] = 1000.0
    assert search(row, 8, "percentile:99.9").scale < 10 / 255 < search(row, 8, "max").scale


def test_equal_percentiles_fall_back_to_the_extremes() -> None:
    row = torch.zeros(1, 5000)
    row[0, 17] = 3.0
    assert torch.equal(search(row, 8, "percentile:99").scale, search(row, 8, "max").scale)


# Rows for which the released code has no usable answer ----------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("size", [1, 2, 9])
def test_constant_rows_are_exact(bits: int, method: str, symmetric: bool, size: int) -> None:
    rows = torch.tensor([1.7, -1.7, 0.0, -0.0, 1e-12, -3e30, 1e-40])[:, None].repeat(1, size)
    found = search(rows, bits, method, symmetric)
    assert (found.scale > 0).all()
    exact = values(found, rows, bits)
    assert torch.equal(exact[:-1], rows[:-1])
    assert (exact[-1] == 0).all()  # no scale for what is beyond float32's normal numbers


@pytest.mark.parametrize("method", METHODS)
def test_values_far_from_zero_have_usable_zero_points(method: str) -> None:
    rows = torch.stack([torch.linspace(1000.0, 1000.1, 50), -torch.linspace(1000.0, 1000.1, 50)])
    found = search(rows, 8, method)
    assert (found.zero.abs() <= ZERO_LIMIT).all()
    assert (values(found, rows, 8) - rows).abs().max() <= 1000.1 / 255 / 2


def test_values_rather_far_from_zero_keep_the_finer_scale() -> None:
    """There the released pair is better than one that has to hold zero: d from the row's own spread."""
    row = torch.linspace(5.0, 5.1, 50)[None]
    found = search(row, 8)
    assert found.zero < -(2**13)
    assert (values(found, row, 8) - row).abs().max() < 0.1 * (values(search(row, 8, "max"), row, 8) - row).abs().max()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e-12, 1e30, 8e37])
def test_extreme_sizes(size: float, method: str, symmetric: bool) -> None:
    rows = (randn(6, 33).clamp(-1, 1) * size).contiguous()
    rows[1] = rows[1].abs()
    found = search(rows, 4, method, symmetric)
    assert torch.isfinite(found.scale).all() and (found.scale >= affine.SCALE_FLOOR).all()
    assert (found.zero == found.zero.round()).all() and not torch.signbit(found.zero[found.zero == 0]).any()
    assert (found.zero.abs() <= ZERO_LIMIT).all()
    error = (values(found, rows, 4) - rows).abs()
    assert torch.isfinite(error).all() and (error <= max(size, 1e-29)).all()


# A row's answer is its own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 3, 9, 300, 5000])
def test_rows_do_not_depend_on_their_neighbours(size: int, method: str, symmetric: bool) -> None:
    rows = randn(23, size, seed=size)
    together = search(rows, 4, method, symmetric)
    for parts in ([1] * 23, [5, 18], [22, 1]):
        apart = [search(part, 4, method, symmetric) for part in rows.split(parts)]
        assert torch.equal(together.scale, torch.cat([a.scale for a in apart]))
        assert torch.equal(together.zero, torch.cat([a.zero for a in apart]))


def test_any_floating_dtype_layout_and_gradient() -> None:
    rows = randn(8, 30)
    expected = search(rows, 8)
    for given in (rows.double(), rows.t().contiguous().t(), rows.clone().requires_grad_()):
        found = search(given, 8)
        assert torch.equal(found.scale, expected.scale) and not found.scale.requires_grad
    half = search(rows.half(), 8)
    assert half.scale.dtype == torch.float32
    assert torch.equal(half.scale, search(rows.half().float(), 8).scale)


def test_rows_are_left_alone() -> None:
    rows = randn(4, 50)
    before = rows.clone()
    for method in METHODS:
        search(rows, 4, method)
    assert torch.equal(rows, before)


def test_the_power() -> None:
    error = torch.cat([torch.tensor([0.0, -0.0, 0.5, 1e-6, 1e-12, 300.0]), randn(5000)])
    expected = error.double().abs().pow(2.4)
    found = affine._power(error.clone()).double()
    assert (found[:2] == 0).all()
    assert ((found - expected).abs() <= 1e-5 * expected).all()


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 9, 0, -4])
def test_bits_beyond_the_range(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits is {bits}; expected 2 to 8"):
        search(randn(2, 3), bits)


@pytest.mark.parametrize("bits", [4.0, "8", True, None])
def test_bits_that_are_no_int(bits: object) -> None:
    for call in (
        lambda: check_bits(bits),
        lambda: quantize(randn(2), torch.tensor(1.0), torch.tensor(0.0), bits),
        lambda: fake_quantize(randn(2), torch.tensor(1.0), torch.tensor(0.0), bits),
        lambda: search(randn(2, 3), bits),
        lambda: pack(torch.zeros(2, dtype=torch.uint8), bits),
        lambda: unpack(torch.zeros(2, dtype=torch.uint8), bits, (2,)),
    ):
        with pytest.raises(TypeError, match="bits is"):
            call()


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 5), (5, 0), ()])
def test_rows_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(C, M\)"):
        search(torch.ones(shape), 8)


def test_rows_of_integers() -> None:
    with pytest.raises(TypeError, match="floating point"):
        search(torch.ones(2, 3, dtype=torch.int64), 8)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_not_finite_are_counted(value: float, method: str) -> None:
    rows = randn(4, 10)
    rows[1, 3] = rows[2, 9] = value
    with pytest.raises(ValueError, match="2 of 40 values"):
        search(rows, 8, method)


@pytest.mark.parametrize("method", ["mean", "percentile", "percentile:", "percentile:x", "percentile:50", "percentile:101",
                                    "percentile:nan", "MSE", None, 99.9])  # fmt: skip
def test_unknown_methods(method: str) -> None:
    with pytest.raises(ValueError, match="expected 'mse', 'max' or 'percentile:P'"):
        search(randn(2, 3), 8, method)


# Packing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (7,), (3, 5), (5, 3, 3, 3), ()], ids=str)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_packing_is_exact(bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.dim() == 1
    assert len(packed) == (-(-codes.numel() // 2) if bits <= 4 else codes.numel())
    back = unpack(packed, bits, shape)
    assert back.dtype == torch.uint8 and torch.equal(back, codes)
    assert torch.equal(unpack(packed, bits, torch.Size(shape)), codes)


def test_the_first_code_is_in_the_low_half() -> None:
    assert pack(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]


def test_packing_copies() -> None:
    codes = torch.tensor([1, 2], dtype=torch.uint8)
    packed = pack(codes, 8)
    back = unpack(packed, 8, (2,))
    codes.zero_()
    packed.zero_()
    assert back.tolist() == [1, 2]


def test_packing_refuses() -> None:
    with pytest.raises(ValueError, match="codes go up to 16; expected at most 15"):
        pack(torch.tensor([3, 16], dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="up to 5; expected at most 3"):
        pack(torch.tensor([3, 5], dtype=torch.uint8), 2)
    with pytest.raises(TypeError, match="uint8"):
        pack(torch.tensor([3, 4]), 4)
    with pytest.raises(TypeError, match="uint8"):
        unpack(torch.tensor([3, 4]), 4, (4,))
    with pytest.raises(ValueError, match=r"take \(3,\)"):
        unpack(torch.zeros(2, dtype=torch.uint8), 4, (5,))
    with pytest.raises(ValueError, match=r"take \(5,\)"):
        unpack(torch.zeros(1, 5, dtype=torch.uint8), 8, (5,))
