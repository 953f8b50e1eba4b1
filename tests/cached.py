"""A UNet to cache, a cache on it with a clock moved by hand, and what a cache could leave behind."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import iec
import tiny


def unet(layers: int = 2, levels: int = 3, **other: Any) -> Any:
    """A UNet with attention on all but the first level."""
    down = ("DownBlock2D", *("AttnDownBlock2D",) * (levels - 1))
    up = (*("AttnUpBlock2D",) * (levels - 1), "UpBlock2D")
    config = {"down_block_types": down, "up_block_types": up, "block_out_channels": (8, 16, 24)[:levels], **other}
    with torch.random.fork_rng():
        torch.manual_seed(levels)
        model = diffusers.UNet2DModel(
            sample_size=8, layers_per_block=layers, norm_num_groups=4, attention_head_dim=8, **config
        )
        return tiny._lively(model)


def forwards(model: nn.Module) -> dict[str, Any]:
    """What of a model a cache could leave behind."""
    return {
        name: (vars(part).get("forward"), len(part._forward_hooks), len(part._forward_pre_hooks), sorted(vars(part)))
        for name, part in model.named_modules()
    }


def executed(model: nn.Module, forward: Any) -> set[str]:
    """The leaf modules that a call of `forward` runs."""
    ran, hooks = set(), []
    for name, part in model.named_modules():
        if not list(part.children()):
            hooks.append(part.register_forward_hook(lambda *_, name=name: ran.add(name)))
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def flops(model: nn.Module, forward: Any) -> dict[str, int]:
    """The floating-point operations of a call of `forward`, by module name; those of the whole model under its class name."""
    with FlopCounterMode(display=False) as counter:
        forward()
    prefix = f"{type(model).__name__}."
    return {name.removeprefix(prefix): sum(ops.values()) for name, ops in counter.get_flop_counts().items()}


class AtStep:
    """A cache on a bare model with a clock moved by hand."""

    def __init__(
        self, model: Any, config: iec.DeepCache, steps: int = 10, begin: int = 0, call: Any = None, **other: Any
    ) -> None:
        """`call(x, t)` evaluates the model, if it is not called so itself; `other` is for `FeatureCache`."""
        self.model, self.clock, self.begin = model, iec.StepClock(), begin
        self.call = call if call is not None else lambda x, t: model(x, t).sample
        self.run: Any = self
        self.cache = config.build(model, self.clock, lambda: self.run)
        vars(self.cache).update(other)
        self.clock.start(steps)

    def __call__(self, step: int, x: Tensor, t: int = 400, visit: int = 0) -> Tensor:
        self.clock.move(step, visit, True)
        with torch.no_grad():
            return self.call(x, t)

    def __enter__(self) -> AtStep:
        self.cache.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.cache.remove()

    @property
    def feature(self) -> Tensor:
        return self.cache.features[0].feature
