"""The models that come with the package, and loading any other by diffusers."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any


def _bundled() -> dict[str, Path]:
    root = Path(str(resources.files("iec") / "bundled"))
    return {folder.name: folder for folder in sorted(root.glob("*")) if (folder / "model_index.json").is_file()}


def models() -> tuple[str, ...]:
    """Names of the bundled models, for `iec.load`."""
    return tuple(_bundled())


def folder_of(model: str) -> Path | None:
    """The folder of a bundled model; None for any other."""
    return _bundled().get(model)


def calibrations(model: str) -> dict[str, Path]:
    """The calibrations that come with a bundled model: folders by name ("w8a8-50"). None for any other model."""
    folder = _bundled().get(model)
    if folder is None:
        return {}
    found = sorted(folder.glob("calibration-*/calibration.json"))
    return {file.parent.name.removeprefix("calibration-"): file.parent for file in found}


def load(model: str | Path, **kwargs: Any) -> Any:
    """Load a diffusers pipeline: a bundled name, a local folder or a Hub id. `kwargs` go to diffusers' `from_pretrained`.

    Folders that a pipeline of this package was saved in load as well.

    Raises ValueError, naming the bundled models, when diffusers finds nothing under that name.
    """
    folder = _bundled().get(str(model))
    if folder is not None:  # small, so without accelerate, which would warn where it is missing; quantizing needs it
        kwargs = {"use_safetensors": True, "low_cpu_mem_usage": "quantization_config" in kwargs, **kwargs}
    try:
        return _pipeline_class(Path(folder or model)).from_pretrained(str(folder or model), **kwargs)
    except OSError as error:
        if Path(model).is_dir():
            raise ValueError(f"{model}: a folder that holds no pipeline which diffusers can load: {error}") from error
        # diffusers speaks of a traceback, and of options that are not ours; the cause keeps what it says.
        raise ValueError(
            f"no model {str(model)!r}: neither bundled ({', '.join(_bundled())}), nor a folder, nor to be had from the Hub, nor "
            "downloaded before; give one of these (of the Hub OWNER/NAME, with a network)"
        ) from error


def _pipeline_class(folder: Path) -> Any:
    """What loads `folder`: a class of this package, if it was saved by one (diffusers finds its own alone)."""
    from diffusers import DiffusionPipeline

    try:
        name = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return DiffusionPipeline  # a Hub id, or a folder that diffusers says what is wrong with
    if name == "UnconditionalPipeline":
        from iec.pipeline.unconditional import UnconditionalPipeline

        return UnconditionalPipeline
    if name == "ClassConditionalLatentPipeline":
        from iec.pipeline.conditional import ClassConditionalLatentPipeline

        return ClassConditionalLatentPipeline
    return DiffusionPipeline
