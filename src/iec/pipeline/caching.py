"""iec.cache: a feature cache put on a pipeline."""

from __future__ import annotations

import threading
from typing import Any

import torch

from iec.caches import DeepCache
from iec.pipeline.installation import Installation, installation, installed, switching
from iec.schedule.state import IECState


class Caching:
    """The cache on one pipeline; made by `iec.cache`. As a context manager it takes the cache off at the end."""

    def __init__(self, held: Installation, config: DeepCache) -> None:
        models = {name: gate.module for name, gate in held.gates.items()}
        if len(models) != 1:
            raise TypeError(
                f"{type(held.pipe).__name__} has several denoisers ({', '.join(models)}); a cache takes one"
            )
        state = held.state
        self.held, self.config = held, config
        (model,) = models.values()
        self.feature = config.build(
            model, state.clock, lambda: state.run, lambda args, kwargs: _owns(state, args, kwargs)
        )

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
        self.held.state.refresh = lambda num_steps: self.config.plan(num_steps).refresh
        self.feature.install()

    def remove(self) -> None:
        """Restore the model; `Installation.drop` calls it."""
        self.held.state.end_run()
        self.held.state.refresh = None
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


def cache(pipe: Any, config: DeepCache) -> Caching:
    """Cache: every following call of `pipe` runs the whole denoiser at the refresh steps of `config` only.

    Before or after `iec.enable`, whose default becomes `steps="refresh"`. `iec.disable` leaves the cache on; `undo()`
    of what is returned takes it off, `iec.undo(pipe)` everything. A correction is a whole pass and refreshes the cache,
    so with relax=(0.0,) the samples are the cached run's bit for bit only until the first reuse after a correction:
    that one reuses the feature of the corrected estimate instead of the one of the step's input.

    Raises TypeError for a pipeline or denoiser that cannot be cached, ValueError for a branch it lacks or when
    there is a cache already; the pipeline is then as it was.
    """
    if not isinstance(config, DeepCache):
        raise TypeError(f"config is {config!r}, expected iec.DeepCache(interval=...)")
    with switching:
        held = installation(pipe)
        there = cached(held)
        if there is not None:
            raise ValueError(
                f"this pipeline has a cache already, {there.config!r}; take it off first, by .undo() of what iec.cache "
                "returned or iec.undo(pipe)"
            )
        caching = Caching(held, config)
        held.add(caching)
        caching.install()
        return caching


def cached(held: Installation | None) -> Caching | None:
    """The cache among the parts of an installation, if any."""
    return next((part for part in held.parts if isinstance(part, Caching)), None) if held is not None else None


def _owns(state: IECState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call of the denoiser is made by the run: in its thread, and at the timestep of the clock.

    Weights may be shared with another pipeline, a run may have been abandoned, a callback may evaluate the model.
    """
    run, tick = state.run, state.clock.now
    if run is None or tick is None or run.thread != threading.get_ident():
        return False
    if run.index < 0:  # no step taken yet: a loop may begin where it likes
        return True
    given = torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"]).reshape(-1)[0]
    return bool(given == torch.tensor(run.values[tick.step]).to(given))
