"""What must hold of a calibration, whoever made it: checked before it is saved and after it is loaded."""

from __future__ import annotations

from typing import get_args

import torch

from iec.artifact.calibration import (
    CacheTables,
    Calibration,
    Kind,
    LayerPart,
    Origin,
    Product,
    Quantization,
    QuantizedLayer,
    StepTable,
    WeightCodes,
)
from iec.core.affine import BITS, ZERO_LIMIT
from iec.plan import CachePlan

_DIMS = {"linear": 2, "conv1d": 3, "conv2d": 4}


def check(calibration: Calibration) -> None:
    """Raise ValueError, naming the field, unless every number of `calibration` is one that kernels and caches can work with."""
    origin = calibration.origin
    if origin.num_steps < 1:
        raise ValueError(f"origin.num_steps: found {origin.num_steps}, expected at least 1")
    if calibration.quant is not None:
        _quantization(calibration.quant, origin.num_steps)
    if calibration.cache is not None:
        _cache(calibration.cache, origin)


def _quantization(quant: Quantization, steps: int) -> None:
    for name, layer in quant.layers.items():
        _layer(layer, f"quantization.layers[{name!r}]", steps)
    for name, tables in quant.products.items():
        for key, table in tables.items():
            path = f"quantization.products[{name!r}].{key}"
            if key not in get_args(Product):
                raise ValueError(f"{path}: no such operand; expected one of {', '.join(get_args(Product))}")
            _table(table, path, steps)


def _cache(cache: CacheTables, origin: Origin) -> None:
    if cache.component not in origin.denoisers:
        raise ValueError(
            f"cache.component: found {cache.component!r}, expected one of the denoisers, {', '.join(origin.denoisers)}"
        )
    if isinstance(cache.branch, bool) or not isinstance(cache.branch, int) or cache.branch < -1:
        raise ValueError(f"cache.branch: found {cache.branch!r}, expected a whole number of at least -1")
    try:
        CachePlan(cache.refresh, origin.num_steps)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cache.refresh: {error}") from error
    if cache.gain.dim() != 2 or cache.gain.shape[1] < 1:
        raise ValueError(
            f"cache.gain: found shape {tuple(cache.gain.shape)}, expected ({origin.num_steps}, channels) with at least 1"
        )
    for name, table in (("gain", cache.gain), ("offset", cache.offset)):
        _finite(table, f"cache.{name}", (origin.num_steps, cache.gain.shape[1]))


def _layer(layer: QuantizedLayer, path: str, steps: int) -> None:
    if layer.kind not in get_args(Kind):
        raise ValueError(f"{path}.kind: found {layer.kind!r}, expected one of {', '.join(get_args(Kind))}")
    if not layer.parts:
        raise ValueError(f"{path}.parts: found none, expected at least one")
    for index, part in enumerate(layer.parts):
        _weight(part.weight, f"{path}.parts[{index}].weight", _DIMS[layer.kind])
        _table(part.act, f"{path}.parts[{index}].act", steps)
        if part.gain is not None:
            _finite(part.gain, f"{path}.parts[{index}].gain", (steps, part.weight.codes.shape[0]))
    _tiling(layer, path)
    if layer.bias is not None:
        outputs = layer.parts[0].weight.codes.shape[0]
        _finite(layer.bias, f"{path}.bias", (steps, outputs) if layer.bias.dim() == 2 else (outputs,))


def _tiling(layer: QuantizedLayer, path: str) -> None:
    """Parts follow each other without gap or overlap, and their weights fit them and each other."""
    first = layer.parts[0].weight.codes.shape
    begin = 0
    for index, part in enumerate(layer.parts):
        at = f"{path}.parts[{index}]"
        if part.begin != begin or part.end <= part.begin:
            raise ValueError(
                f"{at}: found input channels {part.begin}:{part.end}, expected them to begin at {begin}: "
                "the parts must tile the input channels"
            )
        begin = part.end
        shape = part.weight.codes.shape
        if shape[0] != first[0] or shape[2:] != first[2:]:
            raise ValueError(
                f"{at}.weight.codes: found shape {tuple(shape)}, expected the output channels and the kernel of "
                f"part 0, {tuple(first)}"
            )
        if not _fits(layer, part):
            raise ValueError(
                f"{at}: found input channels {part.begin}:{part.end} and codes of shape {tuple(shape)}, expected "
                f"codes with {part.end - part.begin} input channels (or that over the groups, in an unsplit convolution)"
            )


def _fits(layer: QuantizedLayer, part: LayerPart) -> bool:
    out, inner, channels = *part.weight.codes.shape[:2], part.end - part.begin
    if layer.kind == "linear" or len(layer.parts) > 1:
        return inner == channels
    return channels % inner == 0 and out % (channels // inner) == 0


def _weight(weight: WeightCodes, path: str, dims: int) -> None:
    codes, levels = weight.codes, 2 ** _bits(weight.bits, path)
    if codes.dtype != torch.uint8 or codes.dim() != dims or codes.numel() == 0:
        raise ValueError(
            f"{path}.codes: found {codes.dtype} of shape {tuple(codes.shape)}, expected torch.uint8 with {dims} "
            "dimensions, none empty"
        )
    if int(codes.max()) >= levels:
        raise ValueError(f"{path}.codes: found {int(codes.max())}, expected at most {levels - 1} ({weight.bits} bits)")
    _scale_and_zero(weight.scale, weight.zero, path, codes.shape[0])


def _table(table: StepTable, path: str, steps: int) -> None:
    _bits(table.bits, path)
    _scale_and_zero(table.scale, table.zero, path, steps)


def _bits(bits: int, path: str) -> int:
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
        raise ValueError(f"{path}.bits: found {bits!r}, expected a whole number in {BITS[0]}..{BITS[-1]}")
    return bits


def _scale_and_zero(scale: torch.Tensor, zero: torch.Tensor, path: str, size: int) -> None:
    _tensor(scale, f"{path}.scale", torch.float32, (size,))
    _tensor(zero, f"{path}.zero", torch.int16, (size,))
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"{path}.scale: found values that are not finite and positive")
    if int(zero.int().abs().max()) > ZERO_LIMIT:
        raise ValueError(f"{path}.zero: found {int(zero.int().abs().max())}, expected at most {ZERO_LIMIT} in size")


def _finite(value: torch.Tensor, path: str, shape: tuple[int, ...]) -> None:
    _tensor(value, path, torch.float32, shape)
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{path}: found values that are not finite")


def _tensor(value: torch.Tensor, path: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if value.dtype != dtype or tuple(value.shape) != shape:
        raise ValueError(
            f"{path}: found {value.dtype} of shape {tuple(value.shape)}, expected {dtype} of shape {shape}"
        )
