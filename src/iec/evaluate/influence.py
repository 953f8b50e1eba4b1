"""How much each image moves a metric: the derivative of the metric by the image's weight in the set.

With them a resample needs no metric anew, only the sum of its images' influences (Hampel 1974; the infinitesimal jackknife):
exact to first order, and free of what a bootstrap adds. That matters. A Fréchet distance or KID that is small, or taken from
few images, is mostly a square of sampling errors, and a resample errs about the set that erred already: its variance is
three times the true one where the square is all there is, and more where images are fewer than features. Without the square
of the resample's own error it is twice. On Gaussian features in 64 dimensions, one reference, over many seeds: 500 images
near the reference have a Fréchet distance of 2.4 ± 0.08; the bootstrap says ± 0.17, the influences ± 0.11; of 70 images,
20.2 ± 0.6, it is ± 2.8 against ± 0.8; far from the reference all three agree.
"""

from __future__ import annotations

import torch

from iec.evaluate.metrics import KernelMeans, Moments, chunks, square_root

_ZERO = 1e-14  # eigenvalues below this share of the largest are rounding


def frechet_influence(features: torch.Tensor, reference: Moments) -> torch.Tensor:
    """Derivatives (N,), float64, of the Fréchet distance of features (N, F) to `reference` by the weight of each.

    Weights are 1 and sum to N; the derivatives sum to 0. With deviations z from the mean m, the covariances S and C, and
    R the root of C, it is 2 z·(m - m_C) / N + z·(1 - R (R S R)^(-1/2) R) z / (N - 1), less the mean of that. Raises
    ValueError as `Moments.of` and `frechet_distance` do.
    """
    moments = Moments.of(features)
    if moments.mean.shape != reference.mean.shape:
        raise ValueError(f"features of {len(moments.mean)} and {len(reference.mean)} dimensions cannot be compared")
    count = len(features)
    root = square_root(reference.covariance())
    gap = 2 * (moments.mean - reference.mean) / count
    # z·R (R S R)^(-1/2) R z, the diagonal of a root of a matrix of images, or the same by one of dimensions: the smaller one.
    if count <= features.shape[1]:
        centred = features.double() - moments.mean
        turned = centred @ root
        crossed = square_root(turned @ turned.T).diagonal() * (count - 1) ** 0.5
        found = centred @ gap + (centred.square().sum(1) - crossed) / (count - 1)
    else:
        values, vectors = torch.linalg.eigh(root @ moments.covariance() @ root)
        kept = values > _ZERO * values[-1]
        turn = root @ vectors[:, kept] / values[kept] ** 0.25
        parts = []
        for _, rows in chunks(features, features.shape[1]):
            centred = rows.double() - moments.mean
            squares = centred.square().sum(1) - (centred @ turn).square().sum(1)
            parts.append(centred @ gap + squares / (count - 1))
        found = torch.cat(parts)
    return found - found.mean()


def kernel_influence(means: KernelMeans) -> torch.Tensor:
    """Derivatives (N,), float64, of KID by the weight of each of the images that have these mean kernels; they sum to 0.

    Twice the mean kernel of an image with the other images, less that with the reference, over N.
    """
    found = 2 * (means.within - means.across) / len(means.within)
    return found - found.mean()
