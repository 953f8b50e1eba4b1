"""`iec info`: what is installed, what the machine can do, what a folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from iec.cli.console import print_json, stdout


def info(
    folder: Annotated[
        Path | None, typer.Argument(help="A folder to look into: a model, a run, ...", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show versions, bundled models and the machine; or what a folder holds."""
    about = _folder(folder) if folder is not None else _everything()
    if as_json:
        print_json(about)
        return
    for title, part in about.items():
        stdout.print(_table(title, part))


def _folder(folder: Path) -> dict[str, Any]:
    from iec.artifact.describe import describe

    return {"folder": describe(folder)}


def _everything() -> dict[str, Any]:
    import iec
    from iec.artifact.describe import bundled
    from iec.evaluate.machine import machine, versions

    models = {name: {k: v for k, v in about.items() if k != "folder"} for name, about in bundled().items()}
    return {"versions": {"iec": iec.__version__, **versions()}, "models": models, "machine": machine()}


def _table(title: str, part: Mapping[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 1))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in part.items():
        table.add_row(escape(key), escape(_text(value)))  # a prompt may hold [brackets]
    return table


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {_text(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
