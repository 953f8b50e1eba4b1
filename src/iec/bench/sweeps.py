"""The arms of a recipe: those that stand there, and the products of its sweeps."""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from iec.bench.strict import checked, value_of
from iec.evaluate.arms import Arm

Paper = dict[str, Any]  # metric → the paper's value; "of": what of
_OWN = ("group", "paper")
_KNOWN = (*(each.name for each in fields(Arm)), *_OWN)
_NOT_SWEPT = ("name", "kind", "scheduler_options", *_OWN)


def entries(
    table: Mapping[str, Any], defaults: Mapping[str, Any], where: str
) -> Iterator[tuple[Arm, str, Paper | None]]:
    """(arm, group, paper) of every [[arm]] of the parsed `table`, then of every [[sweep]].

    defaults: num_inference_steps of arms that do not say, scheduler and scheduler_options of those that say neither. Names are
    templates of the arm's fields: "{num_inference_steps} steps"; in a sweep, without a name, arms are named by what they are.
    Raises ValueError naming the table and the key.
    """
    for kind in ("arm", "sweep"):
        listed = table.get(kind, [])
        if not isinstance(listed, list):
            raise ValueError(f"{where}.{kind}: expected [[{kind}]], a list of tables; found [{kind}]")
        for index, given in enumerate(listed):
            at = f"{where}.{kind}[{index}]"
            if isinstance(given, dict) and "name" in given:
                at = f"{at} {given['name']!r}"
            values = checked(given, _KNOWN, at)
            group, paper = value_of(str, values.pop("group", ""), f"{at}.group"), values.pop("paper", None)
            if paper is not None:
                _check_paper(paper, f"{at}.paper")
            if "scheduler" not in values and "scheduler_options" not in values:
                values |= {key: defaults[key] for key in ("scheduler", "scheduler_options") if defaults.get(key)}
            if defaults.get("num_inference_steps") is not None:
                values.setdefault("num_inference_steps", defaults["num_inference_steps"])
            if "num_inference_steps" not in values:
                raise ValueError(f"{at}: num_inference_steps missing, here and in [run]")
            for single in [values] if kind == "arm" else product(values, at):
                yield _arm(single, at), group, paper


def product(values: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The arms of a sweep: every combination of the entries of the fields that are lists; the last one changes fastest.

    `relax` and `layers` are swept when they are lists of lists. Raises ValueError when nothing is swept, or an empty list.
    """
    swept = {
        key: value
        for key, value in values.items()
        if key not in _NOT_SWEPT
        and isinstance(value, list)
        and (key not in ("relax", "layers") or (bool(value) and all(isinstance(part, list) for part in value)))
    }
    if not swept:
        raise ValueError(
            f"{where}: a sweep without a list, such as steps = ['none', 'all']; use [[arm]] for a single arm"
        )
    empty = [key for key, value in swept.items() if not value]
    if empty:
        raise ValueError(f"{where}.{empty[0]}: an empty list, expected the values to sweep")
    return [values | dict(zip(swept, chosen, strict=True)) for chosen in itertools.product(*swept.values())]


def _arm(values: dict[str, Any], where: str) -> Arm:
    values = dict(values)
    try:
        if "name" in values:
            values["name"] = _named(value_of(str, values["name"], f"{where}.name"), values)
        return Arm.of(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _named(template: str, values: Mapping[str, Any]) -> str:
    """The name with its fields filled in, whose defaults count, too."""
    wanted = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    if not wanted:
        return template
    arm = Arm.of({key: value for key, value in values.items() if key != "name"})
    known = {each.name: getattr(arm, each.name) for each in fields(Arm) if each.name != "name"}
    known |= {key: values[key] for key in ("cache",) if key in values}
    known["relax"] = ", ".join(f"{factor:g}" for factor in arm.relax)
    known["layers"] = " ".join(arm.layers)
    known["steps"] = arm.steps or "none"
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"name {template!r}: no field {unknown[0]!r} of an arm; known are {', '.join(known)}")
    return template.format(**known)


def _check_paper(paper: Any, where: str) -> None:
    for key, value in value_of(dict[str, Any], paper, where).items():
        if key == "of":
            value_of(str, value, f"{where}.of")
        elif not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{where}.{key}: found {value!r}, expected the paper's number")
