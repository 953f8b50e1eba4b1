"""Images from folders, arrays, parquet, shards and datasets; whatever is none is refused by its file's name."""

from __future__ import annotations

import io
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from iec.evaluate.images import save_each
from iec.evaluate.shards import ShardSet
from iec.evaluate.sources import as_source, by_number, open_source


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def encoded(image: torch.Tensor) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(data, format="PNG")
    return data.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_pictures_is_read_in_the_order_of_its_paths(tmp_path: Path, channels: int) -> None:
    images = pixels(5, channels, 6, 4)
    save_each(images[3:], tmp_path / "b", range(2))
    save_each(images[:3], tmp_path / "a", range(8, 11))
    (tmp_path / "README.md").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    source = open_source(tmp_path)
    assert torch.equal(source.images(), images)
    batches = list(source.batches(2))
    assert [len(batch) for batch, _ in batches] == [2, 2, 1]
    assert batches[0][1] == [str(tmp_path / "a" / "000008.png"), str(tmp_path / "a" / "000009.png")]
    assert torch.equal(source.images(4), images[:4])
    with pytest.raises(ValueError, match="5 images, 6 were asked for"):
        source.images(6)


def test_numbers_in_names_count_by_their_values(tmp_path: Path) -> None:
    images = pixels(12, 1, 4, 4)
    save_each(images, tmp_path / "padded", range(12))
    for number, file in enumerate(sorted((tmp_path / "padded").iterdir())):
        (tmp_path / "counted").mkdir(exist_ok=True)
        (tmp_path / "counted" / f"img{number}.png").write_bytes(file.read_bytes())
    assert torch.equal(open_source(tmp_path / "counted").images(), images)
    assert torch.equal(open_source(tmp_path / "padded").images(), images)


def test_names_with_equally_many_digits_keep_the_order_of_text() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        names = ["".join(random.choice(list("a.-_Z/5~é"), 4)).strip("/") for _ in range(30)]  # one digit at a time
        paths = [Path(re.sub("5+", lambda _: f"{random.integers(1000):03d}", name)) for name in names]
        assert sorted(paths, key=by_number) == sorted(paths)
    files = [Path(f"a{folder}/{seed}.png") for folder in (2, 10) for seed in (9, 999999, 1000000)]
    assert sorted(reversed(files), key=by_number) == files
    assert sorted([Path("01"), Path("1")], key=by_number) == sorted([Path("1"), Path("01")], key=by_number)


def test_modes_of_pictures(tmp_path: Path) -> None:
    colour = pixels(3, 6, 4)
    plain = Image.fromarray(colour.permute(1, 2, 0).numpy())
    plain.convert("RGBA").save(tmp_path / "0.png")
    plain.convert("P", palette=Image.Palette.ADAPTIVE).convert("RGB").convert("P").save(tmp_path / "1.png")
    plain.convert("L").save(tmp_path / "2.png")  # grey among colours
    found = open_source(tmp_path).images()
    assert found.shape == (3, 3, 6, 4) and torch.equal(found[0], colour)
    assert torch.equal(found[2, 0], found[2, 2])

    clear = plain.convert("RGBA")
    clear.putpixel((0, 0), (1, 2, 3, 0))
    clear.save(tmp_path / "3.png")
    with pytest.raises(ValueError, match=r"3\.png: has transparent pixels"):
        open_source(tmp_path).images()
    Image.fromarray(np.zeros((6, 4), np.uint16)).save(tmp_path / "3.png")
    with pytest.raises(ValueError, match=r"3\.png: an image of mode I.*expected 8 bits"):
        open_source(tmp_path).images()


def test_pictures_that_are_none_are_named(tmp_path: Path) -> None:
    save_each(pixels(2, 3, 40, 40), tmp_path, range(2))
    whole = (tmp_path / "000001.png").read_bytes()
    (tmp_path / "000001.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"000001\.png: cannot be read as an image, damaged or cut short"):
        open_source(tmp_path).images()
    (tmp_path / "000001.png").write_text("text")
    with pytest.raises(ValueError, match=r"000001\.png: cannot be read"):
        open_source(tmp_path).images()
    save_each(pixels(1, 3, 40, 39), tmp_path, [1])
    with pytest.raises(
        ValueError, match=r"000001\.png: RGB, 39 x 40 pixels, but .*000000\.png is RGB, 40 x 40 pixels; .*--crop"
    ):
        open_source(tmp_path).images()
    save_each(pixels(1, 1, 40, 40), tmp_path, [0])
    save_each(pixels(1, 3, 40, 40), tmp_path, [1])
    with pytest.raises(ValueError, match=r"000001\.png: RGB, .* is grey"):
        open_source(tmp_path).images()


def test_crop_keeps_the_middle(tmp_path: Path) -> None:
    wide = torch.zeros(1, 3, 8, 16, dtype=torch.uint8)
    wide[:, :, :, 4:12] = 200
    save_each(wide, tmp_path, [0])
    save_each(torch.full((1, 3, 20, 12), 200, dtype=torch.uint8), tmp_path, [1])
    found = open_source(tmp_path, crop=4).images()
    assert found.shape == (2, 3, 4, 4)
    assert (found[1] == 200).all()
    assert (
        found[0, :, :, 1:3] > 190
    ).all()  # the edges of 4:12 fall on the edges of the middle, where the filter rings
    with pytest.raises(ValueError, match="crop is 0"):
        open_source(tmp_path, crop=0)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_arrays_of_every_layout(tmp_path: Path, layout: str) -> None:
    images = pixels(4, 1 if layout == "NHW" else 3, 6, 5)
    array = {"NHWC": images.permute(0, 2, 3, 1), "NCHW": images, "NHW": images[:, 0]}[layout].numpy()
    np.savez(tmp_path / "batch.npz", array)
    assert torch.equal(open_source(tmp_path / "batch.npz").images(), images)
    (tmp_path / "parts").mkdir()
    np.save(tmp_path / "parts" / "0.npy", array[:1])
    np.save(tmp_path / "parts" / "1.npy", array[1:])
    assert torch.equal(open_source(tmp_path / "parts").images(), images)
    assert torch.equal(open_source(tmp_path / "parts" / "1.npy").images(), images[1:])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), r"float32 \(2, 4, 4, 3\); expected uint8"),
        (np.full((2, 4, 4, 3), np.nan), r"images \[0, 1\] hold NaN or infinity"),
        (np.zeros((2, 4, 4, 4), np.uint8), r"\(2, 4, 4, 4\); expected 1 or 3 channels"),
        (np.zeros(3, np.uint8), r"uint8 \(3,\)"),
        (np.array([{}]), "cannot be read: it holds Python objects, expected numbers"),  # a pickle
    ],
)
def test_arrays_that_are_no_images(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "bad.npz", array)
    with pytest.raises(ValueError, match=rf"bad\.npz: {message}"):
        open_source(tmp_path / "bad.npz").images()


def test_array_files_that_are_damaged_or_hold_something_else(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", labels=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz: cannot be read: it holds labels; expected images as arr_0"):
        open_source(tmp_path / "other.npz").images()
    np.savez(tmp_path / "cut.npz", pixels(9, 3, 9, 9).numpy())
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cut\.npz: cannot be read"):
        open_source(tmp_path / "cut.npz").images()
    np.save(tmp_path / "cut.npy", pixels(9, 3, 9, 9).numpy())
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cut\.npy: cannot be read"):
        open_source(tmp_path / "cut.npy").images()
    for name, kind in (("text.npz", r"no \.npz archive"), ("text.npy", r"no \.npy file")):
        (tmp_path / name).write_text("neither")
        with pytest.raises(ValueError, match=kind) as told:
            open_source(tmp_path / name).images()
        assert "pickle" not in str(told.value)
    np.save(tmp_path / "array.npy", pixels(2, 3, 9, 9).numpy())
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")  # numpy would read it, but it is no archive of arrays
    with pytest.raises(ValueError, match=r"array\.npz: cannot be read: it is no \.npz archive"):
        open_source(tmp_path / "array.npz").images()
    np.save(tmp_path / "none.npy", pixels(0, 3, 9, 9).numpy())
    with pytest.raises(ValueError, match="no images in it"):
        open_source(tmp_path / "none.npy").images()


def parquet(file: Path, column: str, cells: list[object]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({column: cells, "label": [0] * len(cells)}), file)


def test_parquet_as_on_the_hub(tmp_path: Path) -> None:
    images = pixels(3, 3, 6, 5)
    (tmp_path / "data").mkdir()
    for split, column, part in (("train", "img", images[:2]), ("test", "image", images[2:])):
        cells = [{"bytes": encoded(image), "path": None} for image in part]
        parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", column, cells)
    with pytest.raises(ValueError, match=r"holds the splits test, train; choose one: .*:train"):
        open_source(tmp_path)
    assert torch.equal(open_source(f"{tmp_path}:train").images(), images[:2])
    assert torch.equal(open_source(f"{tmp_path}:test").images(), images[2:])
    with pytest.raises(ValueError, match="no split 'valid'; it holds test, train"):
        open_source(f"{tmp_path}:valid")

    file = tmp_path / "flat.parquet"
    parquet(file, "image", [encoded(image) for image in images])
    assert torch.equal(open_source(file).images(), images)
    whole = file.read_bytes()
    parquet(file, "image", [encoded(images[0]), b"nothing"])
    with pytest.raises(ValueError, match=r"flat\.parquet, row 1: cannot be read as an image"):
        open_source(file).images()
    parquet(file, "image", ["a path", "another"])
    with pytest.raises(ValueError, match=r"flat\.parquet, row 0: no encoded image"):
        open_source(file).images()
    parquet(file, "text", ["a"])
    with pytest.raises(ValueError, match="no column image or img; found text, label"):
        open_source(file).images()
    file.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"flat\.parquet: damaged parquet file"):
        open_source(file).images()


def test_shards_are_named_by_their_seeds(tmp_path: Path) -> None:
    images = pixels(5, 1, 4, 4)
    shards = ShardSet(tmp_path / "run", {"a": 1}, 5, size=3, seed=40)
    shards.write(0, images[:3])
    source = open_source(tmp_path / "run")
    with pytest.raises(ValueError, match="1 of 2 shards are missing"):
        source.images()
    shards.write(3, images[3:])
    batches = list(source.batches(4))
    assert torch.equal(torch.cat([batch for batch, _ in batches]), images)
    assert [Path(place).name for _, places in batches for place in places] == [f"{40 + i:06d}" for i in range(5)]


def test_datasets_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pixels(2, 3, 6, 5)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        open_source("datasets:some/name:test").images()

    class Rows(list):
        column_names = ("img", "label")

    def load_dataset(name: str, split: str) -> Rows:
        assert (name, split) == ("some/name", "test")
        return Rows({"img": Image.fromarray(image.permute(1, 2, 0).numpy())} for image in images)

    library = types.ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert torch.equal(open_source("datasets:some/name:test").images(), images)
    monkeypatch.setattr(Rows, "column_names", ("text",))
    with pytest.raises(ValueError, match="no column image or img; found text"):
        open_source("datasets:some/name:test").images()


def test_places_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images in it"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder"):
        open_source(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no parquet files, so it has no splits"):
        open_source(f"{tmp_path}:train")
    save_each(pixels(1, 1, 4, 4), tmp_path, [0])
    np.save(tmp_path / "a.npy", pixels(1, 1, 4, 4).numpy())
    with pytest.raises(ValueError, match=r"both arrays \(a\.npy\) and pictures \(000000\.png\)"):
        open_source(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"notes\.txt: no image; expected \.png"):
        open_source(tmp_path / "notes.txt")
    for name in ("notes.txt", "absent"):
        with pytest.raises(ValueError, match=r"expected .*\.npz.*, statistics$"):
            open_source(tmp_path / name, also=("statistics",))


def test_images_in_memory_are_a_source() -> None:
    images = pixels(3, 1, 4, 4)
    assert torch.equal(as_source(images).images(), images)
    source = as_source(images)
    assert as_source(source) is source
    with pytest.raises(TypeError, match="expected uint8"):
        as_source(images.float())
    with pytest.raises(ValueError, match=r"expected \(N, C, H, W\)"):
        as_source(images[0])
