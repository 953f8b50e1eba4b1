"""Sampling at scale: the same images by any number of workers, killed or not; what is kept and refused; the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from iec.cli.app import app
from iec.evaluate.arms import Arm, prepared
from iec.evaluate.conditions import Conditions
from iec.evaluate.held import HELD
from iec.evaluate.memory import peak_memory
from iec.evaluate.sampling import sample
from iec.evaluate.scale import Sampling, keep, sample_shard, sample_shards
from iec.evaluate.shards import ShardSet
from iec.evaluate.workers import TaskErrors, run_tasks
from quantized import calibration
from test_workers import kill_the_other
from tiny import CASES

PLAIN = Arm("plain", "plain", 3)
IEC = Arm("IEC", "corrected", 3, steps="all")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny models by name."""
    root = tmp_path_factory.mktemp("models")
    for name in ("ddim", "dit"):
        CASES[name].build().save_pretrained(root / name, safe_serialization=True)
    return {name: str(root / name) for name in ("ddim", "dit")}


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    yield
    HELD.release()


def sampling(model: str, arm: Arm = IEC, **options: Any) -> Sampling:
    return Sampling(arm, model, **{"batch_size": 2, "device": "cpu", **options})


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_images_are_those_of_the_pipeline_shard_by_shard(models: dict[str, str], tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    done = sample_shards(
        sampling(models["ddim"]),
        tmp_path,
        8,
        model="m",
        seed=5,
        size=3,
        workers=0,
        progress=lambda *counts: told.append(counts),
    )
    assert told == [(0, 8), (3, 8), (6, 8), (8, 8)]
    pipe = CASES["ddim"].build()
    with prepared(pipe, IEC) as ready:
        expected = [sample(ready, range(5 + start, min(8 + start, 13)), 3, 2) for start in (0, 3, 6)]
    assert torch.equal(done.shards.images(), torch.cat(expected))
    assert (done.made, done.evaluations, done.reused) == (3, (2 + 2 + 1) * 6, 0)
    assert [int(arrays["evaluations"]) for _, arrays in done.shards.parts()] == [12, 12, 6]
    assert len(done.seconds) == 3 and min(done.seconds) > 0
    assert 10**8 < done.peak_memory < 10**11
    again = sample_shards(sampling(models["ddim"]), tmp_path, 8, model="m", seed=5, size=3, workers=0)
    assert again.made == again.evaluations == 0


def test_reused_passes_are_counted_and_arms_taken_off(models: dict[str, str], tmp_path: Path) -> None:
    """One worker does shards of several arms in turn; each is as if it had been alone."""
    cached = Arm("cached", "corrected", 4, cache="deepcache:2", steps="refresh")  # pyright: ignore[reportArgumentType]
    alone: dict[str, bytes] = {}
    for arm in (PLAIN, cached):
        shards = sample_shards(
            sampling(models["ddim"], arm), tmp_path / arm.name, 4, model="m", size=2, workers=0
        ).shards
        alone |= {f"{arm.name} {name}": data for name, data in files(shards.folder).items()}
        counts = [int(arrays["reused"]) for _, arrays in shards.parts()]
        assert counts == ([2, 2] if arm is cached else [0, 0])
    sets = {
        arm.name: ShardSet(tmp_path / f"both {arm.name}", sampling(models["ddim"], arm).identity("m", 1), 4, 2)
        for arm in (PLAIN, cached)
    }
    tasks = {
        arm.name: sampling(models["ddim"], arm).tasks(sets[arm.name], prefix=f"{arm.name} ") for arm in (PLAIN, cached)
    }
    mixed = [task for pair in zip(*tasks.values(), strict=True) for task in pair]
    assert [task.key for task in mixed] == ["plain 0", "cached 0", "plain 2", "cached 2"]
    run_tasks(mixed, workers=0, done=lambda task, result: keep(sets[task.key.split()[0]], task, result))
    for arm in (PLAIN, cached):
        held = {f"{arm.name} {name}": data for name, data in files(tmp_path / f"both {arm.name}").items()}
        assert held == {key: data for key, data in alone.items() if key.startswith(arm.name)}


def test_conditions_are_those_of_the_number_of_the_image(models: dict[str, str], tmp_path: Path) -> None:
    conditions = Conditions({"class_labels": {"each": 2}, "guidance_scale": 1.0})
    made = sample_shards(
        sampling(models["dit"], PLAIN, conditions=conditions), tmp_path, 5, model="m", size=3, workers=0
    )
    pipe = CASES["dit"].build()
    parts = [
        sample(pipe, seeds, 3, 2, class_labels=labels, guidance_scale=1.0)
        for seeds, labels in ((range(3), [0, 0, 1]), (range(3, 5), [1, 2]))
    ]
    assert torch.equal(made.shards.images(), torch.cat(parts))
    other = sampling(models["dit"], PLAIN, conditions=Conditions({"class_labels": {"each": 3}}))
    with pytest.raises(ValueError, match=r"conditions: .* choose another folder"):
        sample_shards(other, tmp_path, 5, model="m", size=3, workers=0)


def test_a_quantized_arm_takes_its_calibration_from_the_files(models: dict[str, str], tmp_path: Path) -> None:
    made, arm = calibration("ddim", 3), Arm("W8A8", "corrected", 3, quant="w8a8", steps="all")
    made.save(tmp_path / "calibration")
    chosen = sampling(models["ddim"], arm, kernel="reference")
    done = sample_shards(chosen, tmp_path / "s", 3, model="m", size=2, calibration=tmp_path / "calibration", workers=0)
    with prepared(CASES["ddim"].build(), arm, made, "reference") as ready:
        expected = torch.cat([sample(ready, range(2), 3), sample(ready, [2], 3)])
    assert torch.equal(done.shards.images(), expected)
    assert done.shards.identity["calibration"] and done.shards.identity["kernel"] == "reference"
    with pytest.raises(ValueError, match=r"'W8A8' is quantized, .* so it needs a calibration"):
        sample_shards(chosen, tmp_path / "t", 3, model="m", workers=0)
    with pytest.raises(ValueError, match="holds no calibration"):
        sample_shards(chosen, tmp_path / "t", 3, model="m", calibration=tmp_path / "absent", workers=0)
    assert not (tmp_path / "t").exists()


def test_images_that_are_not_finite_are_told_and_others_made(models: dict[str, str], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    CASES["ddim"].build().save_pretrained(broken, safe_serialization=True)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.bias"] *= float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    bad, good = (ShardSet(tmp_path / name, {}, 4, 2) for name in ("bad", "good"))
    tasks = sampling(str(broken), PLAIN).tasks(bad, prefix="bad ") + sampling(models["ddim"], PLAIN).tasks(
        good, prefix="good "
    )
    with pytest.raises(TaskErrors, match=r"bad 0: RuntimeError: the images of seeds \[0, 1\] hold NaN"):
        run_tasks(tasks, workers=0, done=lambda task, result: keep(good, task, result))
    assert good.missing() == [] and len(bad.missing()) == 2


def test_models_and_dtypes_that_are_none(models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(TaskErrors, match="dtype is 'float33', expected float32"):
        sample_shards(sampling(models["ddim"], dtype="float33"), tmp_path / "a", 2, model="m", workers=0)
    with pytest.raises(TaskErrors, match="absent"):
        sample_shards(sampling(str(tmp_path / "absent")), tmp_path / "b", 2, model="m", workers=0)
    narrow = sample_shards(sampling(models["ddim"], dtype="float16"), tmp_path / "c", 2, model="m", workers=0)
    wide = sample_shards(sampling(models["ddim"]), tmp_path / "d", 2, model="m", workers=0)
    assert not torch.equal(narrow.shards.images(), wide.shards.images())


def test_a_model_can_be_sent_along(models: dict[str, str], tmp_path: Path) -> None:
    """As to the machines of a Ray cluster: the task does not say where the model lay."""
    shards = ShardSet(tmp_path, {}, 2, 2)
    (task,) = sampling(models["ddim"]).tasks(shards, ship=True)
    assert models["ddim"] not in json.dumps(task.arguments) and task.files == (Path(models["ddim"]),)
    (plain,) = sampling(models["ddim"]).tasks(shards)
    one, other = (sample_shard(each.arguments, each.files)["images"] for each in (task, plain))
    assert (one == other).all()


def test_two_workers_one_of_them_killed_make_the_same_files(models: dict[str, str], tmp_path: Path) -> None:
    """By a real SIGKILL, when the first shard is done, of the worker that has another one under way."""
    chosen, marks = sampling(models["ddim"]), tmp_path / "marks"
    lost: list[tuple[str, str]] = []
    killed: list[tuple[int, str]] = []
    sample_shards(chosen, tmp_path / "alone", 10, model="m", size=2, workers=0)
    shards = ShardSet(tmp_path / "killed", chosen.identity("m", 1), 10, 2)

    def done(task: Any, result: dict[str, Any]) -> None:
        if task.key == "0":
            killed.append(kill_the_other(marks))
        keep(shards, task, result)

    marks.mkdir()
    marked = [
        dataclasses.replace(
            task,
            function="workertasks:marked_shard",
            arguments={**task.arguments, "mark": str(marks), "key": task.key},
        )
        for task in chosen.tasks(shards)
    ]
    run_tasks(marked, workers=2, done=done, lost=lambda task, why: lost.append((task.key, why)))
    (pid, key), *more = killed
    assert not more and [each for each, _ in lost] == [key] and f"worker {pid} was ended by SIGKILL" in lost[0][1]
    assert files(tmp_path / "killed") == files(tmp_path / "alone")


def test_peak_memory_is_of_the_block_alone() -> None:
    with peak_memory() as small:
        pass
    with peak_memory() as large:
        held = torch.ones(64 * 2**20, dtype=torch.uint8)
    del held
    with peak_memory() as after:
        pass
    assert 60 * 2**20 < large.bytes - small.bytes < 80 * 2**20
    assert after.bytes < large.bytes - 60 * 2**20, "memory given back is not of the next shard"


# --- the command line -------------------------------------------------------------------------------------------------


def iec(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_makes_shards_and_goes_on(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ("sample", models["ddim"], "--num-inference-steps", 3, "--shards", "s", "--shard-size", 2, "--workers", 0)
    first = iec(*common, "--num", 3, "--steps", "all", "--relax", "paper", "--save-images", "each")
    assert first.exit_code == 0, first.output
    assert first.stdout.splitlines()[0].startswith("3 images in 2 shards, 12 evaluations, ")
    assert first.stdout.splitlines()[1:] == ["s", "out/samples.png"]
    assert len(list((tmp_path / "each").iterdir())) == 3
    second = iec(*common, "--num", 6, "--steps", "all", "--relax", "paper", "--json", "--columns", 3)
    assert second.exit_code == 0, second.output
    told = json.loads(second.stdout)
    assert (told["made"], told["kept"], told["evaluations"], told["seeds"]) == (2, 1, 12, [0, 5])
    assert told["arm"] == {"num_inference_steps": 3, "steps": "all", "tol": 1e-5}
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.size == (3 * 66 + 2, 2 * 66 + 2)
    other = iec(*common, "--num", 6)
    assert other.exit_code == 2 and "another run (arm: " in other.stderr
    plain = iec("sample", models["ddim"], "--workers", 2, "--ray", "local")
    assert plain.exit_code == 2 and "--workers, --ray: for images in shards; add --shards DIR" in plain.stderr


def test_the_command_takes_conditions_per_image(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ("sample", models["dit"], "--num", 3, "--num-inference-steps", 2)
    assert iec(*common, "--class-label", "each:2", "--save-images", "a").exit_code == 0
    assert iec(*common, "--class-label", "each:2", "--save-images", "b", "--shards", "s", "--workers", 0).exit_code == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")
    bad = iec(*common, "--class-label", "some")
    assert bad.exit_code == 2 and "--class-label is 'some', expected a number, each:N or random:N" in bad.stderr


def test_an_interrupted_command_says_how_to_go_on(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("iec.evaluate.scale.run_tasks", interrupted)
    result = iec("sample", models["ddim"], "--shards", "s", "--num", 2)
    assert result.exit_code == 130 and "The same command goes on from what is in s." in result.stderr
