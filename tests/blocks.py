"""Small transformers of the classes that block caching knows, with random weights, and inputs for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

import tiny

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8}


def image(seed: int) -> Tensor:
    return tiny.noise(2, 4, 8, 8, seed=seed)


def tokens(seed: int) -> Tensor:
    return tiny.noise(2, 16, 4, seed=seed)


def video(seed: int) -> Tensor:
    return tiny.noise(2, 4, 1, 8, 8, seed=seed)


TEXT = tiny.noise(2, 5, 16, seed=3)
POOLED = tiny.noise(2, 16, seed=4)
MASK = torch.ones(2, 5)
TIME = torch.tensor([400.0, 400.0])
IDS: dict[str, Any] = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}


def dit() -> Any:
    model = diffusers.DiTTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        norm_num_groups=4,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    return model, image, {"timestep": TIME.long(), "class_labels": torch.tensor([3, 7])}


def pixart() -> Any:
    model = diffusers.PixArtTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        norm_num_groups=4,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
        use_additional_conditions=False,
    )
    return model, image, {"timestep": TIME, "encoder_hidden_states": TEXT, "encoder_attention_mask": MASK}


def sana() -> Any:
    model = diffusers.SanaTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    return model, image, {"timestep": TIME, "encoder_hidden_states": TEXT, "encoder_attention_mask": MASK}


def wan() -> Any:
    model = diffusers.WanTransformer3DModel(
        **HEADS,
        patch_size=(1, 2, 2),
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=4,
        rope_max_seq_len=32,
    )
    return model, video, {"timestep": TIME, "encoder_hidden_states": TEXT}


def ltx() -> Any:
    model = diffusers.LTXVideoTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, cross_attention_dim=16, num_layers=4, caption_channels=16
    )
    given = {"timestep": TIME, "encoder_hidden_states": TEXT, "encoder_attention_mask": MASK}
    return model, tokens, {**given, "num_frames": 1, "height": 4, "width": 4}


def sd3() -> Any:
    model = diffusers.SD3Transformer2DModel(
        **HEADS,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
    )
    return model, image, {"timestep": TIME, "encoder_hidden_states": TEXT, "pooled_projections": POOLED}


def flux() -> Any:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    given = {"timestep": TIME / 1000, "encoder_hidden_states": TEXT, "pooled_projections": POOLED}
    return model, tokens, {**given, **IDS}


def chroma() -> Any:
    model = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return model, tokens, {"timestep": TIME / 1000, "encoder_hidden_states": TEXT, **IDS}


def auraflow() -> Any:
    model = diffusers.AuraFlowTransformer2DModel(
        **HEADS,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=3,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pos_embed_max_size=64,
    )
    return model, image, {"timestep": TIME / 1000, "encoder_hidden_states": TEXT}


def qwen() -> Any:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=1,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    given = {"timestep": TIME / 1000, "encoder_hidden_states": TEXT, "encoder_hidden_states_mask": MASK.long()}
    if "txt_seq_lens" in inspect.signature(model.forward).parameters:  # which later diffusers read off the mask
        given["txt_seq_lens"] = [TEXT.shape[1]] * 2
    return model, tokens, {**given, "img_shapes": [[(1, 4, 4)]] * 2}


def cogview4() -> Any:
    model = diffusers.CogView4Transformer2DModel(
        **HEADS,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=4,
        rope_axes_dim=(8, 8),
    )
    size = torch.tensor([[16.0, 16.0]] * 2)
    given = {"original_size": size, "target_size": size, "crop_coords": torch.zeros(2, 2)}
    return model, image, {"timestep": TIME, "encoder_hidden_states": TEXT, **given}


def cogvideox() -> Any:
    model = diffusers.CogVideoXTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=4,
        sample_width=8,
        sample_height=8,
        sample_frames=1,
        patch_size=2,
        max_text_seq_length=5,
    )
    return (
        model,
        lambda seed: video(seed).transpose(1, 2).contiguous(),
        {"timestep": TIME, "encoder_hidden_states": TEXT},
    )


def hunyuan() -> Any:
    model = diffusers.HunyuanVideoTransformer3DModel(
        **HEADS | {"attention_head_dim": 16},
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=False,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 4, 8),
    )
    given = {"encoder_hidden_states": TEXT, "encoder_attention_mask": MASK, "pooled_projections": POOLED}
    return model, video, {"timestep": TIME, **given}


MODELS: dict[str, Callable[[], Any]] = {
    made.__name__: made
    for made in (
        dit,
        pixart,
        sana,
        wan,
        ltx,
        sd3,
        flux,
        chroma,
        auraflow,
        qwen,
        cogview4,
        cogvideox,
        hunyuan,
    )
}


def build(name: str) -> tuple[Any, Callable[[int], Tensor], dict[str, Any]]:
    """A model, a function that makes an input from a seed, and the other arguments of a call."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model, make, others = MODELS[name]()
        for parameter in model.parameters():  # tables of modulation are drawn so small that blocks would do nothing
            if parameter.dim() > 1 and parameter.std() < 0.05:
                torch.nn.init.normal_(parameter, std=0.2)
        return tiny._lively(model), make, others
