"""What the bias correction of the last layer is worth: quantized against full precision, same seeds, same steps.

python benchmarks/bias_correction.py
"""

from __future__ import annotations

import argparse

import iec
from iec.evaluate.sampling import sample
from iec.evaluate.similarity import fidelity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--num", type=int, default=16)
    options = parser.parse_args()
    pipe = iec.load("fashion-mnist")
    pipe.set_progress_bar_config(disable=True)
    seeds = range(500, 500 + options.num)
    full = sample(pipe, seeds, options.steps)
    for bits in (8, 4):
        for correction in ("none", "last", "all"):
            config = iec.QuantConfig(weight_bits=bits, bias_correction=correction)
            made = iec.calibrate(pipe, config, num_inference_steps=options.steps, num_samples=16)
            with iec.quantize(pipe, made):
                close = fidelity(sample(pipe, seeds, options.steps), full)
            print(
                f"W{bits}A8, bias_correction={correction:5} RMSE {close.rmse:.4f}, PSNR {close.psnr:.1f} dB", flush=True
            )


if __name__ == "__main__":
    main()
