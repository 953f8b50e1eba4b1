"""Reference sets: what real, or finer, images leave behind on a feature network, to compare others with.

| spec | reference |
|---|---|
| `fashion-mnist`, `fashion-mnist:test` | the statistics bundled with that feature network; so for a network of `iec train` |
| `FILE.npz` with `mu` and `sigma` | moments as pytorch-fid and guided-diffusion publish them (Inception only; no KID) |
| `FILE.safetensors` | what `iec evaluate --save` kept of images |
| anything that `iec.evaluate.sources` reads | the images, whose statistics are made now |
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iec.artifact import fingerprint
from iec.evaluate.decoding import archive
from iec.evaluate.gathering import statistics_of_source
from iec.evaluate.metrics import Moments
from iec.evaluate.networks import FeatureExtractor, identity
from iec.evaluate.reference import load_reference
from iec.evaluate.sources import by_number, open_source
from iec.evaluate.statistics import Statistics


@dataclasses.dataclass(frozen=True, eq=False)
class ReferenceSet:
    """`count` images on the feature network `network` ("name@identity"), called `name` in reports.

    `moments`: of all their features (FID). `features` (M, F) float32 or None: of all or some of them (KID, precision,
    recall). `spatial`: moments of the spatial features (sFID), or None. `count` is None for published statistics, which
    do not say it.
    """

    name: str
    network: str
    count: int | None
    moments: Moments
    features: torch.Tensor | None = None
    spatial: Moments | None = None

    @classmethod
    def of(cls, statistics: Statistics, name: str) -> ReferenceSet:
        """The reference set of the images that `statistics` are of."""
        spatial = None if statistics.spatial is None else statistics.spatial_moments()
        return cls(name, statistics.network, len(statistics), statistics.moments(), statistics.pool, spatial)


def open_reference(
    spec: str,
    network: FeatureExtractor,
    *,
    limit: int | None = None,
    crop: int | None = None,
    batch_size: int = 50,
    keep: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> ReferenceSet:
    """The reference set that `spec` names (see the head of this module), on `network`.

    The rest concerns images alone. `limit`: how many of them; `crop`: see `open_source`; `keep`: a folder in which their
    statistics are kept, and found the next time, as long as the files have the same sizes and times; `progress(done)` is
    called for each batch.

    Raises ValueError for an unknown name, a damaged file or image (which is named), or statistics of another network.
    """
    bundled = _bundled(spec, network)
    if bundled is not None:
        return bundled
    file = Path(spec)
    if file.suffix == ".safetensors":
        return ReferenceSet.of(Statistics.load(file, identity(network)), file.name)
    if file.suffix == ".npz" and (tables := _published(file)) is not None:
        return _from_published(file, tables, network)
    source = open_source(spec, crop=crop, also=(".safetensors of `iec evaluate --save`",))
    kept = None
    if keep is not None:
        kept = Path(keep) / f"{_stamp(spec, identity(network), limit, crop, batch_size)}.safetensors"
    if kept is not None and kept.is_file():
        made = Statistics.load(kept, identity(network))
    else:
        made = statistics_of_source(source, network, paired=(), limit=limit, batch_size=batch_size, progress=progress)
        if kept is not None:
            made.save(kept)
    return ReferenceSet.of(made, Path(spec).name or spec)


def _stamp(spec: str, *options: Any) -> str:
    """16 hex digits that change with the options and with any file of `spec`, told by its size and time, and their order."""
    head = spec if Path(spec).exists() or ":" not in spec else spec.rpartition(":")[0]  # FOLDER:SPLIT
    root = Path(head)
    below = root.rglob("*") if root.is_dir() else [root]
    files = sorted((path for path in below if path.is_file()), key=by_number)
    states = [[path.relative_to(root).as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return fingerprint.plain([str(root.resolve()) if files else spec, spec[len(head) :], *options, states])[:16]


def _bundled(spec: str, network: FeatureExtractor) -> ReferenceSet | None:
    """The statistics beside the network's weights, if `spec` means them."""
    name, _, split = spec.partition(":")
    if network.folder is None or name not in (network.name, str(network.folder)):
        from iec.evaluate.features import feature_networks

        if name in feature_networks():
            raise ValueError(
                f"{spec!r}: the bundled statistics are of the network {name!r}, and do not fit {network.name}; use "
                f"--network {name}, or give the images as a folder or file"
            )
        return None
    if split not in ("", "train", "test"):
        raise ValueError(f"{spec!r}: expected {name}, {name}:train or {name}:test")
    held = load_reference(network.folder, "test" if split == "test" else "train")
    called = f"{network.name}:{split or 'train'}"
    return ReferenceSet(called, identity(network), held.moments.count, held.moments, held.features)


def _published(file: Path) -> dict[str, np.ndarray] | None:
    """mu, sigma (and mu_s, sigma_s) of an .npz file; None if it holds images."""
    with archive(file) as opened:
        if "mu" not in opened.files:
            return None
        return {name: opened[name] for name in ("mu", "sigma", "mu_s", "sigma_s") if name in opened.files}


def _from_published(file: Path, tables: dict[str, np.ndarray], network: FeatureExtractor) -> ReferenceSet:
    if network.name != "inception-2015":
        raise ValueError(
            f"{file}: published statistics are of Inception-2015, not of {network.name}; use --network inception"
        )
    moments = _moments(file, tables, "mu", "sigma", 2048)
    spatial = _moments(file, tables, "mu_s", "sigma_s", 2023) if "mu_s" in tables else None
    return ReferenceSet(file.name, identity(network), None, moments, None, spatial)


def _moments(file: Path, tables: dict[str, Any], mean: str, covariance: str, size: int) -> Moments:
    mu, sigma = tables[mean], tables.get(covariance)
    if sigma is None or mu.shape != (size,) or sigma.shape != (size, size):
        found = "nothing" if sigma is None else str(sigma.shape)
        raise ValueError(f"{file}: {mean} is {mu.shape}, {covariance} {found}; expected ({size},) and ({size}, {size})")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{file}: {mean} or {covariance} holds NaN or infinity")
    # How many images they are of is not said; with a count of 2 the covariance is the scatter itself.
    return Moments(2, torch.from_numpy(mu).double(), torch.from_numpy(sigma).double())
