"""What a scheduler's step does with sample and model output: Φ(x, ε) = a x + b ε (+ its noise), where it is so."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iec.schedule.replay import NoiseState, Snapshot

OFF = 1e-4  # relative, that Φ may be off a x + b ε: float32 inside schedulers, with cancellation


class Affine(NamedTuple):
    """`a` and `b` of a step, or None each and the `reason`."""

    a: float | None
    b: float | None
    reason: str | None = None


class AffineProbe:
    """Finds a and b of the step that a scheduler is about to take: made before the step, asked after it.

    Args:
        scheduler: the inner scheduler.
        call: the arguments of its `step`.
    """

    def __init__(self, scheduler: Any, call: inspect.BoundArguments) -> None:
        self.scheduler, self.call = scheduler, call
        self.x: Tensor = call.arguments["sample"]
        self.before = Snapshot(scheduler, self.x.shape)
        self.noise = NoiseState(call.arguments.get("generator"), self.x.device)

    def find(self) -> Affine:
        """Take the step again at other samples and model outputs (METHOD 1.1: A and B of DDIM); the scheduler and the noise
        are left as they are. None for a step that keeps a history, or is not affine: a and b alone do not tell what it does.
        """
        if self.before.has_history(self.scheduler):
            return Affine(
                None,
                None,
                f"{type(self.scheduler).__name__} keeps a history, so its step is no function of this sample and output alone",
            )
        output = self.call.arguments["model_output"]
        if output.shape != self.x.shape:
            shapes = f"{tuple(output.shape)} for samples {tuple(self.x.shape)}"
            return Affine(None, None, f"the scheduler takes more from the model than ε, a learned variance: {shapes}")
        live = Snapshot(self.scheduler, self.x.shape)
        try:
            return self._found()
        finally:
            live.restore(self.scheduler)

    def _found(self) -> Affine:
        generator = torch.Generator().manual_seed(0)
        p, q = (torch.randn(self.x.shape, generator=generator, dtype=torch.float64).to(self.x.device) for _ in range(2))
        zero = torch.zeros_like(p)
        constant = self._step(zero, zero)
        if constant.shape != p.shape:
            return Affine(None, None, f"the step returns samples of another shape, {tuple(constant.shape)}")
        a = float(((self._step(p, zero) - constant) * p).sum() / (p * p).sum())
        b = float(((self._step(zero, q) - constant) * q).sum() / (q * q).sum())
        for size in (1.0, -4.0):  # a clipped step is affine up to some size only
            found = self._step(size * p, size * q) - constant
            expected = size * (a * p + b * q)
            bound = OFF * abs(size) * (abs(a) + abs(b)) * float(torch.linalg.vector_norm(p))
            if not float(torch.linalg.vector_norm(found - expected)) <= bound:
                return Affine(
                    None,
                    None,
                    f"the step of {type(self.scheduler).__name__} is not affine in sample and output; make the scheduler with "
                    "clip_sample=False, thresholding=False",
                )
        return Affine(a, b)

    def _step(self, x: Tensor, eps: Tensor) -> Tensor:
        self.before.restore(self.scheduler)
        arguments = {**self.call.arguments, "sample": x, "model_output": eps}
        again = inspect.BoundArguments(self.call.signature, arguments)  # pyright: ignore[reportArgumentType]
        with self.noise.replay():
            return self.scheduler.step(*again.args, **again.kwargs)[0].double()
