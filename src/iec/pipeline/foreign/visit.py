"""What a cache of another library is to IEC, and what it is told of an evaluation."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch import Tensor


class Visit(NamedTuple):
    """An evaluation of the denoiser: at `step` of a run from step `begin` on, over the logical `timesteps` (T,)."""

    step: int
    begin: int
    timesteps: Tensor
    correction: bool


class ForeignCache(Protocol):
    """A cache of another library on one denoiser.

    `name` is for people. `outermost` says whether it wraps the denoiser's own forward, so that IEC's gate must stand before
    it. `decides` completes the sentence "it …" with how it chooses between a whole pass and reuse.
    """

    name: str
    outermost: bool
    decides: str

    def around(self, visit: Visit) -> AbstractContextManager[None]:
        """Stand around an evaluation: a correction goes past the cache, an ordinary visit finds it as without IEC."""
        ...

    def refresh(self, num_steps: int, begin: int) -> tuple[int, ...] | None:
        """The steps, from `begin` on, at which it runs the whole model; None when nobody knows before the run."""
        ...
