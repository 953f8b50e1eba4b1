"""Blocks of diffusers' UNets computed in fewer passes over memory, for kernels that take and give codes (`onednn`).

A resnet block becomes: norm + SiLU + rounding in one pass, an integer convolution, the same again with the time embedding folded
into the norm, and a second convolution that adds itself onto the shortcut. An upsampler rounds before it enlarges, which is the
same (nearest neighbour) and touches a quarter of the memory. The numbers are those of the separate layers up to float rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iec.patch import Around
from iec.quant.kernels.onednn import OnednnLayer
from iec.quant.kernels.passes import norm_silu_quantize

Step = Callable[[], int]


def fused_forwards(model: nn.Module, ops: dict[str, Any], step: Step) -> dict[nn.Module, Around]:
    """The blocks of `model` that can be fused, each with what stands in for its forward.

    Args:
        ops: the quantized layers by name; those of another kernel are not fused.
        step: gives the present step.
    """
    found: dict[nn.Module, Around] = {}
    names = {module: name for name, module in model.named_modules()}
    for module in model.modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D" and _plain_resnet(module):
            layers = [
                ops.get(names[part]) for part in (module.conv1, module.conv2, module.conv_shortcut) if part is not None
            ]
            if all(isinstance(layer, OnednnLayer) for layer in layers):
                found[module] = functools.partial(_resnet, module, layers, step)
        elif kind == "Upsample2D" and _plain_upsample(module):
            layer = ops.get(names[module.conv])
            if isinstance(layer, OnednnLayer):
                found[module] = functools.partial(_upsample, layer, step)
    return found


def _plain_resnet(block: Any) -> bool:
    return (
        block.time_embedding_norm == "default"
        and block.upsample is None
        and block.downsample is None
        and isinstance(block.nonlinearity, nn.SiLU)
        and all(isinstance(norm, nn.GroupNorm) for norm in (block.norm1, block.norm2))
        and block.dropout.p == 0.0
        and not block.skip_time_act
    )


def _plain_upsample(block: Any) -> bool:
    plain = block.norm is None and block.use_conv and not block.use_conv_transpose and block.interpolate
    return plain and block.name == "conv"


def _resnet(
    block: Any, layers: list[OnednnLayer], step: Step, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    x = args[0] if args else kwargs["input_tensor"]
    temb = args[1] if len(args) > 1 else kwargs.get("temb")
    if x.dtype != torch.float32 or torch.is_grad_enabled():
        return forward(*args, **kwargs)
    now = step()
    conv1, conv2, *shortcut = layers
    shift = None
    if block.time_emb_proj is not None and temb is not None:
        shift = block.time_emb_proj(F.silu(temb))
    hidden = conv1.from_codes(_normed(block.norm1, conv1, x, now), now)
    codes = _normed(block.norm2, conv2, hidden, now, shift)
    if shortcut:
        out = conv2.from_codes(codes, now, accumulate=shortcut[0](x, now))
    else:
        out = conv2.from_codes(codes, now).add_(x)
    return out if block.output_scale_factor == 1.0 else out.div_(block.output_scale_factor)


def _normed(
    norm: nn.GroupNorm, conv: OnednnLayer, x: Tensor, step: int, shift: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Codes of silu(norm(x + shift)) for `conv`."""
    return norm_silu_quantize(x, norm.num_groups, norm.weight, norm.bias, norm.eps, conv.spans(step), shift)


def _upsample(layer: OnednnLayer, step: Step, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x = args[0] if args else kwargs["hidden_states"]
    size = args[1] if len(args) > 1 else kwargs.get("output_size")
    if x.dtype != torch.float32 or torch.is_grad_enabled():
        return forward(*args, **kwargs)
    now = step()
    scale = {"scale_factor": 2.0} if size is None else {"size": size}
    codes = (F.interpolate(part, mode="nearest", **scale) for part in layer.quantize(x, now))
    return layer.from_codes(tuple(part.contiguous(memory_format=torch.channels_last) for part in codes), now)
