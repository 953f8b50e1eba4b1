"""The int8 convolution in Triton; `cuda` loads this file where Triton is. Not yet run on a GPU, see there."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["zero", "height", "width", "rows", "columns", "count"])
def convolve(
    x, weight, sums, moved, factor, bias, y,
    scale, zero, count, height, width, rows, columns, weight_stride,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr, PADDING_X: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    MOVED: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M output pixels by BLOCK_N output channels of one group; `cuda.CudaPart.product` states the formula.

    x int8 (count, height, width, GROUPS·CHANNELS) holds code − 128; weight int8 (GROUPS·OUTPUTS, ≥ K) with rows
    `weight_stride` apart and K = (ky, kx, channel); sums, moved int32, factor, bias float32 (GROUPS·OUTPUTS,);
    y (count, rows, columns, GROUPS·OUTPUTS). CHANNELS and OUTPUTS are per group.
    """
    size: tl.constexpr = KERNEL_Y * KERNEL_X * CHANNELS
    group = tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_good = m < count * rows * columns
    o_good = o < OUTPUTS
    o_all = group * OUTPUTS + o
    top = ((m // columns) % rows) * STRIDE_Y - PADDING_Y
    left = (m % columns) * STRIDE_X - PADDING_X
    image = (m // (rows * columns)).to(tl.int64) * height * width  # in pixels
    beyond = (zero - 128).to(tl.int8)  # the code that stands for 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    inputs = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for begin in range(0, size, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        k_good = k < size
        tap = k // CHANNELS
        v = top[:, None] + (tap // KERNEL_X * DILATION_Y)[None, :]
        u = left[:, None] + (tap % KERNEL_X * DILATION_X)[None, :]
        inside = (v >= 0) & (v < height) & (u >= 0) & (u < width)
        place = (image[:, None] + v * width + u) * (GROUPS * CHANNELS) + group * CHANNELS + (k % CHANNELS)[None, :]
        a = tl.load(x + place, mask=inside & k_good[None, :] & m_good[:, None], other=0)
        a = tl.where(inside, a, beyond)
        a = tl.where(k_good[None, :], a, 0).to(tl.int8)
        w = tl.load(
            weight + o_all[None, :].to(tl.int64) * weight_stride + k[:, None],
            mask=k_good[:, None] & o_good[None, :],
            other=0,
        )
        acc = tl.dot(a, w, acc, out_dtype=tl.int32)
        if MOVED:
            inputs += tl.sum(a.to(tl.int32), axis=1)
    offset = 128 - zero
    acc += (offset * tl.load(sums + o_all, mask=o_good, other=0))[None, :]
    result = acc.to(tl.float32)
    if MOVED:
        by = tl.load(moved + o_all, mask=o_good, other=0).to(tl.float32)
        result += (inputs + offset * size).to(tl.float32)[:, None] * by[None, :]
    result *= (scale * tl.load(factor + o_all, mask=o_good, other=0.0))[None, :]
    if BIAS:
        result += tl.load(bias + o_all, mask=o_good, other=0.0)[None, :]
    to = m[:, None].to(tl.int64) * (GROUPS * OUTPUTS) + o_all[None, :]
    tl.store(y + to, result.to(y.dtype.element_ty), mask=m_good[:, None] & o_good[None, :])
