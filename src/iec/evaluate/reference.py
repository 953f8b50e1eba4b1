"""Statistics of real images, bundled, so that domain metrics need no dataset; and the metrics of a set of images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Literal

import torch

from iec.artifact.files import replacing
from iec.evaluate.features import FeatureNetwork, extract, features_folder, load_features
from iec.evaluate.metrics import Moments, frechet_distance, inception_score, kernel_distance

VERSION = 1
FILE = "reference.safetensors"
KEPT = 2048  # test features that are bundled for KID


@dataclasses.dataclass(frozen=True)
class Reference:
    """`moments` of the features of all images of a split, and `features` (M, F) of some test images, for KID."""

    moments: Moments
    features: torch.Tensor


@dataclasses.dataclass(frozen=True)
class DomainMetrics:
    """Fréchet distance, KID and IS on the features of the named bundled network, of `count` images.

    `fid` and `kid` are small for images like the real ones; `inception_score` lies in 1..classes. The Fréchet distance
    is biased upwards for small `count`: compare only numbers of equal count. KID is unbiased.
    """

    network: str
    split: str
    count: int
    fid: float
    kid: float
    inception_score: float


def _identity(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def save_reference(
    folder: str | os.PathLike[str], network: FeatureNetwork, train: torch.Tensor, test: torch.Tensor
) -> None:
    """Write the statistics of real images, uint8 (N, C, H, W), beside the feature network of `folder`."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for split, images in (("train", train), ("test", test)):
        features, _ = extract(network, images)
        moments = Moments.of(features)
        tensors[f"{split}.mean"], tensors[f"{split}.scatter"] = moments.mean, moments.scatter
        tensors[f"{split}.count"] = torch.tensor(moments.count)
        if split == "test":
            tensors["test.features"] = features[:KEPT].half()
    meta = {"version": VERSION, "network": _identity(Path(folder))}
    with replacing(Path(folder) / FILE) as temporary:
        save_file(tensors, str(temporary), metadata={"iec": json.dumps(meta)})


def load_reference(name_or_path: str | os.PathLike[str], split: Literal["train", "test"] = "train") -> Reference:
    """Statistics of real images: of a bundled network by its dataset ("fashion-mnist"), or of a folder.

    Raises ValueError when there are none, they have another version, or they were made with another network.
    """
    from safetensors import SafetensorError, safe_open

    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'test'")
    folder = Path(name_or_path) if Path(name_or_path).is_dir() else features_folder(str(name_or_path))
    file = folder / FILE
    try:
        with safe_open(str(file), framework="pt") as opened:
            meta = json.loads((opened.metadata() or {}).get("iec", "{}"))
            if meta.get("version") != VERSION:
                raise ValueError(f"{file}: statistics of version {meta.get('version')!r}, this release reads {VERSION}")
            if meta.get("network") != _identity(folder):
                raise ValueError(f"{file}: the statistics were made with another feature network; make them again")
            mean, scatter, count, features = (
                opened.get_tensor(key)
                for key in (f"{split}.mean", f"{split}.scatter", f"{split}.count", "test.features")
            )
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: no {FILE} or no model.safetensors in it") from error
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged statistics: {error}") from error
    return Reference(Moments(int(count), mean, scatter), features.float())


def domain_metrics(
    images: torch.Tensor, name: str, split: Literal["train", "test"] = "train", *, seed: int = 0
) -> DomainMetrics:
    """Metrics of images (N, C, H, W), uint8 or floats in 0..1, against the real ones of the bundled network `name`.

    `split` is that of the Fréchet distance; KID always compares with test images, its subsets drawn with `seed`. Raises
    ValueError below two images.
    """
    if len(images) < 2:
        raise ValueError(f"domain metrics need at least 2 images, found {len(images)}")
    reference = load_reference(name, split)
    features, logits = extract(load_features(name), images)
    return DomainMetrics(
        network=name,
        split=split,
        count=len(images),
        fid=frechet_distance(Moments.of(features), reference.moments),
        kid=kernel_distance(features, reference.features, seed=seed).mean,
        inception_score=inception_score(logits).mean,
    )
