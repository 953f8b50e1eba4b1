"""A cache of one feature inside a model: whole passes capture it, reuse passes put it back and skip what led to it.

The model's own forward runs in both cases. Skipped modules answer with a placeholder of no channels, so that the
concatenations inside a block that is entered half-way still work and cost nothing.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from iec.patch import replace_forward
from iec.plan import CachePlan, StepClock, Tick

_cached: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the models that carry a cache now


class RunOfSteps(Protocol):
    """One sampling run; a new object for every run. `begin` is its first step."""

    begin: int


class Site(NamedTuple):
    """A place to cut a model.

    The output of `source`, a tensor (B, C, H, W), is the cached feature. `skipped` are the other modules of the cached
    part with the number of skip tensors that each returns beside its output, None for one that returns a tensor alone.
    """

    source: nn.Module
    skipped: tuple[tuple[nn.Module, int | None], ...]
    branch: int


class Held(NamedTuple):
    """A captured feature, and the shape, dtype and device of the sample it was computed from."""

    feature: Tensor
    sample: tuple[Any, ...]


class _Pass(threading.local):
    """The pass under way in this thread: `reuse` is the feature to put back, `capture` says where to leave a new one."""

    reuse: Tensor | None = None
    placeholder: Tensor | None = None
    capture: tuple[int, tuple[Any, ...]] | None = None


class FeatureCache:
    """The cache on one model, from `install()` to `remove()`.

    Args:
        model: the denoiser; its first argument is the sample.
        site: where to cut it.
        plan: gives the refresh steps for a number of steps.
        clock: says which evaluation it is; nothing else decides between a whole pass and reuse.
        run: the run under way, or None; features never outlive it.
        owns: whether a call with these args and kwargs belongs to the run (weights may be shared, a run may have been
            abandoned). Others are whole passes that leave the cache alone.

    A pass is whole when the clock is stopped, at a refresh step, at the first step of a run, and at every correction;
    all but the first replace the feature, so reuse follows the last correction (METHOD 1.4). Models that are called
    several times in one visit (guidance without batching) have one feature per call.
    """

    def __init__(
        self,
        model: nn.Module,
        site: Site,
        plan: Callable[[int], CachePlan],
        clock: StepClock,
        run: Callable[[], RunOfSteps | None],
        owns: Callable[[tuple[Any, ...], dict[str, Any]], bool] | None = None,
    ) -> None:
        if model in _cached:
            raise ValueError(
                f"this {type(model).__name__} carries a cache already, of another pipeline that shares it; "
                "undo that one first"
            )
        self.model, self.site, self.plan, self.clock, self.run, self.owns = model, site, plan, clock, run, owns
        self.refreshed = self.reused = 0
        self.features: dict[int, Held] = {}
        self.last_run: RunOfSteps | None = None
        self._refresh = CachePlan((0,), 1)
        self._tick: Tick | None = None
        self._calls = 0
        self._pass = _Pass()
        self._removers: list[Callable[[], None]] = []

    def install(self) -> None:
        """Patch the forwards of the source and of the skipped modules."""
        _cached.add(self.model)
        # Plain functions, because a deep copy of the model would copy bound methods together with this object.
        before = self.model.register_forward_pre_hook(
            lambda _, args, kwargs: self._begin(args, kwargs), with_kwargs=True
        )
        after = self.model.register_forward_hook(lambda _, __, output: self._end(output), always_call=True)
        self._removers = [before.remove, after.remove, replace_forward(self.site.source, self._sourced)]
        for module, residuals in self.site.skipped:
            self._removers.append(replace_forward(module, functools.partial(self._skipping, residuals=residuals)))

    def remove(self) -> None:
        """Put every forward back and forget the features; nothing happens the second time."""
        for undo in reversed(self._removers):
            undo()
        self._removers, self.features = [], {}
        _cached.discard(self.model)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide what the coming pass is. Raises RuntimeError when it should reuse a feature that is not there."""
        self._clear()
        tick, run = self.clock.now, self.run()
        if run is not self.last_run:
            self.last_run, self.features, self._tick = run, {}, None
            self.refreshed = self.reused = 0
            self._refresh = CachePlan((0,), 1) if run is None else self.plan(self.clock.num_steps)
        if tick is None or run is None or (self.owns is not None and not self.owns(args, kwargs)):
            return
        if tick != self._tick:
            self._tick, self._calls = tick, 0
        sample = args[0] if args else kwargs["sample"]
        kind = (tuple(sample.shape), sample.dtype, sample.device)
        if tick.correction or tick.step in self._refresh or tick.step == run.begin:
            self._pass.capture = (self._calls, kind)
            return
        held = self.features.get(self._calls)
        if held is None:
            raise RuntimeError(
                f"step {tick.step} should reuse a feature, but no whole pass of this run has left one for call "
                f"{self._calls} of a step; the model must be called equally often at every step, in the order of "
                "the scheduler's timesteps"
            )
        if held.sample != kind:
            raise RuntimeError(
                f"step {tick.step} should reuse a feature computed from a sample {_named(held.sample)}, but "
                f"the sample is {_named(kind)}; shape, dtype and device must stay the same during a run"
            )
        shape = held.feature.shape
        self._pass.reuse = held.feature
        self._pass.placeholder = held.feature.new_empty((shape[0], 0, *shape[2:]))

    def _end(self, output: Any) -> None:
        """After a pass; also after one that failed, whose output is None and which its caller may take again."""
        if output is not None and (self._pass.capture or self._pass.reuse is not None):
            self._calls += 1
        self._clear()

    def _clear(self) -> None:
        self._pass.reuse = self._pass.placeholder = self._pass.capture = None

    def _sourced(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The source: puts the feature back, or computes and captures it."""
        if self._pass.reuse is not None:
            self.reused += 1
            return self._pass.reuse
        output = forward(*args, **kwargs)
        if self._pass.capture is not None:
            call, kind = self._pass.capture
            self.features[call] = Held(output, kind)
            self.refreshed += 1
        return output

    def _skipping(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], residuals: int | None
    ) -> Any:
        """A module of the cached part: nothing of what it returns on a reuse pass is ever read."""
        empty = self._pass.placeholder
        if empty is None:
            return forward(*args, **kwargs)
        return empty if residuals is None else (empty, (empty,) * residuals)


def _named(kind: tuple[Any, ...]) -> str:
    shape, dtype, device = kind
    return f"{shape} of {dtype} on {device}"
