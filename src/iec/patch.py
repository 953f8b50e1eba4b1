"""Standing in for a module's forward, and stepping aside again without a trace."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def replace_forward(module: nn.Module, around: Around) -> Callable[[], None]:
    """Put `around(forward, args, kwargs)` in the place of a module's forward; returns what puts the forward back.

    When something else was put over it since, ours stays behind, open, with a RuntimeWarning.
    """
    instance, original = vars(module).get("forward"), module.forward
    open_ = False

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if open_ else around(original, args, kwargs)

    module.forward = forward

    def restore() -> None:
        nonlocal open_
        open_ = True
        if vars(module).get("forward") is not forward:
            warnings.warn(
                f"the forward of {type(module).__name__} was wrapped again after IEC had wrapped it, so IEC's own wrapper "
                "stays under it; it does nothing any more",
                RuntimeWarning,
                stacklevel=3,
            )
        elif instance is None:
            del module.forward
        else:
            module.forward = instance

    return restore
