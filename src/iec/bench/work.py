"""What the workers of a bench do: make a calibration, sample a shard, see what it leaves behind for the metrics, analyse.

Each is a task of `iec.evaluate.workers`: a function of plain arguments and files, whose result the driver keeps.
"""

from __future__ import annotations

import contextlib
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iec.artifact.calibration import Calibration
from iec.bench.folder import folder_files
from iec.bench.measure import network_of
from iec.calibration.calibrate import calibrate
from iec.evaluate import scale
from iec.evaluate.arms import Arm, calibration_options, prepared, rescheduled
from iec.evaluate.gathering import statistics_of
from iec.evaluate.held import HELD, Held
from iec.evaluate.machine import choose_device
from iec.pipeline.adapters import denoisers
from iec.pipeline.installation import installed
from iec.pipeline.quantizing import quantized

network = lru_cache(maxsize=1)(network_of)


def make_calibration(arguments: dict[str, Any], files: tuple[Path, ...]) -> dict[str, Any]:
    """Calibrate for an arm.

    arguments: "model", "options", "dtype", "device" for the pipeline; "arm"; "samples" for `iec.calibrate`, "conditions" among
    them; "checkpoint" (a path, or None). files: the folder of the model, where "model" is None.

    Returns {"files": {name: bytes}}: what `Calibration.save` writes.
    """
    arm = Arm.of(arguments["arm"])
    model = str(files[0]) if arguments["model"] is None else arguments["model"]
    pipe = HELD.pipeline(model, arguments["options"], arguments["dtype"], arguments["device"])
    options = {**arguments["samples"], **arguments["conditions"], **calibration_options(arm)}
    made = calibrate(rescheduled(pipe, arm), checkpoint_path=arguments["checkpoint"], **options)
    return {"files": files_of(made)}


def files_of(calibration: Calibration) -> dict[str, bytes]:
    """What a calibration's `save` writes, by name."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "calibration"
        calibration.save(folder)
        return folder_files(folder)


def sample_shard(arguments: dict[str, Any], files: tuple[Path, ...]) -> dict[str, Any]:
    """As `iec.evaluate.scale.sample_shard`, and the bytes of the denoiser's "weights", the "kernel" of a quantized one."""
    found = scale.sample_shard(arguments, files)
    ready = HELD.ready
    part = quantized(installed(ready))
    return {**found, "weights": weights(ready, part and part.calibration), "kernel": part.kernel if part else ""}


def time_batch(arguments: dict[str, Any], files: tuple[Path, ...]) -> dict[str, Any]:
    """As `iec.evaluate.scale.sample_shard`, of which the "seconds" are kept alone."""
    return {"seconds": scale.sample_shard(arguments, files)["seconds"]}


def weights(pipe: Any, calibration: Calibration | None = None) -> int:
    """Bytes of all parameters of the denoisers; those that are quantized as they are stored, the rest as they are."""
    parameters = [p for model in denoisers(pipe).values() for p in model.parameters()]
    whole = sum(p.numel() * p.element_size() for p in parameters)
    if calibration is None or calibration.quant is None:
        return whole
    replaced = calibration.float_bytes // 4 * parameters[0].element_size()
    return whole - replaced + calibration.weight_bytes


def leave_behind(arguments: dict[str, Any], files: tuple[Path, ...]) -> dict[str, Any]:
    """What the images of a shard leave behind.

    arguments: "network" (a spec, or None), "device", "batch_size"; "seeds" of the images; "targets": by name, how many images of
    these seeds a target has; "paired": the scores of every target; "prompts", and "clip" (the model, or "" for the default), or
    None. files: the shard, then those of the targets that have any, in their order.

    Returns the arrays of `iec.evaluate.statistics.Statistics` and the "name" of the network.
    """
    images, *others = (images_of(file) for file in files)
    seeds, paired, limits = arguments["seeds"], arguments["paired"], arguments["targets"]
    held = {name: part[: limits[name]] for name, part in zip(limits, others, strict=True)}
    targets = {name: held.get(name, images[:0]) for name in paired}
    found = statistics_of(
        images,
        network(arguments["network"], arguments["device"]),
        seeds,
        targets=targets,
        paired=paired,
        scores=_text_scores(arguments, images),
        batch_size=arguments["batch_size"],
    )
    arrays = {"pool": found.pool, "logits": found.logits, "spatial": found.spatial}
    return {
        "name": found.network,
        "features": {name: value.numpy() for name, value in arrays.items() if value is not None},
        "scores": {name: value.numpy() for name, value in found.scores.items()},
    }


def _text_scores(arguments: dict[str, Any], images: torch.Tensor) -> dict[str, torch.Tensor]:
    if arguments["clip"] is None:
        return {}
    return {"clip": _text_score(arguments["clip"], choose_device(arguments["device"]))(images, arguments["prompts"])}


@lru_cache(maxsize=1)
def _text_score(model: str, device: str) -> Any:
    from iec.evaluate.clip import PAPER, ClipScore

    return ClipScore(model or PAPER, device)


def draw_figure(arguments: dict[str, Any], files: tuple[Path, ...]) -> dict[str, Any]:
    """Analyse full precision, or an efficient arm against it.

    arguments: those of `make_calibration` for the pipeline, "arm" and "conditions"; "kind"; "study": further arguments of
    `iec.analysis.study.analyse`; "folder": where it keeps what it has so far, or None. files: the calibration, if the arm
    needs one; the folder of the model, where "model" is None.

    Returns {"files": {name: bytes}}: what the study's `save` writes.
    """
    from iec.analysis.study import analyse

    arm, rest = Arm.of(arguments["arm"]), list(files)
    calibration = Calibration.load(rest.pop(0)) if arm.calibrated else None
    model = str(rest[0]) if arguments["model"] is None else arguments["model"]
    where = (model, arguments["options"], arguments["dtype"], arguments["device"])
    full = rescheduled(HELD.pipeline(*where), arm)
    correction = None
    if arm.steps is not None:
        correction = {"steps": arm.steps, "relax": arm.relax, "tol": arm.tol, "probe": arm.probe}
    with contextlib.ExitStack() as stack:
        folder = arguments["folder"] or stack.enter_context(tempfile.TemporaryDirectory())
        efficient = None
        if arm.quant is not None or arm.cache is not None:
            other = Held()  # with denoisers of its own
            stack.callback(other.release)
            efficient = stack.enter_context(prepared(other.pipeline(*where), arm.without_correction(), calibration))
        analyse(
            full,
            efficient,
            kinds=(arguments["kind"],),
            num_inference_steps=arm.num_inference_steps,
            correction=correction,
            folder=folder,
            **arguments["study"],
            **arm.kwargs,
            **arguments["conditions"],
        )
        return {"files": folder_files(Path(folder))}


def images_of(file: Path) -> torch.Tensor:
    """The images (N, C, H, W), uint8, of a shard. Raises ValueError when it is damaged."""
    try:
        with np.load(file, allow_pickle=False) as opened:
            return torch.from_numpy(opened["images"])
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{file}: damaged shard: {error}") from error
