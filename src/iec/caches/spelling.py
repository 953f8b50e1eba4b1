"""Caches in one word, for command lines and recipes.

    deepcache                                               every default of iec.DeepCache
    deepcache:5                                             the interval
    deepcache:5,branch=0,schedule=quadratic:1.5             and options, which have the names of the fields
    deepcache:5,schedule=at:0,3,9,window=10-90              steps, or fractions of the run: window=0.1-0.9
    deepcache:3,blocks=2-26                                 transformers: blocks 2 … 25 are skipped
    cachequant:5,branch=0,compensate=cache                  iec.CacheQuant

An option begins at a comma before NAME=; all other commas belong to the value. A range a-b is from a to before b.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, fields
from decimal import Decimal
from typing import Any

from iec.caches.cachequant import CacheQuant
from iec.caches.deepcache import DeepCache

KINDS: dict[str, type[DeepCache] | type[CacheQuant]] = {"deepcache": DeepCache, "cachequant": CacheQuant}
EXAMPLES = "deepcache:5, deepcache:5,branch=0,schedule=quadratic:1.5,window=0.1-0.9, cachequant:5,compensate=cache"

_OPTION = re.compile(r",(?=\s*\w+\s*=)")


def parse(text: str, calibrated: dict[str, Any] | None = None) -> DeepCache | CacheQuant:
    """Read the grammar above.

    Args:
        text: the cache.
        calibrated: the `config` of `iec.artifact.calibration.CacheTables`, from which a `cachequant` takes what `text` does not
            say; None: the defaults of `iec.CacheQuant`.

    Raises TypeError for what is no text; ValueError for what is not in the grammar, and as iec.DeepCache and iec.CacheQuant do.
    """
    if not isinstance(text, str):
        raise TypeError(f"cache is {text!r}, expected a text such as {EXAMPLES}")
    head, *options = _OPTION.split(text.strip())
    name, colon, interval = (part.strip() for part in head.partition(":"))
    kind = KINDS.get(name.lower())
    if kind is None:
        raise ValueError(f"cache {text!r} is not understood: it begins with {name!r}; expected one such as {EXAMPLES}")
    values: dict[str, Any] = {}
    if kind is CacheQuant and calibrated is not None:
        values = asdict(CacheQuant.from_dict(calibrated))
    if colon:
        values["interval"] = _read(interval, "the interval", _whole, "a whole number such as 5", text)
    known = [field.name for field in fields(kind) if field.name in _OPTIONS]
    given: set[str] = set()
    for option in options:
        key, _, value = (part.strip() for part in option.partition("="))
        if key not in known:
            hint = f"; the interval follows the name, {name}:5" if key == "interval" else ""
            raise ValueError(f"cache {text!r}: {name} has no option {key!r}, but {', '.join(known)}{hint}")
        if key in given:
            raise ValueError(f"cache {text!r}: the option {key} is given twice; expected once")
        given.add(key)
        values[key] = _read(value, key, *_OPTIONS[key], text)
    return kind(**values)


def spell(config: DeepCache | CacheQuant) -> str:
    """Write a cache in the grammar, the interval always and other options where they are not the defaults.

    The same text for equal caches; `parse` reads it back.
    """
    name = next(key for key, kind in KINDS.items() if type(config) is kind)
    options = [
        f"{field.name}={_written(getattr(config, field.name))}"
        for field in fields(config)
        if field.name != "interval" and getattr(config, field.name) != field.default
    ]
    return ",".join([f"{name}:{config.interval}", *options])


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return "-".join(format(Decimal(repr(edge)), "f") for edge in value)  # 1e-05 would be read as a range
    return "".join(str(value).lower().split())


def _read(value: str, what: str, reader: Callable[[str], Any], expected: str, text: str) -> Any:
    try:
        return reader(value)
    except ValueError:
        raise ValueError(f"cache {text!r}: {what} is {value!r}, expected {expected}") from None


def _whole(value: str) -> int:
    if not re.fullmatch(r"-?\d+", value):
        raise ValueError
    return int(value)


def _edge(value: str) -> int | float:
    if re.fullmatch(r"\d+", value):
        return int(value)
    if re.fullmatch(r"\d*\.\d+", value):
        return float(value)
    raise ValueError


def _window(value: str) -> tuple[int | float, int | float]:
    begin, end = (_edge(part.strip()) for part in value.split("-"))
    return begin, end


def _blocks(value: str) -> tuple[int, int]:
    begin, end = (_whole(part.strip()) for part in value.split("-"))
    return begin, end


def _word(value: str) -> str:
    if not value:
        raise ValueError
    return value


_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "branch": (_whole, "a whole number"),
    "schedule": (_word, "a schedule such as quadratic:1.5 or at:0,3,9"),
    "window": (_window, "BEGIN-END, steps such as 10-90 or fractions such as 0.1-0.9"),
    "blocks": (_blocks, "BEGIN-END, as 2-26"),
    "compensate": (_word, "all, cache, quant or none"),
}
