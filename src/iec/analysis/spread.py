"""Means over samples, and how sure they are. Every sample counts once; intervals of means are two standard errors wide to each
side."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

WIDTH = 2.0  # standard errors to each side: about 95 % for some tens of samples


class Mean(NamedTuple):
    """A mean and its standard error; None for a single sample."""

    value: float
    sem: float | None


class Range(NamedTuple):
    """A value and the interval about it, if there is one."""

    value: float
    low: float | None
    high: float | None


def mean(values: Tensor) -> Mean:
    """Mean and standard error of the samples (N,). Samples that are not finite make the mean so, too."""
    values = values.double()
    sem = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(values.mean().item(), sem)


def geometric(values: Tensor) -> Range:
    """Geometric mean of factors (N,) such as growths and ratios, with its interval (none for a single sample).

    Zeros make it zero. Raises ValueError for a negative factor, or one that is not finite.
    """
    if not bool(((values >= 0) & values.isfinite()).all()):
        raise ValueError(f"{values.tolist()} are no factors; expected finite numbers of at least 0")
    if not bool(values.all()):
        return Range(0.0, None, None)
    centre, sem = mean(values.double().log())
    if sem is None:
        return Range(math.exp(centre), None, None)
    return Range(math.exp(centre), math.exp(centre - WIDTH * sem), math.exp(centre + WIDTH * sem))


def quartiles(values: Tensor) -> Range:
    """Median of the samples (N,), and the quartiles as its interval."""
    low, middle, high = torch.quantile(values.double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return Range(middle, low, high)


def rms(values: Tensor) -> Tensor:
    """Root mean square over all dimensions but the first `values` (N, …) -> (N,), float64."""
    return values.double().flatten(1).square().mean(1).sqrt()


def norms(values: Tensor) -> Tensor:
    """Euclidean norm of each sample (N, …) -> (N,), float64."""
    return torch.linalg.vector_norm(values.double().flatten(1), dim=1)


def roundings(dtype: torch.dtype) -> float:
    """The relative difference up to which two results of `dtype` are equal but for rounding."""
    return 16 * torch.finfo(dtype).eps
