"""How far images are from others: same-seed differences, and distances between sets of features.

Images are tensors (N, C, H, W): uint8 (0..255) or floats in 0..1; the two sides of a comparison may differ in that.
All arithmetic is float64. No distance is comparable across feature networks: name the network and N beside the number.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch


def _unit(images: torch.Tensor) -> torch.Tensor:
    """Images as float64 in 0..1."""
    if images.ndim != 4:
        raise ValueError(f"images have the shape {tuple(images.shape)}, expected (N, C, H, W)")
    if images.dtype == torch.uint8:
        return images.double() / 255
    if not images.is_floating_point():
        raise TypeError(f"images are {images.dtype}, expected uint8 or floats in 0..1")
    unit = images.double()
    if not bool(((unit >= 0) & (unit <= 1)).all()):  # false for NaN too
        raise ValueError("float images have values outside 0..1 (or NaN); bring them to 0..1, or give uint8")
    return unit


def _mean_squares(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.shape != b.shape or len(a) == 0:
        raise ValueError(f"images of {tuple(a.shape)} and {tuple(b.shape)}: expected two equal, non-empty shapes")
    return (_unit(a) - _unit(b)).square().mean(dim=(1, 2, 3))


def rmse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Root mean square difference of each image pair (N,), float64, in 0..1 (1 is black against white)."""
    return _mean_squares(a, b).sqrt()


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image pair (N,) in dB: -20 log10(rmse), peak 1; infinite for equal images."""
    return -20 * rmse(a, b).log10()


class Fidelity(NamedTuple):
    """`rmse`: mean of the images' RMSE. `psnr`: dB from the mean square error over all images, -10 log10(mean MSE).

    The mean square is taken before the logarithm, so one image that is equal on both sides does not make it infinite.
    """

    rmse: float
    psnr: float


def fidelity(a: torch.Tensor, b: torch.Tensor) -> Fidelity:
    """Same-seed difference between two sets of images, in two numbers."""
    squares = _mean_squares(a, b)
    return Fidelity(squares.sqrt().mean().item(), -10 * squares.mean().log10().item())


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean (F,) and scatter (F, F) of `count` feature vectors, float64.

    The scatter is the sum of outer products of the deviations from the mean: unlike the raw second moment it loses no
    digits when the mean is large. Moments of parts merge into those of the whole (Chan et al. 1979).
    """

    count: int
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> Moments:
        """Moments of features (N, F). Raises ValueError for another rank, no rows, or values that are not finite."""
        if features.ndim != 2 or len(features) == 0:
            raise ValueError(f"features have the shape {tuple(features.shape)}, expected (N, F) with N >= 1")
        held = features.double()
        if not bool(held.isfinite().all()):
            raise ValueError("features hold values that are not finite")
        mean = held.mean(0)
        centred = held - mean
        return cls(len(held), mean, centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"features of {len(self.mean)} and {len(other.mean)} dimensions cannot be merged")
        count = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        scatter = self.scatter + other.scatter + torch.outer(gap, gap) * (self.count * other.count / count)
        return Moments(count, mean, scatter)

    def covariance(self) -> torch.Tensor:
        """Sample covariance (F, F), divided by count - 1. Raises ValueError below two vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, found {self.count}")
        return self.scatter / (self.count - 1)


def _root(matrix: torch.Tensor) -> torch.Tensor:
    """Square root of a symmetric positive semi-definite matrix; eigenvalues negative by rounding count as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance between the Gaussians of two sets of features; FID when the features are Inception's.

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr sqrt(S1^1/2 S2 S1^1/2): the symmetric form of Heusel et al. 2017, whose square
    root always exists, so singular covariances need no epsilon. It is biased upwards for small N: compare equal N only.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and {len(b.mean)} dimensions cannot be compared")
    first, second = a.covariance(), b.covariance()
    root = _root(first)
    product = root @ second @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + first.trace() + second.trace() - 2 * cross
    return max(0.0, distance.item())


class Estimate(NamedTuple):
    """A mean over subsets or splits, and their standard deviation (0 for a single one)."""

    mean: float
    std: float


def _estimate(values: list[torch.Tensor]) -> Estimate:
    stacked = torch.stack(values)
    return Estimate(stacked.mean().item(), stacked.std(correction=0).item())


def kernel_distance(
    a: torch.Tensor, b: torch.Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Estimate:
    """KID (Bińkowski et al. 2018) between features (N, F) and (M, F): unbiased MMD² with the kernel (x·y / F + 1)³.

    The mean over `subsets` random subsets, drawn without replacement from each side with `seed`; their size is
    `subset_size`, or the smaller of N and M. Unbiased for any N, hence near zero, or below, for equal distributions.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features of {tuple(a.shape)} and {tuple(b.shape)}: expected (N, F) and (M, F)")
    size = min(subset_size, len(a), len(b))
    if size < 2 or subsets < 1:
        raise ValueError(f"KID needs at least one subset of 2 or more, found {subsets} of {size}")
    generator = torch.Generator().manual_seed(seed)
    a, b = a.double(), b.double()

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    values = []
    for _ in range(subsets):
        x = a[torch.randperm(len(a), generator=generator)[:size]]
        y = b[torch.randperm(len(b), generator=generator)[:size]]
        within = kernel(x, x), kernel(y, y)
        pairs = sum(k.sum() - k.trace() for k in within) / (size * (size - 1))
        values.append(pairs - 2 * kernel(x, y).mean())
    return _estimate(values)


def inception_score(logits: torch.Tensor, *, split: int = 5000) -> Estimate:
    """IS (Salimans et al. 2016) from class logits (N, classes): exp of the mean KL(p(y|x) || p(y)), 1..classes.

    The mean over consecutive splits of `split` images, the last possibly shorter, as the evaluator of guided-diffusion
    does. With a domain classifier it says whether images are recognisable and of all classes.
    """
    if logits.ndim != 2 or len(logits) == 0 or split < 1:
        raise ValueError(
            f"logits of {tuple(logits.shape)} in splits of {split}: expected (N, classes), N and split >= 1"
        )
    scores = []
    for part in logits.double().split(split):
        conditional = part.log_softmax(1)
        marginal = conditional.logsumexp(0) - torch.tensor(len(part), dtype=torch.float64).log()
        scores.append((conditional.exp() * (conditional - marginal)).sum(1).mean().exp())
    return _estimate(scores)
