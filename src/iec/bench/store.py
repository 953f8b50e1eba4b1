"""Files that grow line by line, so that a kill at any moment costs at most the line being written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from iec.artifact.files import write_text


class Lines:
    """A jsonl file: objects, one a line, which are appended and then on the disk.

    Opening it drops a last line that was torn by a kill, or a full disk, and lines that are damaged: `damaged` has their
    numbers, and the file as it was is kept beside it (NAME.damaged).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.values: list[dict[str, Any]] = []
        self.damaged: list[int] = []
        if not self.path.is_file():
            return
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) != len(data):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())
        for number, line in enumerate(whole.splitlines(), start=1):
            value = _object(line)
            if value is None:
                self.damaged.append(number)
            else:
                self.values.append(value)
        if self.damaged:
            with room(self.path):
                self.path.with_name(f"{self.path.name}.damaged").write_bytes(data)
                self._write()

    def append(self, value: dict[str, Any]) -> None:
        """Write one object, and return when it is on the disk. Raises RuntimeError for a full disk; no half line is left."""
        with room(self.path):
            self._append(value)

    def _append(self, value: dict[str, Any]) -> None:
        line = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            begun = file.tell()
            try:
                written = file.write(line)
                if written != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(begun)
                raise
        self.values.append(value)

    def keep(self, wanted: Callable[[dict[str, Any]], bool], aside: Lines | None = None) -> int:
        """Drop the objects that are not `wanted`, appending to `aside`, if it is given, those it lacks; returns how many."""
        dropped = [value for value in self.values if not wanted(value)]
        if dropped:
            for value in dropped if aside is not None else ():
                if value not in aside.values:
                    aside.append(value)
            self.values = [value for value in self.values if wanted(value)]
            with room(self.path):
                self._write()
        return len(dropped)

    def _write(self) -> None:
        """The whole file anew."""
        write_text(self.path, "".join(json.dumps(v, sort_keys=True, ensure_ascii=False) + "\n" for v in self.values))


def intact(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file that another process may be writing to: it is only read, and damaged lines are left out."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [value for line in lines if (value := _object(line)) is not None]


def _object(line: bytes) -> dict[str, Any] | None:
    """What a line says; None for one that is damaged."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


@contextlib.contextmanager
def room(path: Path) -> Iterator[None]:
    """Say what a full disk means while `path` is written: RuntimeError, all that was done is kept."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RuntimeError(
            f"the disk is full, {path} was not written; what was done before is kept. Make room and give the same command "
            "again: it goes on there"
        ) from error


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made if need be, against a second run in it, until the block ends or the process does.

    Raises RuntimeError when another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise RuntimeError(
                f"another run (process {file.read().strip() or 'unknown'}) is at work in {folder}; "
                "wait for it, end it, or give another --out"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
