"""`iec train`: train a bundled model, or one of your own, from a recipe."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import typer

from iec.cli.console import bar, stderr, stdout


def train(
    recipe: Annotated[str, typer.Argument(help="Name of a bundled recipe, or a .toml file.", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the dataset.  [default: $IEC_DATA/NAME, else the system's]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the run.  [default: runs/NAME]")] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    steps: Annotated[int | None, typer.Option(metavar="N", help="Optimiser steps, in place of the recipe's.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="CPU threads.  [default: torch's choice]")
    ] = None,
) -> None:
    """Train a model from a recipe: checkpointed, and resumed by the same command."""
    import torch

    from iec.train.recipe import load_recipe
    from iec.train.start import run

    if threads is not None:
        torch.set_num_threads(threads)
    chosen = load_recipe(recipe)
    if steps is not None:
        chosen = dataclasses.replace(chosen, steps=steps)
    folder = out if out is not None else Path("runs") / chosen.name

    with bar("loss {task.fields[loss]:.4f}  {task.fields[rate]:.0f} images/s") as shown:
        task = shown.add_task(chosen.name, total=chosen.steps, loss=float("nan"), rate=0.0)
        begun: list[float] = []  # steps done and the clock when the first step of this call ended

        def progress(done: int, total: int, loss: float) -> None:
            now = time.perf_counter()
            begun.extend((done, now) if not begun else ())
            rate = (done - begun[0]) * chosen.batch_size / (now - begun[1]) if done > begun[0] else 0.0
            shown.update(task, completed=done, loss=loss, rate=rate)
            if not stderr.is_terminal and (done % 100 == 0 or done == total):
                stderr.print(f"step {done} of {total}, loss {loss:.4f}, {rate:.0f} images/s")

        try:
            model = run(chosen, data=data, out=folder, device=device, progress=progress, log=shown.console.print)
        except KeyboardInterrupt:
            shown.stop()
            kept = f"the last checkpoint in {folder} is at most {chosen.checkpoint_every} steps old"
            stderr.print(f"Stopped; {kept}. The same command resumes from it.", style="yellow", soft_wrap=True)
            raise typer.Exit(130) from None
    stdout.print(f"Trained {chosen.name}: {model}", soft_wrap=True, highlight=False)
