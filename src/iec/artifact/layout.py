"""Quantized layers as a page of plain data and six flat tensors.

A tensor of its own for every scale and zero would cost more in headers than in values. So there is one tensor per sort
of value, over all layers: parts in the order of the sorted layer names, each weight before its step table; then products
in the order of the sorted attention modules and of their operands. Which stretch is whose follows from the plain data.

Nearly all zero points are codes themselves and take a byte; weights and tables with others are listed as wide.

Few parts have gains and few layers a bias per step; these are listed too. Pages of version 1 are without the two lists.
"""

from __future__ import annotations

import math
from collections.abc import Collection
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
    "gain": torch.float32,  # of parts (steps · output channels,)
    "bias": torch.float32,  # of layers (output channels,) or (steps · output channels,)
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
            if part.gain is not None:
                put("gain", part.gain)
        if layer.bias is not None:
            put("bias", layer.bias)
    for name, tables in sorted(quant.products.items()):
        for key, table in sorted(tables.items()):
            put_affine(table, f"{name}.{key}")
    tensors = {name: torch.cat(pool) for name, pool in pools.items() if sum(map(len, pool))}
    return {**_plain(quant), "wide": wide}, tensors


def _part_path(name: str, index: int) -> str:
    return f"{name}.parts[{index}]"


def _weight_path(name: str, index: int) -> str:
    return f"{_part_path(name, index)}.weight"


def _act_path(name: str, index: int) -> str:
    return f"{_part_path(name, index)}.act"


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
        "gains": [
            _part_path(name, index)
            for name, layer in quant.layers.items()
            for index, part in enumerate(layer.parts)
            if part.gain is not None
        ],
        "biases_per_step": [n for n, layer in quant.layers.items() if layer.bias is not None and layer.bias.dim() == 2],
    }
    return {key: plain(value, f"quantization.{key}") for key, value in page.items()}


class Page:
    """The plain data of quantized layers, read with checks: what tensors belong to it, and the layers made of them."""

    def __init__(self, value: Any, steps: int, version: int) -> None:
        """Read `value`, of that version, whose tables have `steps` entries. Raises ValueError naming the field."""
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
        self._gains: list[str] = fields.take("gains", "a list of texts") if version > 1 else []
        self._per_step: list[str] = fields.take("biases_per_step", "a list of texts") if version > 1 else []
        fields.done()

    def _affines(self) -> dict[str, int]:
        """Of every weight and every table, by path, how many scales and zero points it has."""
        sizes: dict[str, int] = {}
        for name, layer in self._layers.items():
            for index, part in enumerate(layer.parts):
                sizes |= {_weight_path(name, index): part.shape[0], _act_path(name, index): self._steps}
        return sizes | {f"{name}.{key}": self._steps for name, of in self._products.items() for key in of}

    def shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Which tensors there must be, of which dtype and shape.

        Raises ValueError for wide zero points, gains and biases of nothing.
        """
        named = {_part_path(n, i): part for n, layer in self._layers.items() for i, part in enumerate(layer.parts)}
        parts, affines = list(named.values()), self._affines()
        own = {name for name, layer in self._layers.items() if layer.bias}
        _each_once("wide", self._wide, affines, "weights and tables")
        _each_once("gains", self._gains, named, "parts of layers")
        _each_once("biases_per_step", self._per_step, own, "layers with a bias")
        scales, wide = sum(affines.values()), sum(affines[path] for path in self._wide)
        sizes = {
            "codes": sum(packed_bytes(math.prod(part.shape), part.weight_bits) for part in parts),
            "scale": scales,
            "zero": scales - wide,
            "zero_wide": wide,
            "gain": sum(self._steps * named[path].shape[0] for path in self._gains),
            "bias": sum(math.prod(self._bias_shape(name)) for name in own),
        }
        return {name: (_DTYPES[name], (size,)) for name, size in sizes.items() if size}

    def _bias_shape(self, name: str) -> tuple[int, ...]:
        outputs = self._layers[name].parts[0].shape[0]
        return (self._steps, outputs) if name in self._per_step else (outputs,)

    def build(self, tensors: dict[str, torch.Tensor]) -> Quantization:
        """The layers, out of `tensors` with exactly the names, dtypes and shapes of `shapes`."""
        begins, wide, gains = dict.fromkeys(_DTYPES, 0), set(self._wide), set(self._gains)

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

        def floats(pool: str, shape: tuple[int, ...]) -> torch.Tensor:
            return take(pool, math.prod(shape)).view(shape)

        def part(name: str, index: int, of: _Part) -> LayerPart:
            of_weight, of_act = weight(_weight_path(name, index), of), table(_act_path(name, index), of.act_bits)
            gain = floats("gain", (self._steps, of.shape[0])) if _part_path(name, index) in gains else None
            return LayerPart(of.begin, of.end, of_weight, of_act, gain)

        made: dict[str, QuantizedLayer] = {}
        for name, layer in sorted(self._layers.items()):
            parts = tuple(part(name, index, of) for index, of in enumerate(layer.parts))
            bias = floats("bias", self._bias_shape(name)) if layer.bias else None
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


def _each_once(field: str, listed: list[str], known: Collection[str], what: str) -> None:
    unknown = [path for path in listed if path not in known]
    if unknown or len(set(listed)) < len(listed):
        raise ValueError(f"quantization.{field}: found {short(unknown or listed)}, expected {what}, each once")


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
