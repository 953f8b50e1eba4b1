"""Each metric by its name: what it needs, its value, and its values in the resamples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from iec.evaluate.bootstrap import Resampled, Scheme, halves, of_mean, of_rows
from iec.evaluate.metrics import Moments, frechet_distance, inception_score, kernel_distance
from iec.evaluate.references import ReferenceSet
from iec.evaluate.statistics import Statistics

SETS = ("fid", "sfid", "kid", "is", "precision", "recall")
PAIRS = {"rmse": "mse", "psnr": "mse", "ssim": "ssim", "lpips": "lpips"}  # metric: the score per image it is made of


def _mse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.double() / 255 - b.double() / 255).square().mean(dim=(1, 2, 3))


def _ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    from iec.evaluate.similarity import ssim

    return ssim(a, b)


def _lpips(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    from iec.evaluate.similarity import lpips

    return lpips(a, b).double()


# Scores of image pairs uint8 (N, C, H, W): (N,), float64. The mean square error and not its root, as it is what is averaged.
PAIRED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"mse": _mse, "ssim": _ssim, "lpips": _lpips}


def score_of(metric: str) -> str | None:
    """The score per image that a metric averages, "mse_fine" for "rmse_fine"; None for metrics of sets.

    Raises ValueError for an unknown name.
    """
    if metric == "clip":
        return "clip"
    kind, _, target = metric.partition("_")
    if kind in PAIRS and target:
        return f"{PAIRS[kind]}_{target}"
    if metric in SETS:
        return None
    paired = ", ".join(f"{kind}_TARGET" for kind in PAIRS)
    raise ValueError(f"unknown metric {metric!r}; known: {', '.join(SETS)}, {paired}, clip")


def check(metrics: Sequence[str], statistics: Statistics, reference: ReferenceSet | None) -> None:
    """Raise ValueError unless all `metrics` can be had, before time is spent on the first."""
    for metric in metrics:
        score = score_of(metric)
        if score is not None:
            statistics.score(score)
        elif metric == "is":
            if statistics.logits is None:
                raise ValueError(f"is: the network {statistics.network} has no classes")
        elif reference is None:
            raise ValueError(f"{metric} compares with a set of images, and no reference was given")
        elif reference.network != statistics.network:
            raise ValueError(
                f"{metric}: the reference {reference.name!r} was made with {reference.network}, these images with "
                f"{statistics.network}; use one network for both"
            )
        elif metric == "sfid" and (reference.spatial is None or statistics.spatial is None):
            raise ValueError(f"sfid: no spatial features of {reference.name!r} or of the images; sFID is Inception's")
        elif metric in ("kid", "precision", "recall") and reference.features is None:
            raise ValueError(
                f"{metric} needs the features of the reference images, and {reference.name!r} has only their moments; give "
                "the images, or statistics that `iec evaluate --save-reference` wrote"
            )


def measured(metric: str, statistics: Statistics, reference: ReferenceSet | None, draws: int, seed: int) -> Resampled:
    """The metric and its values in the resamples. Raises as `check` does, and for too few images."""
    score = score_of(metric)
    if score is not None:
        values = statistics.score(score)
        kind = metric.partition("_")[0]
        if kind == "rmse":
            return of_mean(values, draws, seed, np.sqrt)
        return of_mean(values, draws, seed, _decibels) if kind == "psnr" else of_mean(values, draws, seed)
    if len(statistics) < 2:
        raise ValueError(f"{metric} needs at least 2 images, found {len(statistics)}")
    if metric == "is":
        assert statistics.logits is not None
        return of_rows(lambda rows: inception_score(rows).mean, statistics.logits, draws, seed)
    assert reference is not None
    if metric == "fid":
        moments = reference.moments
        return of_rows(lambda rows: frechet_distance(Moments.of(rows), moments), statistics.pool, draws, seed)
    if metric == "sfid":
        spatial = reference.spatial
        assert spatial is not None and statistics.spatial is not None
        return of_rows(lambda rows: frechet_distance(Moments.of(rows), spatial), statistics.spatial, draws, seed)
    features = reference.features
    assert features is not None
    if metric == "kid":
        return _of_halves(lambda rows: kernel_distance(rows, features).mean, statistics.pool, draws, seed)
    raise NotImplementedError(metric)


def _of_halves(statistic: Callable[[torch.Tensor], float], rows: torch.Tensor, draws: int, seed: int) -> Resampled:
    drawn = [statistic(rows[torch.from_numpy(chosen)]) for chosen in halves(len(rows), draws, seed)]
    return Resampled(statistic(rows), np.array(drawn), Scheme("halves", len(rows), seed))


def _decibels(mean_square: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):  # equal images have an infinite PSNR
        return -10 * np.log10(mean_square)
