"""Pictures of samples: PIL images, grids, PNG files."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from iec.artifact.files import replacing

if TYPE_CHECKING:
    import torch


def grid(images: Sequence[Image.Image], columns: int, scale: int = 1, gap: int = 2) -> Image.Image:
    """Lay `images` (all of one size) out row by row on white, each enlarged `scale` times without smoothing.

    Raises ValueError when there is no image or the sizes differ.
    """
    if not images:
        raise ValueError("grid() was given no images")
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise ValueError(f"grid() needs images of one size, found {sorted(sizes)}")
    width, height = (side * scale for side in sizes.pop())
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """PIL images of uint8 (N, C, H, W); one channel is grey, three are RGB. Raises ValueError for anything else."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or "uint8" not in str(images.dtype):
        raise ValueError(f"images are {tuple(images.shape)}, {images.dtype}; expected uint8 (N, 1 or 3, H, W)")
    rows = images.permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row) for row in rows]


def save_grid(images: torch.Tensor, file: str | os.PathLike[str], columns: int | None = None) -> None:
    """Write uint8 images (N, C, H, W) as one PNG grid; about square unless `columns` is given.

    Images smaller than 64 pixels are enlarged by a whole factor, or they could not be judged on a screen.
    """
    pictures = to_pil(images)
    across = columns if columns is not None else math.ceil(math.sqrt(len(pictures)))
    scale = -(-64 // max(1, min(images.shape[2:])))
    with replacing(file) as temporary:
        grid(pictures, min(across, max(1, len(pictures))), scale).save(temporary, format="PNG")


def save_each(images: torch.Tensor, folder: str | os.PathLike[str], seeds: Sequence[int]) -> None:
    """Write each of the uint8 images (N, C, H, W) to `folder` as <seed>.png, in its own size."""
    for picture, seed in zip(to_pil(images), seeds, strict=True):
        with replacing(Path(folder) / f"{seed:06d}.png") as temporary:
            picture.save(temporary, format="PNG")
