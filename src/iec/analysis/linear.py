"""Products with the derivative J = ∂ε/∂x of a denoiser at a point: exact by reverse mode, or by central differences."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Method = Literal["auto", "exact", "finite"]
METHODS: tuple[Method, ...] = ("auto", "exact", "finite")
STEPS = tuple(4.0**-k for k in range(6, 0, -1))  # of central differences, as fractions of ‖x‖
AGREE = 0.05  # relative, within which exact products must agree with differences


@dataclass(frozen=True, eq=False)
class Products:
    """J at one point, for each sample of a batch.

    Attributes:
        apply: v ↦ J v, (B, …) → (B, …).
        transpose: u ↦ Jᵀ u; None when there are differences only.
        method: "exact" or "finite".
        step: of the differences, as a fraction of ‖x‖: those that J v is made of, or that it was compared with.
        noise: relative: how far differences with neighbouring steps are apart ("finite"), or how far the exact product in
            a random direction lies from the difference ("exact").
        note: why it is "finite", or None.
    """

    apply: Callable[[Tensor], Tensor]
    transpose: Callable[[Tensor], Tensor] | None
    method: Literal["exact", "finite"]
    step: float
    noise: float
    note: str | None = None


def products(denoise: Callable[[Tensor], Tensor], x: Tensor, method: Method = "auto", seed: int = 0) -> Products:
    """Products with the derivative of `denoise` at x (B, …), of which every sample depends on itself alone.

    Args:
        denoise: x ↦ ε, such as `Step.denoise`. Its `modules`, if it has that attribute, are held in eval mode and their
            parameters out of the graph meanwhile.
        x: the point, in float32 or float64 for exact products.
        method: "exact": J v and Jᵀ u by reverse mode, J v as the derivative of the linear map u ↦ Jᵀ u; the graph of two
            backward passes is held as long as the result is. "finite": J v by central differences, two evaluations each.
            "auto": exact where it can be and is right. Exact products are compared with differences in a random
            direction: rounding (of quantized layers), a detached network or a kernel without derivative do not pass.
        seed: of that direction.

    Raises RuntimeError when "exact" is asked for and cannot be had, with the reason; ValueError for another method.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    differences, slope, noise = _calibrated(denoise, x, direction)
    if method == "finite":
        return Products(differences.apply, None, "finite", differences.step, noise, "asked for")
    try:
        exact = _Exact(denoise, x)
        off = _off(exact.apply(direction), slope)
        if not off <= AGREE:
            raise RuntimeError(
                f"its derivative differs by {off:.1%} from central differences (step {differences.step:.1e} ‖x‖), as that of a "
                "model that rounds or detaches does"
            )
    except RuntimeError as error:
        if method == "exact":
            raise RuntimeError(f"no exact derivative of this denoiser: {error}; use method='finite'") from error
        return Products(differences.apply, None, "finite", differences.step, noise, str(error).splitlines()[0])
    return Products(exact.apply, exact.transpose, "exact", differences.step, off)


class _Exact:
    """Reverse mode, twice: Jᵀ u from the graph of ε(x), J v from the graph of u ↦ Jᵀ u."""

    def __init__(self, denoise: Callable[[Tensor], Tensor], x: Tensor) -> None:
        if x.dtype not in (torch.float32, torch.float64):
            raise RuntimeError(f"the samples are {x.dtype}, too coarse for a derivative; load the pipeline in float32")
        # Fused attention has no second derivative.
        with _evaluating(denoise), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            self.x = x.detach().clone().requires_grad_()
            self.eps = denoise(self.x)
            if not self.eps.requires_grad:
                raise RuntimeError(
                    "its output carries no derivative with respect to its input (kernels without gradients)"
                )
            self.u = torch.zeros_like(self.eps).requires_grad_()
            self.back = torch.autograd.grad(self.eps, self.x, self.u, create_graph=True)[0]
            if not self.back.requires_grad:
                raise RuntimeError("the derivative of its derivative is cut off")

    def apply(self, v: Tensor) -> Tensor:
        return torch.autograd.grad(self.back, self.u, v.to(self.back), retain_graph=True)[0]

    def transpose(self, u: Tensor) -> Tensor:
        return torch.autograd.grad(self.eps, self.x, u.to(self.eps), retain_graph=True)[0]


@contextlib.contextmanager
def _evaluating(denoise: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The modules of `denoise` in eval mode, their parameters out of the graph."""
    torches = [module for module in getattr(denoise, "modules", ()) if isinstance(module, nn.Module)]
    training = [part for module in torches for part in module.modules() if part.training]
    wanting = [parameter for module in torches for parameter in module.parameters() if parameter.requires_grad]
    try:
        for part in training:
            part.training = False
        for parameter in wanting:
            parameter.requires_grad_(False)
        yield
    finally:
        for part in training:
            part.training = True
        for parameter in wanting:
            parameter.requires_grad_(True)


class _Differences:
    """J v ≈ (ε(x + h) − ε(x − h)) ‖v‖ / (2 ‖h‖) with ‖h‖ = `step`·‖x‖ along v, for each sample."""

    def __init__(self, denoise: Callable[[Tensor], Tensor], x: Tensor, step: float) -> None:
        self.denoise, self.x, self.step = denoise, x.detach(), step
        self.size = _lengths(x)

    def apply(self, v: Tensor) -> Tensor:
        length = _lengths(v)
        one = torch.where(length > 0, v / length.clamp(min=torch.finfo(v.dtype).tiny), torch.zeros_like(v))
        way = (self.step * self.size * one).to(self.x)
        with _evaluating(self.denoise), torch.no_grad():
            ahead, behind = self.denoise(self.x + way), self.denoise(self.x - way)
        # double: the difference of two nearly equal outputs
        slope = (ahead.double() - behind.double()) * (length / (2 * self.step * self.size)).double()
        return slope.to(v.dtype)


def _calibrated(
    denoise: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor
) -> tuple[_Differences, Tensor, float]:
    """The differences whose step suits the model, the slope they give along `direction`, and their noise.

    Small steps drown in rounding, large ones in curvature. Of a ladder of steps the one is taken whose slope is nearest to
    those of both its neighbours.
    """
    if not bool((_lengths(x) > 0).all()):
        raise ValueError("a sample is zero everywhere, which gives no scale for differences")
    tried = [_Differences(denoise, x, step) for step in STEPS]
    slopes = [differences.apply(direction) for differences in tried]
    still = [not bool((_lengths(slope) > 0).all()) for slope in slopes]
    if all(still):  # ε does not depend on x
        return tried[0], slopes[0], 0.0
    # A step too small for any rounded value to move gives zero, in good agreement with the next such step.
    apart = [math.inf if still[k] or still[k + 1] else _off(slopes[k + 1], slopes[k]) for k in range(len(slopes) - 1)]
    noises = [max(apart[max(k - 1, 0)], apart[min(k, len(apart) - 1)]) for k in range(len(slopes))]
    best = min(range(len(noises)), key=noises.__getitem__)
    return tried[best], slopes[best], noises[best]


def _off(found: Tensor, expected: Tensor) -> float:
    """The largest relative distance over the samples; infinite where one is not finite."""
    size = _lengths(expected.double()).flatten()
    off = _lengths(found.double() - expected.double()).flatten()
    worst = float(
        torch.where(off == 0, torch.zeros_like(off), off / size.clamp(min=torch.finfo(torch.float64).tiny)).max()
    )
    return math.inf if math.isnan(worst) else worst


def _lengths(samples: Tensor) -> Tensor:
    """The norm of each sample, (B, 1, …)."""
    return torch.linalg.vector_norm(samples, dim=tuple(range(1, samples.dim())), keepdim=True)
