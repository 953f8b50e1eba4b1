"""What an arm costs, before it is run: whole passes of the denoiser, and passes that reuse a cached feature."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from iec.caches import CacheQuant, DeepCache
from iec.evaluate.arms import Arm
from iec.evaluate.sampling import scheduler_like
from iec.pipeline.adapters import denoisers
from iec.pipeline.batches import batches
from iec.pipeline.caching import cache as put_cache
from iec.plan import bounds, parse, parse_probe, parse_schedule, resolve, resolve_window
from iec.schedule import IECScheduler


class Passes(NamedTuple):
    """Evaluations of the denoiser for an image: `whole` ones, corrections among them, and those that reuse a feature."""

    whole: int
    reused: int

    def equivalents(self, share: float = 1.0) -> float:
        """The same in whole passes, of which one that reuses costs the `share` 0 … 1 (see `reuse_share`)."""
        return self.whole + share * self.reused


def arm_scheduler(scheduler: Any, arm: Arm) -> Any:
    """The scheduler of an arm on a pipeline whose own is `scheduler`: a new object.

    Raises ValueError when diffusers has no such scheduler.
    """
    if type(scheduler) is IECScheduler:
        scheduler = scheduler.iec.inner
    if arm.scheduler is None and not arm.scheduler_options:
        return copy.deepcopy(scheduler)
    return scheduler_like(scheduler, arm.scheduler or type(scheduler).__name__, **arm.scheduler_options)


def length(scheduler: Any, arm: Arm) -> int:
    """The steps of a run: the length of the scheduler's list, which is not always the number asked for (Heun, PNDM)."""
    made = arm_scheduler(scheduler, arm)
    try:
        made.set_timesteps(arm.num_inference_steps)
    except (TypeError, ValueError):  # schedules that depend on the picture's size are as long as asked for
        return arm.num_inference_steps
    return len(made.timesteps)


def passes(arm: Arm, scheduler: Any, refresh: Iterable[int] | None = None) -> Passes:
    """The passes of a run of `arm`, most of all: a tolerance, and steps that do not move, may spare some.

    Args:
        arm: the arm.
        scheduler: the pipeline's own.
        refresh: the refresh steps of a CacheQuant that plans by its features, from its calibration
            (`calibration.cache.refresh`). How many there are is known without; which ones not, so plans such as
            `refresh & ends:1/10` need them.

    Raises ValueError where `refresh` is needed, and as `iec.plan.resolve` does for a plan that does not fit.
    """
    count = length(scheduler, arm)
    steps, listed = (list(range(count)), count) if arm.cache is None else _refreshed(arm.cache, count, refresh)
    if arm.steps is None:
        return Passes(listed, count - listed)
    atoms = {atom.kind for joined in parse(arm.steps) for atom in joined}
    if steps is None and "refresh" in atoms and arm.steps != "refresh":
        raise ValueError(
            f"the plan {arm.steps!r} depends on the refresh steps of {arm.cache!r}, which its calibration holds; give "
            "refresh=calibration.cache.refresh"
        )
    if steps is None and arm.steps == "refresh":
        return Passes(listed + listed * len(arm.relax), count - listed)
    plan = resolve(arm.steps, count, None if arm.cache is None else steps)
    last = parse_probe(arm.probe).kind == "next" and count - 1 in plan
    return Passes(listed + (len(plan) - last) * len(arm.relax), count - listed)


def _refreshed(
    cache: DeepCache | CacheQuant, count: int, refresh: Iterable[int] | None
) -> tuple[list[int] | None, int]:
    """The whole passes of an uncorrected run, if known, and their number."""
    if isinstance(cache, CacheQuant) and parse_schedule(cache.schedule).kind == "dps":
        if refresh is not None:
            steps = sorted(refresh)
            return steps, len(steps)
        begin, end = (0, count) if cache.window is None else resolve_window(cache.window, count)
        # Step 0 is a whole pass wherever the window begins.
        return None, begin + bounds(cache.interval, end - begin).groups + count - end
    steps = list(cache.plan(count).refresh)
    return steps, len(steps)


class _Enough(Exception):
    """Ends a run in which a whole pass and one that reuses were seen."""


def reuse_share(pipe: Any, cache: DeepCache | CacheQuant | None, **kwargs: Any) -> float:
    """The multiplications of a pass that reuses the feature, as a share 0 … 1 of a whole one; 1.0 without a cache.

    Counted by `torch.utils.flop_counter` on two evaluations of the denoiser for one image, in full precision. `kwargs` go to the
    pipeline (prompts, class labels). The pipeline is left as it was. Raises as `iec.cache` and the pipeline's call do.
    """
    if cache is None:
        return 1.0
    where = DeepCache(2, cache.branch, blocks=cache.blocks if isinstance(cache, DeepCache) else None)
    counts: list[int] = []
    put = put_cache(pipe, where)
    counter = FlopCounterMode(display=False)

    def before(*_: Any) -> None:
        counts.append(-counter.get_total_flops())

    def after(*_: Any) -> None:
        counts[-1] += counter.get_total_flops()
        _, reused = put.counts() or (0, 0)
        if reused:
            raise _Enough

    models = denoisers(pipe).values()  # of two, each has steps of its own
    hooks = [each.register_forward_pre_hook(before) for each in models]
    hooks += [each.register_forward_hook(after) for each in models]
    call = next(batches(pipe, [0], 4, 1, "latent", **kwargs))
    try:
        # The fused attention kernels of the CPU are not counted.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            pipe(**call.arguments)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
        put.undo()
    return min(counts) / max(counts)
