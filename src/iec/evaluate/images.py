"""Pictures of samples: grids of images."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image


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
