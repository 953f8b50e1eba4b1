"""Iterative Error Correction: the damped fixed-point iteration at one sampling step (IEC, ICLR 2026, eq. 8 and alg. 1).

    x⁰ = Φ(x_t, ε(x_t, t))                              the ordinary step
    xᵏ⁺¹ = xᵏ + λₖ (Φ(x_t, ε(xᵏ, t)) − xᵏ)              the correction: same t, same x_t, new ε

Every sample of the batch (dimension 0) is on its own: its residual, its freezing, its standing back from a NaN. So the
result of a sample does not depend on its neighbours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

RESIDUAL_FLOOR = 1e-6  # added to ‖y‖ in the relative residual


class Trace(NamedTuple):
    """What a correction did: `evaluations` spent, `residuals` (K', B) of the K' ≤ K corrections that were evaluated."""

    evaluations: int
    residuals: Tensor


def check_relax(relax: Sequence[float] | float) -> tuple[float, ...]:
    """Return the relaxation factors (λ₁ … λ_K) as a tuple of floats.

    Raises ValueError unless there is at least one and each is finite and not negative; TypeError for what is no number.
    """
    given = relax if isinstance(relax, Iterable) else (relax,)
    try:
        factors = tuple(float(factor) for factor in given)
    except (TypeError, ValueError) as error:
        raise TypeError(f"relax is {relax!r}; expected factors (λ₁, …, λ_K), for example (0.5,)") from error
    if not factors:
        raise ValueError(
            "relax is empty (K = 0), so nothing would be corrected; use steps='none' to switch the correction off"
        )
    for factor in factors:
        if not math.isfinite(factor) or factor < 0:
            raise ValueError(
                f"relax holds {factor}; every relaxation factor λ must be finite and at least 0, usually 0.5"
            )
    return factors


def check_tol(tol: float | None) -> float | None:
    """Return `tol` as a float or None. Raises ValueError unless it is None or finite and not negative."""
    if tol is None:
        return None
    if not math.isfinite(tol) or tol < 0:
        raise ValueError(f"tol is {tol}; expected None or a relative residual such as 1e-5")
    return float(tol)


def _wide(tensor: Tensor) -> Tensor:
    """bf16 and fp16 are computed with in float32, float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def residual(new: Tensor, old: Tensor) -> Tensor:
    """Relative change (B,) of each sample of two tensors (B, …): ‖new − old‖₂ / (‖old‖₂ + 1e-6).

    A sample that holds a NaN or an infinity has a residual that is not finite.
    """
    if new.dim() == 1:  # samples of one number each
        new, old = new.unsqueeze(1), old.unsqueeze(1)
    new, old = _wide(new).flatten(1), _wide(old).flatten(1)
    return torch.linalg.vector_norm(new - old, dim=1) / (torch.linalg.vector_norm(old, dim=1) + RESIDUAL_FLOOR)


def blend(old: Tensor, new: Tensor, factor: float, active: Tensor) -> Tensor:
    """`old + factor·(new − old)` for the active samples, `old` for the others; dtype and bits of `old` at factor 0.

    old, new: (B, …); active: bool (B,). Computed in float32 at least.
    """
    if factor == 0.0:
        return old
    moved = _wide(old) + factor * (_wide(new).to(_wide(old).dtype) - _wide(old))
    mask = active.reshape(-1, *(1,) * (old.dim() - 1))
    return torch.where(mask, moved.to(old.dtype), old)


def finite(values: Tensor) -> Tensor:
    """Which samples of the residuals (B,) may be corrected: those without NaN or infinity."""
    return torch.isfinite(values)


@overload
def correct(
    phi: Callable[[Tensor], Tensor],
    denoise: Callable[[Tensor], Tensor],
    x_t: Tensor,
    relax: Sequence[float] = ...,
    tol: float | None = ...,
    *,
    return_trace: Literal[False] = ...,
) -> Tensor: ...


@overload
def correct(
    phi: Callable[[Tensor], Tensor],
    denoise: Callable[[Tensor], Tensor],
    x_t: Tensor,
    relax: Sequence[float] = ...,
    tol: float | None = ...,
    *,
    return_trace: Literal[True],
) -> tuple[Tensor, Trace]: ...


def correct(
    phi: Callable[[Tensor], Tensor],
    denoise: Callable[[Tensor], Tensor],
    x_t: Tensor,
    relax: Sequence[float] = (0.5,),
    tol: float | None = None,
    *,
    return_trace: bool = False,
) -> Tensor | tuple[Tensor, Trace]:
    """Take one sampling step from `x_t` and correct it K = len(relax) times; return x_{t-1}.

    Args:
        phi: the sampler's step with x_t, t and its noise held fixed: model output (B, …) → x_{t-1} (B, …).
        denoise: the model at the same t: sample (B, …) → model output. Called 1 + K times at most.
        x_t: the noisy sample (B, …), any shape and floating dtype.
        relax: (λ₁ … λ_K). The paper is (0.5,); (0.0,) is the ordinary step.
        tol: a sample whose relative residual ‖y' − y‖/(‖y‖ + 1e-6) falls below `tol` takes that update and is then frozen;
            when all are frozen the remaining evaluations are skipped. None: never.
        return_trace: also return a `Trace`.

    A sample whose correction is not finite keeps its last finite value and is frozen, with one RuntimeWarning.
    Raises ValueError or TypeError for a bad `relax` or `tol`.
    """
    factors, tol = check_relax(relax), check_tol(tol)
    y = phi(denoise(x_t))
    active = torch.ones(len(y), dtype=torch.bool, device=y.device)
    residuals: list[Tensor] = []
    for factor in factors:
        new = phi(denoise(y))
        change = residual(new, y)
        residuals.append(change)
        usable = finite(change)
        if not bool((usable | ~active).all()):
            warnings.warn(
                "IEC: the model's output in a correction is not finite; those samples keep their last step",
                RuntimeWarning,
                stacklevel=2,
            )
        active = active & usable
        y = blend(y, new, factor, active)
        if tol is not None:
            active = active & (change >= tol)
        if not bool(active.any()):
            break
    if return_trace:
        return y, Trace(1 + len(residuals), torch.stack(residuals))
    return y
