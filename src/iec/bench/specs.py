"""The tables of a bench recipe, one dataclass each: their fields are the keys that may stand there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Figures = Literal["spectral", "error", "growth", "split", "residuals", "images"]


@dataclass(frozen=True)
class ModelSpec:
    """`name`: bundled, a folder, or a Hub id with its `revision`; `dtype` of the weights; `options` for `from_pretrained`."""

    name: str
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    variant: str | None = None
    revision: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSpec:
    """`num` images of the seeds from `seed` on, in shards of `shard`, each sampled in batches of `batch_size` by `threads`
    threads: all of which the images depend on, by the rounding of floats. `num_inference_steps` is for arms without their own,
    `scheduler` with `scheduler_options` for arms that have neither (None: the model's own)."""

    num: int = 64
    seed: int = 0
    batch_size: int = 16
    shard: int = 50
    num_inference_steps: int | None = None
    scheduler: str | None = None
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    threads: int = 1
    device: str = "auto"

    def __post_init__(self) -> None:
        _at_least_one(self, "num", "batch_size", "shard", "num_inference_steps", "threads")


@dataclass(frozen=True)
class CalibrationSpec:
    """Samples of the seeds from `seed` on, which are none of those evaluated. `conditions` as in [conditions], by default those
    of the run at even distances. `bundled`: where one comes with the model, it is taken instead."""

    num_samples: int = 64
    seed: int = 1_000_000_000
    batch_size: int = 16
    bundled: bool = False
    conditions: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _at_least_one(self, "num_samples", "batch_size")


@dataclass(frozen=True)
class FineSpec:
    """The fine solution: full precision by a converged solver, of the first `num` seeds (default: of all)."""

    num_inference_steps: int = 200
    scheduler: str | None = "DPMSolverMultistepScheduler"
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    num: int | None = None

    def __post_init__(self) -> None:
        _at_least_one(self, "num_inference_steps", "num")


@dataclass(frozen=True)
class ReferencesSpec:
    """What images are compared with: the `fine` solution, `full` precision with the same sampler and steps, real images
    (`data`: "fashion-mnist", a folder, a file of statistics; None: the network's own, where it has some)."""

    fine: FineSpec | None = None
    full: bool = True
    data: str | None = None


@dataclass(frozen=True)
class MetricsSpec:
    """`names` and `network` of `iec evaluate` (None, or "none" over a network: nothing of sets of images); `draws` of the
    bootstrap, with `seed`; the model of `clip` scores (None: the paper's)."""

    names: tuple[str, ...] = ("rmse_full",)
    network: str | None = None
    draws: int = 200
    seed: int = 0
    batch_size: int = 50
    clip: str | None = None

    def __post_init__(self) -> None:
        _at_least_one(self, "batch_size")
        if self.draws < 2:
            raise ValueError(f"draws is {self.draws}, expected at least 2: one resample tells no interval")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected 0 or more")
        if self.network == "none":  # TOML has no null
            object.__setattr__(self, "network", None)


@dataclass(frozen=True)
class ControlsSpec:
    """Whether every corrected arm stands beside the arms of equal cost, without --controls, and the factors of ε-scaling."""

    enabled: bool = False
    scales: tuple[float, ...] | None = None


@dataclass(frozen=True)
class FigureSpec:
    """One figure: of the `arm` (its name in this recipe; None: of full precision), or of `arms` ("images"). Further keys are
    `options`: num, seed, batch_size, and those of the analysis."""

    kind: Figures
    title: str = ""
    arm: str | None = None
    arms: tuple[str, ...] = ()
    num_inference_steps: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least_one(self, "num_inference_steps")


@dataclass(frozen=True)
class StandInSpec:
    """A small random model of the same architecture, by its name in `iec.bench.standins`, with `options` of its making."""

    model: str
    options: dict[str, Any] = field(default_factory=dict)


def _at_least_one(spec: Any, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
