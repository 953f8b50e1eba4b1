"""Feature networks by one name each: what every distribution metric is computed on, and must be named with.

| spec | network |
|---|---|
| `fashion-mnist` | the bundled classifier of that dataset |
| a folder | a feature network made by `iec train` |
| `inception` | Inception-2015 with the published weights (extra `fid`) |
| `inception:FILE` | the same with the weights of a .pth or .safetensors file |
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from iec.artifact import fingerprint
from iec.evaluate.features import FeatureNetwork, extract, feature_networks, features_folder, load_features
from iec.evaluate.inception import Inception, load_inception, published_weights


class Extracted(NamedTuple):
    """What a network says of N images, float32 on the CPU.

    `pool` (N, F): features of FID, KID, precision and recall. `logits` (N, K): classes, for IS; None without them.
    `spatial` (N, S): features that keep places, for sFID; None for networks that have no such convention.
    """

    pool: torch.Tensor
    logits: torch.Tensor | None = None
    spatial: torch.Tensor | None = None


class FeatureExtractor(Protocol):
    """A feature network: `name` says which, `identity` (16 hex digits) tells its weights from any others."""

    name: str
    identity: str
    folder: Path | None  # that of a network with statistics of its own dataset beside it

    def features(self, images: torch.Tensor, batch_size: int = 50) -> Extracted:
        """Features of images uint8 (N, C, H, W), N >= 1. Raises ValueError or TypeError for anything else."""
        ...


def _checked(images: torch.Tensor) -> torch.Tensor:
    if images.dtype != torch.uint8:
        raise TypeError(f"feature networks take uint8 images, found {images.dtype}")
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images have the shape {tuple(images.shape)}, expected (N, C, H, W) with N >= 1")
    return images


class DomainExtractor:
    """The small classifiers of this package, bundled or trained by `iec train`: features (N, F) and class logits."""

    def __init__(self, name: str, folder: Path, device: str = "cpu") -> None:
        self.name = name
        self.folder: Path | None = folder
        self._network: FeatureNetwork = load_features(folder).to(device)
        self.identity = file_identity(folder)

    def features(self, images: torch.Tensor, batch_size: int = 50) -> Extracted:
        takes, found = self._network.config.in_channels, _checked(images).shape[1]
        if takes != found:
            kind = {1: "grey", 3: "RGB"}
            ours, theirs = (kind.get(number, f"of {number} channels") for number in (takes, found))
            raise ValueError(
                f"images are {theirs}, and the feature network {self.name} takes {ours} ones; convert them, or use Inception "
                "(--network inception), which takes grey and RGB"
            )
        pool, logits = extract(self._network, images, batch_size)
        return Extracted(pool, logits)


class InceptionExtractor:
    """Inception-2015: 2048 features, 1008 logits without bias, 2023 spatial features. Grey images count as RGB."""

    def __init__(self, network: Inception, device: str = "cpu") -> None:
        self.name = "inception-2015"
        self.folder: Path | None = None
        self.identity = fingerprint.weights(network)[:16]
        self._network = network.eval().to(device)
        self._device = device

    @torch.no_grad()
    def features(self, images: torch.Tensor, batch_size: int = 50) -> Extracted:
        if _checked(images).shape[1] not in (1, 3):
            raise ValueError(f"Inception takes grey or RGB images, found {images.shape[1]} channels")
        parts = []
        for batch in images.split(batch_size):
            parts.append([part.cpu() for part in self._network(batch.expand(-1, 3, -1, -1).to(self._device))])
        pool, spatial, logits = (torch.cat(part) for part in zip(*parts, strict=True))
        return Extracted(pool, logits, spatial)


def file_identity(folder: Path) -> str:
    """16 hex digits of the weights file of a feature network's folder, as its statistics of real images name it."""
    import hashlib

    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def identity(network: FeatureExtractor) -> str:
    """ "name@identity": what statistics and evaluations call the network."""
    return f"{network.name}@{network.identity}"


def open_network(spec: str, device: str = "cpu") -> FeatureExtractor:
    """The feature network that `spec` names (see the head of this module), on `device`.

    Raises ValueError for an unknown name or a damaged file, ImportError when "inception" has no weights here.
    """
    if spec == "inception" or spec.startswith("inception:"):
        _, _, file = spec.partition(":")
        return InceptionExtractor(load_inception(file or published_weights()), device)
    if spec in feature_networks():
        return DomainExtractor(spec, features_folder(spec), device)
    folder = Path(spec)
    if folder.is_dir():
        # `iec train` leaves its result in model/ of the run's folder; either of the two is taken.
        inner = folder / "model"
        return DomainExtractor(folder.name, inner if inner.is_dir() else folder, device)
    raise ValueError(
        f"unknown feature network {spec!r}; expected {', '.join(feature_networks())}, inception, inception:FILE, or a "
        "folder made by `iec train`"
    )
