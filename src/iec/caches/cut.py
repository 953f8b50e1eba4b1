"""A model cut in two: a whole pass leaves the feature at the cut, a reuse pass puts it back and skips what led to it.

The model's own forward runs in both cases; the modules at the cut and behind it are stood in for. Nothing here knows of
steps: `Cut` is told before every pass what it is, by a cache (`iec.caches.feature`) or by a calibration.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from iec.patch import Around, replace_forward

Feature = Tensor | tuple[Tensor, ...]
Capture = Callable[[Feature], None]
Call = tuple[tuple[Any, ...], dict[str, Any]]

_cut: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the models that are cut now


class Pass(threading.local):
    """The pass under way in this thread. A whole one may have a `capture`; a reuse pass has the feature in `reuse`.

    What else it needs while it runs is kept here by the place it is cut at: `placeholder`, what skipped modules return;
    `ends`, the first and the last block of a skipped range; `entered`, what came into it; `guarded`, whether the feature would
    be written over by what takes it.
    """

    capture: Capture | None = None
    reuse: Feature | None = None
    placeholder: Tensor | None = None
    ends: tuple[int, int] | None = None
    entered: tuple[Tensor, ...] | None = None
    guarded: bool = False


class Place(Protocol):
    """Where a model is cut."""

    def stand_ins(self, now: Pass) -> Iterable[tuple[nn.Module, Around]]:
        """The modules at the cut and behind it, each with what stands in for its forward."""
        ...

    def start(self, now: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Before a pass that captures or reuses: the arguments that the model gets instead, None for the same."""
        ...


class Skipped(NamedTuple):
    """A module that a reuse pass skips, and what it returns beside its output: that many skip tensors.

    `skips` is None for one that returns a tensor alone, -1 for one that returns a tuple of it (a `Transformer2DModel`).
    """

    module: nn.Module
    skips: int | None


class Site(NamedTuple):
    """A place to cut a UNet.

    The output of `source`, a tensor (B, C, H, W) (if `tupled`, in a tuple), is the feature, which `consumer`, a resnet of
    the up path, takes together with skip tensor number `skip`: the feature's channels come first. `skipped` are the other
    modules whose results only lead to the feature. `branch` is the number that people know the cut by. `adapt` is
    `Place.start`. Skipped modules answer with a placeholder of no channels, so that the concatenations inside a block that
    is entered half-way still work and cost nothing.
    """

    source: nn.Module
    tupled: bool
    skipped: tuple[Skipped, ...]
    branch: int
    skip: int
    consumer: nn.Module
    adapt: Callable[[Pass, tuple[Any, ...], dict[str, Any]], Call | None]

    def stand_ins(self, now: Pass) -> Iterable[tuple[nn.Module, Around]]:
        """See `Place`."""
        yield self.source, functools.partial(_sourced, now, self.tupled)
        for module, skips in self.skipped:
            yield module, functools.partial(_skipping, now, skips)

    def start(self, now: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """See `Place`."""
        if now.reuse is not None:
            assert isinstance(now.reuse, Tensor)
            shape = now.reuse.shape
            now.placeholder = now.reuse.new_empty((shape[0], 0, *shape[2:]))
        return self.adapt(now, args, kwargs)


class Cut:
    """One model cut at one place, from `install()` to `remove()`; passes are whole unless told otherwise.

    What `whole` and `reuse` say holds for the next pass of the model in the calling thread and ends with it, also when it
    fails. Other threads do not see it. Raises ValueError where the model is cut already.
    """

    def __init__(self, model: nn.Module, site: Place) -> None:
        self.model, self.site = model, site
        self._check()
        self._pass = Pass()
        self._removers: list[Callable[[], None]] = []

    def whole(self, capture: Capture | None = None) -> None:
        """The coming pass is whole; `capture` is called with the feature when it is there (and must not change it)."""
        self.clear()
        self._pass.capture = capture

    def reuse(self, feature: Feature) -> None:
        """The coming pass reuses `feature`, which it leaves as it is."""
        self.clear()
        self._pass.reuse = feature

    def clear(self) -> None:
        """The coming pass is whole and leaves no feature."""
        now = self._pass
        now.capture = now.reuse = now.placeholder = now.ends = now.entered = None
        now.guarded = False

    @property
    def passing(self) -> bool:
        """Whether the pass under way, or the coming one, captures or reuses."""
        return self._pass.capture is not None or self._pass.reuse is not None

    @property
    def reusing(self) -> bool:
        """Whether the pass under way, or the coming one, reuses."""
        return self._pass.reuse is not None

    def install(self) -> None:
        """Stand in for the forwards at the cut. Raises ValueError where the model is cut by now."""
        self._check()
        _cut.add(self.model)
        # Plain functions, because a deep copy of the model would copy bound methods together with this object.
        before = self.model.register_forward_pre_hook(
            lambda _, args, kwargs: self._begin(args, kwargs), with_kwargs=True
        )
        after = self.model.register_forward_hook(lambda *_: self.clear(), always_call=True)
        self._removers = [before.remove, after.remove]
        for module, around in self.site.stand_ins(self._pass):
            self._removers.append(replace_forward(module, around))

    def remove(self) -> None:
        """Put every forward back; nothing happens the second time."""
        for undo in reversed(self._removers):
            undo()
        if self._removers:
            _cut.discard(self.model)
        self._removers = []

    def _check(self) -> None:
        if self.model in _cut:
            raise ValueError(
                f"this {type(self.model).__name__} carries a cache already, of another pipeline that shares it; "
                "undo that one first"
            )

    def evaluate(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the coming pass by `forward`, the model's own, past the hooks on the model."""
        try:
            args, kwargs = self._begin(args, kwargs) or (args, kwargs)
            return forward(*args, **kwargs)
        finally:
            self.clear()

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        return self.site.start(self._pass, args, kwargs) if self.passing else None


def refuse_compiled(model: Any) -> None:
    """Raises TypeError for a model that was compiled, or has parts that were."""
    name = type(model).__name__
    if any(getattr(part, "_compiled_call_impl", None) is not None for part in getattr(model, "modules", list)()):
        raise TypeError(
            f"this {name} was compiled in place, so its blocks cannot be skipped; load it anew and cache it uncompiled"
        )
    if name == "OptimizedModule":
        raise TypeError(
            "the model was compiled, so its blocks cannot be skipped; assign the original (._orig_mod) and cache that"
        )


def _sourced(now: Pass, tupled: bool, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The source: puts the feature back, or computes and captures it."""
    if now.reuse is not None:
        feature = _guarded(now, now.reuse)
        return (feature,) if tupled else feature
    output = forward(*args, **kwargs)
    if now.capture is not None:
        now.capture(_guarded(now, output[0] if tupled else output))
    return output


def _skipping(now: Pass, skips: int | None, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A module behind the cut: nothing of what it returns on a reuse pass is ever read."""
    empty = now.placeholder
    if empty is None:
        return forward(*args, **kwargs)
    if skips is None:
        return empty
    return (empty,) if skips < 0 else (empty, (empty,) * skips)


def _guarded(now: Pass, feature: Any) -> Any:
    return feature.clone() if now.guarded else feature
