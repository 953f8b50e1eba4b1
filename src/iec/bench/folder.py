"""The folder of a bench run: what is there, what is missing, and writing what comes.

run.json                        recipe, cells, machine, versions
model/                          the stand-in, where one is used
calibrations/HASH/              one folder each, as `iec calibrate` writes them
cells/HASH/                     shards of images, see `iec.evaluate.shards`
cells/HASH/statistics-KEY/      what the shards leave behind for the metrics, KEY naming network and references
figures/NAME/                   numbers and pictures of the analysis
results.jsonl, timings.jsonl    a line per cell, a line per shard
results-earlier.jsonl           lines of arms and options that the last run did not have
clock.jsonl                     a line per arm and round, where arms were timed in turns
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iec.artifact import fingerprint
from iec.artifact.calibration import Calibration
from iec.artifact.files import write_json
from iec.bench.cells import CalibrationCell, Cell, FigureCell, Plan
from iec.bench.recipe import Recipe
from iec.bench.store import Lines, room
from iec.evaluate.machine import machine, versions
from iec.evaluate.shards import MANIFEST, ShardSet, shard_file
from iec.evaluate.statistics import Statistics, merged

VERSION = 1  # of run.json
RUN, RESULTS, TIMINGS, CLOCK, FIGURE = "run.json", "results.jsonl", "timings.jsonl", "clock.jsonl", "figure.json"
EARLIER = "results-earlier.jsonl"


class RunFolder:
    """The folder `root` of a run of `recipe`; made if need be."""

    def __init__(self, root: Path, recipe: Recipe) -> None:
        self.root, self.recipe = root, recipe
        self.results, self.timings = Lines(root / RESULTS), Lines(root / TIMINGS)
        self.clock, self.earlier = Lines(root / CLOCK), Lines(root / EARLIER)
        self._shards: dict[str, ShardSet] = {}

    def describe(self, plan: Plan, model: str, command: Sequence[str]) -> None:
        """Write run.json: what is run, of which model (its identity), by which `command`, where."""
        recipe, stand_in = self.recipe.plain(), self.recipe.stand_in
        about = {
            "format": "iec-bench-run",
            "version": VERSION,
            "title": self.recipe.title,
            "recipe": recipe,
            "model": model,
            "stand_in": None if stand_in is None else stand_in.model,
            "command": list(command),
            **here(),
            "fingerprint": fingerprint.plain([recipe, model]),
            "cells": [row.plain() for row in plan.rows],
        }
        with room(self.root / RUN):
            write_json(self.root / RUN, about)

    def note_failures(self, failed: Mapping[str, str]) -> None:
        """Have run.json say what failed, by name, and why; until the next run describes itself."""
        if failed:
            with room(self.root / RUN):
                write_json(
                    self.root / RUN, {**json.loads((self.root / RUN).read_text(encoding="utf-8")), "failed": failed}
                )

    def model(self) -> Path:
        """Where the stand-in is."""
        return self.root / "model"

    def shards(self, cell: Cell) -> ShardSet:
        """The images of a cell. Those of a run that was to have more are kept, and its length is, too."""
        if cell.hash not in self._shards:
            folder = self.root / "cells" / cell.hash
            held = ShardSet.open(folder).num if (folder / MANIFEST).is_file() else 0
            run = self.recipe.run
            self._shards[cell.hash] = ShardSet(folder, cell.identity, max(held, cell.num), run.shard, run.seed)
        return self._shards[cell.hash]

    def wanted(self, cell: Cell) -> list[tuple[int, int]]:
        """The shards that the images of a cell need: number of the first image, count."""
        return [(start, count) for start, count in self.shards(cell).shards() if start < cell.num]

    def missing(self, cell: Cell) -> list[tuple[int, int]]:
        """Those of them that are still to be made."""
        absent = set(self.shards(cell).missing())
        return [shard for shard in self.wanted(cell) if shard in absent]

    def calibration(self, cell: CalibrationCell) -> Path:
        """Where a calibration is, or is to be."""
        return self.root / "calibrations" / cell.hash

    def has_calibration(self, cell: CalibrationCell) -> bool:
        """Whether it is there and whole; a damaged one is removed."""
        folder = self.calibration(cell)
        if not folder.is_dir():
            return False
        try:
            Calibration.load(folder)
        except ValueError:
            shutil.rmtree(folder)
            return False
        return True

    def keep_calibration(self, cell: CalibrationCell, files: Mapping[str, bytes]) -> None:
        """Write the files of a calibration, all or none."""
        keep_folder(self.calibration(cell), files)
        self.checkpoint(cell).unlink(missing_ok=True)

    def checkpoint(self, cell: CalibrationCell) -> Path:
        """Where a calibration that is being made keeps what it has learnt so far."""
        return self.root / "calibrations" / f"{cell.hash}.checkpoint"

    def statistics_file(self, cell: Cell, key: str, start: int) -> Path:
        """The file of what a shard leaves behind."""
        return self.root / "cells" / cell.hash / f"statistics-{key}" / f"{start:08d}.safetensors"

    def statistics(self, cell: Cell, key: str) -> Statistics:
        """What the images of a cell leave behind, together. Raises ValueError when a file is missing or damaged."""
        parts = [Statistics.load(self.statistics_file(cell, key, start)) for start, _ in self.wanted(cell)]
        return merged(parts).first(cell.num)

    def keep_statistics(self, cell: Cell, key: str, start: int, statistics: Statistics) -> None:
        """Write what a shard leaves behind."""
        file = self.statistics_file(cell, key, start)
        with room(file):
            statistics.save(file)

    def lacks_statistics(self, cell: Cell, key: str, start: int, count: int) -> bool:
        """Whether those of a shard are still to be made; damaged ones, and of a shard that has grown, are."""
        file = self.statistics_file(cell, key, start)
        try:
            return not file.is_file() or len(Statistics.load(file)) != count
        except ValueError:
            return True

    def figure(self, cell: FigureCell) -> Path:
        """Where a figure is, or is to be."""
        return self.root / "figures" / cell.name

    def has_figure(self, cell: FigureCell) -> bool:
        """Whether this very figure is there."""
        return figure_hash(self.figure(cell)) == cell.hash

    def keep_figure(self, cell: FigureCell, files: Mapping[str, bytes]) -> None:
        """Write the files of a figure, all or none, in the place of those of another one."""
        about = {"figure": cell.hash, "kind": cell.kind, "title": cell.title, "arm": cell.arm.name}
        keep_folder(self.figure(cell), {**files, FIGURE: json.dumps(about, indent=2).encode()})
        shutil.rmtree(self.unfinished(cell), ignore_errors=True)

    def unfinished(self, cell: FigureCell) -> Path:
        """Where a figure that is being made keeps what it has so far."""
        return self.root / "figures" / f"{cell.hash}.unfinished"

    def rounds(self, batches: Mapping[str, int]) -> int:
        """How many rounds have timed, in turns, all of the cells in `batches`, by as many images; others are forgotten."""
        by_round: dict[int, set[tuple[str, int]]] = {}
        for line in self.clock.values:
            by_round.setdefault(line["round"], set()).add((line["cell"], line["images"]))
        count, wanted = 0, set(batches.items())
        while by_round.get(count, set()) >= wanted:
            count += 1
        self.clock.keep(
            lambda line: line["round"] < count and line["images"] == batches.get(line["cell"], line["images"])
        )
        return count

    def damaged(self) -> list[str]:
        """What is to be told of files that had damaged lines."""
        files = [lines for lines in (self.results, self.timings, self.clock, self.earlier) if lines.damaged]
        return [
            f"{lines.path.name}: left out line{'s' * (len(lines.damaged) > 1)} {', '.join(map(str, lines.damaged))}, damaged; "
            f"results are measured again, times of images that are there are lost; as it was: {lines.path.name}.damaged"
            for lines in files
        ]

    def have_results(self, measured: Mapping[str, str]) -> int:
        """Have in results.jsonl the lines of these cells alone, `measured` so; returns how many others were set aside.

        Those that were set aside before, by a run of fewer arms or other options, come back where they fit.
        """

        def fits(line: Mapping[str, Any]) -> bool:
            return measured.get(line.get("cell", "")) == line.get("measured")

        there = {line["cell"] for line in self.results.values if fits(line)}
        for line in self.earlier.values:
            if fits(line) and line["cell"] not in there:
                self.results.append(line)
                there.add(line["cell"])
        self.earlier.keep(lambda line: not fits(line))
        return self.results.keep(fits, self.earlier)

    def tidy_timings(self, missing: set[tuple[str, int]]) -> None:
        """Forget the times of shards that are `missing` or not on the disk, and all but the last of those that were made twice.

        Those of arms that this run does not have stay with their images.
        """
        last = {(line["cell"], line["start"]): id(line) for line in self.timings.values}
        kept = {number for key, number in last.items() if key not in missing and self._on_disk(*key)}
        self.timings.keep(lambda line: id(line) in kept)

    def _on_disk(self, cell: str, start: int) -> bool:
        return shard_file(self.root / "cells" / cell, start).is_file()


def here() -> dict[str, Any]:
    """The machine and the versions that seconds and memory depend on, as run.json has them."""
    return {"machine": {key: value for key, value in machine().items() if key != "threads"}, "versions": versions()}


def figure_hash(folder: Path) -> str | None:
    """Which figure lies in `folder`; None if none that is whole does."""
    try:
        return json.loads((folder / FIGURE).read_text(encoding="utf-8")).get("figure")
    except (OSError, ValueError, AttributeError):
        return None


def folder_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder and its folders, by relative name."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def keep_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` into a new `folder`, which is there with all of them or not at all; one that is there is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with room(folder), tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        inner = Path(temporary) / "made"
        for name, data in files.items():
            path = inner / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if folder.exists():
            shutil.rmtree(folder)
        inner.replace(folder)


def counts(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What a shard keeps of its sampling beside the images, as plain values."""
    return {name: value.item() for name, value in arrays.items() if name != "images" and value.ndim == 0}
