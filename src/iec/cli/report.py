"""`iec report`: the report of a bench, finished or not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iec.cli.console import print_json, stdout


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder that `iec bench` wrote.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print what the report says as JSON.")] = False,
) -> None:
    """Write report.md and report.html from what a bench has finished so far."""
    from iec.bench.report import report as write

    made = write(folder)
    if as_json:
        print_json(made.plain())
        return
    for line in made.headlines:
        stdout.print(f"• {line}", markup=False, highlight=False)
    if made.run.missing:
        stdout.print(f"not finished: {len(made.run.missing)} arms are missing", style="yellow")
    stdout.print(f"{made.markdown}\n{made.html}", markup=False, highlight=False, soft_wrap=True)
