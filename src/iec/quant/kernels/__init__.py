"""One quantized layer, several kernels: each gives the same numbers, within the rounding that it states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from iec.artifact.calibration import QuantizedLayer
from iec.quant.kernels.cuda import Cuda
from iec.quant.kernels.onednn import Onednn
from iec.quant.kernels.reference import Reference

__all__ = ["KERNELS", "Kernel", "choose"]


class Kernel(Protocol):
    """A way to compute quantized layers."""

    name: str

    def why_not(self, device: torch.device) -> str | None:
        """None where the kernel runs on `device`; else the reason."""
        ...

    def build(self, module: nn.Module, layer: QuantizedLayer) -> Callable[[Tensor, int], Tensor]:
        """Return `op(x, step)`, which stands in for `module.forward(x)`.

        op takes x as the module does (any floating dtype and memory format) and the step's index into the tables of
        `layer`; it returns the module's output in x's dtype, bias included. Raises TypeError or ValueError where `layer`
        does not fit `module`. The module itself is not changed and not needed afterwards.
        """
        ...


KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (Reference(), Onednn(), Cuda())}


def choose(name: str, device: torch.device | str) -> Kernel:
    """Return the kernel of that name, or with "auto" the fastest that runs on `device`.

    "auto" is "cuda" on a CUDA device and "onednn" on the CPU, each where it runs, else "reference". Raises ValueError
    for an unknown name; RuntimeError for a named kernel that cannot run here, saying why and which one can.
    """
    device = torch.device(device)
    fast = {"cuda": "cuda", "cpu": "onednn"}.get(device.type, "reference")
    best = KERNELS[fast] if KERNELS[fast].why_not(device) is None else KERNELS["reference"]
    if name == "auto":
        return best
    if name not in KERNELS:
        raise ValueError(f"kernel is {name!r}; expected 'auto' or one of {', '.join(map(repr, KERNELS))}")
    reason = KERNELS[name].why_not(device)
    if reason is not None:
        raise RuntimeError(f"kernel {name!r} cannot run here: {reason}; use kernel={best.name!r} or 'auto'")
    return KERNELS[name]
