"""Calibrations on disk: what comes back, what is refused, what a killed save leaves; fingerprints; `iec info`."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from iec.artifact import fingerprint, folder
from iec.artifact.calibration import (
    CacheTables,
    Calibration,
    LayerPart,
    Origin,
    Quantization,
    QuantizedLayer,
    StepTable,
    WeightCodes,
)
from iec.artifact.describe import describe
from iec.artifact.plain import dumps, loads
from iec.cli.app import app

STEPS = 5


class Maker:
    """Random but valid calibrations."""

    def __init__(self, seed: int = 0, steps: int = STEPS) -> None:
        self.generator, self.steps = torch.Generator().manual_seed(seed), steps
        self.signed = torch.Generator().manual_seed(seed + 1000)
        self.zeros = 0

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def scale(self, size: int) -> Tensor:
        return torch.rand(size, generator=self.generator) + 1e-6

    def zero(self, size: int) -> Tensor:
        """Codes for every second weight or table, also others for the rest."""
        self.zeros += 1
        return self.integers(*((-300, 300) if self.zeros % 2 else (0, 256)), size).short()

    def table(self, bits: int = 8) -> StepTable:
        return StepTable(self.scale(self.steps), self.zero(self.steps), bits)

    def weight(self, *shape: int, bits: int) -> WeightCodes:
        codes = self.integers(0, 2**bits, *shape).to(torch.uint8)
        codes.view(-1)[0], codes.view(-1)[-1] = 2**bits - 1, 0
        return WeightCodes(codes, self.scale(shape[0]), self.zero(shape[0]), bits)

    def numbers(self, *shape: int) -> Tensor:
        """Of both signs."""
        return torch.randn(shape, generator=self.signed)

    def layer(
        self, kind: Any, out: int, *channels: int, bits: int = 8, bias: bool | int = False, gains: tuple[int, ...] = ()
    ) -> QuantizedLayer:
        """bias: True, or how many steps' biases; gains: the parts that have one."""
        kernel = {"conv2d": (3, 3), "conv1d": (3,), "linear": ()}[kind]
        parts, begin = [], 0
        for width in channels:
            weight = self.weight(out, width, *kernel, bits=bits)
            gain = self.numbers(self.steps, out) if len(parts) in gains else None
            parts.append(LayerPart(begin, begin + width, weight, self.table(), gain))
            begin += width
        own = self.scale(out) - 0.5 if bias else None
        return QuantizedLayer(kind, tuple(parts), own if own is None or bias is True else own * self.numbers(bias, out))

    def origin(self, **changes: Any) -> Origin:
        values: dict[str, Any] = {
            "pipeline": "DDIMPipeline",
            "denoisers": {"unet": "UNet2DModel"},
            "weights": {"unet": "12" * 32},
            "architecture": {"unet": "34" * 32},
            "scheduler": "DDIMScheduler",
            "scheduler_config": "56" * 32,
            "num_steps": self.steps,
            "timesteps": tuple(float(990 - 7.3 * step) for step in range(self.steps)),
            "num_samples": 64,
            "seed": 0,
            "versions": {"iec": "0.1.0", "torch": "2.9"},
            "settings": {
                "prompts": ["ein Käfer"],
                "guidance": 1.5,
                "eta": 0.0,
                "labels": None,
                "nested": {"a": [1, True]},
            },
        }
        return Origin(**values | changes)

    def cache(self, channels: int = 3, refresh: tuple[int, ...] = (0, 2, 3), window: Any = None) -> CacheTables:
        """1 and 0 at whole passes, numbers of both signs elsewhere, in memory one on top of the other."""
        tables = self.numbers(self.steps, 2, channels)
        tables[list(refresh)] = torch.tensor([[1.0], [0.0]])
        config = {"interval": 2, "branch": None, "schedule": "dps", "window": window, "compensate": "all"}
        return CacheTables("unet", config, -1, refresh, tables[:, 0], tables[:, 1])

    def calibration(self, bits: int = 4, products: bool = True) -> Calibration:
        layers = {
            "unet.up.0.conv": self.layer("conv2d", 5, 3, 2, bits=bits, bias=True, gains=(1,)),
            "unet.conv_in": self.layer("conv2d", 3, 1, bits=8),
            "unet.time": self.layer("conv1d", 3, 5, bits=bits),
            "unet.down.to_q": self.layer("linear", 3, 7, bits=bits, bias=self.steps, gains=(0,)),
        }
        attention = {"unet.mid.attn": {"query": self.table(), "key": self.table(), "value": self.table(6)}}
        attention |= {"unet.down.attn": {}, "unet.a.attn": {"probs": self.table()}}
        quant = Quantization(
            config={"weight_bits": bits, "method": "mse", "symmetric": False, "include": None},
            layers=layers,
            products=attention if products else {},
            skipped={"unet.norm": "no layer of a kind that is quantized"},
            reconstruction={"iterations": 20, "loss": {"unet.mid": 0.25}} if products else None,
        )
        return Calibration(self.origin(), quant, self.cache())


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, in values, types and order."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    Maker().calibration().save(tmp_path / "calib")
    return tmp_path / "calib"


def page(at: Path) -> dict[str, Any]:
    return json.loads((at / "calibration.json").read_text(encoding="utf-8"))


def tensors_file(at: Path) -> Path:
    return at / page(at)["tensors"]["file"]


def forge(at: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Edit page and tensors and compute all digests anew, as somebody does who knows them."""
    document, file = page(at), tensors_file(at)
    tensors = safetensors.torch.load_file(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    edit(document, tensors)
    safetensors.torch.save_file(tensors, file)
    raw = file.read_bytes()
    document["tensors"] |= {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    sections = {name: part for name, part in document.items() if name not in ("format", "version", "digests")}
    document["digests"] = folder._digests(sections)
    (at / "calibration.json").write_text(json.dumps(document), encoding="utf-8")


# What comes back


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("products", [True, False])
def test_comes_back_to_the_bit(tmp_path: Path, bits: int, products: bool) -> None:
    made = Maker(seed=bits).calibration(bits, products)
    made.save(tmp_path / "new" / "calib")
    loaded = Calibration.load(tmp_path / "new" / "calib")
    assert same(loaded, made)
    assert loaded.weight_bytes == made.weight_bytes and loaded.float_bytes == made.float_bytes


def test_a_calibration_of_version_1_still_loads(tmp_path: Path) -> None:
    """Its page is without the lists of gains and of biases per step, and without a cache."""
    maker = Maker()
    layers = {"b": maker.layer("linear", 3, 7, bias=True), "a": maker.layer("conv2d", 5, 3, 2, bits=4)}
    made = Calibration(maker.origin(), Quantization(config={}, layers=layers))
    made.save(tmp_path)

    def older(document: dict[str, Any], _: Any) -> None:
        document["version"] = 1
        assert [document["quantization"].pop(key) for key in ("gains", "biases_per_step")] == [[], []]
        assert document.pop("cache") is None

    forge(tmp_path, older)
    assert same(Calibration.load(tmp_path), made)
    assert describe(tmp_path)["version"] == 1
    assert describe(tmp_path)["cache"] == "none"
    forge(tmp_path, lambda document, _: document.update(version=2))
    with pytest.raises(ValueError, match=r"cache: missing, expected an object or null"):
        Calibration.load(tmp_path)
    forge(tmp_path, lambda document, _: document.update(cache=None))
    with pytest.raises(ValueError, match=r"quantization\.gains: missing, expected a list"):
        Calibration.load(tmp_path)


def test_the_bundled_calibrations_load() -> None:
    folders = sorted(Path(str(resources.files("iec"))).glob("bundled/*/calibration-*/"))
    assert folders
    for at in folders:
        loaded = Calibration.load(at)
        assert loaded.quant and loaded.quant.layers


def test_one_step_has_a_bias_for_it(tmp_path: Path) -> None:
    """(1, out) and (out,) are two things."""
    maker = Maker(steps=1)
    layers = {
        "a": maker.layer("linear", 1, 2, bias=1, gains=(0,)),
        "b": maker.layer("linear", 4, 2, bias=True),
        "c": maker.layer("linear", 4, 2, bias=1),
    }
    made = Calibration(maker.origin(), Quantization(config={}, layers=layers))
    made.save(tmp_path)
    assert same(Calibration.load(tmp_path), made)


@pytest.mark.parametrize("quant", [None, Quantization(config={}, layers={})])
@pytest.mark.parametrize("cached", [False, True])
def test_without_quantization_and_without_layers(tmp_path: Path, quant: Quantization | None, cached: bool) -> None:
    made = Calibration(Maker().origin(), quant, Maker().cache() if cached else None)
    made.save(tmp_path)
    assert same(Calibration.load(tmp_path), made)
    assert made.weight_bytes == made.float_bytes == 0
    assert (page(tmp_path)["cache"] is not None) == cached


def test_quantization_without_a_cache(tmp_path: Path) -> None:
    made = dataclasses.replace(Maker().calibration(), cache=None)
    made.save(tmp_path)
    assert same(Calibration.load(tmp_path), made)
    assert page(tmp_path)["cache"] is None and page(tmp_path)["digests"]["cache"] == fingerprint.plain(None)


def test_tables_of_a_cache_come_back_to_the_bit(tmp_path: Path) -> None:
    """Numbers that other ways to write floats lose; tables that are parts of one tensor, and learned."""
    cache = Maker().cache(4, refresh=(0,), window=[0.1, 4])
    strange = torch.tensor([-0.0, 1e-45, 3.4e38, 1 + 2**-23])
    gain, offset = cache.gain.clone(), cache.offset.t().contiguous().t()
    gain[1], offset[2] = strange, -strange
    made = dataclasses.replace(cache, gain=gain, offset=offset)
    Calibration(Maker().origin(), cache=made).save(tmp_path)
    loaded = Calibration.load(tmp_path).cache
    assert same(loaded, made) and loaded and loaded.refresh == (0,) and loaded.config["window"] == [0.1, 4]
    learned = dataclasses.replace(made, gain=gain.clone().requires_grad_())
    Calibration(Maker().origin(), cache=learned).save(tmp_path)
    assert same(Calibration.load(tmp_path).cache, made)


def test_grouped_and_strange_numbers(tmp_path: Path) -> None:
    maker = Maker()
    weight = maker.weight(6, 2, 3, 3, bits=3)
    scale = torch.tensor([1e-30, 3e38, torch.finfo(torch.float32).tiny, 0.1, 1.0, 2.0])
    weight = dataclasses.replace(weight, scale=scale, zero=torch.tensor([-16384, 16384, 0, 1, 2, 3]).short())
    grouped = QuantizedLayer("conv2d", (LayerPart(0, 4, weight, maker.table()),))  # two groups of 2 channels
    strided = maker.weight(4, 3, bits=2)
    strided = dataclasses.replace(strided, codes=strided.codes.t().contiguous().t())
    layers = {
        "unet.ß.conv": grouped,
        "unet.linear": QuantizedLayer("linear", (LayerPart(0, 3, strided, maker.table()),)),
    }
    timesteps = (1 / 3, 1e-17, 1e300, -0.0, 0.1)
    made = Calibration(maker.origin(timesteps=timesteps), Quantization(config={}, layers=layers))
    made.save(tmp_path)
    assert same(Calibration.load(tmp_path), made)


def test_tensors_with_gradients_and_integer_timesteps(tmp_path: Path) -> None:
    made = Maker().calibration()
    assert made.quant
    layer = made.quant.layers["unet.time"]
    learned = dataclasses.replace(layer.parts[0].act, scale=layer.parts[0].act.scale.clone().requires_grad_())
    made.quant.layers["unet.time"] = dataclasses.replace(
        layer, parts=(dataclasses.replace(layer.parts[0], act=learned),)
    )
    made = dataclasses.replace(made, origin=dataclasses.replace(made.origin, timesteps=(4, 3, 2, 1, 0)))
    made.save(tmp_path)
    loaded = Calibration.load(tmp_path)
    assert loaded.quant and torch.equal(loaded.quant.layers["unet.time"].parts[0].act.scale, learned.scale)
    assert not loaded.quant.layers["unet.time"].parts[0].act.scale.requires_grad
    assert loaded.origin.timesteps == (4, 3, 2, 1, 0)


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Maker().calibration().save(tmp_path / name)
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert files[0] == files[1] and len(files[0]) == 2


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.27), (4, 0.16)])
def test_is_small_on_disk(tmp_path: Path, bits: int, bound: float) -> None:
    maker = Maker(steps=100)
    layers = {f"unet.down_blocks.{i}.resnets.0.conv1": maker.layer("conv2d", 96, 64, bits=bits) for i in range(24)}
    layers |= {f"unet.up_blocks.{i}.resnets.0.conv1": maker.layer("conv2d", 48, 48, 48, bits=bits) for i in range(8)}
    made = Calibration(maker.origin(), Quantization(config={}, layers=layers))
    made.save(tmp_path)
    assert made.float_bytes == 4 * (24 * 96 * 64 * 9 + 8 * 48 * 96 * 9)
    on_disk = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert made.weight_bytes < on_disk <= bound * made.float_bytes, on_disk / made.float_bytes


def test_weight_bytes_by_hand() -> None:
    maker = Maker()
    layers = {"a": maker.layer("linear", 3, 5, bits=4), "b": maker.layer("linear", 2, 4, 1, bits=8, bias=True)}
    made = Calibration(maker.origin(), Quantization(config={}, layers=layers))
    assert made.weight_bytes == (8 + 3 * 6) + (8 + 2 * 6) + (2 + 2 * 6)
    assert made.float_bytes == 4 * (15 + 10)


# What is refused: on loading


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        yield path


def objects(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, (dict, list)):
        yield path
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from objects(inner, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def others(value: Any) -> list[Any]:
    """Other values: of the same type, and of another."""
    if isinstance(value, bool):
        return [not value, int(value), None]
    if isinstance(value, str):
        return [value + "x", value[:-1] + "~", 1, None]
    if isinstance(value, (int, float)):
        return [value + 1, -value - 1, str(value), None, float(value) + 0.5]
    return [0, "", {}]


def section(path: tuple[Any, ...]) -> str:
    """The name under which a refusal must mention a change there."""
    if path[0] == "digests":
        return path[1] if len(path) > 1 else "digests"
    return ".".join(path[:2]) if path[0] == "quantization" and len(path) > 1 else path[0]


def test_every_edit_of_any_value_of_the_page_is_noticed(saved: Path) -> None:
    whole = page(saved)
    edits = 0
    for path in leaves(whole):
        for value in others(at(whole, path)):
            document = copy.deepcopy(whole)
            at(document, path[:-1])[path[-1]] = value
            (saved / "calibration.json").write_text(json.dumps(document))
            with pytest.raises(ValueError) as refused:
                Calibration.load(saved)
            assert section(path) in str(refused.value) and "calibration.json" in str(refused.value), path
            edits += 1
    assert edits > 300


def test_fields_that_are_gone_or_new_are_noticed(saved: Path) -> None:
    whole = page(saved)
    for path in objects(whole):
        kept = at(whole, path)
        for key in kept if isinstance(kept, dict) else range(len(kept)):
            document = copy.deepcopy(whole)
            del at(document, path)[key]
            (saved / "calibration.json").write_text(json.dumps(document))
            with pytest.raises(ValueError) as refused:
                Calibration.load(saved)
            assert section((*path, key)) in str(refused.value), (path, key)
        document = copy.deepcopy(whole)
        if isinstance(kept, dict):
            at(document, path)["news"] = 1
        else:
            at(document, path).append(1)
        (saved / "calibration.json").write_text(json.dumps(document))
        with pytest.raises(ValueError) as refused:
            Calibration.load(saved)
        assert section(path)[:6] in str(refused.value) if path else "news" in str(refused.value)


def test_the_order_of_the_page_does_not_matter(saved: Path) -> None:
    loaded = Calibration.load(saved)
    (saved / "calibration.json").write_text(json.dumps(page(saved), sort_keys=True))
    again = Calibration.load(saved)
    assert loaded.quant and again.quant
    assert all(same(layer, again.quant.layers[name]) for name, layer in loaded.quant.layers.items())
    for name, tables in loaded.quant.products.items():
        assert all(same(table, again.quant.products[name][key]) for key, table in tables.items())  # type: ignore[index]


def test_every_flipped_byte_of_the_tensors_is_noticed(saved: Path) -> None:
    file = tensors_file(saved)
    whole = file.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{file.name}: changed since it was saved"):
            Calibration.load(saved)


@pytest.mark.parametrize("kept", [0, 1, 8, 100, -1])
def test_truncated_and_longer_tensors(saved: Path, kept: int) -> None:
    file = tensors_file(saved)
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    with pytest.raises(ValueError, match=rf"{file.name}: truncated: found \d+ bytes, expected {len(whole)}"):
        Calibration.load(saved)
    file.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=f"{file.name}: changed: found {len(whole) + 1} bytes"):
        Calibration.load(saved)


def test_absent_folders_and_files(saved: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        Calibration.load(saved / "nowhere")
    with pytest.raises(ValueError, match=r"calibration\.json: no such folder"):
        Calibration.load(saved / "calibration.json")
    file = tensors_file(saved)
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file.name}: missing, expected as calibration\.json names it"):
        Calibration.load(saved)
    (saved / "calibration.json").unlink()
    with pytest.raises(ValueError, match=r"calibration\.json: missing; the folder holds no calibration"):
        Calibration.load(saved)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "cannot be read as JSON"),
        ('{"format": ', "cannot be read as JSON"),
        ("\udcff", "cannot be read"),
        ('{"format": NaN}', "found NaN, expected a finite number"),
        ('{"format": 1, "format": 2}', "the key 'format' is given twice"),
        ("[]", r"format: found \[\], expected 'iec-calibration'"),
        ("{}", "format: found None, expected 'iec-calibration'"),
        ('{"format": "iec-features"}', "format: found 'iec-features', expected 'iec-calibration'"),
        ('{"format": "iec-calibration"}', "version: missing, expected a whole number"),
        ('{"format": "iec-calibration", "version": 3}', "version: found 3, expected 1 or 2;"),
        ('{"format": "iec-calibration", "version": true}', "version: found True, expected a whole number"),
        ('{"format": "iec-calibration", "version": 1}', "origin: missing, expected an object"),
        ('{"format": "iec-calibration", "version": 2}', "origin: missing, expected an object"),
    ],
)
def test_pages_that_are_none(saved: Path, text: str, told: str) -> None:
    (saved / "calibration.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"calibration\.json: .*{told}"):
        Calibration.load(saved)


CONV = "unet.up.0.conv"


def part(document: dict[str, Any], name: str = CONV, index: int = 0) -> dict[str, Any]:
    return document["quantization"]["layers"][name]["parts"][index]


def put(values: dict[str, Any], key: str, value: Any) -> None:
    values[key] = value


FORGED: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], str]] = {
    "a missing tensor": (lambda d, t: t.pop("bias"), r"tensors: found .*, expected \['bias'"),
    "an extra tensor": (lambda d, t: put(t, "more", torch.ones(1)), "tensors: found .*'more'"),
    "a tensor of another dtype": (lambda d, t: put(t, "bias", t["bias"].half()), "bias: found torch.float16"),
    "a tensor of another shape": (
        lambda d, t: put(t, "codes", t["codes"][:-1].clone()),
        r"codes: found .* shape \(\d+,\)",
    ),
    "a tensor of another rank": (
        lambda d, t: put(t, "bias", t["bias"][None].clone()),
        r"bias: found .* shape \(1, 20\)",
    ),
    "a scale of zero": (lambda d, t: t["scale"].__setitem__(0, 0), r"weight\.scale: found values that are not"),
    "a negative scale": (lambda d, t: t["scale"].__setitem__(3, -1), r"act\.scale: found values that are not"),
    "an infinite scale": (
        lambda d, t: t["scale"].__setitem__(-1, float("inf")),
        r"\.scale: found values that are",
    ),
    "a NaN for a scale": (lambda d, t: t["scale"].__setitem__(0, float("nan")), r"weight\.scale: found values"),
    "a NaN in a bias": (
        lambda d, t: t["bias"].__setitem__(0, float("nan")),
        r"\.bias: found values that are not finite",
    ),
    "an infinite gain": (
        lambda d, t: t["gain"].__setitem__(0, float("inf")),
        r"'unet\.down\.to_q'\]\.parts\[0\]\.gain: found values that are not finite",
    ),
    "a gain that is not there": (
        lambda d, t: d["quantization"]["gains"].append(f"{CONV}.parts[0]"),
        r"gain: found .* \(40,\), expected .* \(65,\)",
    ),
    "a gain that nobody has": (lambda d, t: d["quantization"]["gains"].pop(), r"gain: found .* \(40,\), expected"),
    "a gain of nothing": (
        lambda d, t: d["quantization"]["gains"].append(f"{CONV}.parts[2]"),
        r"gains: found \['unet\.up\.0\.conv\.parts\[2\]'\], expected parts of layers",
    ),
    "a gain twice": (lambda d, t: d["quantization"].update(gains=d["quantization"]["gains"] * 2), "gains: found"),
    "a bias per step in a layer without": (
        lambda d, t: d["quantization"]["biases_per_step"].append("unet.time"),
        r"biases_per_step: found \['unet\.time'\], expected layers with a bias",
    ),
    "one bias for several": (
        lambda d, t: d["quantization"]["biases_per_step"].append(CONV),
        r"bias: found .* \(20,\), expected .* \(40,\)",
    ),
    "gains in version 1": (
        lambda d, t: (put(d, "version", 1), d.pop("cache")),
        r"quantization: found the unknown field\(s\) biases_per",
    ),
    "a cache in version 1": (lambda d, t: put(d, "version", 1), r"the document: found the unknown field\(s\) cache"),
    "a cache without its tensors": (lambda d, t: t.pop("cache_offset"), "tensors: found .*, expected .*'cache_offset'"),
    "tensors without a cache": (lambda d, t: put(d, "cache", None), "tensors: found .*'cache_gain'"),
    "a cache with another number of channels": (
        lambda d, t: put(d["cache"], "channels", 4),
        r"cache_gain: found .* \(5, 3\), expected .* \(5, 4\)",
    ),
    "a cache without channels": (
        lambda d, t: put(d["cache"], "channels", 0),
        r"cache\.channels: found 0, expected a pos",
    ),
    "a cache of another precision": (
        lambda d, t: put(t, "cache_offset", t["cache_offset"].double()),
        "cache_offset: found torch.float64",
    ),
    "a NaN in a cache": (
        lambda d, t: t["cache_gain"].__setitem__((1, 2), float("nan")),
        r"cache\.gain: found values that are not finite",
    ),
    "an infinity in a cache": (
        lambda d, t: t["cache_offset"].__setitem__((4, 0), -float("inf")),
        r"cache\.offset: found values that are not finite",
    ),
    "a cache of another model": (
        lambda d, t: put(d["cache"], "component", "prior"),
        r"cache\.component: found 'prior', expected one of the denoisers, unet",
    ),
    "a branch that none has": (lambda d, t: put(d["cache"], "branch", -2), r"cache\.branch: found -2, expected"),
    "a branch that is no number": (
        lambda d, t: put(d["cache"], "branch", None),
        r"cache\.branch: found None, expected",
    ),
    "no whole pass": (lambda d, t: put(d["cache"], "refresh", []), r"cache\.refresh: refresh is \(\); it must begin"),
    "a late whole pass": (
        lambda d, t: put(d["cache"], "refresh", [1, 3]),
        r"cache\.refresh: .* must begin with step 0",
    ),
    "whole passes out of order": (
        lambda d, t: put(d["cache"], "refresh", [0, 3, 2]),
        r"cache\.refresh: .* expected ascending",
    ),
    "a whole pass after the end": (
        lambda d, t: put(d["cache"], "refresh", [0, STEPS]),
        r"cache\.refresh: refresh step 5 not in 0\.\.4",
    ),
    "half a whole pass": (
        lambda d, t: put(d["cache"], "refresh", [0, 2.5]),
        r"cache\.refresh\[1\]: found 2\.5, expected a whole",
    ),
    "a zero point that overflows": (lambda d, t: t["zero_wide"].__setitem__(0, -32768), "zero: found 32768, expected"),
    "tables of another length": (
        lambda d, t: put(d["origin"], "num_steps", STEPS + 1),
        "scale: found .* expected",
    ),
    "no steps": (lambda d, t: put(d["origin"], "num_steps", 0), r"origin\.num_steps: found 0"),
    "codes beyond their bits": (lambda d, t: put(part(d), "weight_bits", 3), r"codes: found 15, expected at most 7"),
    "bits beyond 8": (lambda d, t: put(part(d), "weight_bits", 9), r"parts\[0\]\.weight_bits: found 9, expected"),
    "bits that are none": (lambda d, t: put(part(d), "act_bits", True), r"act_bits: found True, expected"),
    "a gap between the parts": (lambda d, t: part(d, index=1).update(begin=4, end=6), "input channels 4:6, expected"),
    "parts that overlap": (lambda d, t: part(d, index=1).update(begin=2, end=4), "input channels 2:4, expected"),
    "parts that begin late": (lambda d, t: part(d).update(begin=1, end=4), r"parts\[0\]: found input channels 1:4"),
    "an empty part": (lambda d, t: part(d).update(end=0), r"parts\[0\]: found input channels 0:0"),
    "a part wider than its codes": (lambda d, t: part(d, index=1).update(end=6), "input channels 3:6 and codes of"),
    "no parts": (lambda d, t: put(d["quantization"]["layers"][CONV], "parts", []), "parts: found none"),
    "a shape of zeros": (
        lambda d, t: put(part(d), "shape", [5, 0, 3, 3]),
        r"shape\[1\]: found 0, expected a positive whole",
    ),
    "a shape without numbers": (lambda d, t: put(part(d), "shape", []), r"shape: found \[\]"),
    "another kind": (
        lambda d, t: put(d["quantization"]["layers"][CONV], "kind", "linear"),
        "expected torch.uint8 with 2",
    ),
    "no such kind": (
        lambda d, t: put(d["quantization"]["layers"][CONV], "kind", "lstm"),
        "kind: found 'lstm', expected",
    ),
    "no such operand": (
        lambda d, t: d["quantization"]["products"].update({"unet.a.attn": {"sum": 8}}),
        "no such operand",
    ),
    "a wide zero point of nothing": (
        lambda d, t: d["quantization"]["wide"].append("x"),
        r"wide: found \['x'\], expected",
    ),
    "a wide zero point twice": (
        lambda d, t: d["quantization"].update(wide=d["quantization"]["wide"] * 2),
        "wide: found",
    ),
    "another wide zero point": (lambda d, t: d["quantization"]["wide"].pop(), "tensors: found|zero.*: found"),
    "a tensors' file elsewhere": (lambda d, t: put(d["tensors"], "file", "../x.safetensors"), r"tensors\.file: found"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_calibrations_are_refused_for_what_they_say(saved: Path, case: str) -> None:
    edit, told = FORGED[case]
    forge(saved, lambda document, tensors: None)
    Calibration.load(saved)
    forge(saved, edit)
    with pytest.raises(ValueError, match=told) as refused:
        Calibration.load(saved)
    assert str(saved) in str(refused.value)


# What is refused: on saving


def changed(value: Any, path: str, **changes: Any) -> Any:
    """`value` with changes at the end of a dotted path of fields, indices and keys with slashes for their dots."""
    if not path:
        return dataclasses.replace(value, **changes)
    key, _, rest = path.partition(".")
    if isinstance(value, dict):
        name = key.replace("/", ".")
        return {**value, name: changed(value[name], rest, **changes)}
    if isinstance(value, tuple):
        inner = list(value)
        inner[int(key)] = changed(inner[int(key)], rest, **changes)
        return tuple(inner)
    return dataclasses.replace(value, **{key: changed(getattr(value, key), rest, **changes)})


LAYER = "quant.layers.unet/time"
WEIGHT = "quant.layers.unet/time.parts.0.weight"
ACT = "quant.layers.unet/time.parts.0.act"


@pytest.mark.parametrize(
    ("path", "changes", "error", "told"),
    [
        (WEIGHT, {"codes": torch.full((3, 5, 3), 16, dtype=torch.uint8)}, ValueError, "found 16, expected at most 15"),
        (WEIGHT, {"codes": torch.zeros(3, 5, 3)}, ValueError, "codes: found torch.float32"),
        (WEIGHT, {"scale": torch.ones(4)}, ValueError, r"weight\.scale: found torch\.float32 of shape \(4,\)"),
        (WEIGHT, {"scale": torch.ones(3).double()}, ValueError, r"weight\.scale: found torch\.float64"),
        (WEIGHT, {"bits": 1}, ValueError, r"weight\.bits: found 1, expected a whole number in 2\.\.8"),
        (ACT, {"scale": torch.ones(STEPS + 1)}, ValueError, r"act\.scale: found .* \(6,\), expected .* \(5,\)"),
        (ACT, {"zero": torch.zeros(STEPS)}, ValueError, r"act\.zero: found torch\.float32"),
        (LAYER, {"bias": torch.ones(4)}, ValueError, r"time'\]\.bias: found .* \(4,\), expected .* \(3,\)"),
        (LAYER, {"bias": torch.ones(4, 3)}, ValueError, r"time'\]\.bias: found .* \(4, 3\), expected .* \(5, 3\)"),
        (LAYER, {"bias": torch.ones(1, 5, 3)}, ValueError, r"\.bias: found .* \(1, 5, 3\), expected .* \(3,\)"),
        (
            LAYER,
            {"bias": torch.full((5, 3), float("nan"))},
            ValueError,
            r"time'\]\.bias: found values that are not finite",
        ),
        (LAYER + ".parts.0", {"gain": torch.ones(3)}, ValueError, r"parts\[0\]\.gain: found .* expected .* \(5, 3\)"),
        (
            LAYER + ".parts.0",
            {"gain": torch.ones(5, 3).double()},
            ValueError,
            r"parts\[0\]\.gain: found torch\.float64",
        ),
        ("origin", {"settings": {"prompts": torch.ones(1)}}, TypeError, r"origin\.settings\.prompts: found tensor"),
        ("origin", {"settings": {"loss": float("nan")}}, ValueError, r"origin\.settings\.loss: found nan"),
        ("origin", {"settings": {1: 2}}, TypeError, r"origin\.settings: found the key 1"),
        ("origin", {"versions": {"torch": 2}}, ValueError, r"origin\.versions\.torch: found 2, expected text"),
        ("origin", {"num_steps": 0}, ValueError, r"origin\.num_steps: found 0"),
        ("quant", {"config": {"filter": len}}, TypeError, r"quantization\.config\.filter: found .*builtin"),
        ("cache", {"gain": torch.ones(3)}, ValueError, r"cache\.gain: found shape \(3,\), expected \(5, channels\)"),
        ("cache", {"gain": torch.ones(5, 0)}, ValueError, r"cache\.gain: found shape \(5, 0\)"),
        ("cache", {"gain": torch.ones(4, 3)}, ValueError, r"cache\.gain: found .* \(4, 3\), expected .* \(5, 3\)"),
        ("cache", {"offset": torch.ones(5, 2)}, ValueError, r"cache\.offset: found .* \(5, 2\), expected .* \(5, 3\)"),
        ("cache", {"offset": torch.ones(5, 3).half()}, ValueError, r"cache\.offset: found torch\.float16"),
        ("cache", {"branch": True}, ValueError, r"cache\.branch: found True, expected a whole number of at least -1"),
        ("cache", {"component": "vae"}, ValueError, r"cache\.component: found 'vae', expected one of .* unet"),
        ("cache", {"refresh": (0, 2.0)}, ValueError, r"cache\.refresh: a cache plan is made of integers, found 2\.0"),
        ("cache", {"config": {"window": {1, 2}}}, TypeError, r"cache\.config\.window: found \{1, 2\}"),
        ("origin", {"num_steps": 3}, ValueError, r"found .* \(5,\), expected .* \(3,\)"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(
    saved: Path, path: str, changes: dict[str, Any], error: type[Exception], told: str
) -> None:
    old = {file.name: file.read_bytes() for file in saved.iterdir()}
    with pytest.raises(error, match=told):
        changed(Maker(1).calibration(), path, **changes).save(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == old


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.safetensors").write_bytes(b"")
    for seed in (0, 1):
        Maker(seed).calibration().save(tmp_path)
    names = {"notes.txt", "model.safetensors", "calibration.json", tensors_file(tmp_path).name}
    assert {file.name for file in tmp_path.iterdir()} == names


@pytest.mark.parametrize("text", ['{"format": "other"}', "[]", "{"])
def test_a_page_of_somebody_else_is_not_overwritten(tmp_path: Path, text: str) -> None:
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(ValueError, match=r"calibration\.json: is there and no calibration"):
        Maker().calibration().save(tmp_path)
    assert [file.read_text() for file in tmp_path.iterdir()] == [text]
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        Maker().calibration().save(tmp_path / "calibration.json")


# What a killed save leaves


class Killed(BaseException):
    pass


class Killer:
    """Lets a number of operations on files pass, then fails them all, cleaning up included: kill -9 in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int, half: bool) -> None:
        self.left, self.half = after, half
        for owner, name in [
            (tempfile, "mkstemp"),
            (safetensors.torch, "save_file"),
            (os, "fsync"),
            (Path, "write_text"),
            (Path, "chmod"),
            (Path, "replace"),
            (Path, "unlink"),
        ]:
            monkeypatch.setattr(owner, name, self.mortal(getattr(owner, name), name))

    def mortal(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                if self.left == -1 and self.half and name in ("save_file", "write_text"):
                    call(*arguments, **keywords)
                    path = arguments[1] if name == "save_file" else arguments[0]
                    os.truncate(path, os.path.getsize(path) // 2)
                raise Killed
            return call(*arguments, **keywords)

        return wrapped


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_killed_save_leaves_the_old_calibration_or_the_new(tmp_path: Path, half: bool, fresh: bool) -> None:
    old, new = Maker(0).calibration(), Maker(1).calibration()
    seen: list[str] = []
    for after in range(100):
        at = tmp_path / str(after)
        if not fresh:
            old.save(at)
        with pytest.MonkeyPatch.context() as patched:
            Killer(patched, after, half)
            try:
                new.save(at)
            except Killed:
                pass
            else:
                seen.append("done")
        if (at / "calibration.json").exists():
            loaded = Calibration.load(at)
            seen.append("new" if same(loaded, new) else "old")
            assert same(loaded, new) or same(loaded, old)
        else:
            assert fresh
        new.save(at)
        assert same(Calibration.load(at), new)
        assert len(list(at.iterdir())) == 2, "what a killed save left is removed by the next one"
        if "done" in seen:
            break
    assert 8 < after < 99 and ("old" in seen) != fresh and "new" in seen[: seen.index("done")]


def test_old_page_and_new_tensors_never_meet(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same layers, other numbers: the mixture would load if it were only a matter of shapes."""
    old = Calibration.load(saved)

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(folder, "write_text", fail)
    with pytest.raises(OSError, match="no space"):
        Maker(1).calibration().save(saved)
    assert len(list(saved.glob("*.safetensors"))) == 2
    assert same(Calibration.load(saved), old)


def test_loading_while_another_is_saved(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the page and the tensors, a save replaces both."""
    new, real = Maker(1).calibration(), folder._tensors
    saves = [lambda: new.save(saved)]

    def slow(*arguments: Any) -> Any:
        if saves:
            saves.pop()()
        return real(*arguments)

    monkeypatch.setattr(folder, "_tensors", slow)
    assert same(Calibration.load(saved), new)


# Does it fit?


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"num_samples": 1, "seed": 9, "versions": {}, "settings": {}, "pipeline": "Other"}, []),
        ({"weights": {"unet": "9a" * 32}}, ["weights of unet: calibrated on sha256 121212121212…, found sha256 9a9a9a9a9a9a…"]),
        ({"architecture": {"unet": "f"}}, ["architecture of unet: calibrated on sha256 343434343434…, found sha256 f…"]),
        ({"denoisers": {"unet": "Other"}}, ["class of unet: calibrated on UNet2DModel, found Other"]),
        (
            {"denoisers": {"prior": "P"}},
            [
                "class of unet: calibrated on UNet2DModel, found no such component",
                "class of prior: calibrated on a pipeline without it, found P",
            ],
        ),
        ({"scheduler": "PNDMScheduler"}, ["scheduler: calibrated on DDIMScheduler, found PNDMScheduler"]),
        ({"scheduler_config": "0"}, ["scheduler_config: calibrated on sha256 565656565656…, found sha256 0…"]),
        ({"num_steps": 7}, ["num_steps: calibrated on 5, found 7"]),
        ({"timesteps": (1.0,)}, ["timesteps: calibrated on 5, found 1"]),
        ({"timesteps": (990.0, 982.7, 975.0, 968.1, 960.8)}, ["timesteps: calibrated on 975.4 at step 2, found 975.0"]),
        ({"timesteps": tuple(float(torch.tensor(990 - 7.3 * i)) for i in range(5))}, []),
        (
            {"scheduler": "A", "num_steps": 7},
            ["scheduler: calibrated on DDIMScheduler, found A", "num_steps: calibrated on 5, found 7"],
        ),
    ],
)  # fmt: skip
def test_mismatch(changes: dict[str, Any], told: list[str]) -> None:
    assert Maker().origin().mismatch(Maker().origin(**changes)) == told


# Fingerprints


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)  # a scalar among its buffers
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("unsaved", torch.rand(3), persistent=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator))
        self.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_have_one_fingerprint(dtype: torch.dtype) -> None:
    print_ = fingerprint.weights(Net(dtype))
    assert len(print_) == 64
    assert fingerprint.weights(Net(dtype)) == print_
    assert fingerprint.weights(Net(dtype).to(memory_format=torch.channels_last)) == print_
    assert fingerprint.weights(Net(dtype).eval().requires_grad_(False)) == print_
    others = {
        fingerprint.weights(Net(other)) for other in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    }
    assert len(others) == 4


def test_any_change_of_weights_changes_the_fingerprint() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16)}
    variants = [
        base,
        {**base, "a": base["a"].clone().index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(1e-40))},
        {**base, "a": -base["a"]},
        {**base, "a": base["a"].reshape(3, 2)},
        {**base, "b": base["b"].half()},
        {"a": base["a"], "c": base["b"]},
        {"a": base["b"], "b": base["a"]},
        {"a": base["a"]},
        {**base, "c": torch.zeros(0)},
    ]
    assert len({fingerprint.tensors(variant) for variant in variants}) == len(variants)
    assert fingerprint.tensors(dict(reversed(base.items()))) == fingerprint.tensors(base)


def test_weights_without_plain_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Conv2d: bias is on the meta device"):
        fingerprint.weights(nn.Conv2d(1, 1, 1, device="meta"))
    with pytest.raises(TypeError, match="a is a Tensor without plain values"):
        fingerprint.tensors({"a": torch.eye(2).to_sparse()})


def test_configurations() -> None:
    config: dict[str, Any] = {
        "beta": 0.1,
        "steps": 1000,
        "name": None,
        "flag": True,
        "channels": (1, 2),
        "in": {"a": 1},
    }
    print_ = fingerprint.config(config)
    assert fingerprint.config(dict(reversed(config.items()))) == print_
    assert (
        fingerprint.config(config | {"_class_name": "A", "_diffusers_version": "1", "in": {"a": 1, "_b": 2}}) == print_
    )
    assert fingerprint.config(config | {"steps": 1000.0, "channels": numpy.array([1, 2])}) == print_
    for change in ({"beta": 0.2}, {"name": "x"}, {"flag": False}, {"channels": [2, 1]}, {"in": {}}, {"more": None}):
        assert fingerprint.config(config | change) != print_, change
    with pytest.raises(TypeError, match=r"in\.f: a function is no plain data"):
        fingerprint.config({"in": {"f": lambda: None}})


# Read by a person


def test_the_page_is_readable(saved: Path) -> None:
    text = (saved / "calibration.json").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 180 and "ein Käfer" in text and text.endswith("}\n")
    long = {"numbers": [i / 7 for i in range(50)], "texts": ["x" * 50] * 5, "empty": {}, "deep": [{"a": "é" * 99}] * 3}
    assert loads(dumps(long)) == long and max(map(len, dumps(long).splitlines())) <= 181


def test_describe(saved: Path) -> None:
    about = describe(saved)
    made = Maker().calibration()
    assert about["kind"] == "calibration" and about["version"] == 2 and about["pipeline"] == "DDIMPipeline"
    assert about["denoisers"] == {"unet": "UNet2DModel"} and about["scheduler"] == "DDIMScheduler"
    assert (about["steps"], about["samples"], about["seed"]) == (STEPS, 64, 0)
    assert about["timesteps"] == "990 … 960.8"
    assert (about["layers"], about["split_layers"], about["layers_with_new_bias"]) == (4, 1, 2)
    assert (about["layers_with_bias_per_step"], about["layers_with_gain"]) == (1, 2)
    assert about["attention_products"] == 3
    assert about["weight_bits"] == {"4 bits": "4 parts", "8 bits": "1 part"}
    assert about["activation_bits"] == {"6 bits": "1 table", "8 bits": "8 tables"}
    assert (about["weight_bytes"], about["float_bytes"]) == (made.weight_bytes, made.float_bytes)
    assert about["skipped"] == {"unet.norm": "no layer of a kind that is quantized"}
    assert set(about["activation_scales"]) == {"smallest", "largest", "most changing"}
    assert about["cache"] == {
        "component": "unet",
        "interval": 2,
        "branch": -1,
        "schedule": "dps",
        "window": "none",
        "compensate": "all",
        "plan": "5 steps, 3 whole: 0, 2, 3",
        "whole_passes": "|.||.",
        "channels": 3,
        "largest_gain_deviation": about["cache"]["largest_gain_deviation"],
    }
    assert about["versions"]["torch"] == "2.9" and about["reconstruction"]["iterations"] == 20
    json.dumps(about)


def test_describe_the_largest_gain_deviation(tmp_path: Path) -> None:
    gain = torch.ones(STEPS, 3)
    gain[1, 2], gain[4, 0], gain[2, 1] = 1.5, -0.75, 9.0  # the last one at a whole pass, which uses none
    cache = dataclasses.replace(Maker().cache(), gain=gain)
    Calibration(Maker().origin(), cache=cache).save(tmp_path)
    about = describe(tmp_path)
    assert about["cache"]["largest_gain_deviation"] == "1.75 (a gain of -0.75 at step 4, channel 0)"
    assert about["quantization"] == "none"
    whole = dataclasses.replace(cache, refresh=tuple(range(STEPS)))
    Calibration(Maker().origin(), cache=whole).save(tmp_path)
    assert describe(tmp_path)["cache"]["largest_gain_deviation"] == "none, as nothing is reused"


def test_info_on_the_command_line(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, ["info", str(saved)])
    assert result.exit_code == 0, result.output
    for told in ("DDIMScheduler", "split_layers", "unet.norm: no layer", "weight_bytes", "fold over the steps"):
        assert told in result.stdout
    for told in (
        "schedule: dps",
        "branch: -1",
        "plan: 5 steps, 3 whole: 0, 2, 3",
        "whole_passes: |.||.",
        "channels: 3",
    ):
        assert told in result.stdout
    for quant in (None, Quantization(config={}, layers={})):
        Calibration(Maker().origin(timesteps=()), quant).save(tmp_path / "empty")
        assert CliRunner().invoke(app, ["info", str(tmp_path / "empty")]).exit_code == 0
    tensors_file(saved).write_bytes(b"")
    damaged = CliRunner().invoke(app, ["info", str(saved)])
    assert damaged.exit_code == 2 and "truncated" in damaged.stderr
    (saved / "calibration.json").write_text('{"format": "of another program"}')
    assert describe(saved)["kind"] == "other"
