"""Tasks on Ray workers, on this machine or on many. Files travel with the tasks, results come back: no shared disk is needed."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from iec.evaluate.worker import Lost, Outcome, Raised, run
from iec.evaluate.workers import Task

_STORE = (
    1 << 30
)  # bytes of shared memory for results on their way, on a cluster of our own; taken only as they are needed
# Read by Ray when it is imported: no statistics sent to its makers, and nothing printed on stdout when a worker dies, which
# `run_tasks` tells by itself.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}
_PACKAGES = ("iec-diffusion", "torch", "diffusers", "numpy")  # which decide what comes out
_ABSENT = "no Ray cluster at {address!r}: {why}; start one by `ray start --head`, or use 'local'"

Bundle = dict[str, bytes]  # the files of a file or folder, by path below its parent


class Cluster:
    """At most `workers` tasks at a time on a Ray cluster, one for each `threads` processors; see `iec.evaluate.workers.Pool`.

    Raises ImportError without Ray, ValueError for what is no address, RuntimeError when no cluster answers there or none of its
    machines has room.
    """

    def __init__(self, address: str, workers: int | None, threads: int, gpus: float) -> None:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        try:
            import ray
        except ImportError as error:
            raise ImportError("Ray is not installed; install it by: pip install 'iec-diffusion[ray]'") from error
        self._ray, self._ours = ray, not ray.is_initialized()
        if self._ours:
            _connect(ray, address, workers, threads)
        try:
            self.slots = _room(ray, workers, threads, gpus)
        except RuntimeError:
            self.close(orderly=True)
            raise
        # Whose worker dies is run again by `run_tasks`, which counts the attempts.
        options = {"num_cpus": threads, "num_gpus": gpus, "max_retries": 0}
        self._call = ray.remote(**options)(serve)
        self._path = list(sys.path) if address == "local" else []
        self._threads = threads
        self._running: dict[Any, str] = {}
        self._stored: dict[str, Any] = {}  # bundles in Ray's store, by digest
        self._seen: dict[Path, tuple[object, str]] = {}  # by path: state of its files, digest

    def start(self, task: Task) -> None:
        request = {
            "function": task.function,
            "arguments": task.arguments,
            "threads": self._threads,
            "versions": versions(),
            "path": self._path,
        }
        bundles = [self._store(path) for path in task.files]
        self._running[self._call.remote(request, [digest for digest, _ in bundles], *(ref for _, ref in bundles))] = (
            task.key
        )

    def _store(self, path: Path) -> tuple[str, Any]:
        """Digest and place of a bundle; read again only if its files have changed, as it may be a model."""
        state = _state(path)
        if path not in self._seen or self._seen[path][0] != state:
            packed = pack(path)
            digest = _digest(packed)
            if digest not in self._stored:
                self._stored[digest] = self._ray.put(packed)
            self._seen[path] = (state, digest)
        digest = self._seen[path][1]
        return digest, self._stored[digest]

    def wait(self) -> tuple[str, Outcome]:
        ended, _ = self._ray.wait(list(self._running), num_returns=1)
        key = self._running.pop(ended[0])
        try:
            return key, self._ray.get(ended[0])
        except self._ray.exceptions.RayTaskError as error:  # what `serve` could not turn into an answer
            return key, Raised(type(error).__name__, str(error).splitlines()[-1], str(error))
        except self._ray.exceptions.RayError as error:
            return key, Lost(f"{type(error).__name__}: {_first_line(error)}")

    def close(self, orderly: bool) -> None:
        """End the cluster if it is ours; else take back the tasks that run."""
        for reference in getattr(self, "_running", {}):
            self._ray.cancel(reference, force=True)
        if self._ours:
            self._ray.shutdown()


def _connect(ray: Any, address: str, workers: int | None, threads: int) -> None:
    if address not in ("local", "auto"):
        _reach(address)
    options: dict[str, Any] = {"address": address, "logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        count = workers if workers is not None else max(1, (os.cpu_count() or 1) // threads)
        options |= {"num_cpus": count * threads, "include_dashboard": False, "object_store_memory": _STORE}
    try:
        ray.init(**options)
    except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
        raise RuntimeError(_ABSENT.format(address=address, why=_first_line(error))) from error


def _reach(address: str) -> None:
    """Raise unless somebody listens there: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(
            f"{address!r} is no address of a Ray cluster; expected local, auto, HOST:PORT or ray://HOST:PORT"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise RuntimeError(_ABSENT.format(address=address, why=error)) from error


def _room(ray: Any, workers: int | None, threads: int, gpus: float) -> int:
    """How many tasks to have on the way: `workers`, or what all machines have room for."""
    room = 0
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            by_gpu = int(has.get("GPU", 0) / gpus) if gpus else sys.maxsize
            room += min(int(has.get("CPU", 0)) // threads, by_gpu)
    if room == 0:
        raise RuntimeError(
            f"no machine of the Ray cluster has {threads} processors"
            + (f" and {gpus:g} of a GPU" if gpus else "")
            + f" for one worker; it has {ray.cluster_resources()}"
        )
    return room if workers is None else workers


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def versions() -> dict[str, str]:
    """Versions of what decides the results."""
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def _files(path: Path) -> list[Path]:
    """A file, or all files of a folder. Raises FileNotFoundError if there is none."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder to send to the workers")
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _state(path: Path) -> object:
    """What changes when files do."""
    found = [(file, file.stat()) for file in _files(path)]
    return [(file, of.st_ino, of.st_size, of.st_mtime_ns) for file, of in found]


def pack(path: Path) -> Bundle:
    """Names and contents of a file, or of all files of a folder. Raises FileNotFoundError if there is none."""
    return {file.relative_to(path.parent).as_posix(): file.read_bytes() for file in _files(path)}


def _digest(packed: Bundle) -> str:
    digest = hashlib.sha256()
    for name, data in packed.items():
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


# --- on the worker ----------------------------------------------------------------------------------------------------


def serve(request: dict[str, Any], digests: Sequence[str], *bundles: Bundle) -> Outcome:
    """Run one task in a Ray worker."""
    here, wanted = versions(), request["versions"]
    differ = [f"{name} {here[name]} instead of {wanted[name]}" for name in wanted if here[name] != wanted[name]]
    if differ:
        message = (
            f"a Ray worker has {', '.join(differ)}; results would differ: install the driver's versions everywhere"
        )
        return Raised("RuntimeError", message, "")
    sys.path += [entry for entry in request["path"] if entry not in sys.path]
    files = [_unpacked(digest, bundle) for digest, bundle in zip(digests, bundles, strict=True)]
    return run(request["function"], request["arguments"], files, request["threads"])


@lru_cache(maxsize=1)
def _shelf() -> tempfile.TemporaryDirectory[str]:
    """A folder for the files of this worker, gone with it (or with the machine's temporary files, if it is killed)."""
    return tempfile.TemporaryDirectory(prefix="iec-worker-")


def _unpacked(digest: str, packed: Bundle) -> Path:
    folder = Path(_shelf().name) / digest
    if not folder.exists():
        begun = folder.with_suffix(".part")
        for name, data in packed.items():
            target = begun / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        begun.rename(folder)
    return next(folder.iterdir())  # what was sent: one file, or one folder
