"""Stand-ins for the paper's models: the same architecture with few channels and random weights.

They let a recipe for a large model run through, on any machine, in minutes: its tables, caches, quantizers, guidance and
conditions. What they draw is noise, and what their tables say of quality is nothing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

LATENT: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
WORDS = ("<|startoftext|>", "<|endoftext|>", "a</w>", "photo</w>", "of</w>", "the</w>")


def build(model: str, *, seed: int = 0, sample_size: int | None = None) -> Any:
    """A diffusers pipeline in the place of one of `names()`.

    Args:
        model: its name.
        seed: of its weights.
        sample_size: side of what the denoiser sees, a multiple of 16; None: that of the model.

    Raises ValueError for an unknown name or a size that its levels cannot halve.
    """
    if model not in _MODELS:
        raise ValueError(f"no stand-in {model!r}; known are {', '.join(_MODELS)}")
    maker, usual = _MODELS[model]
    size = usual if sample_size is None else sample_size
    if size < 16 or size % 16:
        raise ValueError(f"stand-in {model!r}: sample_size is {size}, expected a multiple of 16")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = maker(size)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def names() -> tuple[str, ...]:
    """The models that `build` knows."""
    return tuple(_MODELS)


def _ddpm(size: int) -> Any:
    """CIFAR-10: four levels, attention on the second, 32 × 32 pixels."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=size,
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        attention_head_dim=None,
        norm_num_groups=8,
        norm_eps=1e-6,
    )
    return DDPMPipeline(_lively(unet), DDPMScheduler(beta_start=1e-4, beta_end=0.02))


def _church(size: int) -> Any:
    """LSUN churches, LDM-8: five levels, attention on all but the last, scale-shift norms, a KL autoencoder by 8."""
    from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel

    unet = UNet2DModel(
        sample_size=size,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 16, 32, 32, 32),
        down_block_types=(*("AttnDownBlock2D",) * 4, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("AttnUpBlock2D",) * 4),
        layers_per_block=2,
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=8,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0155, **LATENT)
    return LDMPipeline(AutoencoderKL(**_autoencoder(4, size * 8)), _lively(unet), scheduler)


def _bedroom(size: int) -> Any:
    """LSUN bedrooms, LDM-4: four levels, attention on all but the first, a VQ autoencoder by 4."""
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel

    unet = UNet2DModel(
        sample_size=size,
        block_out_channels=(16, 32, 48, 64),
        down_block_types=("DownBlock2D", *("AttnDownBlock2D",) * 3),
        up_block_types=(*("AttnUpBlock2D",) * 3, "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0195, **LATENT)
    return LDMPipeline(VQModel(**_quantizing(size * 4)), _lively(unet), scheduler)


def _imagenet(size: int) -> Any:
    """ImageNet, LDM-4: four levels, the class by cross-attention on all but the first, a VQ autoencoder by 4."""
    from diffusers import DDIMScheduler, UNet2DConditionModel, VQModel

    from iec.pipeline.conditional import ClassConditionalLatentPipeline, ClassEmbedder

    unet = UNet2DConditionModel(
        sample_size=size,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32, 48, 80),
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=1,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0195, **LATENT)
    return ClassConditionalLatentPipeline(
        VQModel(**_quantizing(size * 4)), _lively(unet), ClassEmbedder(1000, 32), scheduler
    )


def _stable_diffusion(size: int) -> Any:
    """Stable Diffusion v1.4: four levels, the text by cross-attention on all but the last, PLMS, a KL autoencoder by 8."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel(
        sample_size=size,
        block_out_channels=(16, 32, 48, 48),
        layers_per_block=2,
        attention_head_dim=4,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    text = CLIPTextConfig(
        vocab_size=len(WORDS) + 256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**_autoencoder(4, size * 8)),
        text_encoder=CLIPTextModel(text),
        tokenizer=_tokenizer(),
        unet=_lively(unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _autoencoder(channels: int, pixels: int) -> dict[str, Any]:
    """A KL autoencoder that takes an eighth of the side."""
    return {
        "sample_size": pixels,
        "latent_channels": channels,
        "block_out_channels": (8,) * 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 4,
    }


def _quantizing(pixels: int) -> dict[str, Any]:
    """A VQ autoencoder that takes a quarter of the side."""
    return {
        "sample_size": pixels,
        "latent_channels": 3,
        "vq_embed_dim": 3,
        "num_vq_embeddings": 64,
        "block_out_channels": (8,) * 3,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
    }


def _tokenizer() -> Any:
    """CLIP's tokenizer with a few words, all else in bytes."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789.,'-")
    words = [*WORDS, *letters, *(f"{letter}</w>" for letter in letters)]
    merges = [f"{a} {b}" for a, b in (("a", "t"), ("o", "f</w>"))]
    words += ["at", "of</w>"] if "of</w>" not in words else ["at"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def _lively(unet: nn.Module) -> nn.Module:
    """Give weights that begin at zero random values, so that the output depends on all of the input."""
    for parameter in unet.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return unet


_MODELS: dict[str, tuple[Callable[[int], Any], int]] = {
    "ddpm-cifar10": (_ddpm, 32),
    "ldm8-church": (_church, 32),
    "ldm4-bedroom": (_bedroom, 64),
    "ldm4-imagenet": (_imagenet, 64),
    "stable-diffusion-v1-4": (_stable_diffusion, 64),
}
