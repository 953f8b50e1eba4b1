"""`iec bench`: a recipe run to the end, or as far as it goes, in a folder where the next run goes on.

Tasks are calibrations, shards, what shards leave behind, figures; this process alone writes what they give, measures each cell
as soon as all that it is compared with is there, and appends its line to results.jsonl. All of that depends on the recipe and
the model alone, so that a run that was killed, and one with other workers, ends with the same lines.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from iec.artifact.calibration import Calibration
from iec.bench.board import Board, Standing
from iec.bench.cells import REFERENCES, Cell, Plan, plan
from iec.bench.controls import entries, needs_refresh
from iec.bench.folder import EARLIER, RunFolder
from iec.bench.identity import bundled_calibrations, model_identity, model_of
from iec.bench.jobs import Job, Jobs, Workers
from iec.bench.measure import Measuring
from iec.bench.recipe import Entry, Recipe
from iec.bench.report import Report, report
from iec.bench.reuse import check_run, reuse
from iec.bench.store import held
from iec.evaluate.arms import Arm
from iec.evaluate.held import HELD
from iec.evaluate.statistics import Statistics
from iec.evaluate.workers import Task, TaskErrors, TaskFailed, run_tasks

KEPT = ("evaluations", "reused", "weights", "kernel")  # of a shard's sampling, beside its images


@dataclass(frozen=True)
class Outcome:
    """What a run did: the `report` of what is there, and `failed`: message by the name of what failed."""

    report: Report
    failed: dict[str, str] = field(default_factory=dict)


def bench(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    workers: Workers | None = None,
    reused: Sequence[Path] = (),
    rounds: int = 0,
    command: Sequence[str] = (),
    board: Board | None = None,
) -> Outcome:
    """Run `recipe` in the folder `out`, going on from what is there, and write the report.

    Args:
        workers: who works; how many makes no difference to the results.
        reused: folders of other runs, from which is taken what this one needs (see `iec.bench.reuse`).
        rounds: when all is sampled, so many times every arm samples one batch by the clock, in turns and with nothing beside it.
        command: what the user typed, for the report.
        board: is told how far the run is.

    Raises ValueError, before anything is sampled, for a recipe that cannot be run here, a folder without a run in `reused`, or
    rounds on a Ray cluster;
    RuntimeError when another run is at work there, or the disk is full. Arms that fail do not stop the others: they are in the
    outcome.
    """
    if rounds and workers is not None and workers.ray not in (None, "local"):
        raise ValueError(
            f"rounds={rounds} on the Ray cluster {workers.ray!r}: its workers may be on different machines, so the arms cannot "
            "be timed in turns by one; leave out the rounds, or use local workers"
        )
    root = Path(out)
    with held(root):
        run = _Run(recipe, root, workers or Workers(), board or Board(), reused)
        run.prepare(command)
        run.work()
        run.time(rounds)
        run.folder.note_failures(run.failed)
    return Outcome(report(root), run.failed)


class _Run:
    def __init__(self, recipe: Recipe, root: Path, workers: Workers, board: Board, reused: Sequence[Path] = ()) -> None:
        self.recipe, self.root, self.workers, self.board, self.reused = recipe, root, workers, board, reused
        self.failed: dict[str, str] = {}
        self.folder = RunFolder(root, recipe)
        self.measuring: Any = None

    def prepare(self, command: Sequence[str]) -> None:
        """All that is decided before the first task: the model, the cells, run.json, what is left to do."""
        recipe = self.recipe
        for other in self.reused:
            check_run(other)
        _sweep(self.root)
        self.model = model_of(recipe, self.folder.model())
        identity = model_identity(self.model)
        bundled = bundled_calibrations(self.model.name)
        first = plan(recipe, identity, bundled)
        self._reuse(first)
        self.plan = plan(recipe, identity, bundled, self._controls(first))
        if recipe.controls.enabled:
            self._reuse(self.plan)
        self.jobs = self._jobs()
        self.folder.describe(self.plan, identity, command)
        missing = {(job.cell.hash, job.start) for job in self._of("shard") if job.cell is not None}
        for told in self.folder.damaged():
            self.board.told(told)
        self.folder.tidy_timings(missing)
        aside = self.folder.have_results({c.hash: self.measuring.identity(c) for c in self.plan.cells.values()})
        if aside:
            self.board.told(
                f"{aside} results of arms or options that this run does not have were set aside ({EARLIER})"
            )
        self.measured = {line["cell"] for line in self.folder.results.values}
        self.left = dict.fromkeys(self.plan.cells, 0)
        for job in self._of("statistics"):
            if job.cell is not None:
                self.left[job.cell.hash] += 1
        self._stand(missing)

    def _reuse(self, plan: Plan) -> None:
        for other in self.reused:
            self.board.told(f"taken from {other}: {reuse(self.folder, plan, other)}")

    def _of(self, what: str) -> list[Job]:
        return [job for job in self.jobs.by_key.values() if job.what == what]

    def _controls(self, first: Plan) -> tuple[Entry, ...]:
        """The arms of equal cost, if they are wanted. Calibrations on which costs depend are made before."""
        if not self.recipe.controls.enabled:
            return ()
        needed = [row for row in first.rows if needs_refresh(row.entry.arm)]
        self.plan = first
        self.jobs = self._jobs()
        # Not by name: arms of two groups may have the same one.
        paths = {repr(r.entry.arm.plain()): self.jobs.calibration(first.cells[r.cell].calibration) for r in needed}
        keys = {key for _, after in paths.values() for key in after}
        self._run([job.task for key, job in self.jobs.by_key.items() if key in keys])

        def refresh(arm: Arm) -> Iterable[int]:
            path, after = paths[repr(arm.plain())]
            if path is None or any(self._called(key) in self.failed for key in after):
                raise ValueError("its calibration failed")
            cache = Calibration.load(path).cache
            assert cache is not None
            return cache.refresh

        return entries(self.recipe, self.model, refresh, self.board.told)

    def _jobs(self) -> Jobs:
        ship = self.workers.ray not in (None, "local")
        if self.measuring is None:
            self.measuring = Measuring(self.recipe, self.plan, self.folder)
        self.measuring.plan = self.plan
        return Jobs(self.recipe, self.plan, self.folder, self.measuring, self.model, ship)

    def _stand(self, missing: set[tuple[str, int]]) -> None:
        """Put the cells on the board as they stand."""
        times = {(line["cell"], line["start"]): line for line in self.folder.timings.values}
        evaluations = {line["cell"]: line["evaluations"] for line in self.folder.results.values}
        for cell in self.plan.cells.values():
            row = self.plan.row(cell.hash).entry
            standing = Standing(row.arm.name, row.arm.kind, row.group, cell.num)
            for start, count in self.folder.wanted(cell):
                if (cell.hash, start) not in missing:
                    standing.images += count
                    line = times.get((cell.hash, start))
                    standing.seconds = line["seconds"] / line["images"] if line else standing.seconds
            if cell.hash in self.measured:
                standing.state, standing.evaluations = "done", evaluations[cell.hash]
            self.board.standings[cell.hash] = standing
        self.board.changed()

    def work(self) -> None:
        """Run the tasks, and measure what can be measured."""
        for cell in self.plan.cells.values():
            self._measure(cell)
        self._run(self.jobs.tasks)
        for cell in self.plan.cells.values():
            if cell.hash not in self.measured:
                self._lost(cell)

    def time(self, rounds: int) -> None:
        """Time the arms that stand in tables and were measured, until there are so many rounds."""
        if not rounds:
            return
        own = {row.cell for row in self.plan.rows if row.entry.group != REFERENCES}
        shown = own.union(*(self.plan.cells[cell].beside for cell in own))
        cells = [cell for cell in self.plan.cells.values() if cell.hash in shown & self.measured]
        if not cells:
            return
        there = self.folder.rounds({cell.hash: self.jobs.batch(cell) for cell in cells})
        if there < rounds:
            self.board.told(f"rounds {there + 1} to {rounds} of {len(cells)} arms by the clock")
            self._run(self.jobs.clock(cells, there, rounds), 0 if self.workers.number == 0 else 1)

    def _run(self, tasks: list[Task], workers: int | None = None) -> None:
        threads = self.recipe.run.threads
        try:
            run_tasks(
                tasks,
                workers=self.workers.count(threads) if workers is None else workers,
                threads=threads,
                ray=self.workers.ray,
                gpus=self.workers.gpus,
                attempts=self.workers.attempts,
                done=self._done,
                failed=self._failed,
                started=self._started,
                lost=lambda task, why: self.board.told(f"{self._called(task.key)} is done again: {why}"),
            )
        except TaskErrors as errors:
            for key, cause in errors.not_run.items():
                self._fail(self.jobs.by_key[key], f"not run, as {self._called(cause)} failed")
        finally:
            HELD.release()

    def _started(self, task: Task) -> None:
        job = self.jobs.by_key[task.key]
        if job.what == "calibration":
            for cell in self.plan.cells.values():
                if job.calibration is not None and cell.calibration == job.calibration.hash:
                    self.board.set(cell.hash, "calibrates")
            self.board.told(f"{self._called(task.key)} begins")
        elif job.cell is not None and job.what == "shard":
            self.board.set(job.cell.hash, "samples")

    def _done(self, task: Task, result: dict[str, Any]) -> None:
        job = self.jobs.by_key[task.key]
        if job.calibration is not None:
            self.folder.keep_calibration(job.calibration, result["files"])
        elif job.figure is not None:
            self.folder.keep_figure(job.figure, result["files"])
        elif job.cell is not None and job.what == "shard":
            self._sampled(job, job.cell, result)
        elif job.cell is not None and job.what == "clock":
            seconds, threads = round(result["seconds"], 4), self.recipe.run.threads
            about = {"cell": job.cell.hash, "round": job.start, "images": job.count}
            self.folder.clock.append({**about, "seconds": seconds, "threads": threads})
        elif job.cell is not None:
            self._looked(job, job.cell, result)

    def _sampled(self, job: Job, cell: Cell, result: dict[str, Any]) -> None:
        threads, count = self.recipe.run.threads, len(result["images"])
        # The time first: a shard that is there is not made again, so that its time could not come later.
        self.folder.timings.append(
            {
                "cell": cell.hash,
                "start": job.start,
                "images": count,
                "seconds": round(result["seconds"], 4),
                "peak_memory": result["peak_memory"],
                "threads": threads,
                "workers": self.workers.count(threads),
            }
        )
        self.folder.shards(cell).write(job.start, result["images"], **{name: result[name] for name in KEPT})
        batches = -(-count // self.recipe.run.batch_size)
        self.board.add(cell.hash, count, result["seconds"] / count, result["evaluations"] / batches)

    def _looked(self, job: Job, cell: Cell, result: dict[str, Any]) -> None:
        seeds = torch.tensor(job.task.arguments["seeds"], dtype=torch.int64)
        # Copies, as Ray's arrays cannot be written to, of which torch warns.
        features = {name: torch.tensor(value) for name, value in result["features"].items()}
        scores = {name: torch.tensor(value) for name, value in result["scores"].items()}
        statistics = Statistics(result["name"], seeds, **features, scores=scores)
        self.folder.keep_statistics(cell, self.measuring.key(cell), job.start, statistics)
        self.left[cell.hash] -= 1
        if self.left[cell.hash] == 0:
            for other in self.plan.cells.values():
                if cell.hash in (other.hash, *other.beside):
                    self._measure(other)

    def _measure(self, cell: Cell) -> None:
        """Append the line of a cell, if it is not there and all that it needs is."""
        if cell.hash in self.measured or any(self.left[other] for other in (cell.hash, *cell.beside)):
            return
        self.board.set(cell.hash, "measures")
        try:
            line = self.measuring.line(cell)
        except ValueError as error:
            self.failed[cell.arm.name] = str(error)
            self.board.set(cell.hash, "failed", str(error))
            return
        self.folder.results.append(line)
        self.measured.add(cell.hash)
        standing = self.board.standings[cell.hash]
        standing.evaluations = line["evaluations"]
        self.board.set(cell.hash, "done")

    def _failed(self, task: Task, error: TaskFailed) -> None:
        self._fail(self.jobs.by_key[task.key], str(error))

    def _fail(self, job: Job, message: str) -> None:
        """Note what failed, once for each cell."""
        name = self._called(job.task.key)
        if job.cell is not None and job.what != "clock":
            standing = self.board.standings[job.cell.hash]
            if standing.state == "failed":
                return
            self.board.set(job.cell.hash, "failed", message)
            name = standing.name
        self.failed[name] = message
        self.board.told(f"{name} failed: {message}")

    def _lost(self, cell: Cell) -> None:
        """A cell that was not measured, though nothing of its own failed."""
        standing = self.board.standings[cell.hash]
        lacking = [self.board.standings[other].name for other in cell.needs if self.left.get(other)]
        if standing.state != "failed":
            self.board.set(cell.hash, "failed", f"not measured, as {', '.join(lacking)} failed")
            self.failed[standing.name] = standing.error

    def _called(self, key: str) -> str:
        """A task as people say it."""
        job = self.jobs.by_key[key]
        if job.cell is not None and job.what == "clock":
            return f"{self.board.standings[job.cell.hash].name}, round {job.start + 1} by the clock"
        if job.cell is not None:
            name = self.board.standings[job.cell.hash].name
            last = job.start + job.count - 1
            return f"{name}, images {job.start} to {last}" + (" (metrics)" if job.what == "statistics" else "")
        if job.calibration is not None:
            arm = job.calibration.arm
            return f"the calibration of {arm.without_correction().label}"
        return f"the figure {key.partition(' ')[2]}"


def _sweep(root: Path) -> None:
    """Remove what a kill has left half written."""
    for folder in (root / "calibrations", root / "figures"):
        for path in folder.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)
