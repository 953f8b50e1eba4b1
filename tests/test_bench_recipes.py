"""The bundled bench recipes: the paper's values as printed, arms that belong together, stand-ins and quick versions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import iec
from iec.bench import standins
from iec.bench.recipe import Recipe, bundled_recipes, load_recipe
from iec.caches import CacheQuant
from iec.evaluate.metrics import inception_splits

# Table: group or arm → (FID without, FID with IEC), copied from the paper once more, not from the recipes.
QUANTIZED = {
    "cifar10": {"W8A8": (4.32, 3.76), "W4A8": (6.82, 5.96)},
    "church": {"W8A8": (3.57, 3.29), "W4A8": (6.27, 6.10)},
    "bedroom": {"W8A8": (8.97, 7.78)},
}
CACHED = {
    "cifar10": "3 4.70 3.96 5 5.73 4.83 10 9.74 7.77 15 17.21 14.58",
    "church": "3 5.10 4.73 5 6.74 6.00 10 14.81 13.17 15 25.27 22.42",
    "bedroom": "2 11.21 7.99 3 11.86 8.16 5 14.28 9.20 10 26.09 16.91",
}
CACHEQUANT = {
    ("cifar10", "W8A8"): "3 4.61 3.93 5 5.28 5.09 10 8.19 6.47 15 13.42 10.77",
    ("cifar10", "W4A8"): "3 7.27 6.42 5 8.15 6.90 10 11.36 10.69 15 16.76 15.50",
    ("church", "W8A8"): "3 3.66 3.39 5 3.71 3.24 10 5.54 4.25 15 9.47 6.90",
    ("church", "W4A8"): "3 7.08 6.85 5 7.24 6.79 10 10.75 9.69 15 13.28 11.50",
    ("bedroom", "W8A8"): "2 8.85 7.51 3 9.27 7.33 5 10.29 7.67 10 17.53 11.07",
}
IMAGENET = {
    "W8A8": "10 4.68 184.38 4.15 196.20 15 5.51 174.81 5.18 182.30 20 7.21 160.68 6.53 169.71",
    "W4A8": "10 6.90 158.27 6.50 161.86 15 9.40 139.64 8.66 144.41 20 12.65 124.13 11.10 130.01",
}
COCO = {
    "W8A8": "10 23.65 36.71 26.41 23.36 37.02 26.45 5 23.74 39.81 26.87 22.83 40.91 26.94",
    "W4A8": "10 26.63 34.57 26.23 24.82 36.18 26.25 5 23.85 39.53 26.78 23.80 40.27 26.80",
}
FULL = {"cifar10": 4.19, "church": 3.99, "bedroom": 3.37}
MODELS = tuple(FULL)


def rows(text: str, width: int) -> list[tuple[str, list[float]]]:
    """(N, values) of a text with `width` values after each N."""
    words = text.split()
    return [(words[i], [float(v) for v in words[i + 1 : i + 1 + width]]) for i in range(0, len(words), width + 1)]


def papers(recipe: Recipe, *metrics: str) -> dict[str, list[float]]:
    """The paper's values of every arm that has some, by its name."""
    return {e.arm.name: [e.paper[m] for m in metrics if m in e.paper] for e in recipe.entries if e.paper}


@pytest.mark.parametrize("model", MODELS)
def test_table_1_to_3_have_the_papers_values(model: str) -> None:
    quantized, cached, both = (papers(load_recipe(f"table{number}-{model}"), "fid") for number in (1, 2, 3))
    expected = {name: [value] for name, (value, _) in QUANTIZED[model].items()}
    expected |= {f"{name} + IEC": [value] for name, (_, value) in QUANTIZED[model].items()}
    assert {name: value for name, value in quantized.items() if "full precision" not in name} == expected
    expected = {}
    for interval, (without, corrected) in rows(CACHED[model], 2):
        expected |= {f"DeepCache N={interval}": [without], f"DeepCache N={interval} + IEC": [corrected]}
    assert {name: value for name, value in cached.items() if "full precision" not in name} == expected
    expected = {}
    for (of, bits), text in CACHEQUANT.items():
        for interval, (without, corrected) in rows(text, 2) if of == model else []:
            name = f"CacheQuant N={interval}, {bits}"
            expected |= {name: [without], f"{name} + IEC": [corrected]}
    assert {name: value for name, value in both.items() if "full precision" not in name} == expected
    for found in (quantized, cached, both):
        assert [value for name, value in found.items() if "full precision" in name] == [[FULL[model]]]


@pytest.mark.parametrize(("name", "text", "metrics"), [("imagenet", IMAGENET, 2), ("coco", COCO, 3)])
def test_table_4_has_the_papers_values(name: str, text: dict[str, str], metrics: int) -> None:
    found = papers(load_recipe(f"table4-{name}"), *("fid", "is", "clip")[:metrics])
    expected = {}
    for bits, line in text.items():
        for interval, values in rows(line, 2 * metrics):
            arm = f"CacheQuant N={interval}, {bits}"
            expected |= {arm: values[:metrics], f"{arm} + IEC": values[metrics:]}
    assert {arm: value for arm, value in found.items() if "full precision" not in arm} == expected


def test_parts_of_imagenets_inception_score_hold_all_classes() -> None:
    """A part of 5,000 images in the order of the classes holds 100 classes, so that its score cannot exceed 100."""
    recipe = load_recipe("table4-imagenet")
    labels = recipe.conditions_of(recipe.run.seed).of(range(recipe.run.num))["class_labels"]
    assert Counter(labels) == dict.fromkeys(range(1000), 50)
    assert all(len(set(labels[start:stop])) == 1000 for start, stop in inception_splits(recipe.run.num))


@pytest.mark.parametrize("name", ["table5-bundled", "table5-cifar10", "fig3-bundled", "fig3-cifar10"])
def test_table_5_has_the_papers_values(name: str) -> None:
    recipe = load_recipe(name)
    found = {entry.arm.steps: entry.paper["fid"] for entry in recipe.entries if entry.paper and entry.arm.steps}
    assert found == {
        "all": 3.76, "ends:1/4": 3.85, "ends:1/8": 3.86, "ends:1/10": 3.88, "ends:1/20": 3.97,
        "refresh": 7.77, "refresh&ends:1/4": 7.92, "refresh&ends:1/8": 9.31, "refresh&ends:1/10": 9.58,
        "refresh&ends:1/20": 9.55,
    }  # fmt: skip
    assert papers(recipe, "fid")["W8A8"] == [4.32] and papers(recipe, "fid")["DeepCache N=10"] == [9.74]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_bundled_tables_are_those_of_cifar_10(number: int) -> None:
    ours, theirs = load_recipe(f"table{number}-bundled"), load_recipe(f"table{number}-cifar10")
    assert sorted(papers(ours, "fid").values()) == sorted(papers(theirs, "fid").values())
    assert all(entry.paper["of"] == "CIFAR-10" for entry in ours.entries if entry.paper)
    assert not any("of" in entry.paper for entry in theirs.entries if entry.paper), "the model is the paper's"


@pytest.mark.parametrize("name", bundled_recipes())
def test_arms_stand_beside_what_they_are_compared_with(name: str) -> None:
    recipe = load_recipe(name)
    for entry in recipe.entries:
        if entry.arm.steps is None:
            continue
        bare = entry.arm.without_correction().plain()
        group = [other.arm.plain() for other in recipe.entries if other.group == entry.group]
        if name != "reviewers-bundled":  # some of its sweeps share the arms of others
            assert bare in group, entry.arm.name
    for entry in recipe.entries:
        if "cifar10" in name and entry.arm.cache is not None:
            assert entry.arm.cache.branch == 2  # the paper's third block from the end
        elif entry.arm.cache is not None:
            assert entry.arm.cache.branch == (
                None if recipe.calibration.bundled else 0
            )  # the bundled ones are of the default


@pytest.mark.parametrize("name", bundled_recipes())
def test_every_plan_corrects_something(name: str) -> None:
    versions = [version for version in ("quick", "stand_in") if version in load_recipe(name).table]
    for recipe in (load_recipe(name), *(load_recipe(name, **{version: True}) for version in versions)):
        corrects_something(recipe)


def corrects_something(recipe: Recipe) -> None:
    for arm in (entry.arm for entry in recipe.entries if entry.arm.steps):
        steps, refresh = arm.num_inference_steps, None
        if arm.cache is not None:  # what CacheQuant refreshes is known after its calibration, but always the first step
            refresh = (0,) if isinstance(arm.cache, CacheQuant) else arm.cache.plan(steps).refresh
        assert iec.plan.resolve(arm.steps, num_steps=steps, refresh=refresh).steps, arm.name


@pytest.mark.parametrize("name", [name for name in bundled_recipes() if name.endswith("-bundled")])
def test_bundled_recipes_have_a_quick_version(name: str) -> None:
    recipe, quick = load_recipe(name), load_recipe(name, quick=True)
    assert recipe.model.name == "fashion-mnist" and recipe.run.seed == 0
    assert quick.run.num <= 64 and quick.run.num_inference_steps is not None and quick.run.num_inference_steps <= 50
    calibrates = any(entry.arm.calibrated for entry in quick.entries) and not quick.calibration.bundled
    assert quick.calibration.num_samples <= 32 or not calibrates
    assert any(entry.arm.steps for entry in quick.entries), "there is nothing of IEC in it"


@pytest.mark.parametrize("name", [name for name in bundled_recipes() if not name.endswith("-bundled")])
def test_recipes_of_the_papers_models_have_a_stand_in(name: str) -> None:
    recipe, small = load_recipe(name), load_recipe(name, stand_in=True)
    assert small.stand_in is not None and small.stand_in.model in standins.names()
    assert small.run.num <= 8 and small.metrics.network is None
    assert any(entry.arm.steps for entry in small.entries)
    for entry in small.entries:
        if isinstance(entry.arm.cache, CacheQuant):
            assert 2 * entry.arm.cache.interval <= small.run.num_inference_steps
    schedulers = {"coco": None, "cifar10": "QuadraticDDIMScheduler"}
    assert recipe.run.scheduler == schedulers.get(name.partition("-")[2], "DDIMScheduler")


def test_every_table_and_figure_has_a_recipe() -> None:
    known = set(bundled_recipes())
    bundled = {f"table{n}-bundled" for n in range(1, 6)} | {f"fig{n}-bundled" for n in range(1, 4)}
    assert bundled | {"visual-bundled", "reviewers-bundled"} <= known
    assert {f"table{n}-{model}" for n in (1, 2, 3) for model in MODELS} <= known
    assert {"table4-imagenet", "table4-coco", "table5-cifar10", "fig1-cifar10", "fig2-cifar10", "fig3-cifar10"} <= known
    assert {"visual-church", "visual-bedroom", "visual-coco"} <= known


def test_the_reviewers_questions_are_all_there() -> None:
    arms = [entry.arm for entry in load_recipe("reviewers-bundled").entries]
    assert {arm.num_inference_steps for arm in arms} >= {10, 20, 50, 100, 200}
    assert {arm.eta for arm in arms} == {0, 0.5, 1}
    assert {len(arm.relax) for arm in arms} == {1, 2, 3}
    assert {arm.relax[0] for arm in arms if len(arm.relax) == 1} == {round(0.1 * k, 1) for k in range(1, 11)}
    steps = {arm.steps for arm in arms if arm.quant}
    assert steps >= {"all", "ends:1/4", "ends:1/8", "ends:1/10", "ends:1/20", "first:1/10", "last:1/10"}


def test_recipes_lie_at_the_root_too() -> None:
    root = Path(__file__).parent.parent / "recipes"
    assert sorted(path.stem for path in root.glob("*.toml")) == list(bundled_recipes())
