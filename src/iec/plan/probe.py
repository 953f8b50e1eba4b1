"""Where a correction evaluates the denoiser: at the estimate, as IEC does, or at a place that controls what IEC gains.

estimate     the estimate of the next state, at the timestep of the step: IEC
next         the estimate of the next state, at the next timestep
start[:ρ]    the state that the step began with, displaced in a random direction by ρ (0) times IEC's own displacement
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

FORMS = "estimate, next, start or start:ρ such as start:1"


class Probe(NamedTuple):
    """`kind` as in the grammar above; `distance` is the ρ of start, at least 0."""

    kind: Literal["estimate", "next", "start"] = "estimate"
    distance: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind}:{self.distance:g}" if self.distance else self.kind


def parse_probe(text: str | Probe) -> Probe:
    """Read the grammar above. Raises TypeError for what is no text, ValueError for what is not in the grammar."""
    if isinstance(text, Probe):
        return text
    if not isinstance(text, str):
        raise TypeError(f"probe is {text!r}, expected a text: {FORMS}")
    kind, colon, argument = (part.strip() for part in text.strip().lower().partition(":"))
    if kind == "estimate" and not colon:
        return Probe()
    if kind == "next" and not colon:
        return Probe("next")
    if kind == "start" and not colon:
        return Probe("start")
    if kind == "start" and re.fullmatch(r"\d+(\.\d*)?|\.\d+", argument):
        return Probe("start", float(argument))
    raise ValueError(f"probe {text!r} is not understood; expected {FORMS}")
