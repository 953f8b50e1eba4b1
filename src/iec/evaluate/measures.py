"""Each metric by its name: what it needs, its value, and its values in the resamples of the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from iec.evaluate import intervals
from iec.evaluate.bootstrap import Resampled, Scheme, of_mean
from iec.evaluate.coverage import K, precision, recall
from iec.evaluate.metrics import Moments, frechet_distance, inception_score, kernel_distance_exact
from iec.evaluate.references import ReferenceSet
from iec.evaluate.statistics import Statistics


class _OfSets(NamedTuple):
    """A metric of features against those of a reference: what it takes of the two, and how it is computed."""

    rows: str  # field of Statistics
    against: str | None  # field of ReferenceSet
    value: Callable[..., float]
    resampled: Callable[..., Resampled]
    least: int = 2  # images that it takes
    drawn: int = 2  # images that its resamples take
    real: int = 2  # images of the reference that it takes


def _distance(features: torch.Tensor, moments: Moments) -> float:
    return frechet_distance(Moments.of(features), moments)


_SETS = {
    "fid": _OfSets("pool", "moments", _distance, intervals.fid),
    "sfid": _OfSets("spatial", "spatial", _distance, intervals.fid),
    "kid": _OfSets("pool", "features", kernel_distance_exact, intervals.kid),
    "is": _OfSets("logits", None, lambda x: inception_score(x).mean, intervals.inception, 1, 1),
    "precision": _OfSets("pool", "features", precision, intervals.precision_of, 1, 1, K + 1),
    "recall": _OfSets("pool", "features", recall, intervals.recall_of, K + 1, 2 * (K + 1), 1),
}


class _OfImages(NamedTuple):
    """A metric that averages a score per image."""

    score: str
    resampled: Callable[..., Resampled]


_PAIRS = {
    "rmse": _OfImages("mse", intervals.rmse_of),
    "psnr": _OfImages("mse", intervals.psnr_of),
    "ssim": _OfImages("ssim", of_mean),
    "lpips": _OfImages("lpips", of_mean),
}
_CLIP = _OfImages("clip", of_mean)


def known() -> str:
    """The names of all metrics, for messages and help."""
    return ", ".join((*_SETS, *(f"{kind}_TARGET" for kind in _PAIRS), "clip"))


def _find(metric: str) -> tuple[_OfSets | None, _OfImages | None, str]:
    """What computes `metric`, and the score that it averages."""
    if metric in _SETS:
        return _SETS[metric], None, ""
    if metric == "clip":
        return None, _CLIP, "clip"
    kind, _, target = metric.partition("_")
    if kind in _PAIRS and target:
        return None, _PAIRS[kind], f"{_PAIRS[kind].score}_{target}"
    raise ValueError(f"unknown metric {metric!r}; known: {known()}")


def possible(reference: ReferenceSet | None, targets: Sequence[str] = (), prompts: bool = False) -> tuple[str, ...]:
    """All metrics that can be had of what is given, but LPIPS, which needs a package and weights of its own."""
    found = []
    if reference is not None:
        found += [name for name, each in _SETS.items() if each.against and getattr(reference, each.against) is not None]
    found += ["is", *(f"{kind}_{target}" for target in targets for kind in _PAIRS if kind != "lpips")]
    return (*found, "clip") if prompts else tuple(found)


def paired_scores(metrics: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """For each target that `metrics` name, the scores of image pairs they need: {"fine": ("mse", "ssim")}.

    Raises ValueError for an unknown metric.
    """
    found: dict[str, tuple[str, ...]] = {}
    for metric in metrics:
        _, images, score = _find(metric)
        kind, _, target = score.partition("_")
        if images is not None and target:
            found[target] = tuple(dict.fromkeys((*found.get(target, ()), kind)))
    return found


def of_sets(metrics: Sequence[str]) -> list[str]:
    """Those of `metrics` that are of a feature network."""
    return [name for name in metrics if name in _SETS]


def of_reference(metrics: Sequence[str]) -> list[str]:
    """Those of `metrics` that compare with the images of a reference."""
    return [name for name in of_sets(metrics) if _SETS[name].against is not None]


def partners(metrics: Sequence[str], statistics: Statistics) -> dict[str, int]:
    """For each target that `metrics` name, how many of the images have a partner in it."""
    scores = {target: f"{kinds[0]}_{target}" for target, kinds in paired_scores(metrics).items()}
    return {target: len(statistics.score(score)) for target, score in scores.items()}


def check_against(metrics: Sequence[str], network: str, reference: ReferenceSet | None) -> None:
    """Raise ValueError unless all `metrics` exist and find in `reference` what they need, for features of `network`."""
    for metric in metrics:
        sets, _, _ = _find(metric)
        if sets is None or sets.against is None:
            continue
        if reference is None:
            raise ValueError(f"{metric} compares with a set of images, and no reference was given")
        if reference.network != network:
            raise ValueError(
                f"{metric}: the reference {reference.name!r} was made with {reference.network}, these images with "
                f"{network}; use one network for both"
            )
        if getattr(reference, sets.against) is None:
            lacking = {
                "features": "holds only moments of features, not the features that are compared one by one",
                "spatial": "holds no moments of spatial features, which are Inception's",
            }
            raise ValueError(
                f"{metric}: the reference {reference.name!r} {lacking[sets.against]}; give the images themselves, or "
                "statistics that were made of them here"
            )


def check(metrics: Sequence[str], statistics: Statistics, reference: ReferenceSet | None) -> None:
    """Raise ValueError unless all `metrics` can be had, before time is spent on the first."""
    check_against(metrics, statistics.network, reference)
    for metric in metrics:
        sets, _, score = _find(metric)
        if sets is None:
            statistics.score(score)
        elif getattr(statistics, sets.rows) is None:
            lacking = {"logits": "gives no class logits", "spatial": "gives no spatial features; sFID is Inception's"}
            raise ValueError(f"{metric}: the network {statistics.network} {lacking[sets.rows]}")


def measured(metric: str, statistics: Statistics, reference: ReferenceSet | None, draws: int, seed: int) -> Resampled:
    """The metric with its values in `draws` resamples; with none of them if `draws` is 0, or too few images have any.

    Raises ValueError as `check` does, and when there are too few images, or too few in the reference.
    """
    check([metric], statistics, reference)
    sets, images, score = _find(metric)
    if images is not None:
        values = statistics.score(score)
        found = images.resampled(values, max(draws, 1), seed)
        return found if draws else Resampled(found.value, np.empty(0), Scheme("none", len(values), seed))
    assert sets is not None
    rows = getattr(statistics, sets.rows)
    real = None if sets.against is None else getattr(reference, sets.against)
    _check_numbers(metric, sets, len(rows), reference, real)
    given = (rows,) if real is None else (rows, real)
    try:
        if draws == 0 or len(rows) < sets.drawn:
            return Resampled(sets.value(*given), np.empty(0), Scheme("none", len(rows), seed))
        return sets.resampled(*given, draws, seed)
    except ValueError as error:
        raise ValueError(f"{metric} of {_images(len(rows))}: {error}") from error


def _check_numbers(
    metric: str, sets: _OfSets, count: int, reference: ReferenceSet | None, real: Moments | torch.Tensor | None
) -> None:
    """Raise ValueError unless there are images enough: `count` of ours, and those of the reference that `real` is of."""
    if count < sets.least:
        raise ValueError(f"{metric} of {_images(count)}: it takes at least {sets.least}; give more images")
    if reference is None or real is None:
        return
    held = real.count if isinstance(real, Moments) else len(real)
    if held < sets.real:
        raise ValueError(
            f"{metric}: the reference {reference.name!r} holds {_images(held)}, expected at least {sets.real}; give a "
            "reference of more"
        )


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
