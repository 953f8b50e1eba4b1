"""Runs of a pipeline, step by step: what went into each step, what came out, and the denoiser as a function."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iec.analysis.affine import AffineProbe
from iec.analysis.calls import Call
from iec.analysis.denoising import Denoise, Found, found_features
from iec.patch import replace_forward
from iec.pipeline.batches import batches
from iec.pipeline.installation import Installation, installation, switching


@dataclass(frozen=True, eq=False)
class Step:
    """One sampling step of a batch of B images, as the pipeline took it.

    Attributes:
        index: the step, 0 the first (noisiest).
        timestep: of the scheduler.
        seeds: of the B images.
        x: (B, …), the sample before the step.
        outputs: (B, …) each: what the scheduler was given as the model's output (guidance and all) at the ordinary visit, then
            at each correction that was evaluated.
        estimates: (B, …) each: the next sample after each of these visits.
        residuals: (B,) each: the relative residuals of the corrections.
        denoise: the model at this step as a function x → ε, see `Denoise`.
        denoise_estimate: the same for estimates of the next sample, as a correction evaluates it. It is `denoise` itself but
            with schedulers that scale the model's inputs by the noise level (Euler and its kin).
        a, b: of the scheduler's step Φ(x, ε) = a x + b ε, plus its noise when it has some. None where the step keeps a history
            or is not affine; `reason` then says which.
    """

    index: int
    timestep: float
    seeds: tuple[int, ...]
    x: Tensor
    outputs: tuple[Tensor, ...]
    estimates: tuple[Tensor, ...]
    residuals: tuple[Tensor, ...]
    denoise: Denoise
    denoise_estimate: Denoise
    a: float | None
    b: float | None
    reason: str | None

    @property
    def eps(self) -> Tensor:
        """(B, …): the model's output at x."""
        return self.outputs[0]

    @property
    def y(self) -> Tensor:
        """(B, …): the next sample, after the corrections."""
        return self.estimates[-1]


Change = Callable[[Step], Tensor | None]


def record(
    pipe: Any,
    seeds: Sequence[int],
    num_inference_steps: int,
    batch_size: int = 16,
    *,
    change: Change | None = None,
    wanted: Callable[[tuple[int, ...]], bool] | None = None,
    output_type: str = "latent",
    **kwargs: Any,
) -> Iterator[Step]:
    """The steps of the runs of `pipe` for `seeds`: those of the first batch in order, then those of the next.

    The pipeline runs as it is, with what iec.enable, iec.quantize and iec.cache have put on it; images are the same as
    without recording. A batch runs when its first step is asked for; memory holds its steps while somebody keeps them.

    Args:
        pipe: a diffusers pipeline.
        seeds: one per image; every image has a CPU generator of its own.
        num_inference_steps, kwargs: go to the pipeline; prompts and class labels may be one value or a list with one per image.
        batch_size: images per call.
        change: called at the end of each step, within the run; a tensor that it returns takes the place of the next sample.
        wanted: given the seeds of a batch, whether to run it; None: all.
        output_type: of the pipeline's images, which nobody looks at: "latent" spares the decoder.

    Raises ValueError for bad seeds, batch size, number of steps or arguments; TypeError for a pipeline that IEC cannot
    follow; RuntimeError when a sample is not finite, and what `change` raises.
    """
    for batch in batches(pipe, seeds, num_inference_steps, batch_size, output_type, **kwargs):
        if wanted is not None and not wanted(tuple(batch.seeds)):
            continue
        with switching:
            held = installation(pipe)
            recorder = Recorder(held, tuple(batch.seeds), change)
            held.add(recorder)
            recorder.install()
        try:
            pipe(**batch.arguments)
        finally:
            with switching:
                held.drop(recorder)
        yield from recorder.steps


class Recorder:
    """What listens to one call of a pipeline, from `install()` to `remove()`."""

    watches = True  # it changes nothing that the model computes

    def __init__(self, held: Installation, seeds: tuple[int, ...], change: Change | None) -> None:
        self.held, self.seeds, self.change = held, seeds, change
        self.steps: list[Step] = []
        self._calls: list[Call] = []
        self._found: Found = {}
        self._removers: list[Callable[[], None]] = []

    def install(self) -> None:
        """Stand around the denoisers' forwards and the scheduler's step."""
        for gate in self.held.gates.values():
            around = functools.partial(self._evaluation, module=gate.module)
            self._removers.append(replace_forward(gate.module, around))
        state = self.held.state
        ordinary = state.step
        vars(state)["step"] = lambda args, kwargs: self._step(ordinary, args, kwargs)
        self._removers.append(lambda: vars(state).pop("step"))

    def remove(self) -> None:
        """Step aside; `Installation.drop` calls it."""
        for undo in reversed(self._removers):
            undo()
        self._removers, self._calls = [], []

    def _evaluation(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any], module: Any) -> Any:
        run, tick, open_ = self.held.state.run, self.held.state.clock.now, self._open()
        if open_ or run is None or tick is None or run.thread != threading.get_ident() or tick.correction:
            return forward(*args, **kwargs)
        found = found_features(self.held)
        output = forward(*args, **kwargs)
        if not self._calls:
            self._found = found
        self._calls.append(Call(module, args, kwargs, output[0]))
        return output

    def _open(self) -> bool:
        """Whether this evaluation is none of the pipeline's own."""
        return any(gate.open for gate in self.held.gates.values())

    def _step(self, ordinary: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state, run = self.held.state, self.held.state.run
        if run is None:
            return ordinary(args, kwargs)
        call = state.signature.bind(*args, **kwargs)
        eps = call.arguments["model_output"].clone()
        call.arguments["sample"] = x = call.arguments["sample"].clone()
        before, skipped = run.index, state.skip
        probe = AffineProbe(state.inner, call)
        scaled = _scale(state.inner, call)
        output = ordinary(args, kwargs)
        estimate = (output[0] if run.slot is None else run.slot.y).clone()
        if run.index != before:
            self._ratio = _scale(state.inner, call) / scaled
            self._x, self._outputs, self._estimates, self._affine = x, [eps], [estimate], probe.find()
        elif not skipped:
            self._outputs.append(eps)
            self._estimates.append(estimate)
        _check(estimate, run.index, self.seeds)
        return output if run.slot is not None else self._finished(output)

    def _finished(self, output: Any) -> Any:
        """Keep the step that has ended; the step's output, with the next sample changed where that is wanted."""
        run = self.held.state.run
        assert run is not None
        own, affine, scale = self._own(), self._affine, self.held.state.scale
        x, outputs = self._x[own], [eps[own] for eps in self._outputs]
        denoise = Denoise(self.held, run.index, self._calls, x, outputs[0], self._found)
        self._calls = []
        step = Step(
            run.index,
            run.timestep,
            self.seeds,
            x,
            tuple(eps if scale == 1.0 else eps * scale for eps in outputs),
            tuple(estimate[own] for estimate in self._estimates),
            tuple(residual[own] for residual in run.residuals.get(run.index, ())),
            denoise,
            denoise.rescaled(self._ratio),
            *affine,
        )
        changed = None if self.change is None else self.change(step)
        if changed is not None:
            if changed.shape != step.y.shape:
                raise ValueError(f"change returned {tuple(changed.shape)}, expected a sample {tuple(step.y.shape)}")
            changed = changed.to(step.y)
            whole = torch.cat([changed] * (len(self._x) // len(x)))
            step = Step(**{**vars(step), "estimates": (*step.estimates[:-1], changed)})
            output = (whole, *output[1:]) if isinstance(output, tuple) else _replaced(output, whole)
        self.steps.append(step)
        return output

    def _own(self) -> slice:
        """The rows of the samples themselves: DiT hands its scheduler one copy of them for each part of the guidance."""
        count = len(self.seeds)
        copies = len(self._x) // count
        repeated = len(self._x) == copies * count and all(
            torch.equal(tensor, torch.cat([tensor[:count]] * copies)) for tensor in (self._x, self._outputs[0])
        )
        return slice(count if repeated else None)


def _scale(scheduler: Any, call: inspect.BoundArguments) -> float:
    """What the scheduler multiplies the model's inputs by, in the state that it is in."""
    scale_model_input = getattr(scheduler, "scale_model_input", None)
    if scale_model_input is None:
        return 1.0
    live = dict(vars(scheduler))
    ones = torch.ones_like(call.arguments["sample"])
    try:
        return float(scale_model_input(ones, call.arguments["timestep"]).double().mean())
    finally:
        vars(scheduler).clear()
        vars(scheduler).update(live)


def _replaced(output: Any, sample: Tensor) -> Any:
    return type(output)(**{**output, "prev_sample": sample})


def _check(sample: Tensor, index: int, seeds: Sequence[int]) -> None:
    finite = sample.flatten(1).isfinite().all(1).tolist()
    if not all(finite):
        bad = [seed for seed, fine in zip(seeds, finite, strict=False) if not fine]
        raise RuntimeError(f"after step {index} the samples of seeds {bad} hold NaN or infinity")
