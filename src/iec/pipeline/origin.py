"""What identifies a pipeline to a calibration: its weights, architecture, scheduler and timesteps."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from typing import Any

from iec.artifact import fingerprint
from iec.artifact.calibration import Origin
from iec.pipeline.adapters import denoisers
from iec.pipeline.installation import Installation, installed


def origin(
    pipe: Any,
    timesteps: Sequence[float] = (),
    num_samples: int = 0,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
) -> Origin:
    """The origin of a calibration made on `pipe` as it is now, sampled at `timesteps`.

    Raises TypeError for what is no pipeline, TypeError or ValueError when its weights cannot be read.
    """
    models = denoisers(pipe)
    held = installed(pipe)
    scheduler = pipe.scheduler if held is None else held.state.inner
    return Origin(
        pipeline=type(pipe).__name__,
        denoisers={name: type(model).__name__ for name, model in models.items()},
        weights=(held and held.weights) or {name: fingerprint.weights(model) for name, model in models.items()},
        architecture={name: fingerprint.config(dict(model.config)) for name, model in models.items()},
        scheduler=type(scheduler).__name__,
        scheduler_config=fingerprint.config(dict(scheduler.config)),
        num_steps=len(timesteps),
        timesteps=tuple(timesteps),
        num_samples=num_samples,
        seed=seed,
        versions={
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "diffusers")},
        },
        settings=settings or {},
    )


def check_origin(pipe: Any, made: Origin) -> None:
    """Raise ValueError, naming what differs, unless a calibration made on `made` fits `pipe`; TypeError for what is no pipeline.

    The number of steps is that of a run: `steps_check` looks at it.
    """
    differing = made.mismatch(dataclasses.replace(origin(pipe), num_steps=made.num_steps, timesteps=made.timesteps))
    if differing:
        raise ValueError("this calibration was made on another pipeline: " + "; ".join(differing))


def steps_check(held: Installation, expected: tuple[float, ...], what: str) -> Callable[..., None]:
    """A hook before the denoiser's forward that raises ValueError, once a run, where its timesteps are not the `expected`.

    `what` is done to the pipeline ("quantized", "cached").
    """
    seen: list[object] = [None]

    def check(*_: Any) -> None:
        run = held.state.run
        if run is None or run is seen[0]:
            return
        if tuple(run.values) != expected:
            found = f"{len(run.values)} steps"
            if len(run.values) == len(expected):
                found += f" whose timesteps differ ({run.values[0]:g} … {run.values[-1]:g})"
            raise ValueError(
                f"this pipeline is {what} for {len(expected)} steps ({expected[0]:g} … {expected[-1]:g}), and this run has "
                f"{found}; call it with num_inference_steps={len(expected)}, or calibrate for this schedule"
            )
        seen[0] = run

    return check
