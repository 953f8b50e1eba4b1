"""Where DeepCache cuts a transformer of diffusers: block caching, for models without skip connections.

A transformer adds to its hidden states block by block. What a middle range of blocks adds altogether changes slowly from
step to step, so a whole pass keeps this sum, output of the range minus input, and a reuse pass adds it to the range's input
of its own instead of running the blocks. Where blocks carry the text's hidden states along, these have a sum too.

What the model adds between the blocks of the range (a ControlNet's residuals) is part of the sum of the whole pass.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iec.caches.cut import Call, Pass, refuse_compiled
from iec.patch import Around

IMAGE, TEXT = "hidden_states", "encoder_hidden_states"
# By model class: its lists of blocks in the order they run, and what their blocks return. Where later blocks return less, the
# model joins text and image for them.
MODELS: dict[str, dict[str, tuple[str, ...]]] = {
    "DiTTransformer2DModel": {"transformer_blocks": (IMAGE,)},
    "PixArtTransformer2DModel": {"transformer_blocks": (IMAGE,)},
    "SanaTransformer2DModel": {"transformer_blocks": (IMAGE,)},
    "WanTransformer3DModel": {"blocks": (IMAGE,)},
    "LTXVideoTransformer3DModel": {"transformer_blocks": (IMAGE,)},
    "SD3Transformer2DModel": {"transformer_blocks": (TEXT, IMAGE)},
    "QwenImageTransformer2DModel": {"transformer_blocks": (TEXT, IMAGE)},
    "FluxTransformer2DModel": {"transformer_blocks": (TEXT, IMAGE), "single_transformer_blocks": (TEXT, IMAGE)},
    "ChromaTransformer2DModel": {"transformer_blocks": (TEXT, IMAGE), "single_transformer_blocks": (IMAGE,)},
    "AuraFlowTransformer2DModel": {"joint_transformer_blocks": (TEXT, IMAGE), "single_transformer_blocks": (IMAGE,)},
    "CogView4Transformer2DModel": {"transformer_blocks": (IMAGE, TEXT)},
    "CogVideoXTransformer3DModel": {"transformer_blocks": (IMAGE, TEXT)},
    "HunyuanVideoTransformer3DModel": {"transformer_blocks": (IMAGE, TEXT), "single_transformer_blocks": (IMAGE, TEXT)},
}


class Block(NamedTuple):
    """A block of the range: `streams` are the names of what it returns, all of which it takes too."""

    module: nn.Module
    streams: tuple[str, ...]


class BlockRange(NamedTuple):
    """A range of blocks to skip: `begin` … `end` − 1 of all blocks of the model, which are `blocks`.

    The feature is what the range adds to each stream (B, tokens, C), a tensor, or a tuple of them for blocks that carry
    two; `parameters` are the names of the model's arguments.
    """

    blocks: tuple[Block, ...]
    begin: int
    end: int
    parameters: tuple[str, ...]

    def stand_ins(self, now: Pass) -> Iterable[tuple[nn.Module, Around]]:
        """See `Place`."""
        for index, (module, streams) in enumerate(self.blocks, self.begin):
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            places = tuple((name, names.index(name)) for name in streams)
            yield module, functools.partial(_block, now, index, places)

    def start(self, now: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """See `Place`. Stable Diffusion 3's skip-layer guidance leaves out blocks by itself."""
        left_out = dict(zip(self.parameters, args, strict=False)) | kwargs
        left_out = left_out.get("skip_layers") or ()
        running = [index for index in range(self.begin, self.end) if index not in left_out]
        now.ends = (running[0], running[-1]) if running else None
        return None


def locate_blocks(model: Any, blocks: tuple[int, int] | None) -> BlockRange:
    """The range of blocks that a reuse step skips.

    Args:
        model: a transformer of one of the classes in `MODELS`, with n blocks, all its lists together.
        blocks: (begin, end), the range begin … end − 1 of these n; None leaves out max(1, n // 8) blocks at either end.

    Raises TypeError for another model, ValueError for a range that it does not have, or too few blocks.
    """
    refuse_compiled(model)
    name = type(model).__name__
    lists = next((MODELS[base.__name__] for base in type(model).__mro__ if base.__name__ in MODELS), None)
    if lists is None:
        raise TypeError(f"expected one of {', '.join(MODELS)}, found {name}")
    found = [_described(module, streams) for key, streams in lists.items() for module in getattr(model, key)]
    count = len(found)
    if blocks is None:
        kept = max(1, count // 8)
        blocks = (kept, count - kept)
        if blocks[0] >= blocks[1]:
            raise ValueError(f"this {name} has {count} blocks, expected at least 3 to skip those in the middle")
    begin, end = blocks
    if not 0 <= begin < end <= count:
        raise ValueError(f"blocks is {blocks}; this {name} has {count}, expected 0 <= begin < end <= {count}")
    parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]
    return BlockRange(tuple(found[begin:end]), begin, end, parameters)


def _described(module: nn.Module, streams: tuple[str, ...]) -> Block:
    """A block; one that takes no text returns none (the single blocks of Flux in some releases of diffusers)."""
    takes = inspect.signature(type(module).forward).parameters
    return Block(module, tuple(name for name in streams if name in takes))


def _block(
    now: Pass,
    index: int,
    places: tuple[tuple[str, int], ...],
    forward: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Block `index` of the model, which takes each stream by name or at its place."""
    if (now.reuse is None and now.capture is None) or now.ends is None:
        return forward(*args, **kwargs)
    given = tuple(kwargs[name] if name in kwargs else args[place] for name, place in places)
    first, last = now.ends
    if index == first:
        now.entered = tuple(stream.clone() for stream in given)  # a model might add to it in place between the blocks
    if now.reuse is not None:
        output = given if index != last else _added(_entered(now, len(given)), now.reuse)
        return output if len(output) > 1 else output[0]
    output = forward(*args, **kwargs)
    if index == last and now.capture is not None:
        left = output if isinstance(output, tuple) else (output,)
        sums = tuple(_sum(after, before) for after, before in zip(left, _entered(now, len(left)), strict=True))
        now.capture(sums if len(sums) > 1 else sums[0])
    return output


def _entered(now: Pass, streams: int) -> tuple[Tensor, ...]:
    """What came into the range, joined where the streams were joined on the way."""
    assert now.entered is not None
    if len(now.entered) == streams:
        return now.entered
    return (torch.cat(now.entered, dim=1),)


def _sum(after: Tensor | None, before: Tensor) -> Tensor:
    """What the blocks added; empty where they drop a stream, as the last block of Stable Diffusion 3 does."""
    return before.new_empty(0) if after is None else after - before


def _added(entered: tuple[Tensor, ...], feature: Any) -> tuple[Tensor | None, ...]:
    sums = feature if isinstance(feature, tuple) else (feature,)
    return tuple(stream + sum_ if sum_.numel() else None for stream, sum_ in zip(entered, sums, strict=True))
