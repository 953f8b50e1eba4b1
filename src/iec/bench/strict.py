"""Tables of a TOML file read into dataclasses: every refusal names the file and the key, and the key that was meant."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from iec.artifact.plain import short

T = TypeVar("T")


def read(kind: type[T], table: Any, where: str) -> T:
    """The dataclass `kind` from a parsed table, its fields checked by their annotations: plain types, unions with None,
    Literal, tuples (from lists), dicts.

    where: the file and the table, for messages. Raises ValueError for what is no table, for unknown and missing keys, values
    of another type, and what `kind` itself refuses.
    """
    checked(table, (field.name for field in fields(kind)), where)  # type: ignore[arg-type]
    hints = _hints(kind)
    missing = [f.name for f in fields(kind) if f.name not in table and _required(f)]  # type: ignore[arg-type]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing, expected {_told(hints[missing[0]])}")
    values = {key: _valued(hints[key], value, f"{where}.{key}") for key, value in table.items()}
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _valued(hint: Any, value: Any, where: str) -> Any:
    """As `value_of`, and a table as the dataclass that the annotation names, if it names one."""
    inner = next((option for option in get_args(hint) if is_dataclass(option)), None)
    return read(inner, value, where) if inner is not None and value is not None else value_of(hint, value, where)


def checked(table: Any, known: Iterable[str], where: str) -> dict[str, Any]:
    """`table`, if it is one and has known keys only; else ValueError."""
    if not isinstance(table, Mapping):
        raise ValueError(f"{where}: found {short(table)}, expected a table")
    known = list(known)
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {key}; {hint}")
    return dict(table)


def value_of(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `hint` has it: lists as tuples, whole numbers as floats where floats are meant.

    Raises ValueError naming `where` for another type.
    """
    fitting = _fit(hint, value)
    if fitting is MISSING:
        raise ValueError(f"{where}: found {short(value)}, expected {_told(hint)}")
    return fitting


def _fit(hint: Any, value: Any) -> Any:
    """The value, or MISSING where it is of another type."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return next((made for made in (_fit(option, value) for option in inner) if made is not MISSING), MISSING)
    if origin is Literal:
        return value if value in inner else MISSING
    if origin is tuple and isinstance(value, (list, tuple)):
        made = tuple(_fit(inner[0], part) for part in value)
        return MISSING if MISSING in made else made
    if origin is dict and isinstance(value, dict):
        made = {key: _fit(inner[1], part) for key, part in value.items()}
        return MISSING if any(part is MISSING for part in made.values()) else made
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # In Python 3.10 tuple[...] passes for a type: only what has no origin is one.
    plain = origin is None and isinstance(hint, type) and isinstance(value, hint)
    return value if plain and (hint is bool or not isinstance(value, bool)) else MISSING


_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a table"}


def _told(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_told(option) for option in inner if option is not type(None))
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin is tuple:
        return f"a list of {_told(inner[0])}"
    return "a table" if origin is dict else _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING
