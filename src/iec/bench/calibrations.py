"""The calibrations of arms that need one: bundled with the model, or made here on a few samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from iec.artifact.calibration import Calibration
from iec.bench.arms import Arm, rescheduled
from iec.caches import CacheQuant
from iec.calibration.calibrate import calibrate
from iec.pipeline.models import calibrations
from iec.quant.config import QuantConfig

FIELDS = {"w8a8": QuantConfig()}
SAMPLES = 16  # where none is bundled


def calibration_name(arm: Arm) -> str:
    """What an arm needs: field, steps, the scheduler if it is not the model's own, and the options of a CacheQuant.

    "w8a8-60-euler", "w8a8-50-cachequant5".
    """
    kind = "" if arm.scheduler is None else f"-{arm.scheduler.removesuffix('DiscreteScheduler').lower()}"
    cache = ""
    if isinstance(arm.cache, CacheQuant):
        others = [f for f in fields(CacheQuant) if f.name != "interval" and getattr(arm.cache, f.name) != f.default]
        cache = f"-cachequant{arm.cache.interval}" + "".join(f"-{f.name}-{getattr(arm.cache, f.name)}" for f in others)
    return f"{arm.quant or 'float'}-{arm.num_inference_steps}{kind}{cache}"


class Calibrations:
    """Those of one pipeline, `model` being the name that it was loaded by.

    Samples to calibrate on have the seeds from `seed` on. `making(arm)` is called before one is made, which takes a while.
    """

    def __init__(
        self, pipe: Any, model: str, seed: int, batch_size: int, making: Callable[[Arm], None] = lambda _: None
    ) -> None:
        self.pipe, self.seed, self.batch_size, self.making = pipe, seed, batch_size, making
        self.bundled = calibrations(model)
        self.made: dict[str, Calibration] = {}

    def of(self, arm: Arm) -> Calibration | None:
        """The calibration for `arm`; None if it needs none."""
        if not arm.calibrated:
            return None
        name = calibration_name(arm)
        if name not in self.made:
            self.made[name] = Calibration.load(self.bundled[name]) if name in self.bundled else self._make(arm)
        return self.made[name]

    def _make(self, arm: Arm) -> Calibration:
        self.making(arm)
        return calibrate(
            rescheduled(self.pipe, arm),
            None if arm.quant is None else FIELDS[arm.quant],
            arm.cache if isinstance(arm.cache, CacheQuant) else None,
            num_inference_steps=arm.num_inference_steps,
            num_samples=SAMPLES,
            batch_size=self.batch_size,
            seed=self.seed,
        )
