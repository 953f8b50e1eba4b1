"""`iec demo`: the same seeds sampled in several ways, as a table, a picture and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iec.cli.console import bar, print_json, stdout


def demo(
    model: Annotated[
        str, typer.Argument(help="A bundled unconditional model, a folder, or a Hub id.")
    ] = "fashion-mnist",
    num: Annotated[int, typer.Option(min=1, metavar="N", help="Number of images.")] = 16,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the first image; image i has seed + i.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images at a time.")] = 16,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the picture and the page go.")] = Path("out/demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Show what the correction does to a small efficient model: a table, a picture, a page."""
    from diffusers.utils import logging
    from rich import box
    from rich.table import Table

    from iec.bench.demo import demo as run
    from iec.bench.demo import row
    from iec.bench.page import kernels, mib, spent
    from iec.bench.reading import reading

    logging.disable_progress_bar()  # of loading, which takes no time here
    with bar("ways  {task.fields[name]}") as shown:
        task = shown.add_task("sampling", total=None, name="")

        def progress(name: str, done: int, total: int) -> None:
            shown.update(task, completed=done, total=total, name=name)

        report = run(model, num, seed, batch_size, out, progress)
    if as_json:
        print_json([row(outcome) for outcome in report.outcomes])
        return
    fid = report.outcomes[0].fid is not None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("way to sample", overflow="fold")
    for name in ("evals", "sec", "MiB", "RMSE", "PSNR", *(["FID"] if fid else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in report.outcomes:
        style = {"reference": "dim", "corrected": "bold", "control": "green"}.get(outcome.arm.kind)
        close = ("–", "–") if outcome.psnr is None else (f"{outcome.rmse:.4f}", f"{outcome.psnr:.2f}")
        last = [f"{outcome.fid:.1f}"] if fid else []
        table.add_row(
            outcome.arm.name, spent(outcome), f"{outcome.seconds:.1f}", mib(outcome), *close, *last, style=style
        )
    stdout.print(table)
    kernel = kernels(report.outcomes)
    rounds = ", which rounds floats and is slow" if kernel == "reference" else ""
    stdout.print(
        f"{num} images, the same seeds in every row. RMSE and PSNR (dB) to the fine solution in the first row. "
        "10+40r: 10 whole evaluations and 40 that reuse cached features. MiB: weights of the denoiser. "
        f"W8A8: weights and activations in 8 bits, by the kernel {kernel}{rounds}. "
        "Green rows spend as many evaluations without IEC.",
        style="dim",
    )
    for line in reading(report.outcomes):
        stdout.print(f"• {line}", highlight=False)
    stdout.print(f"\n{report.grid}\n{report.html}", markup=False, highlight=False, soft_wrap=True)
