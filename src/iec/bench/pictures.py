"""Images of several arms side by side: the same seeds in every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from iec.bench.pareto import COLOURS

if TYPE_CHECKING:
    from torch import Tensor

GAP, LABEL = 4, 350  # pixels between images, and for the text beside them
SMALLEST, LARGEST = (
    56,
    160,
)  # pixels of an image's side: smaller ones are enlarged by whole factors, larger ones reduced


@dataclass(frozen=True)
class Strip:
    """A row: the arm's `name` and `kind`, a line of `facts`, and uint8 `images` (N, C, H, W)."""

    name: str
    kind: str
    facts: str
    images: Tensor


def strip(images: Tensor) -> Image.Image:
    """One row of images beside each other, uint8 (N, C, H, W); small ones are enlarged without smoothing."""
    from iec.evaluate.images import to_pil

    pictures = [_shown(picture.convert("RGB")) for picture in to_pil(images)]
    width, height = pictures[0].size
    row = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height), "white")
    for column, picture in enumerate(pictures):
        row.paste(picture, (column * (width + GAP), 0))
    return row


def sheet(strips: Sequence[Strip]) -> Image.Image:
    """All rows under each other, with name and facts before each. Raises ValueError for no rows."""
    if not strips:
        raise ValueError("there are no rows to draw")
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=12)
    rows = [strip(one.images) for one in strips]
    heights = [max(row.height, 48) + GAP for row in rows]
    page = Image.new("RGB", (LABEL + max(row.width for row in rows) + GAP, sum(heights) + GAP), "white")
    draw = ImageDraw.Draw(page)
    top = GAP
    for one, row, height in zip(strips, rows, heights, strict=True):
        draw.text((10, top + 6), one.name, fill=COLOURS.get(one.kind, "#1a202c"), font=font)
        draw.text((10, top + 28), one.facts, fill="#444444", font=small)
        page.paste(row, (LABEL, top))
        top += height
    return page


def _shown(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    if side < SMALLEST:
        factor = -(-SMALLEST // side)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if side > LARGEST:
        factor = LARGEST / side
        return picture.resize((round(picture.width * factor), round(picture.height * factor)), Image.Resampling.LANCZOS)
    return picture
