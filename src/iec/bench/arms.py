"""An arm: one way to sample from a pipeline. Arms of one comparison share the model, the seeds and the sampling code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from iec.artifact.calibration import Calibration
from iec.caches import CacheQuant, DeepCache
from iec.evaluate.metrics import fidelity
from iec.evaluate.sampling import measure, sample, with_scheduler
from iec.pipeline.adapters import denoisers
from iec.pipeline.caching import cache
from iec.pipeline.installation import installed, undo
from iec.pipeline.quantizing import quantize, quantized
from iec.pipeline.session import enable, summary

Kind = Literal["reference", "plain", "corrected", "control"]
WARM_UP = 2  # evaluations of each arm before it is timed


@dataclass(frozen=True)
class Arm:
    """One way to sample: `scheduler` is a diffusers class name (None: the pipeline's own), `quant` the field of a quantized
    denoiser ("w8a8"; None: as it is), `steps` a correction plan."""

    name: str
    kind: Kind
    num_inference_steps: int
    scheduler: str | None = None
    quant: str | None = None
    cache: DeepCache | CacheQuant | None = None
    steps: str | None = None
    relax: tuple[float, ...] = (0.5,)

    @property
    def calibrated(self) -> bool:
        """Whether it needs a calibration."""
        return self.quant is not None or isinstance(self.cache, CacheQuant)


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


@contextlib.contextmanager
def prepared(pipe: Any, arm: Arm, calibration: Calibration | None = None) -> Iterator[Any]:
    """A pipeline as the arm wants it, with the weights of `pipe`; afterwards these are what they were.

    Raises ValueError for an arm that needs a calibration without one.
    """
    pipe = rescheduled(pipe, arm)
    try:
        if arm.calibrated and calibration is None:
            raise ValueError(f"{arm.name!r} is quantized, or cached by CacheQuant, so it needs a calibration")
        if arm.quant is not None and calibration is not None:
            quantize(pipe, calibration)
        if arm.cache is not None:
            cache(pipe, arm.cache, calibration if isinstance(arm.cache, CacheQuant) else None)
        if arm.steps is not None:
            enable(pipe, steps=arm.steps, relax=arm.relax)
        yield pipe
    finally:
        undo(pipe)


def rescheduled(pipe: Any, arm: Arm) -> Any:
    """`pipe`, or one with its components and the scheduler of the arm."""
    return pipe if arm.scheduler is None else with_scheduler(pipe, arm.scheduler)


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
        _warm_up(ready, arm, seeds[:batch_size])
        with measure(ready) as cost:
            images = sample(ready, seeds, arm.num_inference_steps, batch_size)
        reused = summary(ready).reused or 0
        part = quantized(installed(ready))
        weights, kernel = _weights(ready, part.calibration if part else None), part.kernel if part else None
    close = fidelity(images, reference) if reference is not None else None
    batches = -(-len(seeds) // batch_size)
    rmse, psnr = (close.rmse, close.psnr) if close is not None else (None, None)
    return Outcome(arm, images, cost.evaluations // batches, reused, cost.seconds, weights, kernel, rmse, psnr)


class _Warm(Exception):
    """Ends a run that is long enough."""


def _warm_up(pipe: Any, arm: Arm, seeds: Sequence[int]) -> None:
    """Begin the arm's own run, since a calibration serves no other, and break off after the first evaluations."""
    begun = 0

    def count(*_: Any) -> None:
        nonlocal begun
        begun += 1
        if begun > WARM_UP:
            raise _Warm

    handles = [model.register_forward_pre_hook(count) for model in denoisers(pipe).values()]
    try:
        with contextlib.suppress(_Warm):
            sample(pipe, seeds, arm.num_inference_steps, len(seeds))
    finally:
        for handle in handles:
            handle.remove()


def _weights(pipe: Any, calibration: Calibration | None) -> int:
    """Bytes of all parameters of the denoisers; those that are quantized as they are stored, the rest as they are."""
    parameters = [p for model in denoisers(pipe).values() for p in model.parameters()]
    whole = sum(p.numel() * p.element_size() for p in parameters)
    if calibration is None:
        return whole
    replaced = calibration.float_bytes // 4 * parameters[0].element_size()
    return whole - replaced + calibration.weight_bytes
