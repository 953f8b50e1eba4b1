"""Where DeepCache cuts a UNet of diffusers.

The down path leaves skip tensors: `conv_in`'s is 0, then one for every resnet and every downsampler, in the order they
run. Each resnet of the up path takes one, last first. A cut at skip s caches the input of the up resnet that takes it,
before the two are concatenated. Recomputed at a reuse step are the down path up to skip s and the up path from that
resnet; the model's own forward runs, and the modules in between return at once.

Branches are numbered as in the codes that people come from (METHOD 3.2):

    UNet2DModel             branch b: skip b + 1, b = -1 too     (the DDPM code; -1 is the one cut of the LDM code)
    UNet2DConditionModel    branch b: skip b                     (DeepCache for Stable Diffusion; 0 is its default)
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from iec.caches.cut import Site, Skipped, refuse_compiled
from iec.caches.residuals import Residuals

# The model classes, with the skip tensor of branch 0.
MODELS = {"UNet2DModel": 1, "UNet2DConditionModel": 0}
# Blocks that take and return (hidden states, skip tensors), and run resnet, attention, …, and their resamplers in order.
DOWN = (
    "DownBlock2D",
    "AttnDownBlock2D",
    "ResnetDownsampleBlock2D",
    "CrossAttnDownBlock2D",
    "SimpleCrossAttnDownBlock2D",
)
UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "CrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D")
# Attentions that answer with a tuple: they are called with return_dict=False, and the block takes its first entry.
TUPLES = ("Transformer2DModel",)


class _Layer(NamedTuple):
    """What leads to one skip tensor, or takes one: `parts` of `block`, which run in this order."""

    parts: tuple[nn.Module, ...]
    block: nn.Module | None


def locate(model: Any, branch: int | None) -> Site:
    """The source of the cached feature and the modules that a reuse step skips.

    Args:
        model: a UNet2DModel or UNet2DConditionModel of any depth, with any number of layers in a block.
        branch: as above. None is 0 for a UNet2DConditionModel; for a UNet2DModel it is the first resolution's number of
            resnets, so that this level is recomputed whole (the deepest branch, where there are fewer).

    Raises TypeError for another model, a compiled one, or other kinds of blocks; ValueError for a branch out of range.
    """
    first = _check(model)
    downs = [_Layer((model.conv_in,), None)]
    for block in model.down_blocks:
        downs += [_Layer(_parts(block, index), block) for index in range(len(block.resnets))]
        if block.downsamplers is not None:
            downs.append(_Layer(tuple(block.downsamplers), block))
    ups = []  # by the skip tensor they take
    for block in model.up_blocks:
        layers = [_parts(block, index) for index in range(len(block.resnets))]
        layers[-1] += tuple(block.upsamplers or ())
        ups += [_Layer(parts, block) for parts in layers]
    ups.reverse()
    if len(ups) != len(downs):
        raise TypeError(
            f"this {type(model).__name__} makes {len(downs)} skip tensors and takes {len(ups)}, so DeepCache does not know "
            "its blocks; leave the cache out for this pipeline"
        )
    # The deepest branch reuses the mid block alone; without one there is nothing to reuse.
    last = len(downs) - 1 - (model.mid_block is None)
    if branch is None:
        branch = 0 if first == 0 else min(len(model.down_blocks[0].resnets), last - first)
    skip = branch + first
    if not 0 <= skip <= last:
        raise ValueError(f"branch is {branch}; this {type(model).__name__} has branches {-first}..{last - first}")

    behind = [*downs[skip + 1 :]]
    if model.mid_block is not None:
        behind.append(_Layer((model.mid_block,), None))
    behind += reversed(ups[skip + 1 :])
    *skipped, source = _gathered(behind)
    block = ups[skip].block
    assert block is not None
    residuals = Residuals(model, skip, source.module is model.mid_block, block)
    return Site(source.module, source.skips is not None, tuple(skipped), branch, skip, ups[skip].parts[0], residuals)


def _gathered(layers: list[_Layer]) -> list[Skipped]:
    """The modules of these layers: a block where all of it is skipped, else its parts."""
    skipped: list[Skipped] = []
    for index, layer in enumerate(layers):
        if layer.block is None:
            skipped.append(Skipped(layer.parts[0], None))
            continue
        mine = [other for other in layers if other.block is layer.block]
        if len(mine) < _size(layer.block):
            skipped += [Skipped(part, -1 if type(part).__name__ in TUPLES else None) for part in layer.parts]
        elif layers[index - 1].block is not layer.block:
            skipped.append(Skipped(layer.block, len(mine) if type(layer.block).__name__ in DOWN else None))
    return skipped


def _size(block: Any) -> int:
    """The number of layers of a block, as `locate` counts them."""
    return len(block.resnets) + (getattr(block, "downsamplers", None) is not None)


def _parts(block: Any, index: int) -> tuple[nn.Module, ...]:
    """Resnet `index` of a block and the attention after it, if there is one."""
    attentions = getattr(block, "attentions", None)
    return (block.resnets[index], *([attentions[index]] if attentions is not None else []))


def _check(model: Any) -> int:
    """The skip tensor of branch 0, if the model can be cut."""
    refuse_compiled(model)
    first = next((MODELS[base.__name__] for base in type(model).__mro__ if base.__name__ in MODELS), None)
    if first is None:
        raise TypeError(
            f"branches are those of a {' or '.join(MODELS)}, not of a {type(model).__name__}; "
            "leave the cache out for this pipeline"
        )
    for blocks, known in ((model.down_blocks, DOWN), (model.up_blocks, UP)):
        for block in blocks:
            if type(block).__name__ not in known:
                raise TypeError(
                    f"DeepCache cannot skip {type(block).__name__}; it knows {', '.join(known)}; "
                    "leave the cache out for this pipeline"
                )
    return first
