"""One passage over the samples of a calibration: the pipeline samples in full precision, and every evaluation is looked at."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from iec.calibration.journal import State
from iec.patch import replace_forward
from iec.pipeline.installation import Installation


class Call:
    """One evaluation of a denoiser by the pipeline: `number` counts those of a step (guidance without batching has several).

    Calling it evaluates `forward`, the denoiser's own, with these arguments: hooks on the denoiser see the one evaluation
    that the pipeline asked for, not ours.
    """

    def __init__(
        self, step: int, number: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.step, self.number, self.forward, self.args, self.kwargs = step, number, forward, args, kwargs

    def of(self, forward: Callable[..., Any]) -> Call:
        """The same call of another forward."""
        return Call(self.step, self.number, forward, self.args, self.kwargs)

    def __call__(self) -> Any:
        return self.forward(*self.args, **self.kwargs)


class Passage:
    """What stands in for the denoisers' forwards during a passage, from `install()` to `remove()`.

    A subclass says in `evaluate` what an evaluation is, its answer being that of full precision; in `learnt` and `relearn` what
    it has learnt. `samples` are the first one and the number of those sampled now, `timesteps` what the scheduler of the last
    run handed out.
    """

    what: str

    def __init__(self, held: Installation) -> None:
        self.held = held
        self.models = {name: gate.module for name, gate in held.gates.items()}
        self.samples = (0, 0)
        self.timesteps: tuple[float, ...] = ()
        self._at: tuple[str, int] | None = None
        self._number = 0
        self._removers: list[Callable[[], None]] = []

    def evaluate(self, name: str, call: Call) -> Any:
        """The denoiser's output at a call of the run."""
        raise NotImplementedError

    def begin(self, first: int, count: int) -> None:
        """The next call of the pipeline has the samples first … first + count − 1."""
        self.samples, self._at = (first, count), None

    def install(self) -> None:
        """Stand in for the forwards of the denoisers."""
        for name, model in self.models.items():
            self._removers.append(replace_forward(model, functools.partial(self._around, name=name)))

    def remove(self) -> None:
        """Step aside; `Installation.drop` calls it."""
        for undo in reversed(self._removers):
            undo()
        self._removers = []

    def learnt(self) -> State:
        """All that was learnt so far, for a checkpoint: tensors, and plain data."""
        raise NotImplementedError

    def relearn(self, tensors: dict[str, Tensor], plain: Any) -> None:
        """Go on from `learnt()`."""
        raise NotImplementedError

    def state(self) -> State:
        """What was learnt, and the timesteps."""
        tensors, plain = self.learnt()
        return tensors, {"timesteps": list(self.timesteps), "learnt": plain}

    def load_state(self, tensors: dict[str, Tensor], plain: Any) -> None:
        """Continue from `state()`."""
        self.timesteps = tuple(plain["timesteps"])
        self.relearn(tensors, plain["learnt"])

    def _around(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
        run, tick = self.held.state.run, self.held.state.clock.now
        if run is None or tick is None:
            return forward(*args, **kwargs)
        self.timesteps = tuple(run.values)
        self._number = self._number + 1 if self._at == (name, tick.step) else 0
        self._at = (name, tick.step)
        return self.evaluate(name, Call(tick.step, self._number, forward, args, kwargs))
