"""Tasks and sampling on Ray: two local workers, one of them killed in the middle, make the same images."""

from __future__ import annotations

import importlib.util
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("ray") is None:  # it is not imported here: what silences it is read when it is
    pytest.skip("Ray is not installed", allow_module_level=True)

from iec.evaluate import cluster
from iec.evaluate.arms import Arm
from iec.evaluate.scale import Sampling, keep, sample_shards
from iec.evaluate.shards import ShardSet
from iec.evaluate.worker import Done, Raised
from iec.evaluate.workers import Task, TaskErrors, run_tasks
from test_workers import kill_the_other
from tiny import CASES


def test_two_ray_workers_one_of_them_killed_make_the_same_images(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All on one cluster, as it takes seconds to start: shards of images, the first worker that has one under way being killed
    by a real SIGKILL when another is done; a task that raises; one whose folder travels to it."""
    model, marks = tmp_path / "model", tmp_path / "marks"
    CASES["ddim"].build().save_pretrained(model, safe_serialization=True)
    marks.mkdir()
    (tmp_path / "sent" / "inner").mkdir(parents=True)
    (tmp_path / "sent" / "inner" / "a.txt").write_text("hello")
    sampling = Sampling(Arm("IEC", "corrected", 3, steps="all"), str(model), batch_size=2, device="cpu")
    sample_shards(sampling, tmp_path / "alone", 8, model="m", size=2, workers=0)
    shards = ShardSet(tmp_path / "ray", sampling.identity("m", 1), 8, 2)
    tasks = [
        replace(
            task,
            function="workertasks:marked_shard",
            arguments={**task.arguments, "mark": str(marks), "key": task.key},
        )
        for task in sampling.tasks(shards, ship=True)  # as to other machines
    ]
    others = [
        Task("bad", "workertasks:fails", {"what": "luck"}),
        Task("child", "workertasks:square", {"number": 2}, after=("bad",)),
        Task("reader", "workertasks:contents", {}, (tmp_path / "sent", tmp_path / "sent" / "inner" / "a.txt")),
    ]
    lost: list[tuple[str, str]] = []
    killed: list[str] = []
    results: dict[str, Any] = {}

    def done(task: Task, result: Any) -> None:
        results[task.key] = result
        if task.function.endswith("marked_shard"):
            keep(shards, task, result)
        if task.key == "0":
            killed.append(kill_the_other(marks)[1])

    capfd.readouterr()
    with pytest.raises(TaskErrors) as caught:
        run_tasks(
            [*tasks, *others],
            workers=2,
            ray="local",
            done=done,
            lost=lambda task, why: lost.append((task.key, why)),
        )
    said = capfd.readouterr()
    assert not sys.modules["ray"].is_initialized(), "a cluster of our own ends with the call"
    assert [key for key, _ in lost] == killed and "WorkerCrashedError" in lost[0][1]
    one, other = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("alone", "ray"))
    assert one == other and len(one) == 5
    assert results["reader"] == {"sent/inner/a.txt": "hello", "a.txt": "hello"}
    assert list(caught.value.failed) == ["bad"] and caught.value.not_run == {"child": "bad"}
    assert caught.value.failed["bad"].kind == "KeyError" and "workertasks.py" in caught.value.failed["bad"].trace
    assert said.out == "" and "raylet" not in said.err


# --- without a cluster ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_without_a_cluster(scheme: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"{scheme}127.0.0.1:{port}"
    with pytest.raises(
        RuntimeError, match=rf"no Ray cluster at '{address}': .*refused; start one by `ray start --head`"
    ):
        run_tasks([Task("a", "workertasks:square", {"number": 1})], ray=address, done=print)


@pytest.mark.parametrize("address", ["here", "host:", "host:name", ""])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValueError, match=r"is no address of a Ray cluster; expected local, auto, HOST:PORT"):
        run_tasks([Task("a", "workertasks:square", {"number": 1})], ray=address, done=print)


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"Ray is not installed; .*'iec-diffusion\[ray\]'"):
        run_tasks([Task("a", "workertasks:square", {"number": 1})], ray="local", done=print)


class _Machines:
    """What a cluster has, as Ray tells it."""

    def __init__(self, *machines: dict[str, float]) -> None:
        self._machines = machines

    def nodes(self) -> list[dict[str, Any]]:
        dead = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0}}
        return [dead, *({"Alive": True, "Resources": has} for has in self._machines)]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": sum(has.get("CPU", 0) for has in self._machines)}


def test_workers_are_as_many_as_fit_on_the_machines() -> None:
    two = _Machines({"CPU": 7.0, "GPU": 2.0}, {"CPU": 3.0})
    assert cluster._room(two, None, 1, 0) == 10
    assert cluster._room(two, None, 2, 0) == 4, "no worker has threads on two machines"
    assert cluster._room(two, None, 2, 0.5) == 3
    assert cluster._room(two, 5, 2, 0.5) == 5, "Ray lets them wait"
    with pytest.raises(RuntimeError, match=r"no machine of the Ray cluster has 8 processors for one worker"):
        cluster._room(two, 5, 8, 0)
    with pytest.raises(RuntimeError, match=r"has 1 processors and 1 of a GPU for one worker"):
        cluster._room(_Machines({"CPU": 3.0}), None, 1, 1)


def test_a_worker_with_other_versions_refuses(tmp_path: Path) -> None:
    request = {"function": "workertasks:square", "arguments": {"number": 2}, "threads": 1, "path": []}
    same = cluster.serve({**request, "versions": cluster.versions()}, [])
    assert isinstance(same, Done) and same.value["value"][0, 0] == 4
    other = cluster.serve({**request, "versions": {**cluster.versions(), "torch": "1.0"}}, [])
    assert (
        isinstance(other, Raised) and "a Ray worker has torch 2" in other.message and "instead of 1.0" in other.message
    )


def test_files_are_sent_once_as_long_as_they_stay(tmp_path: Path) -> None:
    """Without a cluster: a store that notes what is put into it."""
    put: list[cluster.Bundle] = []
    held = cluster.Cluster.__new__(cluster.Cluster)
    held._ray, held._stored, held._seen = type("Store", (), {"put": staticmethod(lambda it: put.append(it))}), {}, {}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("one")
    first, _ = held._store(tmp_path / "folder")
    assert held._store(tmp_path / "folder")[0] == first and len(put) == 1
    (tmp_path / "folder" / "a.txt").write_text("other")
    second, _ = held._store(tmp_path / "folder")
    assert second != first and put == [{"folder/a.txt": b"one"}, {"folder/a.txt": b"other"}]
    with pytest.raises(FileNotFoundError, match="no such file or folder to send"):
        held._store(tmp_path / "absent")
