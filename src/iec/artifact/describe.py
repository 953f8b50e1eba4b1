"""What a folder holds, in one table: model, feature network, training run, calibration."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def parameters(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Number of values in every safetensors file below `folder`, by relative path, read from the headers alone."""
    from safetensors import SafetensorError, safe_open

    counts: dict[str, int] = {}
    for file in sorted(Path(folder).rglob("*.safetensors")):
        try:
            with safe_open(str(file), framework="np") as opened:
                shapes = [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged or truncated safetensors: {error}") from error
        total = 0
        for shape in shapes:
            values = 1
            for side in shape:
                values *= side
            total += values
        counts[str(file.relative_to(folder))] = total
    return counts


def describe(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What is in `folder`: `kind`, `bytes`, and what is known of that kind, as plain values.

    Kinds are "pipeline", "features", "training run" and "other". Raises ValueError when there is no such folder or a
    file in it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    about: dict[str, Any] = {"folder": str(folder), "kind": "other", "bytes": _size(folder)}
    if (folder / "model_index.json").is_file():
        index = _read(folder / "model_index.json")
        parts = {k: v[1] for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[1]}
        about |= {"kind": "pipeline", "class": index.get("_class_name"), "components": parts}
        about["values"] = parameters(folder)
    elif (folder / "checkpoint.safetensors").is_file():
        about |= {"kind": "training run", **_checkpoint(folder / "checkpoint.safetensors")}
        about["finished"] = (folder / "model").is_dir()
    elif (folder / "config.json").is_file() and _read(folder / "config.json").get("format") == "iec-features":
        config = _read(folder / "config.json")
        about |= {"kind": "features", "version": config.get("version"), "channels": config.get("channels")}
        about |= {"features": config.get("features"), "classes": config.get("class_names")}
        about["values"] = parameters(folder)
    else:
        about["files"] = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())[:20]
    return about


def _checkpoint(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="np") as opened:
            meta = json.loads((opened.metadata() or {}).get("iec", "{}"))
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated or damaged checkpoint ({error}); delete it to start anew") from error
    return {key: meta.get(key) for key in ("name", "step", "fingerprint")}


def bundled() -> dict[str, dict[str, Any]]:
    """What comes with the package, by folder name, each as `describe` tells it."""
    root = Path(str(resources.files("iec") / "bundled"))
    return {folder.name: describe(folder) for folder in sorted(root.glob("*")) if folder.is_dir()}
