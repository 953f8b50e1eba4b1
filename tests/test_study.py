"""Errors along trajectories, growth, the split of the error, residuals: measured on models of which they are known."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import iec
from iec.analysis.course import follow, parts
from iec.analysis.growth import growth
from iec.analysis.split import split, totals
from iec.analysis.spread import geometric, mean, quartiles
from iec.analysis.study import KINDS, SAMPLES, Study, analyse
from iec.analysis.trajectory import errors, residuals
from iec.caches import DeepCache
from iec.evaluate.sampling import with_scheduler
from iec.pipeline.installation import installed
from planted import chaotic, coefficients, pipeline

T = 10
ALL = {"steps": "all", "relax": (0.5,)}


def linear(gain: float = 0.4) -> Any:
    """ε = gain · x: a step multiplies x, and an error in it, by A + B · gain."""
    return pipeline(lambda x, t: gain * x)


def bent(offset: float = 0.0, size: int = 8) -> Any:
    """A denoiser that is no line, with a constant error."""
    return pipeline(lambda x, t: torch.tanh(0.7 * x + 0.1) + offset, size)


def of(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    assert found, f"no rows of {wanted}"
    return found


# --- spread ----------------------------------------------------------------------------------------------------------


def test_means_and_their_intervals() -> None:
    assert mean(torch.tensor([1.0, 3.0])) == (2.0, pytest.approx(1.0))
    assert mean(torch.tensor([5.0])) == (5.0, None)
    found = geometric(torch.tensor([1.0, 4.0]))
    width = 2 * math.log(4) / 2  # two standard errors: the standard deviation of two is their distance over √2
    assert found.value == pytest.approx(2) and found.high == pytest.approx(2 * math.exp(width))
    assert found.low == pytest.approx(2 * math.exp(-width))
    assert geometric(torch.tensor([0.0, 4.0])) == (0.0, None, None)
    assert quartiles(torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0])) == (3.0, 2.0, 4.0)
    with pytest.raises(ValueError, match="no factors"):
        geometric(torch.tensor([1.0, math.nan]))


# --- errors along the trajectory ------------------------------------------------------------------------------------


def test_the_same_model_makes_no_error() -> None:
    rows = errors(bent(), bent(), [1, 2, 3], T, 2)
    assert len(rows) == 2 * T and {row["num"] for row in rows} == {3}
    assert all(row["rms"] == 0 and row["relative"] == 0 for row in rows)


def test_errors_of_a_constant_offset_are_those_of_the_formula() -> None:
    """ε̃ = g x + o: the local error is B o; the accumulated one follows δ ← (A + B g) δ + B o."""
    gain, offset = 0.4, 0.01
    full, efficient = linear(gain), pipeline(lambda x, t: gain * x + offset)
    rows = errors(full, efficient, [1, 2], T, 2, correction=ALL)
    steps = coefficients(full, T)
    accumulated = corrected = 0.0
    for step, (a, b) in enumerate(steps):
        accumulated = (a + b * gain) * accumulated + b * offset
        [local] = of(rows, error="local", corrected=False, step=step)
        [whole] = of(rows, error="accumulated", corrected=False, step=step)
        assert local["rms"] == pytest.approx(abs(b) * offset, rel=1e-4)
        assert whole["rms"] == pytest.approx(abs(accumulated), rel=1e-4)
        # IEC takes the same offset twice, so that from its own course in full precision it is off by B o, and what grows of it.
        corrected = a * corrected + b * (
            0.5 * (gain * corrected) + 0.5 * gain * ((a + b * gain) * corrected + b * offset) + offset
        )
        [against] = of(rows, error="accumulated", corrected=True, against="full + IEC", step=step)
        assert against["rms"] == pytest.approx(abs(corrected), rel=1e-4)
        [ratio] = of(rows, error="accumulated", corrected=True, against="full", model="efficient", step=step)
        assert ratio["ratio"] == pytest.approx(ratio["rms"] / whole["rms"], rel=0.2)


def test_curves_steps_and_units_of_the_errors() -> None:
    rows = errors(bent(), bent(0.02), [1, 2, 3], T, 2, correction=ALL, local=False)
    curves = dict.fromkeys((row["model"], row["corrected"], row["against"], row["error"]) for row in rows)
    assert list(curves) == [
        ("efficient", False, "full", "accumulated"),
        ("efficient", True, "full", "accumulated"),
        ("full", True, "full", "accumulated"),
        ("efficient", True, "full + IEC", "accumulated"),
    ]
    first = of(rows, model="efficient", corrected=False)
    assert [row["step"] for row in first] == list(range(T)) and first[0]["timestep"] == 999
    assert first[0]["ratio"] is None and of(rows, model="efficient", corrected=True)[0]["ratio"] is not None


def test_results_do_not_depend_on_the_batches() -> None:
    once = errors(bent(), bent(0.02), [1, 2, 3, 4], T, 4, correction=ALL)
    apart = errors(bent(), bent(0.02), [1, 2, 3, 4], T, 3, correction=ALL)
    for one, other in zip(once, apart, strict=True):
        assert {**one} == {
            key: pytest.approx(value, rel=1e-9) if isinstance(value, float) else value for key, value in other.items()
        }


def test_pipelines_are_left_as_they_were() -> None:
    full, efficient = bent(), bent(0.02)
    before = [follow(pipe, parts(pipe, [1], T, 1, {})[0]).states for pipe in (full, efficient)]
    analyse(full, efficient, kinds=("error", "growth", "split", "residuals"), num=2, num_inference_steps=T)
    for pipe, states in zip((full, efficient), before, strict=True):
        assert installed(pipe) is None and "forward" not in vars(pipe.unet)
        assert torch.equal(follow(pipe, parts(pipe, [1], T, 1, {})[0]).states, states)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (lambda pipe: (pipe, pipe))(bent()), "is the efficient one"),
        (
            lambda: (lambda pipe: (pipe, type(pipe)(pipe.unet, pipe.scheduler)))(bent()),
            "both pipelines have the same unet",
        ),
        (lambda: (_enabled(bent()), bent()), "is quantized, cached or corrected"),
        (lambda: (bent(), _enabled(bent())), "IEC is enabled on this pipeline"),
        (lambda: (bent(), pipeline(lambda x, t: x, timestep_spacing="leading")), "different timesteps"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        errors(*make(), [1], T)


def _enabled(pipe: Any) -> Any:
    iec.enable(pipe, steps="all")
    return pipe


# --- growth ---------------------------------------------------------------------------------------------------------


def test_growth_of_a_linear_denoiser_is_the_product_of_the_norms() -> None:
    gain = 0.4
    pipe = linear(gain)
    steps = coefficients(pipe, T)
    norms = {step: abs(a + b * gain) for step, (a, b) in enumerate(steps)}
    rows = growth(pipe, [1, 2], T, 2, directions=("random",), after=(0, 4), correction=ALL, bound=norms)
    for after in (0, 4):
        product = corrected = 1.0
        for row in of(rows, after=after, corrected=False):
            a, b = steps[row["step"]]
            product *= 1.0 if row["step"] == after else norms[row["step"]]
            assert row["growth"] == pytest.approx(product, rel=1e-4)
            assert row["bound"] == pytest.approx(product, rel=1e-12)
        for row in of(rows, after=after, corrected=True):
            a, b = steps[row["step"]]
            plain = a + b * gain
            corrected *= 1.0 if row["step"] == after else 0.5 * plain + 0.5 * (a + b * gain * plain)
            assert row["growth"] == pytest.approx(corrected, rel=1e-4) and row["bound"] is None


def test_growth_along_the_error_follows_its_own_direction() -> None:
    """Two channels that grow differently: an error in the second one grows as that does, a random one as a mixture."""
    gains = torch.tensor([0.1, 0.9], dtype=torch.float64).view(1, 2, 1, 1)
    only = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 2, 1, 1)
    full, efficient = pipeline(lambda x, t: gains * x), pipeline(lambda x, t: gains * x + 0.01 * only)
    rows = growth(full, [1, 2], T, 2, efficient=efficient, after=(0,))
    steps = coefficients(full, T)[1:]
    products = [math.prod(a + b * gain for a, b in steps) for gain in (0.1, 0.9)]
    assert products[0] > 1.5 * products[1]
    assert of(rows, direction="error", step=T - 1)[0]["growth"] == pytest.approx(products[1], rel=1e-4)
    mixed = of(rows, direction="random", step=T - 1)[0]["growth"]
    assert mixed == pytest.approx(math.sqrt((products[0] ** 2 + products[1] ** 2) / 2), rel=0.1)


def test_growth_does_not_depend_on_batches_nor_on_other_places() -> None:
    once = growth(bent(), [1, 2, 3], T, 3, directions=("random",), after=(2,))
    apart = growth(bent(), [1, 2, 3], T, 2, directions=("random",), after=(1, 2))
    for one, other in zip(once, of(apart, after=2), strict=True):
        assert one["growth"] == pytest.approx(other["growth"], rel=1e-9)


def test_what_cannot_be_injected_is_refused() -> None:
    for arguments, message in (
        ({"directions": ("random",), "after": (T,)}, r"after is \[10\], expected steps in 0 … 9"),
        ({"directions": ("up",)}, "expected some of random, error"),
        ({"directions": ("error",)}, "give one"),
        ({"directions": ("random",), "size": 0.0}, "size is 0.0"),
        ({"efficient": bent(), "directions": ("error",)}, "makes no error at all"),
    ):
        with pytest.raises(ValueError, match=message):
            growth(bent(), [1], T, **arguments)


# --- the split ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0.0, 0.3, 1.0])
def test_the_split_recovers_a_planted_share(shared: float) -> None:
    """e(x) = √c u + √(1−c) n(x), u fixed and n another at every x: c is found, and averaging leaves (1 + c)/2."""
    size = 16
    fixed = torch.randn(1, 2, size, size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    fixed = fixed / fixed.square().mean().sqrt()

    def wrong(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(0.7 * x + 0.1) + 0.02 * (shared**0.5 * fixed + (1 - shared) ** 0.5 * chaotic(x))

    rows = split(bent(size=size), pipeline(wrong, size), range(4), 5, 4, distances=(0.01,))
    found = totals(rows)
    assert set(found) == {("estimate", None), ("random", None), ("random", 0.01)}
    for point in found.values():
        assert point["correlation"] == pytest.approx(shared, abs=0.04)
        assert point["kept"] == pytest.approx((1 + shared) / 2, abs=0.04)
    assert of(rows, nominal=0.01)[0]["distance"] == pytest.approx(0.01, rel=1e-6)
    for row in of(rows, point="estimate"):
        [beside] = of(rows, point="random", nominal=None, step=row["step"])
        assert beside["distance"] == pytest.approx(row["distance"], rel=1e-6)


def test_what_averaging_leaves_is_what_a_correction_leaves() -> None:
    """The algebra of the docstring, against a step with IEC: the error beside full precision's own corrected step."""
    full, efficient = bent(), pipeline(lambda x, t: torch.tanh(0.7 * x + 0.1) + 0.02 * chaotic(x))
    [row] = [r for r in split(full, efficient, [3], T, 1, distances=(), steps=(0,)) if r["point"] == "estimate"]
    [part] = parts(full, [3], T, 1, {})
    [plain, corrected] = [part.record(efficient)[0], None]
    with iec.enable(efficient, **ALL):
        corrected = part.record(efficient)[0]
    b = coefficients(full, T)[0][1]
    exact = full.unet.epsilon
    before = plain.denoise(plain.x) - exact(plain.x, 0)
    ideal = plain.a * plain.x + b * (exact(plain.x, 0) + exact(plain.y, 0)) / 2
    left = (corrected.y - ideal) / b
    assert row["kept"] == pytest.approx((left.norm() / before.norm()).square().item(), rel=1e-3)


def test_the_split_does_not_depend_on_how_a_scheduler_scales_inputs() -> None:
    """Euler takes DDIM's steps in other coordinates: a correction evaluates its model at the same inputs, as far apart."""
    models = bent(), pipeline(lambda x, t: torch.tanh(0.7 * x + 0.1) + 0.02 * torch.sin(3 * x))
    ddim = split(*models, [1, 2], T, 2, distances=(0.03,))
    euler = split(*(with_scheduler(pipe, "EulerDiscreteScheduler") for pipe in models), [1, 2], T, 2, distances=(0.03,))
    for row, expected in zip(euler, ddim, strict=True):
        for name in ("distance", "error", "correlation", "kept"):
            assert row[name] == pytest.approx(expected[name], rel=1e-2, abs=1e-2), (name, row)


def test_whole_passes_of_a_cache_have_no_error_to_split() -> None:
    full, efficient = iec_tiny(), iec_tiny()
    iec.cache(efficient, DeepCache(interval=3))
    rows = split(full, efficient, [1, 2], 6, 2, distances=())
    assert sorted({row["step"] for row in rows}) == [1, 2, 4, 5]
    assert all(row["error"] > 1e-4 for row in rows)
    assert sorted({row["after"] for row in growth(full, [1], 6, 1, efficient=efficient)}) == [1, 4]


def iec_tiny() -> Any:
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    down, up = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 8), down_block_types=down, up_block_types=up, norm_num_groups=4)
    pipe = DDIMPipeline(unet.eval(), DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- residuals ------------------------------------------------------------------------------------------------------


def test_residuals_of_a_linear_denoiser_contract_by_the_norm() -> None:
    """G(y) = (1−λ) y + λ (A x + B g y) contracts by (1−λ) + λ B g."""
    gain = 0.8
    pipe = linear(gain)
    rows = residuals({"model": pipe}, [1, 2], T, 1, correction={"steps": "ends:2", "relax": (0.5, 0.5, 0.5)})
    steps = coefficients(pipe, T)
    assert sorted({row["step"] for row in rows}) == [0, 1, 8, 9] and len(rows) == 12
    for step in (0, 1, 8, 9):
        first, second, third = of(rows, step=step)
        a, b = steps[step]
        assert first["residual"] == pytest.approx(abs(b * gain * (1 - 1 / (a + b * gain))), rel=1e-4)
        expected = abs(0.5 + 0.5 * b * gain)
        assert first["contraction"] is None
        assert second["contraction"] == pytest.approx(expected, rel=1e-5)
        assert third["contraction"] == pytest.approx(expected, rel=1e-5)


# --- the study ------------------------------------------------------------------------------------------------------


def test_a_study_is_saved_drawn_and_read_again(tmp_path: Path) -> None:
    few = {"spectral": {"relax": (0.5,), "iterations": 8}, "growth": {"after": (0, 2)}, "split": {"steps": (0, 3)}}
    study = analyse(
        bent(size=4), bent(0.02, 4), num=2, num_inference_steps=5, about={"title": "a test"}, batch_size=2, options=few
    )
    paths = study.save(tmp_path)
    assert sorted(path.name for path in paths) == sorted(
        f"{kind}.{end}" for kind in KINDS for end in ("json", "csv", "png")
    )
    for kind in KINDS:
        with Image.open(tmp_path / f"{kind}.png") as picture:
            assert picture.format == "PNG" and picture.width >= 1000
        rows = list(csv.DictReader((tmp_path / f"{kind}.csv").read_text(encoding="utf-8").splitlines()))
        assert len(rows) == len(study.rows[kind]) and list(rows[0]) == list(study.rows[kind][0])
        json.loads((tmp_path / f"{kind}.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    again = Study.load(tmp_path)
    assert again.rows == json.loads(json.dumps(study.rows)) and again.about == study.about
    bounded = of(study.rows["growth"], corrected=False)
    assert all(row["bound"] >= 0.99 * row["growth"] for row in bounded)  # the product of the norms is a bound


def test_a_study_goes_on_where_it_stopped(tmp_path: Path) -> None:
    full, efficient = bent(size=4), bent(0.02, 4)
    common: dict[str, Any] = {"num": 2, "num_inference_steps": 3, "folder": tmp_path}
    first = analyse(full, efficient, kinds=("error",), **common)
    evaluated = []
    full.unet.register_forward_hook(lambda *_: evaluated.append(1))
    (tmp_path / "error.png").unlink()
    second = analyse(full, efficient, kinds=("error",), **common)
    assert not evaluated and second.rows["error"] == json.loads(json.dumps(first.rows["error"]))
    assert (tmp_path / "error.png").is_file()
    with pytest.raises(ValueError, match="is of another study: correction differ"):
        analyse(full, efficient, kinds=("error",), correction={"steps": "ends:1"}, **common)
    (tmp_path / "error.json").write_text("{")
    with pytest.raises(ValueError, match="no analysis that this version can read"):
        analyse(full, efficient, kinds=("error",), **common)


def test_growth_is_measured_anew_when_its_bound_is_known(tmp_path: Path) -> None:
    few = {"spectral": {"relax": (0.5,), "iterations": 6}, "growth": {"after": (0,)}}
    common: dict[str, Any] = {"num": 2, "num_inference_steps": 3, "options": few}
    alone = analyse(bent(size=4), kinds=("growth",), folder=tmp_path, **common)
    assert all(row["bound"] is None for row in alone.rows["growth"])
    both = analyse(bent(size=4), kinds=("growth", "spectral"), folder=tmp_path, **common)
    assert both.rows["growth"] == analyse(bent(size=4), kinds=("growth", "spectral"), **common).rows["growth"]
    assert any(row["bound"] is not None for row in both.rows["growth"])
    # Without the norms the growth that has a bound stays; with other norms it is measured beside those.
    assert analyse(bent(size=4), kinds=("growth",), folder=tmp_path, **common).rows["growth"] == json.loads(
        json.dumps(both.rows["growth"])
    )
    finer = {**few, "spectral": {"relax": (0.5,), "iterations": 1}}
    (tmp_path / "spectral.json").unlink()
    (tmp_path / SAMPLES).unlink()
    again = analyse(bent(size=4), kinds=("growth", "spectral"), folder=tmp_path, **{**common, "options": finer})
    assert again.rows["growth"] != both.rows["growth"]
    with pytest.raises(ValueError, match=r"growth\.json is of another study: num differ"):
        analyse(bent(size=4), kinds=("growth",), folder=tmp_path, **{**common, "num": 1})


def test_norms_go_on_in_the_middle_of_a_torn_line(tmp_path: Path) -> None:
    pipe = bent(size=4)
    common: dict[str, Any] = {"kinds": ("spectral",), "num": 2, "num_inference_steps": 3, "batch_size": 1}
    common["options"] = {"spectral": {"relax": (0.5,), "iterations": 6}}
    whole = analyse(pipe, folder=tmp_path / "whole", **common)
    lines = (tmp_path / "whole" / SAMPLES).read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 2 * 3
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / SAMPLES).write_text("".join(lines[:8]) + lines[8][:20])
    found: list[int] = []
    again = analyse(pipe, folder=tmp_path / "torn", progress=lambda _, done, total: found.append(done), **common)
    assert again.rows == whole.rows and found == [4, 5, 6]
    assert sorted((tmp_path / "torn" / SAMPLES).read_text().splitlines(keepends=True)) == sorted(lines)
    (tmp_path / "torn" / "spectral.json").unlink()
    with pytest.raises(ValueError, match="is of another study"):
        analyse(pipe, folder=tmp_path / "torn", **{**common, "num": 1})


def test_kinds_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for arguments, message in (
        ({"kinds": ("speed",)}, "expected some of spectral, error"),
        ({"kinds": ()}, "expected some of"),
        ({"kinds": ("residuals",), "options": {"splits": {}}}, "expected some of"),
        ({"kinds": ("error", "residuals")}, "error compares an efficient model with full precision"),
    ):
        with pytest.raises(ValueError, match=message):
            analyse(bent(), num=1, **arguments)
    with pytest.raises(ValueError, match="no study here"):
        Study.load(tmp_path)


def test_refresh_steps_of_a_cache_are_meant_for_both_models() -> None:
    full, efficient = iec_tiny(), iec_tiny()
    iec.cache(efficient, DeepCache(interval=3))
    refreshed = {"steps": "refresh", "relax": (0.5,)}
    rows = errors(full, efficient, [1], 6, 1, correction=refreshed)
    same = errors(full, efficient, [1], 6, 1, correction={"steps": (0, 3), "relax": (0.5,)})
    assert rows == same
    ideal = [row["rms"] for row in of(rows, model="full", error="local")]
    assert [value > 0 for value in ideal] == [step in (0, 3) for step in range(6)]
    assert growth(full, [1], 6, 1, efficient=efficient, after=(1,), correction=refreshed)
