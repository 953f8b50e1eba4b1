"""Quantized layers as a page of plain data and five flat tensors.

A tensor of its own for every scale and zero would cost more in headers than in values. So there is one tensor per sort
of value, over all layers: parts in the order of the sorted layer names, each weight before its step table; then products
in the order of the sorted attention modules and of their operands. Which stretch is whose follows from the plain data.

Nearly all zero points are codes themselves and take a byte; weights and tables with others are listed as wide.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from iec.artifact.calibration import (
    LayerPart,
    Quantization,
    QuantizedLayer,
    StepTable,
    WeightCodes,
    packed_bytes,
)
from iec.artifact.plain import Fields, plain, short
from iec.core.affine import pack, unpack

_DTYPES = {
    "codes": torch.uint8,  # packed, (bytes,)
    "scale": torch.float32,  # of weights (output channels,) and tables (steps,)
    "zero": torch.uint8,  # as many as scales, but for the wide ones
    "zero_wide": torch.int16,
    "bias": torch.float32,  # (output channels of all layers with a bias,)
}


def flatten(quant: Quantization) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The plain data and the tensors (on the CPU; those without values are left out) of `quant`."""
    pools: dict[str, list[torch.Tensor]] = {name: [] for name in _DTYPES}
    wide: list[str] = []

    def put(pool: str, tensor: torch.Tensor) -> None:
        pools[pool].append(tensor.detach().cpu().reshape(-1))

    def put_affine(of: WeightCodes | StepTable, path: str) -> None:
        put("scale", of.scale)
        if bool(((of.zero >= 0) & (of.zero <= 255)).all()):
            put("zero", of.zero.to(torch.uint8))
        else:
            put("zero_wide", of.zero)
            wide.append(path)

    for name, layer in sorted(quant.layers.items()):
        for index, part in enumerate(layer.parts):
            put("codes", pack(part.weight.codes.detach().cpu().contiguous(), part.weight.bits))
            put_affine(part.weight, _weight_path(name, index))
            put_affine(part.act, _act_path(name, index))
        if layer.bias is not None:
            put("bias", layer.bias)
    for name, tables in sorted(quant.products.items()):
        for key, table in sorted(tables.items()):
            put_affine(table, f"{name}.{key}")
    tensors = {name: torch.cat(pool) for name, pool in pools.items() if sum(map(len, pool))}
    return {**_plain(quant), "wide": wide}, tensors


def _weight_path(name: str, index: int) -> str:
    return f"{name}.parts[{index}].weight"


def _act_path(name: str, index: int) -> str:
    return f"{name}.parts[{index}].act"


def _plain(quant: Quantization) -> dict[str, Any]:
    layers = {
        name: {
            "kind": layer.kind,
            "bias": layer.bias is not None,
            "parts": [
                {
                    "begin": part.begin,
                    "end": part.end,
                    "shape": list(part.weight.codes.shape),
                    "weight_bits": part.weight.bits,
                    "act_bits": part.act.bits,
                }
                for part in layer.parts
            ],
        }
        for name, layer in quant.layers.items()
    }
    page = {
        "config": quant.config,
        "layers": layers,
        "products": {name: {key: table.bits for key, table in of.items()} for name, of in quant.products.items()},
        "skipped": quant.skipped,
        "reconstruction": quant.reconstruction,
    }
    return {key: plain(value, f"quantization.{key}") for key, value in page.items()}


class Page:
    """The plain data of quantized layers, read with checks: what tensors belong to it, and the layers made of them."""

    def __init__(self, value: Any, steps: int) -> None:
        """Read `value`, whose tables have `steps` entries. Raises ValueError naming the field."""
        fields = Fields(value, "quantization")
        self._steps = steps
        self._config = fields.take("config", "an object")
        self._skipped = fields.take("skipped", "an object of texts")
        self._reconstruction = fields.take("reconstruction", "an object or null")
        layers = fields.take("layers", "an object")
        self._layers = {name: _Layer(layer, f"quantization.layers[{name!r}]") for name, layer in layers.items()}
        self._products: dict[str, dict[str, int]] = {}
        for name, tables in fields.take("products", "an object").items():
            of = Fields(tables, f"quantization.products[{name!r}]")
            self._products[name] = {key: of.take(key, "a whole number in 2..8") for key in tables}
        self._wide: list[str] = fields.take("wide", "a list of texts")
        fields.done()

    def _affines(self) -> dict[str, int]:
        """Of every weight and every table, by path, how many scales and zero points it has."""
        sizes: dict[str, int] = {}
        for name, layer in self._layers.items():
            for index, part in enumerate(layer.parts):
                sizes |= {_weight_path(name, index): part.shape[0], _act_path(name, index): self._steps}
        return sizes | {f"{name}.{key}": self._steps for name, of in self._products.items() for key in of}

    def shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Which tensors there must be, of which dtype and shape. Raises ValueError for wide zero points of nothing."""
        parts = [part for layer in self._layers.values() for part in layer.parts]
        affines = self._affines()
        if set(self._wide) - affines.keys() or len(set(self._wide)) < len(self._wide):
            unknown = [path for path in self._wide if path not in affines] or self._wide
            raise ValueError(f"quantization.wide: found {short(unknown)}, expected weights and tables, each once")
        scales, wide = sum(affines.values()), sum(affines[path] for path in self._wide)
        sizes = {
            "codes": sum(packed_bytes(math.prod(part.shape), part.weight_bits) for part in parts),
            "scale": scales,
            "zero": scales - wide,
            "zero_wide": wide,
            "bias": sum(layer.parts[0].shape[0] for layer in self._layers.values() if layer.bias),
        }
        return {name: (_DTYPES[name], (size,)) for name, size in sizes.items() if size}

    def build(self, tensors: dict[str, torch.Tensor]) -> Quantization:
        """The layers, out of `tensors` with exactly the names, dtypes and shapes of `shapes`."""
        begins, wide = dict.fromkeys(_DTYPES, 0), set(self._wide)

        def take(pool: str, size: int) -> torch.Tensor:
            begins[pool] += size
            return tensors[pool][begins[pool] - size : begins[pool]]

        def affine(path: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
            return take("scale", size), take("zero_wide" if path in wide else "zero", size).to(torch.int16)

        def table(path: str, bits: int) -> StepTable:
            return StepTable(*affine(path, self._steps), bits)

        def weight(path: str, part: _Part) -> WeightCodes:
            codes = take("codes", packed_bytes(math.prod(part.shape), part.weight_bits))
            codes = unpack(codes, part.weight_bits, part.shape)
            return WeightCodes(codes, *affine(path, part.shape[0]), part.weight_bits)

        made: dict[str, QuantizedLayer] = {}
        for name, layer in sorted(self._layers.items()):
            parts = tuple(
                LayerPart(p.begin, p.end, weight(_weight_path(name, i), p), table(_act_path(name, i), p.act_bits))
                for i, p in enumerate(layer.parts)
            )
            bias = take("bias", layer.parts[0].shape[0]) if layer.bias else None
            made[name] = QuantizedLayer(layer.kind, parts, bias)
        products: dict[str, Any] = {}
        for name, of in sorted(self._products.items()):
            products[name] = {key: table(f"{name}.{key}", bits) for key, bits in sorted(of.items())}
        return Quantization(
            config=self._config,
            layers={name: made[name] for name in self._layers},  # in the order of the page, which is the model's
            products={name: {key: products[name][key] for key in of} for name, of in self._products.items()},
            skipped=self._skipped,
            reconstruction=self._reconstruction,
        )


class _Layer:
    def __init__(self, value: Any, path: str) -> None:
        fields = Fields(value, path)
        self.kind: Any = fields.take("kind", "text")
        self.bias: bool = fields.take("bias", "true or false")
        parts = fields.take("parts", "a list")
        if not parts:
            raise ValueError(f"{path}.parts: found none, expected at least one")
        self.parts = [_Part(part, f"{path}.parts[{index}]") for index, part in enumerate(parts)]
        fields.done()


class _Part:
    def __init__(self, value: Any, path: str) -> None:
        fields = Fields(value, path)
        self.begin: int = fields.take("begin", "a whole number")
        self.end: int = fields.take("end", "a whole number")
        self.shape: tuple[int, ...] = tuple(fields.take("shape", "a list of positive whole numbers"))
        self.weight_bits: int = fields.take("weight_bits", "a whole number in 2..8")
        self.act_bits: int = fields.take("act_bits", "a whole number in 2..8")
        if not self.shape:
            raise ValueError(f"{path}.shape: found [], expected output channels, input channels, kernel")
        fields.done()
