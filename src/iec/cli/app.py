"""The application: its commands, and how errors and interruptions are shown."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from iec.cli import analyze, bench, calibrate, demo, evaluate, info, report, sample, train
from iec.cli.console import stderr

# What the package raises for wrong input or a missing thing; all else is a fault of ours and shows its traceback.
_EXPECTED = (ValueError, TypeError, RuntimeError, FileNotFoundError, ImportError)


class _Group(TyperGroup):
    """Shows expected errors as one line, and takes --debug at any place of the command line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--debug" in args:
            args = ["--debug", *(arg for arg in args if arg != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _EXPECTED as error:
            # The shell's own exceptions (exit codes, usage errors) are RuntimeErrors too.
            if ctx.params.get("debug") or type(error).__module__.startswith(("typer", "click")):
                raise
            kind = "" if isinstance(error, (ValueError, FileNotFoundError)) else f"{type(error).__name__}: "
            stderr.print(f"error: {kind}{error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")


def _version(wanted: bool) -> None:
    if wanted:
        import iec

        typer.echo(iec.__version__)
        raise typer.Exit


@app.callback()
def _iec(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Better pictures from efficient diffusion models, by Iterative Error Correction."""


app.command("demo")(demo.demo)
app.command("sample")(sample.sample)
app.command("calibrate")(calibrate.calibrate)
app.command("evaluate")(evaluate.evaluate)
app.command("analyze")(analyze.analyze)
app.command("train")(train.train)
app.command("bench")(bench.bench)
app.command("report")(report.report)
app.command("info")(info.info)


def main() -> None:
    """Entry point of the `iec` command."""
    app()
