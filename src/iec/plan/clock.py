"""The one clock: at which sampling step the denoiser is being evaluated.

Quantizers pick their scales and caches decide between refresh and reuse from it. Only the scheduler moves it. Nobody
counts forwards: a correction visit has the step of its ordinary visit.
"""

from __future__ import annotations

from typing import NamedTuple


class Tick(NamedTuple):
    """One evaluation: `step` 0 is the first (noisiest), `visit` 0 the ordinary one, `last` the last visit of its step."""

    step: int
    visit: int
    last: bool

    @property
    def correction(self) -> bool:
        """Whether this evaluation belongs to a correction."""
        return self.visit > 0


class StepClock:
    """Holds the `Tick` of the evaluation under way, or of the next one; None outside a run."""

    def __init__(self) -> None:
        self.now: Tick | None = None
        self.num_steps = 0

    def start(self, num_steps: int) -> None:
        """Begin a run of `num_steps` sampling steps. Raises ValueError unless there is at least one."""
        if num_steps < 1:
            raise ValueError(f"a run has at least one step, got {num_steps}")
        self.num_steps = num_steps
        self.now = None

    def move(self, step: int, visit: int, last: bool) -> None:
        """Set the clock. Raises ValueError for a step outside the run or a negative visit."""
        if not 0 <= step < self.num_steps or visit < 0:
            raise ValueError(f"no such tick: step {step} of {self.num_steps}, visit {visit}")
        self.now = Tick(step, visit, last)

    def stop(self) -> None:
        """End the run."""
        self.now = None

    def __repr__(self) -> str:
        return f"StepClock({self.now}, num_steps={self.num_steps})"
