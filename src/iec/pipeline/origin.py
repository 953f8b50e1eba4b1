"""What identifies a pipeline to a calibration: its weights, architecture, scheduler and timesteps."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

from iec.artifact import fingerprint
from iec.artifact.calibration import Origin
from iec.pipeline.adapters import denoisers
from iec.pipeline.installation import installed


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
        weights={name: fingerprint.weights(model) for name, model in models.items()},
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
