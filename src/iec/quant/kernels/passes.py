"""Passes over activations that surround the integer kernels on the CPU: quantize, and norm + SiLU + quantize."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Span = tuple[int, int, float, int, int]  # channels begin:end, scale, zero point, highest code (2**bits − 1)


def quantize(x: Tensor, dim: int, spans: Sequence[Span]) -> tuple[Tensor, ...]:
    """Codes of each range of channels, uint8: clamp(round(x/d) + z, 0, top), half to even, computed in float32.

    x: floating; (N, C, H, W) with dim 1 gives channels_last tensors, anything with dim −1 contiguous ones.
    """
    return _quantize_torch(x.detach().float(), dim, spans)


def _quantize_torch(x: Tensor, dim: int, spans: Sequence[Span]) -> tuple[Tensor, ...]:
    form = torch.channels_last if dim == 1 else torch.contiguous_format
    codes = []
    for begin, end, scale, zero, top in spans:
        t = x.narrow(dim, begin, end - begin) / scale
        codes.append(t.round_().add_(zero).clamp_(0, top).to(torch.uint8).contiguous(memory_format=form))
    return tuple(codes)
