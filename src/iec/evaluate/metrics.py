"""Distances between sets of features: Fréchet distance (FID, sFID), KID, and the Inception score.

All arithmetic is float64. No distance is comparable across feature networks: name the network and N beside the number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch

BLOCK = 2**24  # values of a kernel that are held at once, 128 MiB


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


def square_root(matrix: torch.Tensor) -> torch.Tensor:
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
    root = square_root(first)
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


def polynomial_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """KID's kernel (x·y / F + 1)³ of all pairs of features (N, F) and (M, F): (N, M)."""
    base = (x @ y.T).div_(x.shape[1]).add_(1)
    return base.square().mul_(base)


def _two_sets(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float64. Raises ValueError unless they are features (N, F) and (M, F), at least 2 of each, all finite."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features of {tuple(a.shape)} and {tuple(b.shape)}: expected (N, F) and (M, F)")
    a, b = a.double(), b.double()
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features hold values that are not finite")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"KID needs at least 2 features on each side, found {len(a)} and {len(b)}")
    return a, b


def kernel_distance(
    a: torch.Tensor, b: torch.Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Estimate:
    """KID (Bińkowski et al. 2018) between features (N, F) and (M, F): unbiased MMD² with the kernel (x·y / F + 1)³.

    The mean over `subsets` random subsets, drawn without replacement from each side with `seed`; their size is
    `subset_size`, or the smaller of N and M. Unbiased for any N, hence near zero, or below, for equal distributions.
    """
    a, b = _two_sets(a, b)
    size = min(subset_size, len(a), len(b))
    if size < 2 or subsets < 1:
        raise ValueError(f"KID needs at least one subset of 2 or more, found {subsets} of {size}")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        x = a[torch.randperm(len(a), generator=generator)[:size]]
        y = b[torch.randperm(len(b), generator=generator)[:size]]
        within = polynomial_kernel(x, x), polynomial_kernel(y, y)
        pairs = sum(k.sum() - k.trace() for k in within) / (size * (size - 1))
        values.append(pairs - 2 * polynomial_kernel(x, y).mean())
    return _estimate(values)


def kernel_distance_exact(a: torch.Tensor, b: torch.Tensor) -> float:
    """KID over all of the features (N, F) and (M, F), without subsets: what `kernel_distance` tends to with many of them.

    It has the expected value of any number and size of subsets, so it is comparable with published values, but none of
    the noise of drawing them. Raises ValueError unless both sides hold at least 2 features, all finite.
    """
    return kernel_means(a, b).distance()


class KernelMeans(NamedTuple):
    """Mean kernels of N images: of each with the others, `within` (N,), and with the M of the reference, `across` (N,).

    `real` is that of all pairs of different images of the reference.
    """

    within: torch.Tensor
    across: torch.Tensor
    real: float

    def distance(self) -> float:
        """KID, over all pairs."""
        return self.within.mean().item() + self.real - 2 * self.across.mean().item()


def kernel_means(a: torch.Tensor, b: torch.Tensor) -> KernelMeans:
    """Mean kernels of features (N, F) with themselves and (M, F), in blocks that fit into memory.

    Raises ValueError unless both sides hold at least 2 features, all finite.
    """
    a, b = _two_sets(a, b)
    across = torch.cat([polynomial_kernel(rows, b).mean(1) for _, rows in chunks(a, len(b))])
    return KernelMeans(_with_others(a), across, _with_others(b).mean().item())


def _with_others(features: torch.Tensor) -> torch.Tensor:
    """Mean kernel (N,) of each of the features (N, F) with the others."""
    parts = []
    for start, rows in chunks(features, len(features)):
        kernel = polynomial_kernel(rows, features)
        kernel.diagonal(offset=start).fill_(0)
        parts.append(kernel.sum(1) / (len(features) - 1))
    return torch.cat(parts)


def chunks(rows: torch.Tensor, width: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Consecutive chunks of `rows` (N, F) with the number of their first row, so that `width` values of each take 128 MiB."""
    size = max(1, BLOCK // width)
    return ((start, rows[start : start + size]) for start in range(0, len(rows), size))


def inception_splits(count: int, split: int = 5000, splits: int | None = None) -> list[tuple[int, int]]:
    """Ends (start, stop) of the consecutive parts of `count` images over which IS is averaged.

    Parts of `split` images, the last possibly shorter and yet counted as much, as the evaluator of guided-diffusion does;
    or `splits` parts of about equal size, as Salimans et al. and torch-fidelity (10) do.
    Raises ValueError for parts without images.
    """
    if splits is not None:
        if not 1 <= splits <= count:
            raise ValueError(f"{count} images cannot be cut into {splits} splits")
        return [(i * count // splits, (i + 1) * count // splits) for i in range(splits)]
    if split < 1 or count < 1:
        raise ValueError(f"{count} images in splits of {split}: expected at least 1 image and a split of at least 1")
    return [(start, min(start + split, count)) for start in range(0, count, split)]


def inception_score(logits: torch.Tensor, *, split: int = 5000, splits: int | None = None) -> Estimate:
    """IS (Salimans et al. 2016) from class logits (N, classes): exp of the mean KL(p(y|x) || p(y)), 1..classes.

    The mean over consecutive parts, see `inception_splits`. It is biased downwards for small parts. With a domain classifier it
    says whether images are recognisable and of all classes. Raises ValueError for another rank, no rows, or NaN.
    """
    if logits.ndim != 2 or len(logits) == 0:
        raise ValueError(f"logits of {tuple(logits.shape)}: expected (N, classes) with N >= 1")
    if not bool(logits.isfinite().all()):
        raise ValueError("logits hold values that are not finite")
    scores = []
    for start, stop in inception_splits(len(logits), split, splits):
        conditional = logits[start:stop].double().log_softmax(1)
        marginal = conditional.logsumexp(0) - torch.tensor(stop - start, dtype=torch.float64).log()
        scores.append((conditional.exp() * (conditional - marginal)).sum(1).mean().exp())
    return _estimate(scores)
