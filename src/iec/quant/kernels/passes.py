"""Passes over activations that surround the integer kernels on the CPU: quantize, and norm + SiLU + quantize.

Each exists twice: compiled by numba, once over the memory, where numba is installed (the extra "cpu"); else by torch's own
operators, several times over it. `quantize` gives the same codes either way, bit for bit those of
`iec.core.affine.quantize`, but for a NaN, which becomes code 0. `norm_silu_quantize` computes in float32 by another route
than torch: a code is that of the exact value, or the next one where the exact value lies within 1e-3 of a rounding boundary
(in units of a code).

numba compiles on first use, 6 seconds once and then half a second, from its cache: beside the installed files or, if those
cannot be written, in the user's cache folder; without either it compiles in every process. The passes use as many threads
as torch and may be called from several Python threads at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Span = tuple[int, int, float, int, int]  # channels begin:end, scale, zero point, highest code (2**bits − 1)

PIECE = 8192  # float32 numbers of a piece of work: 32 KiB stay in the L1 cache
_lock = threading.Lock()
_compiled: list[SimpleNamespace | None] = []  # empty until first use


def engine() -> str:
    """Which passes run in this process: "numba" or "torch"."""
    return "torch" if _numba() is None else "numba"


def quantize(x: Tensor, dim: int, spans: Sequence[Span], border: tuple[int, int] = (0, 0)) -> tuple[Tensor, ...]:
    """Codes of each range of channels, uint8: clamp(round(x/d) + z, 0, top), half to even, computed in float32.

    x: floating; (N, C, H, W) with dim 1 gives channels_last tensors, anything with dim −1 contiguous ones. border: rows above
    and below an image and columns beside it that are added and hold the zero point, which must be a code then.
    """
    x = x.detach().float()
    passes = _numba()
    if passes is None or x.numel() == 0:
        return _quantize_torch(x, dim, spans, border)
    return _quantize_numba(passes, x, dim, spans, border)


def norm_silu_quantize(
    x: Tensor | tuple[Tensor, Tensor],
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    spans: Sequence[Span],
    shift: Tensor | None = None,
    silu: bool = True,
    border: tuple[int, int] = (0, 0),
) -> tuple[Tensor, ...]:
    """Codes of silu(group_norm(x + shift)), uint8 channels_last (N, C', H, W) for each range of channels.

    Args:
        x: (N, C, H, W), floating, best channels_last; or two such images whose channels are put one behind the other.
        groups, weight (C,), bias (C,), eps: of the GroupNorm; None: 1 and 0.
        spans: the ranges of channels, which tile 0..C, with their quantizers; for two images their channels.
        shift: (N, C), added to every pixel before the norm (the time embedding); None: nothing.
        silu: False leaves the SiLU out.
        border: as for `quantize`.
    """
    parts = [image.detach().float() for image in (x if isinstance(x, tuple) else (x,))]
    passes = _numba()
    if passes is None or parts[0].numel() == 0 or len(spans) > 2:
        return _norm_torch(torch.cat(parts, 1), groups, weight, bias, eps, spans, shift, silu, border)
    if len(parts) < len(spans):
        parts = [parts[0][:, begin:end] for begin, end, *_ in spans]
    elif len(parts) > len(spans):
        parts = [torch.cat(parts, 1)]
    return _norm_numba(passes, parts, groups, weight, bias, eps, spans, shift, silu, border)


def bordered(codes: Tensor, border: tuple[int, int], zero: int) -> Tensor:
    """Codes (N, C, H, W) with rows above and below and columns at the sides that hold the zero point; channels_last."""
    rows, columns = border
    return F.pad(codes, (columns, columns, rows, rows), value=zero).contiguous(memory_format=torch.channels_last)


def add_window_sums(codes: Tensor, zero: int, window: Tensor, factor: Tensor, total: Tensor, fresh: bool) -> bool:
    """total[n, y, x, o] = (`fresh`) or += factor[o] Σ (code − zero) over the window at (y, x) and the channels.

    codes: uint8 (N, H, W, C), contiguous; window: int64 (2, 4), for rows and columns: kernel, stride, padding (by true
    zeros), dilation; factor: float32 (O,); total: float32 (N, h, w, O), contiguous. False where nothing was done, since
    only numba has this pass.
    """
    passes = _numba()
    if passes is None:
        return False
    _run(passes, passes.add_window_sums, codes.numpy(), zero, window.numpy(), factor.numpy(), fresh, total.numpy())
    return True


# --- torch ------------------------------------------------------------------------------------------------------------


def _quantize_torch(x: Tensor, dim: int, spans: Sequence[Span], border: tuple[int, int]) -> tuple[Tensor, ...]:
    form = torch.channels_last if dim == 1 else torch.contiguous_format
    codes = []
    for begin, end, scale, zero, top in spans:
        t = x.narrow(dim, begin, end - begin) / scale
        t = t.round_().add_(zero).nan_to_num_(nan=0.0).clamp_(0, top)
        t = t.to(torch.uint8)
        codes.append(bordered(t, border, zero) if any(border) else t.contiguous(memory_format=form))
    return tuple(codes)


def _norm_torch(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, spans: Sequence[Span],
    shift: Tensor | None, silu: bool, border: tuple[int, int],
) -> tuple[Tensor, ...]:  # fmt: skip
    if shift is not None:
        x = x + shift.float()[:, :, None, None]
    weight = None if weight is None else weight.detach().float()
    bias = None if bias is None else bias.detach().float()
    y = F.group_norm(x, groups, weight, bias, eps)
    return _quantize_torch(F.silu(y, inplace=True) if silu else y, 1, spans, border)


# --- numba ------------------------------------------------------------------------------------------------------------


def _numba() -> SimpleNamespace | None:
    """The compiled passes; None where numba is missing or cannot run them safely."""
    if not _compiled:
        with _lock:
            if not _compiled:
                _compiled.append(_load())
    passes = _compiled[0]
    if passes is not None and passes.process != os.getpid():
        return None  # GNU OpenMP does not survive a fork
    return passes


def _load() -> SimpleNamespace | None:
    try:
        import numba
    except ImportError:
        return None
    if numba.config.DISABLE_JIT:  # pyright: ignore[reportAttributeAccessIssue]
        return None
    # OpenMP is the library that torch runs on (torch is imported, so numba finds the same one) and may be entered from
    # several threads, which "workqueue" may not: it ends the process. The setting matters to the first user of threads
    # only, and is put back for the others.
    chosen, numba.config.THREADING_LAYER = numba.config.THREADING_LAYER, "omp"  # pyright: ignore
    threads = torch.get_num_threads()
    try:
        from iec.quant.kernels import compiled

        try:
            passes = compiled.compile_all(cache=True)
        except (RuntimeError, OSError):  # no folder for the cache, or none that can be written
            passes = compiled.compile_all(cache=False)
        passes.process, passes.threads = os.getpid(), numba.config.NUMBA_NUM_THREADS  # pyright: ignore
        codes = torch.empty(1, dtype=torch.uint8)
        _run(passes, passes.quantize_flat, torch.zeros(1).numpy(), 1.0, 0, 255, codes.numpy())
        return passes if numba.threading_layer() in ("omp", "tbb") else None
    except ValueError:  # no such threading layer on this system
        return None
    finally:
        numba.config.THREADING_LAYER = chosen  # pyright: ignore[reportAttributeAccessIssue]
        torch.set_num_threads(threads)  # numba sets OpenMP's number, which is torch's too, to that of the processors


def _run(passes: SimpleNamespace, function: Callable[..., Any], *arguments: Any) -> None:
    """Call a compiled pass with torch's number of threads."""
    numba = passes.numba
    before, wanted = numba.get_num_threads(), min(torch.get_num_threads(), passes.threads)
    if before == wanted:
        function(*arguments)
        return
    numba.set_num_threads(wanted)
    try:
        function(*arguments)
    finally:
        numba.set_num_threads(before)


def _image(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H, W, C), contiguous: a view of a channels_last tensor."""
    return x.permute(0, 2, 3, 1).contiguous()


def _empty(image: Tensor, channels: int, border: tuple[int, int], zero: int) -> Tensor:
    """Room for the codes of an image (N, H, W, C) and its border, which is written already."""
    shape = (len(image), image.shape[1] + 2 * border[0], image.shape[2] + 2 * border[1], channels)
    return torch.full(shape, zero, dtype=torch.uint8) if any(border) else torch.empty(shape, dtype=torch.uint8)


def _quantize_numba(
    passes: SimpleNamespace, x: Tensor, dim: int, spans: Sequence[Span], border: tuple[int, int]
) -> tuple[Tensor, ...]:
    turned = dim == 1 and not x.is_contiguous(memory_format=torch.channels_last)
    if len(spans) == 1 and not any(border) and (dim != 1 or turned) and x.is_contiguous():
        codes = torch.empty(
            x.shape, dtype=torch.uint8
        )  # quantized as it lies, so a quarter of the bytes is turned round
        _run(passes, passes.quantize_flat, x.view(-1).numpy(), *spans[0][2:], codes.view(-1).numpy())
        return (codes.contiguous(memory_format=torch.channels_last) if dim == 1 else codes,)
    image = _image(x) if dim == 1 else x.contiguous().view(1, 1, -1, x.shape[-1])
    found = []
    for begin, end, scale, zero, top in spans:
        codes = _empty(image, end - begin, border, zero)
        if end - begin == image.shape[-1] and not any(border):
            _run(passes, passes.quantize_flat, image.view(-1).numpy(), scale, zero, top, codes.view(-1).numpy())
        else:
            _run(passes, passes.quantize_image, image.numpy(), begin, scale, zero, top, codes.numpy())
        found.append(codes.permute(0, 3, 1, 2) if dim == 1 else codes.view(*x.shape[:-1], -1))
    return tuple(found)


def _norm_numba(
    passes: SimpleNamespace, parts: Sequence[Tensor], groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    spans: Sequence[Span], shift: Tensor | None, silu: bool, border: tuple[int, int],
) -> tuple[Tensor, ...]:  # fmt: skip
    count, channels = len(parts[0]), sum(part.shape[1] for part in parts)
    if channels % groups:
        raise ValueError(f"{channels} channels do not divide into {groups} groups")
    images = [_image(part) for part in parts]
    width, pixels = images[0].shape[2], images[0].shape[1] * images[0].shape[2]
    shift = torch.zeros((count, channels)) if shift is None else shift.detach().float().expand(count, -1).contiguous()
    weight = torch.ones(channels) if weight is None else weight.detach().float().contiguous()
    bias = torch.zeros(channels) if bias is None else bias.detach().float().contiguous()
    codes = [_empty(image, image.shape[-1], border, span[3]) for image, span in zip(images, spans, strict=True)]
    rows = [image.view(count, pixels, -1) for image in images]
    if len(rows) == 1:
        rows.append(rows[0].new_empty((count, pixels, 0)))
    second = codes[1] if len(codes) > 1 else codes[0].new_empty((*codes[0].shape[:3], 0))
    quantizers = torch.tensor([spans[0][2:], spans[-1][2:]], dtype=torch.float32)
    _run(
        passes, passes.norm_quantize, rows[0].numpy(), rows[1].numpy(), shift.numpy(), weight.numpy(), bias.numpy(), groups,
        eps, silu, max(16, PIECE // channels), width, quantizers.numpy(), codes[0].numpy(), second.numpy(),
    )  # fmt: skip
    return tuple(part.permute(0, 3, 1, 2) for part in codes)
