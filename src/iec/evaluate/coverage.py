"""Precision and recall of a set of images by nearest neighbours in feature space (Kynkäänniemi et al. 2019).

Each set is taken to be the union of balls about its features, each as wide as the distance to the k-th nearest other
feature of the same set. Precision is the share of samples in the balls of the real images (are they like real ones?), recall
the share of real images in the balls of the samples (is everything there?). Both depend on the sizes of the two sets
and on k: compare equal sizes only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

K = 3
_ELEMENTS = 2**24  # of a block of distances, 128 MiB in float64
_ROUNDING = 1e-12  # of a squared distance, relative to the squared norms that it is a difference of


class Coverage(NamedTuple):
    """Shares in 0..1."""

    precision: float
    recall: float


def _checked(features: torch.Tensor, least: int, what: str) -> torch.Tensor:
    if features.ndim != 2 or len(features) < least:
        raise ValueError(f"{what} have the shape {tuple(features.shape)}, expected (N, F) with N >= {least}")
    held = features.double()
    if not bool(held.isfinite().all()):
        raise ValueError(f"{what} hold values that are not finite")
    return held


def _blocks(points: torch.Tensor, centres: torch.Tensor, *, least: bool = False) -> Iterator[tuple[int, torch.Tensor]]:
    """Squared distances of `points` (N, F) to all `centres` (M, F), block by block: (first row, (rows, M)).

    From the product of the two sets, which is fast; where only rounding is left of a distance, it is zero exactly, so that
    equal images are at no distance. `least`: less what rounding may have added, so that a point on the surface of a
    ball is never left outside by it.
    """
    origin = centres.mean(0)  # a common offset would cost digits
    points, centres = points - origin, centres - origin
    norms = centres.square().sum(1)
    rows = max(1, _ELEMENTS // len(centres))
    for start in range(0, len(points), rows):
        block = points[start : start + rows]
        scale = block.square().sum(1, keepdim=True) + norms
        distances = scale - 2 * (block @ centres.T)
        slack = scale.mul_(_ROUNDING)
        yield start, distances - slack if least else distances.masked_fill_(distances < slack, 0.0)


def nearest(features: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances (N, k), ascending, of each of the features (N, F) to its k nearest others, and their rows (N, k).

    Raises ValueError unless there are more than k features, all finite, and k >= 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}, expected at least the first neighbour")
    held = _checked(features, k + 1, "features")
    distances, rows = [], []
    for start, block in _blocks(held, held):
        block.diagonal(offset=start).fill_(torch.inf)  # itself
        found = block.topk(k, dim=1, largest=False)
        distances.append(found.values)
        rows.append(found.indices)
    return torch.cat(distances), torch.cat(rows)


def radii(features: torch.Tensor, k: int = K) -> torch.Tensor:
    """Squared radius (N,) of the ball about each of the features (N, F): to the k-th nearest other one. Raises as `nearest`."""
    return nearest(features, k)[0][:, -1]


def covered(points: torch.Tensor, centres: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Whether each of `points` (N, F) lies in a ball (its surface counts) about `centres` (M, F) of squared radii `squares` (M,).

    Boolean (N,). Raises ValueError for features that do not fit together or are not finite.
    """
    if points.ndim != 2 or centres.ndim != 2 or points.shape[1] != centres.shape[1] or len(squares) != len(centres):
        raise ValueError(
            f"points {tuple(points.shape)}, centres {tuple(centres.shape)}, {len(squares)} radii: "
            "expected (N, F), (M, F) and M radii"
        )
    points, centres = _checked(points, 1, "points"), _checked(centres, 1, "centres")
    return torch.cat([(block <= squares).any(1) for _, block in _blocks(points, centres, least=True)])


def precision(samples: torch.Tensor, reference: torch.Tensor, k: int = K) -> float:
    """Share of the features `samples` (N, F) that lie among those of the reference (M, F)."""
    return covered(samples, reference, radii(reference, k)).double().mean().item()


def recall(samples: torch.Tensor, reference: torch.Tensor, k: int = K) -> float:
    """Share of the features `reference` (M, F) that lie among those of the samples (N, F)."""
    return precision(reference, samples, k)


def precision_recall(samples: torch.Tensor, reference: torch.Tensor, k: int = K) -> Coverage:
    """Both. Raises ValueError unless both sets hold more than k features (N, F), (M, F), all finite."""
    return Coverage(precision(samples, reference, k), recall(samples, reference, k))


def recalls_of_parts(
    samples: torch.Tensor, reference: torch.Tensor, parts: Iterable[torch.Tensor], k: int = K
) -> list[float]:
    """Recall of each part of the samples (row numbers of different rows), with the radii that the part alone has.

    As `recall(samples[part], reference, k)`, but all distances are computed once: of a part, only the first few
    neighbours and the pairs of reference and samples within their reach matter.
    """
    parts = list(parts)
    if not parts:
        return []
    reach = min(len(samples) - 1, max(8 * k, 8))
    near, rows = nearest(samples, reach)
    pairs = _pairs_within(_checked(reference, 1, "reference"), samples.double(), near[:, -1])
    found = []
    for part in parts:
        within = torch.zeros(len(samples), dtype=torch.bool)
        within[part] = True
        squares = _kth(near, within[rows], k)
        # Fewer than k of the part among the neighbours: rare in a half, and beyond the reach that the pairs were kept for.
        if bool((squares.isinf() & within).any()):
            found.append(recall(samples[part], reference, k))
            continue
        points, centres, distances = pairs
        hit = torch.zeros(len(reference), dtype=torch.bool)
        hit[points[within[centres] & (distances <= squares[centres])]] = True
        found.append(hit.double().mean().item())
    return found


def _kth(near: torch.Tensor, kept: torch.Tensor, k: int) -> torch.Tensor:
    """Of the ascending `near` (N, L), the k-th that is `kept` (N, L); infinite where fewer are."""
    ranks = kept.cumsum(1)
    at = (ranks < k).sum(1)  # position of the k-th kept one
    values = near.gather(1, at.clamp(max=near.shape[1] - 1).unsqueeze(1)).squeeze(1)
    return values.masked_fill(at == near.shape[1], torch.inf)


def _pairs_within(
    points: torch.Tensor, centres: torch.Tensor, squares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of points and centres, and squared distances, of all pairs within the radii of the centres."""
    found: list[tuple[torch.Tensor, ...]] = []
    for start, block in _blocks(points, centres, least=True):
        at = (block <= squares).nonzero()
        found.append((at[:, 0] + start, at[:, 1], block[at[:, 0], at[:, 1]]))
    first, second, distances = zip(*found, strict=True)
    return torch.cat(first), torch.cat(second), torch.cat(distances)
