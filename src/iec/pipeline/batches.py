"""The calls that sample a list of seeds, a batch at a time: each image from a generator of its own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

# Arguments that pipelines want once per image; a single value is repeated.
_PROMPTS = ("prompt", "prompt_2", "prompt_3")
PER_IMAGE = (*_PROMPTS, *(f"negative_{name}" for name in _PROMPTS), "class_labels")
_OURS = ("generator", "output_type", "return_dict", "num_images_per_prompt")


class Batch(NamedTuple):
    """The seeds of one call, and its arguments."""

    seeds: Sequence[int]
    arguments: dict[str, Any]


def batches(
    pipe: Any, seeds: Sequence[int], num_inference_steps: int, batch_size: int, output_type: str, /, **kwargs: Any
) -> Iterator[Batch]:
    """The calls of `pipe` for `seeds`. Every image has a CPU generator of its own, so it depends on its seed alone.

    `kwargs` go to the pipeline; prompts and class labels may be one value for all images or a list with one per image.

    Raises ValueError for no seeds, a bad batch size or number of steps, arguments that the pipeline does not take or lacks;
    TypeError for what is no pipeline.
    """
    if isinstance(pipe, type) or not callable(pipe):
        raise TypeError(
            f"expected a pipeline object, found {pipe!r}; make one with .from_pretrained(...) or iec.load(...)"
        )
    if not seeds or batch_size < 1 or num_inference_steps < 1:
        raise ValueError(
            f"{len(seeds)} seeds in batches of {batch_size} with {num_inference_steps} steps: "
            "expected at least 1 of each"
        )
    accepted = inspect.signature(pipe.__call__).parameters
    _check(type(pipe).__name__, accepted, kwargs)
    for key in PER_IMAGE:
        if isinstance(kwargs.get(key), (list, tuple)) and len(kwargs[key]) != len(seeds):
            raise ValueError(
                f"{key} has {len(kwargs[key])} entries for {len(seeds)} seeds; give one value, or one per seed"
            )
    return _batches(accepted, seeds, num_inference_steps, batch_size, output_type, kwargs)


def _batches(
    accepted: Any,
    seeds: Sequence[int],
    num_inference_steps: int,
    batch_size: int,
    output_type: str,
    kwargs: dict[str, Any],
) -> Iterator[Batch]:
    for start in range(0, len(seeds), batch_size):
        chosen = slice(start, start + batch_size)
        count = len(seeds[chosen])
        arguments = {key: _part(value, chosen, count) if key in PER_IMAGE else value for key, value in kwargs.items()}
        if "batch_size" in accepted:
            arguments["batch_size"] = count
        arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds[chosen]]
        arguments |= {"num_inference_steps": num_inference_steps, "output_type": output_type}
        yield Batch(seeds[chosen], arguments)


def _check(name: str, accepted: Any, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for arguments that the pipeline does not take or lacks, or that are ours to set."""
    ours = [key for key in kwargs if key in (*_OURS, "batch_size")]
    if ours:
        raise ValueError(f"{', '.join(ours)}: set by IEC itself; leave out")
    missing = [key for key in ("generator", "num_inference_steps", "output_type") if key not in accepted]
    if missing:
        raise ValueError(f"{name} takes no {', '.join(missing)}, so its seeds cannot be sampled one by one")
    unknown = [key for key in kwargs if key not in accepted]
    if unknown:
        takes = ", ".join(key for key in accepted if key not in (*_OURS, "batch_size", "self", "args", "kwargs"))
        raise ValueError(f"{name} takes no {', '.join(unknown)}; it takes {takes}")
    conditions = [key for key in ("prompt", "class_labels") if key in accepted]
    embedded = any(key.endswith("_embeds") and value is not None for key, value in kwargs.items())
    if "batch_size" not in accepted and conditions and not embedded and kwargs.get(conditions[0]) is None:
        raise ValueError(f"{name} needs {conditions[0]}=...")


def _part(value: Any, chosen: slice, count: int) -> Any:
    if value is None:
        return None
    return list(value[chosen]) if isinstance(value, (list, tuple)) else [value] * count
