"""From a recipe to a finished model: the data, the task and the loop put together."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from iec.evaluate.machine import choose_device
from iec.train.data import load_images
from iec.train.loop import Task, train
from iec.train.recipe import TrainRecipe


def make_task(recipe: TrainRecipe, data: str | os.PathLike[str] | None = None) -> Task:
    """The task of `recipe.kind`; `data` is the folder of the dataset."""
    if recipe.kind == "denoiser":
        from iec.train.denoiser import DenoiserTask

        return DenoiserTask(recipe)
    from iec.train.features import FeaturesTask

    return FeaturesTask(recipe, data)


def run(
    recipe: TrainRecipe,
    *,
    data: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    device: str = "auto",
    progress: Callable[[int, int, float], None] | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """Train `recipe` in `out` (default runs/<name>), resuming what is there; returns the folder of the exported model.

    `data`: folder of the dataset, default as for `load_images`. `progress` and `log` as for `train`.
    """
    chosen = choose_device(device)
    images = load_images(recipe.data, "train", data)
    folder = Path(out) if out is not None else Path("runs") / recipe.name
    return train(recipe, make_task(recipe, data), images, folder, device=chosen, progress=progress, log=log)
