"""Quality of quantized sampling on the bundled model: images of every arm in shards, then the table.

    python benchmarks/quantized_quality.py sample --arm full --num 2000
    python benchmarks/quantized_quality.py table

Every arm samples the seeds 0 … num − 1; a shard that exists is not sampled again, so a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import iec
from iec.artifact.files import replacing
from iec.evaluate.sampling import sample, with_scheduler

MODEL, STEPS, SHARD = "fashion-mnist", 100, 50
ROOT = Path("out/quantized-quality")
# arm: (calibration or None, correction plan or None)
ARMS: dict[str, tuple[str | None, str | None]] = {
    "full": (None, None),
    "full+ends": (None, "ends:1/10"),
    "w8a8": ("w8a8", None),
    "w8a8+ends": ("w8a8", "ends:1/10"),
    "w4a8": ("w4a8", None),
    "w4a8+ends": ("w4a8", "ends:1/10"),
    "w4a8-rec": ("w4a8-rec", None),
    "w4a8-rec+ends": ("w4a8-rec", "ends:1/10"),
}


def prepare(arm: str, root: Path) -> tuple[Any, int]:
    """The pipeline of an arm and its number of steps."""
    pipe = iec.load(MODEL)
    pipe.set_progress_bar_config(disable=True)
    if arm == "fine":
        pipe.unet.to(memory_format=torch.channels_last)
        return with_scheduler(pipe, "DPMSolverMultistepScheduler"), 200
    calibration, steps = ARMS[arm]
    if calibration is None:
        pipe.unet.to(memory_format=torch.channels_last)  # faster on a CPU, the same up to rounding
    else:
        iec.quantize(pipe, iec.Calibration.load(root / "calibration" / calibration))
    if steps is not None:
        iec.enable(pipe, steps=steps)
    return pipe, STEPS


def run(arm: str, num: int, batch_size: int, root: Path) -> None:
    """Sample the shards of an arm that are missing."""
    pipe, steps = prepare(arm, root)
    for start in range(0, num, SHARD):
        path = root / arm / f"{start:06d}.npy"
        if path.exists():
            continue
        images = sample(pipe, range(start, start + SHARD), steps, batch_size)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, images.numpy())
        print(arm, start + SHARD, flush=True)


def images_of(arm: str, root: Path) -> torch.Tensor:
    """All images (N, C, H, W) of an arm that are there."""
    return torch.cat([torch.from_numpy(np.load(file)) for file in sorted((root / arm).glob("*.npy"))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["sample", "table"])
    parser.add_argument("--arm", choices=["fine", *ARMS], action="append")
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--root", type=Path, default=ROOT)
    options = parser.parse_args()
    if options.action == "sample":
        for arm in options.arm or ["fine", *ARMS]:
            run(arm, options.num, options.batch_size, options.root)
    else:
        print(json.dumps({arm: len(images_of(arm, options.root)) for arm in ARMS if (options.root / arm).is_dir()}))


if __name__ == "__main__":
    main()
