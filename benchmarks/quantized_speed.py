"""How fast the bundled model samples, quantized, beside plain diffusers in float32 and in bfloat16; and where the time goes.

    python benchmarks/quantized_speed.py --batch-size 64

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

import iec
from iec.evaluate.sampling import sample

STEPS = 10


def pipelines(calibrations: dict[str, Any]) -> dict[str, Any]:
    """The bundled pipeline in each way; `calibrations` by name are for STEPS steps."""
    found = {"float32": iec.load("fashion-mnist"), "bfloat16": in_bfloat16(iec.load("fashion-mnist"))}
    last = iec.load("fashion-mnist")
    last.unet.to(memory_format=torch.channels_last)
    found["float32, channels_last"] = last
    for name, calibration in calibrations.items():
        pipe = iec.load("fashion-mnist")
        iec.quantize(pipe, calibration, kernel="onednn")
        found[name] = pipe
    for pipe in found.values():
        pipe.set_progress_bar_config(disable=True)
    return found


def in_bfloat16(pipe: Any) -> Any:
    """The model in bfloat16; the pipeline's own arithmetic stays in float32, for numpy does not know bfloat16."""
    inner = copy.deepcopy(pipe.unet).to(torch.bfloat16)

    def forward(sample: torch.Tensor, timestep: torch.Tensor) -> UNet2DOutput:
        return UNet2DOutput(sample=inner(sample.bfloat16(), timestep).sample.float())

    pipe.unet.forward = forward
    return pipe


def calibrate(bits: int) -> Any:
    """A calibration for STEPS steps: few samples do, as speed does not depend on the scales."""
    pipe = iec.load("fashion-mnist")
    pipe.set_progress_bar_config(disable=True)
    config = iec.QuantConfig(weight_bits=bits)
    return iec.calibrate(pipe, config, num_inference_steps=STEPS, num_samples=4, batch_size=4)


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


def shares(pipe: Any, batch_size: int) -> dict[str, float]:
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
            sample(pipe, range(batch_size), STEPS, batch_size)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    calibrations = {"W8A8 onednn": calibrate(8), "W4A8 onednn": calibrate(4)}
    ways = pipelines(calibrations)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(options.repetitions + 1):
        for name, pipe in ways.items():
            begin = time.perf_counter()
            sample(pipe, range(options.batch_size), STEPS, options.batch_size)
            if repetition:  # the first one warms up
                seconds[name].append(time.perf_counter() - begin)
    print(f"batch {options.batch_size}, {STEPS} steps, {options.threads} threads, {options.repetitions} repetitions")
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(seconds["float32"], values, strict=True)]
        low, high = interval(ratios)
        halves = [a / b for a, b in zip(seconds["bfloat16"], values, strict=True)]
        low_b, high_b = interval(halves)
        print(
            f"{name:24} {statistics.median(values):7.3f} s   speed against float32 {statistics.median(ratios):5.2f} "
            f"[{low:.2f}, {high:.2f}]   against bfloat16 {statistics.median(halves):5.2f} [{low_b:.2f}, {high_b:.2f}]"
        )
    for name, calibration in calibrations.items():
        weights = calibration.weight_bytes / calibration.float_bytes
        print(f"{name:24} weights {weights:.4f} of float32, folder {disk(calibration):.4f} of the model's file")
    parts = shares(ways["W8A8 onednn"], options.batch_size)
    print("time of W8A8: " + ", ".join(f"{name} {value:.0%}" for name, value in parts.items()))


if __name__ == "__main__":
    main()
