"""How fast the bundled model samples, quantized and cached, beside plain diffusers; and where the time goes.

    python benchmarks/speed.py quantized --batch-size 64
    python benchmarks/speed.py cached --batch-size 64

The ways take turns within every repetition, so that a busy machine slows all of them. Reported: medians, and the median of the
ratios within a repetition with the 95 % interval of a bootstrap over repetitions.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch.utils.flop_counter import FlopCounterMode

import iec
from iec.evaluate.sampling import sample

STEPS = {"quantized": 10, "cached": 20}
INTERVAL, BRANCH = 5, 0  # of the caches


def quantized() -> tuple[dict[str, Any], dict[str, Any]]:
    """The bundled pipeline in each way, and the calibrations."""
    last = plain()
    last.unet.to(memory_format=torch.channels_last)
    found = {"float32": plain(), "bfloat16": in_bfloat16(plain()), "float32, channels_last": last}
    configs = {f"W{bits}A8 onednn": iec.QuantConfig(weight_bits=bits) for bits in (8, 4)}
    configs["W8A8 onednn, first layer in float32"] = iec.QuantConfig(layers=("*", "!conv_in"))
    calibrations = {name: calibrate(config, None, STEPS["quantized"]) for name, config in configs.items()}
    for name, calibration in calibrations.items():
        found[name] = plain()
        iec.quantize(found[name], calibration, kernel="onednn")
    return found, calibrations


def cached() -> tuple[dict[str, Any], dict[str, Any]]:
    """The bundled pipeline in each way, and the calibrations."""
    found = {
        name: plain()
        for name in (
            "float32",
            "W8A8 onednn",
            "DeepCache",
            "DeepCache + IEC",
            "CacheQuant W8A8",
            "CacheQuant W8A8 + IEC",
        )
    }
    config = iec.CacheQuant(INTERVAL, branch=BRANCH)
    calibration = calibrate(iec.QuantConfig(), config, STEPS["cached"])
    for name, pipe in found.items():
        if "W8A8" in name:
            iec.quantize(pipe, calibration, kernel="onednn")
        if name.startswith("DeepCache"):
            iec.cache(pipe, iec.DeepCache(INTERVAL, branch=BRANCH))
        elif name.startswith("CacheQuant"):
            iec.cache(pipe, config, calibration)
        if name.endswith("IEC"):
            iec.enable(pipe, steps="refresh")
    return found, {}


def plain() -> Any:
    """The bundled pipeline."""
    pipe = iec.load("fashion-mnist")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def in_bfloat16(pipe: Any) -> Any:
    """The model in bfloat16; the pipeline's own arithmetic stays in float32, for numpy does not know bfloat16."""
    inner = copy.deepcopy(pipe.unet).to(torch.bfloat16)

    def forward(sample: torch.Tensor, timestep: torch.Tensor) -> UNet2DOutput:
        return UNet2DOutput(sample=inner(sample.bfloat16(), timestep).sample.float())

    pipe.unet.forward = forward
    return pipe


def calibrate(quant: Any, cache: Any, steps: int) -> Any:
    """A calibration for so many steps: few samples do, as speed does not depend on the numbers in it."""
    return iec.calibrate(plain(), quant, cache, num_inference_steps=steps, num_samples=4, batch_size=4)


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % of the medians of 2000 resamples."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[1949]


def disk(calibration: Any) -> float:
    """Bytes of the saved folder per byte of the float32 weights file of the model."""
    with tempfile.TemporaryDirectory() as folder:
        calibration.save(folder)
        saved = sum(file.stat().st_size for file in Path(folder).iterdir())
    model = Path(iec.__file__).parent / "bundled" / "fashion-mnist" / "unet" / "diffusion_pytorch_model.safetensors"
    return saved / model.stat().st_size


def shares(pipe: Any, batch_size: int, steps: int) -> dict[str, float]:
    """Shares of the time of a run: integer kernels, our compiled passes, torch's other operators, and Python around them."""
    from iec.quant.kernels import passes

    inside = 0.0
    run = passes._run

    def timed(*args: Any) -> None:
        nonlocal inside
        begin = time.perf_counter()
        run(*args)
        inside += time.perf_counter() - begin

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        begin = time.perf_counter()
        passes._run = timed
        try:
            sample(pipe, range(batch_size), steps, batch_size)
        finally:
            passes._run = run
        whole = time.perf_counter() - begin
    times = {row.key: row.self_cpu_time_total / 1e6 for row in profile.key_averages()}
    integer = sum(value for key, value in times.items() if key.startswith("onednn::"))
    other = sum(times.values()) - integer
    return {
        "integer kernels": integer / whole,
        "norm, SiLU, rounding": inside / whole,
        "other operators": other / whole,
        "Python": max(0.0, 1 - (integer + inside + other) / whole),
    }


def predicted() -> float:
    """The speed-up that DeepCache's multiplications predict."""
    pipe = plain()
    iec.cache(pipe, iec.DeepCache(INTERVAL, branch=BRANCH))
    macs = []
    for steps in (1, 2):  # a whole pass, and one that reuses it
        with FlopCounterMode(display=False) as counter:
            sample(pipe, [0], steps)
        macs.append(counter.get_total_flops())
    reuse = (macs[1] - macs[0]) / macs[0]
    return INTERVAL / (1 + (INTERVAL - 1) * reuse)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("group", choices=["quantized", "cached"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps, batch = STEPS[options.group], options.batch_size
    ways, calibrations = {"quantized": quantized, "cached": cached}[options.group]()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(options.repetitions + 1):
        for name, pipe in ways.items():
            begin = time.perf_counter()
            sample(pipe, range(batch), steps, batch)
            if repetition:  # the first one warms up
                seconds[name].append(time.perf_counter() - begin)
    print(f"batch {batch}, {steps} steps, {options.threads} threads, {options.repetitions} repetitions")
    against = [name for name in ("float32", "bfloat16") if name in ways]
    for name, values in seconds.items():
        told = f"{name:24} {statistics.median(values):7.3f} s"
        for other in against:
            ratios = [a / b for a, b in zip(seconds[other], values, strict=True)]
            told += (
                f"   {statistics.median(ratios):5.2f} x {other} [{interval(ratios)[0]:.2f}, {interval(ratios)[1]:.2f}]"
            )
        print(told)
    for name, calibration in calibrations.items():
        weights = calibration.weight_bytes / calibration.float_bytes
        print(f"{name:24} weights {weights:.4f} of float32, folder {disk(calibration):.4f} of the model's file")
    if options.group == "cached":
        print(f"DeepCache by its multiplications: {predicted():.2f}")
        for name, whole in (("DeepCache", "float32"), ("CacheQuant W8A8", "W8A8 onednn")):
            # a correction is one whole evaluation, and there are as many as refresh steps
            share = len(iec.DeepCache(INTERVAL).plan(steps)) / steps
            rows = zip(seconds[f"{name} + IEC"], seconds[name], seconds[whole], strict=True)
            ratios = [corrected / (without + share * full) for corrected, without, full in rows]
            low, high = interval(ratios)
            print(
                f"{name} + IEC takes {statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}] of what its evaluations do"
            )
    for name in ("W8A8 onednn", "CacheQuant W8A8"):
        if name in ways:
            parts = shares(ways[name], batch, steps)
            print(f"time of {name}: " + ", ".join(f"{part} {value:.0%}" for part, value in parts.items()))


if __name__ == "__main__":
    main()
