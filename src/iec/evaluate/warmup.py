"""The first evaluations of an arm, before a clock may run: memory is allocated, kernels are chosen, some are compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from iec.evaluate.arms import Arm
from iec.evaluate.sampling import sample
from iec.pipeline.adapters import denoisers

EVALUATIONS = 2


class _Enough(Exception):
    """Ends a run that is long enough."""


def warm_up(pipe: Any, arm: Arm, seeds: Sequence[int], **conditions: Any) -> None:
    """Begin the arm's own run, since a calibration serves no other, and break off after the first evaluations.

    `pipe` has the arm on it; `seeds` are those of one batch, `conditions` what the pipeline is called with beside them.
    """
    begun = 0

    def count(*_: Any) -> None:
        nonlocal begun
        begun += 1
        if begun > EVALUATIONS:
            raise _Enough

    handles = [model.register_forward_pre_hook(count) for model in denoisers(pipe).values()]
    try:
        with contextlib.suppress(_Enough):
            sample(pipe, seeds, arm.num_inference_steps, len(seeds), **arm.kwargs, **conditions)
    finally:
        for handle in handles:
            handle.remove()
