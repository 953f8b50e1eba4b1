"""ε-scaling: the denoiser's output times a factor, which costs nothing (Ning et al., Elucidating the Exposure Bias in
Diffusion Models, ICLR 2024).

A denoiser with an error sees, along its own trajectory, samples that it was not trained on, and predicts too much noise for
them; a factor a little below one takes some of it back. As no evaluation is spent, it is what a correction must be compared with.
"""

from __future__ import annotations

import math
from typing import Any

from iec.pipeline.installation import Installation, installation, switching


class Scaling:
    """The factor on one pipeline; made by `scale`. As a context manager it takes it off at the end."""

    def __init__(self, held: Installation, factor: float) -> None:
        self.held, self.factor = held, factor

    def install(self) -> None:
        """From the next run on the output is scaled."""
        self.held.state.end_run()
        self.held.state.scale = self.factor

    def remove(self) -> None:
        """Leave the output as it is; `Installation.drop` calls it."""
        self.held.state.end_run()
        self.held.state.scale = 1.0

    def undo(self) -> None:
        """Take the factor off the pipeline, and nothing else; nothing happens if it is off already."""
        with switching:
            if self in self.held.parts:
                self.held.drop(self)

    def __enter__(self) -> Scaling:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Scaling({type(self.held.pipe).__name__}, {self.factor:g})"


def scale(pipe: Any, factor: float) -> Scaling:
    """Scale: in every following call of `pipe` the scheduler steps with `factor` times the denoiser's output.

    It is the output as the pipeline hands it to the scheduler, after guidance, in ordinary steps and in corrections; of an output
    that holds a variance as well, the noise alone. A factor of 1 changes no bit. `undo()` of what is returned takes it
    off, `iec.undo(pipe)` everything.

    Raises TypeError for a pipeline that IEC cannot follow, and where the output is no noise ε (`prediction_type` is another than
    "epsilon", or EDM's preconditioning stands between): a factor on a velocity or on an image means something else; ValueError
    for a factor that is not above 0, and where there is one already.
    """
    if not isinstance(factor, int | float) or isinstance(factor, bool):
        raise TypeError(f"the factor is {factor!r}, expected a number, usually 0.99 … 1.01")
    if not math.isfinite(factor) or factor <= 0:
        raise ValueError(f"the factor is {factor!r}, expected a number above 0, usually 0.99 … 1.01")
    with switching:
        held = installation(pipe)
        inner = held.state.inner
        kind = dict(inner.config).get("prediction_type", "none")
        if kind != "epsilon" or type(inner).__name__.startswith("EDM"):
            found = "EDM's preconditioned output" if kind == "epsilon" else f"prediction_type {kind!r}"
            raise TypeError(
                f"ε-scaling multiplies a predicted noise, and {type(inner).__name__} takes {found}; expected prediction_type "
                "'epsilon'; leave the scaling out for this pipeline"
            )
        there = scaled(held)
        if there is not None:
            raise ValueError(f"the output is scaled already, by {there.factor:g}; take that off first, by its .undo()")
        part = Scaling(held, float(factor))
        held.add(part)
        part.install()
        return part


def scaled(held: Installation | None) -> Scaling | None:
    """The scaling among the parts of an installation, if any."""
    return next((part for part in held.parts if isinstance(part, Scaling)), None) if held is not None else None
