"""Images of a model for an evaluation: as it is deployed, and the references of the same seeds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from iec.artifact.calibration import Calibration
from iec.caches import CacheQuant
from iec.caches.spelling import parse
from iec.evaluate.sampling import sample, with_scheduler
from iec.pipeline.caching import cache as cache_features
from iec.pipeline.installation import undo
from iec.pipeline.quantizing import quantize
from iec.pipeline.session import enable

# The converged solution that every cheaper run approximates (see docs/evaluation.md).
FINE_SCHEDULER, FINE_STEPS = "DPMSolverMultistepScheduler", 200
TARGETS = ("full", "fine")


@contextlib.contextmanager
def equipped(
    pipe: Any,
    *,
    steps: str = "none",
    relax: str | Sequence[float] = (0.5,),
    calibration: Calibration | None = None,
    cache: str | None = None,
) -> Iterator[Any]:
    """`pipe` quantized by `calibration` (if that quantizes), cached as `cache` spells, corrected on `steps`; undone at the end.

    Raises ValueError for a bad plan or spelling, a cachequant without a calibration that plans it, and as `iec.quantize`,
    `iec.cache` and `iec.enable` do.
    """
    tables = None if calibration is None else calibration.cache
    made = None if cache is None else parse(cache, None if tables is None else tables.config)
    planned = isinstance(made, CacheQuant)
    if planned and tables is None:
        raise ValueError(f"the cache {cache} takes its plan from a calibration; give one made with that cache")
    if calibration is not None and calibration.quant is None and not planned:
        raise ValueError("the calibration holds no quantization, only a cache; give that as the cache cachequant")
    try:
        if made is not None:
            cache_features(pipe, made, calibration if planned else None)
        if calibration is not None and calibration.quant is not None:
            quantize(pipe, calibration)
        if steps != "none":
            enable(pipe, steps=steps, relax=relax)
        yield pipe
    finally:
        undo(pipe)


def sampled(
    pipe: Any,
    seeds: Sequence[int],
    num_inference_steps: int,
    batch_size: int = 16,
    *,
    targets: Sequence[str] = (),
    progress: Callable[[str], Callable[[int, int], None]] | None = None,
    equipment: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Images of `pipe` with `equipment` (arguments of `equipped`), and of each of the `targets` with the same seeds.

    All are uint8 (N, C, H, W). "full" is the plain pipeline, "fine" its converged solution, DPM-Solver++(2M) with 200 steps.
    `kwargs` are those of `iec.evaluate.sampling.sample`; `progress(name)` gives the function that is called after each batch.

    Raises ValueError for another target, and as `sample` and `equipped` do.
    """
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        raise ValueError(f"target {unknown[0]!r} cannot be sampled; expected {' or '.join(TARGETS)}, or NAME=IMAGES")

    def run(name: str, way: Any, count: int) -> torch.Tensor:
        told = None if progress is None else progress(name)
        return sample(way, seeds, count, batch_size, progress=told, **kwargs)

    with equipped(pipe, **(equipment or {})) as ready:
        images = run("sampling", ready, num_inference_steps)
    ways = {"full": (pipe, num_inference_steps), "fine": (with_scheduler(pipe, FINE_SCHEDULER), FINE_STEPS)}
    return images, {target: run(target, *ways[target]) for target in targets}
