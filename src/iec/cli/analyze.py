"""`iec analyze`: where the errors of a model arise, how they grow, and what a correction does to them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from iec.cli.console import bar, print_json, stderr, stdout
from iec.cli.outputs import check_folder
from iec.cli.sample import _factors


def analyze(
    model: Annotated[
        str, typer.Argument(help="A bundled model (see `iec info`), a folder, or a Hub id.", show_default=False)
    ],
    what: Annotated[
        str | None,
        typer.Option(
            metavar="KINDS",
            help="Of spectral, error, growth, split, residuals, with commas between; error and split need --quant or --cache.  "
            "[default: all that can be]",
        ),
    ] = None,
    quant: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The efficient model: quantized by this calibration.")
    ] = None,
    cache: Annotated[
        str | None, typer.Option(metavar="SPEC", help="The efficient model: cached, by deepcache:5 or cachequant.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, metavar="N", help="Number of samples.")] = 16,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the first; sample i has seed + i.")] = 0,
    num_inference_steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps of the scheduler.")] = 50,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="PLAN", help="Steps to correct: all, ends:1/10, at:0,9, ...  [default: all; of a cache, refresh]"
        ),
    ] = None,
    relax: Annotated[
        str, typer.Option(metavar="LAMBDAS", help="Relaxation factors: 0.5 | 0.5,0.5,0.5 | paper")
    ] = "0.5",
    lambdas: Annotated[
        str | None, typer.Option(metavar="LAMBDAS", help="Of spectral.  [default: 0.1,0.2,...,0.9]")
    ] = None,
    after: Annotated[
        str | None, typer.Option(metavar="STEPS", help="Of growth: inject after these.  [default: four of them]")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="NAME", help="A scheduler class of diffusers.  [default: the model's]")
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Text, for text-to-image models.")] = None,
    class_label: Annotated[int | None, typer.Option(metavar="N", help="Class, for class-conditional models.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Samples at a time.")] = 16,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, ...")] = "auto",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where numbers and pictures go.")] = Path("out/analysis"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Analyse a model: norms of its steps, errors along the trajectory, what IEC does to them. Stopped, it goes on."""
    from diffusers.utils import logging

    import iec
    from iec.analysis.reading import reading
    from iec.analysis.study import KINDS, PAIRED, analyse
    from iec.evaluate.machine import choose_device
    from iec.evaluate.sampled import equipped
    from iec.evaluate.sampling import with_scheduler

    check_folder("--out", out)
    place, steps = choose_device(device), steps or ("all" if cache is None else "refresh")
    iec.plan.parse(steps)  # a bad plan is told before a large model is loaded
    if steps == "none":
        raise ValueError("--steps none corrects nothing, and what corrections do is analysed; choose some")
    paired = quant is not None or cache is not None
    kinds = [kind for kind in KINDS if paired or kind not in PAIRED] if what is None else _kinds(what, KINDS)
    options: dict[str, Any] = {}
    if lambdas is not None:
        options["spectral"] = {"relax": _numbers(lambdas, float, "--lambdas 0.1,0.5")}
    if after is not None:
        options["growth"] = {"after": _numbers(after, int, "--after 0,10")}
    calibration = None if quant is None else iec.Calibration.load(quant)
    logging.disable_progress_bar()

    def loaded() -> Any:
        pipe = iec.load(model).to(place)
        pipe.set_progress_bar_config(disable=True)
        return pipe if scheduler is None else with_scheduler(pipe, scheduler)

    given = {"prompt": prompt, "class_labels": class_label}
    conditions = {key: value for key, value in given.items() if value is not None}
    ways = [text for text in (quant and quant.name, cache) if text]
    title = f"{Path(model).name}{''.join(f', {way}' for way in ways)}, {num_inference_steps} steps, {num} samples"
    with contextlib.ExitStack() as stack:
        stack.enter_context(_resumable(out))
        efficient = stack.enter_context(equipped(loaded(), calibration=calibration, cache=cache)) if paired else None
        shown = stack.enter_context(bar("{task.description}", transient=True))
        tasks: dict[str, Any] = {}

        def progress(kind: str, done: int, total: int) -> None:
            if kind not in tasks:
                tasks[kind] = shown.add_task(kind, total=total)
            shown.update(tasks[kind], completed=done, total=total)

        study = analyse(
            loaded(),
            efficient,
            kinds=kinds,
            num=num,
            seed=seed,
            num_inference_steps=num_inference_steps,
            batch_size=batch_size,
            correction={"steps": steps, "relax": _factors(relax)},
            options=options,
            about={"title": title, "model": model},
            folder=out,
            progress=progress,
            **conditions,
        )
    if as_json:
        print_json({kind: {"about": study.about[kind], "rows": rows} for kind, rows in study.rows.items()})
        return
    stdout.print(title, style="bold", markup=False, highlight=False)
    for line in reading(study.rows):
        stdout.print(f"• {line}", markup=False, highlight=False)
    files = "\n".join(str(out / f"{kind}.png") for kind in study.rows)
    stdout.print(f"\n{files}\nand the numbers beside each, as .csv and .json", markup=False, highlight=False)


@contextlib.contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Tell one who interrupts the work how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        stderr.print(
            f"Stopped; what is done is in {folder}. The same command goes on from there.",
            style="yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(130) from None


def _kinds(text: str, known: Sequence[str]) -> list[str]:
    """Those of --what. Raises ValueError for none, or an unknown one."""
    kinds = _listed(text)
    unknown = [kind for kind in kinds if kind not in known]
    if unknown or not kinds:
        named = ", ".join(unknown) or "nothing"
        raise ValueError(f"--what: {named} is no kind of analysis; expected some of {', '.join(known)}")
    return kinds


def _listed(text: str) -> list[str]:
    """ "a, b" as its entries."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str, kind: Callable[[str], Any], example: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(each) for each in _listed(text))
    except ValueError:
        raise ValueError(f"{text!r} is no list of numbers; expected for example {example}") from None
