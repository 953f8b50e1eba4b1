"""What IEC puts on a pipeline: its scheduler, the gates on its denoisers, and the parts that rely on them.

Parts are sessions of `iec.enable`, caches, quantizers. The first part brings the scheduler and the gates, the last one
takes them away again; then the pipeline is what it was.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

from iec.pipeline.adapters import denoisers, follow_timesteps
from iec.pipeline.foreign import check_refresh, find, refresh_steps
from iec.pipeline.gate import Gate
from iec.plan import CorrectionPlan
from iec.schedule.scheduler import IECScheduler
from iec.schedule.state import IECState

_HELD = "_iec"  # where a pipeline holds its installation
switching = threading.RLock()  # held while something is put on a pipeline or taken off


class Part(Protocol):
    """Something that `Installation.add` was given; `remove` takes its own traces off the pipeline."""

    def remove(self) -> None: ...


class Installation:
    """The scheduler, clock and gates of one pipeline; `parts` in the order in which they were added."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        models = denoisers(pipe)
        self.scheduler = IECScheduler(pipe.scheduler, steps="none")
        self.gates = {name: Gate(model, self.state) for name, model in models.items()}
        self.parts: list[Part] = []
        self.weights: dict[str, str] | None = (
            None  # fingerprints of the denoisers' weights, where these were given away
        )
        self.state.survey = self._survey

    @property
    def state(self) -> IECState:
        """The state of the scheduler: plan, clock, run."""
        return self.scheduler.iec

    @property
    def in_place(self) -> bool:
        """Whether the pipeline still has our scheduler (a user may have assigned another)."""
        return self.pipe.scheduler is self.scheduler

    def add(self, part: Part) -> None:
        """Hold `part`; the first one puts scheduler and gates in place."""
        if not self.parts:
            self._install()
        self.parts.append(part)

    def drop(self, part: Part) -> None:
        """Remove `part`; after the last one the pipeline is what it was. A scheduler assigned since then stays."""
        part.remove()
        self.parts.remove(part)
        if not self.parts:
            self._uninstall()

    def check_caches(self, steps: str | CorrectionPlan | None) -> None:
        """Look for caches of other libraries on the denoisers; without corrections, and a cache of ours, they do no harm.

        Raises TypeError or RuntimeError for one that a correction cannot go past, ValueError where `steps` are the refresh
        steps of one that has none, or a cache of ours is there as well.
        """
        for name, gate in self.gates.items():
            gate.caches = () if steps == "none" and self.state.refresh is None else find(gate.module)
            for cache in gate.caches:
                if self.state.refresh is not None:
                    raise ValueError(
                        f"the {name} of this pipeline carries two caches, IEC's own and {cache.name}; take one off"
                    )
                if self.parts and cache.outermost and not gate.outermost:
                    raise RuntimeError(
                        f"{cache.name} was put on the {name} after IEC, so that IEC cannot keep it out of its corrections; "
                        "call iec.undo(pipe), and put IEC on again, after the cache"
                    )
            check_refresh(steps, gate.caches)

    def _survey(self, num_steps: int, begin: int) -> tuple[int, ...] | None:
        self.check_caches(self.state.steps)
        return refresh_steps([cache for gate in self.gates.values() for cache in gate.caches], num_steps, begin)

    def __deepcopy__(self, memo: dict[int, Any]) -> Installation:
        raise RuntimeError(
            f"IEC is on this {type(self.pipe).__name__}; call iec.undo(pipe) before copying it, and enable IEC on the copy"
        )

    def _install(self) -> None:
        for gate in self.gates.values():
            gate.install()
        if callable(getattr(self.pipe, "get_timesteps", None)):
            vars(self.pipe)["get_timesteps"] = follow_timesteps(self.pipe.get_timesteps, self.state)
        self.pipe.scheduler = self.scheduler
        vars(self.pipe)[_HELD] = self

    def _uninstall(self) -> None:
        for gate in self.gates.values():
            gate.remove()
        vars(self.pipe).pop("get_timesteps", None)
        if self.in_place:
            self.pipe.scheduler = self.state.inner
        del vars(self.pipe)[_HELD]


def installed(pipe: Any) -> Installation | None:
    """What is on `pipe`, if anything."""
    return getattr(pipe, "__dict__", {}).get(_HELD)


def installation(pipe: Any) -> Installation:
    """What is on `pipe`, or a new, still empty installation.

    When another scheduler was assigned since, everything is taken off first. Raises TypeError for a pipeline or scheduler
    that IEC cannot follow.
    """
    held = installed(pipe)
    if held is not None and held.in_place:
        return held
    if held is not None:
        undo(pipe)
    return Installation(pipe)


def undo(pipe: Any) -> None:
    """Take everything of IEC off `pipe`, last first. Nothing happens if there is nothing."""
    with switching:
        held = installed(pipe)
        while held is not None and held.parts:
            held.drop(held.parts[-1])
