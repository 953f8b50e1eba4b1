"""Tasks for the tests of workers: functions that other processes find by name, light enough to be imported in no time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

Arguments = dict[str, Any]
Files = tuple[Path, ...]


def _first_time(mark: str) -> bool:
    """Whether nobody called with this mark before; leaves the mark, with this process's number in it."""
    try:
        with open(mark, "x", encoding="ascii") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return False
    return True


def square(arguments: Arguments, files: Files) -> Arguments:
    """`number` squared, as an array, and who did it."""
    print("libraries print what they like")
    return {"value": np.full((2, 3), arguments["number"] ** 2, dtype=np.int64), "pid": os.getpid()}


def killed_once(arguments: Arguments, files: Files) -> Arguments:
    """As `square`, but the first worker that tries is killed in the middle of it."""
    if _first_time(arguments["mark"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return square(arguments, files)


def killed_always(arguments: Arguments, files: Files) -> None:
    """Kills its worker, and leaves a mark each time."""
    with open(arguments["mark"], "a", encoding="ascii") as file:
        file.write("x")
    os.kill(os.getpid(), signal.SIGKILL)


def exits(arguments: Arguments, files: Files) -> None:
    """Ends its worker as a library would that calls exit in C, having said why."""
    os.write(2, b"the library gives up\n")
    os._exit(7)


def fails(arguments: Arguments, files: Files) -> None:
    """Raises."""
    raise KeyError(f"no {arguments['what']}")


def sleeps(arguments: Arguments, files: Files) -> None:
    """Leaves its process's number in `mark` and stays for ten minutes."""
    _first_time(arguments["mark"])
    time.sleep(600)


def environment(arguments: Arguments, files: Files) -> Arguments:
    """The threads that libraries are told to have."""
    return {name: os.environ.get(name) for name in arguments["names"]}


def torch_threads(arguments: Arguments, files: Files) -> int:
    """The threads that torch has."""
    import torch

    return torch.get_num_threads()


def contents(arguments: Arguments, files: Files) -> Arguments:
    """Name and text of every file, and of every file in a folder."""
    found = {}
    for path in files:
        for file in [path] if path.is_file() else sorted(path.rglob("*.txt")):
            found[file.relative_to(path.parent).as_posix()] = file.read_text(encoding="utf-8")
    return found


def large(arguments: Arguments, files: Files) -> np.ndarray:
    """Twenty megabytes."""
    return np.arange(20_000_000, dtype=np.uint8)


def returned(arguments: Arguments, files: Files) -> Any:
    """Something that cannot be a result."""
    return {"lambda": lambda: None, "path": Path(), "objects": np.array([object()]), "set": {1}}[arguments["kind"]]


def images(arguments: Arguments, files: Files) -> Arguments:
    """Images that depend on their seeds alone, uint8 (count, 1, 4, 4), after a while."""
    time.sleep(arguments["seconds"])
    made = [np.random.default_rng(seed).integers(0, 256, (1, 4, 4), dtype=np.uint8) for seed in arguments["seeds"]]
    return {"images": np.stack(made)}


def marked_shard(arguments: Arguments, files: Files) -> Any:
    """As `iec.evaluate.scale:sample_shard`, having written into the folder `mark` who is about to do which `key`.

    All but the first shard are held back until a file "go" is there.
    """
    from iec.evaluate.scale import sample_shard

    folder = Path(arguments["mark"])
    (folder / f"{arguments['key']}.part").write_text(str(os.getpid()))
    (folder / f"{arguments['key']}.part").rename(folder / arguments["key"])
    result = sample_shard(arguments, files)
    while arguments["key"] != "0" and not (folder / "go").exists():
        time.sleep(0.01)
    return result
