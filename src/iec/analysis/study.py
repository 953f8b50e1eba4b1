"""A study: what several analyses of one model say, as plain rows, kept in a folder as CSV, JSON and pictures."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iec.analysis import figures
from iec.analysis.course import Correction, Progress, check_pair, check_plain
from iec.analysis.growth import growth
from iec.analysis.samples import Samples
from iec.analysis.spectral import averaged, spectral_norms
from iec.analysis.split import split
from iec.analysis.trajectory import errors, residuals
from iec.artifact import fingerprint
from iec.artifact.files import replacing, write_json, write_text
from iec.pipeline.caching import cached
from iec.pipeline.installation import installed
from iec.pipeline.origin import origin
from iec.pipeline.session import summary

Row = dict[str, Any]
KINDS = ("spectral", "error", "growth", "split", "residuals")
PAIRED = ("error", "split")  # these compare with an efficient model
VERSION = 1
SAMPLES = "spectral.samples.jsonl"  # in a study's folder: the norms of every sample
RELAX = (0.5,)


@dataclass(frozen=True)
class Study:
    """`rows` (plain values) by kind, and `about` by kind: what was analysed and how, plain data."""

    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write KIND.json, KIND.csv and KIND.png of every kind into `folder`; return the paths. Each file is atomic.

        Raises ImportError without matplotlib, the extra `plot`; the numbers are written first.
        """
        folder, made = Path(folder), []
        for kind, rows in self.rows.items():
            path = folder / f"{kind}.json"
            write_json(path, {"format": "iec-analysis", "version": VERSION, "about": self.about[kind], "rows": rows})
            write_text(path.with_suffix(".csv"), _csv(rows))
            made += [path, path.with_suffix(".csv")]
        for kind, rows in self.rows.items():
            path = folder / f"{kind}.png"
            with replacing(path) as temporary:
                figures.draw(kind, rows, temporary, self.about[kind].get("title"))
            made.append(path)
        return made

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Study:
        """Read what `save` wrote. Raises ValueError for a folder without a study, or a damaged one."""
        folder = Path(folder)
        found = {kind: _read(folder / f"{kind}.json") for kind in KINDS if (folder / f"{kind}.json").is_file()}
        if not found:
            raise ValueError(f"{folder}: no study here; `iec analyze` writes {', '.join(KINDS)} (.json) into a folder")
        return Study({k: of["about"] for k, of in found.items()}, {k: of["rows"] for k, of in found.items()})


def analyse(
    full: Any,
    efficient: Any = None,
    *,
    kinds: Sequence[str] = KINDS,
    num: int = 16,
    seed: int = 0,
    num_inference_steps: int = 50,
    batch_size: int = 16,
    correction: Correction | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    about: Mapping[str, Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **kwargs: Any,
) -> Study:
    """Analyse a model on the seeds `seed` … `seed + num − 1`.

    Args:
        full: the pipeline in full precision, with nothing of IEC on it.
        efficient: the same model, quantized and/or cached, without corrections, with denoisers of its own (load the model
            twice). None: only what full precision alone tells.
        kinds: what to find out:
            "spectral": ‖A + B J‖ per step, and ‖(1−λ)I + λ B J‖ (Fig. 1; `spectral.spectral_norms`)
            "error": distance from the full-precision trajectory, without and with IEC (Fig. 2; `trajectory.errors`)
            "growth": of an injected error, beside the product of the norms if "spectral" is there too (`growth.growth`)
            "split": of the model's error into a shared and a decorrelated part (`split.split`)
            "residuals": of the corrections (`trajectory.residuals`)
        correction: arguments of `iec.enable` for what is corrected; the default is all steps, of a cache the refresh steps, with
            λ = 0.5.
        options: further arguments of a kind's function by kind, such as {"growth": {"after": (0, 10)}}; also num and batch_size
            where a kind's are others.
        about: plain data that tells what is analysed, kept with the numbers; `title` stands over the pictures.
        folder: where each kind is saved as soon as it is there. What is there of the same study is not computed again; another
            study's is refused.
        progress: called as progress(kind, done, total).
        kwargs: for the pipelines; prompts and class labels may be lists with one entry per seed.

    Raises ValueError for an unknown kind, one that needs the efficient model without it, and a folder with another study;
    else what the functions above raise.
    """
    _check(kinds, efficient, options or {})
    check_plain(full)
    if efficient is not None:
        check_pair(full, efficient)
    sampling = {"num": num, "seed": seed, "num_inference_steps": num_inference_steps, "batch_size": batch_size}
    if correction is None:
        planned = efficient is not None and cached(installed(efficient)) is not None
        correction = {"steps": "refresh" if planned else "all", "relax": RELAX}
    measured = {"full": _identity(full), "efficient": None if efficient is None else _identity(efficient)}
    study = Study()
    for kind in (kind for kind in KINDS if kind in kinds):
        chosen = dict((options or {}).get(kind, {}))
        told = json.loads(
            json.dumps(
                {
                    **(about or {}),
                    "kind": kind,
                    **sampling,
                    "correction": {key: str(value) for key, value in correction.items()},
                    "options": chosen,
                    "conditions": {key: _plain(value) for key, value in kwargs.items()},
                    **measured,
                },
                default=str,
            )
        )
        if kind == "growth" and "spectral" in kinds:
            told["bound"] = study.about["spectral"]["options"]
        rows = None if folder is None else _resumed(Path(folder), kind, told)
        if rows is None:
            seeds = range(seed, seed + chosen.pop("num", num))
            asked = (seeds, num_inference_steps, chosen.pop("batch_size", batch_size))
            further = {**kwargs, **chosen}
            if kind == "spectral":
                rows = _spectral(
                    full, asked, further, progress, Samples(Path(folder) / SAMPLES, told) if folder else None
                )
            else:
                call = _call(kind, full, efficient, correction, study.rows.get("spectral"))
                rows = call(*asked, progress=progress, **further)
        study.about[kind], study.rows[kind] = told, rows
        if folder is not None:
            Study({kind: told}, {kind: rows}).save(folder)
    return study


def _call(
    kind: str, full: Any, efficient: Any, correction: Correction, spectral: Sequence[Row] | None
) -> Callable[..., list[Row]]:
    """The function of a kind, with the models and the correction put in."""
    if kind == "error":
        return functools.partial(errors, full, efficient, correction=correction)
    if kind == "split":
        return functools.partial(split, full, efficient)
    if kind == "residuals":
        pipes = {"full": full} if efficient is None else {"full": full, "efficient": efficient}
        return functools.partial(residuals, pipes, correction=correction)
    norms = {row["step"]: row["norm"] for row in spectral or () if row["quantity"] == "growth"}
    given: dict[str, Any] = {"efficient": efficient, "correction": correction, "bound": norms or None}
    return functools.partial(growth, full, **given)


def _spectral(
    full: Any, asked: Sequence[Any], further: Mapping[str, Any], progress: Progress | None, samples: Samples | None
) -> list[Row]:
    """The spectral norms, averaged over the samples, whose own are kept as they come."""
    given: dict[str, Any] = {}
    if progress is not None:
        given["progress"] = functools.partial(progress, "spectral")
    if samples is not None:
        given |= {"known": samples.rows, "keep": samples.keep}
    return averaged(spectral_norms(full, *asked, **given, **further))


def _check(kinds: Sequence[str], efficient: Any, options: Mapping[str, Any]) -> None:
    unknown = [kind for kind in (*kinds, *options) if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds are {list(kinds)}, options for {list(options)}; expected some of {', '.join(KINDS)}")
    missing = [kind for kind in kinds if kind in PAIRED and efficient is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} compares an efficient model with full precision; give one, or choose of "
            f"{', '.join(kind for kind in KINDS if kind not in PAIRED)}"
        )


def _identity(pipe: Any) -> dict[str, Any]:
    """What a pipeline is, as far as its numbers depend on it."""
    held = installed(pipe)
    scheduler = pipe.scheduler if held is None else held.state.inner
    told = summary(pipe)
    try:
        weights: Any = fingerprint.plain(origin(pipe).weights)[:16]
    except (TypeError, ValueError):  # quantized by another library, or offloaded
        weights = None
    return {
        "pipeline": type(pipe).__name__,
        "weights": weights,
        "scheduler": type(scheduler).__name__,
        "config": fingerprint.config(dict(scheduler.config))[:16],
        "quant": told.quant,
        "cache": told.cache,
    }


def _plain(value: Any) -> Any:
    """An argument of the pipeline, as far as it is plain data; tensors by their digest."""
    if hasattr(value, "detach"):
        return f"tensor {fingerprint.tensors({'': value})[:16]}"
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(type(value))


def _resumed(folder: Path, kind: str, about: Mapping[str, Any]) -> list[Row] | None:
    """The rows of a kind that the folder holds of the same study; None without any, and where growth has another bound, or none,
    than there is now. Raises ValueError for another study's."""
    path = folder / f"{kind}.json"
    if not path.is_file():
        return None
    found = _read(path)
    different = sorted(key for key in {*about, *found["about"]} if about.get(key) != found["about"].get(key))
    if kind == "growth" and "bound" in different:
        if "bound" in about and different == ["bound"]:
            return None
        different.remove("bound")
    if different:
        raise ValueError(
            f"{path} is of another study: {', '.join(different)} differ; choose another folder, or delete that file"
        )
    return found["rows"]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != "iec-analysis" or found["version"] != VERSION:
            raise ValueError(f"format {found['format']!r}, version {found['version']}")
        if not isinstance(found["rows"], list) or not isinstance(found["about"], dict):
            raise ValueError("its rows or what they are about are missing")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: no analysis that this version can read: {error}; delete it to compute it anew"
        ) from error
    return found


def _csv(rows: Sequence[Row]) -> str:
    """Rows as CSV, the columns of all of them, in order of appearance; empty cells where there is nothing."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
