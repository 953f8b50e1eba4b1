"""`iec sample`: images of a model, each from its own seed, as one grid."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from iec.cli.console import bar, print_json, stderr, stdout
from iec.cli.outputs import check_file, check_folder, writing
from iec.cli.shards import Request, into_shards


def _factors(text: str) -> str | tuple[float, ...]:
    """ "0.5" or "1.0,0.5" as numbers; anything else is the name of a preset."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return text


def sample(
    model: Annotated[
        str, typer.Argument(help="A bundled model (see `iec info`), a folder, or a Hub id.", show_default=False)
    ],
    num: Annotated[int, typer.Option(min=1, metavar="N", help="Number of images.")] = 16,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the first image; image i has seed + i.")] = 0,
    num_inference_steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps of the scheduler.")] = 50,
    steps: Annotated[
        str, typer.Option(metavar="PLAN", help="Steps to correct: none, all, ends:1/10, at:0,9, refresh, ...")
    ] = "none",
    relax: Annotated[
        str, typer.Option(metavar="LAMBDAS", help="Relaxation factors, or a preset: 0.5 | 1.0,0.5 | paper")
    ] = "0.5",
    tol: Annotated[
        float | None,
        typer.Option(metavar="X", help="Relative residual below which a sample is left alone.  [default: never]"),
    ] = None,
    probe: Annotated[
        str, typer.Option(metavar="PLACE", help="Where corrections evaluate: estimate (IEC), next, start, start:RHO.")
    ] = "estimate",
    quant: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Quantize by this calibration, see `iec calibrate`.")
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --quant: reference, onednn, cuda.  [default: the fastest here]"),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Cache features: deepcache:5, deepcache:5,branch=0, ... (the options of iec.DeepCache); "
            "or cachequant, by the plan in --quant DIR.",
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A scheduler class of diffusers, or ours.  [default: the model's]"),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text, for text-to-image models; @FILE: line i for image i.")
    ] = None,
    class_label: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Class, for class-conditional models; each:N: N images of each class; random:N: one of N classes.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images at a time.")] = 16,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, ...")] = "auto",
    out: Annotated[Path, typer.Option(metavar="FILE", help="The grid, a PNG file.")] = Path("out/samples.png"),
    columns: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Columns of the grid.  [default: about square]")
    ] = None,
    save_images: Annotated[Path | None, typer.Option(metavar="DIR", help="Also save each image, as SEED.png.")] = None,
    shards: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the images in shards there; the same command goes on where it was killed. The grid has the first 64.",
        ),
    ] = None,
    shard_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --shards: images of each.  [default: 50]")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="With --shards: processes, or Ray workers, at a time; 0: this process.  [default: 1; with --ray all there "
            "is room for]",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --shards: CPU threads of a worker.  [default: 1]")
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(min=0, max=1, metavar="X", help="With --shards: the share of a GPU that a worker takes."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="With --shards: the workers of this Ray cluster, or local, for one here."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Sample images, plain, quantized, cached or corrected by IEC, into one grid."""
    from diffusers.utils import logging

    import iec
    from iec.evaluate.images import save_each, save_grid
    from iec.evaluate.machine import choose_device
    from iec.evaluate.sampling import measure, with_scheduler
    from iec.evaluate.sampling import sample as sample_images

    check_file("--out", out)
    for option, folder in (("--save-images", save_images), ("--shards", shards)):
        if folder is not None:
            check_folder(option, folder)
    # What the machines of a Ray cluster have, this one need not have.
    place, factors = device if ray is not None else choose_device(device), _factors(relax)
    iec.plan.parse(steps), iec.plan.parse_probe(probe)  # what is bad is told before a large model is loaded
    conditions = _conditions(prompt, class_label, seed)
    if shards is None:
        of_shards = {"shard-size": shard_size, "workers": workers, "threads": threads, "gpus": gpus, "ray": ray}
        given = [f"--{name}" for name, value in of_shards.items() if value is not None]
        if given:
            raise ValueError(f"{', '.join(given)}: for images in shards; add --shards DIR")
    if kernel is not None and quant is None:
        raise ValueError("--kernel chooses how a quantized model is computed; add --quant DIR")
    calibration = iec.Calibration.load(quant) if quant is not None else None
    cached = _cache(cache, calibration, quant)
    if calibration is not None and calibration.quant is None and (kernel is not None or not _is_planned(cached)):
        raise ValueError(f"{quant} holds no quantization; its cache is used by --cache cachequant, without --kernel")
    if shards is not None:
        arm = {"num_inference_steps": num_inference_steps, "scheduler": scheduler, "cache": cached}
        arm |= {"steps": steps, "relax": factors, "tol": tol, "probe": probe}
        into_shards(
            Request(model, num, seed, shards, shard_size or 50, out, columns, save_images, as_json),
            arm,
            calibration=quant,
            sampling={"batch_size": batch_size, "conditions": conditions, "device": place, "kernel": kernel or "auto"},
            work={"workers": workers, "threads": threads or 1, "ray": ray, "gpus": gpus or 0.0},
        )
        return
    logging.disable_progress_bar()  # ours says what matters
    pipe = iec.load(model).to(place)
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe = with_scheduler(pipe, scheduler)
    if cached is not None:  # before quantization, which gives away the weights that a calibration is compared with
        iec.cache(pipe, cached, calibration if _is_planned(cached) else None)
    if calibration is not None and calibration.quant is not None:
        iec.quantize(pipe, calibration, kernel=kernel if kernel is not None else "auto", keep_float=False)
    if steps != "none":
        iec.enable(pipe, steps=steps, relax=factors, tol=tol, probe=probe)

    seeds = range(seed, seed + num)
    try:
        with bar("images  {task.fields[evaluations]} evaluations", transient=True) as shown, measure(pipe) as cost:
            task = shown.add_task("sampling", total=num, evaluations=0)

            def progress(done: int, _: int) -> None:
                shown.update(task, completed=done, evaluations=cost.evaluations)

            images = sample_images(
                pipe, seeds, num_inference_steps, batch_size, progress=progress, **conditions.of(range(num))
            )
    except KeyboardInterrupt:
        stderr.print("Stopped; nothing is kept. With --shards DIR images are kept as they come.", style="yellow")
        raise typer.Exit(130) from None

    with writing(out):
        save_grid(images, out, columns)
    if save_images is not None:
        with writing(save_images):
            save_each(images, save_images, seeds)
    batches = -(-num // batch_size)
    summary = iec.summary(pipe)
    if as_json:
        print_json(
            {
                "model": model,
                "scheduler": summary.scheduler,
                "seeds": [seed, seed + num - 1],
                "num_inference_steps": num_inference_steps,
                "evaluations": cost.evaluations,
                "batches": batches,
                "seconds": round(cost.seconds, 3),
                "out": str(out),
                "quant": summary.quant,
                "cache": summary.cache,
                "refreshed": summary.refreshed,
                "reused": summary.reused,
                "iec": summary.as_dict() if steps != "none" else None,
            }
        )
        return
    per_batch = f" = {batches} batches of {cost.evaluations / batches:g}" if batches > 1 else ""
    last = f"the last of {batches} batches"  # a summary is of one run
    beside = [] if summary.quant is None else [summary.quant]
    if summary.cache is not None:
        passes = f"{summary.refreshed} whole passes, {summary.reused} reused"
        beside.append(f"{summary.cache}: {passes}" + (f" in {last}" if batches > 1 else ""))
    corrected = [f"Of {last}:", str(summary)] if batches > 1 else [str(summary)]
    for line in corrected if steps != "none" else beside:
        stdout.print(line, markup=False, highlight=False, soft_wrap=True)
    counted = f"{num} images, {cost.evaluations} evaluations{per_batch}, {cost.seconds:.1f} s"
    stdout.print(f"{counted}\n{out}", markup=False, highlight=False, soft_wrap=True)


def _conditions(prompt: str | None, class_label: str | None, seed: int) -> Any:
    """Those of --prompt and --class-label."""
    from iec.evaluate.conditions import Conditions

    given: dict[str, Any] = {}
    if prompt is not None:
        given["prompt"] = {"file": prompt[1:]} if prompt.startswith("@") else prompt
    if class_label is not None:
        rule, _, count = class_label.rpartition(":")
        if rule not in ("", "each", "random") or not count.isdecimal():
            raise ValueError(f"--class-label is {class_label!r}, expected a number, each:N or random:N")
        given["class_labels"] = {rule: int(count)} if rule else int(count)
    return Conditions(given, seed)


def _cache(text: str | None, calibration: Any, folder: Path | None) -> Any:
    """The cache of --cache; what a `cachequant` does not say is as it was calibrated."""
    from iec.caches.spelling import parse

    if text is None:
        return None
    tables = None if calibration is None else calibration.cache
    made = parse(text, None if tables is None else tables.config)
    if _is_planned(made) and tables is None:
        missing = "add --quant DIR" if calibration is None else f"{folder} holds none: calibrate with --cache {text}"
        raise ValueError(f"--cache {text} takes its plan from a calibration; {missing}")
    return made


def _is_planned(cached: Any) -> bool:
    """Whether a cache is one of a calibration."""
    import iec

    return isinstance(cached, iec.CacheQuant)
