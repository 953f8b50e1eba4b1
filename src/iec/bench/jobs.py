"""The tasks that a bench run still has to do, from what is in its folder, what each of them is for, and who does them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from iec.bench.cells import CalibrationCell, Cell, FigureCell, Plan
from iec.bench.controls import loading
from iec.bench.folder import RunFolder
from iec.bench.measure import Measuring
from iec.bench.recipe import Recipe
from iec.bench.specs import ModelSpec
from iec.bench.studies import STUDY
from iec.evaluate.arms import Arm
from iec.evaluate.scale import Sampling
from iec.evaluate.workers import Task
from iec.pipeline.models import calibrations


@dataclass(frozen=True)
class Workers:
    """Who works: see `iec.evaluate.workers.run_tasks`. `number` None: as many as there are cores for, or all of a Ray cluster."""

    number: int | None = None
    ray: str | None = None
    gpus: float = 0.0
    attempts: int = 3

    def count(self, threads: int) -> int | None:
        """The number of local workers with so many threads each; None: as many as Ray has room for."""
        if self.number is not None or self.ray is not None:
            return self.number
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // threads)


@dataclass(frozen=True)
class Job:
    """A task with what it is for: the "calibration" `calibration`; the "shard" of `cell` from image `start` on, or its
    "statistics"; the "figure" `figure`; a batch of `cell` by the "clock", in round `start`."""

    what: Literal["calibration", "shard", "statistics", "figure", "clock"]
    task: Task
    cell: Cell | None = None
    calibration: CalibrationCell | None = None
    figure: FigureCell | None = None
    start: int = 0
    count: int = 0


class Jobs:
    """The jobs of `plan` that `folder` lacks.

    Args:
        model: as workers are to load it.
        ship: whether they may have another disk, so that folders are sent and nothing is kept there.
    """

    def __init__(
        self, recipe: Recipe, plan: Plan, folder: RunFolder, measuring: Measuring, model: ModelSpec, ship: bool
    ) -> None:
        self.recipe, self.plan, self.folder, self.measuring = recipe, plan, folder, measuring
        self.model, self.ship = model, ship
        self.conditions = recipe.conditions_of(recipe.run.seed)
        self._bundled = calibrations(model.name)
        self.by_key: dict[str, Job] = {}
        for cell in plan.cells.values():
            self._shards(cell)
        for cell in plan.cells.values():
            self._statistics(cell)
        for figure in plan.figures:
            self._figure(figure)

    @property
    def tasks(self) -> list[Task]:
        """All tasks: calibrations, which take long, then cell by cell what is to be sampled and what to be looked at, figures."""
        order = {cell: place for place, cell in enumerate(self.plan.cells)}

        def place(job: Job) -> tuple[int, ...]:
            if job.cell is None:
                return (0,) if job.what == "calibration" else (2,)
            return (1, order[job.cell.hash], job.what != "shard")

        return [job.task for job in sorted(self.by_key.values(), key=place)]

    def _add(self, job: Job) -> None:
        self.by_key[job.task.key] = job

    def _shipped(self) -> tuple[dict[str, Any], tuple[Path, ...]]:
        """How a worker loads the pipeline and where, and the folder that it is sent, if it has not the same disk."""
        how = {**loading(self.model), "device": self.recipe.run.device}
        if self.ship and Path(self.model.name).is_dir():
            return {**how, "model": None}, (Path(self.model.name),)
        return how, ()

    def calibration(self, hash: str | None) -> tuple[Path | None, tuple[str, ...]]:
        """Where a calibration is or will be, and the task that makes it first."""
        if hash is None:
            return None, ()
        wanted = self.plan.calibrations[hash]
        if wanted.bundled is not None:
            return self._bundled[wanted.bundled], ()
        key = f"calibration {wanted.hash}"
        if key not in self.by_key and not self.folder.has_calibration(wanted):
            self._add(Job("calibration", self._calibrate(key, wanted), calibration=wanted))
        return self.folder.calibration(wanted), (key,) if key in self.by_key else ()

    def _calibrate(self, key: str, wanted: CalibrationCell) -> Task:
        given, run = self.recipe.calibration, self.recipe.run
        conditions, numbers = self.conditions, [i * run.num // given.num_samples for i in range(given.num_samples)]
        if given.conditions is not None:
            conditions = self.recipe.conditions_of(run.seed, given.conditions)
            numbers = list(range(given.num_samples))
        how, files = self._shipped()
        arguments = {
            **how,
            "arm": named(wanted.arm),
            "samples": {name: getattr(given, name) for name in ("num_samples", "seed", "batch_size")},
            "conditions": conditions.of(numbers),
            "checkpoint": None if self.ship else str(self.folder.checkpoint(wanted)),
        }
        return Task(key, "iec.bench.work:make_calibration", arguments, files)

    def _shards(self, cell: Cell) -> None:
        missing = self.folder.missing(cell)
        if not missing:
            return
        for task, (start, count) in zip(self._sampling(cell, missing), missing, strict=True):
            task = replace(task, function="iec.bench.work:sample_shard")
            self._add(Job("shard", task, cell, start=start, count=count))

    def _sampling(self, cell: Cell, parts: list[tuple[int, int]]) -> list[Task]:
        """The tasks that sample these images of a cell: number of the first one, count."""
        calibration, after = self.calibration(cell.calibration)
        run = self.recipe.run
        sampling = Sampling(
            cell.arm,
            **loading(self.model),
            batch_size=run.batch_size,
            conditions=self.conditions,
            device=run.device,
        )
        return sampling.tasks(self.folder.shards(cell), parts, calibration, f"shard {cell.hash} ", after, self.ship)

    def batch(self, cell: Cell) -> int:
        """The images of the batch by which a cell is timed."""
        return min(self.recipe.run.batch_size, self.recipe.run.shard, cell.num)

    def clock(self, cells: list[Cell], begin: int, end: int) -> list[Task]:
        """The tasks of the rounds `begin` … `end` − 1, in each of which every one of `cells` samples one batch; before them those
        that make calibrations which are gone."""
        tasks, first = [], dict.fromkeys(self.by_key)
        for number in range(begin, end):
            for cell in cells:
                count = self.batch(cell)
                (task,) = self._sampling(cell, [(0, count)])
                task = replace(task, key=f"clock {cell.hash} {number}", function="iec.bench.work:time_batch")
                task.arguments["seeds"] = task.arguments["seeds"][:count]
                self._add(Job("clock", task, cell, start=number, count=count))
                tasks.append(task)
        gone = [job.task for key, job in self.by_key.items() if job.what == "calibration" and key not in first]
        there = {task.key for task in (*gone, *tasks)}  # what a task waits for may have been done by this run
        return [*gone, *(replace(task, after=tuple(key for key in task.after if key in there)) for task in tasks)]

    def _statistics(self, cell: Cell) -> None:
        key, targets = self.measuring.key(cell), self.measuring.targets(cell)
        for start, count in self.folder.wanted(cell):
            if f"shard {cell.hash} {start}" not in self.by_key and not self.folder.lacks_statistics(
                cell, key, start, count
            ):
                continue
            theirs = {name: other for name, other in targets.items() if start < other.num}
            cells = (cell, *theirs.values())
            after = tuple(name for other in cells if (name := f"shard {other.hash} {start}") in self.by_key)
            files = tuple(self.folder.shards(other).path(start) for other in cells)
            task = Task(
                f"statistics {cell.hash} {start}",
                "iec.bench.work:leave_behind",
                self._look(cell, start, theirs),
                files,
                after,
            )
            self._add(Job("statistics", task, cell, start=start, count=count))

    def _figure(self, figure: FigureCell) -> None:
        if self.folder.has_figure(figure):
            return
        calibration, after = self.calibration(figure.calibration)
        how, files = self._shipped()
        study = {key: value for key, value in figure.options.items() if key in STUDY}
        inner = {key: value for key, value in figure.options.items() if key not in STUDY}
        seed = study.setdefault("seed", self.recipe.run.seed)
        numbers = range(seed - self.recipe.run.seed, seed - self.recipe.run.seed + study.setdefault("num", 16))
        arguments = {
            **how,
            "arm": named(figure.arm),
            "kind": figure.kind,
            "conditions": self.conditions.of(numbers),
            "folder": None if self.ship else str(self.folder.unfinished(figure)),
            "study": {
                **study,
                "options": {figure.kind: inner},
                "about": {"title": figure.title, "arm": figure.arm.name},
            },
        }
        files = (*(() if calibration is None else (calibration,)), *files)
        task = Task(f"figure {figure.name}", "iec.bench.work:draw_figure", arguments, files, after)
        self._add(Job("figure", task, calibration=None, figure=figure))

    def _look(self, cell: Cell, start: int, theirs: dict[str, Cell]) -> dict[str, Any]:
        """The arguments of the task that looks at a shard."""
        metrics, targets = self.recipe.metrics, self.measuring.targets(cell)
        seeds = list(self.folder.shards(cell).seeds(start))
        texts = self.conditions.of([seed - self.recipe.run.seed for seed in seeds]).get("prompt")
        return {
            "network": metrics.network,
            "device": self.recipe.run.device,
            "batch_size": metrics.batch_size,
            "seeds": seeds,
            "targets": {name: min(other.num - start, len(seeds)) for name, other in theirs.items()},
            "paired": {name: list(self.measuring.paired[name]) for name in targets},
            "prompts": texts,
            "clip": (metrics.clip or "") if "clip" in metrics.names else None,
        }


def named(arm: Arm) -> dict[str, Any]:
    """An arm as plain data, name and kind with it, for a task."""
    return {**arm.plain(), "name": arm.name, "kind": arm.kind}
