"""Metrics of a set of images, each with its interval: from the images, or from the statistics they left behind.

    evaluate(images, reference, network)         the metrics of images
    evaluate_statistics(statistics, reference)   the same without images and network, from what `iec.evaluate.gathering` kept
    difference(a, b)                             paired differences of two evaluations

Metrics by name: fid, sfid, kid, is, precision, recall against a reference set; rmse_T, psnr_T, ssim_T, lpips_T against the
images of the same seeds in the target T ("fine", "full"); clip against the prompts. Nothing is comparable across feature
networks, and FID not across counts, so an evaluation carries both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from iec.evaluate.bootstrap import DRAWS, Interval, Resampled
from iec.evaluate.gathering import TextScore, statistics_of_source
from iec.evaluate.measures import check, check_against, measured, paired_scores, partners
from iec.evaluate.networks import FeatureExtractor, identity
from iec.evaluate.references import ReferenceSet
from iec.evaluate.sources import ImageSource, as_source
from iec.evaluate.statistics import Statistics


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Metrics of `count` images on the feature network `network` ("name@identity").

    `references`: by "data" the name of the reference set, if there was one. `resampled`: each metric's values in the
    bootstrap, which are the same resamples for every evaluation of as many images with the same draws and seed. `pairs`: for each
    target, how many of the images have a partner in it. `left_out`: the metrics that could not be had of so few images, and why.
    """

    count: int
    network: str
    references: Mapping[str, str]
    resampled: Mapping[str, Resampled]
    pairs: Mapping[str, int] = dataclasses.field(default_factory=dict)
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, Interval]:
        """Every metric with its 95 % interval (NaN for its ends when nothing was resampled), in the order of the question."""
        return {name: values.interval() for name, values in self.resampled.items()}

    def plain(self) -> dict[str, Any]:
        """JSON-able: the fields, and "metrics": {name: {"value", "low", "high"}} for `resampled`; infinities are null."""
        return {
            "count": self.count,
            "network": self.network,
            "references": dict(self.references),
            "pairs": dict(self.pairs),
            "left_out": dict(self.left_out),
            "metrics": {name: plain(interval) for name, interval in self.metrics.items()},
        }


def plain(interval: Interval) -> dict[str, float | None]:
    """{"value", "low", "high"}: JSON knows no infinity (the PSNR of equal images) and no NaN, so these become None."""
    return {key: value if math.isfinite(value) else None for key, value in interval._asdict().items()}


def evaluate_statistics(
    statistics: Statistics,
    reference: ReferenceSet | None = None,
    metrics: Sequence[str] = ("fid", "kid", "is"),
    *,
    draws: int = DRAWS,
    seed: int = 0,
    leave_out: bool = False,
) -> Evaluation:
    """The `metrics` of images by their statistics, with `draws` resamples of them drawn with `seed`.

    fid, sfid, kid, precision and recall need a `reference` of the same network; the paired ones a score in `statistics`
    (rmse_fine: "mse_fine"). Intervals are about the images alone: the reference is taken as it is. `draws` of 0 gives no
    intervals. `leave_out`: go on without metrics that take more images, see `Evaluation.left_out`.

    Raises ValueError for an unknown metric, a missing reference or score, another network, or too few images.
    """
    check(metrics, statistics, reference)
    values: dict[str, Resampled] = {}
    refused: dict[str, str] = {}
    for name in metrics:
        try:
            values[name] = measured(name, statistics, reference, draws, seed)
        except ValueError as error:
            if not leave_out:
                raise
            refused[name] = str(error)
    names = {} if reference is None else {"data": reference.name}
    return Evaluation(len(statistics), statistics.network, names, values, partners(list(values), statistics), refused)


def gather(
    images: torch.Tensor | ImageSource,
    reference: ReferenceSet | None,
    network: FeatureExtractor,
    metrics: Sequence[str],
    *,
    targets: Mapping[str, torch.Tensor] | Mapping[str, ImageSource] | None = None,
    prompts: Sequence[str] | None = None,
    text_score: TextScore | None = None,
    limit: int | None = None,
    batch_size: int = 50,
    progress: Callable[[int], None] | None = None,
    rivals: Mapping[str, ImageSource] | None = None,
) -> Statistics:
    """What `evaluate_statistics` needs for the `metrics`, of images that are read batch by batch.

    Images are uint8 (N, C, H, W), or a source, of which the first `limit` (None: all) are taken; targets pair by order.
    Whatever is missing is told before the first image is read. "clip" needs `text_score` (`iec.evaluate.clip.ClipScore`) and
    one of the `prompts` per image. `progress(done)` is called after each batch. `rivals` must be of the same seeds as the images.

    Raises ValueError for unknown metrics, missing references, targets or prompts, and as `statistics_of_source` does.
    """
    scores = paired_scores(metrics)
    given = dict(targets or {})
    absent = [target for target in scores if target not in given]
    if absent:
        raise ValueError(f"metrics compare with the target {absent[0]!r}, which is not given; give its images")
    if "clip" in metrics and (text_score is None or prompts is None):
        raise ValueError("clip compares images with their prompts by a CLIP model; give prompts, one per image")
    check_against(metrics, identity(network), reference)
    return statistics_of_source(
        as_source(images),
        network,
        targets={name: as_source(given[name]) for name in scores},
        paired=scores,
        prompts=prompts,
        text_score=text_score if "clip" in metrics else None,
        limit=limit,
        batch_size=batch_size,
        progress=progress,
        rivals=rivals,
    )


def evaluate(
    images: torch.Tensor | ImageSource,
    reference: ReferenceSet | None,
    network: FeatureExtractor,
    metrics: Sequence[str] = ("fid", "kid", "is"),
    *,
    targets: Mapping[str, torch.Tensor] | Mapping[str, ImageSource] | None = None,
    prompts: Sequence[str] | None = None,
    text_score: TextScore | None = None,
    limit: int | None = None,
    batch_size: int = 50,
    draws: int = DRAWS,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """The `metrics` of images, see `gather`; the bootstrap, see `evaluate_statistics`. Raises as these do."""
    statistics = gather(
        images,
        reference,
        network,
        metrics,
        targets=targets,
        prompts=prompts,
        text_score=text_score,
        limit=limit,
        batch_size=batch_size,
        progress=progress,
    )
    return evaluate_statistics(statistics, reference, metrics, draws=draws, seed=seed)


def difference(a: Evaluation, b: Evaluation) -> dict[str, Interval]:
    """a - b for every metric that both have, resampled as pairs, so that what the two share drops out.

    Raises ValueError for different feature networks, or unless both have as many images, draws and seed.
    """
    if a.network != b.network:
        raise ValueError(f"evaluations on {a.network} and {b.network} cannot be compared")
    shared = (name for name in a.resampled if name in b.resampled)
    return {name: a.resampled[name].minus(b.resampled[name]).interval() for name in shared}
