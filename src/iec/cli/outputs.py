"""Files that a command will write: looked at before the work begins, and named when the writing fails all the same."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_file(option: str, file: Path) -> None:
    """Raise ValueError, naming the `option`, unless `file` can be written, anew or in place of a file. Nothing is made."""
    if file.is_dir():
        raise ValueError(f"{option} {file}: a folder, expected a file; give the name of one in it, or elsewhere")
    if file.exists() and not file.is_file():
        raise ValueError(f"{option} {file}: no ordinary file, and what is written replaces it; choose another place")
    check_folder(option, file.parent, f"{option} {file}")


def check_folder(option: str, folder: Path, said: str | None = None) -> None:
    """Raise ValueError unless files can be written in `folder`, which may be made for it. Nothing is made.

    `said`: what the message begins with, if not with the `option` and the folder.
    """
    said = said or f"{option} {folder}"
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{said}: {there} is a file, so there can be no folder of that name; choose another place")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"{said}: nothing can be written in {there} ({error.strerror}); choose another place"
        ) from error


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """Let an OSError within name `file`: it may name a temporary file, or nothing (a full disk)."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # Pillow's own, which say more
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error
