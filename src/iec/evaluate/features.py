"""The feature network of the domain metrics: a small classifier whose penultimate layer stands in for Inception.

FID, KID and IS on its features need no download and suit the data they are trained on, but they are comparable only
with numbers from the same network: always name it beside the number.
"""

from __future__ import annotations

import dataclasses
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from iec.artifact.files import replacing, write_json

VERSION = 1


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """Shape of the network. Stages after the first halve the resolution and hold one residual block each."""

    in_channels: int = 1
    channels: tuple[int, ...] = (24, 48, 96)
    features: int = 64
    classes: int = 10
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        if not self.channels or min(self.in_channels, *self.channels, self.features, self.classes) < 1:
            raise ValueError(f"feature network: every size must be at least 1, found {self}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"feature network: dropout is {self.dropout}, expected 0 <= dropout < 1")


class _Block(nn.Module):
    """Two 3x3 convolutions with a shortcut, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, channels)
        self.second = _conv(channels, channels)
        self.first_norm, self.second_norm = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(x + self.second_norm(self.second(inner)))


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)  # the norm that follows has the bias


def _downward(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, outputs), nn.MaxPool2d(2), nn.BatchNorm2d(outputs), nn.ReLU(), _Block(outputs))


class FeatureNetwork(nn.Module):
    """Images (B, C, H, W) -> features (B, F), float32.

    Images are uint8 (0..255) or floats in 0..1; any height and width from 2 ** (stages - 1) on. `head` maps features to
    class logits (B, classes); `logits` does both.
    """

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.config = config
        first = config.channels[0]
        self.stem = nn.Sequential(_conv(config.in_channels, first), nn.BatchNorm2d(first), nn.ReLU())
        self.stages = nn.Sequential(
            *(_downward(i, o) for i, o in zip(config.channels, config.channels[1:], strict=False))
        )
        # Linear, not rectified: the Gaussians of the Fréchet distance fit such features better.
        self.embed = nn.Linear(config.channels[-1], config.features)
        self.head = nn.Sequential(nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(config.features, config.classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.ndim != 4 or images.shape[1] != self.config.in_channels:
            raise ValueError(
                f"feature network: images have the shape {tuple(images.shape)}, "
                f"expected (B, {self.config.in_channels}, H, W)"
            )
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        hidden = self.stages(self.stem(scaled * 2 - 1))
        return self.embed(hidden.mean(dim=(2, 3)))

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits (B, classes) of images as in `forward`."""
        return self.head(self(images))


@torch.no_grad()
def extract(network: FeatureNetwork, images: torch.Tensor, batch_size: int = 250) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, F) and logits (N, classes) of images (N, C, H, W), in evaluation mode, batch by batch, on the CPU.

    Raises ValueError when there is no image.
    """
    if len(images) == 0:
        raise ValueError("extract() was given no images")
    trained = network.training
    network.eval()
    device = next(network.parameters()).device
    features = [network(batch.to(device)) for batch in images.split(batch_size)]
    logits = [network.head(batch) for batch in features]
    network.train(trained)
    return torch.cat(features).cpu(), torch.cat(logits).cpu()


def save_features(network: FeatureNetwork, folder: str | os.PathLike[str], classes: tuple[str, ...] = ()) -> None:
    """Write `model.safetensors` and `config.json` to `folder`; `classes` are the names of the labels."""
    from safetensors.torch import save_file

    folder = Path(folder)
    with replacing(folder / "model.safetensors") as temporary:
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, str(temporary))
    config: dict[str, Any] = {"format": "iec-features", "version": VERSION, **dataclasses.asdict(network.config)}
    write_json(folder / "config.json", {**config, "class_names": list(classes)})


def feature_networks() -> dict[str, Path]:
    """Folders of the bundled feature networks by the name of their dataset."""
    bundled = Path(str(resources.files("iec") / "bundled"))
    return {folder.name.removesuffix("-features"): folder for folder in sorted(bundled.glob("*-features"))}


def features_folder(name: str) -> Path:
    """Folder of the bundled feature network for the dataset `name`. Raises ValueError for one that is not bundled."""
    known = feature_networks()
    if name not in known:
        raise ValueError(f"no bundled feature network for {name!r}; bundled: {', '.join(known) or 'none'}")
    return known[name]


def load_features(name_or_path: str | os.PathLike[str]) -> FeatureNetwork:
    """Load a feature network, in evaluation mode: a bundled one by its dataset ("fashion-mnist"), or from a folder.

    Raises ValueError when it is neither, when the folder holds no feature network, one of another version, or weights
    that do not fit its config.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(name_or_path) if Path(name_or_path).is_dir() else features_folder(str(name_or_path))
    for needed in ("config.json", "model.safetensors"):
        if not (folder / needed).is_file():
            raise ValueError(f"{folder}: no feature network, {needed} is missing")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "model.safetensors")
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder}: damaged feature network: {error}") from error
    if not isinstance(config, dict) or config.get("format") != "iec-features":
        raise ValueError(f"{folder}: config.json is not that of an IEC feature network")
    if config.get("version") != VERSION:
        raise ValueError(
            f"{folder}: feature network of version {config.get('version')!r}, this release reads {VERSION}"
        )
    fields = {f.name for f in dataclasses.fields(FeatureConfig)}
    network = FeatureNetwork(FeatureConfig(**{k: v for k, v in config.items() if k in fields}))
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{folder}: the weights do not fit config.json: {error}") from error
    return network.eval()
