"""The passes that numba compiles; `passes` loads this file where numba is, and nothing else may import it.

Plain functions of arrays; `compile` wraps them. Every number is float32 but where it says so. Without `reassoc` and `arcp`
of fast-math x/d stays a true division, so the codes are those of `iec.core.affine.quantize` bit for bit. Indices that are
sums are unsigned, for a signed one could count from the end: the test for that keeps a loop from being vectorised.
"""

from __future__ import annotations

from types import SimpleNamespace

import numba
import numpy as np
from numba import njit, prange

FAST = {"contract", "nsz"}
F = np.float32


@njit(inline="always")
def _code(t, zero, top):  # t = x/d; comparisons in this order make a NaN 0
    t = np.rint(t) + zero
    t = t if t > F(0) else F(0)
    return np.uint8(np.int32(t if t < top else top))


@njit(inline="always")
def _exp_negative(y):
    """exp(−y) = 2^n 2^f, |f| ≤ 1/2: relative error below 3e-7; y is held within ±87. The polynomial is that of Cephes' exp2f."""
    t = y * F(-1.4426950408889634)
    t = min(max(t, F(-126)), F(126))
    n = np.rint(t)
    f = t - n
    p = F(1.535336188319500e-4) * f + F(1.339887440266574e-3)
    p = p * f + F(9.618437357674640e-3)
    p = p * f + F(5.550332471162809e-2)
    p = p * f + F(2.402264791363012e-1)
    p = p * f + F(6.931472028550421e-1)
    p = p * f + F(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(inline="always", fastmath=FAST)
def _add_moments(x, pivot, away, square):
    """away[c] += Σ (x − pivot), square[c] += Σ (x − pivot)² over the rows of x (P, C), four rows at a time."""
    rows, channels = x.shape
    whole = rows - rows % 4
    for p in range(0, whole, 4):
        for c in range(channels):
            a, b = x[p, c] - pivot[c], x[p + 1, c] - pivot[c]
            d, e = x[p + 2, c] - pivot[c], x[p + 3, c] - pivot[c]
            away[c] += (a + b) + (d + e)
            square[c] += (a * a + b * b) + (d * d + e * e)
    for p in range(whole, rows):
        for c in range(channels):
            a = x[p, c] - pivot[c]
            away[c] += a
            square[c] += a * a


def quantize_flat(x, scale, zero, top, out):
    """x (M,) → out (M,) uint8."""
    for i in prange(x.size):
        out[i] = _code(x[i] / scale, zero, top)


def quantize_image(x, begin, scale, zero, top, out):
    """Channels begin … begin + K of x (N, H, W, C) → the middle of out (N, H + 2 rows, W + 2 columns, K) uint8."""
    count, height, width, _ = x.shape
    channels = out.shape[3]
    above, left = (out.shape[1] - height) // 2, (out.shape[2] - width) // 2
    first = np.uint64(begin)
    for i in prange(count * height):
        n, y = i // height, i % height
        for j in range(width):
            for c in range(channels):
                out[n, y + above, j + left, c] = _code(x[n, y, j, first + np.uint64(c)] / scale, zero, top)


def norm_quantize(x, rest, shift, weight, bias, groups, eps, silu, size, width, spans, first, second):
    """GroupNorm of the concatenation of x and rest, plus shift; SiLU; quantize.

    x (N, P, K), rest (N, P, C − K); shift (N, C); weight, bias (C,); size: pixels that a piece of work has; width: pixels in a
    row of the image; spans float32 (2, 3): scale, zero point and highest code of what becomes of x, in the middle of
    `first` (N, H + 2 rows, W + 2 columns, K), and of rest, in that of `second`.
    """
    count, pixels, split = x.shape
    channels = split + rest.shape[2]
    pieces = (pixels + size - 1) // size
    beyond = np.uint64(split)
    above, left = (first.shape[1] - pixels // width) // 2, (first.shape[2] - width) // 2
    each = channels // groups
    pivots = np.empty((count, pieces, channels), np.float32)
    sums = np.empty((count, pieces, channels), np.float32)
    squares = np.empty((count, pieces, channels), np.float32)
    factors = np.empty((count, channels), np.float32)
    offsets = np.empty((count, channels), np.float32)
    centres = np.empty((count, channels), np.float32)
    # Of every piece and channel Σ(x − pivot) and Σ(x − pivot)², where the pivot is about its mean: E[x²] − E[x]² would lose
    # the variance of a channel that is far from zero. A quarter of the rows does for the pivot.
    for i in prange(count * pieces):
        n, begin = i // pieces, (i % pieces) * size
        end = min(begin + size, pixels)
        pivot = np.zeros(channels, np.float32)
        away, square = np.zeros(channels, np.float32), np.zeros(channels, np.float32)
        for p in range(begin, end, 4):
            for c in range(split):
                pivot[c] += x[n, p, c]
            for c in range(channels - split):
                pivot[beyond + np.uint64(c)] += rest[n, p, c]
        for c in range(channels):
            pivot[c] /= F((end - begin + 3) // 4)
        _add_moments(x[n, begin:end], pivot[:split], away[:split], square[:split])
        _add_moments(rest[n, begin:end], pivot[split:], away[split:], square[split:])
        for c in range(channels):
            pivots[n, i % pieces, c] = pivot[c]
            sums[n, i % pieces, c] = away[c]
            squares[n, i % pieces, c] = square[c]
    # Put together in float64 for each group. y = (x − centre) factor + offset takes a mean far from zero off before it is
    # multiplied.
    for i in prange(count * groups):
        n, g = i // groups, i % groups
        total = 0.0
        for c in range(g * each, (g + 1) * each):
            total += np.float64(shift[n, c]) * pixels
            for j in range(pieces):
                total += np.float64(sums[n, j, c])
                total += np.float64(pivots[n, j, c]) * (min((j + 1) * size, pixels) - j * size)
        mean64 = total / (pixels * each)
        spread = 0.0
        for c in range(g * each, (g + 1) * each):
            for j in range(pieces):
                far = np.float64(pivots[n, j, c]) + np.float64(shift[n, c]) - mean64
                spread += np.float64(squares[n, j, c]) + 2 * far * np.float64(sums[n, j, c])
                spread += far * far * (min((j + 1) * size, pixels) - j * size)
        inverse = 1.0 / np.sqrt(max(spread, 0.0) / (pixels * each) + eps)
        for c in range(g * each, (g + 1) * each):
            factor = inverse * np.float64(weight[c])
            factors[n, c] = factor
            centre = np.float32(mean64 - np.float64(shift[n, c]))
            centres[n, c] = centre
            offsets[n, c] = np.float64(bias[c]) + (np.float64(shift[n, c]) - mean64 + np.float64(centre)) * factor
    scale_1, zero_1, top_1 = spans[0, 0], spans[0, 1], spans[0, 2]
    scale_2, zero_2, top_2 = spans[1, 0], spans[1, 1], spans[1, 2]
    for i in prange(count * pieces):
        n, begin = i // pieces, (i % pieces) * size
        factor, offset, centre = factors[n], offsets[n], centres[n]
        for p in range(begin, min(begin + size, pixels)):
            y, j = p // width + above, p % width + left
            if silu:
                for c in range(split):
                    v = (x[n, p, c] - centre[c]) * factor[c] + offset[c]
                    first[n, y, j, c] = _code(v / (scale_1 + scale_1 * _exp_negative(v)), zero_1, top_1)
                for c in range(channels - split):
                    k = beyond + np.uint64(c)
                    v = (rest[n, p, c] - centre[k]) * factor[k] + offset[k]
                    second[n, y, j, c] = _code(v / (scale_2 + scale_2 * _exp_negative(v)), zero_2, top_2)
            else:
                for c in range(split):
                    v = (x[n, p, c] - centre[c]) * factor[c] + offset[c]
                    first[n, y, j, c] = _code(v / scale_1, zero_1, top_1)
                for c in range(channels - split):
                    k = beyond + np.uint64(c)
                    v = (rest[n, p, c] - centre[k]) * factor[k] + offset[k]
                    second[n, y, j, c] = _code(v / scale_2, zero_2, top_2)


def add_window_sums(codes, zero, window, factor, fresh, total):
    """total[n, y, x, o] = or += factor[o] Σ (code − zero) over the window at (y, x) and the channels, zeros around it.

    codes (N, H, W, C); window int64 (2, 4): kernel, stride, padding, dilation of rows and of columns; total (N, h, w, O).
    """
    count, height, width, channels = codes.shape
    rows, columns, outputs = total.shape[1:]
    sums = np.empty((count, height, width), np.int32)
    for i in prange(count * height):
        n, y = i // height, i % height
        for x in range(width):
            s = np.int32(0)
            for c in range(channels):
                s += np.int32(codes[n, y, x, c])
            sums[n, y, x] = s - np.int32(zero * channels)
    for i in prange(count * rows):
        n, y = i // rows, i % rows
        for x in range(columns):
            s = 0
            for a in range(window[0, 0]):
                v = y * window[0, 1] - window[0, 2] + a * window[0, 3]
                if 0 <= v < height:
                    for b in range(window[1, 0]):
                        u = x * window[1, 1] - window[1, 2] + b * window[1, 3]
                        if 0 <= u < width:
                            s += sums[n, v, u]
            value = F(s)
            if fresh:
                for o in range(outputs):
                    total[n, y, x, o] = value * factor[o]
            else:
                for o in range(outputs):
                    total[n, y, x, o] += value * factor[o]


SIGNATURES = {
    quantize_flat: "void(f4[::1], f4, f4, f4, u1[::1])",
    quantize_image: "void(f4[:, :, :, ::1], i8, f4, f4, f4, u1[:, :, :, ::1])",
    norm_quantize: (
        "void(f4[:, :, ::1], f4[:, :, ::1], f4[:, ::1], f4[::1], f4[::1], i8, f8, b1, i8, i8, f4[:, ::1], "
        "u1[:, :, :, ::1], u1[:, :, :, ::1])"
    ),
    add_window_sums: "void(u1[:, :, :, ::1], i8, i8[:, ::1], f4[::1], b1, f4[:, :, :, ::1])",
}


def compile_all(cache: bool) -> SimpleNamespace:
    """Compile the passes, or read them from numba's cache; raises RuntimeError or OSError where there is none."""
    wrapped = {}
    for function, signature in SIGNATURES.items():
        wrapped[function.__name__] = njit(signature, parallel=True, nogil=True, fastmath=FAST, cache=cache)(function)
    return SimpleNamespace(**wrapped, numba=numba)
