"""What a report says beside its tables: what was run, where, by which command, and how its numbers are to be read."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from iec.bench.cells import REFERENCES
from iec.bench.quantities import seconds
from iec.bench.results import Result, Run

_KERNELS = {"reference": "the reference kernel, which rounds floats and is slower than full precision"}


@dataclass(frozen=True)
class Facts:
    """The head of a report: title, one line that sums it up, the recipe's own text, what must be known first, and rows of how it
    was made."""

    title: str
    summary: str
    text: str
    caution: str
    rows: tuple[tuple[str, str], ...]


def facts(run: Run) -> Facts:
    """Read them from run.json and the results; what is not there is left out."""
    recipe = run.about.get("recipe", {})
    options, model = recipe.get("run", {}), recipe.get("model", {})
    stand_in = run.about.get("stand_in")
    title = run.about.get("title") or recipe.get("title") or run.folder.name
    paper = recipe.get("paper")
    arms = len({entry.cell for entry in run.entries if entry.group != REFERENCES})
    name = stand_in or model.get("name", "a model")
    summary = f"{name}: {arms} arm{'s' * (arms != 1)}, {run.num:,} images each, the same seeds in every row"
    if not arms:
        summary = f"{name}: nothing is measured yet"
    if paper:
        summary += f". After {paper} of the paper"
    rows = [
        ("command", f"`{_command(run.about['command'])}`" if run.about.get("command") else ""),
        ("model", f"{stand_in}, a small random stand-in for {model.get('name')}" if stand_in else _named(model)),
        ("seeds", _seeds(options, run.num)),
        ("conditions", _pairs(recipe.get("conditions"))),
        ("batches", _pairs({key: options[key] for key in ("batch_size", "shard") if key in options})),
        ("calibration", _pairs(recipe.get("calibration"))),
        ("features", ", ".join(sorted({entry.network for entry in run.entries if entry.network}))),
        ("kernels", ", ".join(sorted(_kernels(run.entries)))),
        ("machine", _machine(run.about.get("machine"))),
        ("versions", _pairs(run.about.get("versions"))),
        ("sampling", _sampling(run.entries)),
        ("fingerprint", str(run.about.get("fingerprint", ""))),
    ]
    about = " ".join(str(recipe.get("about", "")).split())
    caution = "The model is a random stand-in: this shows that the recipe works; its numbers say nothing of quality."
    return Facts(
        title, summary + ".", about, caution if stand_in else "", tuple((name, value) for name, value in rows if value)
    )


def remarks(run: Run) -> list[str]:
    """How the numbers are to be read."""
    entries = run.entries
    lines = []
    if any(e.low is not None for entry in entries for e in entry.metrics.values()):
        lines.append(
            "Brackets are 95 % intervals of a bootstrap over seeds. All arms use the same resamples, so the differences are "
            "paired and tighter than the values; better and worse mean that the interval of a difference excludes zero."
        )
    elif entries:
        lines.append("No intervals: the images are too few to tell anything apart.")
    if any(entry.reused for entry in entries):
        lines.append(
            "Passes are denoiser evaluations for each image; 20 + 80r is 20 whole ones and 80 that reuse cached features."
        )
    if any(entry.of for entry in entries):
        lines.append(
            "The paper's values are of its models, its number of images and Inception features; ours are of the model named "
            "above: compare what is better with what, not the sizes."
        )
    if any(entry.network for entry in entries) and not any("inception" in (e.network or "") for e in entries):
        lines.append(
            "FID and its kin are on the features named below, not Inception's: compare them only within this report."
        )
    timed = [entry.timing for entry in entries if entry.timing]
    rounds = [len(timing.rounds) for timing in timed if timing.rounds]
    if rounds:
        lines.append(
            f"Seconds for an image are wall-clock, the median of {max(rounds)} rounds (fastest–slowest) in which the arms took "
            "turns, one batch each, while this run did nothing else."
        )
    if len(rounds) < len(timed):
        lines.append(
            f"Seconds for an image {'of references ' if rounds else ''}are wall-clock, the median over the shards "
            "(fastest–slowest); they vary from run to run and with what else the machine does."
        )
    held = {timing.workers for timing in timed if timing.workers and not timing.rounds}
    if len(held) > 1 or any(len(workers) > 1 for workers in held):
        lines.append("Not all shards ran beside as many others, so seconds compare only roughly.")
    if any(entry.timing and entry.timing.peak for entry in entries):
        lines.append("Peak memory is that of the process that sampled, Python and torch included.")
    lines += [f"8-bit layers were computed by {_KERNELS[k]}." for k in _KERNELS if k in _kernels(entries)]
    if any(entry.kind == "control" for entry in entries):
        lines.append("Controls (italic or green) spend about as many evaluations on something other than IEC.")
    left_out = [f"{entry.name}: {note}." for entry in entries for note in entry.notes]
    return [*lines, *dict.fromkeys(left_out), *run.notes]


def _kernels(entries: tuple[Result, ...]) -> set[str]:
    return {kernel for entry in entries if entry.kernel for kernel in entry.kernel.split(", ")}


def _command(command: Any) -> str:
    return command if isinstance(command, str) else shlex.join(str(part) for part in command)


def _named(model: Mapping[str, Any]) -> str:
    name, rest = str(model.get("name", "")), {key: value for key, value in model.items() if key != "name"}
    return f"{name} ({_pairs(rest)})" if rest else name


def _seeds(options: Mapping[str, Any], num: int) -> str:
    first = int(options.get("seed", 0))
    return f"{first} to {first + num - 1}" if num else ""


def _pairs(values: Any) -> str:
    if not isinstance(values, Mapping):
        return ""
    return ", ".join(f"{key} {_told(value)}" for key, value in values.items() if value not in (None, {}, []))


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({_pairs(value)})"
    return "/".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _machine(machine: Any) -> str:
    if not isinstance(machine, Mapping):
        return ""
    parts = [str(machine["processor"])] if machine.get("processor") else []
    parts += [f"{machine['cores']} cores"] if machine.get("cores") else []
    parts += [f"{machine['memory_gib']} GiB"] if machine.get("memory_gib") else []
    parts += [str(machine["vector"])] if machine.get("vector") else []
    return ", ".join([*parts, *map(str, machine.get("int8") or ()), *map(str, machine.get("accelerators") or ())])


def _sampling(entries: tuple[Result, ...]) -> str:
    """All measured seconds together; a cell in two groups counts once."""
    timed = {e.cell: statistics.median(e.timing.shards) * e.num for e in entries if e.timing and e.timing.shards}
    if not timed:
        return ""
    total = sum(timed.values())
    threads = sorted({n for entry in entries if entry.timing for n in entry.timing.threads})
    workers = sorted({max(1, n) for entry in entries if entry.timing for n in entry.timing.workers})
    told = f"{total / 3600:.1f} hours" if total >= 3600 else f"{seconds(total)} seconds"
    beside = f", {'/'.join(map(str, workers))} at a time" if workers else ""
    return f"{told} of workers with {'/'.join(map(str, threads)) or '?'} threads{beside}"
