"""A cache of one feature of a model: the policy, which decides by the clock between a whole pass and reuse.

`iec.caches.cut` does what it decides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from torch import nn

from iec.caches.cut import Cut, Feature, Place
from iec.plan import CachePlan, StepClock, Tick


class RunOfSteps(Protocol):
    """One sampling run; a new object for every run. `begin` is its first step."""

    begin: int


class Held(NamedTuple):
    """A captured feature, its step, and the shape, dtype and device of the sample it was computed from."""

    feature: Feature
    step: int
    sample: tuple[Any, ...]


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
        compensate: given a step, the feature to be reused there and the step it was computed at (a refresh step, that of a
            correction, or the first of the run), what is put back in its place: a new tensor, the given one must stay as it
            is. None puts the feature itself back.

    A pass is whole when the clock is stopped, at a refresh step, at the first step of a run, and at every correction;
    all but the first replace the feature, so reuse follows the last correction (METHOD 1.4). Models that are called
    several times in one visit (guidance without batching) have one feature per call; a further call that the last visit
    with a whole pass did not make (guidance that begins between two of them) is a whole pass as well, and so is a call with a
    sample of another shape, dtype or device (guidance in one batch that ends between two of them).

    Raises ValueError where the model carries a cache already.
    """

    def __init__(
        self,
        model: nn.Module,
        site: Place,
        plan: Callable[[int], CachePlan],
        clock: StepClock,
        run: Callable[[], RunOfSteps | None],
        owns: Callable[[tuple[Any, ...], dict[str, Any]], bool] | None = None,
        compensate: Callable[[int, Feature, int], Feature] | None = None,
    ) -> None:
        self.cut = Cut(model, site)
        self.model, self.plan, self.clock, self.run, self.owns = model, plan, clock, run, owns
        self.compensate = compensate
        self.refreshed = self.reused = 0
        self.features: dict[int, Held] = {}
        self.last_run: RunOfSteps | None = None
        self._refresh = CachePlan((0,), 1)
        self._tick: Tick | None = None
        self._calls = 0
        self._captured = False  # whether the pass under way has left its feature
        self._removers: list[Callable[[], None]] = []

    @property
    def site(self) -> Any:
        """Where the model is cut."""
        return self.cut.site

    def install(self) -> None:
        """Cut the model and decide about its passes from now on."""
        # Plain functions, because a deep copy of the model would copy bound methods together with this object. Both hooks
        # come before the cut's, which acts on what the first decides and forgets it after the second.
        before = self.model.register_forward_pre_hook(
            lambda _, args, kwargs: self._begin(args, kwargs), with_kwargs=True
        )
        after = self.model.register_forward_hook(lambda _, __, output: self._end(output), always_call=True)
        self._removers = [before.remove, after.remove]
        try:
            self.cut.install()
        except ValueError:
            self.remove()
            raise

    def remove(self) -> None:
        """Put every forward back and forget the features; nothing happens the second time."""
        self.cut.remove()
        for undo in reversed(self._removers):
            undo()
        self._removers, self.features = [], {}

    @contextlib.contextmanager
    def aside(self, found: dict[int, Held]) -> Iterator[None]:
        """Context of evaluations beside the run under way: each visit finds the features `found`, as a visit of the run did.

        The clock and `run` say which step it is, as ever. Afterwards features and counts are those of before.
        """
        kept = (self.features, self.last_run, self._refresh, self._tick, self._calls, self.refreshed, self.reused)
        self.features, self.last_run, self._tick = dict(found), self.run(), None
        self._refresh = self.plan(self.clock.num_steps)
        try:
            yield
        finally:
            self.features, self.last_run, self._refresh, self._tick, self._calls, self.refreshed, self.reused = kept

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide what the coming pass is. Raises RuntimeError when it should reuse a feature that is not there."""
        self.cut.clear()
        tick, run = self.clock.now, self.run()
        if run is not self.last_run:
            self.last_run, self.features, self._tick = run, {}, None
            self.refreshed = self.reused = 0
            self._refresh = CachePlan((0,), 1) if run is None else self.plan(self.clock.num_steps)
        if tick is None or run is None or (self.owns is not None and not self.owns(args, kwargs)):
            return
        if tick != self._tick:
            self._tick, self._calls = tick, 0
        self._captured = False
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        kind = (tuple(sample.shape), sample.dtype, sample.device)
        call, held = self._calls, self.features.get(self._calls)
        further = call > 0 if held is None else held.sample != kind
        if tick.correction or tick.step in self._refresh or tick.step == run.begin or further:
            self.cut.whole(lambda feature: self._capture(call, Held(feature, tick.step, kind)))
            return
        if held is None:
            raise RuntimeError(
                f"step {tick.step} should reuse a feature, but no whole pass of this run has left one; the model must be "
                "called in the order of the scheduler's timesteps"
            )
        given = held.feature
        self.cut.reuse(given if self.compensate is None else self.compensate(tick.step, given, held.step))

    def _capture(self, call: int, held: Held) -> None:
        if call == 0:
            self.features.clear()  # what the visit before left for further calls is older than this pass
        self.features[call] = held
        self._captured = True

    def _end(self, output: Any) -> None:
        """After a pass; also after one that failed, whose output is None and which its caller may take again."""
        if output is not None and self.cut.passing:
            self._calls += 1
            self.refreshed += self._captured
            self.reused += self.cut.reusing
