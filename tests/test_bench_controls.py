"""What the controls of a bench are told of the arms that they are to cost as much as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from iec.bench import runner
from iec.bench.recipe import recipe_of
from iec.bench.runner import Workers, bench


class Seen(Exception):
    """Ends a run that is long enough."""


def test_arms_of_one_name_have_the_costs_of_their_own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    down, up = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 8), down_block_types=down, up_block_types=up, norm_num_groups=4)
    pipe = DDIMPipeline(unet.eval(), DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    pipe.save_pretrained(tmp_path / "model")
    caches = {"a": "cachequant:2", "b": "cachequant:6"}
    table = {
        "format": "iec-bench",
        "version": 1,
        "title": "A test",
        "model": {"name": str(tmp_path / "model")},
        "run": {"num": 2, "num_inference_steps": 6, "device": "cpu"},
        "calibration": {"num_samples": 2, "batch_size": 2},
        "controls": {"enabled": True},
        "arm": [{"name": "IEC", "group": group, "cache": cache, "steps": "first:1"} for group, cache in caches.items()],
    }
    counts = {}

    def entries(recipe: Any, model: Any, refresh: Any, told: Any) -> None:
        counts.update({entry.group: len(tuple(refresh(entry.arm))) for entry in recipe.entries})
        raise Seen

    monkeypatch.setattr(runner, "entries", entries)
    with pytest.raises(Seen):
        bench(recipe_of(table, "test"), tmp_path / "run", workers=Workers(0))
    assert counts == {"a": 3, "b": 1}
