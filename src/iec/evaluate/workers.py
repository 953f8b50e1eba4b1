"""Tasks in this process, in local processes or on a Ray cluster: with dependencies, and lost workers replaced.

A task is a function by name with plain arguments, so that any process can run it. The driver alone decides what runs when and
alone gets the results, so it alone writes files, and no disk needs to be shared. What a task computes must depend on nothing
but its arguments and files; then the number of workers, and who died meanwhile, does not show in the results.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from iec.artifact.plain import plain
from iec.evaluate.worker import Lost, Outcome, Raised, run

SHOWN = 8  # failures that a message names


@dataclass(frozen=True)
class Task:
    """One piece of work, named by its `key`.

    function: "package.module:name" of a function that is called as `name(arguments, files)`; it returns plain values and numpy
        arrays, or dicts and lists of them.
    arguments: what JSON can hold.
    files: files and folders that it reads. They need to be there only when the task starts, so an earlier task's `done` may
        make them. Local workers get the paths as they are; Ray workers get copies, of the same names.
    after: keys of the tasks that must be done before.
    """

    key: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    after: tuple[str, ...] = ()


class TaskFailed(RuntimeError):
    """Why a task failed: `key`, `kind` (class of the exception, or "WorkerLost"), `trace` (text of its traceback)."""

    def __init__(self, key: str, kind: str, message: str, trace: str = "") -> None:
        super().__init__(f"{kind}: {message}")
        self.key, self.kind, self.trace = key, kind, trace


class TaskErrors(RuntimeError):
    """Tasks failed: `failed` by key, and `not_run`: the tasks that waited for them, with the key that each waited for."""

    def __init__(self, failed: dict[str, TaskFailed], not_run: dict[str, str], total: int) -> None:
        lines = [f"{len(failed)} of {total} tasks failed; what the others gave is kept:"]
        lines += [f"  {key}: {error}" for key, error in list(failed.items())[:SHOWN]]
        if len(failed) > SHOWN:
            lines.append(f"  and {len(failed) - SHOWN} more")
        if not_run:
            named = ", ".join(f"{key} (after {cause})" for key, cause in list(not_run.items())[:SHOWN])
            more = f" and {len(not_run) - SHOWN} more" if len(not_run) > SHOWN else ""
            lines.append(f"  not run, as they need these: {named}{more}")
        super().__init__("\n".join(lines))
        self.failed, self.not_run = failed, not_run


class Pool(Protocol):
    """Who runs tasks: at most `slots` at a time."""

    slots: int

    def start(self, task: Task) -> None:
        """Begin a task; at most `slots` are begun and not yet given back by `wait`."""
        ...

    def wait(self) -> tuple[str, Outcome]:
        """The key and the outcome of a task that has ended."""
        ...

    def close(self, orderly: bool) -> None:
        """End the workers: when they have nothing to do (orderly), or at once."""
        ...


def run_tasks(
    tasks: Sequence[Task],
    *,
    workers: int | None = None,
    threads: int = 1,
    ray: str | None = None,
    gpus: float = 0.0,
    attempts: int = 3,
    done: Callable[[Task, Any], None],
    failed: Callable[[Task, TaskFailed], None] | None = None,
    started: Callable[[Task], None] | None = None,
    lost: Callable[[Task, str], None] | None = None,
) -> None:
    """Run all tasks, in their order as far as `after` and free workers let them; every callback runs in this process.

    Args:
        workers: 0: in this process; N: that many at a time, in processes that stay, so that a function may keep what it has
            loaded; None: one, or all that a Ray cluster has room for.
        threads: of torch in each worker. Kernels may round differently with another number: fix it for equal results.
        ray: "local" (a cluster on this machine, ended afterwards), an address of a running one ("auto", "host:6379",
            "ray://host:10001"), or None: local processes.
        gpus: the share of a GPU that each worker takes, 0..1. Local workers see one GPU each if it is more than 0, all otherwise;
            Ray workers see none if it is 0.
        attempts: how often a task is run whose worker dies: by `kill -9`, for lack of memory, with its machine. An exception is
            an answer: its task is not run again.
        done(task, result): what a task gave. Its exceptions end the workers and are the caller's.
        failed(task, error): a task raised, or its worker died in every attempt. The others go on.
        started(task): a task begins, maybe not for the first time.
        lost(task, why): the worker of a task died; the task is going to run again.

    Raises:
        TaskErrors: when all that could run has run, and tasks failed.
        ValueError: keys that occur twice, are unknown in `after` or wait for each other; bad numbers.
        TypeError: arguments that are no plain data.
        ImportError: for Ray, when it is not installed.
        RuntimeError: workers do not start, or have no room for a task.
    """
    tasks = _checked(tasks, workers, threads, gpus, attempts)
    if not tasks:
        return
    order = _Order(tasks)
    pool = _pool(len(tasks), workers, threads, ray, gpus)
    errors: dict[str, TaskFailed] = {}
    runs = dict.fromkeys(order.tasks, 0)
    busy, orderly = 0, False
    try:
        while True:
            while busy < pool.slots and (task := order.take()) is not None:
                runs[task.key] += 1
                pool.start(task)
                busy += 1
                if started is not None:
                    started(task)
            if busy == 0:
                break
            key, outcome = pool.wait()
            busy -= 1
            task = order.tasks[key]
            if isinstance(outcome, Lost) and runs[key] < attempts:
                order.again(key)
                if lost is not None:
                    lost(task, outcome.why)
            elif isinstance(outcome, (Lost, Raised)):
                errors[key] = _error(key, outcome, runs[key])
                if failed is not None:
                    failed(task, errors[key])
            else:
                done(task, outcome.value)
                order.done(key)
        orderly = True
    finally:
        pool.close(orderly)
    if errors:
        raise TaskErrors(errors, order.stuck(errors), len(tasks))


def _checked(tasks: Sequence[Task], workers: int | None, threads: int, gpus: float, attempts: int) -> list[Task]:
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}, expected 0 (this process) or more")
    if threads < 1 or attempts < 1:
        raise ValueError(f"threads is {threads} and attempts {attempts}, expected at least 1 of each")
    if not 0 <= gpus <= 1:
        raise ValueError(f"gpus is {gpus}, expected the share of one GPU that a worker takes, 0..1")
    return [replace(task, arguments=plain(task.arguments, f"task {task.key}: arguments")) for task in tasks]


def _pool(count: int, workers: int | None, threads: int, ray: str | None, gpus: float) -> Pool:
    if workers == 0:
        if ray is not None:
            raise ValueError(
                "workers=0 means this process, which is no Ray worker; give 1 or more, or None for all there are"
            )
        return _Here(threads)
    if ray is not None:
        from iec.evaluate.cluster import Cluster

        return Cluster(ray, workers, threads, gpus)
    from iec.evaluate.processes import Processes

    return Processes(min(count, 1 if workers is None else workers), threads, gpus)


def _error(key: str, outcome: Lost | Raised, runs: int) -> TaskFailed:
    if isinstance(outcome, Raised):
        return TaskFailed(key, outcome.kind, outcome.message, outcome.trace)
    return TaskFailed(key, "WorkerLost", f"its worker died in each of {runs} attempts, at last: {outcome.why}")


class _Order:
    """Which task may run next: the first in the list whose predecessors are done."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = {task.key: task for task in tasks}
        if len(self.tasks) != len(tasks):
            keys = [task.key for task in tasks]
            raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands for two tasks")
        self._place = {key: place for place, key in enumerate(self.tasks)}
        self._waits = {task.key: set(task.after) for task in tasks}
        self._next: dict[str, list[str]] = {key: [] for key in self.tasks}
        for task in tasks:
            for before in self._waits[task.key]:
                if before not in self.tasks:
                    raise ValueError(f"task {task.key} is to run after {before!r}, which is no task")
                self._next[before].append(task.key)
        self._refuse_circles()
        self._ready = [(self._place[key], key) for key, waits in self._waits.items() if not waits]

    def _refuse_circles(self) -> None:
        left = {key: len(waits) for key, waits in self._waits.items()}
        free = [key for key, count in left.items() if count == 0]
        while free:
            key = free.pop()
            del left[key]
            for other in self._next[key]:
                left[other] -= 1
                if left[other] == 0:
                    free.append(other)
        if left:
            raise ValueError(f"tasks that wait for each other, or for such: {', '.join(list(left)[:SHOWN])}")

    def take(self) -> Task | None:
        """The next task, or None if none may run now."""
        return self.tasks[heapq.heappop(self._ready)[1]] if self._ready else None

    def again(self, key: str) -> None:
        """A task that was taken is to be run once more."""
        heapq.heappush(self._ready, (self._place[key], key))

    def done(self, key: str) -> None:
        """A task is done: those that waited for it alone may run."""
        for other in self._next[key]:
            self._waits[other].discard(key)
            if not self._waits[other]:
                self.again(other)

    def stuck(self, failed: dict[str, TaskFailed]) -> dict[str, str]:
        """The tasks that wait for failed ones, directly or not, each with a failed one."""
        causes: dict[str, str] = {}
        for key in failed:
            found = list(self._next[key])
            while found:
                other = found.pop()
                if other not in causes:
                    causes[other] = key
                    found += self._next[other]
        return dict(sorted(causes.items(), key=lambda item: self._place[item[0]]))


class _Here:
    """This process as its own only worker."""

    slots = 1

    def __init__(self, threads: int) -> None:
        self._threads, self._task = threads, None

    def start(self, task: Task) -> None:
        self._task = task

    def wait(self) -> tuple[str, Outcome]:
        import torch

        task, before = self._task, torch.get_num_threads()
        assert task is not None
        try:
            return task.key, run(task.function, task.arguments, task.files, self._threads)
        finally:
            torch.set_num_threads(before)

    def close(self, orderly: bool) -> None:
        self._task = None
