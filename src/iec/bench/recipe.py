"""What a bench is: one TOML file, checked to the last key, read into dataclasses (docs/bench.md has the format)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

from iec.artifact.plain import plain
from iec.bench.specs import (
    CalibrationSpec,
    ControlsSpec,
    FigureSpec,
    MetricsSpec,
    ModelSpec,
    ReferencesSpec,
    RunSpec,
    StandInSpec,
)
from iec.bench.strict import checked, read, value_of
from iec.bench.studies import check_arm, options_of
from iec.bench.sweeps import Paper, entries
from iec.evaluate.arms import Arm
from iec.evaluate.conditions import Conditions
from iec.evaluate.measures import paired_scores

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - Python 3.10
    import tomli as tomllib

FORMAT, VERSION = "iec-bench", 1
TARGETS = ("fine", "full")  # images of the same seeds that metrics may name


@dataclass(frozen=True)
class Entry:
    """A row of a table: an arm, the table it belongs to, and what the paper has for it."""

    arm: Arm
    group: str = ""
    paper: Paper | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole bench. `table` is the parsed file after overrides, from which `recipe_of` makes an equal one; `stand_in` is what
    stands in for the model, None for the model itself; relative paths are relative to `folder`."""

    title: str
    model: ModelSpec
    entries: tuple[Entry, ...]
    paper: str | None = None
    about: str = ""
    conditions: dict[str, Any] = field(default_factory=dict)
    run: RunSpec = field(default_factory=RunSpec)
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    references: ReferencesSpec = field(default_factory=ReferencesSpec)
    metrics: MetricsSpec = field(default_factory=MetricsSpec)
    controls: ControlsSpec = field(default_factory=ControlsSpec)
    figures: tuple[FigureSpec, ...] = ()
    stand_in: StandInSpec | None = None
    table: Mapping[str, Any] = field(default_factory=dict, compare=False)
    folder: Path = field(default=Path(), compare=False)

    def conditions_of(self, seed: int, given: Mapping[str, Any] | None = None) -> Conditions:
        """The conditions of the run, or those `given`, random ones drawn with `seed`."""
        return Conditions(self.conditions if given is None else given, seed, self.folder)

    def plain(self) -> dict[str, Any]:
        """The table with what it leaves out, as plain data: what run.json keeps."""
        filled = {name: asdict(getattr(self, name)) for name in _SECTIONS}
        return plain({**self.table, **filled}, "recipe")

    def full_precision(self, num_inference_steps: int, name: str) -> Arm:
        """Full precision with the sampler of the run."""
        run = self.run
        return Arm(name, "reference", num_inference_steps, run.scheduler, run.scheduler_options)

    @property
    def fine(self) -> tuple[Arm, int] | None:
        """The arm of the fine solution and its number of images; None without one."""
        spec = self.references.fine
        if spec is None:
            return None
        solver = "" if spec.scheduler is None else f"{spec.scheduler.removesuffix('Scheduler')}, "
        name = f"fine: {solver}{spec.num_inference_steps} steps"
        arm = Arm(name, "reference", spec.num_inference_steps, spec.scheduler, spec.scheduler_options)
        return arm, min(spec.num or self.run.num, self.run.num)


_SECTIONS = {
    "model": ModelSpec,
    "run": RunSpec,
    "calibration": CalibrationSpec,
    "references": ReferencesSpec,
    "metrics": MetricsSpec,
    "controls": ControlsSpec,
}
_TOP = (
    "format",
    "version",
    "title",
    "paper",
    "about",
    *_SECTIONS,
    "conditions",
    "arm",
    "sweep",
    "figure",
    "quick",
    "stand_in",
)
_OVERRIDES = ("run", "calibration", "references", "metrics", "conditions", "arms", "figures")


def load_recipe(
    name_or_path: str | Path,
    *,
    quick: bool = False,
    stand_in: bool = False,
    controls: bool = False,
    groups: Sequence[str] = (),
    **run: Any,
) -> Recipe:
    """Read a bundled recipe by its name, or a TOML file by its path.

    quick, stand_in: lay the recipe's tables of these names over the others. controls: as `enabled` in [controls]. groups: of
    the groups of arms only those that one of these patterns (*, ?) names; empty: all. run: values for [run], None: as the
    recipe says. Raises ValueError, naming file and key, for what is no recipe, and for a pattern that names no group.
    """
    where, text, folder = _found(name_or_path)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where}: no valid TOML: {error}") from error
    recipe_of(table, where, folder)  # what is wrong is told also where an override hides it
    table = overridden(table, where, quick=quick, stand_in=stand_in)
    if controls:
        table["controls"] = {**table.get("controls", {}), "enabled": True}
    given = {key: value for key, value in run.items() if value is not None}
    if given:
        table["run"] = {**table.get("run", {}), **given}
    return recipe_of(_of_groups(table, groups, where) if groups else table, where, folder)


def _of_groups(table: dict[str, Any], patterns: Sequence[str], where: str) -> dict[str, Any]:
    """The table with the arms of these groups alone, and the figures that need no others."""
    listed = {kind: [(str(arm.get("group", "")), arm) for arm in table.get(kind, [])] for kind in ("arm", "sweep")}
    known = dict.fromkeys(group for arms in listed.values() for group, _ in arms)
    for pattern in patterns:
        if not any(fnmatchcase(group, pattern) for group in known):
            raise ValueError(f"{where}: no group of arms is named {pattern!r}; known are {', '.join(map(repr, known))}")
    chosen = {group for group in known if any(fnmatchcase(group, pattern) for pattern in patterns)}
    made = table | {kind: [arm for group, arm in arms if group in chosen] for kind, arms in listed.items()}
    names = {entry.arm.name for entry in recipe_of({**made, "figure": []}, where).entries}
    made["figure"] = [
        each for each in made.get("figure", []) if {*each.get("arms", ()), each.get("arm")} <= {None, *names}
    ]
    return made


def overridden(table: Mapping[str, Any], where: str, *, quick: bool = False, stand_in: bool = False) -> dict[str, Any]:
    """The table of a recipe with its [stand_in] and its [quick] laid over it; of these, only what the stand-in is stays."""
    made = {key: value for key, value in table.items() if key not in ("quick", "stand_in")}
    for wanted, name in ((stand_in, "stand_in"), (quick, "quick")):
        if not wanted:
            continue
        if name not in table:
            raise ValueError(f"{where}: no table [{name}], which --{name.replace('_', '-')} lays over the others")
        changes = dict(table[name])
        if name == "stand_in":
            made["stand_in"] = {key: changes.pop(key) for key in ("model", "options") if key in changes}
        chosen, figures = changes.pop("arms", None), changes.pop("figures", True)
        for section, values in changes.items():
            made[section] = {**made.get(section, {}), **values}
        if not figures:
            made.pop("figure", None)
        if chosen is not None:
            for kind in ("arm", "sweep"):
                kept = [arm for arm in made.get(kind, []) if any(fnmatchcase(str(arm.get("name")), c) for c in chosen)]
                made[kind] = kept
    return made


def recipe_of(table: Mapping[str, Any], where: str, folder: Path = Path()) -> Recipe:
    """Read the parsed table of a recipe that lies in `folder`, `where` naming it in messages. Raises as `load_recipe` does."""
    checked(table, _TOP, where)
    if table.get("format") != FORMAT:
        raise ValueError(f'{where}.format: found {table.get("format")!r}, expected "{FORMAT}": is this a bench recipe?')
    if table.get("version") != VERSION:
        raise ValueError(f"{where}.version: found {table.get('version')!r}, this release reads {VERSION}")
    for key in ("title", "model"):
        if key not in table:
            raise ValueError(f"{where}: {key} missing")
    read_in = {key: read(kind, table[key], f"{where}.{key}") for key, kind in _SECTIONS.items() if key in table}
    texts = {key: value_of(str, table[key], f"{where}.{key}") for key in ("title", "paper", "about") if key in table}
    conditions = value_of(dict[str, Any], table.get("conditions", {}), f"{where}.conditions")
    run = read_in.get("run", RunSpec())
    rows = _rows(table, asdict(run), where)
    figures = tuple(_figure(each, rows, at) for at, each in _each(table, "figure", where))
    held = table.get("stand_in", {})
    own = {key: value for key, value in held.items() if key in ("model", "options")} if isinstance(held, dict) else held
    stand_in = read(StandInSpec, own, f"{where}.stand_in") if "stand_in" in table else None
    own = {"entries": rows, "conditions": conditions, "figures": figures, "stand_in": stand_in}
    recipe = Recipe(**texts, **read_in, **own, table=dict(table), folder=folder)
    _check(recipe, where)
    for name in ("quick", "stand_in"):
        if name in table:
            _check_overrides(table, name, where, folder)
    return recipe


def _check_overrides(table: Mapping[str, Any], name: str, where: str, folder: Path) -> None:
    """Refuse what a table of overrides cannot lay over, and a recipe that is none with it."""
    own = ("model", "options") if name == "stand_in" else ()
    changes = checked(table[name], (*own, *_OVERRIDES), f"{where}.{name}")
    for key, value in changes.items():
        if key not in ("arms", "figures", *own):
            value_of(dict[str, Any], value, f"{where}.{name}.{key}")
    value_of(tuple[str, ...], changes.get("arms", ()), f"{where}.{name}.arms")
    value_of(bool, changes.get("figures", True), f"{where}.{name}.figures")
    merged = overridden(table, where, **{name: True})
    merged.pop("stand_in", None)
    recipe_of(merged, f"{where} with [{name}]", folder)


def _check(recipe: Recipe, where: str) -> None:
    """Refuse what the tables say only together."""
    run, calibration = recipe.run, recipe.calibration
    if calibration.seed < run.seed + run.num and run.seed < calibration.seed + calibration.num_samples:
        raise ValueError(
            f"{where}.calibration.seed: its {calibration.num_samples} samples from {calibration.seed} on are among the "
            f"{run.num} evaluated from {run.seed} on; expected other seeds"
        )
    for name in recipe.metrics.names:
        try:
            targets = paired_scores([name])
        except ValueError as error:
            raise ValueError(f"{where}.metrics.names: {error}") from error
        for target in targets:
            if target not in TARGETS:
                raise ValueError(f"{where}.metrics.names: {name}: a recipe's targets are {' and '.join(TARGETS)}")
            if not getattr(recipe.references, target):
                raise ValueError(f"{where}.metrics.names: {name} needs references.{target}")


def _rows(table: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> tuple[Entry, ...]:
    rows = tuple(Entry(*found) for found in entries(table, defaults, where))
    if not rows:
        raise ValueError(f"{where}: no [[arm]] and no [[sweep]]; expected at least one")
    seen: set[tuple[str, str]] = set()
    for entry in rows:
        if (entry.group, entry.arm.name) in seen:
            raise ValueError(f"{where}: two arms of group {entry.group!r} are named {entry.arm.name!r}; expected one")
        seen.add((entry.group, entry.arm.name))
    return rows


def _figure(table: Any, rows: tuple[Entry, ...], where: str) -> FigureSpec:
    own = [each.name for each in fields(FigureSpec) if each.name != "options"]
    if not isinstance(table, dict):
        raise ValueError(f"{where}: found {table!r}, expected a table")
    named = {key: value for key, value in table.items() if key in own}
    figure = read(FigureSpec, {**named, "options": {k: v for k, v in table.items() if k not in own}}, where)
    checked(table, (*own, *options_of(figure.kind)), where)
    names = {entry.arm.name for entry in rows}
    for name in (*figure.arms, *([figure.arm] if figure.arm is not None else [])):
        if name not in names:
            raise ValueError(f"{where}: no arm is named {name!r}; known are {', '.join(map(repr, sorted(names)))}")
    try:
        check_arm(figure.kind, next((entry.arm for entry in rows if entry.arm.name == figure.arm), None))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return figure


def _each(table: Mapping[str, Any], key: str, where: str) -> list[tuple[str, Any]]:
    found = table.get(key, [])
    if not isinstance(found, list):
        raise ValueError(f"{where}.{key}: expected [[{key}]], a list of tables; found [{key}]")
    return [(f"{where}.{key}[{index}]", each) for index, each in enumerate(found)]


def _found(name_or_path: str | Path) -> tuple[str, str, Path]:
    """What to call a recipe in messages, its text, and what its relative paths are relative to: its folder, or, for a bundled
    one, the present."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        folder = resources.files("iec") / "recipes" / "bench"
        known = bundled_recipes()
        if str(name_or_path) not in known:
            raise ValueError(
                f"no bench recipe {str(name_or_path)!r}; bundled are {', '.join(known)}; or give a .toml file"
            )
        text = (folder / f"{name_or_path}.toml").read_text(encoding="utf-8")
        return f"{name_or_path}.toml", text, Path()
    try:
        folder = path.resolve().parent
        bundled = folder == Path(str(resources.files("iec") / "recipes" / "bench")).resolve()
        return str(path), path.read_text(encoding="utf-8"), Path() if bundled else folder
    except FileNotFoundError:
        raise ValueError(f"recipe {path} not found") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} cannot be read: {error}") from error


def bundled_recipes() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    folder = resources.files("iec") / "recipes" / "bench"
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))
