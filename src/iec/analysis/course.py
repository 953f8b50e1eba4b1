"""Courses: the states that runs of a pipeline go through, on equal seeds, without and with IEC, free or kept on a course."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iec.analysis.recording import Step, record
from iec.analysis.spread import norms
from iec.core.correction import RESIDUAL_FLOOR
from iec.pipeline.adapters import denoisers
from iec.pipeline.batches import batches
from iec.pipeline.installation import installed
from iec.pipeline.session import Session, enable
from iec.plan import resolve

Progress = Callable[[str, int, int], None]
Correction = Mapping[str, Any]  # arguments of `iec.enable`, such as {"steps": "all", "relax": (0.5,)}


@dataclass(frozen=True)
class Part:
    """Some of the seeds, as many as go into one call, and what the pipeline is called with for them."""

    seeds: tuple[int, ...]
    num_inference_steps: int
    conditions: Mapping[str, Any]

    def record(self, pipe: Any, change: Callable[[Step], Tensor | None] | None = None) -> list[Step]:
        """The steps of a run of `pipe` for these seeds; see `recording.record`."""
        count = len(self.seeds)
        return list(record(pipe, self.seeds, self.num_inference_steps, count, change=change, **self.conditions))


@dataclass(frozen=True)
class Course:
    """A run: `timesteps`, one per step; `states` (T, B, …), the sample after each step as the pipeline's own step made it, on the
    CPU in its own dtype; by step, of its corrections, `residuals` (K, B), ‖y′ − y‖/(‖y‖ + 1e-6), and `changes` (K, B), ‖y′ − y‖,
    float64."""

    timesteps: tuple[float, ...]
    states: Tensor
    residuals: dict[int, Tensor]
    changes: dict[int, Tensor]


def parts(
    pipe: Any, seeds: Sequence[int], num_inference_steps: int, batch_size: int, conditions: Mapping[str, Any]
) -> list[Part]:
    """The seeds in calls of `batch_size`; prompts and class labels may be lists with one entry per seed.

    Raises ValueError or TypeError for what `pipe` cannot be called with.
    """
    made = batches(pipe, seeds, num_inference_steps, batch_size, "latent", **conditions)
    return [
        Part(tuple(batch.seeds), num_inference_steps, {key: batch.arguments[key] for key in conditions})
        for batch in made
    ]


def follow(
    pipe: Any,
    part: Part,
    correction: Correction | None = None,
    change: Callable[[int, Tensor], Tensor | None] = lambda step, y: None,
) -> Course:
    """One run of `pipe`, with `correction` corrected; `change(step, y)` may give another sample to go on with.

    Afterwards the pipeline is as it was.
    """
    own: list[Tensor] = []

    def changed(step: Step) -> Tensor | None:
        own.append(step.y.detach().to("cpu", copy=True))
        return change(len(own) - 1, step.y)

    with contextlib.ExitStack() as stack:
        if correction is not None:
            stack.enter_context(enable(pipe, **correction))
        steps = part.record(pipe, changed)
    residuals: dict[int, Tensor] = {}
    changes: dict[int, Tensor] = {}
    for number, step in enumerate(steps):
        if step.residuals:
            residuals[number] = torch.stack([each.detach().cpu().double() for each in step.residuals])
            # The last estimate is the state, which may have been changed; the ones before are what was corrected.
            lengths = torch.stack([norms(each).cpu() for each in step.estimates[:-1]])
            changes[number] = residuals[number] * (lengths + RESIDUAL_FLOOR)
    return Course(tuple(step.timestep for step in steps), torch.stack(own), residuals, changes)


def beside(course: Course) -> Callable[[int, Tensor], Tensor]:
    """A `change` that keeps a run on `course`: every step begins at its state, whatever the one before has made."""
    return lambda step, y: course.states[step].to(y)


def everywhere(correction: Correction | None, pipes: Iterable[Any], num_inference_steps: int) -> Correction | None:
    """`correction` with the steps spelled out, where one of `pipes` has a cache of ours, so that all are corrected at the steps
    that are meant there ("refresh" among them)."""
    for pipe in pipes:
        held = installed(pipe)
        if correction is not None and held is not None and held.state.refresh is not None:
            count = _length(held.state.inner, num_inference_steps)
            steps = correction.get("steps")
            plan = resolve("refresh" if steps is None else steps, count, held.state.refresh(count))
            return {**correction, "steps": plan.steps}
    return correction


def _length(scheduler: Any, num_inference_steps: int) -> int:
    """The length of the scheduler's list, which is not always the number asked for (Heun, PNDM)."""
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(num_inference_steps)
    except (TypeError, ValueError):  # schedules that depend on the picture's size are as long as asked for
        return num_inference_steps
    return len(scheduler.timesteps)


def check_plain(pipe: Any) -> None:
    """Raise ValueError where corrections are on: the analysis switches them on and off itself."""
    held = installed(pipe)
    if held is not None and any(isinstance(part, Session) for part in held.parts):
        raise ValueError("IEC is enabled on this pipeline; call iec.disable(pipe), the analysis corrects it itself")


def check_pair(full: Any, efficient: Any) -> None:
    """Raise ValueError unless the two pipelines have denoisers of their own, and `full` nothing of IEC on it."""
    check_plain(efficient)
    if full is efficient or installed(full) is not None:
        raise ValueError(
            "the full-precision pipeline is quantized, cached or corrected, or is the efficient one; give a second one, "
            "loaded for itself, without anything of IEC on it"
        )
    others = denoisers(efficient)
    shared = [name for name, model in denoisers(full).items() if others.get(name) is model]
    if shared:
        raise ValueError(f"both pipelines have the same {', '.join(shared)}; load the model once for each")


def check_timesteps(one: Iterable[float], other: Iterable[float]) -> None:
    """Raise ValueError unless two runs had the same timesteps."""
    if tuple(one) != tuple(other):
        raise ValueError(
            "the two pipelines sample at different timesteps, so their states cannot be compared step by step; give them the "
            "same scheduler"
        )
