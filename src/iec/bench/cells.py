"""Cells: what a bench has to sample and to calibrate, each named by a hash of all that its numbers depend on.

The same sampling in two tables, or as a reference of others, is one cell and is run once; a recipe that is changed finds the
cells again that did not change.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from iec.artifact import fingerprint
from iec.bench.recipe import Entry, Recipe
from iec.evaluate.arms import Arm, calibration_name
from iec.evaluate.machine import choose_device

VERSION = 1
LENGTH = 16  # hex digits of a hash
REFERENCES = "references"  # the group of rows that no table of the recipe has


@dataclass(frozen=True)
class CalibrationCell:
    """A calibration: an `arm` that needs it, what `identity` makes it, and the name of a `bundled` one that serves instead."""

    hash: str
    arm: Arm
    identity: dict[str, Any] = field(compare=False)
    bundled: str | None = None


@dataclass(frozen=True)
class Cell:
    """One sampling: `num` images of `arm`, `identity` being all that each depends on beside its place. The number is no part of
    it, so that a run can be prolonged.

    Hashes of other cells: `calibration`; `baseline`, the same without correction; `full`, what it is compared with in full
    precision; `fine`, the fine solution. None: there is none, or it is this one. `rivals` of a control: the corrected arms of its
    group.
    """

    hash: str
    arm: Arm
    num: int
    identity: dict[str, Any] = field(compare=False)
    calibration: str | None = None
    baseline: str | None = None
    full: str | None = None
    fine: str | None = None
    rivals: tuple[str, ...] = ()

    @property
    def beside(self) -> tuple[str, ...]:
        """The cells that its metrics are compared with, pair by pair."""
        others = (self.baseline, self.full, *self.rivals)
        return tuple(dict.fromkeys(other for other in others if other is not None and other != self.hash))

    @property
    def needs(self) -> tuple[str, ...]:
        """All cells without which it cannot be measured."""
        fine = () if self.fine is None else (self.fine,)
        return tuple(dict.fromkeys((*self.beside, *fine)))


@dataclass(frozen=True)
class FigureCell:
    """A figure: its `kind` for `iec.analysis`, the `arm` that is analysed, the `calibration` it needs; `name` of its folder."""

    hash: str
    name: str
    kind: str
    title: str
    arm: Arm
    options: dict[str, Any] = field(compare=False)
    calibration: str | None = None


@dataclass(frozen=True)
class Row:
    """A row of a table: a cell under the name, kind and group that the recipe gives it."""

    cell: str
    entry: Entry

    def plain(self) -> dict[str, Any]:
        """For run.json and results.jsonl."""
        arm = self.entry.arm
        return {
            "cell": self.cell,
            "name": arm.name,
            "kind": arm.kind,
            "group": self.entry.group,
            "paper": self.entry.paper,
        }


@dataclass(frozen=True)
class Plan:
    """All that a bench does: cells and calibrations by hash, in the order in which they are run, and the rows of its tables."""

    cells: dict[str, Cell]
    calibrations: dict[str, CalibrationCell]
    rows: tuple[Row, ...]
    figures: tuple[FigureCell, ...] = ()

    def row(self, cell: str) -> Row:
        """The first row of a cell."""
        return next(row for row in self.rows if row.cell == cell)


def plan(recipe: Recipe, model: str, bundled: Mapping[str, str] | None = None, controls: Iterable[Entry] = ()) -> Plan:
    """What `recipe` asks for.

    Args:
        model: identity of the model (see `iec.bench.identity.model_identity`).
        bundled: the calibrations that come with the model: a hash of its content by the name of each.
        controls: arms of equal cost, beside those of the recipe.
    """
    return _Planning(recipe, model, bundled or {}).made(tuple(controls))


class _Planning:
    def __init__(self, recipe: Recipe, model: str, bundled: Mapping[str, str]) -> None:
        self.recipe, self.model, self.bundled = recipe, model, bundled
        self.device = choose_device(recipe.run.device).partition(":")[0]
        self.cells: dict[str, Cell] = {}
        self.calibrations: dict[str, CalibrationCell] = {}
        self.rows: list[Row] = []

    def made(self, controls: tuple[Entry, ...]) -> Plan:
        recipe = self.recipe
        fine = recipe.fine
        self.fine = None if fine is None else self._row(Entry(fine[0], REFERENCES), fine[1])
        self.whole = None
        if recipe.references.full and recipe.run.num_inference_steps is not None:
            steps = recipe.run.num_inference_steps
            arm = recipe.full_precision(steps, f"full precision, {steps} steps")
            self.whole = self._row(Entry(arm, REFERENCES))
        for entry in (*recipe.entries, *controls):
            self._entry(entry)
        self._pit()
        named = {row.cell for row in self.rows if row.entry.group != REFERENCES}
        # A reference that a table of the recipe shows, too, needs no row of its own.
        rows = [row for row in self.rows if row.entry.group != REFERENCES or row.cell not in named]
        return Plan(self.cells, self.calibrations, tuple(rows), tuple(self._figures()))

    def _pit(self) -> None:
        """Have every control compared with the corrected arms of its group."""
        for row in self.rows:
            if row.entry.arm.kind != "control":
                continue
            rivals = [r.cell for r in self.rows if r.entry.group == row.entry.group and r.entry.arm.kind == "corrected"]
            held = self.cells[row.cell]
            self.cells[row.cell] = replace(held, rivals=tuple(dict.fromkeys((*held.rivals, *rivals))))

    def _figures(self) -> Iterator[FigureCell]:
        """The figures that are analyses; pictures of images are made of the cells."""
        names: list[str] = []
        for spec in self.recipe.figures:
            if spec.kind == "images":
                continue
            entry = next((entry for entry in self.recipe.entries if entry.arm.name == spec.arm), None)
            steps = spec.num_inference_steps or self.recipe.run.num_inference_steps
            if entry is None and steps is None:
                raise ValueError(
                    f"figure {spec.title or spec.kind!r}: give arm or num_inference_steps, here or in [run]"
                )
            arm = entry.arm if entry is not None else self.recipe.full_precision(steps or 1, "full precision")
            if spec.num_inference_steps is not None:
                arm = replace(arm, num_inference_steps=spec.num_inference_steps)
            calibration = self._calibration(arm)
            identity = {**self._identity(arm), "kind": spec.kind, "title": spec.title, "options": spec.options}
            found = fingerprint.plain(identity)[:LENGTH]
            stem = re.sub(r"[^\w .()-]+", "", spec.title).strip(" .") or spec.kind
            names.append(stem)
            name = stem if names.count(stem) == 1 else f"{stem} {names.count(stem)}"
            yield FigureCell(found, name, spec.kind, spec.title, arm, spec.options, calibration)

    def _entry(self, entry: Entry) -> None:
        full = self._full(entry.arm)
        baseline = None
        if entry.arm.steps is not None:
            bare = entry.arm.without_correction()
            baseline = self._hash(bare)
            if baseline not in self.cells:
                self._row(Entry(bare, entry.group), baseline=None, full=full)
        self._row(entry, baseline=baseline, full=full)

    def _full(self, arm: Arm) -> str | None:
        """The cell of full precision: with the same sampler and steps; a control stands for an arm of the recipe, so it is
        compared with what that is compared with."""
        if not self.recipe.references.full:
            return None
        if arm.kind == "control" and self.whole is not None:
            return self.whole
        bare = arm.without_correction()
        twin = replace(bare, kind="reference", quant=None, layers=("*",), reconstruct=False, cache=None, scale=1.0)
        twin = replace(twin, name=f"full precision, {twin.label}")
        found = self._hash(twin)
        return found if found in self.cells else self._row(Entry(twin, REFERENCES))

    def _row(
        self, entry: Entry, num: int | None = None, *, baseline: str | None = None, full: str | None = None
    ) -> str:
        """Note a row, and its cell if it is new; returns the cell's hash."""
        num = self.recipe.run.num if num is None else num
        found = self._hash(entry.arm)
        if found not in self.cells:
            calibration = self._calibration(entry.arm)
            fine = getattr(self, "fine", None)
            others = (None if other == found else other for other in (baseline, full, fine))
            self.cells[found] = Cell(found, entry.arm, num, self._identity(entry.arm), calibration, *others)
        held = self.cells[found]
        if full is not None and held.full is None and full != found:
            held = replace(held, full=full)
        self.cells[found] = replace(held, num=max(num, held.num))
        self.rows.append(Row(found, entry))
        return found

    def _identity(self, arm: Arm) -> dict[str, Any]:
        run = self.recipe.run
        return {
            "format": "iec-cell",
            "version": VERSION,
            "model": self.model,
            "arm": arm.plain(),
            "conditions": self.recipe.conditions_of(run.seed).identity(),
            **{key: getattr(run, key) for key in ("seed", "shard", "batch_size", "threads")},
            "device": self.device,
            "calibration": self._calibration_identity(arm) if arm.calibrated else None,
        }

    def _hash(self, arm: Arm) -> str:
        return fingerprint.plain(self._identity(arm))[:LENGTH]

    def _calibration_identity(self, arm: Arm) -> dict[str, Any]:
        given, run, name = self.recipe.calibration, self.recipe.run, calibration_name(arm)
        of = {"format": "iec-cell-calibration", "version": VERSION, "model": self.model, "arm": arm.calibration()}
        if given.bundled and name in self.bundled:
            return {**of, "bundled": name, "content": self.bundled[name]}
        options = {key: getattr(given, key) for key in ("num_samples", "seed", "batch_size")}
        conditions = {"conditions": self.recipe.conditions_of(run.seed, given.conditions).identity()}
        if given.conditions is None and conditions["conditions"]:
            conditions["of"] = run.num  # those of the run at even distances, which its number makes
        return {**of, **options, **conditions, "threads": run.threads, "device": self.device}

    def _calibration(self, arm: Arm) -> str | None:
        """The hash of the calibration that an arm needs, which is noted; None if it needs none."""
        if not arm.calibrated:
            return None
        identity = self._calibration_identity(arm)
        found = fingerprint.plain(identity)[:LENGTH]
        if found not in self.calibrations:
            self.calibrations[found] = CalibrationCell(found, arm, identity, identity.get("bundled"))
        return found
