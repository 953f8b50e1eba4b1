"""CacheQuant (Liu et al., CVPR 2025): a cache planned from calibrated features, whose reused feature is corrected (METHOD 4)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from iec.artifact.calibration import CacheTables
from iec.caches.cut import Feature, Site
from iec.caches.feature import FeatureCache, RunOfSteps
from iec.caches.unet import locate
from iec.plan import CachePlan, StepClock, Window, check_interval, check_window, make_plan, parse_schedule
from iec.plan.schedules import bounds, resolve_window

Compensate = Literal["all", "cache", "quant", "none"]
LEAST = 0.1  # gains below this are not divided by


@dataclass(frozen=True)
class CacheQuant:
    """Cache a UNet's deep part by a calibrated plan, and correct what is reused; with quantization also what that does to it.

    Args:
        interval: N: about every N-th step is a whole pass.
        branch: where the UNet is cut, as in `DeepCache`.
        schedule: "dps": the plan with the least change of the feature within its groups, each of N/2 … 2N steps (METHOD 4.1);
            or one of `iec.plan.schedules`, as in `DeepCache`.
        window: (begin, end): nothing is reused outside, as in `DeepCache`.
        compensate: what is corrected by per-channel regression (DEC): "cache": the reused feature, per step (METHOD 4.3);
            "quant": what rounding does in the layers that take the feature (4.4); "all": both; "none": the plan alone.

    Raises TypeError or ValueError for values out of range.
    """

    interval: int = 5
    branch: int | None = None
    schedule: str = "dps"
    window: Window | None = None
    compensate: Compensate = "all"

    def __post_init__(self) -> None:
        check_interval(self.interval)
        if self.branch is not None and (not isinstance(self.branch, int) or isinstance(self.branch, bool)):
            raise TypeError(f"branch is {self.branch!r}, expected an integer or None")
        parse_schedule(self.schedule)
        if self.window is not None:
            object.__setattr__(self, "window", check_window(self.window))
        if self.compensate not in get_args(Compensate):
            raise ValueError(f"compensate is {self.compensate!r}, expected one of {', '.join(get_args(Compensate))}")

    @property
    def compensates_cache(self) -> bool:
        """Whether the reused feature is corrected."""
        return self.compensate in ("all", "cache")

    @property
    def compensates_quant(self) -> bool:
        """Whether rounding in the layers that take the feature is corrected."""
        return self.compensate in ("all", "quant")

    def plan(self, num_steps: int, costs: Tensor | None = None, begin: int = 0) -> CachePlan:
        """The refresh steps of a run of `num_steps`; "dps" needs the `costs` of groups, see `make_plan`.

        Image-to-image runs take the steps from `begin` on only, which is a whole pass then; "dps" spends nothing on those before.
        """
        window = self.window
        if begin and parse_schedule(self.schedule).kind == "dps":
            inside = resolve_window(window, num_steps) if window is not None else (0, num_steps)
            window = (max(begin, inside[0]), inside[1])
            if inside[1] <= begin:
                return CachePlan(tuple(range(num_steps)), num_steps)
        made = make_plan(self.schedule, self.interval, num_steps, window, costs)
        return CachePlan(tuple(sorted({*made.refresh, begin})), num_steps)

    def longest(self, num_steps: int) -> int:
        """The longest group that a plan for `num_steps` may have, its whole pass included."""
        if parse_schedule(self.schedule).kind == "dps":
            return bounds(self.interval, num_steps).longest
        starts = [*self.plan(num_steps).refresh, num_steps]
        return max(end - start for start, end in itertools.pairwise(starts))

    def pairs(self, start: int, step: int, num_steps: int, begin: int = 0) -> bool:
        """Whether some plan reuses the feature of `start` at `step`, which lies less than `longest` behind it."""
        dps = parse_schedule(self.schedule).kind == "dps"
        return dps or self.plan(num_steps, begin=begin).reference(step) == start

    def locate(self, model: Any) -> Site:
        """Where `model` is cut. Raises TypeError for a model that is not supported, ValueError for a branch it lacks."""
        return locate(model, self.branch)

    def build(
        self,
        model: Any,
        clock: StepClock,
        run: Callable[[], RunOfSteps | None],
        owns: Callable[[tuple[Any, ...], dict[str, Any]], bool] | None,
        tables: CacheTables,
    ) -> FeatureCache:
        """The cache for `model`, not installed yet, as `tables` have it; see `FeatureCache` for the other arguments.

        Raises TypeError and ValueError as `locate` does.
        """
        made = CachePlan(tables.refresh, len(tables.gain))

        def plan(num_steps: int) -> CachePlan:
            if num_steps != made.num_steps:
                raise ValueError(
                    f"this pipeline is cached for {made.num_steps} steps, and this run has {num_steps}; call it with "
                    f"num_inference_steps={made.num_steps}, or calibrate for this schedule"
                )
            return made

        compensate = Compensation(tables) if self.compensates_cache else None
        return FeatureCache(model, locate(model, tables.branch), plan, clock, run, owns, compensate)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, from which `from_dict` makes an equal configuration."""
        return {**asdict(self), "window": None if self.window is None else list(self.window)}

    @staticmethod
    def from_dict(given: dict[str, Any]) -> CacheQuant:
        """Read `as_dict`. Raises TypeError or ValueError for what it cannot have written."""
        window = given.get("window")
        return CacheQuant(**{**given, "window": None if window is None else tuple(window)})


class Compensation:
    """What is put back at a step in the place of the cached feature: gain · feature + offset, per channel (METHOD 4.3)."""

    def __init__(self, tables: CacheTables) -> None:
        self.plan = CachePlan(tables.refresh, len(tables.gain))
        self.gain, self.offset = (table[:, None, :, None, None] for table in (tables.gain, tables.offset))

    def __call__(self, step: int, feature: Feature, taken: int | None = None) -> Tensor:
        """What is reused at `step`, of the dtype and layout of `feature` (B, C, H, W), which is left as it is.

        taken: the step that the feature was computed at; None: the plan's last refresh step. From another one (of a correction
        between two of them, or the first of a run) the drift is taken that is left from there: feature ≈ gain′ · F + offset′ with
        the table of `taken`, solved for the F of the refresh step before both. A channel that has nearly lost F by then is
        put back as it is.
        """
        assert isinstance(feature, Tensor)
        wide = torch.promote_types(feature.dtype, torch.float32)  # a gain of 1.003 is 1 in bfloat16
        if self.gain.device != feature.device or self.gain.dtype != wide:
            self.gain, self.offset = (table.to(feature.device, wide) for table in (self.gain, self.offset))
        gain, offset = self.gain[step], self.offset[step]
        if taken is not None and taken not in self.plan:
            before = self.gain[taken]
            held = before > LEAST
            gain = torch.where(held, gain / before, 1.0)
            offset = torch.where(held, offset - gain * self.offset[taken], 0.0)
        return torch.addcmul(offset, feature.to(wide), gain).to(feature.dtype)
