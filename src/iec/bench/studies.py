"""What a figure of a recipe may say of its analysis."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from iec.analysis.growth import growth
from iec.analysis.spectral import spectral_norms
from iec.analysis.split import split
from iec.analysis.study import PAIRED
from iec.analysis.trajectory import errors, residuals
from iec.evaluate.arms import Arm

STUDY = ("num", "seed", "batch_size")  # of every figure, the rest being of its kind
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "spectral": spectral_norms,
    "error": errors,
    "growth": growth,
    "split": split,
    "residuals": residuals,
}
_OURS = ("efficient", "correction", "bound", "known", "keep", "progress")


def options_of(kind: str) -> tuple[str, ...]:
    """The names of the options of a figure; none for pictures of images, which are made of the cells."""
    if kind not in _FUNCTIONS:
        return ()
    taken = inspect.signature(_FUNCTIONS[kind]).parameters.values()
    return (*STUDY, *(p.name for p in taken if p.kind is p.KEYWORD_ONLY and p.name not in _OURS))


def check_arm(kind: str, arm: Arm | None) -> None:
    """Raise ValueError for a kind that compares an efficient model with full precision, and an arm that is none."""
    if kind in PAIRED and (arm is None or (arm.quant is None and arm.cache is None)):
        found = "no arm" if arm is None else f"{arm.name!r}, which is in full precision"
        raise ValueError(
            f"{kind} compares an efficient model with full precision; found {found}, expected a quantized or cached arm"
        )
