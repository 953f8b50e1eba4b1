"""The application: its commands, and how errors, warnings and interruptions are shown."""

from __future__ import annotations

import errno
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from iec.cli import analyze, bench, calibrate, demo, evaluate, info, report, sample, train
from iec.cli.console import stderr

# What the package raises for wrong input or a missing thing, and what the system says of files; all else is a fault of ours
# and shows its traceback.
_EXPECTED = (ValueError, TypeError, RuntimeError, ImportError, OSError)
_PLAIN = (TypeError, RuntimeError, ImportError, OSError)  # these very classes; theirs below are others' and are named
_SAID = {
    errno.ENOENT: "no such file or folder; give one that is there",
    errno.EISDIR: "a folder, where a file is needed; give a file",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another place",
    errno.EEXIST: "a file stands where a folder is needed; choose another place",
    errno.EACCES: "no permission; choose another place, or ask for it",
    errno.EPERM: "no permission; choose another place, or ask for it",
    errno.EROFS: "can only be read; choose another place",
    errno.ENOSPC: "the disk is full; make room, then give the same command again",
    errno.EDQUOT: "the disk is full; make room, then give the same command again",
}


class _Group(TyperGroup):
    """Shows expected errors and warnings as one line each, and takes --debug at any place of the command line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--debug" in args:
            args = ["--debug", *(arg for arg in args if arg != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        if ctx.params.get("debug"):
            return super().invoke(ctx)
        try:
            with warnings.catch_warnings():  # which also puts back what shows them
                warnings.showwarning = _warn
                return super().invoke(ctx)
        except _EXPECTED as error:
            # The shell's own exceptions (exit codes, usage errors) are RuntimeErrors too; so is a closed pipe its own matter.
            if type(error).__module__.startswith(("typer", "click")) or isinstance(error, BrokenPipeError):
                raise
            _say(f"error: {_told(error)}", "bold red")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            _say("Stopped.", "yellow")
            raise typer.Exit(130) from None


def _say(text: str, style: str) -> None:
    stderr.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _warn(message: Warning | str, *_: object) -> None:
    """In place of `warnings.showwarning`, which shows a line of our source beside it."""
    _say(f"warning: {message}", "yellow")


def _told(error: BaseException) -> str:
    """What an error says, after the name of its class where that tells something that the message does not."""
    if isinstance(error, OSError) and error.errno in _SAID:
        file = error.filename2 or error.filename  # of a renaming the second, as the first is a temporary one
        return f"{file}: {_SAID[error.errno]}" if file else _SAID[error.errno]
    ours = type(error).__module__.partition(".")[0] == "iec"
    named = not (ours or type(error) in _PLAIN or isinstance(error, (ValueError, FileNotFoundError)))
    return f"{type(error).__name__}: {error}" if named else str(error)


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
