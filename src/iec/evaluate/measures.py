"""Each metric by its name: what it needs, its value, and its values in the resamples of the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from iec.evaluate import intervals
from iec.evaluate.bootstrap import Resampled, Scheme, of_mean
from iec.evaluate.coverage import precision, recall
from iec.evaluate.metrics import Moments, frechet_distance, inception_score, kernel_distance_exact
from iec.evaluate.references import ReferenceSet
from iec.evaluate.statistics import Statistics


class _OfSets(NamedTuple):
    """A metric of features against those of a reference: what it takes of the two, and how it is computed."""

    rows: str  # field of Statistics
    against: str | None  # field of ReferenceSet
    value: Callable[..., float]
    resampled: Callable[..., Resampled]


_SETS = {
    "fid": _OfSets("pool", "moments", lambda x, m: frechet_distance(Moments.of(x), m), intervals.fid),
    "sfid": _OfSets("spatial", "spatial", lambda x, m: frechet_distance(Moments.of(x), m), intervals.fid),
    "kid": _OfSets("pool", "features", kernel_distance_exact, intervals.kid),
    "is": _OfSets("logits", None, lambda x: inception_score(x).mean, intervals.inception),
    "precision": _OfSets("pool", "features", precision, intervals.precision_of),
    "recall": _OfSets("pool", "features", recall, intervals.recall_of),
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
    """The metric with its values in `draws` resamples; with none of them if `draws` is 0. Raises as `check` does."""
    check([metric], statistics, reference)
    sets, images, score = _find(metric)
    if images is not None:
        values = statistics.score(score)
        found = images.resampled(values, max(draws, 1), seed)
        return found if draws else Resampled(found.value, np.empty(0), Scheme("none", len(values), seed))
    assert sets is not None
    rows = getattr(statistics, sets.rows)
    given = (rows,) if sets.against is None else (rows, getattr(reference, sets.against))
    try:
        if draws == 0:
            return Resampled(sets.value(*given), np.empty(0), Scheme("none", len(rows), seed))
        return sets.resampled(*given, draws, seed)
    except ValueError as error:
        raise ValueError(f"{metric} of {len(rows)} images: {error}") from error
