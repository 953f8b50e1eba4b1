"""One corrected step: its ordinary visit, then its corrections, all from the same x_t, state and noise."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iec.core.correction import blend, finite, residual
from iec.plan import Relaxation
from iec.schedule.directions import directions
from iec.schedule.replay import NoiseState, Snapshot

# A step that moves a sample by less than this fraction of its norm (A = 1, B = 0) leaves nothing to correct.
NO_OP = 1e-6


def _tensors(output: Any) -> dict[Any, Tensor]:
    """The tensors of a step's output (a dataclass of diffusers, or a tuple) by key."""
    items = enumerate(output) if isinstance(output, tuple) else output.items()
    return {key: value for key, value in items if isinstance(value, Tensor)}


def _norms(samples: Tensor) -> Tensor:
    """The norm of each sample, as (B, 1, …)."""
    wide = samples.to(torch.promote_types(samples.dtype, torch.float32))
    return torch.linalg.vector_norm(wide, dim=tuple(range(1, wide.dim())), keepdim=True)


def _replaced(output: Any, tensors: dict[Any, Tensor]) -> Any:
    """`output` with some of its tensors replaced."""
    if isinstance(output, tuple):
        return tuple(tensors.get(index, value) for index, value in enumerate(output))
    return type(output)(**{key: tensors.get(key, value) for key, value in output.items()})


class Slot:
    """A corrected step in progress.

    The sample that a visit returns is the paper's blend. The history of a multistep solver takes the blend of the model
    outputs instead, so that with λ = 0 it is the plain solver's, bit for bit.

    With the probe "start" the pipeline is handed, before each correction, the sample at which the model is to be evaluated in
    the place of the estimate, which is kept here. `marks` are the seeds of its directions.
    """

    def __init__(self, scheduler: Any, relaxation: Relaxation, step: int = 0, marks: list[bytes] | None = None) -> None:
        self.scheduler = scheduler
        self.relaxation = relaxation
        self.index, self.marks = step, marks
        self.visit = 0
        self.residuals: list[Tensor] = []
        self.stood_back = False

    @property
    def last(self) -> bool:
        """Whether the evaluation of visit `self.visit` is the last of this step."""
        return self.visit == len(self.relaxation.factors)

    def open(self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The ordinary step; returns the scheduler's own output."""
        bound = signature.bind(*args, **kwargs)
        x_t, m = bound.arguments["sample"], bound.arguments["model_output"]
        bound.arguments["sample"] = x_t.clone()  # pipelines and runtimes may write over what they passed
        self.call = bound
        self.snapshot = Snapshot(self.scheduler, x_t.shape)
        self.noise = NoiseState(bound.arguments.get("generator"), x_t.device)
        self.m = m.clone() if isinstance(m, Tensor) else m
        output = self.scheduler.step(*args, **kwargs)
        self._returned(output)
        self.history = self.snapshot.has_history(self.scheduler)
        moved = residual(self.y, x_t) if self.y.shape == x_t.shape else torch.ones(len(self.y), device=self.y.device)
        self.active = ~(moved < NO_OP)
        self.visit = 1
        return self._handed()

    def correct(self, m_new: Any, y: Tensor) -> Any:
        """One correction: `m_new` is the model's output at `y`, the current estimate of the next state, or where the probe is."""
        if self.away:
            y = self.y
        factor = self.relaxation.factors[self.visit - 1]
        again = self._step(m_new)
        new = _tensors(again)
        key = self.key
        change = residual(new[key], y)
        usable = finite(change)
        self.stood_back = self.stood_back or not bool((usable | ~self.active).all())
        self.residuals.append(change)
        self.active = self.active & usable
        old = {**self.outputs, key: y}
        shaped = {k: v for k, v in new.items() if k in old and v.shape == old[k].shape and v.is_floating_point()}
        output = _replaced(again, {**old, **{k: blend(old[k], v, factor, self.active) for k, v in shaped.items()}})
        if self.history:
            self.m = blend(self.m, m_new, factor, self.active)
            self._step(self.m)
        if self.relaxation.tol is not None:
            self.active = self.active & (change >= self.relaxation.tol)
        self._returned(output)
        self.visit += 1
        return self._handed()

    def repeat(self) -> Any:
        """A visit whose model output is not wanted, all samples being frozen: the output of the visit before."""
        self.visit += 1
        return self._handed()

    def settled(self) -> bool:
        """Whether all samples are frozen, so that further evaluations would change nothing."""
        return not bool(self.active.any())

    @property
    def away(self) -> bool:
        """Whether the model is evaluated at another sample than the estimate."""
        return self.relaxation.probe.kind == "start"

    def scaled(self, scale: Callable[..., Tensor], sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The model's input away from the estimate, by the scheduler's `scale_model_input`.

        `sample` is what was handed out, once or, for guidance, several times; what a loop has done to it meanwhile (inpainting)
        belongs to the next noise level, and is left out.
        """
        times, rest = divmod(len(sample), len(self.point))
        if not rest and sample.shape[1:] == self.point.shape[1:]:
            sample = torch.cat([self.point] * times)
        return self._before(scale, sample, *args, **kwargs)

    def _before(self, scale: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """What `scale_model_input` gave before the step, whose noise level x_t has."""
        live = dict(vars(self.scheduler))
        self.snapshot.restore(self.scheduler)
        try:
            return scale(*args, **kwargs)
        finally:
            vars(self.scheduler).update(live)

    def _handed(self) -> Any:
        """The output that the pipeline gets: the next visit evaluates the model at its sample, which is `given`."""
        if not self.away or self.visit > len(self.relaxation.factors):
            self.given = self.y
            return self.output
        self.point = self._start()
        self.given = self.point.clone()
        return _replaced(self.output, {self.key: self.given})

    def _start(self) -> Tensor:
        """x_t, displaced by ρ times the way of the model's input from x_t to the estimate."""
        x_t, distance = self.call.arguments["sample"], self.relaxation.probe.distance
        if not distance or self.marks is None:
            return x_t
        before, after = x_t, self.y
        scale = getattr(self.scheduler, "scale_model_input", None)
        if scale is not None:  # the inputs of some schedulers are not their samples
            timestep = self.call.arguments["timestep"]
            before, after = self._before(scale, x_t, timestep), scale(self.y, timestep)
        way = distance * _norms(after - before) * _norms(x_t) / _norms(before)
        return x_t + (way * directions(x_t, self.marks, self.index, self.visit)).to(x_t.dtype)

    def _returned(self, output: Any) -> None:
        self.output = output
        self.outputs = _tensors(output)
        self.key = 0 if isinstance(output, tuple) else "prev_sample"
        self.y = self.outputs[self.key]

    def _step(self, m: Any) -> Any:
        """Step once more from x_t with the model output `m`; the generators end where they were."""
        self.snapshot.restore(self.scheduler)
        self.call.arguments["model_output"] = m
        arguments = dict(self.call.arguments)
        arguments["sample"] = arguments["sample"].clone()
        bound = inspect.BoundArguments(self.call.signature, arguments)  # pyright: ignore[reportArgumentType]
        with self.noise.replay():
            return self.scheduler.step(*bound.args, **bound.kwargs)
