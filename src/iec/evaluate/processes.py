"""Local worker processes that stay, each started anew as if by hand: nothing of the driver's state is copied into them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any

from iec.evaluate.worker import BEGUN, READY, Lost, Outcome, read, write
from iec.evaluate.workers import Task

# The driver's import path, as `python -m` would know only the installed packages. No `multiprocessing`: it runs the driver's main
# module again in each worker, which needs a guard in every script and does not work for one that is piped in.
_BEGIN = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from iec.evaluate.worker import main; main()"
_GRACE = 5.0  # seconds that an idle worker has to end
_STARTS = 3  # workers that may die in a row before they have said anything
# Every library that has threads of its own: together, the workers would have more of them than there are cores.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


class _Worker:
    """A process, the task that it has, whether it has begun with it, and a thread that waits for its answers."""

    def __init__(
        self, environment: dict[str, str], silent: bool, events: queue.SimpleQueue[tuple[_Worker, Any]]
    ) -> None:
        command = [sys.executable, "-c", _BEGIN, json.dumps(sys.path)]
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        self._said = tempfile.TemporaryFile() if silent else None  # noqa: SIM115 - closed by `end`
        self.process = subprocess.Popen(command, stderr=self._said, env=environment, **pipes)
        self.task: Task | None = None
        self.ready = self.begun = False
        self._events = events
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._events.put((self, read(self.process.stdout)))
        self._events.put((self, None))

    def give(self, task: Task, threads: int) -> bool:
        """Hand over a task; False if the worker is gone."""
        assert self.process.stdin is not None
        request = {"function": task.function, "arguments": task.arguments, "files": task.files, "threads": threads}
        try:
            write(self.process.stdin, request)
        except OSError:
            return False
        self.task, self.begun = task, False
        return True

    def end(self, orderly: bool) -> None:
        """Close the pipe, at which an idle worker ends; kill one that has not, or that is not worth waiting for."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if not orderly:
            self.process.kill()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        self.process.stdout.close()
        if self._said is not None:
            self._said.close()

    def cause(self) -> str:
        """What a worker died of."""
        code = self.process.wait()
        if code >= 0:
            return f"worker {self.process.pid} exited with code {code}{self._last_words()}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = str(-code)
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"worker {self.process.pid} was ended by {name}{hint}"

    def _last_words(self) -> str:
        """The last line that it wrote on its stderr, where that is not ours."""
        if self._said is None:
            return ""
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")


class Processes:
    """At most `workers` local processes, begun when there is work for them; see `iec.evaluate.workers.Pool`.

    The first speaks for all on stderr: they say the same.
    """

    def __init__(self, workers: int, threads: int, gpus: float) -> None:
        self.slots, self._threads = workers, threads
        self._events: queue.SimpleQueue[tuple[_Worker, Any]] = queue.SimpleQueue()
        self._environments = _environments(workers, threads, gpus)
        self._workers: list[_Worker | None] = [None] * workers
        self._stillborn = 0

    def start(self, task: Task) -> None:
        # Those that have loaded something first.
        places = sorted(range(self.slots), key=lambda place: self._workers[place] is None)
        for place in places:
            worker = self._workers[place]
            if worker is not None and worker.task is not None:
                continue
            if worker is not None and worker.give(task, self._threads):
                return
            if worker is not None:
                worker.end(orderly=False)
            self._workers[place] = worker = _Worker(self._environments[place], place > 0, self._events)
            if not worker.give(task, self._threads):
                worker.task = task  # died at once: `wait` will hear of it
            return
        raise AssertionError("no free worker")

    def wait(self) -> tuple[str, Outcome]:
        while True:
            worker, answer = self._events.get()
            if worker not in self._workers:
                continue  # replaced before its last word was heard
            if answer == READY:
                worker.ready, self._stillborn = True, 0
                continue
            if answer == BEGUN:
                worker.begun = True
                continue
            task = worker.task
            if answer is not None:
                worker.task = None
                assert task is not None
                return task.key, answer
            why = worker.cause()
            self._workers[self._workers.index(worker)] = None
            worker.end(orderly=False)
            if not worker.ready:
                self._stillborn += 1
                if self._stillborn == _STARTS:
                    raise RuntimeError(f"worker processes do not start: {why}; what it said stands above")
            if task is not None and worker.ready and not worker.begun:
                self.start(task)  # killed while it was idle, before anybody could know
            elif task is not None:
                return task.key, Lost(why)

    def close(self, orderly: bool) -> None:
        living = [worker for worker in self._workers if worker is not None]
        if not orderly:
            for worker in living:
                worker.process.kill()
        for worker in living:
            worker.end(orderly)
        self._workers = [None] * self.slots


def _environments(workers: int, threads: int, gpus: float) -> list[dict[str, str]]:
    """The environment of each worker. With `gpus` > 0, as many workers see a GPU as have room on it."""
    common = {**os.environ, **dict.fromkeys(_THREADS, str(threads))}
    if gpus == 0:
        return [common] * workers
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
    if not torch.cuda.is_available() or workers > len(found) * int(1 / gpus):
        raise RuntimeError(
            f"{workers} workers that take {gpus:g} of a GPU each have no room on {torch.cuda.device_count()} GPUs; "
            "take fewer workers, or a smaller share"
        )
    return [{**common, "CUDA_VISIBLE_DEVICES": found[index // int(1 / gpus)]} for index in range(workers)]
