"""Cells: what is one and the same sampling, what is not, and what is compared with what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from iec.bench.cells import REFERENCES, Plan, plan
from iec.bench.identity import bundled_calibrations
from iec.bench.recipe import Entry, Recipe, recipe_of
from iec.evaluate.arms import Arm
from iec.pipeline.models import calibrations


def recipe(*arms: dict[str, Any], **tables: Any) -> Recipe:
    table = {
        "format": "iec-bench",
        "version": 1,
        "title": "t",
        "model": {"name": "fashion-mnist"},
        "run": {"num": 10, "num_inference_steps": 20, "device": "cpu"},
        "arm": [{"name": f"arm {index}", **arm} for index, arm in enumerate(arms)],
        **tables,
    }
    return recipe_of(table, "test")


def cell(made: Plan, name: str) -> Any:
    return made.cells[next(row.cell for row in made.rows if row.entry.arm.name == name)]


def test_the_same_sampling_is_one_cell() -> None:
    made = plan(recipe({}, {"group": "b", "relax": [0.9]}, {"quant": "w8a8"}), "m")
    assert len(made.rows) == 3 and len(made.cells) == 2
    first, second, third = made.rows
    assert first.cell == second.cell != third.cell
    assert second.plain() == {"cell": first.cell, "name": "arm 1", "kind": "plain", "group": "b", "paper": None}
    assert made.row(first.cell) == first


def test_what_is_compared_with_what() -> None:
    tables = {"references": {"fine": {"num": 4}}, "metrics": {"names": ["rmse_fine", "rmse_full"]}}
    arms = ({"steps": "all"}, {"quant": "w8a8", "steps": "all"}, {"quant": "w8a8", "num_inference_steps": 40})
    made = plan(recipe(*arms, **tables), "m")
    fine = made.rows[0]
    assert fine.entry.group == REFERENCES and made.cells[fine.cell].num == 4
    full = cell(made, "full precision, 20 steps")
    corrected, both, longer = (cell(made, f"arm {index}") for index in range(3))
    assert corrected.baseline == full.hash == corrected.full and corrected.num == 10
    bare = made.cells[both.baseline]
    assert bare.arm.quant == "w8a8" and bare.arm.steps is None and both.full == full.hash == bare.full
    assert made.cells[longer.full].arm == Arm("full precision, 40 steps", "reference", 40) and longer.baseline is None
    assert {one.fine for one in made.cells.values()} == {fine.cell, None} and made.cells[fine.cell].fine is None
    # The arms without correction, which the recipe does not list, stand before those with it.
    names = [row.entry.arm.name for row in made.rows[1:]]
    assert names == [
        "full precision, 20 steps",
        "arm 0",
        "W8A8, 20 steps",
        "arm 1",
        "full precision, 40 steps",
        "arm 2",
    ]


def test_controls_are_compared_with_the_corrected_arms_of_their_group() -> None:
    arms = (
        {"group": "a", "steps": "all"},
        {"group": "a", "kind": "control", "steps": "all", "probe": "next"},
        {"group": "b", "quant": "w8a8", "steps": "all"},
        {"group": "b", "kind": "control", "num_inference_steps": 40},
    )
    made = plan(recipe(*arms), "m")
    corrected, next_one, quantized, longer = (cell(made, f"arm {index}") for index in range(4))
    assert next_one.rivals == (corrected.hash,) and longer.rivals == (quantized.hash,)
    assert next_one.beside == (corrected.baseline, corrected.hash) and corrected.rivals == quantized.rivals == ()


def test_a_reference_that_a_table_shows_needs_no_row_of_its_own() -> None:
    made = plan(recipe({"group": "a"}), "m")
    assert [(row.entry.arm.name, row.entry.group) for row in made.rows] == [("arm 0", "a")]


def test_controls_are_compared_with_what_they_stand_for() -> None:
    control = Entry(Arm("Heun", "control", 7, scheduler="HeunDiscreteScheduler", quant="w8a8"), "g")
    made = plan(recipe({"quant": "w8a8", "steps": "all"}), "m", controls=[control])
    assert cell(made, "Heun").full == cell(made, "full precision, 20 steps").hash
    assert cell(made, "Heun").calibration not in (None, cell(made, "arm 0").calibration)


def test_the_number_of_images_prolongs_a_cell() -> None:
    short = recipe({})
    longer = replace(short, run=replace(short.run, num=99))
    one, other = (next(iter(plan(r, "m").cells.values())) for r in (short, longer))
    assert one.hash == other.hash and (one.num, other.num) == (10, 99)


@pytest.mark.parametrize(
    "tables",
    [
        {"run": {"num": 10, "num_inference_steps": 20, "seed": 1, "device": "cpu"}},
        {"run": {"num": 10, "num_inference_steps": 20, "batch_size": 2, "device": "cpu"}},
        {"run": {"num": 10, "num_inference_steps": 20, "shard": 7, "device": "cpu"}},
        {"run": {"num": 10, "num_inference_steps": 20, "threads": 2, "device": "cpu"}},
        {"run": {"num": 10, "num_inference_steps": 21, "device": "cpu"}},
        {"conditions": {"class_labels": 3}},
        {"calibration": {"num_samples": 3}},
        {"calibration": {"seed": 77}},
        {"calibration": {"bundled": True}},
    ],
    ids=str,
)
def test_what_the_images_depend_on_is_in_the_hash(tables: dict[str, Any]) -> None:
    one = plan(recipe({"quant": "w8a8"}), "m", {"w8a8-20": "x"})
    other = plan(recipe({"quant": "w8a8"}, **tables), "m", {"w8a8-20": "x"})
    assert cell(one, "arm 0").hash != cell(other, "arm 0").hash
    assert cell(one, "arm 0").hash != cell(plan(recipe({"quant": "w8a8"}), "n"), "arm 0").hash


def test_calibrations_are_shared_and_bundled_ones_taken() -> None:
    arms = ({"quant": "w8a8"}, {"quant": "w8a8", "steps": "all"}, {"quant": "w8a8", "cache": "deepcache:5"})
    made = plan(recipe(*arms), "m")
    (only,) = made.calibrations.values()
    assert only.bundled is None and {cell(made, f"arm {i}").calibration for i in range(3)} == {only.hash}
    bundled = plan(recipe(*arms, calibration={"bundled": True}), "m", {"w8a8-20": "x"})
    assert [one.bundled for one in bundled.calibrations.values()] == ["w8a8-20"]
    changed = plan(recipe(*arms, calibration={"bundled": True}), "m", {"w8a8-20": "y"})
    assert cell(changed, "arm 0").hash != cell(bundled, "arm 0").hash


def test_bundled_calibrations_are_known_by_their_content() -> None:
    found = bundled_calibrations("fashion-mnist")
    assert set(found) == set(calibrations("fashion-mnist")) and len(set(found.values())) == len(found) >= 4
    assert bundled_calibrations("another") == {}


def test_figures_are_of_arms_or_of_full_precision() -> None:
    tables = {
        "figure": [
            {"kind": "error", "title": "Fig. 2: W8A8", "arm": "arm 0", "num": 3},
            {"kind": "spectral", "title": "Fig. 2: W8A8"},
            {"kind": "images", "arms": ["arm 0"]},
        ]
    }
    made = plan(recipe({"quant": "w8a8", "steps": "all"}, **tables), "m")
    first, second = made.figures
    assert (first.name, second.name) == ("Fig. 2 W8A8", "Fig. 2 W8A8 2")
    assert first.arm.quant == "w8a8" and first.options == {"num": 3}
    assert first.calibration == cell(made, "arm 0").calibration
    assert second.arm.quant is None and second.arm.num_inference_steps == 20 and second.calibration is None
    assert first.hash != second.hash
