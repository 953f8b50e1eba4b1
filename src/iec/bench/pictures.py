"""Images of several arms side by side: the same seeds in every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    names = [_broken(one.name, font) for one in strips]
    facts = [_broken(one.facts, small) for one in strips]
    heights = [
        max(row.height, 22 * len(name) + 17 * len(told)) + 2 * GAP
        for row, name, told in zip(rows, names, facts, strict=True)
    ]
    page = Image.new("RGB", (LABEL + max(row.width for row in rows) + GAP, sum(heights) + GAP), "white")
    draw = ImageDraw.Draw(page)
    top = GAP
    for one, row, name, told, height in zip(strips, rows, names, facts, heights, strict=True):
        below = top
        for line in name:
            draw.text((10, below), line, fill=COLOURS.get(one.kind, "#1a202c"), font=font)
            below += 22
        for line in told:
            draw.text((10, below), line, fill="#444444", font=small)
            below += 17
        page.paste(row, (LABEL, top))
        top += height
    return page


def _broken(text: str, font: Any) -> list[str]:
    """The lines of a text that fit beside the images; a word that does not fit stands alone."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > LABEL - 20:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _shown(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    if side < SMALLEST:
        factor = -(-SMALLEST // side)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if side > LARGEST:
        factor = LARGEST / side
        return picture.resize((round(picture.width * factor), round(picture.height * factor)), Image.Resampling.LANCZOS)
    return picture
