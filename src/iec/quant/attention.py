"""Attention whose two products have quantized operands: query, key, probabilities and value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from iec.artifact.calibration import Product, StepTable

PRODUCTS: tuple[Product, ...] = ("query", "key", "probs", "value")
# Processors whose attention is the one below; others keep their products in floating point.
PLAIN = ("AttnProcessor", "AttnProcessor2_0")


def why_not_products(module: nn.Module) -> str | None:
    """None: the products of this attention can be quantized. "": it is no attention. Else why they cannot be."""
    processor = getattr(module, "processor", None)
    if processor is None or not hasattr(module, "to_q"):
        return ""
    name = type(processor).__name__
    if type(module).__name__ != "Attention" or name not in PLAIN:
        return f"its attention is computed by {name}, whose products stay in floating point; known: {', '.join(PLAIN)}"
    if getattr(module, "added_kv_proj_dim", None) is not None:
        return "attention with added key and value projections keeps its products in floating point"
    return None


class QuantizedProducts:
    """A processor for diffusers' `Attention`: softmax(q̂ k̂ᵀ / √d) rounded, times v̂; `quantize[name]` rounds each operand.

    Tensors have the batch first, (B, heads, tokens, channels) or, for the probabilities, (B, heads, tokens, tokens). Scales
    factor out of the search, so it makes no difference that q and k are rounded before the division by √d (METHOD 5).
    """

    def __init__(self, quantize: dict[Product, Callable[[Tensor], Tensor]]) -> None:
        self.quantize = quantize

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        batch, length = context.shape[:2]
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])

        query, key, value = (
            layer(source).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, source in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        scores = self.quantize["query"](query) @ self.quantize["key"](key).transpose(-1, -2) * attn.scale
        if attention_mask is not None:
            scores = scores + attention_mask
        probs = torch.softmax(scores.float() if attn.upcast_softmax else scores, dim=-1).to(scores.dtype)
        mixed = self.quantize["probs"](probs) @ self.quantize["value"](value)

        hidden_states = attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states if attn.rescale_output_factor == 1.0 else hidden_states / attn.rescale_output_factor


class RoundedProduct:
    """Rounds an operand of an attention product at a step; the product itself is computed in floating point."""

    def __init__(self, table: StepTable) -> None:
        self.scales, self.zeros = table.scale.tolist(), table.zero.tolist()
        self.top = 2**table.bits - 1

    def __call__(self, x: Tensor, step: int) -> Tensor:
        """`x` rounded, in its dtype: `iec.core.affine.fake_quantize`."""
        codes, scale = self.integers_(x.to(torch.float32, copy=True), step)
        return codes.mul_(scale).to(x.dtype)

    def integers_(self, x: Tensor, step: int) -> tuple[Tensor, float]:
        """Turn float32 `x`, in place, into q − z; returned with the scale."""
        scale, zero = self.scales[step], self.zeros[step]
        # The zero point moves into the limits, which is exact, as these are small integers.
        return x.div_(scale).round_().clamp_(-zero, self.top - zero), scale


def replace_processor(attn: Any, processor: Any) -> Callable[[], None]:
    """Give `attn` another processor; returns what puts the one before back, unless someone has changed it since."""
    before = attn.processor
    attn.processor = processor

    def restore() -> None:
        if attn.processor is processor:
            attn.processor = before

    return restore
