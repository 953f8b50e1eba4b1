"""From images to what they leave behind (`Statistics`): features, and scores of image pairs and of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import PurePath

import torch

from iec.evaluate.networks import FeatureExtractor, identity
from iec.evaluate.similarity import lpips, mean_squares, ssim
from iec.evaluate.sources import ImageSource
from iec.evaluate.statistics import Statistics, merged

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Of image pairs uint8 (N, C, H, W): (N,), float64. The mean square and not its root, as that is what is averaged.
PAIRED: dict[str, Score] = {"mse": mean_squares, "ssim": ssim, "lpips": lpips}
# Of images and their texts, (N,) in 0..100: `iec.evaluate.clip.ClipScore`.
TextScore = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]


def statistics_of(
    images: torch.Tensor,
    network: FeatureExtractor,
    seeds: Sequence[int] | None = None,
    *,
    targets: Mapping[str, torch.Tensor] | None = None,
    paired: Mapping[str, Sequence[str]] | Sequence[str] = ("mse", "ssim"),
    scores: Mapping[str, torch.Tensor] | None = None,
    batch_size: int = 50,
) -> Statistics:
    """What images uint8 (N, C, H, W) leave behind: features, and `paired` scores to the images of each target.

    `seeds`: ascending, one per image; None counts from 0. `targets`: images (M, C, H, W) of the first M <= N seeds; the
    images beyond them have no score. `paired`: of "mse", "ssim", "lpips", for every target or (a mapping, such as
    `iec.evaluate.measures.paired_scores` gives) for each; the scores are named "mse_fine" and so on. `scores`: further
    values per image (N,), such as "clip".

    Raises ValueError or TypeError for images that are none, and targets of another shape.
    """
    extracted = network.features(images, batch_size)
    values = {name: value.double() for name, value in (scores or {}).items()}
    for target, others in (targets or {}).items():
        if others.shape[1:] != images.shape[1:] or len(others) > len(images):
            raise ValueError(
                f"target {target!r} holds images of {tuple(others.shape)}, expected those of the same seeds, at most "
                f"{tuple(images.shape)}"
            )
        for kind in paired.get(target, ()) if isinstance(paired, Mapping) else paired:
            if kind not in PAIRED:
                raise ValueError(f"unknown score of image pairs {kind!r}; known: {', '.join(PAIRED)}")
            values[f"{kind}_{target}"] = torch.full((len(images),), torch.nan, dtype=torch.float64)
            if len(others):
                values[f"{kind}_{target}"][: len(others)] = PAIRED[kind](images[: len(others)], others).double().cpu()
    rows = torch.arange(len(images)) if seeds is None else torch.tensor(list(seeds), dtype=torch.int64)
    return Statistics(identity(network), rows, *extracted, scores=values)


def statistics_of_source(
    source: ImageSource,
    network: FeatureExtractor,
    *,
    targets: Mapping[str, ImageSource] | None = None,
    paired: Mapping[str, Sequence[str]] | Sequence[str] = ("mse", "ssim"),
    prompts: Sequence[str] | None = None,
    text_score: TextScore | None = None,
    limit: int | None = None,
    batch_size: int = 50,
    progress: Callable[[int], None] | None = None,
    rivals: Mapping[str, ImageSource] | None = None,
) -> Statistics:
    """What the images of a source leave behind, numbered in their order, read batch by batch.

    Targets pair by order: their n-th image belongs to the n-th of the source; they may hold fewer images, not more. With
    `text_score`, image n is scored against `prompts[n]`. `progress(done)` is called after each batch. Of the `rivals`, which the
    images are to be compared with as a whole, it is only checked that they pair as targets do.

    Raises ValueError as `ImageSource.batches` and `statistics_of` do, naming the file; when a target or a rival ends up with
    other seeds than the source (both having numbers as file names); and for too few prompts.
    """
    parts: list[Statistics] = []
    done = 0
    beside = {f"target {name!r}": target for name, target in (targets or {}).items()}
    others = {name: _aligned(other, batch_size, limit) for name, other in {**beside, **(rivals or {})}.items()}
    for images, places in source.batches(batch_size, limit):
        found = {name: _next(name, batches, images, places) for name, batches in others.items()}
        for name in rivals or {}:
            if len(found[name]) < len(images):
                raise ValueError(
                    f"{name} holds {done + len(found[name])} images, fewer than {source.name}; give as many"
                )
        pairs = {name: found[f"target {name!r}"] for name in targets or {}}
        scores = {}
        if text_score is not None:
            texts = list(prompts or ())[done : done + len(images)]
            if len(texts) < len(images):
                raise ValueError(f"{source.name}: more images than the {len(prompts or ())} prompts; give one each")
            scores["clip"] = text_score(images, texts)
        seeds = range(done, done + len(images))
        try:
            part = statistics_of(
                images, network, seeds, targets=pairs, paired=paired, scores=scores, batch_size=batch_size
            )
        except ValueError as error:
            raise ValueError(f"{places[0]} and what follows: {error}") from error
        parts.append(part)
        done += len(images)
        if progress is not None:
            progress(done)
    for name, batches in others.items():
        if next(batches, None) is not None:
            raise ValueError(f"{name} holds more images than {source.name} ({done}); they must be of the same seeds")
    return merged(parts)


def _aligned(target: ImageSource, size: int, limit: int | None) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Batches of a target, at most `limit` images of it in all."""
    kept = 0
    for images, places in target.batches(size):
        if limit is not None and kept + len(images) >= limit:
            yield images[: limit - kept], places[: limit - kept]
            return
        kept += len(images)
        yield images, places


def _next(
    name: str, batches: Iterator[tuple[torch.Tensor, list[str]]], images: torch.Tensor, places: list[str]
) -> torch.Tensor:
    """The target's images for these; none of them when it has ended."""
    found, theirs = next(batches, (images[:0], []))
    for ours, other in zip_longest(places, theirs):
        if ours is None:
            raise ValueError(f"{name} holds more images than there are; they must be of the same seeds")
        numbers = [_number(place) for place in (ours, other) if place is not None]
        if len(numbers) == 2 and None not in numbers and numbers[0] != numbers[1]:
            raise ValueError(f"{name}: {other} is paired with {ours}; both folders must hold the same seeds")
    return found


def _number(place: str) -> int | None:
    """The seed that a file is named by: "out/000012.png" is 12; None for other names."""
    stem = PurePath(place).stem
    return int(stem) if stem.isdecimal() else None
