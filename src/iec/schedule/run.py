"""One sampling run: where in the inner scheduler's list the loop stands, and what has been spent so far."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from iec.plan import CorrectionPlan
from iec.schedule.slot import Slot


class Run:
    """The course of one pass over the timesteps. `index` is the current step; `slot` its correction while one is open."""

    def __init__(self, timesteps: Tensor, plan: CorrectionPlan, thread: int) -> None:
        self.timesteps = timesteps
        self.values = [float(t) for t in timesteps.tolist()]
        self.plan = plan
        self.thread = thread
        self.begin: int | None = None  # the first step, where the pipeline told it (image to image)
        self.index = -1
        self.slot: Slot | None = None
        self.corrections = 0
        self.visits = 0
        self.residuals: dict[int, list[Tensor]] = {}
        self.started = self.ended = self.left = time.perf_counter()
        self.correction_seconds = 0.0

    @property
    def timestep(self) -> float:
        """The timestep of the current step."""
        return self.values[self.index]

    def is_at(self, timestep: Any) -> bool:
        """Whether `timestep` (a number or a tensor of equal ones) is the current step's."""
        return _value(timestep) == self.timestep

    def enter(self, timestep: Any, inner: Any) -> None:
        """Move to the step of `timestep`: the next one in order, or wherever a loop that began in the middle stands."""
        value = _value(timestep)
        following = self.index + 1
        if self.index < 0:
            following = self.begin if self.begin is not None else 0
        if following < len(self.values) and self.values[following] == value:
            self.index = following
        elif self.index < 0 and value in self.values:
            # The inner scheduler knows which of several equal timesteps begins a shortened run.
            known = getattr(inner, "index_for_timestep", None)
            self.index = int(known(torch.tensor(value).to(self.timesteps))) if known is not None else self.values.index(value)
        else:
            raise ValueError(
                f"step() was called with timestep {value:g}, but step {following} of this run is at "
                f"{self.values[following] if following < len(self.values) else 'its end'}; call set_timesteps() before each run and "
                "loop over scheduler.timesteps"
            )
        self.slot = None

    def note(self, started: float) -> None:
        """Account for one visit whose step() began at `started`."""
        now = time.perf_counter()
        self.visits += 1
        if self.slot is not None and self.slot.visit > 1:
            self.correction_seconds += now - self.left
        self.left = self.ended = now

    def close(self) -> None:
        """End the current step."""
        if self.slot is not None:
            self.residuals[self.index] = self.slot.residuals
        self.slot = None


def _value(timestep: Any) -> float:
    if isinstance(timestep, Tensor):
        return float(timestep.reshape(-1)[0])
    return float(timestep)
