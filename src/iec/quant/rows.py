"""Arguments and results of modules as trees of tensors: taken apart, cut into rows of the batch, put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Template = list[Any]  # ["dict", {...}], ["list", [...]], ["tuple", [...]], ["tensor", path] or ["plain", value]


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of `tree` (dictionaries, lists and tuples, nested), each with its path, "added/time_ids"."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, f"{path}/{key}" if path else str(key))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{path}/{index}" if path else str(index))


def template(tree: Any, path: str = "") -> Template:
    """`tree` without its tensors. It is JSON-able if everything else in the tree is."""
    if isinstance(tree, Tensor):
        return ["tensor", path]
    if isinstance(tree, Mapping):
        return ["dict", {str(k): template(v, f"{path}/{k}" if path else str(k)) for k, v in tree.items()}]
    if isinstance(tree, (list, tuple)):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return [kind, [template(v, f"{path}/{i}" if path else str(i)) for i, v in enumerate(tree)]]
    return ["plain", tree]


def fill(made: Template, tensor: Callable[[str], Tensor]) -> Any:
    """The tree of a template, whose tensors `tensor(path)` gives."""
    kind, value = made
    if kind == "tensor":
        return tensor(value)
    if kind == "dict":
        return {key: fill(inner, tensor) for key, inner in value.items()}
    if kind in ("list", "tuple"):
        filled = [fill(inner, tensor) for inner in value]
        return tuple(filled) if kind == "tuple" else filled
    return value


class RowStore:
    """Rows of one tensor, filled in piece by piece, kept on the CPU; pictures have their channels last.

    `factor`: entries of the tensor's first dimension that belong to one row of the batch (frames of a video), mostly 1.
    """

    def __init__(self, count: int, factor: int, like: Tensor) -> None:
        shape = (count, factor, *like.shape[1:])
        self.picture = like.dim() == 4
        if self.picture:
            shape = (count, factor, *like.shape[2:], like.shape[1])
        self.factor = factor
        self.held = torch.empty(shape, dtype=like.dtype)

    def put(self, places: Tensor, value: Tensor) -> None:
        """Store the rows of `value` at `places`."""
        value = value.detach()
        value = value.permute(0, 2, 3, 1) if self.picture else value
        self.held[places] = value.unflatten(0, (len(places), self.factor)).to(self.held)

    def get(self, places: Tensor, device: torch.device) -> Tensor:
        """The rows at `places`, on `device`."""
        value = self.held[places].flatten(0, 1).to(device)
        return value.permute(0, 3, 1, 2) if self.picture else value
