"""What a bench run left in its folder, read back: run.json, results.jsonl, timings.jsonl, clock.jsonl.

A line of results.jsonl is what one cell (an arm, its seeds, its calibration) gave; a line of timings.jsonl what one of its
shards took, one of clock.jsonl what a batch of it took in a round. The files are appended to while the run goes on, so a last
line may be torn: it is left out, as the run will write it again.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from iec.bench.cells import REFERENCES

RUN, RESULTS, TIMINGS, CLOCK = "run.json", "results.jsonl", "timings.jsonl", "clock.jsonl"
VERSION = 1


@dataclass(frozen=True)
class Estimate:
    """A measured value with the bounds of its 95 % interval (None where there is none)."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def sign(self) -> int:
        """Of a difference: 1 or −1 if the whole interval lies on one side of zero, 0 if it cannot be told."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


@dataclass(frozen=True)
class Timing:
    """What a cell took: `shards`, the seconds an image of each shard, the highest `peak` memory in bytes (None: not measured),
    and the `threads` and `workers` they ran with, each as often as it occurred. `rounds`: the seconds an image of each round in
    which all arms took turns with nothing beside them, which tell more; empty without any."""

    shards: tuple[float, ...]
    peak: int | None
    threads: tuple[int, ...]
    workers: tuple[int, ...]
    rounds: tuple[float, ...] = ()

    @property
    def per_image(self) -> tuple[float, ...]:
        """Seconds an image: of each round, or else of each shard."""
        return self.rounds or self.shards

    @property
    def median(self) -> float:
        return statistics.median(self.per_image)

    @property
    def spread(self) -> tuple[float, float]:
        """The fastest and the slowest shard, or round."""
        return min(self.per_image), max(self.per_image)


@dataclass(frozen=True)
class Result:
    """One line of results.jsonl with its timing.

    `baseline`, `fullest`: the cells of the same arm without correction and of full precision. `whole` and `reused` are denoiser
    passes for each image (means, where a tolerance ends some corrections), `weights` bytes, `differences` (this arm − another)
    by the other's cell, `paper` the values the paper reports and `of` its model there, `notes` what was left out.
    """

    cell: str
    name: str
    kind: str
    group: str
    arm: Mapping[str, Any]
    baseline: str | None
    num: int
    whole: float
    reused: float
    weights: int
    kernel: str | None
    metrics: Mapping[str, Estimate]
    differences: Mapping[str, Mapping[str, Estimate]]
    network: str | None = None
    paper: Mapping[str, float] = field(default_factory=dict)
    of: str | None = None
    timing: Timing | None = None
    fullest: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def evaluations(self) -> float:
        return self.whole + self.reused


@dataclass(frozen=True)
class Run:
    """A folder of a bench: what run.json says, and the entries that are finished, in the order of the recipe.

    `missing` are the names of planned cells without a result, `notes` what the reader should know of the files.
    """

    folder: Path
    about: Mapping[str, Any]
    entries: tuple[Result, ...]
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics, those of the recipe first and in its order."""
        wanted = self.about.get("recipe", {}).get("metrics", {}).get("names", [])
        found = dict.fromkeys(name for entry in self.entries for name in entry.metrics)
        return [*(name for name in wanted if name in found), *(name for name in found if name not in wanted)]

    @property
    def num(self) -> int:
        """The number of images that most entries have."""
        counts = [entry.num for entry in self.entries]
        return max(counts, key=lambda num: (counts.count(num), num), default=0)

    def at(self, cell: str | None) -> Result | None:
        """The entry of a cell; None if it is not there (yet)."""
        return next((entry for entry in self.entries if entry.cell == cell), None)

    def baseline(self, entry: Result) -> Result | None:
        """The same arm without correction."""
        return self.at(entry.baseline)

    def full(self, entry: Result) -> Result | None:
        """The full-precision entry that `entry` is compared with."""
        return self.at(entry.fullest)

    def groups(self) -> dict[str, list[Result]]:
        """Entries by group, both in their order."""
        by_group: dict[str, list[Result]] = {}
        for entry in self.entries:
            by_group.setdefault(entry.group, []).append(entry)
        return by_group


def load_run(folder: str | Path) -> Run:
    """Read the folder of a bench, finished or not.

    Lines that are damaged are left out, and noted. Raises ValueError for a folder that is none, a damaged run.json, and lines of
    another version or without a key; it names file, line and key.
    """
    folder = Path(folder)
    if not (folder / RUN).is_file():
        raise ValueError(f"{folder} is no folder of a bench: there is no {RUN}; give the folder that `iec bench` wrote")
    try:
        about = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / RUN} is damaged: {error}; start the bench again with the same options") from error
    if not isinstance(about, dict):
        raise ValueError(f"{folder / RUN} holds {type(about).__name__}, expected an object")
    notes: list[str] = []
    timings, clock = _timings(folder / TIMINGS, notes), _timings(folder / CLOCK, notes)
    by_cell: dict[str, Result] = {}
    for number, line in _lines(folder / RESULTS, notes):
        try:
            entry = _entry(line, timings)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"no key {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{folder / RESULTS}, line {number}: {what}") from error
        by_cell[entry.cell] = entry
    entries, missing = _as_planned(about.get("cells"), by_cell, notes)
    entries = _in_turns(entries, clock, notes)
    options = about.get("recipe", {}).get("run", {}).get("scheduler_options") or {}
    entries = tuple(replace(entry, name=_shorter(entry.name, options)) for entry in entries)
    return Run(folder, about, entries, tuple(_shorter(name, options) for name in missing), tuple(notes))


def _shorter(name: str, options: Mapping[str, Any]) -> str:
    """The name of an arm without the options that all arms of the run have in common."""
    for key, value in options.items():
        name = name.replace(f", {key}={value}", "")
    return name


def _as_planned(
    planned: list[dict[str, Any]] | None, by_cell: Mapping[str, Result], notes: list[str]
) -> tuple[tuple[Result, ...], tuple[str, ...]]:
    """The finished entries in the order of the recipe, and the names of those that are not.

    Two arms of a recipe may be one cell (the same sampling in two groups): it is run once, and shown under both names.
    """
    if planned is None:
        return tuple(by_cell.values()), ()
    entries, missing = [], []
    for arm in planned:
        found = by_cell.get(arm["cell"])
        if found is None:
            missing.append(arm["name"])
            continue
        own = {key: arm[key] for key in ("name", "kind", "group") if arm.get(key) is not None}
        paper = dict(arm.get("paper") or {})
        if "paper" in arm:  # none is none, whatever the first row of this cell has
            own |= {"of": paper.pop("of", None), "paper": {name: float(value) for name, value in paper.items()}}
        entries.append(replace(found, **own))
    strange = len(by_cell.keys() - {arm["cell"] for arm in planned})
    if strange:
        notes.append(
            f"{strange} finished {'cell is' if strange == 1 else 'cells are'} of earlier options and not shown."
        )
    return tuple(entries), tuple(dict.fromkeys(missing))


def _lines(path: Path, notes: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a jsonl file with their line numbers; damaged lines are left out, and noted."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    texts = text.split("\n")
    read = []
    for number, line in enumerate(texts, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError(f"found {type(value).__name__}, expected an object")
        except ValueError:
            if number == len(texts):  # no newline after it: the run was stopped while it wrote
                notes.append(f"The last line of {path.name} is torn and was left out.")
            else:
                notes.append(
                    f"Line {number} of {path.name} is damaged and was left out; the same iec bench command mends it."
                )
            continue
        read.append((number, value))
    return read


def _entry(line: Mapping[str, Any], timings: Mapping[str, Timing]) -> Result:
    if line["version"] != VERSION:
        raise ValueError(f"version is {line['version']!r}, expected {VERSION}; use the iec that wrote it")
    differences = line.get("differences") or {}
    paper = dict(line.get("paper") or {})
    return Result(
        cell=line["cell"],
        name=line["name"],
        kind=line["kind"],
        group=line.get("group") or "",
        arm=line["arm"],
        baseline=line.get("baseline"),
        num=line["num"],
        whole=line["whole"],
        reused=line["reused"],
        weights=line["weights"],
        kernel=line.get("kernel"),
        metrics={name: _estimate(value) for name, value in line["metrics"].items()},
        differences={
            cell: {name: _estimate(value) for name, value in values.items()} for cell, values in differences.items()
        },
        network=line.get("network"),
        of=paper.pop("of", None),
        paper={name: float(value) for name, value in paper.items()},
        timing=timings.get(line["cell"]),
        fullest=line.get("full"),
        notes=tuple(line.get("notes") or ()),
    )


def _estimate(value: Mapping[str, Any]) -> Estimate:
    return Estimate(float(value["value"]), value.get("low"), value.get("high"))


def _in_turns(entries: tuple[Result, ...], clock: Mapping[str, Timing], notes: list[str]) -> tuple[Result, ...]:
    """The entries with the seconds of the rounds, if these timed all that stand in tables; with shards' they do not compare."""
    own = [entry for entry in entries if entry.group != REFERENCES]
    shown = {cell for entry in own for cell in (entry.cell, entry.baseline, entry.fullest)}
    lacking = [entry.name for entry in entries if entry.cell in shown - clock.keys()]
    if not clock or lacking:
        if clock and lacking:
            notes.append(
                f"The rounds by the clock lack {len(lacking)} arm{'s' * (len(lacking) > 1)}, so they are not shown: give "
                "--rounds again."
            )
        return entries
    bare = Timing((), None, (), ())
    return tuple(
        replace(entry, timing=replace(entry.timing or bare, rounds=clock[entry.cell].shards))
        if entry.cell in clock
        else entry
        for entry in entries
    )


def _timings(path: Path, notes: list[str]) -> dict[str, Timing]:
    by_cell: dict[str, list[Mapping[str, Any]]] = {}
    for number, line in _lines(path, notes):
        lacking = [key for key in ("cell", "images", "seconds") if key not in line]
        if lacking or not line["images"]:
            raise ValueError(f"{path}, line {number}: expected the keys cell, images (at least 1) and seconds")
        by_cell.setdefault(line["cell"], []).append(line)
    made = {}
    for cell, shards in by_cell.items():
        peaks = [shard["peak_memory"] for shard in shards if shard.get("peak_memory")]
        seconds = tuple(shard["seconds"] / shard["images"] for shard in shards)
        threads, workers = (
            tuple(sorted({shard[key] for shard in shards if shard.get(key) is not None}))
            for key in ("threads", "workers")
        )
        made[cell] = Timing(seconds, max(peaks, default=None), threads, workers)
    return made
