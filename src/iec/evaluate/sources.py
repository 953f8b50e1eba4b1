"""Images from wherever they are, as uint8 tensors in one order, without holding all of them at once.

| spec | images |
|---|---|
| a folder of pictures | every PNG, JPEG, WebP, BMP, TIFF, GIF or PPM below it, by path, numbers in it by value |
| a folder of shards | those of `iec sample --shards`, in the order of their seeds |
| `FILE.npz` | its array `arr_0` (or `images`), as guided-diffusion's batches |
| `FILE.npy`, a folder of them | arrays, by path as well |
| `FILE.parquet`, a folder of them | a column of encoded images (`image` or `img`), as on the Hub; `FOLDER:SPLIT` for one split |
| `datasets:NAME:SPLIT` | a dataset that the library `datasets` can load |

Arrays are uint8 (N, H, W, C), (N, C, H, W) or (N, H, W). All images of a source have one size and one number of channels.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from iec.evaluate.decoding import Picture, arrays_of, decoded, table_rows

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
_FILES = (*PICTURES, ".npz", ".npy", ".parquet")


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """`name`: how it was called. `pictures()`: each image (C, H, W) in order, with the file, and place in it, that it is from."""

    name: str
    pictures: Callable[[], Iterator[Picture]]

    def batches(self, size: int = 50, limit: int | None = None) -> Iterator[tuple[torch.Tensor, list[str]]]:
        """Images uint8 (B, C, H, W) with B <= `size`, the first `limit` of them (None: all), and where each is from.

        Raises ValueError when there are none, fewer than `limit`, one cannot be read, or sizes differ, naming the file.
        """
        held: list[Picture] = []
        first: Picture | None = None
        count = 0
        for picture in self.pictures():
            if count == limit:
                break
            first = first or picture
            held.append(_like(first, picture))
            count += 1
            if len(held) == size:
                yield _batch(held)
                held = []
        if held:
            yield _batch(held)
        if count == 0:
            raise ValueError(f"{self.name}: no images in it")
        if limit is not None and count < limit:
            raise ValueError(f"{self.name}: {count} images, {limit} were asked for")

    def images(self, limit: int | None = None) -> torch.Tensor:
        """All images at once, uint8 (N, C, H, W). Raises as `batches` does."""
        return torch.cat([batch for batch, _ in self.batches(1000, limit)])


def _batch(held: list[Picture]) -> tuple[torch.Tensor, list[str]]:
    return torch.stack([picture.pixels for picture in held]), [picture.place for picture in held]


def _like(first: Picture, picture: Picture) -> Picture:
    """`picture` as one of the images of which `first` is the first; among colour images a grey one becomes RGB."""
    if first.pixels.shape[0] == 3 and picture.pixels.shape[0] == 1:
        picture = Picture(picture.pixels.expand(3, -1, -1), picture.place)
    if picture.pixels.shape != first.pixels.shape:
        raise ValueError(
            f"{picture.place}: {picture}, but {first.place} is {first}; images of one set must be alike "
            "(real photographs: give --crop SIDE)"
        )
    return picture


def as_source(images: torch.Tensor | ImageSource, seed: int | None = None) -> ImageSource:
    """A source; images in memory, uint8 (N, C, H, W), become one. `seed`: of the first, where they were sampled in order.

    Raises TypeError for images of another type, ValueError for another shape.
    """
    if isinstance(images, ImageSource):
        return images
    if images.dtype != torch.uint8:
        raise TypeError(f"images are {images.dtype}, expected uint8")
    if images.ndim != 4:
        raise ValueError(f"images have the shape {tuple(images.shape)}, expected (N, C, H, W)")
    places = [f"image {i}" if seed is None else f"{seed + i:06d}" for i in range(len(images))]
    return ImageSource("images", lambda: (Picture(*each) for each in zip(images, places, strict=True)))


def by_number(path: Path) -> tuple[list[list[tuple[int, int]]], Path]:
    """Key of the order in which files are read: by path, character by character, but whole numbers by value: img2 before img10.

    Names whose numbers have equally many digits are ordered as plain text is.
    """
    # A number stands where its digits stand among other characters.
    parts = [re.findall(r"(\d+)|(.)", part, re.ASCII | re.DOTALL) for part in path.parts]
    return [[(ord("0"), int(digits)) if digits else (ord(other), 0) for digits, other in part] for part in parts], path


def open_source(spec: str | Path, *, crop: int | None = None, also: Sequence[str] = ()) -> ImageSource:
    """The images that `spec` names (see the head of this module).

    `crop`: scale each so that its shorter side has that many pixels (bicubic, smoothed), and keep the middle; for real
    photographs of many sizes. `also`: what else the caller would have taken, for messages. Nothing is read yet, so a bad image
    is only told when it is met.

    Raises ValueError when there is no such thing, or it holds no images.
    """
    name = str(spec)
    opened = _open(name, also)
    if crop is None:
        return opened
    if crop < 1:
        raise ValueError(f"crop is {crop}, expected a number of pixels")
    return ImageSource(name, lambda: (picture.cropped(crop) for picture in opened.pictures()))


def _open(name: str, also: Sequence[str]) -> ImageSource:
    if name.startswith("datasets:"):
        return ImageSource(name, lambda: _dataset(name))
    path, split = Path(name), None
    if not path.exists() and ":" in name:
        head, _, split = name.rpartition(":")
        path = Path(head)
    if path.is_file() and split is None:
        if path.suffix.lower() not in _FILES:
            raise ValueError(f"{path}: no image; expected {', '.join((*_FILES, *also))}")
        return ImageSource(name, lambda: _file(path))
    if path.is_dir():
        return _folder(name, path, split)
    others = "".join(f", {each}" for each in also)
    raise ValueError(
        f"{name}: no such file or folder; expected a folder of images, .npz, .npy, .parquet or datasets:NAME{others}"
    )


def _folder(name: str, folder: Path, split: str | None) -> ImageSource:
    from iec.evaluate.shards import MANIFEST

    if (folder / MANIFEST).is_file() and split is None:
        return ImageSource(name, lambda: _shards(folder))
    below = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    below.sort(key=by_number)
    tables = [path for path in below if path.suffix == ".parquet"]
    if tables:
        # The Hub's files are called SPLIT-00000-of-00001.parquet.
        splits = sorted({path.name.partition("-")[0] for path in tables})
        if split is None and len(splits) > 1:
            raise ValueError(f"{name}: holds the splits {', '.join(splits)}; choose one: {name}:{splits[-1]}")
        chosen = [path for path in tables if split is None or path.name.partition("-")[0] == split]
        if not chosen:
            raise ValueError(f"{name}: no split {split!r}; it holds {', '.join(splits)}")
        return ImageSource(name, lambda: _each(chosen))
    if split is not None:
        raise ValueError(f"{name}: {folder} holds no parquet files, so it has no splits")
    arrays = [path for path in below if path.suffix == ".npy"]
    pictures = [path for path in below if path.suffix.lower() in PICTURES]
    if arrays and pictures:
        raise ValueError(
            f"{name}: both arrays ({arrays[0].name}) and pictures ({pictures[0].name}); keep one of them there"
        )
    if not arrays and not pictures:
        raise ValueError(f"{name}: no images in it (pictures, .npy, .parquet, or shards of `iec sample`)")
    return ImageSource(name, lambda: _each(arrays or pictures))


def _each(files: Iterable[Path]) -> Iterator[Picture]:
    for file in files:
        yield from _file(file)


def _file(file: Path) -> Iterator[Picture]:
    kind = file.suffix.lower()
    if kind in (".npz", ".npy"):
        yield from arrays_of(file)
    elif kind == ".parquet":
        for number, data in enumerate(table_rows(file)):
            yield decoded(data, f"{file}, row {number}")
    else:
        yield decoded(file, str(file))


def _shards(folder: Path) -> Iterator[Picture]:
    from iec.evaluate.shards import ShardSet

    held = ShardSet.open(folder)
    for start, arrays in held.parts():
        for seed, image in zip(held.seeds(start), torch.from_numpy(arrays["images"]), strict=True):
            yield Picture(image, f"{folder}/{seed:06d}")


def _dataset(name: str) -> Iterator[Picture]:
    """Rows of a dataset of the library `datasets`: datasets:NAME, :SPLIT (train if not said)."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{name} needs the library: pip install datasets; or give its parquet files") from error
    _, called, *rest = name.split(":")
    split = rest[0] if rest else "train"
    rows = datasets.load_dataset(called, split=split)
    column = next((c for c in ("image", "img") if c in rows.column_names), None)
    if column is None:
        raise ValueError(f"{name}: no column image or img; found {', '.join(rows.column_names)}")
    for number, row in enumerate(rows):
        yield decoded(row[column], f"{name}, row {number}")
