"""The folder of a calibration: `calibration.json` for people and checks, one safetensors file for the numbers.

The tensors' file is named after its content and recorded in the page, which is written last. So whenever a save is
killed, the page that is there belongs to tensors that are there; what it left behind, the next save removes. Every
section of the page has its sha256 in it, and so has the tensors' file: against damage and edits by hand, not against
somebody who computes them anew.

One process at a time may save into a folder; any number may load from it meanwhile.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from iec.artifact import cachelayout, fingerprint, layout
from iec.artifact.cachelayout import CachePage
from iec.artifact.calibration import Calibration, Origin
from iec.artifact.files import replacing, write_text
from iec.artifact.layout import Page
from iec.artifact.plain import Fields, dumps, loads, plain, short
from iec.artifact.validity import check

FORMAT = "iec-calibration"
VERSION = 2  # 1: no gains, no bias per step, no cache
READABLE = (1, VERSION)
PAGE = "calibration.json"

_TENSORS = re.compile(r"calibration-[0-9a-f]{16}\.safetensors")
_KILLED = re.compile(r"\.calibration(-[0-9a-f]{16}\.safetensors|\.json)\.[^.]+")  # temporary files of `replacing`
_ORIGIN = {
    "pipeline": "text",
    "denoisers": "an object of texts",
    "weights": "an object of texts",
    "architecture": "an object of texts",
    "scheduler": "text",
    "scheduler_config": "text",
    "num_steps": "a positive whole number",
    "timesteps": "a list of numbers",
    "num_samples": "a whole number",
    "seed": "a whole number",
    "versions": "an object of texts",
    "settings": "an object",
}


def save(calibration: Calibration, folder: str | os.PathLike[str]) -> None:
    """Write `calibration` to `folder`, see `Calibration.save`."""
    folder = Path(folder)
    _refuse_foreign(folder)
    check(calibration)
    origin = {name: plain(getattr(calibration.origin, name), f"origin.{name}") for name in _ORIGIN}
    page, tensors = (None, {}) if calibration.quant is None else layout.flatten(calibration.quant)
    cache, tables = (None, {}) if calibration.cache is None else cachelayout.flatten(calibration.cache)
    tensors |= tables
    _read(origin, page, cache, VERSION)  # what is written can be read: a bad type shows here, not when it is needed

    file = folder / f"calibration-{fingerprint.tensors(tensors)[:16]}.safetensors"
    with replacing(file) as temporary:
        safetensors.torch.save_file(tensors, str(temporary))
        about = {"file": file.name, "bytes": temporary.stat().st_size, "sha256": _sha256(temporary)}
    sections = {"origin": origin, "quantization": page, "cache": cache, "tensors": about}
    document = {"format": FORMAT, "version": VERSION, **sections, "digests": _digests(sections)}
    write_text(folder / PAGE, dumps(document) + "\n")
    for other in folder.iterdir():
        if other != file and (_TENSORS.fullmatch(other.name) or _KILLED.fullmatch(other.name)):
            other.unlink(missing_ok=True)


def load(folder: str | os.PathLike[str]) -> Calibration:
    """Read what `save` wrote, see `Calibration.load`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one that Calibration.save() has written")
    while True:
        text = _text(folder / PAGE)
        try:
            return _load(folder, text)
        except FileNotFoundError as error:
            if text == _text(folder / PAGE):  # else a save has just replaced both files
                raise ValueError(f"{error.filename}: missing, expected as {PAGE} names it; calibrate anew") from error


def _load(folder: Path, text: str) -> Calibration:
    file = folder / PAGE
    try:
        document = loads(text)
    except ValueError as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}; calibrate anew") from error
    try:
        origin, page, cache, about = _parse(document)
        expected = {} if page is None else page.shapes()
        expected |= {} if cache is None else cache.shapes()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    file = folder / about["file"]
    try:
        tensors = _tensors(file, about, expected)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    quant = None if page is None else page.build(tensors)
    calibration = Calibration(origin, quant, None if cache is None else cache.build(tensors))
    try:
        check(calibration)
    except ValueError as error:  # a page and tensors that fit each other, by somebody else's hand
        raise ValueError(f"{folder / PAGE} with {file.name}: {error}") from error
    return calibration


def _parse(document: Any) -> tuple[Origin, Page | None, CachePage | None, dict[str, Any]]:
    """Origin, quantization, cache and what is said of the tensors' file, after all checks that need the page alone."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = short(document.get("format") if isinstance(document, dict) else document)
        raise ValueError(f"format: found {found}, expected {FORMAT!r}: this is no calibration")
    fields = Fields(document, "")
    fields.take("format", "text")
    version = fields.take("version", "a whole number")
    if version not in READABLE:
        raise ValueError(
            f"version: found {version}, expected {' or '.join(map(str, READABLE))}; calibrate anew, or use the iec that wrote it"
        )
    sections = {
        "origin": fields.take("origin", "an object"),
        "quantization": fields.take("quantization", "an object or null"),
        **({"cache": fields.take("cache", "an object or null")} if version > 1 else {}),
        "tensors": fields.take("tensors", "an object"),
    }
    about, digests = sections["tensors"], fields.take("digests", "an object of texts")
    fields.done()
    read = _read(sections["origin"], sections["quantization"], sections.get("cache"), version)
    stored = Fields(about, "tensors")
    if not _TENSORS.fullmatch(stored.take("file", "text")):
        raise ValueError(f"tensors.file: found {short(about['file'])}, expected calibration-….safetensors")
    stored.take("bytes", "a whole number")
    stored.take("sha256", "text")
    stored.done()
    listed = Fields(digests, "digests")
    for section, digest in _digests(sections).items():
        found = listed.take(section, "text")
        if found != digest:
            raise ValueError(
                f"{section}: changed since it was saved (its sha256 is {digest[:12]}…, digests.{section} says "
                f"{short(found)}); undo the change, or calibrate anew"
            )
    listed.done()
    return *read, about


def _read(origin: Any, page: Any, cache: Any, version: int) -> tuple[Origin, Page | None, CachePage | None]:
    fields = Fields(origin, "origin")
    values = {name: fields.take(name, kind) for name, kind in _ORIGIN.items()}
    fields.done()
    values["timesteps"] = tuple(map(float, values["timesteps"]))
    steps = values["num_steps"]
    quantization = None if page is None else Page(page, steps, version)
    return Origin(**values), quantization, None if cache is None else CachePage(cache, steps)


def _digests(sections: dict[str, Any]) -> dict[str, str]:
    """The sha256 of every section of a page; of quantization, which is long, that of every field."""
    digests: dict[str, str] = {}
    for name, section in sections.items():
        split = name == "quantization" and section is not None
        parts = {f"{name}.{key}": section[key] for key in sorted(section)} if split else {name: section}
        digests |= {part: fingerprint.plain(value) for part, value in parts.items()}
    return digests


def _tensors(
    file: Path, about: dict[str, Any], expected: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> dict[str, torch.Tensor]:
    """The tensors in `file`, which must have the recorded content and hold the `expected` ones."""
    raw = file.read_bytes()
    if len(raw) != about["bytes"]:
        what = "truncated" if len(raw) < about["bytes"] else "changed"
        raise ValueError(f"{what}: found {len(raw)} bytes, expected {about['bytes']} (tensors.bytes); calibrate anew")
    digest = hashlib.sha256(raw).hexdigest()
    if digest != about["sha256"]:
        raise ValueError(
            f"changed since it was saved: its sha256 is {digest[:12]}…, tensors.sha256 says {short(about['sha256'])}; "
            "calibrate anew"
        )
    try:
        tensors = safetensors.torch.load(raw)
    except safetensors.SafetensorError as error:
        raise ValueError(f"no safetensors file ({error}); calibrate anew") from error
    if tensors.keys() != expected.keys():
        raise ValueError(f"tensors: found {sorted(tensors)}, expected {sorted(expected)}")
    for name, (dtype, shape) in expected.items():
        found = tensors[name]
        if found.dtype != dtype or found.shape != shape:
            raise ValueError(
                f"{name}: found {found.dtype} of shape {tuple(found.shape)}, expected {dtype} of shape {shape}, as the "
                f"layers, products, cache and steps in {PAGE} need it"
            )
    return tensors


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        for block in iter(lambda: opened.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"{file}: missing; the folder holds no calibration") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read: {error}; calibrate anew") from error


def _refuse_foreign(folder: Path) -> None:
    """A calibration is replaced, other files stay; but a `calibration.json` of somebody else's is not overwritten."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder or nothing there; choose another place")
    file = folder / PAGE
    if not file.exists():
        return
    try:
        document = loads(_text(file))
    except ValueError as error:
        raise ValueError(
            f"{file}: is there and no calibration ({error}); delete it or choose another folder"
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{file}: is there and no calibration (its format is not {FORMAT!r}); choose another folder")
