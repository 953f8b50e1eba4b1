"""DeepCache against the released code of the authors of IEC."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import iec
from cached import AtStep

DATA = "data/ddpm_cache.npz"


def test_against_the_released_code(request: pytest.FixtureRequest) -> None:
    """Whole pass, feature and cached pass of the authors' DDPM with the same weights, in the branches that it can run."""
    data = np.load(request.path.parent / DATA)
    model = released(data)
    x, x2 = (torch.from_numpy(data[key]) for key in ("x", "x2"))
    for branch in (0, 2, 3):
        with AtStep(model, iec.DeepCache(branch=branch)) as at:
            whole, feature, reused = at(0, x), at.feature, at(1, x2)
        for found, key in ((whole, "eps_full"), (feature, "feature"), (reused, "eps_cached")):
            expected = torch.from_numpy(data[f"br{branch}_{key}"])
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def released(data: Any) -> Any:
    """The authors' DDPM `Model` as a UNet2DModel, from its state dict (entries `sd::…`, half precision)."""
    model = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    names = {
        "temb.dense.0": "time_embedding.linear_1",
        "temb.dense.1": "time_embedding.linear_2",
        "norm_out": "conv_norm_out",
    }
    parts = {"nin_shortcut": "conv_shortcut", "temb_proj": "time_emb_proj"}
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    state = {}
    for key in data.files:
        if not key.startswith("sd::"):
            continue
        name, _, kind = key[4:].rpartition(".")
        value = torch.from_numpy(data[key]).float()
        piece = name.split(".")
        if name in names:
            name = names[name]
        elif piece[0] == "mid":
            which = (
                f"attentions.0.{attention[piece[2]]}"
                if piece[1] == "attn_1"
                else f"resnets.{int(piece[1][-1]) - 1}.{parts.get(piece[2], piece[2])}"
            )
            name = f"mid_block.{which}"
        elif piece[0] in ("down", "up"):
            level = int(piece[1]) if piece[0] == "down" else 1 - int(piece[1])
            inside = {
                "block": lambda p: f"resnets.{p[3]}.{parts.get(p[4], p[4])}",
                "attn": lambda p: f"attentions.{p[3]}.{attention[p[4]]}",
                "downsample": lambda p: "downsamplers.0.conv",
                "upsample": lambda p: "upsamplers.0.conv",
            }[piece[2]](piece)
            name = f"{piece[0]}_blocks.{level}.{inside}"
        state[f"{name}.{kind}"] = value.flatten(1) if "attentions" in name and value.dim() == 4 else value
    model.load_state_dict(state)
    return model.eval()
