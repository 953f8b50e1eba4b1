"""Affine quantization: x ≈ x̂ = (q − z)·d with integer codes q in 0 … L−1, L = 2^bits, a scale d > 0 and a zero point z.

Codes are unsigned everywhere; symmetric quantization is the special case z = L/2, whose q − z lies in −L/2 … L/2 − 1.
Rounding is to the nearest integer, halves to the even one. The zero point is an integer, but not always one of the codes:
a row without zeros near its values may have z < 0 or z > L − 1.

The search for scales is that of IEC's and CacheQuant's released code (per output channel for weights, per tensor for
activations), but for the rows it has no integer answer to; `search` names them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

BITS = range(2, 9)
FACTORS = tuple(1.0 - 0.01 * s for s in range(0, 80, 2))  # of the range; the search takes the first of the best
POWER = 2.4  # the search minimises the mean of |x − x̂| to this power
SCORED_FLOOR = 1e-8  # of the scales that the search scores
SCALE_FLOOR = 1e-30  # of the scales that it returns: 1/d and x/d stay finite in float32
ZERO_LIMIT = 2**14  # of |z|: codes, z and q − z fit int16, and x/d + z keeps its last bit in float32
VALUE_LIMIT = 2.0**126  # of |x|: the range max − min stays finite in float32
TILE = 2**16  # numbers worked on at once, so that they stay in the processor's cache
TILE_CUDA = 2**22


class Affine(NamedTuple):
    """Scale d > 0 (float32) and zero point z (float32 that holds integers, |z| ≤ 2^14), of any one shape."""

    scale: Tensor
    zero: Tensor


def check_bits(bits: int) -> int:
    """Return `bits`. Raises TypeError unless it is an int, ValueError unless it is 2 … 8."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits is {bits!r} of type {type(bits).__name__}; expected an int from 2 to 8")
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; expected 2 to 8 (codes are stored in one byte or half a byte)")
    return bits


def _wide(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the dtype that values of `like` are quantized in: float64 for float64, else float32."""
    return tensor.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes of `x`, as numbers 0 … L−1 in a tensor of x's shape and floating dtype: clamp(round(x/d) + round(z), 0, L−1).

    scale and zero broadcast against x. Computed in float32 at least. A NaN stays a NaN.
    """
    levels = 2 ** check_bits(bits)
    codes = torch.round(_wide(x, x) / _wide(scale, x)) + torch.round(_wide(zero, x))
    return codes.clamp_(0, levels - 1).to(x.dtype)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Values (q − round(z))·d of codes of any dtype; float32, or float64 for codes in float64."""
    return (_wide(codes, codes) - torch.round(_wide(zero, codes))) * _wide(scale, codes)


class _StraightRound(torch.autograd.Function):
    """Rounding with the derivative of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """x̂ = dequantize(quantize(x)) in x's dtype, differentiable in x, scale and zero: rounding passes gradients on.

    With u = x/d: where the code is not clamped, dx̂/dx = 1, dx̂/dd = round(u) − u and dx̂/dz = 0; where it is clamped to
    q ∈ {0, L−1}, dx̂/dx = 0, dx̂/dd = q − round(z) and dx̂/dz = −d.
    """
    levels = 2 ** check_bits(bits)
    scale, rounded = _wide(scale, x), _straight_round(_wide(zero, x))
    codes = (_straight_round(_wide(x, x) / scale) + rounded).clamp(0, levels - 1)
    return ((codes - rounded) * scale).to(x.dtype)


def _straight_round(x: Tensor) -> Tensor:
    rounded: Any = _StraightRound.apply(x)
    return rounded


def search(rows: Tensor, bits: int, method: str = "mse", symmetric: bool = False) -> Affine:
    """Find one scale and zero point for each row of `rows` (C, M); returns `Affine` of shape (C,) on the same device.

    method:
        "mse": of 40 factors f = 1, 0.98, …, 0.22 of the row's range [mn, mx], the first one that minimises
            mean |x − x̂|^2.4. As in the released code, what is scored is the range widened to hold zero,
            [min(f·mn, 0), max(f·mx, 0)], and what is returned is d = (f·mx − f·mn)/(L−1), z = round(−f·mn/d):
            for rows of one sign that is another pair, with z < 0 or z > L − 1.
        "max": the range [min(mn, 0), max(mx, 0)]. (The released code's d = (mx − mn)/(L−1) cuts off all-positive rows.)
        "percentile:P": the range from the (100−P)th to the Pth percentile (50 < P ≤ 100, linear interpolation), widened
            to hold zero; "max" where those percentiles are equal.
    symmetric: z = L/2, and the scale that just holds that range (for "mse": f times the scale that holds [mn, mx],
        scored as it is returned).

    Departures from the released code, because integer kernels need d > 0 and |z| ≤ 2^14:
        - a constant row c is represented exactly: d = |c|, z = 0 for c > 0 and 1 for c < 0; d = 1, z = 0 for c = 0 (or
          |c| < 1e-30). Released: d = c and z = 0, a negative or zero scale unless c > 0. Symmetric: d = |c|, z = L/2.
        - "mse" returns the scored pair where the released one has |z| > 2^14 (values within [1000, 1000.1] in 8 bits
          would have z = −2.5 million: beyond int16, and x/d + z would cancel in float32) or d < 1e-30.

    A row's answer does not depend on the other rows. Beside the rows in float32, it needs a few MB and 2 KB a row
    (percentiles: 16 bytes for each number of one row). No gradients.
    Raises TypeError for rows that are not floating point or bits that are no int; ValueError for bits beyond 2 … 8, rows
    that are not (C, M) with C, M ≥ 1, values that are not finite, or an unknown method.
    """
    levels = 2 ** check_bits(bits)
    percentile = check_method(method)
    rows = _checked(rows)
    low, high = rows.amin(1), rows.amax(1)
    if method == "mse":
        found = _search_symmetric(rows, low, high, levels) if symmetric else _search_mse(rows, low, high, levels)
    else:
        lo, hi = (low, high) if percentile is None else _percentiles(rows, percentile, low, high)
        found = _symmetric(lo, hi, levels) if symmetric else _holding_zero(lo, hi, levels, SCALE_FLOOR)
    return _constants(found, low, low == high, levels, symmetric)


def check_method(method: str) -> float | None:
    """Return P of "percentile:P", None for "mse" and "max". Raises ValueError for anything else."""
    if method in ("mse", "max"):
        return None
    name, _, number = method.partition(":") if isinstance(method, str) else ("", "", "")
    try:
        percentile = float(number) if name == "percentile" else None
    except ValueError:
        percentile = None
    if percentile is None or not 50 < percentile <= 100:
        raise ValueError(f"method is {method!r}; expected 'mse', 'max' or 'percentile:P' with 50 < P ≤ 100, e.g. 99.9")
    return percentile


def _checked(rows: Tensor) -> Tensor:
    """The rows, detached, contiguous, in float32."""
    if not rows.is_floating_point():
        raise TypeError(f"rows are {rows.dtype}; expected floating point numbers")
    if rows.dim() != 2 or rows.numel() == 0:
        raise ValueError(
            f"rows have shape {tuple(rows.shape)}; expected (C, M), C rows of M ≥ 1 numbers (weight.flatten(1), or "
            "x.reshape(1, -1) for one scale of a whole tensor)"
        )
    rows = rows.detach().to(torch.float32).contiguous()
    # amax and amin instead of one mask: nothing the size of the rows is allocated unless something is wrong
    if not bool((rows.amax() <= VALUE_LIMIT) & (rows.amin() >= -VALUE_LIMIT)):
        bad = int((~(rows.abs() <= VALUE_LIMIT)).sum())
        raise ValueError(
            f"{bad} of {rows.numel()} values are NaN, infinite or beyond {VALUE_LIMIT:.1e}; quantization needs finite "
            "values: look for the layer that produced them (often float16 overflow)"
        )
    return rows


def _holding_zero(low: Tensor, high: Tensor, levels: int, floor: float) -> Affine:
    """Scale and zero point of the range widened to hold zero; z is a code."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = ((high - low) / (levels - 1)).clamp_(min=floor)
    return Affine(scale, torch.round(-low / scale).clamp_(0, levels - 1))


def _symmetric(low: Tensor, high: Tensor, levels: int) -> Affine:
    """The smallest scale that holds [low, high] about z = L/2: L/2 − 1 levels above zero, L/2 below."""
    scale = torch.maximum(high / (levels // 2 - 1), -low / (levels // 2)).clamp_(min=SCALE_FLOOR)
    return Affine(scale, torch.full_like(scale, levels // 2))


def _search_mse(rows: Tensor, low: Tensor, high: Tensor, levels: int) -> Affine:
    factors = torch.tensor(FACTORS, device=rows.device)
    scored = _holding_zero(low[:, None] * factors, high[:, None] * factors, levels, SCORED_FLOOR)
    factor = factors[_best(rows, scored, levels)]
    low, high = factor * low, factor * high
    scale = (high - low) / (levels - 1)
    zero = torch.round(-low / scale)  # inf or NaN for a scale of zero: not usable
    usable = (scale >= SCALE_FLOOR) & (zero.abs() <= ZERO_LIMIT)
    other = _holding_zero(low, high, levels, SCALE_FLOOR)
    return Affine(torch.where(usable, scale, other.scale), torch.where(usable, zero, other.zero))


def _search_symmetric(rows: Tensor, low: Tensor, high: Tensor, levels: int) -> Affine:
    whole = _symmetric(low, high, levels)
    scale = (whole.scale[:, None] * torch.tensor(FACTORS, device=rows.device)).clamp_(min=SCALE_FLOOR)
    best = _best(rows, Affine(scale, torch.full_like(scale, levels // 2)), levels)
    return Affine(scale.gather(1, best[:, None])[:, 0], whole.zero)


def _best(rows: Tensor, candidates: Affine, levels: int) -> Tensor:
    """Index (C,) of the first candidate (C, F) with the least mean |x − x̂|^2.4.

    Tiles of rows × candidates × columns. Their size in columns depends on M only, so a row's sums are always formed in
    the same order.
    """
    count, size = rows.shape
    tile = TILE_CUDA if rows.is_cuda else TILE
    width = min(size, max(1, tile // candidates.scale.shape[1]))
    height = max(1, tile // (candidates.scale.shape[1] * width))
    below, above = -candidates.zero, (levels - 1) - candidates.zero
    score = torch.zeros(candidates.scale.shape, dtype=torch.float64, device=rows.device)
    for top in range(0, count, height):
        part = slice(top, top + height)
        scale, least, most = candidates.scale[part, :, None], below[part, :, None], above[part, :, None]
        for left in range(0, size, width):
            u = rows[part, None, left : left + width] / scale
            error = u - torch.round(u).clamp_(least, most)
            score[part] += _power(error).sum(-1, dtype=torch.float64)
    # errors were in units of the candidate's scale; relative to the first scale, powers neither overflow nor vanish
    score *= (candidates.scale.double() / candidates.scale[:, :1].double()) ** POWER
    return score.argmin(1)  # the first of equals


def _power(error: Tensor) -> Tensor:
    """|e|^2.4, in place: through log2 and exp2 of e² it takes 0.4 of pow's time, to 3e-6 of its value; 0 stays 0."""
    return error.square_().log2_().mul_(POWER / 2).exp2_()


def _percentiles(rows: Tensor, percentile: float, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The (100−P)th and the Pth percentile (C,) of each row, or its extremes where those are equal."""
    size = rows.shape[1]
    place = (size - 1) * percentile / 100  # counted from 0
    rank = min(int(place), size - 1)
    weight = place - rank
    step = max(1, (TILE_CUDA if rows.is_cuda else TILE) // size)
    lows, highs = [], []
    for top in range(0, len(rows), step):
        part = rows[top : top + step]
        for k, out in ((rank, highs), (size - 1 - rank, lows)):
            other = min(k + 1, size - 1) if out is highs else max(k - 1, 0)
            value = part.kthvalue(k + 1, dim=1).values
            if weight > 0:
                value = torch.lerp(value, part.kthvalue(other + 1, dim=1).values, weight)
            out.append(value)
    found_low, found_high = torch.cat(lows), torch.cat(highs)
    flat = found_low == found_high
    return torch.where(flat, low, found_low), torch.where(flat, high, found_high)


def _constants(found: Affine, value: Tensor, constant: Tensor, levels: int, symmetric: bool) -> Affine:
    """`found`, but for rows that are one and the same value throughout: those are represented exactly."""
    size = value.abs()
    scale = torch.where(size >= SCALE_FLOOR, size, 1.0)  # zero, or next to it: code and zero point agree, x̂ = 0
    zero = torch.full_like(value, levels // 2) if symmetric else (value <= -SCALE_FLOOR).to(value.dtype)
    return Affine(torch.where(constant, scale, found.scale), torch.where(constant, zero, found.zero) + 0.0)  # no −0


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (any shape, uint8) as a flat uint8 tensor: two to a byte for bits ≤ 4 (the first in the low half), else one.

    Raises TypeError unless codes are uint8, ValueError for codes beyond 2^bits − 1.
    """
    levels = 2 ** check_bits(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes are {codes.dtype}; expected torch.uint8 (codes.to(torch.uint8))")
    flat = codes.detach().flatten()
    if len(flat) and int(flat.max()) >= levels:
        raise ValueError(f"codes go up to {int(flat.max())}; expected at most {levels - 1} for {bits} bits")
    if bits > 4:
        return flat.clone()
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[0::2] | (flat[1::2] << 4)


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The codes (shape, uint8) that `pack` packed. Raises TypeError unless packed is uint8, ValueError for a wrong size."""
    check_bits(bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed codes are {packed.dtype}; expected torch.uint8 as returned by pack()")
    shape = tuple(shape)
    count = 1
    for length in shape:
        count *= length
    expected = (count + 1) // 2 if bits <= 4 else count
    if packed.dim() != 1 or len(packed) != expected:
        raise ValueError(
            f"packed codes have shape {tuple(packed.shape)}; codes of shape {shape} in {bits} bits take ({expected},)"
        )
    if bits > 4:
        return packed.clone().reshape(shape)
    return torch.stack([packed & 15, packed >> 4], dim=1).flatten()[:count].reshape(shape)
