"""DeepCache (Ma et al., CVPR 2024): the deep part of a UNet runs at few steps; the others reuse its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from iec.caches.feature import FeatureCache, RunOfSteps
from iec.caches.unet import locate
from iec.plan import CachePlan, StepClock, Window, check_interval, check_window, make_plan, parse_schedule


@dataclass(frozen=True)
class DeepCache:
    """Run the whole model at steps 0, `interval`, 2 `interval`, …; in between only what is outside the cached part.

    `branch` says how much is recomputed at a reuse step: the cached part lies below skip connection `branch` + 1, where
    0 is the one of `conv_in` (see `iec.caches.unet`). None is the rule of the paper's CIFAR-10 runs: the level of full
    resolution is recomputed whole, which is branch 2 at two layers per block.

    `schedule` places the whole passes otherwise, about as many: uniform, quadratic[:p], centred[:c[,p]] or at:0,3,9.
    `window` (begin, end), each a step or a fraction of the run as a float, restricts caching to the steps from begin to
    before end; outside every pass is whole. For both see `iec.plan.schedules`.

    Raises TypeError or ValueError for an interval below 1, a negative branch, a schedule or window that cannot be.
    """

    interval: int = 5
    branch: int | None = None
    schedule: str = "uniform"
    window: Window | None = None

    def __post_init__(self) -> None:
        check_interval(self.interval)
        if self.branch is not None and (not isinstance(self.branch, int) or isinstance(self.branch, bool)):
            raise TypeError(f"branch is {self.branch!r}, expected an integer or None")
        if self.branch is not None and self.branch < -1:
            raise ValueError(f"branch is {self.branch}, expected at least 0 (for a UNet2DModel, at least -1)")
        if parse_schedule(self.schedule).kind == "dps":
            raise ValueError("schedule 'dps' needs a calibration, which DeepCache has not; use iec.CacheQuant")
        if self.window is not None:
            object.__setattr__(self, "window", check_window(self.window))

    def __repr__(self) -> str:
        """The interval and the branch, and what else is not at its default."""
        shown = [f for f in fields(self) if f.name in ("interval", "branch") or getattr(self, f.name) != f.default]
        return f"DeepCache({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def plan(self, num_steps: int) -> CachePlan:
        """The refresh steps of a run of `num_steps`."""
        return make_plan(self.schedule, self.interval, num_steps, self.window)

    def build(
        self,
        model: Any,
        clock: StepClock,
        run: Callable[[], RunOfSteps | None],
        owns: Callable[[tuple[Any, ...], dict[str, Any]], bool] | None = None,
    ) -> FeatureCache:
        """The cache for `model`, not installed yet; see `FeatureCache` for the arguments.

        Raises TypeError for a model that is not supported, ValueError for a branch that it does not have.
        """
        return FeatureCache(model, locate(model, self.branch), self.plan, clock, run, owns)
