"""`iec calibrate`: a calibration of a model for quantized or cached sampling, in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from iec.cli.console import bar, print_json, stderr, stdout

CHECKPOINT = "unfinished.safetensors"  # in the folder, until the calibration is done


def calibrate(
    model: Annotated[
        str, typer.Argument(help="A bundled model (see `iec info`), a folder, or a Hub id.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the calibration goes.", show_default=False)],
    weight_bits: Annotated[
        int | None, typer.Option(min=2, max=8, metavar="N", help="Bits of the weights.  [default: 8]")
    ] = None,
    act_bits: Annotated[
        int | None, typer.Option(min=2, max=8, metavar="N", help="Bits of the activations.  [default: 8]")
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Layers to quantize, as `down_blocks.*` or `!mid_block.*`; repeat.  [default: all]"
        ),
    ] = None,
    reconstruct: Annotated[
        str, typer.Option(metavar="UNIT", help="Learn the rounding of the weights: none, layer or block.")
    ] = "none",
    iters: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Reconstruction: optimiser steps for each unit.")
    ] = None,
    tuples: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Reconstruction: how many inputs are kept.")
    ] = None,
    no_quant: Annotated[bool, typer.Option("--no-quant", help="Do not quantize; plan the --cache alone.")] = False,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Also plan a cache: cachequant:5, cachequant:5,branch=0, ... (the options of iec.CacheQuant).",
        ),
    ] = None,
    num_inference_steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="Steps of the scheduler, the same as when sampling.")
    ] = 50,
    num_samples: Annotated[int, typer.Option(min=1, metavar="N", help="Samples to observe.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Samples at a time.")] = 16,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the first; sample i has seed + i.")] = 0,
    scheduler: Annotated[
        str | None, typer.Option(metavar="NAME", help="A scheduler class of diffusers.  [default: the model's]")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Text, for text-to-image models; repeat: taken in turns."),
    ] = None,
    class_label: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Class, for class-conditional models; repeat: taken in turns."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print what `iec info DIR --json` prints.")] = False,
) -> None:
    """Calibrate a model for quantized or cached sampling. Stopped, it goes on where it was: by the same command."""
    from diffusers.utils import logging

    import iec
    from iec.artifact.describe import describe
    from iec.evaluate.machine import choose_device
    from iec.evaluate.sampling import with_scheduler

    place, planned, learned = choose_device(device), _cache(cache), None
    if no_quant:
        if planned is None:
            raise ValueError("--no-quant leaves nothing to calibrate; add --cache cachequant:5")
        of_quant = (weight_bits, act_bits, layers or None, iters, tuples)
        if reconstruct != "none" or any(option is not None for option in of_quant):
            raise ValueError(
                "--no-quant leaves out what --weight-bits, --act-bits, --layers, --reconstruct, --iters and --tuples are of; "
                "give one or the other"
            )
    config = None if no_quant else _config(weight_bits, act_bits, layers)
    if reconstruct != "none":
        given = {"unit": reconstruct, "iters": iters, "num_tuples": tuples}
        learned = iec.Reconstruction(**{key: value for key, value in given.items() if value is not None})
    elif iters is not None or tuples is not None:
        raise ValueError("--iters and --tuples are of the reconstruction; add --reconstruct block (or layer)")
    if out.is_dir() and (out / "calibration.json").exists():
        raise ValueError(f"{out} holds a calibration already; choose another folder, or delete it")

    logging.disable_progress_bar()  # ours says what matters
    pipe = iec.load(model).to(place)
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe = with_scheduler(pipe, scheduler)
    conditions = {
        key: [values[i % len(values)] for i in range(num_samples)] if len(values) > 1 else values[0]
        for key, values in (("prompt", prompt), ("class_labels", class_label))
        if values
    }
    out.mkdir(parents=True, exist_ok=True)

    with bar("", transient=True) as shown:
        first = "samples" if planned is None else "features"
        tasks: dict[str, Any] = {first: shown.add_task(first, total=num_samples)}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done, total=total)
            if not stderr.is_terminal:
                stderr.print(f"{what}: {done} of {total}", highlight=False)

        try:
            calibration = iec.calibrate(
                pipe,
                config,
                planned,
                reconstruct=learned,
                num_inference_steps=num_inference_steps,
                num_samples=num_samples,
                batch_size=batch_size,
                seed=seed,
                checkpoint_path=out / CHECKPOINT,
                progress=progress,
                **conditions,
            )
        except KeyboardInterrupt:
            shown.stop()
            stderr.print("Stopped. The same command goes on after the last batch that was done.", style="yellow")
            raise typer.Exit(130) from None
    calibration.save(out)
    (out / CHECKPOINT).unlink(missing_ok=True)
    about = describe(out)
    if as_json:
        print_json({"folder": about})
        return
    stdout.print(_short(about), markup=False, highlight=False, soft_wrap=True)


def _config(weight_bits: int | None, act_bits: int | None, layers: list[str] | None) -> Any:
    """The options that were given; the others have the defaults of `iec.QuantConfig`."""
    import iec

    given = {"weight_bits": weight_bits, "act_bits": act_bits, "layers": layers or None}
    return iec.QuantConfig(**{key: value for key, value in given.items() if value is not None})


def _cache(text: str | None) -> Any:
    """The cache that is to be calibrated, if any."""
    import iec
    from iec.caches.spelling import parse

    planned = None if text is None else parse(text)
    if planned is not None and not isinstance(planned, iec.CacheQuant):
        raise ValueError(
            f"--cache {text}: this cache needs no calibration, give it to `iec sample`; to plan one, use cachequant"
        )
    return planned


def _short(about: dict[str, Any]) -> str:
    """A few lines of what `iec info` tells of the folder."""
    lines = []
    if about["quantization"] != "none":
        bits = f"W{about['quantization']['weight_bits']}A{about['quantization']['act_bits']}"
        bits += ", reconstructed," if about["reconstruction"] != "none" else ""
        part = f"{about['weight_bytes'] / 2**20:.2f} MiB of weights for {about['float_bytes'] / 2**20:.2f} MiB"
        skipped = f", {len(about['skipped'])} skipped" if about["skipped"] else ""
        lines.append(f"{bits} of {about['pipeline']}: {about['layers']} layers{skipped}, {part}")
    if about["cache"] != "none":
        lines.append(f"cache of {about['pipeline']}: branch {about['cache']['branch']}, {about['cache']['plan']}")
    lines.append(f"for {about['steps']} steps of {about['scheduler']}, from {about['samples']} samples")
    return "\n".join([*lines, about["folder"]])
