"""What the wrapper itself costs: a corrected run against a plain one with as many evaluations of the denoiser.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --device cuda --batch-size 64 --json

Two pairs: nothing corrected (T evaluations against T), and every step corrected once (2T against a plain run of 2T steps).
The runs of a pair alternate in random order, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging

import iec


def ratio_of_medians(times: np.ndarray, resamples: int = 4000) -> tuple[float, float, float]:
    """times (R, 2): wrapped and plain of each repetition → ratio and its 95 % bootstrap interval over the repetitions."""
    chosen = np.random.default_rng(0).integers(len(times), size=(resamples, len(times)))
    medians = np.median(times[chosen], axis=1)
    low, high = np.quantile(medians[:, 0] / medians[:, 1], [0.025, 0.975])
    wrapped, plain = np.median(times, axis=0)
    return wrapped / plain, low, high


def compare(
    pipe: Any,
    plan: str,
    steps: int,
    plain_steps: int,
    batch_size: int,
    repetitions: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Time `repetitions` corrected runs of `steps` among as many plain runs of `plain_steps`."""

    def run(num_inference_steps: int) -> float:
        generator = torch.Generator().manual_seed(0)
        begin = clock()  # pipelines return their images on the CPU, which waits for the device
        pipe(batch_size, generator, num_inference_steps=num_inference_steps, output_type="np")
        return clock() - begin

    def wrapped() -> float:
        with iec.enable(pipe, steps=plan) as session:
            taken = run(steps)
        assert session.evaluations == plain_steps, (session.evaluations, plain_steps)
        return taken

    def plain() -> float:
        return run(plain_steps)

    wrapped(), plain()  # warm-up
    order, times = random.Random(0), np.empty((repetitions, 2))
    for row in times:
        gc.collect()
        for index in order.sample([0, 1], 2):
            row[index] = (wrapped, plain)[index]()
    ratio, low, high = ratio_of_medians(times)
    return {
        "plan": plan,
        "evaluations": plain_steps,
        "wrapped_seconds": float(np.median(times[:, 0])),
        "plain_seconds": float(np.median(times[:, 1])),
        "ratio": float(ratio),
        "interval": [float(low), float(high)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Overhead of IEC at equal numbers of evaluations.")
    parser.add_argument("--model", default="fashion-mnist", help="bundled name, folder or Hub id; unconditional")
    parser.add_argument("--steps", type=int, default=10, help="sampling steps T")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--cpu-time", action="store_true", help="time of this process alone, for a busy machine")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    pipe = iec.load(options.model).to(options.device)
    pipe.set_progress_bar_config(disable=True)

    gc.disable()
    clock = time.process_time if options.cpu_time else time.perf_counter
    pairs = [("none", options.steps), ("all", 2 * options.steps)]
    rows = [
        compare(pipe, plan, options.steps, evaluations, options.batch_size, options.repetitions, clock)
        for plan, evaluations in pairs
    ]
    if options.json:
        print(json.dumps({**vars(options), "torch_threads": torch.get_num_threads(), "results": rows}, indent=2))
        return
    print(f"{options.model}, batch {options.batch_size}, {options.repetitions} repetitions, {options.device}")
    print(f"{'steps':6} {'evaluations':>11} {'IEC s':>8} {'plain s':>8} {'ratio':>7}  95 % interval")
    for row in rows:
        low, high = row["interval"]
        print(
            f"{row['plan']:6} {row['evaluations']:11} {row['wrapped_seconds']:8.3f} {row['plain_seconds']:8.3f} "
            f"{row['ratio']:7.3f}  {low:.3f} to {high:.3f}"
        )


if __name__ == "__main__":
    main()
