"""Quality of efficient sampling on the bundled model: images of every arm in shards, then a table of some of them.

    python benchmarks/quality.py sample --arm fine --num 150
    python benchmarks/quality.py sample --num 2000 --arm w8a8 --arm deepcache:5 --arm deepcache:5+refresh --arm cachequant-w8a8:5
    python benchmarks/quality.py table --arm w8a8 --arm deepcache:5 --arm deepcache:5+refresh --arm cachequant-w8a8:5

An arm is `ddim:T` (plain sampling in T steps), or 100 steps of: `w8a8`, `w4a8`, `w4a8-rec` (quantized; to the nearest, or
reconstructed), `deepcache:N`, `cachequant-w8a8:N`, `cachequant-w4a8:N`, `cachequant-w4a8-rec:N`; `+ends:1/10` or `+refresh`
corrects those steps. `-raw` after the bits leaves the correction of the output out. Every arm samples the seeds 0 … num − 1, and
is calibrated when it is first needed; a shard that exists is not sampled again, so a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
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


def table(arms: list[str], num: int, root: Path, resamples: int = 200) -> list[dict[str, Any]]:
    """Metrics of each arm that has `num` images, with 95 % intervals over seeds; all arms are resampled alike."""
    network, reference = load_features(MODEL), load_reference(MODEL, "train")
    arms = [arm for arm in arms if len(list(folder(arm, root).glob("*.npy"))) * SHARD >= num]
    images = {arm: images_of(arm, root)[:num] for arm in arms}
    fine = images_of("fine", root)
    features = {arm: extract(network, images[arm])[0] for arm in arms}
    draws = [torch.from_numpy(np.random.default_rng(i).integers(num, size=num)) for i in range(resamples)]

    def fid(arm: str, rows: torch.Tensor | slice) -> float:
        return frechet_distance(Moments.of(features[arm][rows]), reference.moments)

    resampled = {arm: np.array([fid(arm, rows) for rows in draws]) for arm in arms}
    lines = []
    for arm in arms:
        point = fid(arm, slice(None))
        kid = kernel_distance(features[arm], load_reference(MODEL, "test").features, seed=0)
        line: dict[str, Any] = {"arm": arm, "images": num, "fid": point, "fid_interval": centred(point, resampled[arm])}
        line |= {"kid": kid.mean, "kid_deviation": kid.std}
        for other in ("ddim:100", "w4a8", arm.partition("+")[0]):
            if other in arms and other != arm:
                gap = point - fid(other, slice(None))
                line[f"fid_minus_{other}"] = [gap, *centred(gap, resampled[arm] - resampled[other])]
        for name, target in (("fine", fine), ("full", images.get("ddim:100"))):
            if target is not None and name != arm:
                count = min(num, len(target))
                errors = (
                    ((images[arm][:count].float() - target[:count].float()) / 255).square().flatten(1).mean(1).numpy()
                )
                sampled = [
                    np.sqrt(errors[np.random.default_rng(i).integers(count, size=count)].mean()) for i in range(1000)
                ]
                low, high = np.quantile(sampled, [0.025, 0.975])
                line[f"rmse_{name}"] = [float(np.sqrt(errors.mean())), float(low), float(high), count]
                line[f"rmse_{name}_median_and_90_percent"] = np.sqrt(np.quantile(errors, [0.5, 0.9])).tolist()
                line[f"brighter_than_{name}"] = (
                    float(images[arm][:count].float().mean() - target[:count].float().mean()) / 255
                )
        lines.append(line)
    return lines


def markdown(lines: list[dict[str, Any]]) -> str:
    """The table for people: every arm's FID and KID, its FID less that of `ddim:100` and of itself without IEC, RMSEs."""
    rows = ["| arm | FID | − `ddim:100` | − without IEC | KID × 10³ | RMSE to fine | RMSE to full, median, 90 % |"]
    rows.append("|---|---:|---:|---:|---:|---:|---:|")

    def told(values: list[float] | None, digits: int) -> str:
        return "–" if values is None else "{0:.{3}f} [{1:.{3}f}, {2:.{3}f}]".format(*values[:3], digits)

    for line in lines:
        base = line["arm"].partition("+")[0]
        spread = line.get("rmse_full_median_and_90_percent", [0.0, 0.0])
        cells = [
            f"`{line['arm']}`",
            told([line["fid"], *line["fid_interval"]], 1),
            told(line.get("fid_minus_ddim:100"), 1),
            told(line.get(f"fid_minus_{base}") if base != line["arm"] else None, 1),
            f"{line['kid']:.2f} ± {line['kid_deviation']:.2f}",
            told(line.get("rmse_fine"), 3),
            f"{told(line.get('rmse_full'), 3)}, {spread[0]:.3f}, {spread[1]:.3f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["sample", "table"])
    parser.add_argument("--arm", action="append", default=[])
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--root", type=Path, default=ROOT)
    options = parser.parse_args()
    if options.action == "sample":
        for arm in options.arm:
            run(arm, options.num, options.batch_size, options.root)
    else:
        lines = table(options.arm, options.num, options.root)
        write_json(options.root / "table.json", lines)
        print(markdown(lines))


if __name__ == "__main__":
    main()
