"""An arm: one way to sample from a pipeline. Arms of one comparison share the model, the seeds and the sampling code."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from iec.artifact.calibration import Calibration
from iec.caches import CacheQuant, DeepCache
from iec.caches.spelling import parse as parse_cache
from iec.caches.spelling import spell as spell_cache
from iec.evaluate.sampling import with_scheduler
from iec.pipeline.caching import cache
from iec.pipeline.installation import undo
from iec.pipeline.quantizing import quantize
from iec.pipeline.scaling import scale
from iec.pipeline.session import enable
from iec.plan import parse_probe, resolve_relaxation, spell
from iec.quant.config import QuantConfig
from iec.quant.reconstruct import Reconstruction

Kind = Literal["reference", "plain", "corrected", "control"]
FIELDS = {"w8a8": QuantConfig(), "w4a8": QuantConfig(weight_bits=4)}


@dataclass(frozen=True)
class Arm:
    """One way to sample. Two arms that sample the same images are equal but for `name` and `kind`, where it can be told.

    Args:
        name: what people call it.
        kind: what it is in a comparison.
        num_inference_steps: T, at least 1.
        scheduler: a class name of diffusers or ours; None: the pipeline's own.
        scheduler_options: entries of the scheduler's config that are changed.
        quant: the field of a quantized denoiser, "w8a8" or "w4a8"; None: as it is.
        layers: which layers are quantized: a list of patterns, see `QuantConfig`; all by default.
        reconstruct: learn the rounding of the weights.
        cache: a feature cache, or its spelling ("deepcache:5", see `iec.caches.spelling`).
        steps: a correction plan (see `iec.plan.resolve`); None or "none": no correction.
        relax: relaxation factors, or a preset, which brings its `tol` where none is given.
        tol: relative residual below which a sample is frozen for its step; None: never.
        probe: where a correction evaluates the denoiser (see `iec.plan.probe`).
        scale: what the denoiser's output is multiplied by, above 0.
        eta: the share of fresh noise, 0 (none) … 1, for schedulers that take it (DDIM).

    Raises TypeError or ValueError for values that cannot be.
    """

    name: str
    kind: Kind
    num_inference_steps: int
    scheduler: str | None = None
    scheduler_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    quant: str | None = None
    layers: tuple[str, ...] = ("*",)
    reconstruct: bool = False
    cache: DeepCache | CacheQuant | None = None
    steps: str | None = None
    relax: tuple[float, ...] = (0.5,)
    tol: float | None = None
    probe: str = "estimate"
    scale: float = 1.0
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}, expected one of {', '.join(get_args(Kind))}")
        count = self.num_inference_steps
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"num_inference_steps is {count!r}, expected a whole number")
        if count < 1:
            raise ValueError(f"num_inference_steps is {count}, expected at least 1")
        if self.quant is not None and self.quant not in FIELDS:
            raise ValueError(f"quant is {self.quant!r}, expected one of {', '.join(FIELDS)}")
        if not isinstance(self.layers, list | tuple) or not all(isinstance(each, str) for each in self.layers):
            raise TypeError(f"layers is {self.layers!r}, expected a list of patterns such as ['*', '!conv_in']")
        self._set("layers", tuple(self.layers))
        QuantConfig(layers=self.layers)  # refuses an empty list
        for name, given in (("reconstruct", self.reconstruct), ("layers", self.layers != ("*",))):
            if given and self.quant is None:
                raise ValueError(f"{name} is given, but nothing is quantized; give quant too")
        if not isinstance(self.scheduler_options, Mapping):
            raise TypeError(f"scheduler_options is {self.scheduler_options!r}, expected a table of names and values")
        if isinstance(self.cache, str):
            self._set("cache", parse_cache(self.cache))
        if self.cache is not None and not isinstance(self.cache, DeepCache | CacheQuant):
            raise TypeError(f"cache is {self.cache!r}, expected a text such as deepcache:5")
        if not _is_number(self.scale) or not 0 < self.scale < float("inf"):
            raise ValueError(f"scale is {self.scale!r}, expected a number above 0, usually 0.99 … 1.01")
        if not _is_number(self.eta) or not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta!r}, expected a number in 0 … 1")
        factors, tol, place = resolve_relaxation(self.relax, self.tol, self.probe)
        steps = None if self.steps is None else "".join(spell(self.steps).lower().split())
        self._set("steps", None if steps == "none" else steps)
        # What an uncorrected arm says of corrections is no difference.
        corrected = self.steps is not None
        self._set("relax", factors if corrected else (0.5,))
        self._set("tol", tol if corrected else None)
        self._set("probe", str(place) if corrected else "estimate")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def calibrated(self) -> bool:
        """Whether it needs a calibration."""
        return self.quant is not None or isinstance(self.cache, CacheQuant)

    @property
    def kwargs(self) -> dict[str, Any]:
        """What the pipeline is called with beside seeds, steps and conditions."""
        return {"eta": self.eta} if self.eta else {}

    def plain(self) -> dict[str, Any]:
        """What it samples, as plain data: `name`, `kind` and defaults left out. Equal for arms that are equal but for those."""
        found: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if (
                each.name in ("name", "kind")
                or value == each.default
                or (each.name == "scheduler_options" and not value)
            ):
                continue
            if isinstance(value, DeepCache | CacheQuant):
                value = spell_cache(value)
            elif isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, Mapping):
                value = {key: value[key] for key in sorted(value)}
            found[each.name] = float(value) if each.name in ("scale", "eta", "tol") else value
        return found

    @staticmethod
    def of(given: Mapping[str, Any]) -> Arm:
        """Read `plain()`, or a table of a recipe: `name` and `kind` may be there, else they are made from the rest.

        Raises ValueError for an unknown key or none where one is needed, TypeError or ValueError for a bad value.
        """
        known = [each.name for each in fields(Arm)]
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
                raise ValueError(f"an arm has no {key!r}{hint}")
        if "num_inference_steps" not in given:
            raise ValueError("an arm needs num_inference_steps")
        values = dict(given)
        if isinstance(values.get("relax"), list):
            values["relax"] = tuple(values["relax"])
        values.setdefault("name", "")
        values.setdefault("kind", "plain")
        made = Arm(**values)
        if "kind" not in given and made.steps is not None:
            made = replace(made, kind="corrected")
        return made if made.name else replace(made, name=made.label)

    @property
    def label(self) -> str:
        """A name made from the rest: "W8A8, deepcache:5, 50 steps (Euler) + IEC, refresh"."""
        chosen = "" if self.layers == ("*",) else f" ({' '.join(self.layers)})"
        learnt = " reconstructed" if self.reconstruct else ""
        parts = [] if self.quant is None else [self.quant.upper() + chosen + learnt]
        parts += [] if self.cache is None else [spell_cache(self.cache)]
        own = [] if self.scheduler is None else [short(self.scheduler)]
        own += [f"{key}={value}" for key, value in sorted(self.scheduler_options.items())]
        parts.append(f"{self.num_inference_steps} steps" + (f" ({', '.join(own)})" if own else ""))
        parts += [f"η {self.eta:g}"] if self.eta else []
        parts += [f"ε × {self.scale:g}"] if self.scale != 1 else []
        if self.steps is None:
            return ", ".join(parts)
        more = [] if self.relax == (0.5,) else ["λ " + "/".join(f"{factor:g}" for factor in self.relax)]
        more += [] if self.tol is None else [f"tol {self.tol:g}"]
        place = parse_probe(self.probe)
        what = {"estimate": "IEC", "next": "IEC at t − 1", "start": f"averaging at x_t, ρ {place.distance:g}"}[
            place.kind
        ]
        return f"{', '.join(parts)} + {what}, {self.steps}" + (f" ({', '.join(more)})" if more else "")

    def without_correction(self) -> Arm:
        """The same without IEC; itself if there is none. Its name is made anew."""
        if self.steps is None:
            return self
        bare = replace(self, kind="plain", steps=None)
        return replace(bare, name=bare.label)

    def calibration(self) -> dict[str, Any]:
        """What its calibration depends on beside the pipeline, as plain data; empty for one that needs none."""
        if not self.calibrated:
            return {}
        kept = ("num_inference_steps", "scheduler", "scheduler_options", "quant", "layers", "reconstruct", "eta")
        found = {key: value for key, value in self.plain().items() if key in kept}
        return {**found, "cache": spell_cache(self.cache)} if isinstance(self.cache, CacheQuant) else found


def short(scheduler: str) -> str:
    """A scheduler's class name as people say it: "DPMSolverMultistepScheduler" → "DPMSolverMultistep"."""
    return scheduler.removesuffix("Scheduler").removesuffix("Discrete")


def calibration_name(arm: Arm) -> str:
    """What an arm needs: field, steps, the scheduler if it is not the model's own, and the options of a CacheQuant.

    "w8a8-60-euler", "w8a8-50-cachequant5". Arms whose `calibration()` is equal have the same name.
    """
    found = arm.calibration()
    kind = "" if arm.scheduler is None else f"-{short(arm.scheduler).lower()}"
    kind += "".join(f"-{key}-{value}" for key, value in found.get("scheduler_options", {}).items())
    learnt = "" if arm.layers == ("*",) else f"-{','.join(arm.layers)}"
    learnt += "-reconstructed" if arm.reconstruct else ""
    noise = f"-eta{arm.eta:g}" if arm.eta else ""
    cached = ""
    if isinstance(arm.cache, CacheQuant):
        cached = f"-{found['cache'].replace(':', '', 1).replace(',', '-').replace('=', '-')}"
    return f"{arm.quant or 'float'}-{arm.num_inference_steps}{kind}{noise}{learnt}{cached}"


def calibration_options(arm: Arm) -> dict[str, Any]:
    """What `iec.calibrate` is given for an arm on `rescheduled(pipe, arm)`, beside samples, seeds and conditions.

    Raises ValueError for an arm that needs none.
    """
    if not arm.calibrated:
        raise ValueError(f"{arm.name!r} is neither quantized nor cached by CacheQuant, so it needs no calibration")
    return {
        "quant": None if arm.quant is None else replace(FIELDS[arm.quant], layers=arm.layers),
        "cache": arm.cache if isinstance(arm.cache, CacheQuant) else None,
        "reconstruct": Reconstruction() if arm.reconstruct else None,
        "num_inference_steps": arm.num_inference_steps,
        **arm.kwargs,
    }


@contextlib.contextmanager
def prepared(pipe: Any, arm: Arm, calibration: Calibration | None = None, kernel: str = "auto") -> Iterator[Any]:
    """A pipeline as the arm wants it, with the weights of `pipe`; afterwards these are what they were.

    `kernel` is that of quantized layers, see `iec.quantize`.

    Call it with `arm.num_inference_steps` and `arm.kwargs`. Raises ValueError for an arm that needs a calibration without
    one, or whose `eta` or `scale` its scheduler does not take, and as `iec.quantize`, `iec.cache` and `iec.enable` do.
    """
    pipe = rescheduled(pipe, arm)
    try:
        if arm.calibrated and calibration is None:
            raise ValueError(f"{arm.name!r} is quantized, or cached by CacheQuant, so it needs a calibration")
        if arm.eta and "eta" not in inspect.signature(pipe.scheduler.step).parameters:
            raise ValueError(f"{arm.name!r} has eta {arm.eta:g}, but {type(pipe.scheduler).__name__} takes none")
        if arm.quant is not None and calibration is not None:
            quantize(pipe, calibration, kernel)
        if arm.cache is not None:
            cache(pipe, arm.cache, calibration if isinstance(arm.cache, CacheQuant) else None)
        if arm.scale != 1:
            scale(pipe, arm.scale)
        if arm.steps is not None:
            enable(pipe, steps=arm.steps, relax=arm.relax, tol=arm.tol, probe=arm.probe)
        yield pipe
    finally:
        undo(pipe)


def rescheduled(pipe: Any, arm: Arm) -> Any:
    """`pipe`, or one with its components and the scheduler of the arm."""
    if arm.scheduler is None and not arm.scheduler_options:
        return pipe
    return with_scheduler(pipe, arm.scheduler or type(pipe.scheduler).__name__, **arm.scheduler_options)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
