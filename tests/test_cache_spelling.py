"""Caches in one word: `iec.caches.spelling`."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from iec.caches.cachequant import CacheQuant
from iec.caches.deepcache import DeepCache
from iec.caches.spelling import EXAMPLES, parse, spell


@pytest.mark.parametrize(
    ("text", "cache"),
    [
        ("deepcache", DeepCache()),
        ("deepcache:3", DeepCache(3)),
        (" DeepCache : 3 ", DeepCache(3)),
        ("deepcache,branch=0", DeepCache(branch=0)),
        ("deepcache:5,branch=-1", DeepCache(5, branch=-1)),
        (
            "deepcache:5,branch=0,schedule=quadratic:1.5,window=0.1-0.9",
            DeepCache(5, branch=0, schedule="quadratic:1.5", window=(0.1, 0.9)),
        ),
        ("deepcache:5,schedule=at:0,3,9,branch=2", DeepCache(5, branch=2, schedule="at:0,3,9")),
        ("deepcache:5, schedule = at:0, 3, 9 , branch = 2", DeepCache(5, branch=2, schedule="at:0, 3, 9")),
        ("deepcache:5,branch=2,schedule=at:0,3,9", DeepCache(5, branch=2, schedule="at:0,3,9")),
        ("deepcache:5,schedule=centred:15,1.4", DeepCache(5, schedule="centred:15,1.4")),
        ("deepcache:5,window=10-90", DeepCache(5, window=(10, 90))),
        ("deepcache:5,window=0-.5", DeepCache(5, window=(0, 0.5))),
        ("deepcache:3,blocks=2-26", DeepCache(3, blocks=(2, 26))),
        ("cachequant", CacheQuant()),
        ("cachequant:5,branch=0,compensate=cache", CacheQuant(5, branch=0, compensate="cache")),
        ("cachequant:4,schedule=dps,window=2 - 8", CacheQuant(4, window=(2, 8))),
        ("cachequant:4,schedule=at:0,7,compensate=none", CacheQuant(4, schedule="at:0,7", compensate="none")),
    ],
)
def test_what_is_meant(text: str, cache: DeepCache | CacheQuant) -> None:
    found = parse(text)
    assert type(found) is type(cache) and found == cache
    assert parse(spell(found)) == found or "at:0, 3" in text  # which is written without spaces
    assert spell(parse(spell(found))) == spell(found)
    if cache.window is not None:
        assert [type(edge) for edge in found.window or ()] == [type(edge) for edge in cache.window]


def test_every_field_has_a_spelling() -> None:
    values = {"branch": 1, "schedule": "uniform", "window": "1-2", "blocks": "1-2", "compensate": "none"}
    for name, kind in (("deepcache", DeepCache), ("cachequant", CacheQuant)):
        options = [f"{f.name}={values[f.name]}" for f in dataclasses.fields(kind) if f.name != "interval"]
        found = dataclasses.asdict(parse(",".join([f"{name}:7", *options])))
        default = dataclasses.asdict(kind())
        left = {key for key, value in found.items() if value == default[key]}
        assert left <= {"schedule"}, left


def test_the_examples_are_good() -> None:
    for example in EXAMPLES.split(", "):
        assert parse(example).interval == 5


def test_a_calibrated_cache_gives_what_is_not_said() -> None:
    made = CacheQuant(10, branch=1, schedule="centred:3", window=(0.1, 8), compensate="quant")
    assert parse("cachequant", made.as_dict()) == made
    assert parse("cachequant:4,branch=0", made.as_dict()) == dataclasses.replace(made, interval=4, branch=0)
    assert parse("deepcache", made.as_dict()) == DeepCache()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "it begins with ''; expected one such as deepcache:5"),
        ("teacache:5", "'teacache:5' is not understood: it begins with 'teacache'; expected one such as deepcache:5"),
        ("branch=0", "is not understood: it begins with 'branch=0'"),
        ("deepcache:", "the interval is '', expected a whole number such as 5"),
        ("deepcache:2.5", r"the interval is '2\.5', expected a whole number"),
        ("deepcache:0", "interval is 0, expected at least 1"),
        ("deepcache:5,branch", "the interval is '5,branch', expected"),
        ("deepcache:5,branch=", "branch is '', expected a whole number"),
        ("deepcache:5,branch=low", "branch is 'low', expected a whole number"),
        ("deepcache:5,branch=1,branch=2", "the option branch is given twice"),
        ("deepcache:5,deep=1", "deepcache has no option 'deep', but branch, schedule, window, blocks$"),
        ("deepcache,interval=5", "no option 'interval', but .*; the interval follows the name, deepcache:5"),
        ("deepcache:5,compensate=all", "deepcache has no option 'compensate', but"),
        ("cachequant:5,blocks=1-2", "cachequant has no option 'blocks', but branch, schedule, window, compensate"),
        ("deepcache:5,schedule=dps", "schedule 'dps' needs a calibration"),
        ("deepcache:5,schedule=", "schedule is '', expected a schedule such as"),
        ("deepcache:5,schedule=at:0,3,9,branch", "'branch' is not a step index"),
        ("deepcache:5,window=3", "window is '3', expected BEGIN-END, steps such as 10-90 or fractions"),
        ("deepcache:5,window=1-2-3", "window is '1-2-3', expected BEGIN-END"),
        ("deepcache:5,window=a-b", "window is 'a-b', expected BEGIN-END"),
        ("deepcache:5,window=1e-3-0.9", "window is '1e-3-0.9', expected BEGIN-END"),
        ("deepcache:5,window=9-3", r"window is \(9, 3\), which holds no step"),
        ("deepcache:5,blocks=0.1-0.9", "blocks is '0.1-0.9', expected BEGIN-END, as 2-26"),
        ("cachequant:5,compensate=some", "compensate is 'some', expected one of all, cache, quant, none"),
    ],
)
def test_what_is_not_understood_is_told(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse(text)


def test_no_text() -> None:
    wrong: Any = DeepCache()
    with pytest.raises(TypeError, match="expected a text such as deepcache:5"):
        parse(wrong)
