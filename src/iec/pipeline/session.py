"""iec.enable, iec.disable, iec.summary: the correction switched on and off on a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from iec.pipeline.adapters import DENOISERS
from iec.pipeline.caching import cached
from iec.pipeline.foreign import names
from iec.pipeline.installation import Installation, installation, installed, switching
from iec.pipeline.quantizing import quantized
from iec.pipeline.summary import Summary
from iec.plan import CorrectionPlan, Probe, Relaxation, StepClock, resolve_relaxation, spell
from iec.schedule.scheduler import IECScheduler


class Session:
    """IEC on one pipeline; made by `iec.enable`. As a context manager it disables IEC at the end of the block."""

    def __init__(self, held: Installation, steps: str | CorrectionPlan | None, relaxation: Relaxation) -> None:
        self.held, self.steps, self.relaxation = held, steps, relaxation
        self._ended: Summary | None = None  # what there was to tell when the session ended
        held.state.configure(steps, relaxation)

    @property
    def pipe(self) -> Any:
        """The pipeline."""
        return self.held.pipe

    @property
    def scheduler(self) -> IECScheduler:
        """The scheduler that the pipeline carries."""
        return self.held.scheduler

    @property
    def clock(self) -> StepClock:
        """The clock of the pipeline."""
        return self.held.state.clock

    @property
    def evaluations(self) -> int | None:
        """Denoiser forwards of the last run; None when a denoiser was assigned to the pipeline since `iec.enable`."""
        if self._ended is not None and self._ended.num_steps is not None:
            return self._ended.evaluations
        for name, gate in self.held.gates.items():
            model = getattr(self.pipe, name, None)
            if getattr(model, "_orig_mod", model) is not getattr(gate.module, "_orig_mod", gate.module):
                return None
        return sum(gate.evaluations for gate in self.held.gates.values())

    @property
    def active(self) -> bool:
        """Whether the pipeline carries this session."""
        return installed(self.pipe) is self.held and self.held.in_place and self in self.held.parts

    def summary(self) -> Summary:
        """What is corrected, and what the last run did; of a session that has ended, what its last run did."""
        if self._ended is not None:
            return self._ended
        state = self.held.state
        spec = state.steps if state.steps is not None else "default"
        about = {
            "pipeline": type(self.pipe).__name__,
            "scheduler": type(state.inner).__name__,
            "spec": spec.spec if isinstance(spec, CorrectionPlan) else spec,
            "relax": state.relaxation.factors,
            "tol": state.relaxation.tol,
            "probe": str(state.relaxation.probe),
            "enabled": self.active,
            **_beside(self.pipe, self.held),
        }
        run = state.last_run
        if run is None or not run.visits:
            return Summary(**about)
        return Summary(
            **{**about, "spec": run.plan.spec},
            num_steps=len(run.values) - run.begin,
            steps=tuple(step - run.begin for step in run.plan.steps),
            evaluations=self.evaluations,
            corrections=run.corrections,
            spared=sum(gate.spared for gate in self.held.gates.values()),
            seconds=run.ended - run.started,
            correction_seconds=run.correction_seconds,
            residuals={
                step - run.begin: tuple(float(value.float().mean()) for value in values)
                for step, values in run.residuals.items()
            },
        )

    def disable(self) -> None:
        """Take IEC off the pipeline; nothing happens if it is off already."""
        with switching:
            if self in self.held.parts:
                self.held.drop(self)

    def remove(self) -> None:
        """Leave the scheduler without corrections; `Installation.drop` calls it."""
        self._ended = dataclasses.replace(self.summary(), enabled=False)
        self.held.state.configure("none", self.relaxation)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()

    def __repr__(self) -> str:
        return f"Session({type(self.pipe).__name__}, {self.scheduler!r}, {'active' if self.active else 'ended'})"


def enable(
    pipe: Any,
    steps: str | Iterable[int] | CorrectionPlan | None = None,
    relax: Sequence[float] | float | str = (0.5,),
    tol: float | None = None,
    probe: str | Probe = "estimate",
) -> Session:
    """Switch IEC on: every following call of `pipe` corrects the chosen steps.

    Args:
        pipe: a diffusers pipeline with a scheduler and a denoiser (`unet`, `transformer`, …), full precision or efficient.
        steps: which steps (see `iec.plan.resolve`); None is `refresh` beside a cache whose refresh steps are known before
            the run, as those of `iec.cache` are, else `ends:1/10`.
        relax: relaxation factors (λ₁ … λ_K), one extra evaluation each, or a preset: paper, released-ddpm, released-ldm.
        tol: relative residual below which a sample is frozen and spends no more on its step; None: never.
        probe: where a correction evaluates the denoiser: "estimate" is IEC; "next" and "start[:ρ]" are controls (see
            `iec.plan.probe`).

    Enabling again with the same options returns the same session; with others it raises ValueError. Raises TypeError for a
    pipeline, a scheduler or a cache of another library that cannot be corrected, RuntimeError for such a cache that was put
    over IEC, ValueError for bad options; the pipeline is then as it was. A correction goes past such a cache and evaluates
    the whole model; the other visits are those of the cached run without IEC, bit for bit with relax=(0.0,).
    """
    wanted = resolve_relaxation(relax, tol, probe)
    if steps is not None and not isinstance(steps, CorrectionPlan):
        steps = spell(steps)
    with switching:
        held = installation(pipe)
        session = _session(held)
        if session is None:
            held.check_caches(steps)
            session = Session(held, steps, wanted)
            held.add(session)
        elif (session.steps, session.relaxation) != (steps, wanted):
            raise ValueError(
                f"IEC is on already, as {session.scheduler!r}; call iec.disable(pipe) before enabling it with other options"
            )
        return session


def disable(pipe: Any) -> None:
    """Switch IEC off: the pipeline is bit for bit what it was before `enable`. Nothing happens if it is off.

    A scheduler that was assigned since `enable` stays.
    """
    session = _session(installed(pipe))
    if session is not None:
        session.disable()


def summary(pipe: Any) -> Summary:
    """What IEC corrects on `pipe`, and the evaluations, seconds and residuals of its last run."""
    session = _session(installed(pipe))
    if session is None:
        return Summary(
            type(pipe).__name__,
            type(getattr(pipe, "scheduler", None)).__name__,
            "none",
            (),
            None,
            enabled=False,
            **_beside(pipe, installed(pipe)),
        )
    return session.summary()


def _beside(pipe: Any, held: Installation | None) -> dict[str, Any]:
    """What a summary says of the quantization and the cache of a pipeline, be the cache ours or another library's."""
    quantizing, caching = quantized(held), cached(held)
    told: dict[str, Any] = {} if quantizing is None else {"quant": quantizing.describe()}
    if held is not None:
        told["scale"] = held.state.scale
    if caching is not None:
        refreshed, reused = caching.counts() or (None, None)
        told |= {"cache": repr(caching.config), "refreshed": refreshed, "reused": reused}
    else:
        others = names(getattr(pipe, name, None) for name in DENOISERS)
        if others:
            told["cache"] = ", ".join(others)
    return told


def _session(held: Installation | None) -> Session | None:
    return next((part for part in held.parts if isinstance(part, Session)), None) if held is not None else None
