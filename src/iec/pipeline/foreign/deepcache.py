"""The pip package DeepCache: a helper that wraps the forwards of a UNet and of its blocks.

It finds the step by looking the timestep up in `pipe.scheduler.timesteps`. There IEC shows every corrected timestep several
times, so for an evaluation of a run the helper is shown the scheduler's own list instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, SimpleNamespace
from typing import Any

from torch import nn

from iec.pipeline.foreign.visit import ForeignCache, Visit

HELPER, DEFINED_IN = "DeepCacheSDHelper", "DeepCache.extension.deepcache"
_USED = ("pipe", "params", "cached_output", "start_timestep")


class HelperCache:
    """A helper that is enabled on a UNet."""

    outermost = True
    decides = "runs the whole model at fixed steps"

    def __init__(self, helper: Any) -> None:
        self.helper = helper
        self.name = f"DeepCache (pip, interval {helper.params['cache_interval']})"

    @contextmanager
    def around(self, visit: Visit) -> Iterator[None]:
        """See `ForeignCache`."""
        helper = self.helper
        pipe, params, outputs = helper.pipe, helper.params, helper.cached_output
        try:
            helper.pipe = SimpleNamespace(unet=pipe.unet, scheduler=SimpleNamespace(timesteps=visit.timesteps))
            if visit.correction:
                helper.params = {**params, "cache_interval": 1, "skip_mode": "uniform"}
                helper.cached_output = _Nowhere()
            yield
        finally:
            helper.pipe, helper.params, helper.cached_output = pipe, params, outputs

    def refresh(self, num_steps: int, begin: int) -> tuple[int, ...] | None:
        """See `ForeignCache`. It counts from the first step it ever saw since it was enabled."""
        start = begin if self.helper.start_timestep is None else self.helper.start_timestep
        interval = self.helper.params["cache_interval"]
        return tuple(step for step in range(begin, num_steps) if (step - start) % interval == 0)


class _Nowhere(dict[Any, Any]):
    """Forgets what is stored in it."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def collect(model: nn.Module) -> list[ForeignCache]:
    """The helper on `model`, if there is one. Raises TypeError for a release of the package that is built differently."""
    for module in model.modules():
        forward = vars(module).get("forward")
        # Of functions alone, and by where they were written: a wrapper bears the name of what it wraps.
        if not isinstance(forward, FunctionType) or forward.__globals__.get("__name__") != DEFINED_IN:
            continue
        cells = zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True)
        helper = dict((name, cell.cell_contents) for name, cell in cells).get("self")
        missing = [name for name in _USED if not hasattr(helper, name)]
        if missing or "cache_interval" not in helper.params:
            raise TypeError(
                f"the {HELPER} on this {type(model).__name__} is not built like that of DeepCache 0.1.1 (it lacks "
                f"{', '.join(missing) or 'cache_interval'}), so IEC cannot keep it out of its corrections; take it off by "
                "its disable(), or use iec.cache(pipe, iec.DeepCache(interval=...))"
            )
        return [HelperCache(helper)]
    return []
