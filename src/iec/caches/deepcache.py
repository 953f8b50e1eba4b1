"""DeepCache (Ma et al., CVPR 2024): the deep part of a UNet runs at few steps; the others reuse its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from iec.caches import transformer, unet
from iec.caches.cut import Place, refuse_compiled
from iec.caches.feature import FeatureCache, RunOfSteps
from iec.plan import CachePlan, StepClock, Window, check_interval, check_window, make_plan, parse_schedule


@dataclass(frozen=True)
class DeepCache:
    """Run the whole model at steps 0, `interval`, 2 `interval`, …; in between only what is outside the cached part.

    For UNets, `branch` says how much is recomputed at a reuse step, the higher the more (see `iec.caches.unet`). None is
    what is usual: for a UNet2DModel the level of full resolution is recomputed whole, which is branch 2 at two layers per
    block; for a UNet2DConditionModel branch 0, its first convolution and its last resnet.

    For transformers, `blocks` (begin, end) are those that a reuse step skips, begin … end − 1 of all n blocks (see
    `iec.caches.transformer`); None leaves out the first and the last max(1, n // 8).

    `schedule` places the whole passes otherwise, about as many: uniform, quadratic[:p], centred[:c[,p]] or at:0,3,9.
    `window` (begin, end), each a step or a fraction of the run as a float, restricts caching to the steps from begin to
    before end; outside every pass is whole. For both see `iec.plan.schedules`.

    Raises TypeError or ValueError for an interval below 1, a branch, range of blocks, schedule or window that cannot be.
    """

    interval: int = 5
    branch: int | None = None
    schedule: str = "uniform"
    window: Window | None = None
    blocks: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_interval(self.interval)
        if self.branch is not None and (not isinstance(self.branch, int) or isinstance(self.branch, bool)):
            raise TypeError(f"branch is {self.branch!r}, expected an integer or None")
        if self.branch is not None and self.branch < -1:
            raise ValueError(f"branch is {self.branch}, expected at least 0 (for a UNet2DModel, at least -1)")
        if self.blocks is not None:
            object.__setattr__(self, "blocks", _check_range(self.blocks))
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

        Raises TypeError for a model that is not supported, ValueError for a branch or blocks that it does not have.
        """
        return FeatureCache(model, place(model, self.branch, self.blocks), self.plan, clock, run, owns)


def place(model: Any, branch: int | None = None, blocks: tuple[int, int] | None = None) -> Place:
    """Where to cut `model`: at a branch of a UNet, around a range of a transformer's blocks.

    Raises TypeError for a model that is not supported or was compiled; ValueError for a branch or a range of blocks that
    it does not have.
    """
    refuse_compiled(model)
    name = type(model).__name__
    classes = {base.__name__ for base in type(model).__mro__}
    if classes & set(unet.MODELS):
        if blocks is not None:
            raise ValueError(f"blocks is {blocks}, which is for transformers; for a {name} choose a branch")
        return unet.locate(model, branch)
    if classes & set(transformer.MODELS):
        if branch is not None:
            raise ValueError(f"branch is {branch}, which is for UNets; for a {name} choose blocks=(begin, end)")
        return transformer.locate_blocks(model, blocks)
    raise TypeError(
        f"DeepCache knows the blocks of {', '.join((*unet.MODELS, *transformer.MODELS))}, not of {name}; "
        "leave the cache out for this pipeline"
    )


def _check_range(blocks: Any) -> tuple[int, int]:
    """The two ends of a range of blocks. Raises TypeError or ValueError for what is none."""
    ends = tuple(blocks) if isinstance(blocks, (tuple, list)) else ()
    if len(ends) != 2 or any(not isinstance(end, int) or isinstance(end, bool) for end in ends):
        raise TypeError(f"blocks is {blocks!r}, expected None or two integers (begin, end)")
    if not 0 <= ends[0] < ends[1]:
        raise ValueError(f"blocks is {blocks!r}, expected 0 <= begin < end")
    return ends
