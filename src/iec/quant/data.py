"""What reconstruction works on: calibration tuples, and under a cache also how a reuse pass of the model is made."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Data(Protocol):
    """Calibration tuples: what the denoiser was called with, row by row.

    Attributes:
        steps: int64 (N,), the step of each tuple.
        reused: bool (N,), whether a run reuses a cached feature at that step; False everywhere without a cache.
    """

    steps: Tensor
    reused: Tensor

    def batch(self, places: Tensor, device: torch.device) -> dict[str, Any]:
        """The keyword arguments of a call of the denoiser with the tuples at `places`, in float32."""
        ...

    def feature(self, places: Tensor, device: torch.device) -> Tensor:
        """The feature (B, C, H, W) that a run reuses at the tuples at `places`, all `reused`, in float32."""
        ...


class Shallow(Protocol):
    """How a model is evaluated at reuse steps.

    Attributes:
        skipped: names of the modules that are not computed then; their calls are answered without running what is in them.
    """

    skipped: tuple[str, ...]

    def evaluate(self, arguments: dict[str, Any], feature: Tensor) -> Any:
        """Call the model with these arguments, reusing `feature`."""
        ...
