"""Where DeepCache cuts a UNet of diffusers.

With n resnets in an up block (layers_per_block + 1) and levels counted from the full resolution, the down path leaves n
skip tensors per level: `conv_in`'s is 0, level l's are l·n + 1 … l·n + n, the last of them its downsampler's. Branch
b = l·n + q caches the input of the up resnet that takes skip b + 1, before the two are concatenated (METHOD 3.2):

    q < n − 1:  resnet n − 2 − q of up level l     recomputed below: down level l up to its resnet q
    q = n − 1:  resnet n − 1 of up level l + 1     recomputed below: the whole of down level l

At a reuse step the model's own forward runs; the modules of the cached part return at once.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from iec.caches.feature import Site

MODELS = ("UNet2DModel",)
# Blocks that take and return (hidden states, skip tensors) alone, and run their parts in the order below.
DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")


def locate(model: Any, branch: int | None) -> Site:
    """The source of the cached feature and the modules that a reuse step skips.

    Args:
        model: a UNet2DModel of any depth.
        branch: as above; None is n − 1 (the deepest branch, where there are fewer).

    Raises TypeError for another model, a compiled one, or other kinds of blocks; ValueError for a branch out of range.
    """
    _check(model)
    downs, ups = list(model.down_blocks), list(model.up_blocks)[::-1]  # both by level now
    levels, n = len(ups), len(ups[0].resnets)
    # The deepest branch reuses the mid block alone; without one there is nothing to reuse.
    count = levels * n - (1 if model.mid_block is not None else 2)
    if branch is None:
        branch = min(n - 1, count - 1)
    if not 0 <= branch < count:
        raise ValueError(f"branch is {branch}; this {type(model).__name__} has branches 0..{count - 1}")
    level, q = divmod(branch, n)
    up_level, resnet = (level, n - 2 - q) if q < n - 1 else (level + 1, n - 1)

    skipped: list[tuple[nn.Module, int | None]] = []
    if q < n - 1:
        skipped += [(part, None) for index in range(q + 1, n - 1) for part in _layer(downs[level], index)]
        skipped += [(part, None) for part in downs[level].downsamplers or ()]
    for block in downs[level + 1 :]:
        skipped.append((block, len(block.resnets) + (block.downsamplers is not None)))
    if model.mid_block is not None:
        skipped.append((model.mid_block, None))
    skipped += [(block, None) for block in reversed(ups[up_level + 1 :])]
    skipped += [(part, None) for index in range(resnet) for part in _layer(ups[up_level], index)]
    source, _ = skipped.pop()  # what runs last before the cache point: its output is the cached feature
    return Site(source, tuple(skipped), branch)


def _layer(block: Any, index: int) -> list[nn.Module]:
    """Resnet `index` of a block and the attention after it, if there is one."""
    attentions = getattr(block, "attentions", None)
    return [block.resnets[index], *([attentions[index]] if attentions is not None else [])]


def _check(model: Any) -> None:
    name = type(model).__name__
    if any(getattr(part, "_compiled_call_impl", None) is not None for part in getattr(model, "modules", list)()):
        raise TypeError(
            f"this {name} was compiled in place, so its blocks cannot be skipped; load it anew and cache it uncompiled"
        )
    if name == "OptimizedModule":
        raise TypeError(
            "the model was compiled, so its blocks cannot be skipped; assign the original (._orig_mod) and cache that"
        )
    if not any(base.__name__ in MODELS for base in type(model).__mro__):
        raise TypeError(
            f"DeepCache knows the blocks of {', '.join(MODELS)}, not of {name}; leave the cache out for this pipeline"
        )
    for blocks, known in ((model.down_blocks, DOWN), (model.up_blocks, UP)):
        for block in blocks:
            if type(block).__name__ not in known:
                raise TypeError(
                    f"DeepCache cannot skip {type(block).__name__}; it knows {', '.join(known)}; "
                    "leave the cache out for this pipeline"
                )
    sizes = {len(block.resnets) for block in model.up_blocks} | {len(block.resnets) + 1 for block in model.down_blocks}
    if len(sizes) != 1:
        raise TypeError(f"DeepCache needs the same number of layers in every block, found {sorted(sizes)} up resnets")
