"""The models that come with the package, and loading any other by diffusers."""

from __future__ import annotations

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

    Raises ValueError, naming the bundled models, when diffusers finds nothing under that name.
    """
    from diffusers import DiffusionPipeline

    folder = _bundled().get(str(model))
    if folder is not None:  # small, so without accelerate, which would warn where it is missing; quantizing needs it
        kwargs = {"use_safetensors": True, "low_cpu_mem_usage": "quantization_config" in kwargs, **kwargs}
    try:
        return DiffusionPipeline.from_pretrained(str(folder or model), **kwargs)
    except OSError as error:
        raise ValueError(
            f"no model {str(model)!r}: neither bundled ({', '.join(_bundled())}), nor a folder, nor to be had from the "
            f"Hub: {error}"
        ) from error
