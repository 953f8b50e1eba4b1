"""Quality of efficient sampling on the bundled model: images of every arm in shards, then a table of some of them.

    python benchmarks/quality.py sample --arm fine --num 150
    python benchmarks/quality.py sample --num 2000 --arm w8a8 --arm deepcache:5 --arm deepcache:5+refresh --arm cachequant-w8a8:5
    python benchmarks/quality.py table --arm w8a8 --arm deepcache:5 --arm deepcache:5+refresh --arm cachequant-w8a8:5
    python benchmarks/quality.py time --arm w8a8 --arm deepcache:5 --arm deepcache:5+refresh --arm cachequant-w8a8:5

An arm is `ddim:T` (plain sampling in T steps, by Euler's form of DDIM where T does not divide 1000), or 100 steps of: `w8a8`,
`w4a8`, `w4a8-rec` (quantized; to the nearest, or reconstructed), `deepcache:N`, `cachequant-w8a8:N`, `cachequant-w4a8:N`,
`cachequant-w4a8-rec:N`; `+ends:1/10` or `+refresh` corrects those steps. `-raw` after the bits leaves the output as it is.
Every arm samples the seeds 0 … num − 1, and is calibrated when it is first needed; a shard that exists is not sampled again,
so a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import iec
from iec.artifact.files import replacing, write_json
from iec.evaluate.features import extract, load_features
from iec.evaluate.metrics import Moments, frechet_distance, kernel_distance
from iec.evaluate.reference import load_reference
from iec.evaluate.sampling import sample, with_scheduler

MODEL, STEPS, SHARD = "fashion-mnist", 100, 50
ROOT = Path("out/quality")
RESAMPLES = 200  # of the bootstrap over seeds
BRANCH = 0  # of the caches: little is recomputed, as in the paper's latent models


def prepare(arm: str, root: Path) -> tuple[Any, int]:
    """The pipeline of an arm and its number of steps."""
    base, _, plan = arm.partition("+")
    kind, _, number = base.partition(":")
    pipe = iec.load(MODEL)
    pipe.set_progress_bar_config(disable=True)
    steps = STEPS
    if kind == "fine":
        pipe, steps = with_scheduler(pipe, "DPMSolverMultistepScheduler"), 200
    elif kind == "ddim":
        steps = int(number)
        if 1000 % steps:  # diffusers' DDIM steps back by 1000 // T
            pipe = with_scheduler(pipe, "EulerDiscreteScheduler")
    elif kind == "deepcache":
        iec.cache(pipe, iec.DeepCache(int(number), branch=BRANCH))
    else:
        calibration = calibrated(base, root)
        iec.quantize(pipe, calibration)
        if calibration.cache is not None:
            iec.cache(pipe, None, calibration)
    if kind in ("fine", "ddim", "deepcache"):
        pipe.unet.to(memory_format=torch.channels_last)  # faster on a CPU, the same up to rounding
    if plan:
        iec.enable(pipe, steps=plan)
    return pipe, steps


def calibrated(base: str, root: Path) -> Any:
    """The calibration of an arm, from 64 samples (under a cache 32); made if it is not there."""
    folder, kept = root / "calibration" / base, root / f"{base}.checkpoint"
    if not (folder / "calibration.json").exists():
        kind, _, number = base.partition(":")
        bits, *rest = kind.removeprefix("cachequant-").split("-")
        if (
            bits not in ("w8a8", "w4a8")
            or not set(rest) <= {"rec", "raw"}
            or kind.startswith("cachequant-") != bool(number)
        ):
            raise SystemExit(f"unknown arm {base!r}")
        pipe = iec.load(MODEL)
        pipe.set_progress_bar_config(disable=True)
        made = iec.calibrate(
            pipe,
            iec.QuantConfig(weight_bits=int(bits[1]), output_correction="none" if "raw" in rest else "affine"),
            iec.CacheQuant(int(number), branch=BRANCH) if number else None,
            reconstruct=iec.Reconstruction() if "rec" in rest else None,
            num_inference_steps=STEPS,
            num_samples=32 if number else 64,
            checkpoint_path=kept,
            progress=lambda what, done, total: print(base, what, done, total, flush=True),
        )
        made.save(folder)
        kept.unlink()
    return iec.Calibration.load(folder)


def folder(arm: str, root: Path) -> Path:
    """Where the images of an arm are."""
    return root / arm.replace("/", "-")


def run(arm: str, num: int, batch_size: int, root: Path) -> None:
    """Sample the shards of an arm that are missing."""
    pipe, steps = prepare(arm, root)
    for start in range(0, num, SHARD):
        path = folder(arm, root) / f"{start:06d}.npy"
        if path.exists():
            continue
        images = sample(pipe, range(start, start + SHARD), steps, batch_size)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, images.numpy())
        print(arm, start + SHARD, flush=True)


def images_of(arm: str, root: Path) -> torch.Tensor:
    """All images (N, C, H, W) of an arm that are there, of consecutive seeds from 0."""
    return torch.cat([torch.from_numpy(np.load(file)) for file in sorted(folder(arm, root).glob("*.npy"))])


def centred(point: float, resampled: np.ndarray) -> list[float]:
    """95 % interval about `point` from resamples, less their mean's bias (a Fréchet distance grows in a resample)."""
    low, high = np.quantile(resampled - resampled.mean(), [0.025, 0.975])
    return [float(point + low), float(point + high)]


class Measured:
    """An arm's metrics, each with its resamples: over the same seeds for all arms, so that differences are paired."""

    def __init__(self, arm: str, images: torch.Tensor, targets: dict[str, torch.Tensor], network: Any) -> None:
        self.arm, count = arm, len(images)
        features = extract(network, images)[0]
        self.kid = kernel_distance(features, load_reference(MODEL, "test").features, seed=0)
        train = load_reference(MODEL, "train").moments

        def fid(rows: Any) -> float:
            return frechet_distance(Moments.of(features[rows]), train)

        draws = [torch.from_numpy(np.random.default_rng(i).integers(count, size=count)) for i in range(RESAMPLES)]
        self.points = {"fid": fid(slice(None))}
        self.resampled = {"fid": np.array([fid(rows) for rows in draws])}
        self.spread: dict[str, list[float]] = {}
        for name, target in targets.items():
            seen = min(count, len(target))
            errors = ((images[:seen].float() - target[:seen].float()) / 255).square().flatten(1).mean(1).numpy()
            rows = [np.random.default_rng(i).integers(seen, size=seen) for i in range(RESAMPLES)]
            self.points[name] = float(np.sqrt(errors.mean()))
            self.resampled[name] = np.array([np.sqrt(errors[row].mean()) for row in rows])
            self.spread[name] = np.sqrt(np.quantile(errors, [0.5, 0.9])).tolist()
        self.brighter = float(images.float().mean() - targets["full"][:count].float().mean()) / 255

    def interval(self, metric: str, other: Measured | None = None) -> list[float]:
        """The metric, or its difference to that of another arm, and 95 % about it."""
        point, resampled = self.points[metric], self.resampled[metric]
        if other is not None:
            point, resampled = point - other.points[metric], resampled - other.resampled[metric]
        return [point, *centred(point, resampled)]


def table(arms: list[str], num: int, root: Path, against: str) -> list[dict[str, Any]]:
    """Metrics of the arms, those that have `num` images, and their differences to `against` and to themselves without IEC."""
    network, full = load_features(MODEL), images_of("ddim:100", root)[:num]
    targets = {"rmse_fine": images_of("fine", root), "full": full}
    wanted = dict.fromkeys([*arms, against, *(arm.partition("+")[0] for arm in arms)])
    ready = [arm for arm in wanted if len(list(folder(arm, root).glob("*.npy"))) * SHARD >= num]
    measured = {arm: Measured(arm, images_of(arm, root)[:num], targets, network) for arm in ready}
    lines = []
    for arm in (arm for arm in arms if arm in measured):
        of, line = measured[arm], {"arm": arm, "images": num}
        line |= {"kid": of.kid.mean, "kid_deviation": of.kid.std, "brighter_than_full": of.brighter}
        line |= {"full_median_and_90_percent": of.spread["full"]}
        for metric in of.points:
            line[metric] = of.interval(metric)
            for what, other in (("against", against), ("without", arm.partition("+")[0])):
                if other in measured and other != arm:
                    line[f"{metric}_{what}"] = of.interval(metric, measured[other])
        lines.append(line)
    return lines


def markdown(lines: list[dict[str, Any]], against: str) -> str:
    """The table for people."""
    heads = ["arm", "FID", f"− `{against}`", "− without IEC", "KID", "RMSE to fine", f"− `{against}`"]
    heads += ["RMSE to full", f"− `{against}`", "its median, 90 %"]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]

    def told(values: list[float] | None, digits: int) -> str:
        return "–" if values is None else "{0:.{3}f} [{1:.{3}f}, {2:.{3}f}]".format(*values, digits)

    for line in lines:
        fids = [told(line.get(key), 1) for key in ("fid", "fid_against", "fid_without")]
        kid = f"{line['kid']:.2f} ± {line['kid_deviation']:.2f}"
        errors = [told(line.get(key), 3) for key in ("rmse_fine", "rmse_fine_against", "full", "full_against")]
        spread = ", ".join(f"{value:.3f}" for value in line["full_median_and_90_percent"])
        rows.append([f"`{line['arm']}`", *fids, kid, *errors, spread])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def timed(arms: list[str], against: str, repetitions: int, batch_size: int, root: Path) -> None:
    """Print the median seconds per image of every arm, and the ratio to `against` with 95 % about its median."""
    ways = {arm: prepare(arm, root) for arm in dict.fromkeys([against, *arms])}
    seconds = np.empty((len(ways), repetitions))
    for repetition in range(-1, repetitions):  # the first one warms up
        for row, (pipe, steps) in enumerate(ways.values()):
            begin = time.perf_counter()
            sample(pipe, range(batch_size), steps, batch_size)
            if repetition >= 0:
                seconds[row, repetition] = (time.perf_counter() - begin) / batch_size
        if repetition >= 0:
            print(f"repetition {repetition + 1} of {repetitions}", flush=True)
    ratios = seconds / seconds[0]
    draws = np.random.default_rng(0).integers(repetitions, size=(2000, repetitions))
    print(f"batch {batch_size}, {torch.get_num_threads()} threads, {repetitions} repetitions")
    print(f"| arm | seconds per image | × `{against}` |\n|---|---:|---:|")
    for arm, mine, ratio in zip(ways, seconds, ratios, strict=True):
        low, high = np.quantile(np.median(ratio[draws], axis=1), [0.025, 0.975])
        print(f"| `{arm}` | {np.median(mine):.3f} | {np.median(ratio):.3f} [{low:.3f}, {high:.3f}] |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["sample", "table", "time"])
    parser.add_argument("--arm", action="append", default=[])
    parser.add_argument("--against", default="ddim:100", help="the arm that the others are compared with in the table")
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--repetitions", type=int, default=5, help="of the times")
    parser.add_argument("--root", type=Path, default=ROOT)
    options = parser.parse_args()
    if options.action == "sample":
        for arm in options.arm:
            run(arm, options.num, options.batch_size, options.root)
    elif options.action == "time":
        timed(options.arm, options.against, options.repetitions, options.batch_size, options.root)
    else:
        lines = table(options.arm, options.num, options.root, options.against)
        write_json(options.root / "table.json", lines)
        print(markdown(lines, options.against))


if __name__ == "__main__":
    main()
