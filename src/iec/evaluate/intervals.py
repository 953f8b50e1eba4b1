"""Metrics of a set of images with their values in resamples of the images: the same resamples for all arms.

The reference is held fixed: intervals say how a metric moves with the seeds, which all arms of a comparison share. What the
resamples have in common is computed once.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from iec.evaluate.bootstrap import DRAWS, Resampled, Scheme, halves, of_influence, of_mean, resamples, weights
from iec.evaluate.coverage import K, covered, precision, radii, recalls_of_parts
from iec.evaluate.influence import frechet_influence, kernel_influence
from iec.evaluate.metrics import (
    Moments,
    frechet_distance,
    inception_score,
    inception_splits,
    kernel_means,
    square_root,
)

SHARE = (0.0, 1.0)  # bounds of precision and recall
DISTANCE = (0.0, math.inf)


def fid(features: torch.Tensor, reference: Moments, draws: int = DRAWS, seed: int = 0) -> Resampled:
    """Fréchet distance of features (N, F) to the reference, resampled by the images' influences; also sFID, on spatial features.

    Raises ValueError as `Moments.of` and `frechet_distance` do, and below 2 images.
    """
    value = frechet_distance(Moments.of(features), reference)
    return of_influence(value, frechet_influence(features, reference).cpu(), draws, seed, DISTANCE)


def fid_of_resamples(features: torch.Tensor, reference: Moments, draws: int = DRAWS, seed: int = 0) -> Resampled:
    """`fid` with the distance of every resample computed in full: what the influences are checked against.

    Too wide for small distances and few images, see `iec.evaluate.influence`, and slow: each draw costs a matrix of
    dimensions and its eigenvalues.
    """
    moments = Moments.of(features)
    value = frechet_distance(moments, reference)
    count = len(features)
    centred = features.double() - moments.mean
    turned = centred @ square_root(reference.covariance())
    squares = centred.square().sum(1)
    gap, total = moments.mean - reference.mean, reference.covariance().trace()
    # About 0.63 N different rows are in a resample. Fewer than dimensions: then their Gram matrix has the same
    # eigenvalues as the matrix of dimensions, and is the smaller one.
    gram = turned @ turned.T if 0.65 * count < features.shape[1] else None

    def drawn(held: torch.Tensor) -> float:
        mean = held @ centred / count
        trace = (held @ squares - count * mean.square().sum()) / (count - 1)
        rows = held.nonzero().squeeze(1)
        some = held[rows]
        if gram is None:
            middle = held @ turned / count
            seen = (turned[rows] - middle) * some.sqrt().unsqueeze(1)
            product = seen.T @ seen
        else:
            inner = gram[rows][:, rows]
            means = inner @ some / count
            inner = inner - means - means.unsqueeze(1) + means @ some / count
            product = inner * torch.outer(some.sqrt(), some.sqrt())
        cross = torch.linalg.eigvalsh(product / (count - 1)).clamp(min=0).sqrt().sum()
        return max(0.0, ((gap + mean).square().sum() + trace + total - 2 * cross).item())

    found = [drawn(torch.from_numpy(row).to(centred)) for row in weights(count, draws, seed)]
    return Resampled(value, np.array(found), Scheme("bootstrap", count, seed), DISTANCE)


def kid(features: torch.Tensor, reference: torch.Tensor, draws: int = DRAWS, seed: int = 0) -> Resampled:
    """KID of features (N, F) to those of the reference (M, F), over all of them, resampled by the images' influences.

    Raises ValueError as `kernel_means` does.
    """
    means = kernel_means(features, reference)
    return of_influence(means.distance(), kernel_influence(means).cpu(), draws, seed)


def inception(logits: torch.Tensor, draws: int = DRAWS, seed: int = 0, *, split: int = 5000) -> Resampled:
    """IS from class logits (N, K), in splits as `inception_score`."""
    value = inception_score(logits, split=split).mean
    surely = logits.double().log_softmax(1)
    likely = surely.exp()
    certainty = (likely * surely).sum(1)  # minus the entropy of each image's classes
    found = []
    for rows in resamples(len(logits), draws, seed):
        scores = []
        for start, stop in inception_splits(len(rows), split):
            part = torch.from_numpy(rows[start:stop]).to(likely.device)
            marginal = likely[part].mean(0)
            scores.append(torch.exp(certainty[part].mean() - torch.special.xlogy(marginal, marginal).sum()))
        found.append(torch.stack(scores).mean().item())
    return Resampled(value, np.array(found), Scheme("bootstrap", len(logits), seed), (1.0, math.inf))


def precision_of(
    features: torch.Tensor, reference: torch.Tensor, draws: int = DRAWS, seed: int = 0, *, k: int = K
) -> Resampled:
    """Precision of features (N, F) among the reference (M, F)."""
    hits = covered(features, reference, radii(reference, k))
    return of_mean(hits.cpu().double(), draws, seed, bounds=SHARE)


def recall_of(
    features: torch.Tensor, reference: torch.Tensor, draws: int = DRAWS, seed: int = 0, *, k: int = K
) -> Resampled:
    """Recall of the reference (M, F) among features (N, F).

    A bootstrap would spoil it: an image that occurs k + 1 times has a ball of no width. Random halves of the images are
    taken instead, which spread as far about their mean as the whole does about its own; recall itself is lower in a half,
    and the interval, being centred, does not see that. Raises ValueError unless there are more than 2 k + 1 images.
    """
    value = precision(reference, features, k)
    count = len(features)
    if count // 2 <= k:
        raise ValueError(f"recall needs halves of more than k = {k} images, found {count} images in all")
    parts = [torch.from_numpy(rows) for rows in halves(count, draws, seed)]
    found = np.array(recalls_of_parts(features.cpu(), reference.cpu(), parts, k))
    half = count // 2
    spread = np.sqrt(half / (count - half))  # 1, or a little less when the half is rounded down
    return Resampled(value, found.mean() + spread * (found - found.mean()), Scheme("halves", count, seed), SHARE)


def rmse_of(squares: torch.Tensor, draws: int = DRAWS, seed: int = 0) -> Resampled:
    """Root of the mean of `squares` (N,), the images' mean square errors."""
    return of_mean(squares, draws, seed, np.sqrt, DISTANCE)


def psnr_of(squares: torch.Tensor, draws: int = DRAWS, seed: int = 0) -> Resampled:
    """-10 log10 of the mean of `squares` (N,), in dB; infinite where all images are equal."""
    return of_mean(squares, draws, seed, _decibel)


def _decibel(squares: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return -10 * np.log10(squares)
