"""Which model a bench is about: a hash of its files, or the revision that the Hub has of it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

from iec.artifact import fingerprint
from iec.bench.recipe import Recipe
from iec.bench.specs import ModelSpec
from iec.pipeline.models import calibrations, folder_of

_COMMIT = re.compile(r"[0-9a-f]{40}")


def model_identity(spec: ModelSpec) -> str:
    """Identity of a model as `spec` loads it: equal for equal weights and configurations, wherever they lie.

    A bundled model, and one in a folder, is known by the content of its components' files; one of the Hub by its id and
    commit. Raises ValueError for a folder that holds no pipeline, and when the Hub's commit cannot be found out.
    """
    folder = folder_of(spec.name)
    if folder is None and Path(spec.name).is_dir():
        folder = Path(spec.name)
    found = _of_files(folder) if folder is not None else f"{spec.name}@{_commit(spec)}"
    options = {"dtype": spec.dtype, "variant": spec.variant, "options": spec.options}
    return fingerprint.plain([found, options])[:16]


def bundled_calibrations(model: str) -> dict[str, str]:
    """The calibrations that come with a bundled model: a hash of the content of each by its name."""
    # calibration.json names the file of tensors by a hash of its content.
    return {name: _of_file(folder / "calibration.json").hex()[:16] for name, folder in calibrations(model).items()}


def _of_files(folder: Path) -> str:
    """sha256 of the names and contents of the files of a pipeline's components."""
    index = folder / "model_index.json"
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))
        parts = sorted(key for key, value in listed.items() if isinstance(value, list) and value[0] is not None)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} holds no diffusers pipeline: {index.name} cannot be read: {error}") from error
    about = {key: value for key, value in listed.items() if key != "_diffusers_version"}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for part in parts:
        for file in sorted((folder / part).rglob("*")):
            if file.is_file() and file.name[0] != ".":
                digest.update(json.dumps(file.relative_to(folder).as_posix()).encode())
                digest.update(_of_file(file))
    return digest.hexdigest()


def _of_file(file: Path) -> bytes:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while part := opened.read(2**22):
            digest.update(part)
    return digest.digest()


def _commit(spec: ModelSpec) -> str:
    """The commit of a Hub id: as given, as the Hub says, or, where it cannot be asked, as it was downloaded."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    wanted = spec.revision or "main"
    if _COMMIT.fullmatch(wanted):
        return wanted
    try:
        if not constants.HF_HUB_OFFLINE:
            return str(HfApi().model_info(spec.name, revision=wanted, timeout=20).sha)
    except HFValidationError as error:
        raise ValueError(
            f"no model {spec.name!r}: neither bundled, nor a folder, nor a name of the Hub: {error}"
        ) from error
    except Exception:  # of whatever library carries the request: no network, or no such model
        pass  # what was downloaded before decides
    kept = try_to_load_from_cache(spec.name, "model_index.json", revision=wanted)
    if not isinstance(kept, str):
        raise ValueError(
            f"no model {spec.name!r}: neither bundled, nor a folder, nor to be had from the Hub, nor downloaded before"
        )
    return Path(kept).parent.name


def model_of(recipe: Recipe, folder: Path) -> ModelSpec:
    """The model of a recipe, or what stands in for it, which is built into `folder` if it is not there."""
    stand_in = recipe.stand_in
    if stand_in is None:
        return recipe.model
    from iec.bench.standins import build

    about = fingerprint.plain([stand_in.model, stand_in.options])
    marker = folder / "stand-in"
    if not marker.is_file() or marker.read_text(encoding="utf-8") != about:
        shutil.rmtree(folder, ignore_errors=True)
        build(stand_in.model, **stand_in.options).save_pretrained(folder)
        marker.write_text(about, encoding="utf-8")
    return replace(recipe.model, name=str(folder), revision=None, variant=None)
