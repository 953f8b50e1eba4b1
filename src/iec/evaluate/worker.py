"""What a worker does: call functions by name, and answer with their results. The far side of `iec.evaluate.workers`."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import queue
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO


@dataclass(frozen=True)
class Done:
    """A task gave `value`."""

    value: Any


@dataclass(frozen=True)
class Raised:
    """A task raised an exception: its class, its text, the text of its traceback."""

    kind: str
    message: str
    trace: str


@dataclass(frozen=True)
class Lost:
    """The worker died, for the reason `why`."""

    why: str


Outcome = Done | Raised | Lost
READY, BEGUN = "ready", "begun"  # what a worker says first, and when it has been given a task


def run(function: str, arguments: dict[str, Any], files: Sequence[Path], threads: int) -> Done | Raised:
    """Call `function` ("package.module:name") with `arguments` and `files`, torch having `threads` threads.

    Results of other types than plain values and numpy arrays are refused here, whoever the worker is, so that what works in one
    process works in many.
    """
    try:
        module, _, name = function.partition(":")
        called = getattr(importlib.import_module(module), name, None)
        if not callable(called):
            raise ValueError(f"{function!r} names no function; expected 'package.module:name'")
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
        value = called(arguments, tuple(files))
        _check(value, "result")
    except Exception as error:
        return Raised(type(error).__name__, str(error), traceback.format_exc())
    return Done(value)


def _check(value: Any, path: str) -> None:
    import numpy as np

    if isinstance(value, dict):
        for key, inner in value.items():
            _check(inner, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _check(inner, f"{path}[{index}]")
    elif isinstance(value, np.ndarray) and value.dtype.hasobject:
        raise TypeError(f"{path} is an array of Python objects; expected numbers")
    elif not (value is None or isinstance(value, (bool, int, float, str, bytes, np.ndarray, np.generic))):
        raise TypeError(f"{path} is a {type(value).__name__}; tasks return plain values and numpy arrays")


def write(channel: BinaryIO, value: Any) -> None:
    """Send `value`; pickled, as both ends are this program."""
    data = pickle.dumps(value, protocol=5)
    channel.write(struct.pack("<Q", len(data)))
    channel.write(data)
    channel.flush()


def read(channel: BinaryIO) -> Any:
    """Receive what `write` sent. Raises EOFError when the other end is gone."""
    head = channel.read(8)
    if len(head) < 8:
        raise EOFError
    (size,) = struct.unpack("<Q", head)
    data = channel.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)


def main() -> None:
    """Serve the driver that started this process, over its stdin and stdout, until it closes them or is gone.

    A thread watches the driver, so that a worker in the midst of a task ends with a driver that was killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the driver decides
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what libraries print must not get among the answers
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    busy = threading.Event()

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                inbox.put(read(requests))
        if busy.is_set():
            os._exit(1)
        inbox.put(None)

    threading.Thread(target=listen, daemon=True).start()
    write(answers, READY)
    while (request := inbox.get()) is not None:
        busy.set()
        write(answers, BEGUN)
        outcome = run(**request)
        busy.clear()
        write(answers, outcome)
