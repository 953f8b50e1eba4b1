"""What the wrapper itself costs: a corrected run against what as many evaluations of the denoiser cost without it.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --cache deepcache --cache cachequant --batch-size 8 --threads 1 --cpu-time
    python benchmarks/overhead.py --device cuda --batch-size 64 --json

Nothing corrected (T evaluations against a plain run of T steps), and every step corrected once (2T against a plain run of 2T).
With --cache instead DeepCache, CacheQuant W8A8 (int8 kernels), corrected at their whole passes, R of T: such a run against the
same cached run without corrections and R / T of a run of T whole evaluations.
The runs of a comparison alternate in random order, so that a machine that slows down slows all of them.
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

CACHES = {"deepcache": iec.DeepCache, "cachequant": iec.CacheQuant}
INTERVAL, BRANCH = 5, 0


def ratio_of_medians(times: np.ndarray, weights: np.ndarray, resamples: int = 4000) -> tuple[float, float, float]:
    """times (R, 1 + P): the corrected run and its P parts; weights (P,) → ratio of the corrected run to the weighted sum of its
    parts, and its 95 % bootstrap interval over the repetitions."""
    chosen = np.random.default_rng(0).integers(len(times), size=(resamples, len(times)))
    medians = np.median(times[chosen], axis=1)
    low, high = np.quantile(medians[:, 0] / (medians[:, 1:] @ weights), [0.025, 0.975])
    found = np.median(times, axis=0)
    return found[0] / (found[1:] @ weights), low, high


class Comparison:
    """Runs of `options.steps` steps, or as many as are asked for, timed in turns."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.clock = time.process_time if options.cpu_time else time.perf_counter

    def timed(self, pipe: Any, num_inference_steps: int) -> float:
        generator = torch.Generator().manual_seed(0)
        begin = self.clock()  # pipelines return their images on the CPU, which waits for the device
        pipe(self.options.batch_size, generator, num_inference_steps=num_inference_steps, output_type="np")
        return self.clock() - begin

    def corrected(self, pipe: Any, plan: str, evaluations: int) -> Callable[[], float]:
        def run() -> float:
            with iec.enable(pipe, steps=plan) as session:
                taken = self.timed(pipe, self.options.steps)
            assert session.evaluations == evaluations, (session.evaluations, evaluations)
            return taken

        return run

    def row(
        self, name: str, run: Callable[[], float], parts: list[tuple[Callable[[], float], float]]
    ) -> dict[str, Any]:
        """Time `run` among its parts (each a run, and how much of it counts)."""
        ways = [run, *(part for part, _ in parts)]
        weights = np.array([weight for _, weight in parts])
        for way in ways:  # warm-up
            way()
        order, times = random.Random(0), np.empty((self.options.repetitions, len(ways)))
        for taken in times:
            gc.collect()
            for index in order.sample(range(len(ways)), len(ways)):
                taken[index] = ways[index]()
        ratio, low, high = ratio_of_medians(times, weights)
        medians = np.median(times, axis=0)
        return {
            "run": name,
            "corrected_seconds": float(medians[0]),
            "plain_seconds": float(medians[1:] @ weights),
            "ratio": float(ratio),
            "interval": [float(low), float(high)],
        }


def plain(options: argparse.Namespace) -> Any:
    """The pipeline as diffusers has it."""
    pipe = iec.load(options.model).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def uncached_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """IEC on the plain model."""
    compare, pipe, rows = Comparison(options), plain(options), []
    for plan, evaluations in (("none", options.steps), ("all", 2 * options.steps)):

        def without(steps: int = evaluations) -> float:
            return compare.timed(pipe, steps)

        rows.append(compare.row(plan, compare.corrected(pipe, plan, evaluations), [(without, 1.0)]))
    return rows


def cached_row(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """IEC at the whole passes of a cache."""
    compare, whole, cached = Comparison(options), plain(options), plain(options)
    cache = CACHES[name](INTERVAL, branch=BRANCH)
    if isinstance(cache, iec.CacheQuant):  # few samples do, as speed does not depend on the numbers in a calibration
        calibration = iec.calibrate(
            plain(options), iec.QuantConfig(), cache, num_inference_steps=options.steps, num_samples=4, batch_size=4
        )
        for pipe in (whole, cached):
            iec.quantize(pipe, calibration)
        iec.cache(cached, cache, calibration)
    else:
        iec.cache(cached, cache)
    refreshes = len(iec.DeepCache(INTERVAL).plan(options.steps))  # CacheQuant has as many, elsewhere
    run = compare.corrected(cached, "refresh", options.steps + refreshes)
    parts: list[tuple[Callable[[], float], float]] = [
        (lambda: compare.timed(cached, options.steps), 1.0),
        (lambda: compare.timed(whole, options.steps), refreshes / options.steps),
    ]
    return compare.row(f"refresh, {name} N={INTERVAL}", run, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Overhead of IEC at equal numbers of evaluations.")
    parser.add_argument("--model", default="fashion-mnist", help="bundled name, folder or Hub id; unconditional")
    parser.add_argument("--steps", type=int, default=10, help="sampling steps T")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--cache", action="append", choices=list(CACHES), help="IEC on this, not on the plain model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--cpu-time", action="store_true", help="time of this process alone, for a busy machine")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.disable_progress_bar()

    gc.disable()
    rows = [cached_row(name, options) for name in options.cache] if options.cache else uncached_rows(options)
    if options.json:
        print(json.dumps({**vars(options), "torch_threads": torch.get_num_threads(), "results": rows}, indent=2))
        return
    print(f"{options.model}, batch {options.batch_size}, {options.repetitions} repetitions, {options.device}")
    print(f"{'steps':28} {'IEC s':>8} {'without s':>10} {'ratio':>7}  95 % interval")
    for row in rows:
        low, high = row["interval"]
        print(
            f"{row['run']:28} {row['corrected_seconds']:8.3f} {row['plain_seconds']:10.3f} "
            f"{row['ratio']:7.3f}  {low:.3f} to {high:.3f}"
        )


if __name__ == "__main__":
    main()
