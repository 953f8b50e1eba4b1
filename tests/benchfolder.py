"""A folder as a bench leaves it, written by hand: the numbers are those of docs/results, rounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

GIB = 2**30
FULL = "f" * 16


def result(cell: str, name: str, kind: str, group: str, fid: float, rmse: float, **other: Any) -> dict[str, Any]:
    """A line of results.jsonl; intervals are a tenth (FID) or a twentieth (RMSE) of the value to each side."""
    values = {
        "version": 1,
        "cell": cell,
        "name": name,
        "kind": kind,
        "group": group,
        "arm": {"num_inference_steps": 100},
        "baseline": None,
        "num": 2000,
        "whole": 100,
        "reused": 0,
        "evaluations": 100,
        "weights": 6_500_000,
        "kernel": None,
        "metrics": {
            "fid": {"value": fid, "low": 0.9 * fid, "high": 1.1 * fid},
            "rmse_full": {"value": rmse, "low": 0.95 * rmse, "high": 1.05 * rmse},
        },
        "differences": {},
        "network": "fashion-mnist@0123456789abcdef",
        "paper": None,
    }
    return values | other


def difference(fid: tuple[float, float, float], rmse: tuple[float, float, float] | None = None) -> dict[str, Any]:
    told = {"fid": fid} | ({"rmse_full": rmse} if rmse else {})
    return {name: dict(zip(("value", "low", "high"), values, strict=True)) for name, values in told.items()}


def lines() -> list[dict[str, Any]]:
    """Full precision; W8A8 and DeepCache without and with IEC; two controls."""
    quant, cached = {"num_inference_steps": 100, "quant": "w8a8"}, {"num_inference_steps": 100, "cache": "deepcache:5"}
    steps, eight = {"steps": "refresh"}, {"weights": 1_700_000, "kernel": "onednn"}
    few = {"whole": 20, "reused": 80, "evaluations": 100}
    found = [
        result(FULL, "DDIM, 100 steps", "reference", "quantized", 21.2, 0.0, paper={"fid": 4.19, "of": "CIFAR-10"}),
        result(
            "a" * 16, "W8A8", "plain", "quantized", 22.4, 0.056, arm=quant, **eight,
            differences={FULL: difference((1.2, 0.5, 2.0), (0.056, 0.052, 0.060))},
            paper={"fid": 4.32, "of": "CIFAR-10"},
        ),
        result(
            "b" * 16, "W8A8 + IEC all", "corrected", "quantized", 27.9, 0.059, arm=quant | {"steps": "all"}, **eight,
            whole=200, evaluations=200, baseline="a" * 16,
            differences={
                "a" * 16: difference((5.5, 4.8, 6.3), (0.003, 0.001, 0.005)),
                FULL: difference((6.7, 5.7, 7.7), (0.059, 0.054, 0.062)),
            },
            paper={"fid": 3.76, "of": "CIFAR-10"},
        ),
        result(
            "c" * 16, "W8A8, 200 steps (Euler)", "control", "quantized", 22.1, 0.055, arm=quant | {"num_inference_steps": 200},
            whole=200, evaluations=200, **eight,
            differences={FULL: difference((0.9, -0.1, 1.9))},
        ),
        result(
            "d" * 16, "DeepCache 1:5 | branch 0", "plain", "cached", 24.7, 0.040, arm=cached, **few,
            differences={FULL: difference((3.5, 2.8, 4.3), (0.040, 0.037, 0.042))},
            paper={"fid": 5.73, "of": "CIFAR-10"},
        ),
        result(
            "e" * 16, "DeepCache 1:5 | branch 0 + IEC refresh", "corrected", "cached", 27.0, 0.032, arm=cached | steps,
            baseline="d" * 16, **few | {"whole": 40, "evaluations": 120},
            differences={
                "d" * 16: difference((2.2, 1.9, 2.6), (-0.008, -0.009, -0.006)),
                FULL: difference((5.8, 5.0, 6.5), (0.032, 0.030, 0.034)),
            },
            paper={"fid": 4.83, "of": "CIFAR-10"},
        ),
        result(
            "9" * 16, "DeepCache 1:5, 120 steps (Euler)", "control", "cached", 23.9, 0.035,
            arm=cached | {"num_inference_steps": 120}, **few | {"whole": 24, "reused": 96, "evaluations": 120},
            differences={FULL: difference((2.7, 2.0, 3.5), (0.035, 0.032, 0.037))},
        ),
    ]  # fmt: skip
    for line in found:
        line["full"] = FULL if line["cell"] != FULL else None
    return found


SECONDS = {"8": 0.1, "f": 0.24, "a": 0.12, "b": 0.24, "c": 0.25, "d": 0.10, "e": 0.15, "9": 0.12}
RUN: dict[str, Any] = {
    "version": 1,
    "command": ["iec", "bench", "table1-bundled", "--controls"],
    "recipe": {
        "title": "Table 1 on the bundled model",
        "paper": "Table 1",
        "model": {"name": "fashion-mnist"},
        "run": {"num": 2000, "seed": 0, "batch_size": 50, "shard": 50, "num_inference_steps": 100},
        "metrics": {"names": ["fid", "rmse_full"], "network": "fashion-mnist"},
    },
    "versions": {"python": "3.13.0", "torch": "2.13.0"},
    "machine": {
        "processor": "A Processor",
        "cores": 2,
        "vector": "AVX512",
        "int8": ["avx512_vnni"],
        "accelerators": [],
    },
    "fingerprint": "0123456789abcdef",
}


def planned(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The `cells` of run.json: every row of the recipe, in its order."""
    return [{key: line[key] for key in ("cell", "name", "kind", "group", "paper")} for line in found]


def write(folder: Path, found: list[dict[str, Any]] | None = None, images: int = 0, **run: Any) -> Path:
    """Write the files; `images` of them for each cell, 28 × 28, whose brightness tells the cell and the seed."""
    every = lines()
    found = every if found is None else found
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({**RUN, "cells": planned(every), **run}))
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    with open(folder / "timings.jsonl", "w") as file:
        for line in found:
            for start, factor in ((0, 1.0), (50, 1.2), (100, 0.9)):
                seconds = SECONDS[line["cell"][0]] * 50 * factor
                timing = {"cell": line["cell"], "start": start, "images": 50, "seconds": seconds}
                file.write(json.dumps(timing | {"peak_memory": GIB, "threads": 1, "workers": 2}) + "\n")
    for index, line in enumerate(found if images else []):
        cell = folder / "cells" / line["cell"]
        cell.mkdir(parents=True)
        shades = np.arange(images, dtype=np.uint8)[:, None, None, None] * 9 + index
        np.savez(cell / "000000.npz", images=np.broadcast_to(shades, (images, 1, 28, 28)))
    return folder
