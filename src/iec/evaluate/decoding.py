"""One image, or one file of many, as uint8 tensors; whatever cannot be one is refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import MAGIC_PREFIX
from PIL import Image, ImageOps, UnidentifiedImageError


@dataclasses.dataclass(frozen=True)
class Picture:
    """`pixels`: uint8 (C, H, W), grey (C = 1) or RGB (C = 3). `place`: the file, and place in it, for messages."""

    pixels: torch.Tensor
    place: str

    def __str__(self) -> str:
        channels, height, width = self.pixels.shape
        return f"{'grey' if channels == 1 else 'RGB'}, {width} x {height} pixels"

    def cropped(self, side: int) -> Picture:
        """Scaled (bicubic, smoothed) so that the shorter side is `side`, and the middle of that: (C, side, side)."""
        rows = self.pixels.permute(1, 2, 0).numpy()
        image = Image.fromarray(rows[:, :, 0] if rows.shape[2] == 1 else np.ascontiguousarray(rows))
        return Picture(_pixels(ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)), self.place)


def decoded(data: Path | bytes | Image.Image, place: str) -> Picture:
    """An encoded image, or one that the library Pillow holds already.

    Raises ValueError for what is no image, or a truncated, transparent or 16-bit one.
    """
    try:
        if isinstance(data, Image.Image):
            return Picture(_pixels(_plain(data, place)), place)
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            image.load()
            return Picture(_pixels(_plain(image, place)), place)
    except (UnidentifiedImageError, OSError, SyntaxError, zlib.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{place}: cannot be read as an image, damaged or cut short: {error}") from error


def _plain(image: Image.Image, place: str) -> Image.Image:
    """As 8-bit grey or RGB."""
    if image.mode in ("L", "RGB"):
        return image
    if image.mode in ("1", "CMYK", "YCbCr", "HSV", "LAB"):
        return image.convert("L" if image.mode == "1" else "RGB")
    if image.mode in ("P", "PA", "RGBA", "LA", "La", "RGBa"):
        whole = image.convert("RGBA")
        if whole.getchannel("A").getextrema()[0] < 255:
            raise ValueError(
                f"{place}: has transparent pixels, whose colour is undefined; put it on a background first"
            )
        return whole.convert("L" if image.mode in ("LA", "La") else "RGB")
    raise ValueError(f"{place}: an image of mode {image.mode}; expected 8 bits per channel, grey or RGB")


def _pixels(image: Image.Image) -> torch.Tensor:
    rows = torch.from_numpy(np.array(image, dtype=np.uint8))
    return rows[None] if rows.ndim == 2 else rows.permute(2, 0, 1).contiguous()


@contextlib.contextmanager
def archive(file: Path) -> Iterator[Any]:
    """The arrays of an .npz file by their names, `files`.

    Raises ValueError, also for what is read within, when there is no such file, it is another one, is damaged or holds objects.
    """
    with _reading(file), open(file, "rb") as handle:
        if not zipfile.is_zipfile(handle):  # numpy takes whatever else for a pickle, and says so
            raise ValueError("it is no .npz archive, or was cut short")
        handle.seek(0)
        with np.load(handle, allow_pickle=False) as opened:
            yield opened


def _array(file: Path) -> np.ndarray:
    """That of an .npy file, left on the disk. Raises ValueError as `archive` does."""
    with _reading(file):
        with open(file, "rb") as handle:
            if not handle.read(len(MAGIC_PREFIX)).startswith(MAGIC_PREFIX):
                raise ValueError("it is no .npy file")
        return np.load(file, mmap_mode="r", allow_pickle=False)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Errors of reading within as ValueErrors that name the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file") from error
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        # numpy would have a pickle allowed, which runs whatever code is in it.
        why = "it holds Python objects, expected numbers" if "allow_pickle" in str(error) else error
        raise ValueError(f"{file}: cannot be read: {why}") from error


def arrays_of(file: Path) -> Iterator[Picture]:
    """Images of an .npz (`arr_0` or `images`) or .npy file.

    Raises ValueError for a damaged file, one without such an array, or an array that holds no images.
    """
    if file.suffix.lower() == ".npy":
        array = _array(file)
    else:
        with archive(file) as opened:
            name = next((n for n in ("arr_0", "images") if n in opened.files), None)
            if name is None:
                raise ValueError(f"it holds {', '.join(opened.files) or 'nothing'}; expected images as arr_0 or images")
            array = opened[name]
    if array.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(1)) if array.ndim else []
        if len(bad):
            raise ValueError(f"{file}: images {bad[:5].tolist()} hold NaN or infinity; make them again")
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise ValueError(f"{file}: {array.dtype} {array.shape}; expected uint8 (N, H, W, C), (N, C, H, W) or (N, H, W)")
    if array.ndim == 3:
        array = array[:, None]
    elif array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    elif array.shape[1] not in (1, 3):
        raise ValueError(f"{file}: {array.shape}; expected 1 or 3 channels, last or after the number")
    for number, image in enumerate(array):
        yield Picture(torch.from_numpy(np.array(image)), f"{file}, image {number}")


def table_rows(file: Path) -> Iterator[bytes]:
    """Encoded images of a parquet file, row group by row group, from its column `image` or `img`.

    Raises ImportError without pyarrow, ValueError for a damaged file, one without such a column, or a row without an image.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{file}: reading parquet needs pyarrow: pip install 'iec-diffusion[data]'") from error
    number = 0
    try:
        with parquet.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            column = next((c for c in ("image", "img") if c in names), None)
            if column is None:
                raise ValueError(f"{file}: no column image or img; found {', '.join(names)}")
            for batch in opened.iter_batches(256, columns=[column]):
                for value in batch.column(0).to_pylist():
                    yield _bytes(value, f"{file}, row {number}")
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: damaged parquet file, or one that cannot be read: {error}") from error


def _bytes(value: Any, place: str) -> bytes:
    """Of a cell: the bytes themselves, or the Hub's {"bytes", "path"}."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ValueError(f"{place}: no encoded image in it; expected bytes")
    return data
