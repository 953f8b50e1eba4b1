"""The denoiser of one recorded step as a function x → ε: the pipeline's conditions and guidance, held fixed."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iec.pipeline.caching import cached
from iec.pipeline.foreign import names
from iec.pipeline.installation import Installation, Part, installed
from iec.pipeline.session import Session
from iec.plan import StepClock

SAMPLE = ("sample", "hidden_states")  # what diffusers' denoisers call their first argument
ROUNDINGS = 64  # of the dtype, by which a recombined output may differ from the pipeline's own


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a denoiser: arguments and output (R, …), of which R = k·B rows belong to B samples."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    @property
    def key(self) -> str | None:
        """The keyword that holds the sample; None when it is the first argument."""
        return None if self.args else next((key for key in SAMPLE if key in self.kwargs), SAMPLE[0])

    @property
    def sample(self) -> Tensor:
        """The model's input (R, C', …). Raises RuntimeError where there is none."""
        given = self.args[0] if self.args else self.kwargs.get(self.key)
        if not isinstance(given, Tensor):
            raise RuntimeError(
                f"this pipeline calls its {type(self.module).__name__} with a sample that is a {type(given).__name__}"
            )
        return given


@dataclass(frozen=True, eq=False)
class _Piece:
    """A call without its sample, and how to put one in: input = scale·x, k times, then the channels `beside` it."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: str | None
    dtype: torch.dtype
    scale: float
    copies: int
    beside: Tensor | None
    weights: tuple[float, ...]  # of the k outputs per sample

    def __call__(self, x: Tensor) -> Tensor:
        """This call's share of ε (B, …)."""
        given = x if self.scale == 1.0 else x * self.scale
        given = torch.cat([given.to(self.dtype)] * self.copies)
        if self.beside is not None:
            given = torch.cat([given, self.beside], 1)
        if self.key is None:
            output = self.module(given, *self.args, **self.kwargs)
        else:
            output = self.module(*self.args, **{**self.kwargs, self.key: given})
        chunks = _chunks(output[0], x.shape)
        if self.weights == (1.0,):
            return chunks[0]
        share = chunks[0] * self.weights[0]
        for weight, chunk in zip(self.weights[1:], chunks[1:], strict=True):
            share = share + weight * chunk
        return share


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
        self._pieces: tuple[_Piece, ...] = ()
        self._ratio = 1.0
        self._proof: list[bool] = []  # shared by the rescaled ones; not empty: the recorded ε was reproduced
        others = names(call.module for call in calls)
        try:
            if others:
                raise RuntimeError(
                    f"the denoiser carries {', '.join(others)}, a cache of another library, whose state at this step cannot "
                    "be had again; take it off"
                )
            self._pieces = _pieces(calls, x, eps)
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
        off, bound = _distance(again, self.eps), 4 * _tolerance(self.eps, [w for p in self._pieces for w in p.weights])
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


def _pieces(calls: Sequence[Call], x: Tensor, eps: Tensor) -> tuple[_Piece, ...]:
    """The calls of a step as functions of x, with the weights that give `eps`. Raises RuntimeError where there are none."""
    if not calls:
        raise RuntimeError("the pipeline did not call its denoiser before this step")
    if eps.shape != x.shape:
        raise RuntimeError(
            f"the scheduler was given a model output of shape {tuple(eps.shape)} for samples of shape {tuple(x.shape)} (a "
            "learned variance?)"
        )
    places = [_placed(call, x) for call in calls]
    outputs = [_chunks(call.output, x.shape) for call in calls]
    weights = iter(_weights([chunk for chunks in outputs for chunk in chunks], eps))
    return tuple(
        _Piece(
            call.module,
            call.args[1:],
            {key: value for key, value in call.kwargs.items() if key != call.key},
            call.key,
            call.sample.dtype,
            *place,
            tuple(next(weights) for _ in chunks),
        )
        for call, place, chunks in zip(calls, places, outputs, strict=True)
    )


def _placed(call: Call, x: Tensor) -> tuple[float, int, Tensor | None]:
    """How the model's input was made of x: the factor, the number of copies, and what stands beside it in dimension 1."""
    given, count = call.sample, len(x)
    name = type(call.module).__name__
    signature = inspect.signature(type(call.module).forward)
    bound = {**dict(zip(list(signature.parameters)[1:], call.args, strict=False)), **call.kwargs}
    for key, value in bound.items():
        # residuals of a T2I adapter (intrablock) depend on its picture alone
        if value is not None and ("residual" in key or "controlnet" in key) and "intrablock" not in key:
            raise RuntimeError(
                f"{name} is given {key}, which another network (ControlNet) computes from the sample, so that the denoiser's "
                "own calls do not say how ε depends on x"
            )
    fits = given.dim() == x.dim() > 1 and given.shape[2:] == x.shape[2:] and given.shape[1] >= x.shape[1]
    if not fits or len(given) % count:
        raise RuntimeError(
            f"{name} is given an input of shape {tuple(given.shape)} for samples of shape {tuple(x.shape)}; expected the "
            "samples, once or several times, with or without more channels"
        )
    copies = len(given) // count
    part, wanted = given[:, : x.shape[1]], torch.cat([x] * copies)
    scale = 1.0
    if not torch.equal(part, wanted.to(given.dtype)):
        wide, inside = wanted.double(), part.double()
        scale = float((wide * inside).sum() / (wide * wide).sum())
        off = float((inside - scale * wide).abs().max() / inside.abs().max())
        if not off <= ROUNDINGS * torch.finfo(given.dtype).eps:
            raise RuntimeError(
                f"the input of {name} is no multiple of the samples (off by {off:.1e} of its largest value); this pipeline "
                "does more to them than its scheduler's scale_model_input"
            )
    beside = given[:, x.shape[1] :].detach().clone() if given.shape[1] > x.shape[1] else None
    return scale, copies, beside


def _chunks(output: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """A model's output (k·B, C'', …) as k tensors (B, C, …); further channels are a learned variance, or what is thrown away."""
    if output.dim() != len(shape) or output.shape[2:] != shape[2:] or output.shape[1] < shape[1]:
        raise RuntimeError(
            f"the denoiser's output has shape {tuple(output.shape)}, the samples {tuple(shape)}; the pipeline reshapes it in "
            "a way that is not known"
        )
    return output[:, : shape[1]].split(shape[0])


def _weights(outputs: Sequence[Tensor], eps: Tensor) -> tuple[float, ...]:
    """Weights with ε = Σ wᵢ oᵢ and Σ wᵢ = ±1. Raises RuntimeError where there are none."""
    wide = [output.detach().double().flatten() for output in outputs]
    target = eps.double().flatten()
    offs = []
    for sign in (1.0, -1.0):
        weights = [sign]
        if len(wide) > 1:
            moved = torch.stack([output - wide[0] for output in wide[1:]])
            solved = torch.linalg.pinv(moved @ moved.T, hermitian=True) @ (moved @ (sign * target - wide[0]))
            rest = solved.tolist()
            weights = [sign * (1.0 - sum(rest)), *(sign * weight for weight in rest)]
        fitted = sum(weight * output for weight, output in zip(weights, wide, strict=True))
        size = max(float(torch.linalg.vector_norm(output)) for output in wide)
        off = float(torch.linalg.vector_norm(fitted - target)) / (size or 1.0)
        if off <= _tolerance(eps, weights):
            return tuple(weights)
        offs.append(off)
    raise RuntimeError(
        f"the model output handed to the scheduler is no fixed combination of the denoiser's {len(outputs)} outputs (off by "
        f"{min(offs):.1e} of their norm); guidance_rescale and the like depend on the outputs themselves: switch them off"
    )


def _tolerance(eps: Tensor, weights: Sequence[float]) -> float:
    return ROUNDINGS * torch.finfo(eps.dtype).eps * sum(abs(weight) for weight in weights)


def _distance(a: Tensor, b: Tensor) -> float:
    size = float(torch.linalg.vector_norm(b.double()))
    return float(torch.linalg.vector_norm(a.double() - b.double())) / (size or 1.0)
