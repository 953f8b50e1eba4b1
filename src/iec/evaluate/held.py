"""The pipeline that a worker holds ready: loaded once, and made once what an arm wants, for all shards of that arm in a row."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iec.artifact import fingerprint
from iec.artifact.calibration import Calibration
from iec.evaluate.arms import Arm, prepared
from iec.evaluate.machine import choose_device
from iec.evaluate.warmup import warm_up
from iec.pipeline.models import load


class Held:
    """At most one pipeline, at most one arm put on it."""

    def __init__(self) -> None:
        self._model: str | None = None  # what is loaded, as a fingerprint
        self._arm: str | None = None
        self._pipe: Any = None
        self._ready: Any = None
        self._on = contextlib.ExitStack()

    def pipeline(self, model: str, options: dict[str, Any], dtype: str, device: str) -> Any:
        """The pipeline of `model` as it was loaded, no arm on it. Raises as `iec.load`, and ValueError for a bad dtype."""
        import torch
        from diffusers.utils import logging

        wanted = fingerprint.plain([model, options, dtype, device])
        self._take_off()
        if wanted != self._model:
            self.release()
            kind = getattr(torch, dtype, None)
            if not isinstance(kind, torch.dtype):
                raise ValueError(f"dtype is {dtype!r}, expected float32, float16 or bfloat16")
            logging.disable_progress_bar()
            with warnings.catch_warnings():  # diffusers 0.42 would rather hear `dtype`, which 0.35 does not know
                warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
                pipe = load(model, torch_dtype=kind, **options).to(choose_device(device))
            pipe.set_progress_bar_config(disable=True)
            self._pipe, self._model = pipe, wanted
        return self._pipe

    def arm(
        self,
        model: str,
        options: dict[str, Any],
        dtype: str,
        device: str,
        arm: Arm,
        calibration: Path | None,
        kernel: str,
        seeds: Sequence[int],
        conditions: dict[str, Any],
    ) -> Any:
        """The pipeline with `arm` on it, warmed up by a batch of `seeds` and `conditions`. Raises as `prepared` does."""
        content = None if calibration is None else calibration_digest(calibration)
        wanted = fingerprint.plain([model, options, dtype, device, arm.plain(), content, kernel])
        if wanted != self._arm:
            pipe = self.pipeline(model, options, dtype, device)
            tables = None if calibration is None else Calibration.load(calibration)
            self._ready = self._on.enter_context(prepared(pipe, arm, tables, kernel))
            warm_up(self._ready, arm, seeds, **conditions)
            self._arm = wanted
        return self._ready

    @property
    def ready(self) -> Any:
        """The pipeline with the arm that was last asked for; None before."""
        return self._ready

    def release(self) -> None:
        """Let go of everything."""
        self._take_off()
        self._model = self._pipe = None

    def _take_off(self) -> None:
        self._arm = self._ready = None
        self._on.close()


HELD = Held()  # of this process
atexit.register(HELD.release)  # while there is an interpreter to do it


def calibration_digest(folder: Path) -> str:
    """sha256 of a calibration: of its page, which holds the digests of all that belongs to it. ValueError if there is none."""
    try:
        return hashlib.sha256((folder / "calibration.json").read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"{folder} holds no calibration: {error}") from error
