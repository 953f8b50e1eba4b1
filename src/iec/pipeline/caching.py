"""iec.cache: a feature cache put on a pipeline."""

from __future__ import annotations

import inspect
import os
import threading
from typing import Any

import torch

from iec.artifact.calibration import Calibration
from iec.caches import CacheQuant, DeepCache
from iec.pipeline.foreign import refuse_beside
from iec.pipeline.installation import Installation, installation, installed, switching
from iec.pipeline.origin import check_origin, steps_check
from iec.schedule.state import IECState


class Caching:
    """The cache on one pipeline; made by `iec.cache`. As a context manager it takes the cache off at the end."""

    def __init__(self, held: Installation, config: DeepCache | CacheQuant, calibration: Calibration | None) -> None:
        models = {name: gate.module for name, gate in held.gates.items()}
        if len(models) != 1:
            raise TypeError(
                f"{type(held.pipe).__name__} has several denoisers ({', '.join(models)}); a cache takes one; leave it out for "
                "this pipeline"
            )
        state = held.state
        self.held, self.config, self.calibration = held, config, calibration
        (model,) = models.values()
        given = (model, state.clock, lambda: state.run, lambda args, kwargs: _owns(model, state, args, kwargs))
        if isinstance(config, CacheQuant):
            assert calibration is not None and calibration.cache is not None
            self.feature = config.build(*given, calibration.cache)
        else:
            self.feature = config.build(*given)
        self._hooks: list[Any] = []

    @property
    def pipe(self) -> Any:
        """The pipeline."""
        return self.held.pipe

    @property
    def active(self) -> bool:
        """Whether the pipeline carries this cache."""
        return installed(self.pipe) is self.held and self.held.in_place and self in self.held.parts

    def counts(self) -> tuple[int, int] | None:
        """Whole passes (corrections among them) and reuses in the last run; None before the first."""
        run = self.held.state.last_run
        if run is None or run is not self.feature.last_run:
            return None
        return self.feature.refreshed, self.feature.reused

    def install(self) -> None:
        """Patch the model; from the next run on the cache is in use."""
        self.held.state.end_run()
        self.held.state.refresh = lambda num_steps: self.feature.plan(num_steps).refresh
        self.feature.install()
        if self.calibration is not None:
            check = steps_check(self.held, self.calibration.origin.timesteps, "cached")
            self._hooks = [self.feature.model.register_forward_pre_hook(check)]

    def remove(self) -> None:
        """Restore the model; `Installation.drop` calls it."""
        self.held.state.end_run()
        self.held.state.refresh = None
        for hook in self._hooks:
            hook.remove()
        self.feature.remove()

    def undo(self) -> None:
        """Take the cache off the pipeline, and nothing else; nothing happens if it is off already."""
        with switching:
            if self in self.held.parts:
                self.held.drop(self)

    def __enter__(self) -> Caching:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Caching({type(self.pipe).__name__}, {self.config!r}, {'active' if self.active else 'off'})"


def cache(
    pipe: Any,
    config: DeepCache | CacheQuant | None = None,
    calibration: Calibration | str | os.PathLike[str] | None = None,
) -> Caching:
    """Cache: every following call of `pipe` runs the whole denoiser at some steps only, and reuses a part of it at the others.

    Before or after `iec.enable`, whose default becomes `steps="refresh"`, and `iec.quantize`. `iec.disable` leaves the cache on;
    `undo()` of what is returned takes it off, `iec.undo(pipe)` everything. A correction is a whole pass and refreshes the cache,
    so with relax=(0.0,) the samples are the cached run's bit for bit only until the first reuse after a correction:
    that one reuses the feature of the corrected estimate instead of the one of the step's input.

    Args:
        pipe: the pipeline.
        config: iec.DeepCache(...), or iec.CacheQuant(...) as it was calibrated; None: the cache of `calibration`.
        calibration: for CacheQuant: what `iec.calibrate(..., cache=...)` made on this pipeline, or a folder it was saved in.

    Raises TypeError for a pipeline or denoiser that cannot be cached; ValueError for a branch it lacks, when there is a cache
    already, and for a calibration without a cache, with another one, or of another model or scheduler. The pipeline is then as
    it was.
    """
    config, calibration = _checked(config, calibration)
    with switching:
        held = installation(pipe)
        there = cached(held)
        if there is not None:
            raise ValueError(
                f"this pipeline has a cache already, {there.config!r}; take it off first, by .undo() of what iec.cache "
                "returned or iec.undo(pipe)"
            )
        refuse_beside(gate.module for gate in held.gates.values())
        if calibration is not None:
            check_origin(pipe, calibration.origin)
        caching = Caching(held, config, calibration)
        held.add(caching)
        caching.install()
        return caching


def _checked(config: Any, calibration: Any) -> tuple[DeepCache | CacheQuant, Calibration | None]:
    """Configuration and calibration as `cache` takes them, if they belong together."""
    if isinstance(calibration, (str, os.PathLike)):
        calibration = Calibration.load(calibration)
    if calibration is not None and not isinstance(calibration, Calibration):
        raise TypeError(f"calibration is {calibration!r}, expected an iec.Calibration or the folder of one")
    if isinstance(config, DeepCache):
        if calibration is not None:
            raise ValueError(f"{config!r} needs no calibration; leave it out, or use iec.CacheQuant")
        return config, None
    if (config is not None and not isinstance(config, CacheQuant)) or (config is None and calibration is None):
        raise TypeError(f"config is {config!r}, expected iec.DeepCache(interval=...) or iec.CacheQuant(interval=...)")
    if calibration is None:
        raise ValueError(
            f"{config!r} needs a calibration: calibration = iec.calibrate(pipe, cache={config!r}, num_inference_steps=...), then "
            "iec.cache(pipe, config, calibration)"
        )
    if calibration.cache is None:
        raise ValueError("this calibration holds no cache; calibrate with cache=iec.CacheQuant(...)")
    made = CacheQuant.from_dict(calibration.cache.config)
    if config is not None and config != made:
        raise ValueError(
            f"config is {config!r}, but the calibration was made for {made!r}; use that, or calibrate anew"
        )
    return made, calibration


def cached(held: Installation | None) -> Caching | None:
    """The cache among the parts of an installation, if any."""
    return next((part for part in held.parts if isinstance(part, Caching)), None) if held is not None else None


def _owns(model: Any, state: IECState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call of the denoiser is made by the run: in its thread, and at the timestep of the clock.

    Weights may be shared with another pipeline, a run may have been abandoned, a callback may evaluate the model.
    """
    run, tick = state.run, state.clock.now
    if run is None or tick is None or run.thread != threading.get_ident():
        return False
    if run.index < 0:  # no step taken yet: a loop may begin where it likes
        return True
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    # For videos from a picture there is one per token: the run's, or another where the picture is kept.
    given = torch.as_tensor((dict(zip(names, args, strict=False)) | kwargs)["timestep"]).reshape(-1)
    value = torch.tensor(run.values[tick.step])
    wanted = [value.to(given)]
    if given.is_floating_point():  # Flux and its kin are given thousandths, Sana a multiple of its own
        scale = getattr(getattr(model, "config", None), "timestep_scale", 1.0)
        # rounded before (Flux) and after the division (AuraFlow)
        wanted += [wanted[0] / 1000, (value / 1000).to(given), wanted[0] * scale]
    return bool((given[:, None] == torch.stack(wanted)).any())
