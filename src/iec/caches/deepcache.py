"""DeepCache (Ma et al., CVPR 2024): the deep part of a UNet runs at few steps; the others reuse its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from iec.caches.feature import FeatureCache, RunOfSteps
from iec.caches.unet import locate
from iec.plan import CachePlan, StepClock, uniform
from iec.plan.cache import check_interval


@dataclass(frozen=True)
class DeepCache:
    """Run the whole model at steps 0, `interval`, 2 `interval`, …; in between only what is outside the cached part.

    `branch` says how much is recomputed at a reuse step: the cached part lies below skip connection `branch` + 1, where
    0 is the one of `conv_in` (see `iec.caches.unet`). None is the rule of the paper's CIFAR-10 runs: the level of full
    resolution is recomputed whole, which is branch 2 at two layers per block.

    Raises TypeError or ValueError for an interval below 1 or a negative branch.
    """

    interval: int = 5
    branch: int | None = None

    def __post_init__(self) -> None:
        check_interval(self.interval)
        if self.branch is not None and (not isinstance(self.branch, int) or isinstance(self.branch, bool)):
            raise TypeError(f"branch is {self.branch!r}, expected an integer or None")
        if self.branch is not None and self.branch < 0:
            raise ValueError(f"branch is {self.branch}, expected at least 0")

    def plan(self, num_steps: int) -> CachePlan:
        """The refresh steps of a run of `num_steps`."""
        return uniform(self.interval, num_steps)

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
