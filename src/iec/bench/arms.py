"""An arm run and compared: its images, what they cost, how close they are to a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from iec.artifact.calibration import Calibration
from iec.evaluate.arms import Arm, prepared
from iec.evaluate.sampling import measure, sample
from iec.evaluate.similarity import fidelity
from iec.evaluate.warmup import warm_up
from iec.pipeline.adapters import denoisers
from iec.pipeline.installation import installed
from iec.pipeline.quantizing import quantized
from iec.pipeline.session import summary


@dataclass(frozen=True)
class Outcome:
    """What an arm gave: uint8 `images` (N, C, H, W), denoiser `evaluations` per image batch, of which `reused` ran the
    shallow part only, wall `seconds` for all images, bytes of the denoiser's `weights`, the `kernel` of a quantized one, RMSE
    and PSNR (dB) to the reference of the same seeds, and the domain Fréchet distance to real images, where there are enough
    images for it."""

    arm: Arm
    images: Tensor
    evaluations: int
    reused: int
    seconds: float
    weights: int = 0
    kernel: str | None = None
    rmse: float | None = None
    psnr: float | None = None
    fid: float | None = None


def run_arm(
    pipe: Any,
    arm: Arm,
    seeds: Sequence[int],
    batch_size: int,
    reference: Tensor | None = None,
    calibration: Calibration | None = None,
) -> Outcome:
    """Sample `seeds` as `arm` says and compare with the `reference` images (N, C, H, W) of the same seeds.

    The seconds do not hold what happens once: putting the arm on, and its first two evaluations, in which memory is
    allocated and kernels are chosen, and compiled where need be.
    """
    with prepared(pipe, arm, calibration) as ready:
        warm_up(ready, arm, seeds[:batch_size])
        with measure(ready) as cost:
            images = sample(ready, seeds, arm.num_inference_steps, batch_size, **arm.kwargs)
        reused = summary(ready).reused or 0
        part = quantized(installed(ready))
        weights, kernel = _weights(ready, part.calibration if part else None), part.kernel if part else None
    close = fidelity(images, reference) if reference is not None else None
    batches = -(-len(seeds) // batch_size)
    rmse, psnr = (close.rmse, close.psnr) if close is not None else (None, None)
    return Outcome(arm, images, cost.evaluations // batches, reused, cost.seconds, weights, kernel, rmse, psnr)


def _weights(pipe: Any, calibration: Calibration | None) -> int:
    """Bytes of all parameters of the denoisers; those that are quantized as they are stored, the rest as they are."""
    parameters = [p for model in denoisers(pipe).values() for p in model.parameters()]
    whole = sum(p.numel() * p.element_size() for p in parameters)
    if calibration is None:
        return whole
    replaced = calibration.float_bytes // 4 * parameters[0].element_size()
    return whole - replaced + calibration.weight_bytes
