"""Finding caches of other libraries, and what IEC's own plan and cache make of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from iec.pipeline.foreign import cachedit, deepcache, diffusers_hooks
from iec.pipeline.foreign.visit import ForeignCache
from iec.plan import CorrectionPlan
from iec.plan.correction import parse


def find(model: Any) -> list[ForeignCache]:
    """The caches of other libraries on `model`, a denoiser, compiled or not.

    Raises TypeError, with the reason, for one that cannot be kept out of a correction. A cache that none of the
    adapters knows is taken for a part of the model.
    """
    model = getattr(model, "_orig_mod", model)
    if not hasattr(model, "modules"):  # a runtime of its own, such as ONNX
        return []
    return [cache for library in (diffusers_hooks, deepcache, cachedit) for cache in library.collect(model)]


def names(models: Iterable[Any]) -> list[str]:
    """The names of the caches of other libraries on `models`, of those that IEC cannot go past as well."""
    named: dict[str, None] = {}
    for model in models:
        try:
            named.update((cache.name, None) for cache in find(model))
        except TypeError:
            named["a cache that IEC does not know"] = None
    return list(named)


def check_refresh(steps: str | CorrectionPlan | None, caches: Iterable[ForeignCache]) -> None:
    """Raise ValueError when `steps` speaks of refresh steps that nobody knows before the run."""
    if not isinstance(steps, str) or not any(atom.kind == "refresh" for parts in parse(steps) for atom in parts):
        return
    for cache in caches:
        if cache.refresh(1, 0) is None:
            raise ValueError(
                f"steps {steps!r}: {cache.name} has no refresh steps to be known before the run, as it {cache.decides}; "
                "choose the steps themselves, such as 'ends:1/10' (the default beside this cache), 'all' or 'at:0,10'"
            )


def refresh_steps(caches: Iterable[ForeignCache], num_steps: int, begin: int) -> tuple[int, ...] | None:
    """The steps at which all of `caches` run the whole model; None without caches, or when one decides while it runs."""
    listed = [cache.refresh(num_steps, begin) for cache in caches]
    if not listed or any(steps is None for steps in listed):
        return None
    return tuple(sorted(set.intersection(*(set(steps) for steps in listed if steps is not None))))


def refuse_beside(models: Iterable[Any]) -> None:
    """Raise ValueError when one of `models` carries another library's cache: two caches would reuse each other's errors."""
    for cache in (cache for model in models for cache in find(model)):
        raise ValueError(
            f"this pipeline has a cache already, {cache.name}; take it off first (iec.enable(pipe) corrects beside it, but "
            "IEC's own cache and a calibration need the plain model)"
        )
