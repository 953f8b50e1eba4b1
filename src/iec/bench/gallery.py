"""Pictures of a report: rows of samples from the shards of its cells, and the figures of its analysis."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from iec.bench.pictures import Strip
from iec.bench.quantities import passes, quantity
from iec.bench.results import Result, Run

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 10  # images in a row
CELLS, FIGURES = "cells", "figures"
IMAGES = "*.np[yz]"  # the shards of a cell


@dataclass(frozen=True)
class Picture:
    """A PNG that the bench drew, and what it shows."""

    path: Path
    title: str


def strips(run: Run, shown: Sequence[Result]) -> list[Strip]:
    """The first images of every result whose shards are there, the same seeds in all rows."""
    found = [
        (result, images) for result in shown if (images := first_images(run.folder / CELLS / result.cell)) is not None
    ]
    count = min((len(images) for _, images in found), default=0)
    return [Strip(result.name, result.kind, _facts(run, result), images[:count]) for result, images in found]


def unread(run: Run) -> list[str]:
    """What is to be told of results whose images are there but cannot be read, and so are not shown."""
    cells = {entry.cell: entry.name for entry in run.entries}
    lost = [
        f'"{name}"'
        for cell, name in cells.items()
        if any((run.folder / CELLS / cell).glob(IMAGES)) and first_images(run.folder / CELLS / cell, 1) is None
    ]
    if not lost:
        return []
    return [f"Images of {', '.join(lost)} are damaged and not shown; the same iec bench command makes them again."]


def first_images(cell: Path, count: int = COLUMNS) -> Tensor | None:
    """Up to `count` images (N, C, H, W) of a cell's first shards; None where there is none that can be read."""
    import torch

    found: list[np.ndarray] = []
    for file in sorted(cell.glob(IMAGES)):
        try:
            with open(file, "rb") as opened:  # numpy leaves a file that it opened itself open where its zip is damaged
                loaded = np.load(opened, allow_pickle=False)
                images = loaded["images"] if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            break  # the bench itself says what is wrong with it, and makes it again
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1] not in (1, 3):
            break
        found.append(images[:count])
        if sum(map(len, found)) >= count:
            break
    return torch.from_numpy(np.concatenate(found)[:count]) if found else None


def rows_of_images(run: Run) -> list[tuple[str, list[Strip]]]:
    """The pictures of images that the recipe asks for: title, and the rows that are there."""
    found = []
    for one in run.about.get("recipe", {}).get("figure", []):
        if one.get("kind") == "images":
            named = {entry.name: entry for entry in run.entries}
            wanted = [named[name] for name in one.get("arms") or named if name in named]
            found.append((one.get("title") or "Images", strips(run, wanted)))
    return [(title, rows) for title, rows in found if rows]


def figures(run: Run) -> list[Picture]:
    """The PNGs of the analysis, in the order of their names: the folder of each is its title."""
    root = run.folder / FIGURES
    return [
        Picture(path, path.parent.name if path.parent != root else path.stem) for path in sorted(root.rglob("*.png"))
    ]


def _facts(run: Run, result: Result) -> str:
    parts = [f"{passes(result.whole, result.reused)} passes"]
    for name in [name for name in run.metrics if name in result.metrics][:2]:
        known, estimate = quantity(name), result.metrics[name]
        parts.append(f"{known.label} {known.number(estimate.value, known.digits([estimate]))}")
    return ", ".join(parts)
