"""The state behind an `IECScheduler`: plan, clock and run, and what one call of `step` does."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from iec.plan import CorrectionPlan, Relaxation, StepClock, resolve
from iec.schedule.directions import marks
from iec.schedule.run import Run
from iec.schedule.slot import Slot

DEFAULT_STEPS = "ends:1/10"
DEFAULT_STEPS_CACHED = "refresh"


class IECState:
    """What an `IECScheduler` holds of its own, as its attribute `iec`."""

    def __init__(self, inner: Any, steps: Any, relaxation: Relaxation) -> None:
        self.inner = inner
        self.steps = steps
        self.relaxation = relaxation
        self.clock = StepClock()
        self.refresh: Callable[[int], Iterable[int]] | None = None  # the refresh steps of an active cache
        # Looks, as a run of so many steps begins at one, for a cache of another library; gives its refresh steps, if known.
        self.survey: Callable[[int, int], Iterable[int] | None] | None = None
        self.plan: CorrectionPlan | None = None
        self.repeats: Tensor | None = None
        self.run: Run | None = None
        self.last_run: Run | None = None
        self.logical = False  # show the inner list (get_timesteps of image-to-image pipelines)
        self.scaled: tuple[Tensor, Tensor] | None = None
        self.skip = False  # the coming evaluation is not wanted (read by the gate on the denoiser)
        self.scale = 1.0  # what the model's output is multiplied by
        self.warned = False
        self.signature = inspect.signature(inner.step)

    def configure(self, steps: Any, relaxation: Relaxation) -> None:
        """Change what is corrected, from the next run on."""
        self.end_run()
        self.last_run = None
        self.steps, self.relaxation = steps, relaxation

    @property
    def ahead(self) -> int:
        """How many steps ahead the timestep of a correction lies.

        The clock goes along: the input of that evaluation is, but for IEC's error, one of the step ahead, so the quantizers of
        that step fit it, and a cache that takes its feature takes one of that step.
        """
        return int(self.relaxation.probe.kind == "next")

    # --- the list -------------------------------------------------------------------------------------------------

    def shown(self, values: Any) -> Any:
        """Timesteps or sigmas as the pipeline sees them."""
        if (
            self.logical
            or self.repeats is None
            or self.plan is None
            or not len(self.plan)
            or not isinstance(values, Tensor)
        ):
            return values
        extra = len(values) - len(self.repeats)  # sigmas end with the one of the clean image
        if extra not in (0, 1):
            return values
        repeats = torch.cat([self.repeats, self.repeats.new_ones(extra)])
        if not self.ahead:
            return values.repeat_interleave(repeats.to(values.device))
        own = torch.arange(len(repeats)).repeat_interleave(repeats)
        repeated = torch.cat([own.new_zeros(1), (own.diff() == 0).long()])
        return values[(own + repeated).to(values.device)]

    def begin_run(self, begin: int = 0, plan: CorrectionPlan | None = None) -> None:
        """Stand before step `begin` of the inner timesteps, with `plan` for all of them, or one that is resolved now.

        Image-to-image runs begin in the middle; there the plan is resolved on the steps that remain.
        """
        timesteps = self.inner.timesteps
        count = len(timesteps)
        self.plan = self._resolved(begin, count) if plan is None else plan
        self.repeats = torch.ones(count, dtype=torch.long)
        self.repeats[list(self.plan.steps)] += len(self.relaxation.factors)
        self.run = self.last_run = Run(timesteps, self.plan, begin, threading.get_ident(), self.ahead)
        self.scaled = None
        self.skip = self.warned = False
        self.clock.start(count)
        self.clock.move(begin, 0, begin not in self.plan)

    def _resolved(self, begin: int, count: int) -> CorrectionPlan:
        listed = None if self.survey is None else self.survey(count, begin)
        if self.refresh is not None:
            listed = self.refresh(count)
        # The first step of a run refreshes, wherever it begins.
        refresh = None if listed is None else {0, *(s - begin for s in listed if s >= begin)}
        steps = self.steps if self.steps is not None else DEFAULT_STEPS if refresh is None else DEFAULT_STEPS_CACHED
        remaining = resolve(steps, count - begin, refresh)
        chosen = tuple(step + begin for step in remaining.steps if step + begin + self.ahead < count)
        if not chosen and remaining.steps:
            raise ValueError(
                f"steps {remaining.spec!r} is the last step alone, which has no next timestep; choose other steps, "
                "or probe='estimate'"
            )
        return CorrectionPlan(chosen, count, remaining.spec)

    def join(self, other: IECState) -> None:
        """Stand before the same run as `other`, if that has begun one and taken no step yet.

        Some pipelines copy their scheduler between `set_timesteps` and the loop, for a second modality.
        """
        if other.run is not None and other.run.index < 0:
            self.begin_run(other.run.begin, other.plan)

    def end_run(self) -> None:
        """Forget the run, finished or aborted."""
        self.run = self.scaled = self.plan = None
        self.skip = False
        self.clock.stop()

    # --- a visit --------------------------------------------------------------------------------------------------

    def step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the pipeline: ordinary step, correction, or (outside a run of ours) the inner step as it is."""
        run = self.run
        if run is None:
            return self.inner.step(*args, **kwargs)
        if run.thread != threading.get_ident():
            raise RuntimeError(
                "this pipeline is running in another thread; give each thread its own: "
                "type(pipe).from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler)) shares the weights"
            )
        bound = self.signature.bind(*args, **kwargs)
        arguments = bound.arguments
        if self.scale != 1:
            arguments["model_output"] = self._scaled(arguments["model_output"], arguments["sample"])
            args, kwargs = bound.args, bound.kwargs
        timestep = arguments["timestep"]
        if run.marks is None and self.relaxation.probe.distance:
            run.marks = marks(arguments["sample"])
        if run.slot is not None and run.corrects_at(timestep):
            output = self._correction(run, arguments)
        else:
            complaint = run.enter(timestep, self.inner)
            if complaint is not None and len(run.plan):
                self._warn(
                    f"{complaint}, so IEC may correct other steps than planned; if this is an image-to-image or inpainting "
                    "pipeline, put the plain scheduler back and use iec.enable(pipe)",
                    UserWarning,
                )
            if run.index in run.plan:
                run.slot = Slot(self.inner, self.relaxation, run.index, run.marks)
                output = run.slot.open(self.signature, args, kwargs)
            else:
                output = self.inner.step(*args, **kwargs)
        self._advance(run)
        return output

    def _correction(self, run: Run, arguments: dict[str, Any]) -> Any:
        slot, sample = run.slot, arguments["sample"]
        assert slot is not None
        if self.skip:
            return slot.repeat()
        if self.scaled is not None and sample is self.scaled[0]:  # loops that rebind the scaled sample
            sample = self.scaled[1]
        output = slot.correct(arguments["model_output"], sample)
        run.corrections += 1
        if slot.stood_back:
            self._warn(
                f"the model's output in the correction of step {run.index} is not finite; the samples concerned keep "
                "their last step",
                RuntimeWarning,
            )
        return output

    def _scaled(self, output: Any, sample: Tensor) -> Any:
        """The model's output times `scale`; of one that holds a variance as well, twice the channels, the first half."""
        channels = sample.shape[1]
        if not isinstance(output, Tensor) or output.shape[1] != 2 * channels:
            return output * self.scale
        return torch.cat([output[:, :channels] * self.scale, output[:, channels:]], 1)

    def _warn(self, message: str, category: type[Warning]) -> None:
        """Warn once in a run."""
        if not self.warned:
            self.warned = True
            warnings.warn(f"IEC: {message}", category, stacklevel=5)

    def _advance(self, run: Run) -> None:
        """Set the clock to the evaluation that comes next."""
        run.note()
        if run.index < 0:  # a timestep that is not of this run: the inner scheduler has answered
            return
        slot = run.slot
        if slot is not None and slot.visit <= len(self.relaxation.factors):
            if self.relaxation.tol is not None or slot.visit == 1:  # else no sample has settled since
                self.skip = slot.settled()
            self.clock.move(run.index + self.ahead, slot.visit, slot.last)
            return
        run.close()
        self.skip = False
        if run.index + 1 < len(run.timesteps):
            self.clock.move(run.index + 1, 0, run.index + 1 not in run.plan)
        else:
            self.clock.stop()
