"""What other runs have made already, taken over by hash: tables that share arms, or their calibrations, make them once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iec.artifact.calibration import Calibration
from iec.bench.cells import Cell, Plan
from iec.bench.folder import RUN, TIMINGS, RunFolder, figure_hash, folder_files
from iec.bench.store import Lines
from iec.evaluate.shards import MANIFEST, ShardSet


def reuse(folder: RunFolder, plan: Plan, other: Path) -> int:
    """Copy into `folder` the calibrations, images (with the seconds that they took) and figures of `plan` that it lacks and the
    run in `other` has; what is damaged there is left. Returns how many images were taken.

    Raises ValueError when there is no run in `other`.
    """
    if not (other / RUN).is_file():
        raise ValueError(f"--reuse {other}: no {RUN}, so this is no folder of a run of iec bench")
    for calibration in plan.calibrations.values():
        theirs = other / "calibrations" / calibration.hash
        if calibration.bundled is None and _whole(theirs) and not folder.has_calibration(calibration):
            folder.keep_calibration(calibration, folder_files(theirs))
    for figure in plan.figures:
        theirs = other / "figures" / figure.name
        if figure_hash(theirs) == figure.hash and not folder.has_figure(figure):
            folder.keep_figure(figure, folder_files(theirs))
    times = {(line["cell"], line["start"]): line for line in Lines(other / TIMINGS).values}
    return sum(_images(folder, cell, other / "cells" / cell.hash, times) for cell in plan.cells.values())


def _images(folder: RunFolder, cell: Cell, theirs: Path, times: dict[tuple[str, int], dict[str, Any]]) -> int:
    if not (theirs / MANIFEST).is_file():
        return 0
    ours, source, taken = folder.shards(cell), ShardSet.open(theirs), 0
    if source.fingerprint != ours.fingerprint:
        return 0
    for start, count in folder.missing(cell):
        try:
            arrays = source.read(start)
        except ValueError:  # absent or damaged
            continue
        if len(arrays["images"]) != count:
            continue
        if (cell.hash, start) in times:
            folder.timings.append(times[cell.hash, start])
        ours.write(start, **arrays)
        taken += count
    return taken


def _whole(calibration: Path) -> bool:
    try:
        Calibration.load(calibration)
    except (OSError, ValueError):
        return False
    return True
