"""Metrics of a set of images, each with its interval: from the images, or from the statistics they left behind.

    statistics_of(images, network, seeds, targets)   what one shard leaves behind; `iec.evaluate.statistics.merged` joins shards
    evaluate_statistics(statistics, reference)       the metrics, without the images and without the network
    evaluate(images, reference, network)             both
    difference(a, b)                                 paired differences of two evaluations

Metrics by name: fid, sfid, kid, is, precision, recall against a reference set; rmse_T, psnr_T, ssim_T, lpips_T against the
images of the same seeds in the target T ("fine", "full"); clip against the prompts. Nothing is comparable across feature
networks, and FID not across counts, so an evaluation carries both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from iec.evaluate.bootstrap import DRAWS, Interval, Resampled
from iec.evaluate.measures import PAIRED, check, measured
from iec.evaluate.networks import FeatureExtractor
from iec.evaluate.references import ReferenceSet
from iec.evaluate.statistics import Statistics

DISTRIBUTION = ("fid", "kid", "is", "precision", "recall")


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Metrics of `count` images on the feature network `network` ("name@identity").

    `references`: by "data" the name of the reference set, if there was one. `resampled`: each metric's values in the
    bootstrap, which are the same resamples for every evaluation of as many images with the same draws and seed.
    """

    count: int
    network: str
    references: Mapping[str, str]
    resampled: Mapping[str, Resampled]

    @property
    def metrics(self) -> dict[str, Interval]:
        """Every metric with its 95 % interval, in the order in which they were asked for."""
        return {name: values.interval() for name, values in self.resampled.items()}

    def plain(self) -> dict[str, Any]:
        """JSON-able: {"count", "network", "references", "metrics": {name: {"value", "low", "high"}}}; infinities are null."""
        return {
            "count": self.count,
            "network": self.network,
            "references": dict(self.references),
            "metrics": {name: plain(interval) for name, interval in self.metrics.items()},
        }


def plain(interval: Interval) -> dict[str, float | None]:
    """{"value", "low", "high"}: JSON knows no infinity (the PSNR of equal images), so these become None."""
    return {key: value if abs(value) != float("inf") else None for key, value in interval._asdict().items()}


def statistics_of(
    images: torch.Tensor,
    network: FeatureExtractor,
    seeds: Sequence[int] | None = None,
    *,
    targets: Mapping[str, torch.Tensor] | None = None,
    paired: Sequence[str] = ("mse", "ssim"),
    scores: Mapping[str, torch.Tensor] | None = None,
    batch_size: int = 50,
) -> Statistics:
    """What images uint8 (N, C, H, W) leave behind: features, and `paired` scores to the images (N, C, H, W) of each target.

    `seeds`: ascending, one per image; None counts from 0. `paired`: of "mse", "ssim", "lpips"; the scores are named
    "mse_fine" and so on. `scores`: further values per image (N,), such as "clip".

    Raises ValueError or TypeError for images that are none, and targets of another shape.
    """
    extracted = network.features(images, batch_size)
    values = {name: value.double() for name, value in (scores or {}).items()}
    for target, others in (targets or {}).items():
        if others.shape != images.shape:
            raise ValueError(
                f"target {target!r} holds images of {tuple(others.shape)}, expected those of the same seeds, "
                f"{tuple(images.shape)}"
            )
        for kind in paired:
            if kind not in PAIRED:
                raise ValueError(f"unknown paired score {kind!r}; known: {', '.join(PAIRED)}")
            values[f"{kind}_{target}"] = PAIRED[kind](images, others)
    rows = torch.arange(len(images)) if seeds is None else torch.tensor(list(seeds), dtype=torch.int64)
    return Statistics(
        f"{network.name}@{network.identity}", rows, extracted.pool, extracted.logits, extracted.spatial, values
    )


def evaluate_statistics(
    statistics: Statistics,
    reference: ReferenceSet | None = None,
    metrics: Sequence[str] = ("fid", "kid", "is"),
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Evaluation:
    """The `metrics` of images by their statistics, with `draws` resamples of them drawn with `seed`.

    fid, sfid, kid, precision and recall need a `reference` of the same network; the paired ones a score in `statistics`
    (rmse_fine: "mse_fine"). Intervals are about the images alone: the reference is taken as it is.

    Raises ValueError for an unknown metric, a missing reference or score, another network, or too few images.
    """
    check(metrics, statistics, reference)
    values = {name: measured(name, statistics, reference, draws, seed) for name in metrics}
    names = {} if reference is None else {"data": reference.name}
    return Evaluation(len(statistics), statistics.network, names, values)


def evaluate(
    images: torch.Tensor,
    reference: ReferenceSet | None,
    network: FeatureExtractor,
    metrics: Sequence[str] = ("fid", "kid", "is"),
    *,
    seeds: Sequence[int] | None = None,
    targets: Mapping[str, torch.Tensor] | None = None,
    scores: Mapping[str, torch.Tensor] | None = None,
    batch_size: int = 50,
    draws: int = DRAWS,
    seed: int = 0,
) -> Evaluation:
    """The `metrics` of images uint8 (N, C, H, W), see `statistics_of` and `evaluate_statistics`."""
    kinds = {"rmse": "mse", "psnr": "mse"}
    heads = [name.partition("_")[0] for name in metrics if "_" in name]
    paired = tuple(dict.fromkeys(kinds.get(head, head) for head in heads if kinds.get(head, head) in PAIRED))
    statistics = statistics_of(
        images, network, seeds, targets=targets, paired=paired, scores=scores, batch_size=batch_size
    )
    return evaluate_statistics(statistics, reference, metrics, draws=draws, seed=seed)


def difference(a: Evaluation, b: Evaluation) -> dict[str, Interval]:
    """a - b for every metric that both have, resampled as pairs, so that what the two share drops out.

    Raises ValueError for different feature networks, or unless both have as many images, draws and seed.
    """
    if a.network != b.network:
        raise ValueError(f"evaluations on {a.network} and {b.network} cannot be compared")
    return {name: a.resampled[name].minus(b.resampled[name]).interval() for name in a.resampled if name in b.resampled}
