"""Pipelines whose denoisers are formulas, so that what an analysis finds is known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from iec.pipeline.unconditional import UnconditionalPipeline


class Formula(ModelMixin, ConfigMixin):
    """ε(x, t) = `epsilon(x, t)` as a denoiser of samples (B, 2, size, size)."""

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 2) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # gives the model a dtype and a device
        self.epsilon: Callable[[Tensor, Tensor], Tensor] = lambda x, t: x

    def forward(self, sample: Tensor, timestep: Any, return_dict: bool = True) -> Any:
        output = self.epsilon(sample, torch.as_tensor(timestep))
        return UNet2DOutput(sample=output) if return_dict else (output,)


def pipeline(epsilon: Callable[[Tensor, Tensor], Tensor], size: int = 8, **scheduler: Any) -> UnconditionalPipeline:
    """A pipeline with the denoiser `epsilon`, sampled by DDIM, in float64."""
    model = Formula(sample_size=size).eval().double()
    model.epsilon = epsilon
    config = {"clip_sample": False, "timestep_spacing": "trailing", **scheduler}
    pipe = UnconditionalPipeline(model, DDIMScheduler(**config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def coefficients(pipe: UnconditionalPipeline, num_steps: int) -> list[tuple[float, float]]:
    """A and B of every step of DDIM, from its formula (METHOD): A = √(n/a), B = √(1−n) − √(n(1−a)/a)."""
    pipe.scheduler.set_timesteps(num_steps)
    products = pipe.scheduler.alphas_cumprod.double()
    found = []
    for t in pipe.scheduler.timesteps.tolist():
        following = t - 1000 // num_steps
        a = products[t].item()
        n = products[following].item() if following >= 0 else 1.0
        found.append(((n / a) ** 0.5, (1 - n) ** 0.5 - (n * (1 - a) / a) ** 0.5))
    return found


def chaotic(x: Tensor) -> Tensor:
    """Noise of unit variance that depends on x, and of which nothing is left at an x that is a little off."""
    return 2**0.5 * torch.sin(1e9 * x + 0.3)
