"""A calibration: what was measured and rounded for one model under one schedule, as data and as a folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Kind = Literal["conv2d", "conv1d", "linear"]
Product = Literal["query", "key", "probs", "value"]


@dataclass(frozen=True, eq=False)
class WeightCodes:
    """A weight as unsigned integers: weight[o] ~ (codes[o] - zero[o]) * scale[o].

    Attributes:
        codes: uint8 (out, in/groups, *kernel), each 0..2**bits-1, unpacked.
        scale: float32 (out,), positive.
        zero: int16 (out,).
        bits: 2..8.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: int


@dataclass(frozen=True, eq=False)
class StepTable:
    """The quantizer of one activation, for every step t: x ~ (q - zero[t]) * scale[t] with q in 0..2**bits-1.

    Attributes:
        scale: float32 (T,), positive.
        zero: int16 (T,).
        bits: 2..8.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    bits: int


@dataclass(frozen=True, eq=False)
class LayerPart:
    """Input channels begin:end of a layer: their weight and the quantizer of what comes in there."""

    begin: int
    end: int
    weight: WeightCodes
    act: StepTable


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """One convolution or linear layer.

    Attributes:
        kind: which module it replaces.
        parts: one, or two for a layer whose input is a concatenation; they tile the input channels.
        bias: float32 (out,) where reconstruction changed it; None: the module's own bias (or none) is used.
    """

    kind: Kind
    parts: tuple[LayerPart, ...]
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Origin:
    """What a calibration was made on. Components are named as in the pipeline ("unet")."""

    pipeline: str
    denoisers: dict[str, str]
    weights: dict[str, str]
    architecture: dict[str, str]
    scheduler: str
    scheduler_config: str
    num_steps: int
    timesteps: tuple[float, ...]
    num_samples: int
    seed: int
    versions: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Quantization:
    """The quantized layers and attention products of a model.

    Attributes:
        config: plain data of the QuantConfig.
        layers: by module name, prefixed by the component: "unet.down_blocks.0.resnets.0.conv1".
        products: by name of the attention module, the quantizers of the operands of its two products.
        skipped: layers that stay in floating point, with the reason.
        reconstruction: plain data of what block reconstruction did; None without it.
    """

    config: dict[str, Any]
    layers: dict[str, QuantizedLayer]
    products: dict[str, dict[Product, StepTable]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    reconstruction: dict[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Calibration:
    """An `Origin` and what was calibrated on it."""

    origin: Origin
    quant: Quantization | None = None
