"""The bench: the same lines whoever works, however often it is killed; and what happens when something is wrong."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from rich.console import Console
from typer.testing import CliRunner

from iec.bench import runner
from iec.bench.board import Board, Standing
from iec.bench.recipe import Recipe, recipe_of
from iec.bench.runner import Outcome, Workers, bench
from iec.cli.app import app
from iec.cli.bench import drawn
from iec.evaluate import workers
from iec.evaluate.shards import ShardSet

ARMS = (
    {"name": "DDIM", "group": "full precision"},
    {"name": "DDIM + IEC", "group": "full precision", "steps": "all"},
    {"name": "DeepCache + IEC", "group": "caches", "cache": "deepcache:2", "steps": "refresh", "paper": {"fid": 3.9}},
    {"name": "W8A8", "group": "W8A8", "quant": "w8a8"},
)
METRICS = ["fid", "kid", "is", "rmse_fine", "rmse_full", "psnr_full"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    down, up = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 8), down_block_types=down, up_block_types=up, norm_num_groups=4)
    folder = tmp_path_factory.mktemp("model")
    pipe = DDIMPipeline(unet.eval(), DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def table(model_folder: Path, *arms: dict[str, Any], **tables: Any) -> dict[str, Any]:
    return {
        "format": "iec-bench",
        "version": 1,
        "title": "A test",
        "model": {"name": str(model_folder)},
        "run": {"num": 5, "shard": 2, "batch_size": 2, "num_inference_steps": 3, "device": "cpu"},
        "calibration": {"num_samples": 2, "batch_size": 2},
        "references": {"fine": {"num_inference_steps": 6, "num": 3}},
        "metrics": {"network": "fashion-mnist", "names": METRICS, "draws": 10},
        "arm": list(arms or ARMS),
        **tables,
    }


def recipe(model_folder: Path, *arms: dict[str, Any], **tables: Any) -> Recipe:
    return recipe_of(table(model_folder, *arms, **tables), "test")


def lines(folder: Path, file: str = "results.jsonl") -> list[dict[str, Any]]:
    path = folder / file
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def content(folder: Path, name: str = "results.jsonl") -> set[str]:
    """The results whatever their order."""
    return set((folder / name).read_text(encoding="utf-8").splitlines())


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome, float]:
    """A run that nothing happened to: its folder, what it did, its seconds."""
    folder = tmp_path_factory.mktemp("bench") / "finished"
    begun = time.perf_counter()
    outcome = bench(recipe(model), folder, workers=Workers(0), command=["iec", "bench", "test"])
    return folder, outcome, time.perf_counter() - begun


def test_a_run_leaves_results_times_and_a_report(finished: tuple[Path, Outcome, float]) -> None:
    folder, outcome, _ = finished
    assert not outcome.failed and not outcome.report.run.missing
    by_name = {line["name"]: line for line in lines(folder)}
    assert set(by_name) == {"fine: DPMSolverMultistep, 6 steps", "deepcache:2, 3 steps", *(arm["name"] for arm in ARMS)}
    plain, corrected, cached = (by_name[name] for name in ("DDIM", "DDIM + IEC", "DeepCache + IEC"))
    assert (plain["whole"], plain["reused"], plain["evaluations"]) == (3, 0, 3)
    assert (corrected["whole"], corrected["reused"], corrected["num"]) == (6, 0, 5)
    assert (cached["whole"], cached["reused"], cached["paper"]) == (4, 1, {"fid": 3.9})
    assert corrected["baseline"] == corrected["full"] == plain["cell"]
    assert set(corrected["metrics"]) == set(METRICS) == set(cached["differences"][cached["baseline"]])
    assert set(plain["metrics"]) == {"fid", "kid", "is", "rmse_fine"}  # it is its own full precision
    assert by_name["fine: DPMSolverMultistep, 6 steps"]["num"] == 3
    quantized = by_name["W8A8"]
    assert quantized["kernel"] and quantized["weights"] < plain["weights"] and plain["kernel"] is None
    difference = corrected["differences"][plain["cell"]]["fid"]
    assert difference["value"] == pytest.approx(corrected["metrics"]["fid"]["value"] - plain["metrics"]["fid"]["value"])
    assert plain["network"].startswith("fashion-mnist@")
    times = lines(folder, "timings.jsonl")
    assert sorted((line["cell"], line["start"]) for line in times) == sorted(
        (line["cell"], start) for line in lines(folder) for start in range(0, line["num"], 2)
    )
    assert all(line["seconds"] > 0 and line["peak_memory"] > 0 and line["threads"] == 1 for line in times)
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert about["command"] == ["iec", "bench", "test"] and about["recipe"]["run"]["num"] == 5
    assert recipe_of(about["recipe"], "again").entries == recipe_of(table(Path()), "test").entries
    assert {row["cell"] for row in about["cells"]} == {line["cell"] for line in lines(folder)}
    assert "DeepCache + IEC" in (folder / "report.md").read_text(encoding="utf-8")
    assert (folder / "report.html").is_file()


def test_metrics_are_those_of_the_images(finished: tuple[Path, Outcome, float]) -> None:
    folder = finished[0]
    by_name = {line["name"]: line for line in lines(folder)}

    def images(cell: str, count: int) -> np.ndarray:
        shards = [np.load(file)["images"] for file in sorted((folder / "cells" / cell).glob("shard-*.npz"))]
        return np.concatenate(shards)[:count].astype(float) / 255

    line = by_name["DDIM + IEC"]
    for target, count in (("full", 5), ("fine", 3)):
        errors = np.square(images(line["cell"], count) - images(line[target], count)).mean((1, 2, 3))
        assert line["metrics"][f"rmse_{target}"]["value"] == pytest.approx(np.sqrt(errors.mean()))


def test_what_is_done_is_not_done_again(
    model: Path, finished: tuple[Path, Outcome, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "copy")

    def none(tasks: list[Any], **_: Any) -> None:
        assert tasks == []

    monkeypatch.setattr(runner, "run_tasks", none)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jsonl")}
    assert not bench(recipe(model), folder, workers=Workers(0)).failed
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.jsonl")}


def test_real_images_are_looked_at_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    np.save(tmp_path / "real" / "real.npy", np.random.default_rng(0).integers(256, size=(6, 8, 8, 1), dtype=np.uint8))
    of_a_folder = recipe(
        model,
        {"name": "DDIM"},
        references={"data": str(tmp_path / "real" / "real.npy")},
        metrics={"network": "fashion-mnist", "names": ["fid", "kid"], "draws": 10},
    )
    assert not bench(of_a_folder, tmp_path / "run", workers=Workers(0)).failed
    monkeypatch.setattr("iec.evaluate.references.statistics_of_source", None)  # would be called, and fail
    assert not bench(of_a_folder, tmp_path / "run", workers=Workers(0)).failed


def test_what_another_run_has_made_is_taken_from_it(
    model: Path, finished: tuple[Path, Outcome, float], tmp_path: Path
) -> None:
    other = shutil.copytree(finished[0], tmp_path / "other")
    by_name = {line["name"]: line["cell"] for line in lines(other)}
    with open(other / "cells" / by_name["DDIM"] / "shard-00000002.npz", "r+b") as file:
        file.truncate(100)
    before = content(other)
    longer = recipe(
        model, *ARMS, {"name": "new", "quant": "w8a8", "steps": "all"}, run={**table(model)["run"], "num": 6}
    )
    told: list[str] = []
    taken = tmp_path / "taken"
    assert not bench(longer, taken, workers=Workers(0), reused=[other], board=Board(told=told.append)).failed
    # Of five arms two shards of two; the last shard is longer now, and one is damaged; of the fine solution 3 images.
    taken_images = 5 * 4 - 2 + 3
    assert told[0] == f"taken from {other}: {taken_images} images, 1 calibrations, 0 figures"
    assert not [text for text in told if text.startswith("the calibration")]
    old = {(line["cell"], line["start"]): line for line in lines(other, "timings.jsonl")}
    times = [line for line in lines(taken, "timings.jsonl") if old.get((line["cell"], line["start"])) == line]
    assert len(times) == 5 * 2 - 1 + 2
    fresh = tmp_path / "fresh"
    bench(longer, fresh, workers=Workers(0))
    assert content(fresh) == content(taken)
    assert content(other) == before
    with pytest.raises(
        ValueError, match=r"--reuse .*nowhere: no run\.json that can be read .*; give a folder that iec bench"
    ):
        bench(longer, tmp_path / "not begun", reused=[other, tmp_path / "nowhere"])
    assert not list((tmp_path / "not begun").glob("cells/*"))


def test_a_run_that_is_at_work_or_damaged_is_only_read(
    model: Path, finished: tuple[Path, Outcome, float], tmp_path: Path
) -> None:
    other = shutil.copytree(finished[0], tmp_path / "other")
    cells = {line["name"]: line["cell"] for line in lines(other)}
    (other / "cells" / cells["DDIM"] / "manifest.json").write_text("{")
    shutil.rmtree(next((other / "calibrations").iterdir()))
    with open(other / "timings.jsonl", "ab") as file:
        file.write(b'{"cell": "torn')
    about = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**about, "versions": {**about["versions"], "torch": "1.0"}}))
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    told: list[str] = []
    taken = tmp_path / "taken"
    assert not bench(recipe(model), taken, workers=Workers(0), reused=[other], board=Board(told=told.append)).failed
    assert told[0] == (
        f"taken from {other}: 23 images, 0 calibrations, 0 figures; not their seconds, as another machine or other versions "
        "made them"
    )
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before
    assert content(taken) == content(finished[0])
    assert {line["cell"] for line in lines(taken, "timings.jsonl")} == {cells["DDIM"]}
    # By the clock: the calibration, which came with no images to make, is made now.
    assert not (taken / "calibrations").exists()
    outcome = bench(recipe(model), taken, workers=Workers(0), rounds=1)
    assert not outcome.failed and len(lines(taken, "clock.jsonl")) == len(cells) - 1


def test_another_arm_and_more_images_go_on_from_what_is_there(
    model: Path, finished: tuple[Path, Outcome, float], tmp_path: Path
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    arms = (*ARMS[:3], {"name": "new", "group": "caches", "cache": "deepcache:3"})
    longer = recipe(model, *arms, run={**table(model)["run"], "num": 8})
    told: list[str] = []
    assert not bench(longer, folder, workers=Workers(0), board=Board(told=told.append)).failed
    by_name = {line["name"]: line for line in lines(folder)}
    assert by_name["DDIM"]["num"] == 8 and by_name["new"]["whole"] == 1 and "W8A8" not in by_name
    assert told == [
        "5 results of arms or options that this run does not have were set aside (results-earlier.jsonl)"
    ]  # the fine solution's are as before
    assert len(lines(folder, "results-earlier.jsonl")) == 5
    # Of the first two shards no image is made again.
    old, new = (lines(where, "timings.jsonl") for where in (finished[0], folder))
    kept = [line for line in old if line["cell"] == by_name["DDIM"]["cell"] and line["start"] < 4]
    assert kept and all(line in new for line in kept)
    fresh = tmp_path / "fresh"
    bench(longer, fresh, workers=Workers(0))
    assert content(fresh) == content(folder)


def test_a_part_of_the_groups_costs_the_others_nothing(
    model: Path, finished: tuple[Path, Outcome, float], tmp_path: Path
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    before = {name: content(folder, name) for name in ("results.jsonl", "timings.jsonl")}
    told: list[str] = []
    assert not bench(recipe(model, *ARMS[:2]), folder, workers=Workers(0), board=Board(told=told.append)).failed
    assert {line["name"] for line in lines(folder)} == {"fine: DPMSolverMultistep, 6 steps", "DDIM", "DDIM + IEC"}
    assert told == ["3 results of arms or options that this run does not have were set aside (results-earlier.jsonl)"]
    assert content(folder, "timings.jsonl") == before["timings.jsonl"]
    states: list[str] = []
    board = Board()
    board.changed = lambda: states.extend(standing.state for standing in board.standings.values())
    outcome = bench(recipe(model), folder, workers=Workers(0), board=board)
    assert set(states) == {"done"}, "nothing was made or measured again"
    assert {name: content(folder, name) for name in before} == before
    assert lines(folder, "results-earlier.jsonl") == []
    assert all(result.timing for result in outcome.report.run.entries)


def test_damaged_lines_are_mended(model: Path, finished: tuple[Path, Outcome, float], tmp_path: Path) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    for name in ("results.jsonl", "timings.jsonl"):
        first, second, *others = (folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join([first, second[:40] + "\n", *others]), encoding="utf-8")
    told: list[str] = []
    assert not bench(recipe(model), folder, workers=Workers(0), board=Board(told=told.append)).failed
    assert [line.partition(":")[0] for line in told] == ["results.jsonl", "timings.jsonl"]
    assert "left out line 2, damaged; results are measured again" in told[0]
    assert content(folder) == content(finished[0])
    assert len(lines(folder, "timings.jsonl")) == len(lines(finished[0], "timings.jsonl")) - 1


def test_the_number_of_workers_makes_no_difference(
    model: Path, finished: tuple[Path, Outcome, float], tmp_path: Path
) -> None:
    assert not bench(recipe(model), tmp_path / "many", workers=Workers(2)).failed
    assert content(tmp_path / "many") == content(finished[0])
    assert {line["workers"] for line in lines(tmp_path / "many", "timings.jsonl")} == {2}


def _child(given: dict[str, Any], folder: Path, number: int) -> None:
    bench(recipe_of(given, "test"), folder, workers=Workers(number))


class Killed:
    """Benches in processes of their own, each killed at a random moment; `seed` tells which moments these were."""

    def __init__(self) -> None:
        self.seed = time.time_ns()
        self.chance = random.Random(self.seed)
        self.context = multiprocessing.get_context("forkserver")
        # What takes seconds to import is imported once.
        self.context.set_forkserver_preload(["iec.bench.runner", "diffusers.pipelines.ddim.pipeline_ddim"])

    def run(self, given: dict[str, Any], folder: Path, number: int, shards: int, seconds: float) -> bool:
        """Run the bench, and kill it up to some seconds after it has made `shards` more shards; whether it was killed."""
        before = len(list(folder.glob("cells/*/shard-*.npz")))
        process = self.context.Process(target=_child, args=(given, folder, number))
        process.start()
        while process.is_alive() and len(list(folder.glob("cells/*/shard-*.npz"))) < before + shards:
            process.join(0.002)
        process.join(self.chance.uniform(0, seconds))
        if process.is_alive():
            process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), f"random moments of seed {self.seed}"
        return process.exitcode != 0


def test_killed_at_random_moments_it_ends_with_the_same_results(
    model: Path, finished: tuple[Path, Outcome, float], tmp_path: Path
) -> None:
    killed, folder, kills = Killed(), tmp_path / "killed", 0
    while kills < 8 and killed.run(table(model), folder, 0, killed.chance.randrange(3), 0.2 * finished[2]):
        kills += 1
    told = f"killed {kills} times at random moments of seed {killed.seed}"
    assert kills, told
    assert not bench(recipe(model), folder, workers=Workers(0)).failed
    assert content(folder) == content(finished[0]), told
    assert len(lines(folder)) == len(lines(finished[0])), told


@pytest.mark.parametrize("number", [1, 3])
def test_killed_with_workers_it_ends_with_the_same_results(
    model: Path, finished: tuple[Path, Outcome, float], tmp_path: Path, number: int
) -> None:
    killed, folder = Killed(), tmp_path / "killed"
    killed.run(table(model), folder, number, killed.chance.randrange(1, 12), 0.2)
    assert list(folder.glob("cells/*/shard-*.npz"))
    assert not bench(recipe(model), folder, workers=Workers(0)).failed
    assert content(folder) == content(finished[0]), f"random moments of seed {killed.seed}"


def test_results_that_cannot_be_written_to_are_kept_as_well(
    model: Path, finished: tuple[Path, Outcome, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frozen(value: Any) -> Any:  # as Ray hands them over
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
        for inner in value.values() if isinstance(value, dict) else ():
            frozen(inner)
        return value

    def run(tasks: Any, *, done: Any, **rest: Any) -> None:
        workers.run_tasks(tasks, done=lambda task, result: done(task, frozen(result)), **rest)

    monkeypatch.setattr(runner, "run_tasks", run)
    assert not bench(recipe(model), tmp_path / "run", workers=Workers(0)).failed
    assert content(tmp_path / "run") == content(finished[0])


def test_damaged_files_are_made_again(model: Path, finished: tuple[Path, Outcome, float], tmp_path: Path) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    shard = sorted(folder.glob("cells/*/shard-*.npz"))[3]
    shard.write_bytes(shard.read_bytes()[:100])
    statistics = sorted(folder.glob("cells/*/statistics-*/*.safetensors"))[5]
    statistics.write_bytes(b"")
    (only,) = folder.glob("calibrations/*")
    next(only.glob("*.safetensors")).write_bytes(b"")
    (folder / "results.jsonl").write_bytes((folder / "results.jsonl").read_bytes()[:-20])
    for file in folder.glob(f"cells/{lines(folder, 'timings.jsonl')[0]['cell']}/shard-00000002.npz"):
        file.unlink()
    with pytest.warns(RuntimeWarning, match="damaged shard .* made again"):
        assert not bench(recipe(model), folder, workers=Workers(0)).failed
    assert content(folder) == content(finished[0])
    assert len(lines(folder, "timings.jsonl")) == len(lines(finished[0], "timings.jsonl"))


def test_shards_of_different_kernels_are_told(
    model: Path, finished: tuple[Path, Outcome, float], tmp_path: Path
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    cell = {line["name"]: line["cell"] for line in lines(folder)}["W8A8"]
    shards = ShardSet.open(folder / "cells" / cell)
    shards.write(2, **{**shards.read(2), "kernel": np.array("another")})
    (folder / "results.jsonl").unlink()
    assert not bench(recipe(model), folder, workers=Workers(0)).failed
    line = {line["name"]: line for line in lines(folder)}["W8A8"]
    first = {line["name"]: line for line in lines(finished[0])}["W8A8"]["kernel"]
    assert line["kernel"] == f"another, {first}"
    assert line["notes"] == [f"sampled by different kernels, another, {first}, which round differently"]


def test_kernels_that_differ_from_those_compared_with_are_told(model: Path, tmp_path: Path) -> None:
    arms = [{"name": "W8A8", "quant": "w8a8"}, {"name": "W8A8 + IEC", "quant": "w8a8", "steps": "all"}]
    assert not bench(recipe(model, *arms), tmp_path, workers=Workers(0)).failed
    by_name = {line["name"]: line for line in lines(tmp_path)}
    kernel = by_name["W8A8"]["kernel"]
    assert by_name["W8A8 + IEC"]["notes"] == [] and kernel == by_name["W8A8 + IEC"]["kernel"]
    shards = ShardSet.open(tmp_path / "cells" / by_name["W8A8"]["cell"])
    for start, _ in shards.shards():
        shards.write(start, **{**shards.read(start), "kernel": np.array("another")})
    (tmp_path / "results.jsonl").unlink()
    assert not bench(recipe(model, *arms), tmp_path, workers=Workers(0)).failed
    told = {line["name"]: line["notes"] for line in lines(tmp_path)}
    assert told["W8A8 + IEC"] == [
        f"sampled by the kernel {kernel}, what it is compared with by another: they round differently"
    ]
    assert told["W8A8"] == []


def test_arms_are_timed_in_turns(model: Path, finished: tuple[Path, Outcome, float], tmp_path: Path) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    before = content(folder)
    shown = {line["cell"] for line in lines(folder) if not line["name"].startswith("fine")}
    outcome = bench(recipe(model), folder, workers=Workers(0), rounds=2)
    clock = lines(folder, "clock.jsonl")
    assert [line["round"] for line in clock] == [0] * len(shown) + [1] * len(shown)
    assert {line["cell"] for line in clock[: len(shown)]} == shown == {line["cell"] for line in clock[len(shown) :]}
    assert all(line["seconds"] > 0 and line["images"] == 2 and line["threads"] == 1 for line in clock)
    assert content(folder) == before
    of = {result.cell: result.timing for result in outcome.report.run.entries}
    for cell in shown:
        timing = of[cell]
        assert timing is not None and timing.peak and len(timing.shards) == 3
        assert timing.per_image == timing.rounds == tuple(line["seconds"] / 2 for line in clock if line["cell"] == cell)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "median of 2 rounds" in text and "Seconds for an image of references" in text  # the fine solution's
    # What a kill left of a round is made again, whole rounds stay.
    (folder / "clock.jsonl").write_text("".join(json.dumps(line) + "\n" for line in clock[:-1]))
    bench(recipe(model), folder, workers=Workers(0), rounds=3)
    again = lines(folder, "clock.jsonl")
    assert again[: len(shown)] == clock[: len(shown)] and len(again) == 3 * len(shown)
    # Fewer arms leave the rounds as they are; a new one has none, so the seconds of shards are shown until it was timed, too.
    bench(recipe(model, *ARMS[:2]), folder, workers=Workers(0), rounds=3)
    assert lines(folder, "clock.jsonl") == again
    outcome = bench(recipe(model, *ARMS, {"name": "new", "cache": "deepcache:3"}), folder, workers=Workers(0))
    assert all(not result.timing.rounds for result in outcome.report.run.entries if result.timing)
    assert "The rounds by the clock lack 1 arm," in (folder / "report.md").read_text(encoding="utf-8")


def test_full_precision_beside_which_arms_stand_is_timed_with_them(model: Path, tmp_path: Path) -> None:
    small = recipe(model, {"name": "DeepCache", "cache": "deepcache:2"}, metrics={"names": ["rmse_full"]})
    outcome = bench(small, tmp_path, workers=Workers(0), rounds=1)
    assert len(lines(tmp_path, "clock.jsonl")) == 2
    of = {result.name: result.timing for result in outcome.report.run.entries}
    assert [len(timing.rounds) for timing in of.values() if timing] == [0, 1, 1], list(of)


def test_rounds_sample_no_more_than_a_shard_has(model: Path, tmp_path: Path) -> None:
    run = {"num": 4, "shard": 2, "batch_size": 16, "num_inference_steps": 2, "device": "cpu"}
    small = recipe(model, {"name": "DDIM"}, run=run)
    bench(small, tmp_path, workers=Workers(0), rounds=1)
    assert [line["images"] for line in lines(tmp_path, "clock.jsonl")] == [2]
    with pytest.raises(ValueError, match=r"rounds=1 on the Ray cluster 'auto'"):
        bench(small, tmp_path, workers=Workers(ray="auto"), rounds=1)


def test_a_metric_that_takes_more_images_is_left_out_where_it_does(model: Path, tmp_path: Path) -> None:
    given = {"network": "fashion-mnist", "names": ["recall", "rmse_fine"], "draws": 10}
    assert not bench(recipe(model, *ARMS[:2], metrics=given), tmp_path, workers=Workers(0)).failed
    fine, *others = lines(tmp_path)  # of 3 images, the others of 5
    (note,) = fine["notes"]
    assert note.startswith("recall left out: ") and "at least 4" in note and fine["metrics"] == {}
    assert len(others) == 2 and all(
        set(line["metrics"]) == {"recall", "rmse_fine"} and not line["notes"] for line in others
    )


def test_an_arm_that_fails_does_not_stop_the_others(
    model: Path, finished: tuple[Path, Outcome, float], tmp_path: Path
) -> None:
    broken = {"name": "broken", "scheduler": "EulerDiscreteScheduler", "eta": 0.5}  # Euler takes no eta
    board = Board()
    outcome = bench(recipe(model, *ARMS, broken), tmp_path / "run", workers=Workers(0), board=board)
    assert set(outcome.failed) == {"broken"} and "eta" in outcome.failed["broken"]
    assert content(tmp_path / "run") == content(finished[0])
    assert outcome.report.run.missing == ("broken",)
    why = (tmp_path / "run" / "report.md").read_text(encoding="utf-8").partition("**Not finished.**")[2].splitlines()[0]
    assert why.startswith(' 1 arm is missing: "broken" (') and "eta" in why, why
    assert "failed" not in json.loads((finished[0] / "run.json").read_text(encoding="utf-8"))
    states = {standing.name: standing.state for standing in board.standings.values()}
    assert states.pop("broken") == "failed" and set(states.values()) == {"done"}


def test_what_compares_with_an_arm_that_failed_is_told(model: Path, tmp_path: Path) -> None:
    broken = {
        "name": "broken",
        "scheduler": "EulerDiscreteScheduler",
        "eta": 0.5,
        "steps": "all",
        "cache": "deepcache:2",
    }
    outcome = bench(recipe(model, ARMS[0], broken), tmp_path / "run", workers=Workers(0))
    full, bare = "full precision, 3 steps (Euler), η 0.5", "deepcache:2, 3 steps (Euler), η 0.5"
    assert set(outcome.failed) == {full, bare, "broken"}
    assert {line["name"] for line in lines(tmp_path / "run")} == {"fine: DPMSolverMultistep, 6 steps", "DDIM"}


def test_images_that_are_no_numbers_are_told_by_their_seeds(model: Path, tmp_path: Path) -> None:
    pipe = DDIMPipeline.from_pretrained(model)
    torch.nn.init.constant_(pipe.unet.conv_out.weight, float("nan"))
    pipe.save_pretrained(tmp_path / "nan", safe_serialization=True)
    outcome = bench(recipe(tmp_path / "nan", ARMS[0]), tmp_path / "run", workers=Workers(0))
    assert "images of seeds [0, 1] hold NaN or infinity" in outcome.failed["DDIM"]
    assert not lines(tmp_path / "run") and not list((tmp_path / "run").glob("cells/*/shard-*"))


@pytest.mark.parametrize("writes", [3, 8, 14])
def test_a_full_disk_is_told_and_what_was_done_is_kept(
    model: Path, finished: tuple[Path, Outcome, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    real, count = os.fsync, 0

    def fsync(handle: int) -> None:
        nonlocal count
        count += 1
        if count > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(RuntimeError, match="the disk is full"):
            bench(recipe(model), tmp_path / "run", workers=Workers(0))
    assert not bench(recipe(model), tmp_path / "run", workers=Workers(0)).failed
    assert content(tmp_path / "run") == content(finished[0])


def test_controls_stand_beside_the_arms_that_they_are_equal_to(model: Path, tmp_path: Path) -> None:
    arms = ({"name": "IEC", "group": "a", "steps": "first:1", "cache": "cachequant:2"},)
    extra = {"controls": {"enabled": True, "scales": [0.9]}, "metrics": {"names": ["rmse_full"]}, "references": {}}
    run = {**table(model)["run"], "num": 2, "num_inference_steps": 4}
    outcome = bench(recipe(model, *arms, run=run, **extra), tmp_path, workers=Workers(0))
    assert not outcome.failed
    found = {line["name"]: line for line in lines(tmp_path)}
    assert (
        "Heun" in " ".join(found)
        and "UniPC" in " ".join(found)
        and any(line["arm"].get("scale") for line in found.values())
    )
    full = next(line["cell"] for line in found.values() if line["arm"] == {"num_inference_steps": 4})
    controls = [line for line in found.values() if line["kind"] == "control"]
    assert len(controls) >= 10 and {line["group"] for line in controls} == {"a"}
    assert {line["full"] for line in controls} <= {full, None}
    assert all("rmse_full" in line["differences"][found["IEC"]["cell"]] for line in controls if line["full"])

    # Taken over twice: what the arms need before their controls are known, then what the controls need.
    told: list[str] = []
    taken = tmp_path / "taken"
    again = recipe(model, *arms, run=run, **extra)
    assert not bench(again, taken, workers=Workers(0), reused=[tmp_path], board=Board(told=told.append)).failed
    both = [text for text in told if text.startswith("taken from")]
    cells = {line["cell"]: line["kind"] for line in lines(tmp_path)}
    arm, rest = sum(kind != "control" for kind in cells.values()), len(cells)
    calibrations = len(list((tmp_path / "calibrations").iterdir()))
    assert both == [
        f"taken from {tmp_path}: {2 * arm} images, 1 calibrations, 0 figures",
        f"taken from {tmp_path}: {2 * (rest - arm)} images, {calibrations - 1} calibrations, 0 figures",
    ]
    assert content(taken) == content(tmp_path)


def test_figures_are_drawn_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = [
        {"kind": "error", "title": "Fig. 2", "arm": "W8A8 + IEC", "num": 2},
        {"kind": "residuals", "title": "Residuals", "num": 2, "batch_size": 1},
        {"kind": "growth", "num": 1, "after": [99]},
    ]
    arms = ({"name": "W8A8 + IEC", "quant": "w8a8", "steps": "all", "relax": [0.3]},)
    extra = {"metrics": {"names": ["rmse_full"]}, "references": {}}
    outcome = bench(recipe(model, *arms, figure=figures, **extra), tmp_path, workers=Workers(0))
    assert set(outcome.failed) == {"the figure growth"} and "99" in outcome.failed["the figure growth"]
    files = {f"figures/{path.parent.name}/{path.name}" for path in tmp_path.glob("figures/*/*")}
    wanted = {"Fig. 2": "error", "Residuals": "residuals"}
    parts = {f"figures/{name}/{kind}.{end}" for name, kind in wanted.items() for end in ("csv", "json", "png")}
    assert files == parts | {f"figures/{name}/figure.json" for name in wanted}
    error = json.loads((tmp_path / "figures" / "Fig. 2" / "error.json").read_text(encoding="utf-8"))
    assert "0.3" in error["about"]["correction"]["relax"] and error["about"]["efficient"]["quant"]
    residuals = json.loads((tmp_path / "figures" / "Residuals" / "residuals.json").read_text(encoding="utf-8"))
    assert residuals["about"]["efficient"] is None and residuals["about"]["batch_size"] == 1

    done: list[str] = []
    monkeypatch.setattr(runner, "run_tasks", lambda tasks, **_: done.extend(task.key for task in tasks))
    other = [{**figures[0], "num": 1}, *figures[1:2]]
    bench(recipe(model, *arms, figure=other, **extra), tmp_path, workers=Workers(0))
    assert done == ["figure Fig. 2"]

    done.clear()
    taken = tmp_path / "taken"
    bench(recipe(model, *arms, figure=figures, **extra), taken, workers=Workers(0), reused=[tmp_path])
    assert [key for key in done if key.startswith("figure")] == ["figure growth"]
    for name in files:
        assert (taken / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"metrics": {"names": ["fid"]}}, "fid needs metrics.network"),
        ({"metrics": {"names": ["fid"], "network": "no-such"}}, "unknown feature network 'no-such'"),
        ({"metrics": {"names": ["no_such"]}}, "unknown metric 'no_such'"),
        ({"metrics": {"names": ["clip"]}}, r"give conditions\.prompt"),
        ({"model": {"name": "no-such"}}, "no model 'no-such'"),
        ({"conditions": {"prompt": {"file": "no-such.txt"}}}, "no-such.txt cannot be read"),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_told_before_anything_is(
    model: Path, tmp_path: Path, tables: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=told):
        bench(recipe(model, **tables), tmp_path / "run", workers=Workers(0))
    assert not (tmp_path / "run" / "cells").exists()


def written(model: Path, folder: Path, *arms: dict[str, Any]) -> Path:
    def value(given: Any) -> str:
        if isinstance(given, dict):
            return "{ " + ", ".join(f"{key} = {value(inner)}" for key, inner in given.items()) + " }"
        return json.dumps(given)

    held = table(model, *arms, quick={"run": {"num": 2}})
    lists = {"arm": held.pop("arm")}
    text = "".join(f"{key} = {value(inner)}\n" for key, inner in held.items())
    for name, entries in lists.items():
        text += "".join(f"[[{name}]]\n" + "".join(f"{k} = {value(v)}\n" for k, v in e.items()) for e in entries)
    path = folder / "some.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_command(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(model, tmp_path, ARMS[0], ARMS[1])
    result = CliRunner().invoke(app, ["bench", str(path), "--quick", "--workers", "0"])
    assert result.exit_code == 0, result.output
    assert "DDIM + IEC: done, 6 evaluations" in result.stderr and "3 of 3 done" in result.stderr
    assert result.stdout.splitlines()[-1] == "out/bench/some-quick/report.html"
    again = CliRunner().invoke(app, ["bench", str(path), "--num", "2", "--workers", "0", "--out", "other", "--json"])
    assert json.loads(again.stdout)["finished"] == 3 and json.loads(again.stdout)["failed"] == {}
    assert content(tmp_path / "other") == content(tmp_path / "out" / "bench" / "some-quick")
    given = ("--num", "2", "--workers", "0", "--out", "third", "--reuse", "other", "--rounds", "1")
    third = CliRunner().invoke(app, ["bench", str(path), *given])
    assert third.exit_code == 0 and "taken from other: 6 images, 0 calibrations, 0 figures" in third.stderr
    assert len(lines(tmp_path / "third", "clock.jsonl")) == 2


def test_the_command_tells_what_failed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(model, tmp_path, ARMS[0], {"name": "broken", "scheduler": "EulerDiscreteScheduler", "eta": 0.5})
    result = CliRunner().invoke(app, ["bench", str(path), "--quick", "--workers", "0", "--out", "o"])
    assert result.exit_code == 1
    assert "failed: broken: " in result.stderr and "the same command tries these again" in result.stderr
    missing = CliRunner().invoke(app, ["bench", "no-such-recipe"])
    assert missing.exit_code == 2 and "no bench recipe 'no-such-recipe'; bundled are " in missing.stderr


@pytest.mark.parametrize(("arms", "height"), [(3, 40), (40, 24)])
def test_the_live_table_fits_the_screen(arms: int, height: int) -> None:
    names = [f"[bold] arm {index} " + "of a long name " * (index % 5) for index in range(arms)]
    board = Board({name: Standing(name, "corrected", "", 2000) for name in names})
    for name in names[: arms // 2]:
        board.set(name, "done")
    board.add(names[arms // 2], 50, 1.234, 20.0)
    board.set(names[arms // 2], "samples")
    board.set(names[-1], "failed", "why")
    board.set(names[-1], "done")
    assert board.standings[names[-1]].state == "failed" and board.done == arms // 2
    console = Console(width=80, height=height, record=True, file=io.StringIO())
    console.print(drawn(board, height))
    text = console.export_text().splitlines()
    assert len(text) <= height and max(map(len, text)) <= 80
    assert any(f"[bold] arm {arms // 2}" in line and "50/2000" in line and "1.23" in line for line in text)
    assert f"{arms // 2} of {arms} arms done" in text[-1] or f"{arms // 2} of {arms} arms done" in text[-2]
