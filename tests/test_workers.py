"""Tasks by workers: order, dependencies, errors; processes that are killed, workers and drivers, by real signals."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from iec.evaluate import processes
from iec.evaluate.workers import Task, TaskErrors, TaskFailed, run_tasks

HERE = str(Path(__file__).parent)


def task(key: str, function: str = "square", after: tuple[str, ...] = (), **arguments: Any) -> Task:
    return Task(key, f"workertasks:{function}", {"number": 3, **arguments}, after=after)


def run(*tasks: Task, **options: Any) -> dict[str, Any]:
    """Results by key."""
    results: dict[str, Any] = {}
    run_tasks(tasks, done=lambda task, result: results.__setitem__(task.key, result), **options)
    return results


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(FileNotFoundError):
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                time.sleep(0.02)
                continue
        return True
    return False


def appears(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)
    return found


def written(mark: Path) -> int:
    """The number in a file, once it is there."""
    return int(appears(lambda: mark.exists() and mark.read_text()))


def kill_the_other(marks: Path) -> tuple[int, str]:
    """Kill the worker that has a shard other than the first under way (see `workertasks.marked_shard`), and let the rest go on.

    Returns its number, and the key of its shard.
    """
    key = appears(
        lambda: next((mark.name for mark in marks.iterdir() if mark.name.isdecimal() and mark.name != "0"), None)
    )
    pid = int((marks / key).read_text())
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    (marks / "go").touch()
    return pid, key


# --- what is run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_results_do_not_depend_on_the_number_of_workers(workers: int) -> None:
    results = run(*(task(str(number), number=number) for number in range(7)), workers=workers)
    assert sorted(results) == [str(number) for number in range(7)]
    assert all(np.array_equal(results[key]["value"], np.full((2, 3), int(key) ** 2)) for key in results)
    pids = {result["pid"] for result in results.values()}
    assert 1 <= len(pids) <= max(1, workers), "workers stay"
    assert (os.getpid() in pids) == (workers == 0)
    assert all(gone(pid) for pid in pids - {os.getpid()}), "and end with the call"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_task_runs_after_those_it_waits_for(workers: int) -> None:
    told: list[str] = []
    tasks = [task("last", after=("left", "right")), task("right", after=("first",)), task("left", after=("first",))]
    run_tasks(
        [*tasks, task("first")],
        workers=workers,
        done=lambda task, _: told.append(f"done {task.key}"),
        started=lambda task: told.append(f"start {task.key}"),
    )
    assert told[:2] == ["start first", "done first"] and told[-2:] == ["start last", "done last"]
    assert told[2] == "start right", "in the order of the list, where they may"
    assert run(workers=workers) == {}


def test_an_earlier_task_makes_the_file_of_a_later_one(tmp_path: Path) -> None:
    folder, results = tmp_path / "made", {}

    def done(task: Task, result: Any) -> None:
        results[task.key] = result
        if task.key == "maker":
            folder.mkdir()
            (folder / "a.txt").write_text("hello")

    reader = Task("reader", "workertasks:contents", {}, (folder,), ("maker",))
    run_tasks([reader, task("maker")], workers=1, done=done)
    assert results["reader"] == {"made/a.txt": "hello"}


def test_large_results_come_whole() -> None:
    assert np.array_equal(run(task("large", "large"), workers=1)["large"], np.arange(20_000_000, dtype=np.uint8))


def test_threads_are_as_asked_for() -> None:
    names = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"]
    told = run(task("t", "environment", names=names), workers=1, threads=2)["t"]
    assert told == dict.fromkeys(names, "2")
    before = torch.get_num_threads()
    assert run(task("t", "torch_threads"), workers=0, threads=before + 1) == {"t": before + 1}
    assert torch.get_num_threads() == before, "a run in this process leaves its threads as they were"


def test_workers_are_imported_without_ray_or_torch() -> None:
    code = (
        "import sys, iec.evaluate.workers, iec.evaluate.processes; print(sorted({'ray', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- what fails -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_stops_only_what_waits_for_it(workers: int) -> None:
    told: list[TaskFailed] = []
    results: dict[str, Any] = {}
    tasks = [
        task("bad", "fails", what="luck"),
        task("child", after=("bad", "good")),
        task("grandchild", after=("child",)),
    ]
    with pytest.raises(TaskErrors) as caught:
        run_tasks(
            [*tasks, task("good"), task("after", after=("good",))],
            workers=workers,
            done=lambda task, result: results.__setitem__(task.key, result),
            failed=lambda _, error: told.append(error),
        )
    assert sorted(results) == ["after", "good"]
    assert list(caught.value.failed) == ["bad"] and caught.value.failed["bad"] is told[0]
    assert (told[0].key, told[0].kind) == ("bad", "KeyError")
    assert 'raise KeyError(f"no {arguments' in told[0].trace, "the traceback is the worker's"
    assert caught.value.not_run == {"child": "bad", "grandchild": "bad"}
    message = str(caught.value)
    assert "1 of 5 tasks failed" in message and "bad: KeyError: 'no luck'" in message
    assert "child (after bad), grandchild (after bad)" in message


def test_messages_stay_short() -> None:
    with pytest.raises(TaskErrors) as caught:
        run(*(task(f"bad {number}", "fails", what=number) for number in range(12)), workers=0)
    assert "12 of 12 tasks failed" in str(caught.value) and "and 4 more" in str(caught.value)
    assert len(caught.value.failed) == 12


@pytest.mark.parametrize("kind", ["lambda", "path", "objects", "set"])
@pytest.mark.parametrize("workers", [0, 1])
def test_results_are_plain_values_and_arrays(workers: int, kind: str) -> None:
    with pytest.raises(TaskErrors, match="TypeError: result is a"):
        run(task("t", "returned", kind=kind), workers=workers)


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([task("a"), task("a")], {}, "the key 'a' stands for two tasks"),
        ([task("a", after=("b",))], {}, "task a is to run after 'b', which is no task"),
        ([task("a", after=("b",)), task("b", after=("a",)), task("c")], {}, "wait for each other.*: a, b"),
        ([task("a")], {"workers": -1}, "workers is -1"),
        ([task("a")], {"threads": 0}, "threads is 0"),
        ([task("a")], {"attempts": 0}, "attempts 0"),
        ([task("a")], {"gpus": 1.5}, "gpus is 1.5"),
        ([task("a")], {"workers": 0, "ray": "local"}, "workers=0 means this process"),
        ([task("a", number=float("nan"))], {}, "task a: arguments.number: found nan"),
    ],
)
def test_what_cannot_be_is_refused(tasks: list[Task], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(*tasks, **options)


def test_arguments_are_plain_data() -> None:
    with pytest.raises(TypeError, match=r"task a: arguments\.path: found .*, expected plain data"):
        run(task("a", path=Path()), workers=0)


@pytest.mark.parametrize(
    "function", ["workertasks:nothing", "workertasks:Path.none", "workertasks", "no_such_module:f"]
)
def test_functions_that_are_not_there(function: str) -> None:
    with pytest.raises(TaskErrors, match=r"names no function|No module named 'no_such_module'"):
        run(Task("a", function), workers=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs here")
def test_gpus_that_are_not_there() -> None:
    with pytest.raises(RuntimeError, match=r"2 workers that take 0\.5 of a GPU each have no room on 0 GPUs"):
        run(task("a"), task("b"), workers=2, gpus=0.5)


@pytest.mark.parametrize(
    ("workers", "gpus", "visible", "seen"),
    [
        (2, 1.0, None, ["0", "1"]),
        (4, 0.5, None, ["0", "0", "1", "1"]),
        (3, 0.4, "5,GPU-ab", ["5", "5", "GPU-ab"]),
        (3, 0.0, None, [None] * 3),
        (3, 1.0, None, None),
    ],
)
def test_workers_share_the_gpus(
    workers: int, gpus: float, visible: str | None, seen: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that says it has two."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if seen is None:
        with pytest.raises(RuntimeError, match="3 workers that take 1 of a GPU each have no room on 2 GPUs"):
            processes._environments(workers, 1, gpus)
        return
    assert [each.get("CUDA_VISIBLE_DEVICES") for each in processes._environments(workers, 1, gpus)] == seen


# --- what is killed ---------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_replaced_and_its_task_run_again(tmp_path: Path) -> None:
    lost: list[tuple[str, str]] = []
    victim = task("4", "killed_once", number=4, mark=str(tmp_path / "mark"))
    tasks = [victim if number == 4 else task(str(number), number=number) for number in range(9)]
    results = run(*tasks, workers=2, lost=lambda task, why: lost.append((task.key, why)))
    assert {key: int(result["value"][0, 0]) for key, result in results.items()} == {str(n): n * n for n in range(9)}
    (key, why), killed = *lost, (tmp_path / "mark").read_text()
    assert key == "4" and why == f"worker {killed} was ended by SIGKILL, as the system does when memory runs out"
    assert results["4"]["pid"] != int(killed)


def test_an_idle_worker_that_is_killed_costs_no_attempt(tmp_path: Path) -> None:
    """Killed between two tasks, while its driver is busy with what the first one gave."""
    results: dict[str, Any] = {}

    def done(task: Task, result: Any) -> None:
        results[task.key] = result
        if task.key == "first":
            os.kill(result["pid"], signal.SIGKILL)
            assert gone(result["pid"])

    run_tasks([task("first"), task("second", after=("first",))], workers=1, attempts=1, done=done)
    assert results["second"]["pid"] != results["first"]["pid"]


def test_a_task_that_kills_every_worker_fails_alone(tmp_path: Path) -> None:
    mark, results = tmp_path / "mark", {}
    with pytest.raises(TaskErrors) as caught:
        run_tasks(
            [task("deadly", "killed_always", mark=str(mark)), *(task(str(number)) for number in range(4))],
            workers=2,
            done=lambda task, result: results.__setitem__(task.key, result),
        )
    assert mark.read_text() == "xxx" and sorted(results) == ["0", "1", "2", "3"]
    assert caught.value.failed["deadly"].kind == "WorkerLost"
    assert "died in each of 3 attempts" in str(caught.value) and "SIGKILL" in str(caught.value)


def test_the_last_words_of_a_worker_are_told(tmp_path: Path) -> None:
    """The first worker speaks on our stderr, the second into its driver's ear."""
    with pytest.raises(TaskErrors) as caught:
        run(task("stays", "environment", names=[]), task("a", "exits"), task("b", "exits"), workers=2, attempts=1)
    told = [str(error) for error in caught.value.failed.values()]
    assert all("exited with code 7" in each for each in told)
    assert any("exited with code 7: the library gives up" in each for each in told)


def test_workers_that_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_BEGIN", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match=r"worker processes do not start: worker .* exited with code 3"):
        run(*(task(str(number)) for number in range(9)), workers=1, attempts=9)


def test_an_exception_of_the_driver_ends_workers_in_the_midst_of_tasks(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pids: list[int] = []

    def done(task: Task, result: Any) -> None:
        pids.extend((result["pid"], written(mark)))
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        run_tasks([task("long", "sleeps", mark=str(mark)), task("short")], workers=2, done=done)
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


# A shell starts what runs in its background with interrupts ignored, which would be handed down.
DRIVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {here!r})
from iec.evaluate.workers import Task, run_tasks
tasks = [Task(mark, "workertasks:sleeps", {{"mark": mark}}) for mark in {marks!r}]
run_tasks(tasks, workers=2, done=print)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_driver(number: signal.Signals, tmp_path: Path) -> None:
    """They are asleep in a task of ten minutes when it is killed; an interrupt reaches them, too, as from a terminal."""
    marks = [tmp_path / "a", tmp_path / "b"]
    code = DRIVER.format(here=HERE, marks=[str(mark) for mark in marks])
    driver = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.PIPE, text=True)
    workers = [written(mark) for mark in marks]
    if number == signal.SIGINT:
        os.killpg(driver.pid, number)
    else:
        driver.send_signal(number)
    _, said = driver.communicate(timeout=30)
    assert driver.returncode == -number
    assert all(gone(pid) for pid in workers)
    assert said.count("Traceback") == (number == signal.SIGINT), "workers say nothing of their own"


LOOP = """
import sys
sys.path.insert(0, {here!r})
from iec.evaluate.shards import ShardSet
from iec.evaluate.workers import Task, run_tasks
shards = ShardSet({folder!r}, {{"of": "a test"}}, num=200, size=5, seed=100)
tasks = [
    Task(str(start), "workertasks:images", {{"start": start, "seeds": list(shards.seeds(start)), "seconds": {seconds}}})
    for start, _ in shards.missing()
]
run_tasks(tasks, workers={workers}, done=lambda task, result: shards.write(task.arguments["start"], **result))
"""


def test_a_run_whose_driver_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path: Path) -> None:
    def begin(folder: Path, workers: int, seconds: float) -> subprocess.Popen[bytes]:
        code = LOOP.format(here=HERE, folder=str(folder), workers=workers, seconds=seconds)
        return subprocess.Popen([sys.executable, "-W", "error", "-c", code])

    def files(folder: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    folder = tmp_path / "killed"
    for enough, workers in ((2, 2), (8, 3), (14, 1)):
        driver = begin(folder, workers, seconds=0.05)
        appears(lambda enough=enough: len(list(folder.glob("shard-*.npz"))) >= enough)
        driver.kill()
        assert driver.wait(30) == -signal.SIGKILL
        assert len(list(folder.glob("shard-*.npz"))) < 40, "killed in the middle"
    assert begin(folder, 2, seconds=0).wait(60) == 0
    assert begin(tmp_path / "whole", 1, seconds=0).wait(60) == 0
    assert files(folder) == files(tmp_path / "whole") and len(files(folder)) == 41
