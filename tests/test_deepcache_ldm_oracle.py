"""DeepCache and its compensation against the released code of CacheQuant and IEC for latent diffusion models (METHOD 3.2).

The arrays lie beside the checkout, where it has them: three small models, named after what their settings are those of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import iec
from cached import AtStep

DATA = Path(__file__).parents[2] / "shared" / "oracles" / "o12_ldm_unet.npz"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="the oracles are not here")

COMMON: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
}
UNCONDITIONAL = {
    "in_channels": 3,
    "out_channels": 3,
    "attention_head_dim": 16,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
MODELS: dict[str, Any] = {
    "bedroom": lambda: diffusers.UNet2DModel(
        **COMMON,
        **UNCONDITIONAL,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ),
    "church": lambda: diffusers.UNet2DModel(
        **COMMON,
        **UNCONDITIONAL,
        attn_norm_num_groups=32,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
    ),
    "imagenet": lambda: diffusers.UNet2DConditionModel(
        **COMMON,
        in_channels=3,
        out_channels=3,
        attention_head_dim=1,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ),
}
HEADS = 2  # of bedroom and church, whose query, key and value lie head by head
PLACES = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0": "down_blocks.0.resnets.0",
    "input_blocks.2.0": "down_blocks.0.downsamplers.0",
    "input_blocks.3.0": "down_blocks.1.resnets.0",
    "input_blocks.3.1": "down_blocks.1.attentions.0",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "output_blocks.0.0": "up_blocks.0.resnets.0",
    "output_blocks.0.1": "up_blocks.0.attentions.0",
    "output_blocks.1.0": "up_blocks.0.resnets.1",
    "output_blocks.1.1": "up_blocks.0.attentions.1",
    "output_blocks.1.2": "up_blocks.0.upsamplers.0",
    "output_blocks.2.0": "up_blocks.1.resnets.0",
    "output_blocks.3.0": "up_blocks.1.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
PARTS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "op": "conv",
}
ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}


def released(name: str, arrays: dict[str, Tensor]) -> Any:
    """The authors' `UNetModel` as one of diffusers, from its state dict."""
    model, state = MODELS[name](), {}
    for key, value in arrays.items():
        if not key.startswith("sd::"):
            continue
        path, _, kind = key[4:].rpartition(".")
        place = next(old for old in PLACES if path == old or path.startswith(f"{old}."))
        part = path[len(place) + 1 :]
        home = PLACES[place]
        if part == "qkv":
            for to, piece in zip(("to_q", "to_k", "to_v"), split(value, HEADS), strict=True):
                state[f"{home}.{to}.{kind}"] = piece
            continue
        if "attentions" in home and name != "imagenet":
            part, value = ATTENTION[part], value.flatten(1) if value.dim() == 3 else value
        state[".".join(filter(None, (home, PARTS.get(part, part), kind)))] = value
    model.load_state_dict(state)
    return model.eval()


def split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Query, key and value."""
    by_head = qkv.flatten(1) if qkv.dim() == 3 else qkv
    by_head = by_head.reshape(heads, 3, -1, *by_head.shape[1:])
    return tuple(by_head[:, i].flatten(0, 1) for i in range(3))


@pytest.mark.parametrize("name", MODELS)
def test_against_the_released_code(name: str) -> None:
    """Whole pass, feature, cached pass, and cached pass with the feature corrected as at step 1 of 4."""
    with np.load(DATA) as data:
        arrays = {
            key.removeprefix(f"{name}::"): torch.from_numpy(data[key]).float()
            for key in data.files
            if key.startswith(f"{name}::") and "aq::" not in key
        }
    model = released(name, arrays)
    branch = 0 if name == "imagenet" else -1
    context = {"encoder_hidden_states": arrays["context"]} if name == "imagenet" else {}
    gain, offset = (arrays[key][:, None, :, None, None] for key in "ab")
    found = {}
    with AtStep(model, iec.DeepCache(branch=branch), call=lambda x, t: model(x, t, **context).sample) as at:
        found["eps_full_t991"] = at(0, arrays["x"], 991)
        found["feature"] = at.feature
        found["eps_cached_t741"] = at(1, arrays["x2"], 741)
        at.cache.compensate = lambda step, feature, _: gain[step] * feature + offset[step]
        at(0, arrays["x"], 991)
        found["eps_cached_ab_t741"] = at(1, arrays["x2"], 741)
    for key, value in found.items():
        torch.testing.assert_close(value, arrays[key], atol=1e-4, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    assert (found["eps_cached_ab_t741"] - found["eps_cached_t741"]).abs().max() > 1e-3
