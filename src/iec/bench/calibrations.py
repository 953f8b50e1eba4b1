"""The calibrations of arms that need one: bundled with the model, or made here on a few samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from iec.artifact.calibration import Calibration
from iec.calibration.calibrate import calibrate
from iec.evaluate.arms import Arm, calibration_name, calibration_options, rescheduled
from iec.pipeline.models import calibrations

SAMPLES = 16  # where none is bundled


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
            **calibration_options(arm),
            num_samples=SAMPLES,
            batch_size=self.batch_size,
            seed=self.seed,
        )
