"""What ControlNets and T2I-adapters add to a UNet's own tensors, on a pass where some of those are placeholders.

A ControlNet adds a tensor to every skip tensor and to the mid block's output; a T2I-adapter one to each down block's, and in
SDXL one to the mid block's. On a reuse pass what belongs to a skipped module is left out; the rest is added as ever, so a
condition that changes from step to step acts at once on what is recomputed.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from iec.caches.cut import Call, Pass

SKIPS, MID, BLOCKS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)
FREEU = ("s1", "s2", "b1", "b2")


class Residuals:
    """For a cut of `model` at skip tensor `skip`; `mid`: whether the mid block is what the feature comes from.

    `block` is the up block that takes the feature.
    """

    def __init__(self, model: Any, skip: int, mid: bool, block: nn.Module) -> None:
        self.skip, self.mid, self.block = skip, mid, block
        self.names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.runs: list[bool] = []  # by down block: whether what an adapter adds to comes before the cut
        last = 0
        for down in model.down_blocks:
            resampled = last + len(down.resnets) + (down.downsamplers is not None)
            inside = getattr(down, "has_cross_attention", False)  # added after the last resnet, before the downsampler
            self.runs.append((last + len(down.resnets) if inside else resampled) <= skip)
            last = resampled

    def __call__(self, now: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The arguments of the pass under way, with placeholders for what is skipped; None where nothing changes.

        Sets `now.guarded` where the UNet will write over the feature: FreeU scales it in place, and an SDXL adapter adds to
        the mid block's output in place.
        """
        given = {name: value for name, value in (*zip(self.names, args, strict=False), *kwargs.items())}
        skips, mid, blocks = (given.get(name) for name in (SKIPS, MID, BLOCKS))
        legacy = blocks is None and mid is None and skips is not None  # an adapter, under the older name
        freeu = any(getattr(self.block, name, None) for name in FREEU)
        now.guarded = freeu or (self.mid and (blocks is not None or legacy))
        if now.placeholder is None:
            return None
        if freeu:  # takes the Fourier transform of every skip tensor, which one without channels has not
            count, _, *space = now.placeholder.shape
            now.placeholder = now.placeholder.new_zeros((count, 1, *space))
        changed: dict[str, Any] = {}
        if legacy:
            changed[SKIPS] = self._blocks(skips, now.placeholder)
        elif skips is not None:
            changed[SKIPS] = tuple(
                tensor if index <= self.skip else now.placeholder for index, tensor in enumerate(skips)
            )
        if blocks is not None:
            changed[BLOCKS] = self._blocks(blocks, now.placeholder)
        if mid is not None and not self.mid:
            changed[MID] = now.placeholder
        if not changed:
            return None
        placed = dict(zip(self.names, args, strict=False))
        return (
            tuple(changed.pop(name, value) for name, value in placed.items()),
            {**kwargs, **changed},
        )

    def _blocks(self, tensors: list[Tensor], placeholder: Tensor) -> list[Tensor]:
        """One for each down block; the one that may follow is for the mid block."""
        runs = [*self.runs, self.mid]
        return [tensor if runs[min(index, len(runs) - 1)] else placeholder for index, tensor in enumerate(tensors)]
