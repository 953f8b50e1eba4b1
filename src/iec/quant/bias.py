"""Bias correction: what rounding does to a layer's mean output, taken off its bias.

It matters most in the last layer. There the rounding of a few weights shifts the mean of ε, by the same amount at every pixel and
step; at the first step of a run x_0 = (x_t − √(1−ᾱ) ε)/√ᾱ multiplies it by 1/√ᾱ, which is 157 at t = 999 of linear betas. Errors
without a mean average out over the steps, this one does not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from iec.quant.sites import Site


class MeanInput:
    """Mean input of a layer per channel, before and after rounding, over samples, pixels and steps alike."""

    def __init__(self, channels: int) -> None:
        self.sums = torch.zeros(2, channels, dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)

    def add(self, plain: Tensor, rounded: Tensor, axis: int) -> None:
        """Take a batch into account; `axis` is that of the channels."""
        for total, x in zip(self.sums, (plain, rounded), strict=True):
            flat = x.detach().movedim(axis, -1).reshape(-1, len(total))
            total += flat.double().mean(0).cpu()
        self.count += 1


def corrected_bias(site: Site, rounded_weight: Tensor, mean: MeanInput) -> Tensor:
    """The bias, float32 (out,), with which the layer with the rounded weight has the mean output of the float layer.

    A convolution's means are taken as if its input went on beyond the border.
    """
    module = site.module
    plain, rounded = (mean.sums / mean.count).float()
    weight = module.weight.detach().float().cpu()
    bias = module.bias.detach().float().cpu() if module.bias is not None else torch.zeros(weight.shape[0])
    return bias + _mean_output(site, weight, plain) - _mean_output(site, rounded_weight, rounded)


def _mean_output(site: Site, weight: Tensor, mean: Tensor) -> Tensor:
    if site.kind == "linear":
        return weight @ mean
    summed = weight.flatten(2).sum(2)[:, :, None]  # (out, in/groups, 1)
    return F.conv1d(mean[None, :, None], summed, groups=site.module.groups)[0, :, 0]
