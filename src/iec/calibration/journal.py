"""What a calibration has learnt so far, by stage, in one file: a killed one goes on where it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from iec.artifact import checkpoint

State = tuple[dict[str, Tensor], Any]  # tensors, and plain data


class Stage(Protocol):
    """A part of a calibration that can be interrupted; `state` is all that it has learnt, for `load_state` to go on from."""

    what: str

    def state(self) -> State: ...

    def load_state(self, tensors: dict[str, Tensor], plain: Any) -> None: ...


class Journal:
    """The states of all stages in one checkpoint.

    Args:
        path: the file; None: nothing is kept.
        fingerprint: of the calibration; a file of another one is refused with a ValueError, as `checkpoint.load` tells.
    """

    def __init__(self, path: str | os.PathLike[str] | None, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self._states: dict[str, tuple[int, State]] = {}
        if path is not None and Path(path).is_file():
            tensors, meta = checkpoint.load(path, fingerprint=fingerprint)
            for what, (done, plain) in meta["stages"].items():
                self._states[what] = (done, (within(f"{what}/", tensors), plain))

    def restore(self, stage: Stage) -> int:
        """Give a stage what it had learnt; returns how many of its pieces were done."""
        if stage.what not in self._states:
            return 0
        done, state = self._states[stage.what]
        stage.load_state(*state)
        return done

    def keep(self, stage: Stage, done: int) -> None:
        """Write down that `done` pieces of a stage are done; the stages before it stay as they were kept."""
        if self.path is None:
            return
        tensors, plain = stage.state()
        self._states[stage.what] = (done, (tensors, plain))
        checkpoint.save(
            self.path,
            {f"{what}/{key}": value for what, (_, (held, _)) in self._states.items() for key, value in held.items()},
            {
                "fingerprint": self.fingerprint,
                "stages": {what: [done, plain] for what, (done, (_, plain)) in self._states.items()},
            },
        )


def within(prefix: str, named: dict[str, Any]) -> dict[str, Any]:
    """The entries whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
