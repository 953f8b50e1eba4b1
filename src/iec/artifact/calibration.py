"""A calibration: what was measured and rounded for one model under one schedule, as data and as a folder."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
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
    """Input channels begin:end of a layer: their weight and the quantizer of what comes in there.

    Attributes:
        begin, end: the channels.
        weight: of those channels.
        act: the quantizer of what comes in, per step.
        gain: float32 (T, out), finite, of any sign: what the part gives, before the bias, is multiplied by it (errors
            compensated per step and output channel, METHOD 4.4). None: by 1.
    """

    begin: int
    end: int
    weight: WeightCodes
    act: StepTable
    gain: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """One convolution or linear layer.

    Attributes:
        kind: which module it replaces.
        parts: one, or two for a layer whose input is a concatenation; they tile the input channels.
        bias: float32 (out,), or (T, out) with one for each step; None: the module's own bias (or none) is used.
    """

    kind: Kind
    parts: tuple[LayerPart, ...]
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Origin:
    """What a calibration was made on. Plain data throughout; components are named as in the pipeline ("unet").

    Attributes:
        pipeline: class name of the pipeline.
        denoisers: class name of each denoiser.
        weights: `fingerprint.weights` of each denoiser.
        architecture: `fingerprint.config` of the configuration of each denoiser.
        scheduler: class name of the scheduler.
        scheduler_config: `fingerprint.config` of its configuration.
        num_steps: T, the length of every step table.
        timesteps: what the scheduler hands to the denoiser, from the noisiest on.
        num_samples: how many samples were observed.
        seed: of the first of them.
        versions: of the libraries, by name.
        settings: what else went into the calibration: prompts, guidance, ... Lists rather than tuples, which come back
            from a folder as lists.
    """

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

    def mismatch(self, other: Origin) -> list[str]:
        """A sentence for every difference that makes this calibration one of another model or schedule than `other`'s.

        Compared are denoisers, weights, architecture, scheduler, scheduler_config, num_steps and timesteps (those but
        for float32's rounding); the rest is for the record. Empty: the calibration fits.
        """
        return [
            *_by_component("class", self.denoisers, other.denoisers, digest=False),
            *_by_component("weights", self.weights, other.weights),
            *_by_component("architecture", self.architecture, other.architecture),
            *_differs("scheduler", self.scheduler, other.scheduler),
            *_differs("scheduler_config", _sha256(self.scheduler_config), _sha256(other.scheduler_config)),
            *_differs("num_steps", self.num_steps, other.num_steps),
            *_timesteps(self.timesteps, other.timesteps),
        ]


def _by_component(what: str, ours: dict[str, str], theirs: dict[str, str], digest: bool = True) -> Iterator[str]:
    def told(values: dict[str, str], name: str, absent: str) -> str:
        if name not in values:
            return absent
        return _sha256(values[name]) if digest else values[name]

    for name in dict.fromkeys([*ours, *theirs]):
        if ours.get(name) != theirs.get(name):
            mine, other = told(ours, name, "a pipeline without it"), told(theirs, name, "no such component")
            yield f"{what} of {name}: calibrated on {mine}, found {other}"


def _differs(what: str, ours: str | int, theirs: str | int) -> Iterator[str]:
    if ours != theirs:
        yield f"{what}: calibrated on {ours}, found {theirs}"


def _timesteps(ours: tuple[float, ...], theirs: tuple[float, ...]) -> Iterator[str]:
    if len(ours) != len(theirs):
        yield f"timesteps: calibrated on {len(ours)}, found {len(theirs)}"
        return
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if not math.isclose(mine, other, rel_tol=1e-6, abs_tol=1e-6):
            yield f"timesteps: calibrated on {mine} at step {step}, found {other}"
            return


def _sha256(digest: str) -> str:
    return f"sha256 {digest[:12]}…"


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
class CacheTables:
    """The cache of one denoiser: at which steps the whole model runs, and how the feature is corrected where it is reused.

    Attributes:
        component: which denoiser ("unet").
        config: plain data of the CacheQuant.
        branch: where it is cut.
        refresh: the steps of whole passes, ascending from 0.
        gain: float32 (T, C), of the C channels of the feature: gain · feature + offset is put back at a reuse step. 1 at whole
            passes.
        offset: float32 (T, C). 0 at whole passes.
    """

    component: str
    config: dict[str, Any]
    branch: int
    refresh: tuple[int, ...]
    gain: torch.Tensor
    offset: torch.Tensor


@dataclass(frozen=True, eq=False)
class Calibration:
    """An `Origin` and what was calibrated on it; in memory, and as a folder.

    Attributes:
        origin: the model and the schedule, and how they were sampled.
        quant: the quantized layers; None where nothing was quantized.
        cache: the feature cache; None without one.
    """

    origin: Origin
    quant: Quantization | None = None
    cache: CacheTables | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the quantized weights: packed codes, and 4 + 2 for scale and zero point of each output channel.

        A folder takes one less for zero points that fit a byte, and has step tables, gains, biases and the page besides.
        """
        return sum(packed_bytes(w.codes.numel(), w.bits) + 6 * w.codes.shape[0] for w in self._weights())

    @property
    def float_bytes(self) -> int:
        """Bytes of the same weights in float32."""
        return sum(4 * weight.codes.numel() for weight in self._weights())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `calibration.json` and a file of tensors into `folder`, which is made if need be.

        Atomic: killed at any moment, it leaves the calibration that was there, or the new one. Replaces a calibration
        in the folder and leaves other files alone.

        Raises ValueError, naming the field, for numbers that no kernel can work with and for plain data that JSON
        cannot hold; also for a folder whose `calibration.json` is something else. TypeError for what is no plain data.
        """
        from iec.artifact import folder as files

        files.save(self, folder)

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote, bit for bit, its tensors on the CPU.

        Raises ValueError, naming file and field, when there is no calibration, or one of another version, or one that
        is damaged, incomplete, or changed in any value since it was saved.
        """
        from iec.artifact import folder as files

        return files.load(folder)

    def _weights(self) -> Iterator[WeightCodes]:
        for layer in self.quant.layers.values() if self.quant else ():
            yield from (part.weight for part in layer.parts)


def packed_bytes(values: int, bits: int) -> int:
    """How many bytes that many codes of `bits` bits take: up to 4 bits, two codes share one."""
    return (values + 1) // 2 if bits <= 4 else values
