"""A step's calls of its denoisers as functions of the sample: where it stands in their inputs, how ε is made of their outputs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
class Piece:
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


def pieces(calls: Sequence[Call], x: Tensor, eps: Tensor) -> tuple[Piece, ...]:
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
        Piece(
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
        if off <= tolerance(eps, weights):
            return tuple(weights)
        offs.append(off)
    raise RuntimeError(
        f"the model output handed to the scheduler is no fixed combination of the denoiser's {len(outputs)} outputs (off by "
        f"{min(offs):.1e} of their norm); guidance_rescale and the like depend on the outputs themselves: switch them off"
    )


def tolerance(eps: Tensor, weights: Sequence[float]) -> float:
    """By what fraction a combination of outputs with these weights may differ from `eps`."""
    return ROUNDINGS * torch.finfo(eps.dtype).eps * sum(abs(weight) for weight in weights)
