"""The caches of diffusers (`transformer.enable_cache(config)`, `diffusers.hooks.apply_…`), which are hooks on its modules.

A hook replaces a module's forward by a chain of three functions, held in a mutable reference (`hook.fn_ref`). During a
correction the reference leads to the original forward, and the hook neither reads nor writes its state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from iec.pipeline.foreign.visit import ForeignCache, Visit

_PYRAMID, _FASTER, _FIRST = "PyramidAttentionBroadcast", "FasterCache", "FirstBlockCache"
_MAG, _SEA, _TAYLOR = "MagCache", "SeaCache", "TaylorSeer"

# Each is known by its class names, as a release of diffusers may lack some of them.
HOOKS = {
    "PyramidAttentionBroadcastHook": _PYRAMID,
    "FasterCacheDenoiserHook": _FASTER,
    "FasterCacheBlockHook": _FASTER,
    "FBCHeadBlockHook": _FIRST,
    "FBCBlockHook": _FIRST,
    "MagCacheHeadHook": _MAG,
    "MagCacheBlockHook": _MAG,
    "SeaCacheRootHook": _SEA,
    "SeaCacheLeaderBlockHook": _SEA,
    "SeaCacheBlockHook": _SEA,
    "SeaCachePostNormHook": _SEA,
    "TaylorSeerCacheHook": _TAYLOR,
}
DECIDES = {
    _PYRAMID: "lets every attention layer reuse its output in a rhythm of its own",
    _FASTER: "lets every attention layer, and the unconditional branch, reuse in a rhythm of its own",
    _FIRST: "compares the first block's output with the last one while it runs",
    _MAG: "adds up an estimate of its error while it runs",
    _SEA: "compares the filtered sample with the last one while it runs",
    _TAYLOR: "runs the whole model at fixed steps",
}
# Keys and values of a constant prompt: what a pass takes from it is exact, a correction may take it too.
EXACT = ("TextKVCacheTransformerHook", "TextKVCacheBlockHook")


class HookedCache:
    """All hooks of one kind in a denoiser."""

    def __init__(self, kind: str, hooks: Sequence[Any], outermost: bool) -> None:
        self.kind, self.hooks, self.outermost = kind, tuple(hooks), outermost
        self.name, self.decides = f"{kind} of diffusers", DECIDES[kind]

    def around(self, visit: Visit) -> AbstractContextManager[None]:
        """See `ForeignCache`."""
        return _stepped_aside(self.hooks) if visit.correction else _at_step(self.hooks, visit)

    def refresh(self, num_steps: int, begin: int) -> tuple[int, ...] | None:
        """See `ForeignCache`. TaylorSeer counts the evaluations of a run; others are not known in advance."""
        if self.kind != _TAYLOR:
            return None
        (first, *_) = self.hooks
        before, interval, after = (
            first.disable_cache_before_step,
            first.cache_interval,
            getattr(first, "disable_cache_after_step", None),
        )
        return tuple(
            begin + index
            for index in range(num_steps - begin)
            if index < before or (index - before - 1) % interval == 0 or (after is not None and index >= after)
        )


def collect(model: nn.Module) -> list[ForeignCache]:
    """The caches of diffusers in `model`.

    Raises TypeError for one that this version of IEC does not know.
    """
    found: dict[str, list[Any]] = {}
    outermost: set[str] = set()
    for module in model.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            names = [base.__name__ for base in type(hook).__mro__]
            kind = next((HOOKS[name] for name in names if name in HOOKS), None)
            if kind is not None:
                found.setdefault(kind, []).append(hook)
                if module is model:
                    outermost.add(kind)
            elif _is_cache(type(hook)) and not any(name in EXACT for name in names):
                raise TypeError(
                    f"IEC does not know the cache {type(hook).__name__} of diffusers on this {type(model).__name__}, and "
                    "cannot keep it out of its corrections; take it off, by disable_cache() of the model"
                )
    return [HookedCache(kind, hooks, kind in outermost) for kind, hooks in found.items()]


def _is_cache(kind: type) -> bool:
    """Whether a hook is one of diffusers' caches, by the name of the module that defines it."""
    package, _, module = kind.__module__.rpartition(".")
    return package == "diffusers.hooks" and module.endswith("cache")


@contextmanager
def _stepped_aside(hooks: Sequence[Any]) -> Iterator[None]:
    references = [hook.fn_ref for hook in hooks]
    held = [(ref.pre_forward, ref.forward, ref.post_forward) for ref in references]
    try:
        for ref in references:
            ref.pre_forward, ref.post_forward = _arguments, _output
            if ref.original_forward is not None:
                ref.forward = ref.original_forward
        yield
    finally:
        for ref, functions in zip(references, held, strict=True):
            ref.pre_forward, ref.forward, ref.post_forward = functions


def _arguments(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def _output(module: nn.Module, output: Any) -> Any:
    return output


@contextmanager
def _at_step(hooks: Sequence[Any], visit: Visit) -> Iterator[None]:
    """Pipelines tell some caches the index of their loop, which counts corrections too; here they learn the step."""
    told = []
    managers = {id(value): value for hook in hooks for value in vars(hook).values() if hasattr(value, "set_context")}
    for manager in managers.values():
        context = getattr(manager, "_context", None)
        if getattr(context, "step_index", None) is not None:
            told.append((manager, context))
    try:
        for manager, context in told:
            steps = len(visit.timesteps) - visit.begin
            manager.set_context(
                dataclasses.replace(context, step_index=visit.step - visit.begin, num_inference_steps=steps)
            )
        yield
    finally:
        for manager, context in told:
            manager.set_context(context)
