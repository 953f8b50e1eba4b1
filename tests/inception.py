"""Weights of Inception-2015 for tests: random-looking, but the same everywhere, and small activations throughout."""

from __future__ import annotations

import math

import torch


def wave(name: str, shape: torch.Size) -> torch.Tensor:
    """Numbers in -1..1 that depend on the name of a weight and the place in it alone."""
    places = torch.arange(math.prod(shape), dtype=torch.float64)
    phase = sum(name.encode()) % 97
    return torch.sin(places * 12.9898 + phase).mul(43758.5453).frac().reshape(shape)


def fill(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same names and shapes with such numbers, float32."""
    made = {}
    for name, value in weights.items():
        numbers = wave(name, value.shape)
        if name.endswith("running_var") or name.endswith("bn.weight"):
            numbers = 1 + numbers / 4
        elif name.endswith("conv.weight") or name == "fc.weight":
            numbers = numbers * math.sqrt(6 / value[0].numel())
        else:
            numbers = numbers / 10
        made[name] = numbers.float() if value.is_floating_point() else torch.tensor(0)
    return made


def pictures() -> torch.Tensor:
    """Two RGB images of 20 x 13 pixels, uint8."""
    return ((wave("pictures", torch.Size((2, 3, 20, 13))) + 1) * 127.5).to(torch.uint8)
