"""An arm: one way to sample from a pipeline. Arms of one comparison share the model, the seeds and the sampling code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from iec.caches import DeepCache
from iec.evaluate.metrics import fidelity
from iec.evaluate.sampling import measure, sample, with_scheduler
from iec.pipeline.caching import cache
from iec.pipeline.installation import undo
from iec.pipeline.session import enable, summary

Kind = Literal["reference", "plain", "corrected", "control"]


@dataclass(frozen=True)
class Arm:
    """One way to sample: `scheduler` is a diffusers class name (None: the pipeline's own), `steps` a correction plan."""

    name: str
    kind: Kind
    num_inference_steps: int
    scheduler: str | None = None
    cache: DeepCache | None = None
    steps: str | None = None
    relax: tuple[float, ...] = (0.5,)


@dataclass(frozen=True)
class Outcome:
    """What an arm gave: uint8 `images` (N, C, H, W), denoiser `evaluations` per image batch, of which `reused` ran the
    shallow part only, wall `seconds` for all images, RMSE and PSNR (dB) to the reference of the same seeds, and the domain
    Fréchet distance to real images, where there are enough images for it."""

    arm: Arm
    images: Tensor
    evaluations: int
    reused: int
    seconds: float
    rmse: float | None = None
    psnr: float | None = None
    fid: float | None = None


@contextlib.contextmanager
def prepared(pipe: Any, arm: Arm) -> Iterator[Any]:
    """A pipeline as the arm wants it, with the weights of `pipe`; afterwards these are what they were."""
    if arm.scheduler is not None:
        pipe = with_scheduler(pipe, arm.scheduler)
    try:
        if arm.cache is not None:
            cache(pipe, arm.cache)
        if arm.steps is not None:
            enable(pipe, steps=arm.steps, relax=arm.relax)
        yield pipe
    finally:
        undo(pipe)


def run_arm(pipe: Any, arm: Arm, seeds: Sequence[int], batch_size: int, reference: Tensor | None = None) -> Outcome:
    """Sample `seeds` as `arm` says and compare with the `reference` images (N, C, H, W) of the same seeds."""
    with prepared(pipe, arm) as ready:
        with measure(ready) as cost:
            images = sample(ready, seeds, arm.num_inference_steps, batch_size)
        reused = summary(ready).reused or 0
    close = fidelity(images, reference) if reference is not None else None
    batches = -(-len(seeds) // batch_size)
    rmse, psnr = (close.rmse, close.psnr) if close is not None else (None, None)
    return Outcome(arm, images, cost.evaluations // batches, reused, cost.seconds, rmse, psnr)
