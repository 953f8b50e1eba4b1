"""What a folder holds, in one table: model, feature network, training run, calibration."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from iec.artifact.calibration import CacheTables, Calibration, Quantization
    from iec.plan import CachePlan


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

    Kinds are "pipeline", "features", "training run", "calibration" and "other". Raises ValueError when there is no such
    folder or a file in it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    about: dict[str, Any] = {"folder": str(folder), "kind": "other", "bytes": _size(folder)}
    if (folder / "model_index.json").is_file():
        index = _read(folder / "model_index.json")
        parts = {k: v[1] for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[1]}
        about |= {"kind": "pipeline", "class": index.get("_class_name"), "components": parts}
        beside = sorted(file.parent.name for file in folder.glob("*/calibration.json"))
        values = parameters(folder)
        about["values"] = {name: count for name, count in values.items() if Path(name).parts[0] not in beside}
        if beside:
            about["calibrations"] = beside
    elif (folder / "checkpoint.safetensors").is_file():
        about |= {"kind": "training run", **_checkpoint(folder / "checkpoint.safetensors")}
        about["finished"] = (folder / "model").is_dir()
    elif (folder / "config.json").is_file() and _read(folder / "config.json").get("format") == "iec-features":
        config = _read(folder / "config.json")
        about |= {"kind": "features", "version": config.get("version"), "channels": config.get("channels")}
        about |= {"features": config.get("features"), "classes": config.get("class_names")}
        about["values"] = parameters(folder)
    elif (folder / "calibration.json").is_file() and _read(folder / "calibration.json").get(
        "format"
    ) == "iec-calibration":
        about |= {"kind": "calibration", **_calibration(folder)}
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


def _calibration(folder: Path) -> dict[str, Any]:
    from iec.artifact.calibration import Calibration
    from iec.artifact.folder import PAGE

    calibration = Calibration.load(folder)
    origin, quant = calibration.origin, calibration.quant
    about: dict[str, Any] = {
        "version": _read(folder / PAGE).get("version"),
        "pipeline": origin.pipeline,
        "denoisers": origin.denoisers,
        "weights": {name: f"sha256 {digest[:12]}…" for name, digest in origin.weights.items()},
        "scheduler": origin.scheduler,
        "steps": origin.num_steps,
        "timesteps": f"{origin.timesteps[0]:g} … {origin.timesteps[-1]:g}" if origin.timesteps else "none",
        "samples": origin.num_samples,
        "seed": origin.seed,
        "settings": origin.settings,
        "versions": origin.versions,
    }
    about |= _quantization(quant, calibration) if quant else {"quantization": "none"}
    return about | {"cache": "none" if calibration.cache is None else _cache(calibration.cache)}


def _cache(cache: CacheTables) -> dict[str, Any]:
    """Its configuration with the branch that was taken, its plan in words and as a bar, and how far its gains go from 1."""
    from iec.plan import CachePlan

    steps, channels = cache.gain.shape
    plan = CachePlan(cache.refresh, steps)
    config = {key: "none" if value is None else value for key, value in cache.config.items()}
    return {
        "component": cache.component,
        **config,
        "branch": cache.branch,
        "plan": str(plan),
        "whole_passes": plan.bar(),
        "channels": channels,
        "largest_gain_deviation": _deviation(cache.gain, plan),
    }


def _deviation(gain: Tensor, plan: CachePlan) -> str:
    """The gain of a reuse step that is farthest from 1, and where."""
    reused = [step for step in range(plan.num_steps) if step not in plan]
    if not reused:
        return "none, as nothing is reused"
    away = (gain[reused] - 1).abs()
    row, channel = divmod(int(away.argmax()), away.shape[1])
    found = float(gain[reused[row], channel])
    return f"{float(away.max()):.3g} (a gain of {found:.4g} at step {reused[row]}, channel {channel})"


def _quantization(quant: Quantization, calibration: Calibration) -> dict[str, Any]:
    parts = {name: layer.parts for name, layer in quant.layers.items()}
    every = [part for layer in parts.values() for part in layer]
    products = [table for tables in quant.products.values() for table in tables.values()]
    scales = {f"{name} ({part.begin}:{part.end})": part.act.scale for name, of in parts.items() for part in of}
    scales |= {f"{name} ({key})": t.scale for name, of in quant.products.items() for key, t in of.items()}
    stored, full = calibration.weight_bytes, calibration.float_bytes
    return {
        "quantization": quant.config,
        "layers": len(parts),
        "split_layers": sum(len(layer) > 1 for layer in parts.values()),
        "layers_with_new_bias": sum(layer.bias is not None for layer in quant.layers.values()),
        "layers_with_bias_per_step": sum(
            layer.bias is not None and layer.bias.dim() == 2 for layer in quant.layers.values()
        ),
        "layers_with_gain": sum(any(part.gain is not None for part in layer) for layer in parts.values()),
        "attention_products": len(quant.products),
        "weight_bits": _bits([part.weight.bits for part in every], "part"),
        "activation_bits": _bits([part.act.bits for part in every] + [table.bits for table in products], "table"),
        "weight_bytes": stored,
        "float_bytes": full,
        "weights_to_float": f"{stored / full:.3f}" if full else "none",
        "activation_scales": _ranges(scales),
        "skipped": quant.skipped,
        "reconstruction": quant.reconstruction or "none",
    }


def _bits(bits: list[int], what: str) -> dict[str, str]:
    counts = {value: bits.count(value) for value in sorted(set(bits))}
    return {f"{value} bits": f"{count} {what}{'s' if count > 1 else ''}" for value, count in counts.items()}


def _ranges(scales: dict[str, Tensor]) -> dict[str, str]:
    """The extremes over all tables and steps, and the table that the steps change most."""
    if not scales:
        return {}
    ends = {name: (float(scale.min()), float(scale.max())) for name, scale in scales.items()}
    low = min(ends, key=lambda name: ends[name][0])
    high = max(ends, key=lambda name: ends[name][1])
    wide = max(ends, key=lambda name: ends[name][1] / ends[name][0])
    return {
        "smallest": f"{ends[low][0]:.3g} in {low}",
        "largest": f"{ends[high][1]:.3g} in {high}",
        "most changing": f"{ends[wide][1] / ends[wide][0]:.3g}-fold over the steps in {wide}",
    }


def bundled() -> dict[str, dict[str, Any]]:
    """What comes with the package, by folder name, each as `describe` tells it."""
    root = Path(str(resources.files("iec") / "bundled"))
    return {folder.name: describe(folder) for folder in sorted(root.glob("*")) if folder.is_dir()}
