"""A synthetic dataset in Fashion-MNIST's file format, and training recipes that take a second on it."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

TINY_FEATURES = """
name = "tiny-features"
kind = "features"
data = "fashion-mnist"
steps = 8
batch_size = 16
learning_rate = 5e-3
warmup = 2
flip = true
shift = 1
dropout = 0.2
checkpoint_every = 4
sample_every = 100

[model]
in_channels = 1
channels = [4, 8]
features = 6
classes = 10
"""

TINY_DENOISER = """
name = "tiny-denoiser"
kind = "denoiser"
data = "fashion-mnist"
steps = 4
batch_size = 4
warmup = 1
snr_gamma = 5.0
checkpoint_every = 2
sample_every = 4

[model]
sample_size = 28
in_channels = 1
out_channels = 1
layers_per_block = 1
block_out_channels = [4, 4]
down_block_types = ["DownBlock2D", "DownBlock2D"]
up_block_types = ["UpBlock2D", "UpBlock2D"]
norm_num_groups = 2
attention_head_dim = 4
dropout = 0.1

[scheduler]
num_train_timesteps = 1000
clip_sample = false
"""


def write_idx(file: Path, values: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    file.write_bytes(gzip.compress(header + values.tobytes(), 1))


def write_dataset(folder: Path, count: int = 50) -> Path:
    """Images 28 × 28 whose class is the height of a bright area; `count` for training, as many for testing."""
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for prefix in ("train", "t10k"):
        labels = np.arange(count) % 10
        images = draw.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[: 2 + 2 * label] = 220
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels.astype(np.uint8))
    return folder
