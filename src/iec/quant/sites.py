"""Which layers of a denoiser are quantized, and how each of them is cut."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from iec.artifact.calibration import Kind
from iec.quant.attention import why_not_products
from iec.quant.config import QuantConfig

KINDS: dict[type[nn.Module], Kind] = {nn.Conv2d: "conv2d", nn.Conv1d: "conv1d", nn.Linear: "linear"}
# The layers that touch the sample itself, by the names of diffusers: UNets, then transformers.
FIRST = ("conv_in", "pos_embed.proj", "x_embedder", "proj_in")
LAST = ("conv_out", "proj_out_2", "proj_out")


@dataclass(frozen=True)
class Site:
    """A layer to quantize: `parts` are ranges of its input channels, one, or two for a split layer; `last`: gives the output."""

    name: str
    module: nn.Module
    kind: Kind
    parts: tuple[tuple[int, int], ...]
    weight_bits: int
    act_bits: int
    last: bool = False


@dataclass(frozen=True)
class Sites:
    """What is quantized in one denoiser: layers, and attention modules whose products are; `skipped`: what is not, and why."""

    layers: tuple[Site, ...]
    attentions: dict[str, nn.Module] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def check_patterns(models: Iterable[nn.Module], config: QuantConfig) -> None:
    """Raise ValueError for a pattern of `config.layers` that names no layer of any of the `models`: a slip of the pen."""
    if callable(config.layers):
        return
    known = [name for model in models for name, module in model.named_modules() if isinstance(module, tuple(KINDS))]
    for pattern in config.layers:
        wanted = pattern.removeprefix("!")
        if not fnmatch.filter(known, wanted):
            near = difflib.get_close_matches(wanted, known, 1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"they are {', '.join(known[:3])}, ..., {', '.join(known[-2:])}"
            )
            raise ValueError(f"layers={config.layers!r}: no layer is named {wanted!r}; {hint}")


def find(model: nn.Module, config: QuantConfig, prefix: str = "unet") -> Sites:
    """The sites of `model`, named "prefix.path.to.layer", in the order of its modules.

    Every convolution and linear layer that `config.layers` takes. Raises TypeError when the model is compiled or has none left.
    """
    _check_uncompiled(model)
    layers: list[Site] = []
    attentions: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    cuts = splits(model) if config.split else {}
    found = {name: module for name, module in model.named_modules() if isinstance(module, tuple(KINDS))}
    first, last = _edges(list(found))
    for name, module in found.items():
        full = f"{prefix}.{name}"
        kind = KINDS.get(type(module))
        if kind is None:
            skipped[full] = (
                f"a {type(module).__module__}.{type(module).__name__}, of which nothing is known but its base class"
            )
        elif not config.chooses(name, module):
            skipped[full] = "excluded by the filter"
        elif type(module.weight.data) is not torch.Tensor or not module.weight.is_floating_point():
            skipped[full] = (
                f"its weight is a {type(module.weight.data).__name__} of {module.weight.dtype}, no plain float tensor"
            )
        else:
            bits = (config.edge_bits,) * 2 if name in (first, last) else (config.weight_bits, config.act_bits)
            layers.append(Site(full, module, kind, _parts(module, cuts.get(name)), *bits, last=name == last))
    if config.products:
        for name, module in model.named_modules():
            reason = why_not_products(module)
            if reason is None:
                attentions[f"{prefix}.{name}"] = module
            elif reason:
                skipped[f"{prefix}.{name} (products)"] = reason
    if not layers:
        raise TypeError(
            f"nothing to quantize in this {type(model).__name__}: {len(found)} convolutions and linear layers, none of them "
            f"taken by layers={config.layers!r}"
        )
    return Sites(tuple(layers), attentions, skipped)


def splits(model: nn.Module) -> dict[str, int]:
    """Names of the convolutions fed by a concatenation with a skip tensor → channels that come before the skip's.

    In the up blocks of diffusers' UNets each resnet concatenates what comes from below with one skip tensor: from below come the
    channels of the resnet before it, whatever lies between.
    """
    found: dict[str, int] = {}
    ups = getattr(model, "up_blocks", None)
    if ups is None:
        return found
    width = _width_below(model)
    for level, block in enumerate(ups):
        for index, resnet in enumerate(getattr(block, "resnets", None) or ()):
            if width is not None and 0 < width < _in_channels(resnet):
                for name in ("conv1", "conv_shortcut"):
                    if getattr(resnet, name, None) is not None:
                        found[f"up_blocks.{level}.resnets.{index}.{name}"] = width
            width = getattr(resnet, "out_channels", None)
    return found


def _width_below(model: Any) -> int | None:
    """Channels that enter the first up block."""
    resnets = getattr(getattr(model, "mid_block", None), "resnets", None)
    if not resnets:
        downs = getattr(model, "down_blocks", None)
        resnets = getattr(downs[-1], "resnets", None) if downs is not None and len(downs) else None
    return getattr(resnets[-1], "out_channels", None) if resnets else None


def _in_channels(resnet: Any) -> int:
    return int(getattr(getattr(resnet, "conv1", None), "in_channels", 0))


def _edges(names: list[str]) -> tuple[str, str]:
    """The first and the last layer: by name where the architecture is known, else by order."""
    first = next((name for name in FIRST if name in names), names[0] if names else "")
    last = next((name for name in LAST if name in names), names[-1] if names else "")
    return first, last


def _parts(module: Any, cut: int | None) -> tuple[tuple[int, int], ...]:
    channels = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    if cut is None or getattr(module, "groups", 1) != 1:
        return ((0, channels),)
    return ((0, cut), (cut, channels))


def _check_uncompiled(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod") or any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
        raise TypeError(
            f"this {type(model).__name__} was compiled, so its layers cannot be replaced; quantize first, then compile, or "
            "assign the original (._orig_mod)"
        )
