"""IECScheduler: any diffusers scheduler, with the corrected timesteps repeated.

The inner scheduler keeps its own, logical list of timesteps and never sees a repeat; only this proxy shows the expanded
list. A pipeline that loops over it evaluates its denoiser once more for every repeat, with its own guidance, ControlNet,
adapters, progress bar and callbacks, exactly as it does for second-order schedulers such as Heun's.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from iec.plan import CorrectionPlan, Probe, resolve_relaxation, spell
from iec.schedule.state import IECState
from iec.schedule.support import check_scheduler


class IECScheduler:
    """Wrap the diffusers scheduler `inner`; assign it to `pipe.scheduler`, or let `iec.enable(pipe)` do it.

    Args:
        inner: a diffusers scheduler.
        steps: which steps are corrected (see `iec.plan.resolve`); None is `refresh` beside a cache, else `ends:1/10`.
        relax: the relaxation factors (λ₁ … λ_K), or the name of a preset: paper, released-ddpm, released-ldm.
        tol: relative residual below which a sample is frozen for the rest of its step; None: never.
        probe: where a correction evaluates the model: "estimate" is IEC; "next" and "start[:ρ]" are controls (see
            `iec.plan.probe`).

    It presents itself as an instance of the inner scheduler's class, forwards whatever it does not define, and saves as
    the inner scheduler (a saved pipeline is portable and carries no IEC). `steps="none"` and `relax=(0.0,)` give the
    plain scheduler's results bit for bit. Image-to-image and inpainting pipelines cut the list of timesteps, so they need
    `iec.enable(pipe)`. One run at a time: a step from another thread than the one that called `set_timesteps` is refused.

    Raises TypeError for a scheduler that cannot be corrected, ValueError for bad `steps`, `relax`, `tol` or `probe`.
    """

    def __init__(
        self,
        inner: Any,
        steps: str | Iterable[int] | CorrectionPlan | None = None,
        relax: Sequence[float] | float | str = (0.5,),
        tol: float | None = None,
        probe: str | Probe = "estimate",
    ) -> None:
        if isinstance(inner, IECScheduler):
            raise TypeError(
                "this scheduler carries IEC already; wrap its inner one: IECScheduler(scheduler.iec.inner, ...)"
            )
        check_scheduler(inner)
        if steps is not None and not isinstance(steps, CorrectionPlan):
            steps = spell(steps)
        vars(self)["iec"] = IECState(inner, steps, resolve_relaxation(relax, tol, probe))
        # diffusers derives the library of a component from this.
        vars(self)["__module__"] = type(inner).__module__

    # --- the face of the inner scheduler -------------------------------------------------------------------------

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self.iec.inner)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "iec" not in vars(self):
            raise AttributeError(name)
        return getattr(self.iec.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.iec.inner, name, value)
        if name == "timesteps":
            self.iec.begin_run()

    def __delattr__(self, name: str) -> None:
        delattr(self.iec.inner, name)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self.iec.inner)})

    def __len__(self) -> int:
        return len(self.iec.inner)

    def __repr__(self) -> str:
        state = self.iec
        options = f"steps={state.steps!r}, relax={state.relaxation.factors}, tol={state.relaxation.tol}"
        if state.relaxation.probe.kind != "estimate":
            options += f", probe={str(state.relaxation.probe)!r}"
        return f"IECScheduler({type(state.inner).__name__}, {options})"

    def __deepcopy__(self, memo: dict[int, Any]) -> IECScheduler:
        return self._with(copy.deepcopy(self.iec.inner, memo))

    def __copy__(self) -> IECScheduler:
        return self._with(copy.copy(self.iec.inner))

    def _with(self, inner: Any) -> IECScheduler:
        state = self.iec
        other = IECScheduler(inner, state.steps, *state.relaxation)
        other.iec.scale = state.scale
        other.iec.join(state)
        return other

    def __reduce__(self) -> Any:
        state = self.iec
        return IECScheduler, (state.inner, state.steps, *state.relaxation)

    # --- what the pipeline's loop reads and calls -----------------------------------------------------------------

    @property
    def timesteps(self) -> Tensor:
        """The inner timesteps, each corrected one 1 + K times; the repeats of the probe "next" are the timestep after it."""
        return self.iec.shown(self.iec.inner.timesteps)

    @property
    def sigmas(self) -> Any:
        """The inner sigmas, repeated like the timesteps (pipelines read them by the index of their loop)."""
        return self.iec.shown(self.iec.inner.sigmas)

    @property
    def set_timesteps(self) -> Callable[..., None]:
        """The inner `set_timesteps`, with its signature; resolves the plan and begins a run."""
        state = self.iec

        @functools.wraps(state.inner.set_timesteps)
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            state.end_run()
            state.inner.set_timesteps(*args, **kwargs)
            state.begin_run()

        return set_timesteps

    @property
    def set_begin_index(self) -> Callable[..., None]:
        """The inner `set_begin_index`; refuses an index into the expanded list."""
        state, inner = self.iec, self.iec.inner.set_begin_index

        @functools.wraps(inner)
        def set_begin_index(begin_index: int = 0) -> None:
            if begin_index and not state.logical and state.plan is not None and len(state.plan):
                raise RuntimeError(
                    "this pipeline begins in the middle of the timesteps, which only iec.enable(pipe) can follow; "
                    "put the plain scheduler back and call iec.enable(pipe) instead of wrapping the scheduler by hand"
                )
            inner(begin_index)

        return set_begin_index

    @property
    def scale_model_input(self) -> Callable[..., Tensor]:
        """The inner `scale_model_input`. While a step is corrected it returns a copy, never the sample itself."""
        state, inner = self.iec, self.iec.inner.scale_model_input

        @functools.wraps(inner)
        def scale_model_input(sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            slot = state.run.slot if state.run is not None else None
            away = slot is not None and slot.away
            scaled = slot.scaled(inner, sample, *args, **kwargs) if away else inner(sample, *args, **kwargs)
            if state.plan is not None and len(state.plan):
                if scaled is sample:  # a runtime with bound buffers may write its output over its input
                    scaled = sample.clone()
                state.scaled = (scaled, sample)
            return scaled

        return scale_model_input

    @property
    def add_noise(self) -> Callable[..., Tensor]:
        """The inner `add_noise`; between the visits of a step its timestep means the next step's."""
        return self._noising(self.iec.inner.add_noise, "original_samples", "timesteps")

    @property
    def scale_noise(self) -> Callable[..., Tensor]:
        """The inner `scale_noise` of flow matching; between the visits of a step its timestep means the next step's."""
        return self._noising(self.iec.inner.scale_noise, "sample", "timestep")

    @property
    def step(self) -> Callable[..., Any]:
        """The inner `step`, with its signature: the ordinary step at a first visit, a correction at a repeated one."""
        state = self.iec

        @functools.wraps(state.inner.step)
        def step(*args: Any, **kwargs: Any) -> Any:
            return state.step(args, kwargs)

        return step

    def _noising(self, inner: Callable[..., Tensor], samples: str, timesteps: str) -> Callable[..., Tensor]:
        state = self.iec

        @functools.wraps(inner)
        def noising(*args: Any, **kwargs: Any) -> Tensor:
            run = state.run
            if run is None or run.slot is None:
                return inner(*args, **kwargs)
            # Inpainting re-noises the known part to the level of the *next* entry of the list. Within a corrected step
            # that entry is a repeat, while the sample has already moved on.
            bound = inspect.signature(inner).bind(*args, **kwargs)
            asked = torch.as_tensor(bound.arguments[timesteps]).reshape(-1)
            if not bool((asked.cpu().double() == float(run.timestep)).all()):
                return inner(*args, **kwargs)
            if run.index + 1 == len(run.timesteps):
                return bound.arguments[samples]
            following = run.timesteps[run.index + 1].to(asked.device)
            bound.arguments[timesteps] = following.expand(len(asked)) if len(asked) else following
            return inner(*bound.args, **bound.kwargs)

        return noising
