"""Reference sets: what real, or finer, images leave behind on a feature network, to compare others with.

`open_reference` takes whatever there is: the statistics bundled with a feature network, the files of statistics that
pytorch-fid and guided-diffusion publish (.npz with mu and sigma), our own (.safetensors), or images, of which the
statistics are made.
"""

from __future__ import annotations

import dataclasses

import torch

from iec.evaluate.metrics import Moments
from iec.evaluate.networks import FeatureExtractor
from iec.evaluate.reference import load_reference
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


def open_reference(spec: str, network: FeatureExtractor) -> ReferenceSet:
    """The reference set that `spec` names, on `network`.

    The name of a bundled network's dataset ("fashion-mnist") on that network. Raises ValueError for anything else.
    """
    if network.folder is not None and spec == network.name:
        held = load_reference(network.folder)
        return ReferenceSet(spec, f"{network.name}@{network.identity}", held.moments.count, held.moments, held.features)
    raise ValueError(f"{spec!r}: no reference set on {network.name}")
