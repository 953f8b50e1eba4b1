"""`iec bench`: run a recipe, a table or a figure of the paper, to its report; the same command goes on where it was stopped."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from iec.cli.console import print_json, stderr, stdout

if TYPE_CHECKING:
    from rich.table import Table

    from iec.bench.board import Board

_STYLES = {"reference": "dim", "corrected": "bold", "control": "green"}


def bench(
    recipe: Annotated[str, typer.Argument(help="A .toml file, or the name of a bundled recipe.", show_default=False)],
    quick: Annotated[bool, typer.Option("--quick", help="The recipe's small version, of a few minutes.")] = False,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also what else the same evaluations buy: more steps, other solvers, ...")
    ] = False,
    stand_in: Annotated[
        bool, typer.Option("--stand-in", help="A small random model of the same architecture, to try the recipe.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the run.  [default: out/bench/NAME, -quick, ...]")
    ] = None,
    reuse: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Take what another run has made already; may be given several times."),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Only the groups of arms so named (*, ?); may be given several times."),
    ] = None,
    num: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Images of each arm.  [default: the recipe's]")
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="At the end time all arms in so many rounds, in turns, nothing beside."),
    ] = 0,
    workers: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Processes; 0: this one.  [default: one per core]")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Threads of each, by which results may round.  [default: the recipe's]"),
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Workers on Ray: local, auto, HOST:PORT, ray://HOST:PORT.")
    ] = None,
    gpus: Annotated[float, typer.Option(min=0, max=1, metavar="X", help="Share of a GPU for each worker.")] = 0.0,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda, ...  [default: the recipe's]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the report says as JSON.")] = False,
) -> None:
    """Run a recipe: every arm on the same seeds, its metrics with intervals, its costs, a report."""
    from iec.bench.board import Board
    from iec.bench.recipe import load_recipe
    from iec.bench.runner import Workers
    from iec.bench.runner import bench as run

    chosen = load_recipe(
        recipe,
        quick=quick,
        stand_in=stand_in,
        controls=controls,
        groups=group or (),
        num=num,
        threads=threads,
        device=device,
    )
    folder = out if out is not None else Path("out/bench") / _folder(recipe, quick, stand_in, controls)
    board = Board()
    try:
        with _shown(board):
            command = ["iec", *sys.argv[1:]]
            how = Workers(workers, ray, gpus)
            outcome = run(chosen, folder, workers=how, reused=reuse or (), rounds=rounds, command=command, board=board)
    except KeyboardInterrupt:
        stderr.print(f"Stopped; what is done is in {folder}. The same command goes on from there.", style="yellow")
        raise typer.Exit(130) from None
    if as_json:
        print_json({**outcome.report.plain(), "failed": outcome.failed})
    else:
        for line in outcome.report.headlines:
            stdout.print(f"• {line}", markup=False, highlight=False)
        stdout.print(f"\n{outcome.report.markdown}\n{outcome.report.html}", highlight=False, soft_wrap=True)
    if outcome.failed:
        for name, why in outcome.failed.items():
            stderr.print(f"failed: {name}: {why}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        stderr.print("All else is kept; the same command tries these again.", style="yellow")
        raise typer.Exit(1)


def _folder(recipe: str, quick: bool, stand_in: bool, controls: bool) -> str:
    """The name of a run's folder: each way to run a recipe has its own."""
    flags = {"quick": quick, "stand-in": stand_in, "controls": controls}
    return "-".join([Path(recipe).stem if recipe.endswith(".toml") else recipe, *(n for n, on in flags.items() if on)])


@contextlib.contextmanager
def _shown(board: Board) -> Iterator[None]:
    """A table that is drawn anew while the bench runs; lines where there is no terminal."""
    if not stderr.is_terminal:
        board.told = lambda text: stderr.print(text, markup=False, highlight=False, soft_wrap=True)
        board.changed = _Lines(board).tell
        yield
        return
    from rich.live import Live

    with Live(
        get_renderable=lambda: drawn(board, stderr.height), console=stderr, refresh_per_second=4, transient=True
    ) as live:
        board.told = lambda text: live.console.print(text, markup=False, highlight=False, soft_wrap=True, style="dim")
        yield


class _Lines:
    """A line for each cell that has come to another point; one for all that were done before."""

    def __init__(self, board: Board) -> None:
        self._board, self._states = board, {}

    def tell(self) -> None:
        standings, done = self._board.standings, f"{self._board.done} of {len(self._board.standings)} done"
        if not self._states and self._board.done:
            stderr.print(f"{done} already", markup=False, highlight=False)
            self._states = {cell: "done" for cell, standing in standings.items() if standing.state == "done"}
        for cell, standing in standings.items():
            before, self._states[cell] = self._states.get(cell), standing.state
            if standing.state in ("waits", "measures", "failed", before):
                continue
            counted = f", {_number(standing.evaluations)} evaluations, {_seconds(standing.seconds)} s an image"
            told = f"{standing.name}: {standing.state}" + (f"{counted} ({done})" if standing.state == "done" else "")
            stderr.print(told, markup=False, highlight=False, soft_wrap=True)


def drawn(board: Board, height: int) -> Table:
    """How far the run is, as a table of at most `height` lines; arms that have no room are counted."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    table.add_column("arm", overflow="ellipsis", no_wrap=True, ratio=1)
    table.add_column("state", no_wrap=True)
    for head in ("images", "evals", "s/image"):
        table.add_column(head, justify="right", no_wrap=True)
    room = max(3, height - 6)
    shown = _fitting(list(board.standings.values()), room)
    for standing in shown:
        colour = {"failed": "red", "done": "green"}.get(standing.state, "")
        state: Any = f"[{colour}]{standing.state}[/]" if colour else standing.state
        table.add_row(
            f"[{_STYLES.get(standing.kind, 'none')}]{_escaped(standing.name)}[/]",
            state,
            f"{standing.images}/{standing.num}",
            _number(standing.evaluations),
            _seconds(standing.seconds),
        )
    hidden = len(board.standings) - len(shown)
    table.caption = f"{board.done} of {len(board.standings)} arms done" + (f", {hidden} not shown" if hidden else "")
    return table


def _fitting(standings: list[Any], room: int) -> list[Any]:
    """Those to show in `room` lines: the last that are done, what is at work, the next that wait."""
    first = next((i for i, standing in enumerate(standings) if standing.state != "done"), len(standings))
    begin = max(0, min(first - room // 3, len(standings) - room))
    return standings[begin : begin + room]


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
