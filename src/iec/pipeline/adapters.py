"""What IEC needs to know of a pipeline: its denoisers, and how it cuts the list of timesteps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from iec.schedule.state import IECState
from iec.schedule.support import check_pipeline_class

DENOISERS = ("unet", "transformer", "transformer_2", "prior")


def denoisers(pipe: Any) -> dict[str, Any]:
    """The denoisers of `pipe` by component name.

    Raises TypeError, with what to do, when `pipe` is no pipeline, or one whose loop or model IEC cannot follow.
    """
    name = type(pipe).__name__
    if isinstance(pipe, type):
        raise TypeError(
            f"expected a pipeline object, found the class {pipe.__name__}; make one with .from_pretrained(...)"
        )
    if getattr(pipe, "scheduler", None) is None:
        raise TypeError(
            f"{name} has no scheduler, so it is no diffusers pipeline that IEC understands; in a loop of your own use iec.correct"
        )
    check_pipeline_class(name)
    found = {key: getattr(pipe, key) for key in DENOISERS if getattr(pipe, key, None) is not None}
    if not found:
        raise TypeError(
            f"{name} has no component named {', '.join(DENOISERS)}; wrap its scheduler by hand: "
            "pipe.scheduler = iec.IECScheduler(pipe.scheduler)"
        )
    for key, model in found.items():
        if getattr(getattr(model, "config", None), "use_meanflow", False):
            raise TypeError(
                f"{name} cannot be corrected: its {key} is a mean-flow model, which also takes the next timestep of the list"
            )
    return found


def follow_timesteps(get_timesteps: Callable[..., Any], state: IECState) -> Callable[..., Any]:
    """Wrap the `get_timesteps` of an image-to-image pipeline: it cuts the inner list, and the rest is shown expanded."""

    @functools.wraps(get_timesteps)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        logical = state.inner.timesteps
        shown = len(state.shown(logical))
        # Pipelines that pass their own sigmas take the length of the (expanded) list for the number of steps.
        args = tuple(len(logical) if isinstance(a, int) and a == shown else a for a in args)
        if kwargs.get("num_inference_steps") == shown:
            kwargs["num_inference_steps"] = len(logical)
        state.logical = True
        try:
            timesteps, *rest = get_timesteps(*args, **kwargs)
        finally:
            state.logical = False
        begin = len(logical) - len(timesteps)
        if begin < 0 or not torch.equal(logical[begin:].to(timesteps), timesteps):
            raise RuntimeError(
                "this pipeline's get_timesteps returns no tail of its scheduler's timesteps, which IEC cannot follow; "
                "call iec.disable(pipe)"
            )
        state.begin_run(begin)
        return (state.shown(logical)[begin:], *rest)

    return wrapped
