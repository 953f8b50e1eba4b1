"""`iec sample --shards`: many images by many workers, kept in shards."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from iec.cli.console import bar, print_json, stderr, stdout
from iec.cli.outputs import writing

SHOWN = 64  # images of the grid


@dataclass(frozen=True)
class Request:
    """What is asked for: images of which seeds, and where they go."""

    model: str
    num: int
    seed: int
    folder: Path
    size: int
    out: Path
    columns: int | None
    save_images: Path | None
    as_json: bool


def into_shards(
    request: Request, arm: dict[str, Any], calibration: Path | None, sampling: dict[str, Any], work: dict[str, Any]
) -> None:
    """Make the images that are missing, and show what there is."""
    from iec.bench.identity import model_identity
    from iec.bench.specs import ModelSpec
    from iec.evaluate.arms import Arm
    from iec.evaluate.scale import Sampling, sample_shards

    chosen = Arm.of({**arm, "quant": _field(calibration)})
    started = time.perf_counter()
    with bar("", transient=True) as shown:
        task = shown.add_task("sampling", total=request.num)

        def lost(message: str) -> None:
            shown.console.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)

        try:
            result = sample_shards(
                Sampling(chosen, request.model, **sampling),
                request.folder,
                request.num,
                model=model_identity(ModelSpec(request.model)),
                seed=request.seed,
                size=request.size,
                calibration=calibration,
                progress=lambda done, _: shown.update(task, completed=done),
                lost=lost,
                **work,
            )
        except KeyboardInterrupt:
            shown.stop()
            stderr.print(
                f"Stopped. The same command goes on from what is in {request.folder}.", style="yellow", soft_wrap=True
            )
            raise typer.Exit(130) from None
    seconds = time.perf_counter() - started
    _save(result.shards, request)
    total = len(result.shards.shards())
    told = {
        "model": request.model,
        "arm": chosen.plain(),
        "seeds": [request.seed, request.seed + request.num - 1],
        "shards": str(request.folder),
        "made": result.made,
        "kept": total - result.made,
        "evaluations": result.evaluations,
        "reused": result.reused,
        "seconds": round(seconds, 3),
        "seconds_of_shards": [round(each, 3) for each in result.seconds],
        "peak_memory": result.peak_memory,
        "out": str(request.out),
    }
    if request.as_json:
        print_json(told)
        return
    kept = f" ({total - result.made} of them there before)" if total > result.made else ""
    counted = f"{request.num} images in {total} shards{kept}, {result.evaluations} evaluations, {seconds:.1f} s"
    stdout.print(f"{counted}\n{request.folder}\n{request.out}", markup=False, highlight=False, soft_wrap=True)


def _field(calibration: Path | None) -> str | None:
    """The field of --quant DIR, as arms name it; None if nothing is quantized."""
    import iec

    quant = None if calibration is None else iec.Calibration.load(calibration).quant
    return None if quant is None else f"w{quant.config['weight_bits']}a{quant.config['act_bits']}"


def _save(shards: Any, request: Request) -> None:
    """The grid, and each image if wanted, with one shard in memory at a time."""
    import torch

    from iec.evaluate.images import save_each, save_grid

    first: list[Any] = []
    for start, arrays in shards.parts():
        images = torch.from_numpy(arrays["images"])
        first += list(images[: max(0, SHOWN - start)])
        if request.save_images is not None:
            with writing(request.save_images):
                save_each(images, request.save_images, shards.seeds(start))
    with writing(request.out):
        save_grid(torch.stack(first), request.out, request.columns)
