"""What a training run is: one TOML file, read into one dataclass."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from importlib import resources
from pathlib import Path
from typing import Any, Literal

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - Python 3.10
    import tomli as tomllib


@dataclasses.dataclass(frozen=True)
class TrainRecipe:
    """One training run. Every field may stand in the TOML file; `name`, `kind`, `data` and `model` must.

    `kind` is "denoiser" (a diffusers UNet2DModel, ε-prediction) or "features" (the small classifier whose features
    serve the domain metrics). Steps are optimiser steps of `batch_size` images.
    """

    name: str
    kind: Literal["denoiser", "features"]
    data: str
    model: dict[str, Any]
    scheduler: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 5000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 200  # steps of linear growth of the learning rate
    decay: float = 0.3  # final fraction of the steps over which the learning rate falls linearly to zero
    weight_decay: float = 0.0
    ema: float = 0.999
    snr_gamma: float = 0.0  # min-SNR loss weight (arXiv 2303.09556), 0: plain ε loss
    gradient_clip: float = 1.0
    flip: bool = False  # random horizontal mirror
    shift: int = 0  # random translation by at most that many pixels (classifier only)
    dropout: float = 0.0  # before the last layer (classifier only; a denoiser's stands in its table [model])
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    seed: int = 0
    checkpoint_every: int = 250
    sample_every: int = 1000

    def __post_init__(self) -> None:
        if self.kind not in ("denoiser", "features"):
            raise ValueError(f"recipe {self.name!r}: kind is {self.kind!r}, expected 'denoiser' or 'features'")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"recipe {self.name!r}: precision is {self.precision!r}, expected 'fp32' or 'bf16'")
        for field in ("steps", "batch_size", "checkpoint_every", "sample_every"):
            if getattr(self, field) < 1:
                raise ValueError(f"recipe {self.name!r}: {field} is {getattr(self, field)}, expected at least 1")
        for field in ("decay", "ema"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"recipe {self.name!r}: {field} is {getattr(self, field)}, expected 0..1")

    def fingerprint(self) -> str:
        """Identity of the run: all that shapes the weights, but not its length, so that a run can be prolonged."""
        free = {"steps", "decay", "checkpoint_every", "sample_every", "compile"}
        fixed = {k: v for k, v in dataclasses.asdict(self).items() if k not in free}
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of optimiser step `step` (0-based): linear warm-up, constant, linear decay to zero."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        tail = self.decay * self.steps
        fall = min(1.0, (self.steps - step) / tail) if tail > 0 else 1.0
        return self.learning_rate * min(rise, max(0.0, fall))


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "Literal": (str,),
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "dict": (dict,),
}


def load_recipe(name_or_path: str | Path) -> TrainRecipe:
    """Read a bundled recipe by name, or a TOML file by path.

    Raises ValueError for an unknown name, unknown or missing keys and TOML errors, each with what to do.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ValueError(f"recipe file {path} not found")
        text = path.read_text(encoding="utf-8")
    else:
        folder = resources.files("iec") / "recipes" / "train"
        known = sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))
        if str(name_or_path) not in known:
            raise ValueError(
                f"unknown training recipe {str(name_or_path)!r}; bundled: {', '.join(known)}; or give a .toml file"
            )
        text = (folder / f"{name_or_path}.toml").read_text(encoding="utf-8")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"recipe {name_or_path}: not valid TOML: {error}") from error
    known_keys = {f.name: f for f in dataclasses.fields(TrainRecipe)}
    unknown = sorted(set(table) - set(known_keys))
    if unknown:
        raise ValueError(f"recipe {name_or_path}: unknown keys {unknown}; known: {', '.join(known_keys)}")
    missing = [k for k in ("name", "kind", "data", "model") if k not in table]
    if missing:
        raise ValueError(f"recipe {name_or_path}: missing keys {missing}")
    for key, value in table.items():
        expected = _TYPES[known_keys[key].type.split("[")[0]]
        if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
            raise ValueError(f"recipe {name_or_path}: {key} is {value!r}, expected {known_keys[key].type}")
    return TrainRecipe(**table)
