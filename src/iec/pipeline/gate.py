"""The gate on a denoiser: counts its evaluations, and spares those that would change nothing.

When all samples of a step have converged, the loop of the pipeline still asks for the step's remaining visits. The gate
then answers with the output of the visit before, at no cost. Caches of other libraries on the denoiser are kept out of the
corrections from here, too.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iec.pipeline.foreign import ForeignCache, Visit
from iec.plan import Tick
from iec.schedule.run import Run
from iec.schedule.state import IECState


class Gate:
    """Stands before `module.forward` from `install()` to `remove()`; acts only within a run of `state` in its own thread."""

    def __init__(self, module: Any, state: IECState) -> None:
        self.module, self.state = module, state
        self.evaluations = self.spared = 0
        self.caches: Sequence[ForeignCache] = ()  # of other libraries, as the run began
        self._run: Run | None = None
        self._tick: Tick | None = None
        self._outputs: list[Any] = []
        self._replayed = 0

    def install(self) -> None:
        """Put the gate before the module's forward."""
        self._instance_forward = vars(self.module).get("forward")
        self._forward = self.module.forward
        self.open = False

        gated: Any = Gate._gated
        if getattr(self.module, "_compiled_call_impl", None) is not None:  # compiled in place by module.compile()
            gated = torch.compiler.disable(gated, recursive=False)
        # A partial, unlike a closure, is copied along with the module.
        self.module.forward = self._placed = functools.update_wrapper(functools.partial(gated, self), self._forward)

    def __deepcopy__(self, memo: dict[int, Any]) -> Gate:
        """A copy of the module is outside the session: its gate is open for good, and leads to the copy's own forward."""
        memo[id(self)] = other = Gate(copy.deepcopy(self.module, memo), self.state)
        other._forward, other.open = copy.deepcopy(self._forward, memo), True
        return other

    def __reduce__(self) -> Any:
        raise TypeError(f"IEC is on this {type(self.module).__name__}; call iec.disable(pipe) before pickling it")

    def remove(self) -> None:
        """Take the gate away, also from under the gates of other pipelines that share the module.

        When something else was put over it since, it stays behind, open, with a RuntimeWarning.
        """
        self._outputs, self.open = [], True
        over = self._over()
        if over is not None:
            over._forward, over._instance_forward = self._forward, self._instance_forward
        elif vars(self.module).get("forward") is not self._placed:
            warnings.warn(
                f"the forward of {type(self.module).__name__} was wrapped again after iec.enable(pipe), so IEC's own wrapper "
                "stays under it; it does nothing any more",
                RuntimeWarning,
                stacklevel=2,
            )
        elif self._instance_forward is None:
            del self.module.forward
        else:
            self.module.forward = self._instance_forward

    @property
    def outermost(self) -> bool:
        """Whether nothing but gates of other pipelines was put over this one."""
        return vars(self.module).get("forward") is self._placed or self._over() is not None

    def _over(self) -> Gate | None:
        """The gate that was put over this one, if every gate above is still in place."""
        gate = _gate(vars(self.module).get("forward"))
        while gate is not None and gate._forward is not self._placed:
            gate = _gate(gate._forward)
        return gate

    def _gated(self, *args: Any, **kwargs: Any) -> Any:
        run, tick = self.state.run, self.state.clock.now
        if self.open or run is None or tick is None or run.thread != threading.get_ident():
            return self._forward(*args, **kwargs)  # the evaluation is not one of our run
        if run is not self._run:
            self._run, self.evaluations, self.spared, self._outputs = run, 0, 0, []
        if tick != self._tick:
            self._tick, self._replayed = tick, 0
            if not self.state.skip:
                self._outputs = []
        if self.state.skip and self._replayed < len(self._outputs) and self._is_ours(args, kwargs):
            self._replayed += 1
            self.spared += 1
            return self._outputs[self._replayed - 1]
        with contextlib.ExitStack() as stack:
            for cache in self.caches:
                stack.enter_context(cache.around(Visit(tick.step, run.begin, run.timesteps, tick.correction)))
            output = self._forward(*args, **kwargs)
        self.evaluations += 1
        if not tick.last:
            self._outputs.append(output)
        return output

    def _is_ours(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the input begins with the sample that the scheduler returned last.

        Weights may be shared with another pipeline, and a run may have been abandoned; in doubt the model is evaluated.
        """
        slot = self.state.run.slot if self.state.run is not None else None
        given = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        if slot is None or not isinstance(given, Tensor):
            return False
        expected = self.state.scaled[0] if self.state.scaled is not None else slot.given
        if given.dim() != expected.dim() or given.dim() < 2 or given.shape[2:] != expected.shape[2:]:
            return False
        if given.shape[0] < expected.shape[0] or given.shape[1] < expected.shape[1]:
            return False
        return torch.equal(given[: expected.shape[0], : expected.shape[1]], expected.to(given.dtype))


def _gate(forward: Any) -> Gate | None:
    """The gate that `forward` leads through, if any."""
    first = next(iter(getattr(forward, "args", ())), None)
    return first if isinstance(first, Gate) else None
