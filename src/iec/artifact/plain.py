"""Plain data: what JSON can hold, checked field by field, with refusals that name the field."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

_WIDTH = 180  # a layer of one part on one line


def plain(value: Any, path: str) -> Any:
    """`value` as JSON will give it back: mappings as dicts, tuples as lists.

    Raises TypeError for anything that is no plain data and ValueError for NaN and infinities, naming the field.
    """
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{path}: found the key {key!r} ({type(key).__name__}), expected text")
        return {key: plain(inner, f"{path}.{key}") for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner, f"{path}[{index}]") for index, inner in enumerate(value)]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path}: found {value!r}, which JSON cannot hold; expected a finite number or None")
        return float(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(
        f"{path}: found {short(value)} ({type(value).__name__}), expected plain data: "
        "text, numbers, true or false, None, lists and dicts of them"
    )


def short(value: Any) -> str:
    """`value` in at most 60 characters, for a message."""
    return textwrap.shorten(repr(value), 60, placeholder=" …")


def dumps(value: Any, indent: int = 0, key: str = "") -> str:
    """JSON for people: two spaces of indentation, and on one line what fits there. Refuses NaN and infinities.

    indent: of the line that it begins on. key: what stands before it on this line, and before the text that comes back.
    """
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, (dict, list)) or indent + len(key) + len(flat) < _WIDTH:
        return key + flat
    inner, outer = "\n" + " " * (indent + 2), "\n" + " " * indent
    if isinstance(value, dict):
        lines = [dumps(part, indent + 2, f"{json.dumps(name, ensure_ascii=False)}: ") for name, part in value.items()]
        return key + "{" + inner + f",{inner}".join(lines) + outer + "}"
    if all(isinstance(part, (int, float)) for part in value):
        return key + "[" + inner + inner.join(textwrap.wrap(flat[1:-1], _WIDTH - indent - 2)) + outer + "]"
    return key + "[" + inner + f",{inner}".join(dumps(part, indent + 2) for part in value) + outer + "]"


def loads(text: str) -> Any:
    """Parse strict JSON: no NaN, no infinities, no key twice in one object. Raises ValueError saying where."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
        return made

    def constant(name: str) -> Any:
        raise ValueError(f"found {name}, expected a finite number")

    return json.loads(text, object_pairs_hook=once, parse_constant=constant)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "a number": _is_number,
    "a whole number": _is_whole,
    "a positive whole number": lambda value: _is_whole(value) and value > 0,
    "a whole number in 2..8": lambda value: _is_whole(value) and 2 <= value <= 8,
    "true or false": lambda value: isinstance(value, bool),
    "an object": lambda value: isinstance(value, dict),
    "an object or null": lambda value: value is None or isinstance(value, dict),
    "a list": lambda value: isinstance(value, list),
}
_COLLECTIONS = {  # of what, each of which kind
    "an object of texts": ("an object", "text"),
    "a list of texts": ("a list", "text"),
    "a list of numbers": ("a list", "a number"),
    "a list of whole numbers": ("a list", "a whole number"),
    "a list of positive whole numbers": ("a list", "a positive whole number"),
}


def _check(value: Any, kind: str, path: str) -> None:
    if not _KINDS[kind](value):
        raise ValueError(f"{path}: found {short(value)}, expected {kind}")


class Fields:
    """The fields of one object of parsed JSON, taken one by one with their kind; refusals name them by `path`."""

    def __init__(self, value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{path}: found {short(value)}, expected an object")
        self._left, self._path = dict(value), path

    def take(self, name: str, kind: str) -> Any:
        """The field `name`, which must be of `kind`, a key of one of the tables above."""
        path = f"{self._path}.{name}" if self._path else name
        if name not in self._left:
            raise ValueError(f"{path}: missing, expected {kind}")
        value = self._left.pop(name)
        whole, each = _COLLECTIONS.get(kind, (kind, None))
        _check(value, whole, path)
        if each is not None:
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                _check(inner, each, f"{path}.{key}" if isinstance(value, dict) else f"{path}[{key}]")
        return value

    def done(self) -> None:
        """Refuse fields that nobody took."""
        if self._left:
            unknown = ", ".join(sorted(self._left))
            raise ValueError(f"{self._path or 'the document'}: found the unknown field(s) {unknown}")
