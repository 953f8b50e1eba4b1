"""What other runs have made already, taken over by hash: tables that share arms, or their calibrations, make them once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iec.artifact.calibration import Calibration
from iec.artifact.plain import plain
from iec.bench.cells import Cell, Plan
from iec.bench.folder import RUN, TIMINGS, RunFolder, figure_hash, folder_files, here
from iec.bench.store import intact
from iec.evaluate.shards import MANIFEST, ShardSet


@dataclass
class Taken:
    """How much was taken from a run; `times`: whether with the seconds and the memory that it took."""

    images: int = 0
    calibrations: int = 0
    figures: int = 0
    times: bool = True

    def __str__(self) -> str:
        told = f"{self.images} images, {self.calibrations} calibrations, {self.figures} figures"
        if self.images and not self.times:
            told += "; not their seconds, as another machine or other versions made them"
        return told


def check_run(folder: Path) -> dict[str, Any]:
    """What run.json says there. Raises ValueError when there is none that can be read."""
    try:
        about = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--reuse {folder}: no {RUN} that can be read ({error}); give a folder that iec bench wrote, such as out/bench/NAME"
        ) from error
    return about if isinstance(about, dict) else {}


def reuse(folder: RunFolder, plan: Plan, other: Path) -> Taken:
    """Copy into `folder` the calibrations, images and figures of `plan` that it lacks and the run in `other` has.

    Nothing is written there, where that run may still be at work; what is damaged there is left. Seconds and memory are taken
    where that run had the same machine and versions. Raises ValueError as `check_run` does.
    """
    theirs = check_run(other)
    taken = Taken(times=all(theirs.get(key) == value for key, value in plain(here(), "here").items()))
    for calibration in plan.calibrations.values():
        made = other / "calibrations" / calibration.hash
        if calibration.bundled is None and _whole(made) and not folder.has_calibration(calibration):
            folder.keep_calibration(calibration, folder_files(made))
            taken.calibrations += 1
    for figure in plan.figures:
        made = other / "figures" / figure.name
        if figure_hash(made) == figure.hash and not folder.has_figure(figure):
            folder.keep_figure(figure, folder_files(made))
            taken.figures += 1
    for cell in plan.cells.values():
        taken.images += _images(folder, cell, other, taken.times)
    return taken


def _images(folder: RunFolder, cell: Cell, other: Path, times: bool) -> int:
    made, ours, taken = other / "cells" / cell.hash, folder.shards(cell), 0
    if not (made / MANIFEST).is_file():
        return 0
    try:
        source = ShardSet.open(made)
    except ValueError:
        return 0
    there = [shard for shard in folder.missing(cell) if source.path(shard[0]).exists()]
    if source.fingerprint != ours.fingerprint or not there:
        return 0
    # Read after the shards were seen: a shard is written after its time.
    held = {line.get("start"): line for line in intact(other / TIMINGS) if times and line.get("cell") == cell.hash}
    for start, count in there:
        try:
            arrays = source.read(start)
        except ValueError:  # damaged
            continue
        if len(arrays["images"]) != count:
            continue
        if start in held:
            folder.timings.append(held[start])
        ours.write(start, **arrays)
        taken += count
    return taken


def _whole(calibration: Path) -> bool:
    try:
        Calibration.load(calibration)
    except (OSError, ValueError):
        return False
    return True
