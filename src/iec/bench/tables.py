"""The tables of a report: for each group of arms quality and cost, and the further metrics; as Markdown or for HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from iec.bench.quantities import Quantity, passes, quantity, seconds, size
from iec.bench.results import Estimate, Result, Run

Tone = Literal["", "better", "worse"]


@dataclass(frozen=True)
class Cell:
    """A text, and whether it says that something became better or worse (with an interval that excludes zero)."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Row:
    """The cells of an arm; `kind` as in `iec.evaluate.arms.Arm`."""

    kind: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Heads and rows; the first column is a number, the second the arm's name, the others are numbers."""

    heads: tuple[str, ...]
    rows: tuple[Row, ...]

    def markdown(self) -> str:
        """The table for people who read text; what became better or worse is bold with a word."""
        lines = [list(self.heads), ["---:", "---", *["---:"] * (len(self.heads) - 2)]]
        for row in self.rows:
            number, name, *others = row.cells
            named = f"*{_escaped(name.text)}*" if row.kind == "control" else _escaped(name.text)
            marked = [f"**{_escaped(cell.text)}** {cell.tone}" if cell.tone else _escaped(cell.text) for cell in others]
            lines.append([number.text, named, *marked])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def members(run: Run, group: Sequence[Result]) -> list[Result]:
    """The entries to show for a group: its own, each after what it is compared with where that is in another group; references
    stand first, controls last."""
    shown: list[Result] = []

    def add(entry: Result | None) -> None:
        if entry is not None and all(entry.cell != other.cell or entry.name != other.name for other in shown):
            shown.append(entry)

    own = {entry.cell for entry in group}
    for entry in group:
        for other in (run.full(entry), run.baseline(entry)):
            if other is not None and other.cell not in own and all(other.cell != held.cell for held in shown):
                add(other)
        add(entry)
    places = {"reference": 0, "control": 2}
    return sorted(shown, key=lambda entry: places.get(entry.kind, 1))  # stable: else in their order


def quality(
    run: Run, shown: Sequence[Result], metric: str | None, only: Callable[[Result], bool] = lambda _: True
) -> Table:
    """The table of the `members` of a group by one metric (None: there is none): passes, the paper's value, ours, differences,
    time, memory, weights.

    Entries that are not `only`'s are left out, but count in the numbers of the rows.
    """
    listed = [index for index, entry in enumerate(shown) if only(entry)]
    columns = [] if metric is None else _columns(run, shown, metric)
    columns = [(head, cells) for head, cells in columns if any(cells[index].text != "–" for index in listed)]
    timed = any(entry.timing for entry in shown)
    peaks = any(entry.timing and entry.timing.peak for entry in shown)
    heads = ["", "arm", "passes", *(head for head, _ in columns)]
    heads += ["s / image"] * timed + ["peak MiB"] * peaks + ["weights MiB"]
    rows = []
    for index in listed:
        entry = shown[index]
        cells = [Cell(str(index + 1)), Cell(_named(run, entry)), Cell(passes(entry.whole, entry.reused))]
        cells += [found[index] for _, found in columns]
        if timed:
            cells.append(Cell(_time(entry)))
        if peaks:
            cells.append(Cell(size(entry.timing.peak if entry.timing else None)))
        rows.append(Row(entry.kind, (*cells, Cell(size(entry.weights)))))
    return Table(tuple(heads), tuple(rows))


def further(run: Run, shown: Sequence[Result], metrics: Sequence[str]) -> Table | None:
    """The table of a group's other metrics, each with its difference to the same arm without correction; None for none."""
    columns = [column for metric in metrics for column in _columns(run, shown, metric, full=False)]
    if not columns:
        return None
    heads = ("", "arm", *(head for head, _ in columns))
    rows = [
        Row(entry.kind, (Cell(str(index + 1)), Cell(_named(run, entry)), *(cells[index] for _, cells in columns)))
        for index, entry in enumerate(shown)
    ]
    return Table(heads, tuple(rows))


def _columns(run: Run, shown: Sequence[Result], metric: str, full: bool = True) -> list[tuple[str, list[Cell]]]:
    """Heads and cells of one metric: the paper's, ours, − without IEC, − full precision; of controls beside a single corrected
    arm, − that arm. Empty columns are left out."""
    known = quantity(metric)
    values = [entry.metrics.get(metric) for entry in shown]
    digits = known.digits(value for value in values if value is not None)
    columns = []
    papers = [entry.paper.get(metric) for entry in shown]
    if any(paper is not None for paper in papers):
        of = {entry.of for entry in shown if metric in entry.paper}
        named = of.pop() if len(of) == 1 else None
        cells = [Cell("–" if p is None else _papers(p, entry, named)) for p, entry in zip(papers, shown, strict=True)]
        columns.append((f"paper's {known.label}{f' ({named})' if named else ''}", cells))
    columns.append((known.head, [Cell(known.written(value, digits)) for value in values]))
    compared = [("− without IEC", [_difference(entry, run.baseline(entry), metric) for entry in shown])]
    if full:
        compared.append(("− full precision", [_difference(entry, run.full(entry), metric) for entry in shown]))
    corrected = [entry for entry in shown if entry.kind == "corrected"]
    if len(corrected) == 1:
        compared.append(("− with IEC", [_difference(entry, corrected[0], metric) for entry in shown]))
    for head, found in compared:
        if any(found):
            label = head if full else f"{known.label} {head}"
            columns.append((label, [_compared(known, difference) for difference in found]))
    return columns


def _named(run: Run, entry: Result) -> str:
    """The name, with the number of images where it is not that of the run: metrics of other numbers do not compare."""
    return entry.name if entry.num == run.num else f"{entry.name} ({entry.num} images)"


def _papers(value: float, entry: Result, named: str | None) -> str:
    return f"{value:g}" if named or not entry.of else f"{value:g} ({entry.of})"


def _difference(entry: Result, other: Result | None, metric: str) -> Estimate | None:
    return None if other is None else entry.differences.get(other.cell, {}).get(metric)


def _compared(known: Quantity, difference: Estimate | None) -> Cell:
    if difference is None:
        return Cell("–")
    tones: dict[int, Tone] = {1: "better", -1: "worse", 0: ""}
    return Cell(known.signed(difference, known.telling(difference)), tones[known.better(difference)])


def _time(entry: Result) -> str:
    """Median over the shards, and their range where there are several."""
    if entry.timing is None:
        return "–"
    text = seconds(entry.timing.median)
    if len(entry.timing.per_image) == 1:
        return text
    low, high = entry.timing.spread
    return f"{text} ({seconds(low)}–{seconds(high)})"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
