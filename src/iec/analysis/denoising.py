"""The denoiser of one recorded step as a function x → ε: the pipeline's conditions and guidance, held fixed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iec.analysis.calls import Call, Piece, pieces, tolerance
from iec.pipeline.caching import cached
from iec.pipeline.foreign import names
from iec.pipeline.installation import Installation, Part, installed
from iec.pipeline.session import Session
from iec.plan import StepClock


class Denoise:
    """ε(x) at one recorded step, with the timestep, the conditions and the guidance of the run.

    Calling it with x (B, …) of the recorded shape evaluates the pipeline's denoiser aside of any run: as the model was at
    that step (a quantizer's scales, a cache's feature), and leaving it as it is (counts of evaluations, feature, clock). It
    can be called within the run and after it, and be differentiated.

    The guidance is found from the recorded call: ε is a combination of the model's outputs whose weights add up to 1 (or
    to −1), the same for all samples; then comes the factor of an ε-scaling, if it is on. Before the first evaluation
    elsewhere, ε(x) at the recorded x is compared with the recorded ε.

    Raises RuntimeError where ε is no such combination (a rescaled guidance), where something else that depends on x goes
    into the model (ControlNet), for a cache of another library, where the pipeline was changed since, and where the
    recorded ε is not reproduced; ValueError for another shape.
    """

    def __init__(
        self, held: Installation, step: int, calls: Sequence[Call], x: Tensor, eps: Tensor, found: Found
    ) -> None:
        self.step, self.x, self._scale = step, x, held.state.scale
        self.eps = eps if self._scale == 1.0 else eps * self._scale
        self.reason: str | None = None  # why it cannot be evaluated
        self._held, self._found = held, found
        self._parts, self._run = _altering(held), held.state.run
        self._pieces: tuple[Piece, ...] = ()
        self._ratio = 1.0
        self._proof: list[bool] = []  # shared by the rescaled ones; not empty: the recorded ε was reproduced
        others = names(call.module for call in calls)
        try:
            if others:
                raise RuntimeError(
                    f"the denoiser carries {', '.join(others)}, a cache of another library, whose state at this step cannot "
                    "be had again; take it off"
                )
            self._pieces = pieces(calls, x, eps)
        except RuntimeError as error:
            self.reason = str(error)

    def rescaled(self, ratio: float) -> Denoise:
        """The same denoiser with inputs `ratio` times as large: as it is evaluated at samples of another noise level, where the
        scheduler scales the model's inputs."""
        if ratio == 1.0:
            return self
        other = copy.copy(self)
        other._ratio = self._ratio * ratio
        return other

    @property
    def ratio(self) -> float:
        """How many times as large its inputs are as those of the step's own `denoise` at the same sample."""
        return self._ratio

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The denoisers that are evaluated, each once."""
        return tuple({id(piece.module): piece.module for piece in self._pieces}.values())

    @property
    def evaluations(self) -> int:
        """Calls of a denoiser that one evaluation takes."""
        return len(self._pieces)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape != self.x.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}; this step was recorded with {tuple(self.x.shape)}")
        self.check()
        return self._evaluated(x if self._ratio == 1.0 else x * self._ratio)

    def check(self) -> None:
        """Raise RuntimeError, with the reason, where the recorded ε is not reproduced at the recorded x."""
        if self.reason is not None:
            raise RuntimeError(f"step {self.step} cannot be evaluated again: {self.reason}")
        if self._proof:
            return
        with torch.no_grad():
            again = self._evaluated(self.x)
        off, bound = _distance(again, self.eps), 4 * tolerance(self.eps, [w for p in self._pieces for w in p.weights])
        if not off <= bound:
            raise RuntimeError(
                f"step {self.step} cannot be evaluated again: the model now gives an output that differs from the recorded "
                f"one by {off:.1e} of its norm, expected at most {bound:.1e}; it was changed since, or depends on more than "
                "its arguments"
            )
        self._proof.append(True)

    def _evaluated(self, x: Tensor) -> Tensor:
        with self._aside():
            total: Any = sum(piece(x) for piece in self._pieces)
        total = total.to(self.eps.dtype)
        return total if self._scale == 1.0 else total * self._scale

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """The clock at this step, the gates open, the cached feature that the step found; then everything as it was."""
        held = installed(self._held.pipe)
        parts = () if held is None else _altering(held)
        if len(parts) != len(self._parts) or any(a is not b for a, b in zip(parts, self._parts, strict=True)):
            raise RuntimeError(
                f"step {self.step} cannot be evaluated again: what iec.quantize, iec.cache and the like had put on this "
                f"{type(self._held.pipe).__name__} was changed since it was recorded; evaluate before, or load the pipeline twice"
            )
        if held is None:
            yield
            return
        state, clock = held.state, held.state.clock
        saved = (state.run, clock.now, clock.num_steps)
        assert self._run is not None
        with contextlib.ExitStack() as stack:
            for gate in held.gates.values():
                stack.enter_context(_opened(gate))
            stack.callback(_put_back, state, clock, *saved)
            state.run = self._run
            clock.start(len(self._run.values))
            clock.move(self.step, 0, True)
            caching = cached(held)
            if caching is not None:
                stack.enter_context(caching.feature.aside(self._found))
            yield


Found = dict[int, Any]  # the features of a cache as a visit found them


def found_features(held: Installation) -> Found:
    """The features that are now in a cache of ours on the pipeline; none without one."""
    caching = cached(held)
    return {} if caching is None else dict(caching.feature.features)


def _altering(held: Installation) -> tuple[Part, ...]:
    """The parts of an installation that change what the model computes."""
    return tuple(part for part in held.parts if not isinstance(part, Session) and not getattr(part, "watches", False))


@contextlib.contextmanager
def _opened(gate: Any) -> Iterator[None]:
    was, gate.open = gate.open, True
    try:
        yield
    finally:
        gate.open = was


def _put_back(state: Any, clock: StepClock, run: Any, now: Any, num_steps: int) -> None:
    state.run, clock.now, clock.num_steps = run, now, num_steps


def _distance(a: Tensor, b: Tensor) -> float:
    size = float(torch.linalg.vector_norm(b.double()))
    return float(torch.linalg.vector_norm(a.double() - b.double())) / (size or 1.0)
