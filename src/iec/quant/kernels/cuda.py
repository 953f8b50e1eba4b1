"""Integer kernels on CUDA devices."""

from __future__ import annotations

import torch
from torch import nn

from iec.artifact.calibration import QuantizedLayer


class Cuda:
    """The kernel named "cuda"."""

    name = "cuda"

    def why_not(self, device: torch.device) -> str | None:
        """None on a CUDA device."""
        return "it is not written yet"

    def build(self, module: nn.Module, layer: QuantizedLayer):
        """Pack the weight once."""
        raise NotImplementedError
