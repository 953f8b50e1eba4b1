"""`iec evaluate`: metrics of images, or of a model that is sampled first, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from iec.cli.console import bar, print_json, stdout
from iec.cli.outputs import check_file, writing
from iec.cli.sample import _factors

_OF_SAMPLING = (
    "seed",
    "num_inference_steps",
    "steps",
    "relax",
    "quant",
    "cache",
)  # options that mean nothing for images


def evaluate(
    context: typer.Context,
    images: Annotated[
        str | None, typer.Argument(help="A folder of images or shards, .npz, .npy or .parquet.", show_default=False)
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="REF",
            help="Images to compare with, their statistics, or `fashion-mnist`.  [default: the network's own]",
        ),
    ] = None,
    network: Annotated[
        str, typer.Option(metavar="NET", help="Features: fashion-mnist, a folder, inception, inception:FILE.")
    ] = "fashion-mnist",
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Of fid,sfid,kid,is,precision,recall, rmse_T,psnr_T,ssim_T,lpips_T, clip.  [default: all but lpips]",
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="T=IMAGES", help="Images of the same seeds; repeat. With --model also just full or fine."),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="IMAGES", help="Also evaluate these, of the same seeds; show the difference.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="Prompts for clip, one a line.")] = None,
    clip_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The CLIP model.  [default: ViT-g-14/laion2b_s34b_b88k]")
    ] = None,
    num: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="The first N images.  [default: all; of a model, 500]")
    ] = None,
    draws: Annotated[int, typer.Option(min=0, metavar="N", help="Resamples for the intervals; 0: none.")] = 200,
    crop: Annotated[
        int | None, typer.Option(min=1, metavar="SIDE", help="Scale and crop the images of --against to SIDE pixels.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep statistics (.safetensors), for --against another time.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Sample this model first: a name, a folder, a Hub id.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="With --model: seed of the first image.")] = 0,
    num_inference_steps: Annotated[int, typer.Option(min=1, metavar="N", help="With --model: steps.")] = 50,
    steps: Annotated[str, typer.Option(metavar="PLAN", help="With --model: steps that IEC corrects.")] = "none",
    relax: Annotated[str, typer.Option(metavar="LAMBDAS", help="With --steps: 0.5 | 1.0,0.5 | paper")] = "0.5",
    quant: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --model: quantize by this calibration.")
    ] = None,
    cache: Annotated[str | None, typer.Option(metavar="SPEC", help="With --model: deepcache:5, cachequant.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images at a time.")] = 50,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Measure images: FID and its kin against a set of images, RMSE and its kin against images of the same seeds."""
    from iec.evaluate.evaluation import difference, evaluate_statistics, gather, plain
    from iec.evaluate.machine import choose_device
    from iec.evaluate.measures import possible
    from iec.evaluate.networks import open_network
    from iec.evaluate.references import open_reference
    from iec.evaluate.sources import as_source, open_source

    if (images is None) == (model is None):
        raise ValueError("give either images, or --model MODEL, which is sampled first")
    if model is None:
        _refuse_sampling(context)
    if draws == 1:
        raise ValueError("--draws 1: one resample tells no interval; give 2 or more, or 0 for no intervals")
    if crop is not None and against is None:
        raise ValueError("--crop scales the images of --against; give those, too")
    if save is not None:
        _check_save(save)
    place = choose_device(device)
    pairs = [_pair(text, model is not None) for text in target or []]
    others: dict[str, Any] = {name: open_source(spec) for name, spec in pairs if spec is not None}
    rival = None if baseline is None else open_source(baseline)
    source: Any = None if images is None else open_source(images)
    texts = None if prompts is None else _lines(prompts)
    features = open_network(network, place)
    own = str(features.folder) if against is None and features.folder is not None else against
    with bar("{task.fields[what]}", transient=True) as shown:

        def progress(what: str) -> Callable[..., None]:
            task = shown.add_task(what, total=None, what="images")
            return lambda done, total=None: shown.update(task, completed=done, total=total)

        told = {"crop": crop, "batch_size": batch_size}
        reference = None if own is None else open_reference(own, features, progress=progress("reference"), **told)
        found = possible(reference, [name for name, _ in pairs], texts is not None)
        chosen = found if metrics is None else tuple(dict.fromkeys(name.strip() for name in metrics.split(",")))
        if clip_model is not None and "clip" not in chosen:
            raise ValueError("--clip-model is for the metric clip; add --prompts FILE, and clip to --metrics if given")
        score = _clip(clip_model, place) if "clip" in chosen else None
        if model is not None:
            made = [name for name, spec in pairs if spec is None]
            seeds = range(seed, seed + (500 if num is None else num))
            equipment = {"steps": steps, "relax": _factors(relax), "calibration": _calibration(quant), "cache": cache}
            drawn, more = _sampled(
                model, place, seeds, num_inference_steps, batch_size, made, equipment, texts, progress
            )
            source = as_source(drawn, seed)
            others |= more
        gathered: list[Any] = []
        evaluations: list[Any] = []
        for each, name in [(source, "features")] + ([] if rival is None else [(rival, "baseline")]):
            statistics = gather(
                each,
                reference,
                features,
                chosen,
                targets={key: as_source(value) for key, value in others.items()},
                prompts=texts,
                text_score=score,
                limit=num,
                batch_size=batch_size,
                progress=progress(name),
                rivals=None if rival is None or name == "baseline" else {"baseline": rival},
            )
            gathered.append(statistics)
            # What was not asked for by name is left out where it cannot be had; of the baseline, what the images have.
            wanted, left_out = (evaluations[0].metrics, False) if evaluations else (chosen, metrics is None)
            evaluations.append(
                evaluate_statistics(statistics, reference, tuple(wanted), draws=draws, leave_out=left_out)
            )
    gaps = None if rival is None else difference(*evaluations)
    title = source.name if model is None else model
    scored = None if score is None else score.name
    if as_json:
        about = {"images": title, **evaluations[0].plain(), "clip_model": scored}
        if gaps is not None:
            about |= {"baseline": baseline, "difference": {name: plain(interval) for name, interval in gaps.items()}}
        print_json(about)
    else:
        _show(title, evaluations[0], gaps, scored, baseline)
    if save is not None:  # after the numbers are shown, as the disk may be full by now
        with writing(save):
            gathered[0].save(save)


def _refuse_sampling(context: typer.Context) -> None:
    """Raise ValueError for options of sampling, which mean nothing for images that are there."""
    given = []
    for name in _OF_SAMPLING:
        origin = context.get_parameter_source(name)
        given += [f"--{name.replace('_', '-')}"] if origin is not None and origin.name == "COMMANDLINE" else []
    if given:
        raise ValueError(
            f"{', '.join(given)}: for a model that is sampled first; give --model MODEL in place of images"
        )


def _check_save(file: Path) -> None:
    """Raise ValueError unless statistics can be kept as `file`, and found again by --against."""
    if file.suffix != ".safetensors":
        raise ValueError(f"--save {file}: statistics are kept as .safetensors; give {file.with_suffix('.safetensors')}")
    check_file("--save", file)


def _pair(text: str, sampled: bool) -> tuple[str, str | None]:
    """ "fine=DIR" as its two halves; "fine" alone, for one that is sampled."""
    name, sign, spec = text.partition("=")
    if not name or (sign and not spec) or (not sign and not sampled):
        raise ValueError(
            f"--target {text}: expected NAME=IMAGES, such as fine=out/fine (with --model, also just fine or full)"
        )
    return name, spec if sign else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()  # line i is image i's, as `iec sample` reads it
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {file}: no text in UTF-8: {error}") from error
    except OSError as error:
        raise ValueError(
            f"--prompts {file}: cannot be read ({error.strerror}); expected a text file, line i for image i"
        ) from error


def _clip(name: str | None, device: str) -> Any:
    from iec.evaluate.clip import PAPER, ClipScore

    return ClipScore(PAPER if name is None else name, device)


def _calibration(folder: Path | None) -> Any:
    import iec

    return None if folder is None else iec.Calibration.load(folder)


def _sampled(
    model: str,
    place: str,
    seeds: range,
    steps: int,
    batch_size: int,
    targets: list[str],
    equipment: Mapping[str, Any],
    texts: list[str] | None,
    progress: Callable[[str], Callable[..., None]],
) -> tuple[Any, dict[str, Any]]:
    from diffusers.utils import logging

    import iec
    from iec.evaluate.sampled import sampled

    logging.disable_progress_bar()
    pipe = iec.load(model).to(place)
    pipe.set_progress_bar_config(disable=True)
    conditions = {} if texts is None else {"prompt": texts[: len(seeds)]}
    return sampled(
        pipe, seeds, steps, batch_size, targets=targets, progress=progress, equipment=equipment, **conditions
    )


def _show(title: str, evaluation: Any, gaps: Any, clip_model: str | None, baseline: str | None) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("95 % interval", no_wrap=True)
    if gaps is not None:
        table.add_column("less baseline", justify="right", no_wrap=True)
        table.add_column("95 % interval", no_wrap=True)
    for name, interval in evaluation.metrics.items():
        cells = [name.replace("_", " to "), *_cells(interval)]
        table.add_row(*cells, *([] if gaps is None else _cells(gaps[name])))
    stdout.print(table)
    stdout.print("; ".join(_notes(title, evaluation, clip_model, baseline)) + ".", style="dim", markup=False)
    for why in evaluation.left_out.values():
        stdout.print(f"Left out: {why}.", style="yellow", markup=False, highlight=False)


def _notes(title: str, evaluation: Any, clip_model: str | None, baseline: str | None) -> list[str]:
    """What the numbers are of, as far as it belongs to these."""
    from iec.evaluate.measures import of_reference, of_sets

    metrics = list(evaluation.metrics)
    notes = [f"{evaluation.count} {'image' if evaluation.count == 1 else 'images'} of {title}"]
    for target, count in evaluation.pairs.items():
        notes += [] if count == evaluation.count else [f"compared with {target}: {count} of {evaluation.count} images"]
    notes += [f"features of {evaluation.network}"] if of_sets(metrics) else []
    notes += [f"against {evaluation.references['data']}"] if of_reference(metrics) else []
    notes += [] if clip_model is None else [f"clip by {clip_model}"]
    notes += [] if baseline is None else [f"baseline {baseline}, the same seeds, paired"]
    if {"fid", "sfid"} & set(metrics):
        notes[-1] += ". FID is biased for few images: compare equal counts only"
    return notes


def _cells(interval: Any) -> list[str]:
    """The value and its interval, with as many digits as the interval can use."""
    width = abs(interval.high - interval.low)
    scale = width if math.isfinite(width) and width > 0 else abs(interval.value)
    digits = 4 if not math.isfinite(scale) or scale == 0 else min(8, max(0, 1 - math.floor(math.log10(scale))))
    shown = [f"{value:.{digits}f}" for value in (interval.value, interval.low, interval.high)]
    return [shown[0], "" if math.isnan(interval.low) else f"{shown[1]} … {shown[2]}"]
