"""The arms of equal cost that `--controls` puts beside every corrected arm of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from iec.bench.recipe import Entry, Recipe
from iec.bench.specs import ModelSpec
from iec.caches import CacheQuant
from iec.evaluate.arms import Arm
from iec.evaluate.controls import SCALES, controls
from iec.evaluate.cost import reuse_share
from iec.evaluate.held import HELD
from iec.plan import parse_schedule


def loading(model: ModelSpec) -> dict[str, Any]:
    """How a pipeline is loaded, for `iec.evaluate.scale.Sampling` and the tasks of `iec.bench.work`."""
    given = {"variant": model.variant, "revision": model.revision}
    options = {**{key: value for key, value in given.items() if value is not None}, **model.options}
    return {"model": model.name, "options": options, "dtype": model.dtype}


def needs_refresh(arm: Arm) -> bool:
    """Whether the cost of an arm is known only with the plan that the calibration of its cache has."""
    planned = isinstance(arm.cache, CacheQuant) and parse_schedule(arm.cache.schedule).kind == "dps"
    return planned and arm.steps not in (None, "refresh")


def entries(
    recipe: Recipe, model: ModelSpec, refresh: Callable[[Arm], Iterable[int]], told: Callable[[str], None]
) -> tuple[Entry, ...]:
    """The controls of all corrected arms of `recipe`, each in the group of its arm, none twice in a group.

    Loads the model to count what a pass that reuses a feature costs. refresh(arm): the refresh steps of a calibrated cache.
    told: where it is said which arm has no controls, and why.
    """
    pipe = HELD.pipeline(**loading(model), device=recipe.run.device)
    conditions = recipe.conditions_of(recipe.run.seed).of(range(1))
    shares: dict[str, float] = {}
    seen = {(entry.group, repr(entry.arm.plain())) for entry in recipe.entries}
    found: list[Entry] = []
    for entry in recipe.entries:
        arm = entry.arm
        if arm.steps is None:
            continue
        if arm.cache is not None and repr(arm.cache) not in shares:
            shares[repr(arm.cache)] = reuse_share(pipe, arm.cache, **conditions)
        try:
            made = controls(
                arm,
                pipe.scheduler,
                share=shares.get(repr(arm.cache)),
                refresh=refresh(arm) if needs_refresh(arm) else None,
                scales=recipe.controls.scales or SCALES,
            )
        except ValueError as error:
            told(f"no controls of {arm.name}: {error}")
            continue
        for control in made:
            key = (entry.group, repr(control.plain()))
            if key not in seen:
                seen.add(key)
                found.append(Entry(control, entry.group))
    HELD.release()
    return tuple(found)
