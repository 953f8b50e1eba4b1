"""One sampling run: where in the inner scheduler's list the loop stands, and what has been spent so far."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from iec.plan import CorrectionPlan
from iec.schedule.slot import Slot


class Run:
    """The course of one pass over the timesteps, from step `begin` on.

    `index` is the current step (-1: none yet), `slot` its correction while one is open. The corrections of a step are
    evaluated at the timestep of the step that lies `ahead` of it.
    """

    def __init__(self, timesteps: Tensor, plan: CorrectionPlan, begin: int, thread: int, ahead: int = 0) -> None:
        self.timesteps = timesteps
        self.values = [float(t) for t in timesteps.tolist()]
        self.plan = plan
        self.thread = thread
        self.ahead = ahead
        self.marks: list[bytes] | None = None  # of the samples that the run began with, where they seed directions
        self.begin = begin
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

    def corrects_at(self, timestep: Any) -> bool:
        """Whether `timestep` (a number or a tensor of equal ones) is that of the current step's corrections."""
        return _value(timestep) == self.values[self.index + self.ahead]

    def enter(self, timestep: Any, inner: Any) -> str | None:
        """Move to the step of `timestep`; `index` is then that step, or -1 when the timestep is not of this run.

        That is the next step in order. A loop that begins in the middle, jumps, or leaves a step before its corrections is
        followed as well as can be; then the complaint is returned.
        """
        value, complaint = _value(timestep), None
        left = self.slot is not None
        expected = self.index + 1 if self.index >= 0 else self.begin
        if expected < len(self.values) and self.values[expected] == value:
            self.index = expected
        elif value in self.values:
            complaint = f"the loop came to timestep {value:g} out of order"
            # The inner scheduler knows which of several equal timesteps begins a shortened run.
            known = getattr(inner, "index_for_timestep", None)
            at = int(known(torch.tensor(value).to(self.timesteps))) if known is not None and self.index < 0 else None
            self.index = self.values.index(value) if at is None else at
        else:
            self.index = -1
        if left:
            complaint = "the loop left a step before its corrections"
        self.slot = None
        return complaint

    def note(self) -> None:
        """Account for the visit that has just ended; its time runs from the end of the visit before."""
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
