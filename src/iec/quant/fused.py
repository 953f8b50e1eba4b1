"""Blocks of diffusers' UNets computed in fewer passes over memory, for kernels that take and give codes (`onednn`).

A resnet block becomes: norm + SiLU + rounding in one pass, an integer convolution, the same again with the time embedding folded
into the norm, and a second convolution that adds itself onto the shortcut. An up block does not copy its concatenations together.
An upsampler rounds before it enlarges, which is the same (nearest neighbour) and touches a quarter of the memory. Attention over
a picture rounds its norm's output once for query, key and value. The last norm, SiLU and convolution become one.

The numbers are those of the separate layers up to float rounding, which may turn a code that lies between two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iec.artifact.calibration import Product
from iec.patch import Around
from iec.quant.attention import QuantizedProducts, RoundedProduct
from iec.quant.kernels.onednn import OnednnLayer
from iec.quant.kernels.passes import norm_silu_quantize, quantize

Step = Callable[[], int]


def fused_forwards(model: nn.Module, ops: dict[str, Any], step: Step) -> dict[nn.Module, Around]:
    """The blocks of `model` that can be fused, each with what stands in for its forward.

    Args:
        ops: the quantized layers by name; those of another kernel are not fused.
        step: gives the present step.
    """
    found: dict[nn.Module, Around] = _ending(model, ops.get("conv_out"), step)
    names = {module: name for name, module in model.named_modules()}
    resnets: dict[nn.Module, list[OnednnLayer]] = {}
    for module in model.modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D" and _plain_resnet(module):
            layers = [
                ops.get(names[part]) for part in (module.conv1, module.conv2, module.conv_shortcut) if part is not None
            ]
            if all(isinstance(layer, OnednnLayer) for layer in layers):
                resnets[module] = layers
                found[module] = functools.partial(_resnet, module, layers, step)
        elif kind == "Upsample2D" and _plain_upsample(module):
            layer = ops.get(names[module.conv])
            if isinstance(layer, OnednnLayer):
                found[module] = functools.partial(_upsample, module, layer, step)
    for module in model.modules() if resnets else ():
        known = type(module).__name__ in ("UpBlock2D", "AttnUpBlock2D")
        if known and getattr(module, "upsample_type", "conv") == "conv":
            found[module] = functools.partial(_up_block, module, resnets)
    return found


class Concatenated(NamedTuple):
    """Two images whose channels belong behind each other: what an up block gives a fused resnet, not copied together."""

    below: Tensor
    skip: Tensor


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
    if not isinstance(x, Concatenated) and not _fusable(x, block):
        return forward(*args, **kwargs)
    now = step()
    conv1, conv2, *shortcut = layers
    shift = None
    if block.time_emb_proj is not None and temb is not None:
        shift = block.time_emb_proj(F.silu(temb))
    hidden = conv1.from_codes(_normed(block.norm1, conv1, x, now), now)
    codes = _normed(block.norm2, conv2, hidden, now, shift)
    if shortcut:
        out = conv2.from_codes(codes, now, accumulate=_shortcut(shortcut[0], x, now))
    else:
        out = conv2.from_codes(codes, now).add_(x)
    return out if block.output_scale_factor == 1.0 else out.div_(block.output_scale_factor)


def _shortcut(layer: OnednnLayer, x: Tensor | Concatenated, step: int) -> Tensor:
    """A convolution whose input may be in two parts, which are rounded where they lie."""
    if not isinstance(x, Concatenated):
        return layer(x, step)
    codes = [
        quantize(source, 1, [(0, end - begin, *quantizer)], layer.border)[0]
        for source, (begin, end, *quantizer) in zip(x, layer.spans(step), strict=True)
    ]
    return layer.from_codes(tuple(codes), step)


def _normed(
    norm: nn.GroupNorm, conv: OnednnLayer, x: Tensor | Concatenated, step: int, shift: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Codes of silu(norm(x + shift)) for `conv`."""
    spans = conv.spans(step)
    return norm_silu_quantize(x, norm.num_groups, norm.weight, norm.bias, norm.eps, spans, shift, border=conv.border)


def _up_block(
    block: Any, layers: dict[nn.Module, list[OnednnLayer]], forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """UpBlock2D and AttnUpBlock2D without the concatenations, where a resnet can do without."""
    names = ("hidden_states", "res_hidden_states_tuple", "temb", "upsample_size")
    given = dict(zip(names, args, strict=False)) | kwargs
    freeu = any(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2"))
    if set(given) - set(names) or freeu or not _plain(given["hidden_states"]):
        return forward(*args, **kwargs)
    x, skips, temb = given["hidden_states"], list(given["res_hidden_states_tuple"]), given.get("temb")
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    for resnet, attention in zip(block.resnets, attentions, strict=True):
        pair = Concatenated(x, skips.pop())
        x = resnet(pair if _takes(resnet, layers.get(resnet), pair) else torch.cat(pair, 1), temb)
        x = x if attention is None else attention(x)
    for upsampler in block.upsamplers or ():
        x = upsampler(x) if hasattr(block, "attentions") else upsampler(x, given.get("upsample_size"))
    return x


def _takes(resnet: nn.Module, layers: list[OnednnLayer] | None, pair: Concatenated) -> bool:
    """Whether a resnet is fused and quantized in the two parts; a hook on it expects a tensor."""
    if layers is None or len(layers) < 3 or resnet._forward_hooks or resnet._forward_pre_hooks:
        return False
    widths = [image.shape[1] for image in pair]
    if not _fusable(pair.below, resnet):
        return False
    return all([part.end - part.begin for part in layer.parts] == widths for layer in (layers[0], layers[2]))


def _upsample(
    block: nn.Module, layer: OnednnLayer, step: Step, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    x = args[0] if args else kwargs["hidden_states"]
    size = args[1] if len(args) > 1 else kwargs.get("output_size")
    if not _fusable(x, block):
        return forward(*args, **kwargs)
    now = step()
    scale = {"scale_factor": 2.0} if size is None else {"size": size}
    codes = (F.interpolate(part, mode="nearest", **scale) for part in quantize(x, 1, layer.spans(now)))
    return layer.from_codes(layer.with_border(codes, now), now)


def _ending(model: Any, layer: Any, step: Step) -> dict[nn.Module, Around]:
    """conv_norm_out, conv_act and conv_out of a UNet: the first two pass on what they get, and the third does it all."""
    norm, act = getattr(model, "conv_norm_out", None), getattr(model, "conv_act", None)
    if not (isinstance(layer, OnednnLayer) and isinstance(norm, nn.GroupNorm) and isinstance(act, nn.SiLU)):
        return {}
    ends = nn.ModuleList([norm, act, model.conv_out])

    def passed(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return args[0] if _fusable(args[0], ends) else forward(*args, **kwargs)

    def ended(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if not _fusable(args[0], ends):
            return forward(*args, **kwargs)
        return layer.from_codes(_normed(norm, layer, args[0], step()), step())

    return {norm: passed, act: passed, model.conv_out: ended}


def _plain(x: Tensor) -> bool:
    return x.dtype == torch.float32 and not torch.is_grad_enabled()


def _fusable(x: Tensor, block: nn.Module) -> bool:
    """Whether to fuse: float32, no gradients, and no hook on a module inside that would miss its call."""
    return _plain(x) and not any(
        part._forward_hooks or part._forward_pre_hooks for part in block.modules() if part is not block
    )


class FusedAttention:
    """A processor for the self-attention of a picture's pixels: `QuantizedProducts` with integer layers, in fewer passes.

    What it does not know (text, masks, other norms) goes to `general`.
    """

    def __init__(
        self,
        layers: dict[str, OnednnLayer],
        products: dict[Product, RoundedProduct],
        step: Step,
        general: QuantizedProducts,
    ) -> None:
        self.layers, self.products, self.step, self.general = layers, products, step, general

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        simple = encoder_hidden_states is None and attention_mask is None and hidden_states.dim() == 4
        if not (simple and _fusable(hidden_states, attn) and isinstance(attn.group_norm, nn.GroupNorm)):
            return self.general(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        x, now = hidden_states, self.step()
        count, channels, height, width = x.shape
        query, key, value = (self.layers[name] for name in ("to_q", "to_k", "to_v"))
        codes = self._tokens(attn.group_norm, query, x, now)
        same = all(layer.spans(now) == query.spans(now) for layer in (key, value))
        q, k, v = (
            layer.from_codes(codes if same else self._tokens(attn.group_norm, layer, x, now), now)
            for layer in (query, key, value)
        )
        (q, q_scale), (k, k_scale), (v, v_scale) = (
            self.products[name].integers_(tensor, now) for name, tensor in (("query", q), ("key", k), ("value", v))
        )
        q, k, v = (tensor.view(count, -1, attn.heads, channels // attn.heads).transpose(1, 2) for tensor in (q, k, v))
        scores = (q @ k.transpose(-1, -2)).mul_(q_scale * k_scale * attn.scale)
        probs, scale = self.products["probs"].integers_(torch.softmax(scores, dim=-1), now)
        mixed = (probs @ v).transpose(1, 2).reshape(count, -1, channels).mul_(scale * v_scale)
        out = self.layers["to_out.0"](mixed, now).view(count, height, width, channels).permute(0, 3, 1, 2)
        if attn.residual_connection:
            out.add_(x)
        return out if attn.rescale_output_factor == 1.0 else out.div_(attn.rescale_output_factor)

    def _tokens(self, norm: nn.GroupNorm, layer: OnednnLayer, x: Tensor, step: int) -> tuple[Tensor, ...]:
        """Codes (N, pixels, C) of norm(x) for a linear layer."""
        (codes,) = norm_silu_quantize(
            x, norm.num_groups, norm.weight, norm.bias, norm.eps, layer.spans(step), silu=False
        )
        return (codes.permute(0, 2, 3, 1).flatten(1, 2),)


def attention_processor(
    attn: Any, name: str, ops: dict[str, Any], products: dict[Product, RoundedProduct], step: Step
) -> QuantizedProducts | FusedAttention:
    """The processor for the attention module `name` with the quantized layers `ops` of the model."""
    general = QuantizedProducts({key: functools.partial(_rounded, product, step) for key, product in products.items()})
    layers = {part: ops.get(f"{name}.{part}") for part in ("to_q", "to_k", "to_v", "to_out.0")}
    known = attn.spatial_norm is None and attn.norm_q is None and attn.norm_k is None and attn.to_out[1].p == 0.0
    if not (known and all(isinstance(layer, OnednnLayer) and len(layer.parts) == 1 for layer in layers.values())):
        return general
    return FusedAttention(layers, products, step, general)  # pyright: ignore[reportArgumentType]


def _rounded(product: RoundedProduct, step: Step, x: Tensor) -> Tensor:
    return product(x, step())
