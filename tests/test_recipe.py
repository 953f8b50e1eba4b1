"""Bench recipes: what is read, what is laid over it, and that every mistake is told with its file and key."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from iec.bench.recipe import Recipe, bundled_recipes, load_recipe, recipe_of
from iec.caches import DeepCache

WHOLE = """
format = "iec-bench"
version = 1
title = "Table 1 on the bundled model"
paper = "Table 1"
about = "What it shows."

[model]
name = "fashion-mnist"

[conditions]
guidance_scale = 1.5

[run]
num = 2000
seed = 5
batch_size = 25
shard = 50
num_inference_steps = 100
threads = 2

[calibration]
num_samples = 32

[references]
fine = { num_inference_steps = 300, num = 150 }
data = "fashion-mnist"

[metrics]
names = ["fid", "rmse_fine", "rmse_full"]
network = "fashion-mnist"
draws = 50

[[arm]]
name = "W8A8"
group = "W8A8"
quant = "w8a8"
paper = { fid = 4.32, of = "CIFAR-10" }

[[arm]]
name = "W8A8 + IEC"
group = "W8A8"
quant = "w8a8"
steps = "all"
relax = [0.5]
paper = { fid = 3.76, of = "CIFAR-10" }

[[sweep]]
name = "{cache}, {num_inference_steps} steps, {steps}"
group = "sweep"
cache = ["deepcache:5", "deepcache:10"]
num_inference_steps = [10, 20]
steps = ["none", "refresh"]

[[figure]]
kind = "error"
title = "Fig. 2"
arm = "W8A8 + IEC"
num = 8

[quick]
arms = ["W8A8*"]
figures = false
run = { num = 8, num_inference_steps = 10, shard = 8 }
calibration = { num_samples = 4, bundled = true }
references = { fine = { num_inference_steps = 20 } }
metrics = { draws = 20 }

[stand_in]
model = "ddpm"
options = { channels = 8 }
run = { num = 4, num_inference_steps = 3 }
metrics = { names = ["rmse_full"] }
"""
SMALL = """
format = "iec-bench"
version = 1
title = "Small"
[model]
name = "fashion-mnist"
[run]
num_inference_steps = 5
[[arm]]
name = "plain"
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_whole_recipe_is_read(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, WHOLE))
    assert (recipe.title, recipe.paper) == ("Table 1 on the bundled model", "Table 1")
    assert (recipe.run.num, recipe.run.seed, recipe.run.threads, recipe.calibration.num_samples) == (2000, 5, 2, 32)
    first, second, *swept = recipe.entries
    assert first.arm.quant == "w8a8" and first.arm.kind == "plain" and first.arm.num_inference_steps == 100
    assert first.paper == {"fid": 4.32, "of": "CIFAR-10"}
    assert second.arm.kind == "corrected" and second.arm.relax == (0.5,) and second.group == "W8A8"
    assert [entry.arm.name for entry in swept][:3] == [
        "deepcache:5, 10 steps, none",
        "deepcache:5, 10 steps, refresh",
        "deepcache:5, 20 steps, none",
    ]
    assert len(swept) == 8 and swept[-1].arm.cache == DeepCache(10)
    assert recipe.fine is not None
    assert (recipe.fine[0].scheduler, recipe.fine[1]) == ("DPMSolverMultistepScheduler", 150)
    assert recipe.figures[0].options == {"num": 8} and recipe.figures[0].arm == "W8A8 + IEC"
    assert recipe.stand_in is None  # but with stand_in=True


def test_quick_stand_in_controls_and_values_of_the_command_line_lie_over_it(tmp_path: Path) -> None:
    path = written(tmp_path, WHOLE)
    quick = load_recipe(path, quick=True, num=6, threads=None)
    assert (quick.run.num, quick.run.num_inference_steps, quick.run.batch_size, quick.run.threads) == (6, 10, 25, 2)
    assert [entry.arm.name for entry in quick.entries] == ["W8A8", "W8A8 + IEC"] and not quick.figures
    assert quick.calibration.bundled and quick.metrics.draws == 20 and quick.metrics.names == quick.metrics.names
    assert quick.fine is not None and quick.fine[1] == 6
    small = load_recipe(path, stand_in=True, controls=True)
    assert small.stand_in is not None and small.stand_in.model == "ddpm" and small.stand_in.options == {"channels": 8}
    assert small.metrics.names == ("rmse_full",) and small.controls.enabled and len(small.entries) == 10


def test_only_the_groups_that_are_asked_for_are_left(tmp_path: Path) -> None:
    path = written(tmp_path, WHOLE)
    eight = load_recipe(path, groups=["W*"])
    assert [entry.group for entry in eight.entries] == ["W8A8"] * 2 and eight.figures == load_recipe(path).figures
    swept = load_recipe(path, groups=["sweep"])
    assert len(swept.entries) == 8 and not swept.figures  # its figure is of an arm that is not there
    assert load_recipe(path, groups=["sw*", "W8A8"]).entries == load_recipe(path).entries
    assert recipe_of(swept.plain(), "again").entries == swept.entries
    with pytest.raises(ValueError, match="no group of arms is named 'w8a8'; known are 'W8A8', 'sweep'"):
        load_recipe(path, groups=["sweep", "w8a8"])


def test_a_recipe_is_made_again_from_its_table(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, WHOLE), quick=True)
    assert recipe_of(recipe.table, "again") == recipe
    small = load_recipe(written(tmp_path, WHOLE), stand_in=True)
    assert recipe_of(small.table, "again") == small


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('format = "iec-bench"', 'format = "bench"', r"format: found 'bench', expected \"iec-bench\""),
        ("version = 1", "version = 2", "version: found 2, this release reads 1"),
        ('title = "Table', 'titel = "Table', "unknown key titel; did you mean title"),
        ("[model]", "[modle]", "unknown key modle; did you mean model"),
        ('name = "fashion-mnist"\n\n[cond', 'nam = "x"\n\n[cond', r"model: unknown key nam; did you mean name"),
        ("num = 2000", 'num = "many"', r"run\.num: found 'many', expected a whole number"),
        ("num = 2000", "num = true", r"run\.num: found True"),
        ("num = 2000", "num = 0", r"run: num is 0, expected at least 1"),
        ("num = 2000", "number = 2000", r"run: unknown key number; did you mean num\b"),
        ("draws = 50", "draws = 0.5", r"metrics\.draws: found 0\.5"),
        ('names = ["fid"', 'names = [1, "fid"', r"metrics\.names: found .*, expected a list of text"),
        ("draws = 50", "draws = 1", r"metrics: draws is 1, expected at least 2"),
        ("draws = 50", "draws = 50\nseed = -1", r"metrics: seed is -1, expected 0 or more"),
        ('"rmse_fine"', '"rmse_fien"', r"metrics\.names: rmse_fien: a recipe's targets are fine and full"),
        ('"rmse_fine"', '"rsme_fine"', r"metrics\.names: unknown metric 'rsme_fine'"),
        ("num_inference_steps = 300", "steps = 300", r"references\.fine: unknown key steps"),
        ('quant = "w8a8"\npaper', 'quant = "w9a9"\npaper', r"arm\[0\] 'W8A8': quant is 'w9a9', expected"),
        ('quant = "w8a8"\npaper', 'qant = "w8a8"\npaper', r"arm\[0\] 'W8A8': unknown key qant; did you mean quant"),
        ('steps = "all"', 'steps = "al"', r"arm\[1\] 'W8A8 \+ IEC': "),
        ("fid = 3.76", 'fid = "3.76"', r"arm\[1\] .*paper\.fid: found '3\.76', expected the paper's number"),
        ('name = "W8A8 + IEC"', 'name = "W8A8"', "two arms of group 'W8A8' are named 'W8A8'"),
        ('"deepcache:10"]', '"deepcash:10"]', r"sweep\[0\] .*cache 'deepcash:10' is not understood"),
        ("{cache}, {num", "{cash}, {num", r"sweep\[0\] .*no field 'cash'"),
        ('kind = "error"', 'kind = "errors"', r"figure\[0\]\.kind: found 'errors', expected one of 'spectral'"),
        ('arm = "W8A8 + IEC"', 'arm = "W8A8 + ICE"', r"figure\[0\]: no arm is named 'W8A8 \+ ICE'"),
        (
            "num_samples = 32",
            "num_samples = 32\nseed = 1000",
            r"calibration\.seed: .* among the 2000 evaluated from 5 on",
        ),
        ("fine = {", "fein = {", r"references: unknown key fein; did you mean fine"),
        ("fine = { num_inference_steps = 300, num = 150 }", "", r"metrics\.names: rmse_fine needs references\.fine"),
        ("num = 8, num_inf", "nmu = 8, num_inf", r"with \[quick\]\.run: unknown key nmu"),
        ("draws = 20 }", "draws = 20 }\nmodel = { name = 'x' }", r"quick: unknown key model"),
        ('arms = ["W8A8*"]', 'arms = ["W9*"]', r"with \[quick\]: no \[\[arm\]\] and no \[\[sweep\]\]"),
        ('model = "ddpm"', "model = 3", r"stand_in\.model: found 3, expected text"),
        ("[[figure]]", "[figure]", r"figure: expected \[\[figure\]\], a list of tables"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_mistakes_are_told_with_file_and_key(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert old in WHOLE
    path = written(tmp_path, WHOLE.replace(old, new, 1))
    with pytest.raises(ValueError, match=told) as error:
        load_recipe(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("no-such", "no bench recipe 'no-such'; bundled are "),
        ("no/such.toml", "recipe no/such.toml not found"),
    ],
)
def test_a_recipe_that_is_not_there(given: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        load_recipe(given)


def test_broken_toml_and_missing_tables(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no valid TOML: .*line 2"):
        load_recipe(written(tmp_path, "version = 1\nformat =" + " x\n"))
    with pytest.raises(ValueError, match=r"no table \[quick\], which --quick lays over the others"):
        load_recipe(written(tmp_path, SMALL), quick=True)
    with pytest.raises(ValueError, match=r"num_inference_steps missing, here and in \[run\]"):
        load_recipe(written(tmp_path, SMALL.replace("num_inference_steps = 5", "")))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot be read"):
        load_recipe(tmp_path / "bytes.toml")


def defaults(tmp_path: Path) -> Recipe:
    return load_recipe(written(tmp_path, SMALL))


def test_what_a_small_recipe_leaves_out(tmp_path: Path) -> None:
    recipe = defaults(tmp_path)
    assert recipe.fine is None and recipe.references.full and recipe.metrics.names == ("rmse_full",)
    assert recipe.conditions == {} and not recipe.controls.enabled and recipe.stand_in is None


@pytest.mark.parametrize("name", bundled_recipes())
def test_bundled_recipes_are_recipes(name: str) -> None:
    text = (resources.files("iec") / "recipes" / "bench" / f"{name}.toml").read_text(encoding="utf-8")
    assert load_recipe(name).entries
    for flag in ("quick", "stand_in"):
        if f"\n[{flag}" in text:
            assert load_recipe(name, **{flag: True}).entries
