"""Images on disk in shards: each written once, whole or not at all, and checked when it is read.

A folder holds `manifest.json`, which says what the images are, and one .npz file of arrays (no pickles) for each `size` images,
named by the number of its first. Image i has the seed `seed + i`, so who made which shard when does not matter.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iec.artifact import fingerprint
from iec.artifact.files import replacing, write_json
from iec.artifact.plain import Fields, loads, plain, short

if TYPE_CHECKING:
    import torch

FORMAT, VERSION = "iec-shards", 1
MANIFEST = "manifest.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class ShardSet:
    """Images 0 … num − 1 of one run, uint8 (C, H, W) each, in shards of `size`.

    One process at a time may write into a folder; any number may read meanwhile.

    Args:
        folder: made if need be.
        identity: what decides the images beside their seeds, as plain data. A folder of another identity, seed or size is
            refused; one of fewer images is continued.
        num: number of images.
        size: images of a shard; the last may have fewer.
        seed: of image 0.

    Raises:
        ValueError: the folder holds another run's images, more images, or shards without a manifest; bad numbers.
        TypeError: `identity` is no plain data.
    """

    def __init__(
        self, folder: str | os.PathLike[str], identity: Mapping[str, Any], num: int, size: int = 50, seed: int = 0
    ) -> None:
        if num < 1 or size < 1 or seed < 0:
            raise ValueError(f"{num} images in shards of {size} from seed {seed} on: expected 1, 1 and 0 or more")
        self.folder, self.num, self.size, self.seed = Path(folder), num, size, seed
        self.identity = plain(identity, "identity")
        held = _manifest(self.folder)
        if held is None:
            if any(self.folder.glob("shard-*.npz")):
                raise ValueError(
                    f"{self.folder}: shards without {MANIFEST}, so whose they are is unknown; choose another folder"
                )
            self._describe()
            return
        self._refuse_another(held)
        if num > held["num"]:
            self._describe()

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> ShardSet:
        """The images of a folder, whatever they are. Raises ValueError when it has no manifest, or a bad one."""
        held = _manifest(Path(folder))
        if held is None:
            raise ValueError(f"{folder}: no {MANIFEST}, so this is no folder of shards")
        return cls(folder, held["identity"], held["num"], held["size"], held["seed"])

    @property
    def fingerprint(self) -> str:
        """sha256 of identity, seed and size: what a shard depends on beside its place."""
        return fingerprint.plain({"identity": self.identity, "seed": self.seed, "size": self.size})

    def _describe(self) -> None:
        about = {"num": self.num, "size": self.size, "seed": self.seed, "identity": self.identity}
        with _space(self.folder, "its manifest"):
            write_json(
                self.folder / MANIFEST,
                {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint, **about},
            )

    def _refuse_another(self, held: dict[str, Any]) -> None:
        if held["fingerprint"] != self.fingerprint:
            ours = {"size": self.size, "seed": self.seed, **self.identity}
            theirs = {"size": held["size"], "seed": held["seed"], **held["identity"]}
            keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
            told = "; ".join(f"{key}: {short(theirs.get(key))} there, {short(ours.get(key))} here" for key in keys)
            raise ValueError(f"{self.folder} holds images of another run ({told}); choose another folder")
        if held["num"] > self.num:
            raise ValueError(
                f"{self.folder} holds a run of {held['num']} images, more than {self.num}; ask for as many, or choose "
                "another folder"
            )

    def path(self, start: int) -> Path:
        """The file of the shard whose first image is number `start`."""
        return shard_file(self.folder, start)

    def shards(self) -> list[tuple[int, int]]:
        """All shards: number of the first image, count."""
        return [(start, min(self.size, self.num - start)) for start in range(0, self.num, self.size)]

    def seeds(self, start: int) -> range:
        """The seeds of a shard."""
        return range(self.seed + start, self.seed + min(start + self.size, self.num))

    def missing(self) -> list[tuple[int, int]]:
        """The shards that are still to be made. Reads all that are there; a damaged one is missing, with a warning."""
        found = []
        for start, count in self.shards():
            if not self.path(start).exists():
                found.append((start, count))
                continue
            try:
                held = len(self.read(start)["images"])
            except ValueError as error:
                warnings.warn(f"{error}; it is made again", RuntimeWarning, stacklevel=2)
                held = 0
            if held != count:  # or the last of a run that had fewer images
                found.append((start, count))
        return found

    def write(self, start: int, images: np.ndarray | torch.Tensor, **extra: np.ndarray) -> None:
        """Keep the images of a shard, uint8 (count, C, H, W), and other arrays with them, atomically.

        Raises:
            ValueError: `start` begins no shard; the number, type or shape of the images is wrong, differs from that of the other
                shards, or an extra array holds NaN or objects. Nothing is written.
            RuntimeError: the disk is full. Nothing half written is left, and all other shards are kept.
        """
        if start % self.size or not 0 <= start < self.num:
            raise ValueError(f"no shard begins at image {start}: they have {self.size} images, {self.num} in all")
        arrays = {"images": np.ascontiguousarray(images), **{name: np.asarray(value) for name, value in extra.items()}}
        self._check(start, arrays)
        data = io.BytesIO()
        np.savez(data, allow_pickle=False, **arrays)
        file = self.path(start)
        for left in self.folder.glob(f".{file.name}.*"):  # of a write that was killed
            left.unlink(missing_ok=True)
        with _space(self.folder, f"{file.name} ({_amount(data.tell())})"), replacing(file) as temporary:
            temporary.write_bytes(data.getbuffer())

    def _check(self, start: int, arrays: dict[str, np.ndarray]) -> None:
        images, seeds = arrays["images"], self.seeds(start)
        which = f"the images of seeds {seeds[0]} to {seeds[-1]}"
        if images.dtype.kind == "f" and not np.isfinite(images).all():
            bad = [seed for seed, image in zip(seeds, images, strict=False) if not np.isfinite(image).all()]
            raise ValueError(f"the images of seeds {bad} hold NaN or infinity; they are not kept")
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"{which} are {images.dtype} {images.shape}; expected uint8 (count, C, H, W)")
        if len(images) != len(seeds):
            raise ValueError(f"{which} are {len(images)}, expected {len(seeds)}")
        other = next(
            (file for begin, _ in self.shards() if begin != start and (file := self.path(begin)).exists()), None
        )
        if other is not None and (shape := _shape(other)) is not None and shape[1:] != images.shape[1:]:
            raise ValueError(f"{which} are {images.shape[1:]}, those of {other} {shape[1:]}")
        for name, value in arrays.items():
            if value.dtype.hasobject:
                raise ValueError(f"{name} of {which} is an array of Python objects; expected numbers")
            if value.dtype.kind in "fc" and not np.isfinite(value).all():
                per_image = value.ndim > 0 and len(value) == len(seeds)
                bad = (
                    [seed for seed, row in zip(seeds, value, strict=True) if not np.isfinite(row).all()]
                    if per_image
                    else []
                )
                raise ValueError(f"{name} of {f'seeds {bad}' if bad else which} holds NaN or infinity; it is not kept")

    def read(self, start: int) -> dict[str, np.ndarray]:
        """The arrays of a shard, "images" among them. Raises ValueError when it is absent or damaged (its checksum is read)."""
        file = self.path(start)
        try:
            with open(file, "rb") as opened:
                held = np.load(opened, allow_pickle=False)
                if not isinstance(held, np.lib.npyio.NpzFile):
                    raise ValueError("one array, not an archive of them")
                arrays = {name: held[name] for name in held.files}
        except FileNotFoundError as error:
            raise ValueError(f"{file}: absent; the run that makes it has not ended") from error
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{file}: damaged shard ({short(str(error))})") from error
        images = arrays.get("images")
        if images is None or images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"{file}: damaged shard (no images, uint8 (count, C, H, W), in it)")
        return arrays

    def parts(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """The shards in the order of the seeds, one in memory at a time: number of the first image, arrays.

        Raises ValueError, saying how many are missing, or which one is damaged.
        """
        absent = [start for start, _ in self.shards() if not self.path(start).exists()]
        if absent:
            raise ValueError(
                f"{self.folder}: {len(absent)} of {len(self.shards())} shards are missing, the first being "
                f"{self.path(absent[0]).name}; run the command that makes them again"
            )
        for start, count in self.shards():
            try:
                arrays = self.read(start)
                if len(arrays["images"]) != count:
                    raise ValueError(f"{self.path(start)}: {len(arrays['images'])} images, expected {count}")
            except ValueError as error:
                raise ValueError(
                    f"{error}; run the command that made the folder again: it makes this one anew"
                ) from error
            yield start, arrays

    def images(self) -> torch.Tensor:
        """All images, uint8 (N, C, H, W), in the order of the seeds. Raises as `parts` does."""
        import torch

        kept: torch.Tensor | None = None
        for start, arrays in self.parts():
            part = torch.from_numpy(arrays["images"])
            if kept is None:  # as large as all, once
                kept = torch.empty(self.num, *part.shape[1:], dtype=torch.uint8)
            if part.shape[1:] != kept.shape[1:]:
                raise ValueError(
                    f"{self.path(start)}: images of {tuple(part.shape[1:])}, the others {tuple(kept.shape[1:])}"
                )
            kept[start : start + len(part)] = part
        assert kept is not None
        return kept


def shard_file(folder: Path, start: int) -> Path:
    """Where a folder of shards has the one whose first image is number `start`."""
    return folder / f"shard-{start:08d}.npz"


def _manifest(folder: Path) -> dict[str, Any] | None:
    """What the manifest says; None if there is none."""
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        fields = Fields(loads(file.read_text(encoding="utf-8")), "")
        held = {"format": fields.take("format", "text"), "version": fields.take("version", "a whole number")}
        if (held["format"], held["version"]) != (FORMAT, VERSION):
            raise ValueError(f"{held['format']} of version {held['version']}, this release reads {FORMAT} {VERSION}")
        held["fingerprint"] = fields.take("fingerprint", "text")
        held |= {name: fields.take(name, "a whole number") for name in ("num", "size", "seed")}
        held["identity"] = fields.take("identity", "an object")
        fields.done()
    except ValueError as error:
        raise ValueError(f"{file}: no manifest of shards that can be read: {error}") from error
    return held


def _shape(file: Path) -> tuple[int, ...] | None:
    """The shape of the images in a shard, from its header alone; None if it is damaged."""
    try:
        with zipfile.ZipFile(file) as opened, opened.open("images.npy") as member:
            version = np.lib.format.read_magic(member)
            return np.lib.format.read_array_header_1_0(member)[0] if version == (1, 0) else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _amount(count: int) -> str:
    """A number of bytes to read: 812 bytes, 3.2 kB, 41.0 MB."""
    if count < 1000:
        return f"{count} bytes"
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


@contextlib.contextmanager
def _space(folder: Path, what: str) -> Iterator[None]:
    """Say what a full disk means: that all else is kept."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise RuntimeError(
            f"{folder}: the disk is full, {what} was not written; everything before it is kept. Make room and give the same "
            "command again: it goes on there"
        ) from error
