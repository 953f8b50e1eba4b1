"""Means over samples, and how sure they are. Every sample counts once; intervals are two standard errors to each side."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

WIDTH = 2.0  # standard errors to each side: about 95 % for some tens of samples


class Mean(NamedTuple):
    """A mean and its standard error; the latter is NaN for a single sample."""

    value: float
    sem: float


class Range(NamedTuple):
    """A value and the interval about it; the interval is NaN for a single sample."""

    value: float
    low: float
    high: float


def mean(values: Tensor) -> Mean:
    """Mean and standard error of the samples (N,). Samples that are not finite make the mean so, too."""
    values = values.double()
    sem = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(values.mean().item(), sem)


def geometric(values: Tensor) -> Range:
    """Geometric mean of positive factors (N,), such as growths and ratios, with its interval; zeros make it zero."""
    if not bool((values > 0).all()):
        return Range(0.0 if bool((values == 0).any()) else math.nan, math.nan, math.nan)
    centre, sem = mean(values.double().log())
    return Range(math.exp(centre), *(math.exp(centre + sign * WIDTH * sem) for sign in (-1, 1)))


def rms(values: Tensor) -> Tensor:
    """Root mean square over all dimensions but the first `values` (N, …) -> (N,), float64."""
    return values.double().flatten(1).square().mean(1).sqrt()


def norms(values: Tensor) -> Tensor:
    """Euclidean norm of each sample (N, …) -> (N,), float64."""
    return torch.linalg.vector_norm(values.double().flatten(1), dim=1)


def roundings(dtype: torch.dtype) -> float:
    """The relative difference up to which two results of `dtype` are equal but for rounding."""
    return 16 * torch.finfo(dtype).eps
