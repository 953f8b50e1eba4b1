"""What one visit costs in the scheduler alone, with a model that costs nothing: microseconds of process time.

    python benchmarks/scheduler_cost.py

Divide the difference by the time of one evaluation of your denoiser to get the overhead; unlike the ratio of whole runs
(benchmarks/overhead.py) it can be read on a busy machine.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from diffusers import DDIMScheduler

import iec

REPETITIONS, STEPS = 15, 200


def visit(scheduler: Any, steps: int) -> float:
    """Process time of one visit in microseconds, over a run of `steps` on samples (4, 1, 28, 28)."""
    sample = output = torch.linspace(-1, 1, 4 * 28 * 28).reshape(4, 1, 28, 28)
    scheduler.set_timesteps(steps)
    begin = time.process_time()
    for t in scheduler.timesteps:
        sample = scheduler.step(output, t, sample).prev_sample
    return (time.process_time() - begin) / len(scheduler.timesteps) * 1e6


def main() -> None:
    torch.set_num_threads(1)
    rows = [
        (
            visit(DDIMScheduler(), STEPS),
            visit(iec.IECScheduler(DDIMScheduler(), "none"), STEPS),
            visit(iec.IECScheduler(DDIMScheduler(), "all"), STEPS // 2),
        )
        for _ in range(REPETITIONS)
    ]
    for name, times in zip(("plain", "none", "all"), zip(*rows, strict=True), strict=True):
        print(f"{name:6} {statistics.median(times):6.0f} us a visit")


if __name__ == "__main__":
    main()
