"""Shards: what is written comes back, or is refused, or is made again; full disks; and conditions by the number of the image."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from iec.evaluate.conditions import Conditions
from iec.evaluate.shards import MANIFEST, ShardSet, _amount

RUN = {"model": "m", "arm": {"num_inference_steps": 5}}


def made(shards: ShardSet, start: int) -> np.ndarray:
    """Images that tell their seeds: uint8 (count, 1, 2, 3)."""
    return np.stack([np.full((1, 2, 3), seed % 251, dtype=np.uint8) for seed in shards.seeds(start)])


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    """13 images in shards of 5, all there."""
    found = ShardSet(tmp_path / "run", RUN, num=13, size=5, seed=7)
    for start, _ in found.missing():
        found.write(start, made(found, start), evaluations=np.array(start))
    return found


def test_images_come_back_in_the_order_of_their_seeds(tmp_path: Path) -> None:
    shards = ShardSet(tmp_path, RUN, num=13, size=5, seed=7)
    assert shards.missing() == shards.shards() == [(0, 5), (5, 5), (10, 3)]
    assert list(shards.seeds(10)) == [17, 18, 19]
    for start in (10, 0, 5):
        shards.write(start, torch.from_numpy(made(shards, start)), evaluations=np.array(start))
    assert shards.missing() == []
    images = shards.images()
    assert images.dtype == torch.uint8 and images.shape == (13, 1, 2, 3)
    assert images[:, 0, 0, 0].tolist() == list(range(7, 20))
    parts = list(ShardSet.open(tmp_path).parts())
    assert [(start, int(arrays["evaluations"])) for start, arrays in parts] == [(0, 0), (5, 5), (10, 10)]


def test_equal_images_are_equal_files(shards: ShardSet, tmp_path: Path) -> None:
    other = ShardSet(tmp_path / "other", RUN, num=13, size=5, seed=7)
    other.write(5, made(other, 5), evaluations=np.array(5))
    assert other.path(5).read_bytes() == shards.path(5).read_bytes()
    with zipfile.ZipFile(shards.path(5)) as opened:
        assert sorted(opened.namelist()) == ["evaluations.npy", "images.npy"]


def test_a_run_goes_on_and_grows(shards: ShardSet) -> None:
    assert ShardSet(shards.folder, RUN, num=13, size=5, seed=7).missing() == []
    more = ShardSet(shards.folder, RUN, num=22, size=5, seed=7)
    assert more.missing() == [(10, 5), (15, 5), (20, 2)], "the last shard had room"
    assert ShardSet.open(shards.folder).num == 22
    for start, _ in more.missing():
        more.write(start, made(more, start))
    assert more.images()[:, 0, 0, 0].tolist() == list(range(7, 29))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": {**RUN, "model": "n"}}, r"another run \(model: 'm' there, 'n' here\)"),
        ({"identity": {"model": "m"}}, r"arm: \{'num_inference_steps': 5\} there, None here"),
        ({"size": 4}, r"size: 5 there, 4 here"),
        ({"seed": 8}, r"seed: 7 there, 8 here"),
        ({"num": 12}, r"a run of 13 images, more than 12"),
        ({"num": 0}, r"0 images in shards of 5"),
    ],
)
def test_images_of_another_run_are_refused(shards: ShardSet, changes: dict[str, Any], message: str) -> None:
    before = (shards.folder / MANIFEST).read_bytes()
    with pytest.raises(ValueError, match=message):
        ShardSet(shards.folder, **{"identity": RUN, "num": 13, "size": 5, "seed": 7, **changes})
    assert (shards.folder / MANIFEST).read_bytes() == before


def _edited(**changes: Any) -> Callable[[Path], None]:
    return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_edited(format="other"), "other of version 1"),
        (_edited(version=2), "iec-shards of version 2, this release reads iec-shards 1"),
        (_edited(num="many"), "num: found 'many', expected a whole number"),
        (_edited(more=1), "unknown field.* more"),
        (lambda file: file.write_text("{"), "no manifest of shards that can be read"),
        (lambda file: file.unlink(), "shards without manifest.json"),
    ],
)
def test_manifests_that_are_none(shards: ShardSet, damage: Callable[[Path], None], message: str) -> None:
    damage(shards.folder / MANIFEST)
    with pytest.raises(ValueError, match=message):
        ShardSet(shards.folder, RUN, num=13, size=5, seed=7)


def test_a_folder_without_shards(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no manifest\.json, so this is no folder of shards"):
        ShardSet.open(tmp_path)


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[data.index(b"\x0d\x0d\x0d") + 1] ^= 1  # a pixel of seed 13
    file.write_bytes(data)


def _saved(**arrays: Any) -> Callable[[Path], None]:
    def save(file: Path) -> None:
        with open(file, "wb") as opened:
            np.savez(opened, **arrays)

    return save


def _npy() -> bytes:
    data = io.BytesIO()
    np.save(data, np.zeros((5, 1, 2, 3), dtype=np.uint8))
    return data.getvalue()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "one bit": _flip,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-30]),
    "empty": lambda file: file.write_bytes(b""),
    "no archive": lambda file: file.write_bytes(b"\x93NUMPY but not quite"),
    "one array": lambda file: file.write_bytes(_npy()),
    "a pickle": _saved(images=np.array([{}], dtype=object)),
    "floats": _saved(images=np.zeros((5, 1, 2, 3))),
    "no images": _saved(pictures=np.zeros((5, 1, 2, 3), dtype=np.uint8)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_an_error_to_read_and_made_again(shards: ShardSet, damage: str) -> None:
    DAMAGES[damage](shards.path(5))
    for read in (lambda: shards.read(5), shards.images):
        with pytest.raises(ValueError, match=r"shard-00000005\.npz: damaged shard"):
            read()
    with pytest.raises(ValueError, match="run the command that made the folder again: it makes this one anew"):
        shards.images()
    with pytest.warns(RuntimeWarning, match=r"shard-00000005\.npz: damaged shard .*; it is made again"):
        assert shards.missing() == [(5, 5)]
    shards.write(5, made(shards, 5))
    assert shards.missing() == [] and shards.images()[:, 0, 0, 0].tolist() == list(range(7, 20))


def test_missing_shards_are_told(shards: ShardSet) -> None:
    shards.path(5).unlink()
    with pytest.raises(
        ValueError, match=r"1 of 3 shards are missing, the first being shard-00000005\.npz; run the command"
    ):
        shards.images()
    with pytest.raises(ValueError, match="absent"):
        shards.read(5)


NAN = np.full((5, 1, 2, 3), 0.5, dtype=np.float32)
NAN[[1, 3], 0, 1, 2] = np.nan, np.inf


@pytest.mark.parametrize(
    ("start", "images", "extra", "message"),
    [
        (0, NAN, {}, r"seeds \[8, 10\] hold NaN"),
        (0, np.zeros((5, 1, 2, 3)), {}, "seeds 7 to 11 are float64"),
        (0, np.zeros((5, 2, 3), dtype=np.uint8), {}, r"are uint8 \(5, 2, 3\); expected uint8 \(count, C, H, W\)"),
        (0, np.zeros((4, 1, 2, 3), dtype=np.uint8), {}, "are 4, expected 5"),
        (10, np.zeros((5, 1, 2, 3), dtype=np.uint8), {}, "seeds 17 to 19 are 5, expected 3"),
        (0, np.zeros((5, 3, 2, 3), dtype=np.uint8), {}, r"are \(3, 2, 3\), those of .*shard-00000005\.npz \(1, 2, 3\)"),
        (
            0,
            np.zeros((5, 1, 2, 3), dtype=np.uint8),
            {"errors": NAN[:, 0, 1, 2]},
            r"errors of seeds \[8, 10\] holds NaN",
        ),
        (0, np.zeros((5, 1, 2, 3), dtype=np.uint8), {"total": np.array(np.nan)}, "total of the images of .* holds NaN"),
        (0, np.zeros((5, 1, 2, 3), dtype=np.uint8), {"who": np.array([object()])}, "array of Python objects"),
        (3, np.zeros((5, 1, 2, 3), dtype=np.uint8), {}, "no shard begins at image 3"),
        (15, np.zeros((5, 1, 2, 3), dtype=np.uint8), {}, "no shard begins at image 15"),
    ],
)
def test_what_is_no_shard_is_not_written(
    shards: ShardSet, start: int, images: np.ndarray, extra: dict[str, Any], message: str
) -> None:
    before = {file.name: file.read_bytes() for file in shards.folder.iterdir()}
    with pytest.raises(ValueError, match=message):
        shards.write(start, images, **extra)
    assert {file.name: file.read_bytes() for file in shards.folder.iterdir()} == before


@pytest.mark.parametrize("where", ["write", "fsync", "rename", "mkdir"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(
    shards: ShardSet, where: str, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wherever it shows: nothing is half written, what was there stays, and it is said what to do."""
    before = {file.name: file.read_bytes() for file in shards.folder.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        owner, name = {"write": (Path, "write_bytes"), "fsync": (os, "fsync"), "rename": (Path, "replace")}.get(
            where, (Path, "mkdir")
        )
        patch.setattr(owner, name, full)
        act = {"mkdir": lambda: ShardSet(tmp_path / "new", RUN, num=5)}.get(
            where, lambda: shards.write(5, made(shards, 5) + 1)
        )
        with pytest.raises(
            RuntimeError, match=r"the disk is full, .* was not written; everything before it is kept"
        ) as told:
            act()
    assert where == "mkdir" or re.search(r"shard-00000005\.npz \(\d+ bytes\) was not", str(told.value))
    assert {file.name: file.read_bytes() for file in shards.folder.iterdir()} == before
    assert not (tmp_path / "new").exists()
    shards.write(5, made(shards, 5))


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (412_300, "412.3 kB"), (41e6, "41.0 MB")]
)
def test_numbers_of_bytes_can_be_read(count: int, said: str) -> None:
    assert _amount(count) == said


def test_other_failures_of_the_disk_are_themselves(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=r"^\[Errno 5\]"):
        shards.write(5, made(shards, 5))


def test_what_a_killed_write_left_goes_with_the_next(shards: ShardSet) -> None:
    left = shards.folder / f".{shards.path(5).name}.abc123"
    left.write_bytes(b"half")
    ShardSet.open(shards.folder).images()
    assert left.exists(), "a reader removes nothing: somebody may be writing"
    shards.write(0, made(shards, 0))
    assert left.exists()
    shards.write(5, made(shards, 5))
    assert not left.exists()


# --- conditions -------------------------------------------------------------------------------------------------------


def test_conditions_depend_on_the_number_of_the_image_alone(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\nein Bär\n", encoding="utf-8")
    given = {
        "class_labels": {"each": 50},
        "prompts": {"file": "prompts.txt"},
        "negative_prompt": "blurry",
        "guidance_scale": 1.5,
    }
    conditions = Conditions(given, folder=tmp_path)
    assert conditions.of([0, 2]) == {
        "class_labels": [0, 0],
        "prompt": ["a cat", "ein Bär"],
        "negative_prompt": "blurry",
        "guidance_scale": 1.5,
    }
    assert conditions.of([1])["prompt"] == [""], "an empty line is an empty prompt"
    assert Conditions({"class_labels": {"each": 50}}).of([49, 50, 99, 100])["class_labels"] == [0, 1, 1, 2]
    assert Conditions({"class_labels": [5, 6, 7]}).of(range(1, 3)) == {"class_labels": [6, 7]}
    assert Conditions().of(range(3)) == {}


def test_random_conditions_are_the_same_everywhere() -> None:
    conditions = Conditions({"class_labels": {"random": 10}}, seed=3)
    labels = conditions.of(range(2000))["class_labels"]
    assert labels == [conditions.of([index])["class_labels"][0] for index in range(2000)]
    assert labels[:8] == [0, 3, 3, 5, 5, 0, 3, 9], "of this release and every later one"
    counts = np.bincount(labels, minlength=10)
    assert len(counts) == 10 and counts.min() > 150 and counts.max() < 250
    assert Conditions({"class_labels": {"random": 10}}, seed=4).of(range(2000))["class_labels"] != labels


def test_conditions_are_known_by_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\ny\n")
    (tmp_path / "b.txt").write_text("x\ny")
    one, two = (Conditions({"prompt": {"file": str(tmp_path / name)}}).identity() for name in ("a.txt", "b.txt"))
    assert one == two == Conditions({"prompt": ["x", "y"]}).identity()
    assert Conditions({"prompt": ["x", "z"]}).identity() != one
    assert Conditions({"class_labels": {"each": 5}}, seed=1).identity() == {"class_labels": {"each": 5}}
    drawn = [Conditions({"class_labels": {"random": 5}}, seed=seed).identity() for seed in (1, 2)]
    assert drawn[0] != drawn[1]
    json.dumps(drawn)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"class_labels": {"every": 5}},
            "class_labels is .*expected one value, or a table of one of each, cycle, random",
        ),
        ({"class_labels": {"each": 5, "random": 3}}, "expected one value, or a table of one of"),
        ({"class_labels": {"each": 0}}, "class_labels.each is 0, expected a positive whole number"),
        ({"class_labels": {"random": True}}, "class_labels.random is True"),
        ({"prompt": []}, "prompt.list is .*expected a list that is not empty"),
        ({"prompt": {"file": 3}}, "prompt.file is 3, expected the path"),
        ({"prompt": {"file": "absent.txt"}}, "absent.txt cannot be read as text"),
        ({"prompt": {"file": os.devnull}}, "is empty"),
        ({"prompt": "a", "prompts": "b"}, "both prompt and prompts"),
        ({"guidance_scale": float("nan")}, "conditions.guidance_scale: found nan"),
    ],
)
def test_conditions_that_are_none(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Conditions(given)


def test_more_images_than_conditions() -> None:
    with pytest.raises(ValueError, match="prompt has 2 values, but image 2 is asked for"):
        Conditions({"prompt": ["a", "b"]}).of([1, 2])
