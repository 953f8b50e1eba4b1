"""Real images that a bench compares with: results of others are measured again."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from iec.bench.recipe import recipe_of
from iec.bench.runner import Workers, bench
from iec.evaluate.images import save_each


def test_other_real_images_of_the_same_name_and_number_are_measured_against(tmp_path: Path) -> None:
    torch.manual_seed(0)
    down, up = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 8), down_block_types=down, up_block_types=up, norm_num_groups=4)
    DDIMPipeline(unet.eval(), DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "model")
    for seed, parent in enumerate(("one", "other")):
        images = torch.randint(0, 256, (4, 1, 28, 28), generator=torch.Generator().manual_seed(seed))
        save_each(images.to(torch.uint8), tmp_path / parent / "real", range(4))

    def measured(parent: str, folder: str) -> dict[str, float]:
        table = {
            "format": "iec-bench",
            "version": 1,
            "title": "A test",
            "model": {"name": str(tmp_path / "model")},
            "run": {"num": 2, "num_inference_steps": 1, "device": "cpu"},
            "references": {"full": False, "data": str(tmp_path / parent / "real")},
            "metrics": {"network": "fashion-mnist", "names": ["kid"], "draws": 2},
            "arm": [{"name": "DDIM"}],
        }
        assert not bench(recipe_of(table, "test"), tmp_path / folder, workers=Workers(0)).failed
        (line,) = (tmp_path / folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
        return json.loads(line)["metrics"]["kid"]

    one, other = measured("one", "run"), measured("other", "fresh")
    assert one != other and measured("one", "run") == one
    assert measured("other", "run") == other
