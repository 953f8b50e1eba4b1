"""The two consoles of the command line, and the look of its progress bars."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

stdout = Console()  # results
stderr = Console(stderr=True)  # progress and errors, so that results can be piped


def bar(note: str, transient: bool = False) -> Progress:
    """A progress bar: spinner, description, bar, done/total, `note` (a format of task fields), time that remains.

    A `transient` bar vanishes at its end, for work whose result says it all.
    """
    columns = (MofNCompleteColumn(), TextColumn(note), TimeRemainingColumn(compact=True))
    description = TextColumn("[bold]{task.description}")
    return Progress(
        SpinnerColumn(),
        description,
        BarColumn(bar_width=None),
        *columns,
        console=stderr,
        expand=True,
        transient=transient,
    )


def print_json(value: Any) -> None:
    """Print `value` as JSON that a program may read: no colour, no wrapping."""
    print(json.dumps(value, indent=2, default=str))
