"""Training of the feature network: cross-entropy on the labels, test accuracy as the preview.

Exported are the network and the statistics of the real images on its features, all that domain metrics need.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from iec.evaluate.features import FeatureConfig, FeatureNetwork, extract, save_features
from iec.evaluate.reference import save_reference
from iec.train.data import Images, load_images
from iec.train.recipe import TrainRecipe


class FeaturesTask:
    """A classifier of the recipe's images. `data` is the folder of the dataset, as for `load_images`."""

    def __init__(self, recipe: TrainRecipe, data: str | os.PathLike[str] | None = None) -> None:
        torch.manual_seed(recipe.seed)
        try:
            config = FeatureConfig(**recipe.model, dropout=recipe.dropout)
        except TypeError as error:
            raise ValueError(f"recipe {recipe.name!r}, table [model]: {error}") from error
        self.recipe = recipe
        self.model: torch.nn.Module = FeatureNetwork(config)
        self._data = data
        self._test: Images | None = None

    def loss(
        self, model: torch.nn.Module, pixels: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        # Through model(...) and not model.logits(...): only the call itself is compiled.
        return torch.nn.functional.cross_entropy(model.head(model(pixels * 0.5 + 0.5)), labels)

    @property
    def test(self) -> Images:
        """The test images, read when they are first asked for."""
        if self._test is None:
            self._test = load_images(self.recipe.data, "test", self._data)
        return self._test

    def accuracy(self, model: torch.nn.Module) -> float:
        """Share of the test images, 0..1, whose most probable class is their label."""
        assert isinstance(model, FeatureNetwork)
        _, logits = extract(model, self.test.pixels)
        return (logits.argmax(1) == self.test.labels).double().mean().item()

    def preview(self, model: torch.nn.Module, folder: Path, step: int) -> str:
        return f"test accuracy {100 * self.accuracy(model):.2f} %"

    def export(self, model: torch.nn.Module, folder: Path) -> None:
        assert isinstance(model, FeatureNetwork)
        save_features(model, folder, self.test.classes)
        train = load_images(self.recipe.data, "train", self._data)
        save_reference(folder, model, train.pixels, self.test.pixels)
