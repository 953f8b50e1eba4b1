"""Training images in memory: uint8 tensors (N, C, H, W) and int64 labels (N,).

`fashion-mnist` reads the four idx files of Zalando (Debian package dataset-fashion-mnist, or any folder that holds
them); `cifar10` reads the parquet files of the Hub's dataset (columns `img`/`image` and `label`).
"""

from __future__ import annotations

import gzip
import io
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

Split = Literal["train", "test"]


class Images(NamedTuple):
    """`pixels`: uint8 (N, C, H, W); `labels`: int64 (N,); `classes`: the names of the labels."""

    pixels: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]


FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _idx(path: Path) -> np.ndarray:
    """Read one gzipped idx file of unsigned bytes."""
    with gzip.open(path, "rb") as opened:
        raw = opened.read()
    zero, kind, rank = struct.unpack(">HBB", raw[:4])
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
    if zero != 0 or kind != 8 or body.size != np.prod(shape):
        raise ValueError(f"{path}: not an idx file of unsigned bytes, or a truncated one")
    return body.reshape(shape)


def _fashion_mnist(folder: Path, split: Split) -> Images:
    prefix = "train" if split == "train" else "t10k"
    pixels = torch.from_numpy(_idx(folder / f"{prefix}-images-idx3-ubyte.gz").copy())[:, None]
    labels = torch.from_numpy(_idx(folder / f"{prefix}-labels-idx1-ubyte.gz").astype(np.int64))
    return Images(pixels, labels, FASHION_CLASSES)


def _cifar10(folder: Path, split: Split) -> Images:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError("reading parquet needs pyarrow: pip install 'iec-diffusion[data]'") from error
    from PIL import Image

    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise ValueError(f"{folder}: no {split}-*.parquet in it")
    rows = [row for file in files for row in parquet.read_table(file).to_pylist()]
    column = "img" if "img" in rows[0] else "image"
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row[column]["bytes"])).convert("RGB")) for row in rows])
    labels = torch.tensor([row["label"] for row in rows])
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels, CIFAR_CLASSES)


_READERS: dict[str, tuple[Callable[[Path, Split], Images], str, str]] = {
    "fashion-mnist": (_fashion_mnist, "train-images-idx3-ubyte.gz", "install Debian's dataset-fashion-mnist"),
    "cifar10": (_cifar10, "train-*.parquet", "download the parquet files of the Hub's cifar10"),
}


def load_images(name: str, split: Split = "train", folder: str | os.PathLike[str] | None = None) -> Images:
    """Load a dataset into memory.

    Looks in `folder`, else in `$IEC_DATA/<name>`, else in the system's folder of datasets (/usr/share/datasets/<name>).
    Raises ValueError for an unknown name and FileNotFoundError, with what to do, when it is nowhere.
    """
    if name not in _READERS:
        raise ValueError(f"unknown dataset {name!r}; known: {', '.join(_READERS)}")
    read, pattern, cure = _READERS[name]
    places = [Path(folder)] if folder else []
    if not folder and "IEC_DATA" in os.environ:
        places.append(Path(os.environ["IEC_DATA"]) / name)
    if not folder:
        places.append(Path("/usr/share/datasets") / name)
    for place in places:
        if any(place.glob(pattern)):
            return read(place, split)
    looked = ", ".join(map(str, places))
    raise FileNotFoundError(f"dataset {name!r}: no {pattern} in {looked}; {cure}, or point --data or $IEC_DATA at it")
