"""`iec demo`: what the correction does to a real efficient model's images, on the same seeds, in two minutes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iec.artifact.files import replacing, write_json, write_text
from iec.bench.arms import Outcome, run_arm
from iec.bench.calibrations import Calibrations
from iec.bench.page import comparison_grid, page
from iec.caches import CacheQuant, DeepCache
from iec.evaluate.arms import Arm
from iec.evaluate.features import feature_networks
from iec.evaluate.reference import domain_metrics
from iec.pipeline.models import load

T = 50
ENOUGH_FOR_FID = 1000  # real images of that number lie 0.9 ± 0.3 from the training set; of 64, 12.5 ± 5.6
CACHE, PLANNED = DeepCache(interval=5), CacheQuant(interval=5)
FINE = Arm("fine: DPM-Solver++(2M), 200 steps", "reference", 200, scheduler="DPMSolverMultistepScheduler")
# diffusers' DDIM steps back by 1000 // T, which is wrong unless T divides 1000 (60 steps come out 9 dB worse than 50). Its
# Euler takes the same step, that of the probability-flow ODE, for any T: at T = 50 the two agree to 71 dB.
EULER = "EulerDiscreteScheduler"
ARMS = (
    Arm(f"DDIM, {T} steps", "plain", T),
    Arm(f"DDIM, {T} steps + IEC ends:1/10", "corrected", T, steps="ends:1/10"),
    Arm("DDIM (Euler), 60 steps", "control", 60, scheduler=EULER),
    Arm(f"DDIM, {T} steps + IEC all", "corrected", T, steps="all"),
    Arm("DDIM (Euler), 100 steps", "control", 100, scheduler=EULER),
    Arm(f"W8A8, {T} steps", "plain", T, quant="w8a8"),
    Arm(f"W8A8, {T} steps + IEC first:1/10", "corrected", T, quant="w8a8", steps="first:1/10"),
    Arm(f"W8A8, {T} steps + IEC ends:1/10", "corrected", T, quant="w8a8", steps="ends:1/10"),
    Arm("W8A8, 60 steps (Euler)", "control", 60, scheduler=EULER, quant="w8a8"),
    Arm(f"W8A8, {T} steps + IEC all", "corrected", T, quant="w8a8", steps="all"),
    Arm(f"DeepCache 1:5, {T} steps", "plain", T, cache=CACHE),
    Arm(f"DeepCache 1:5, {T} steps + IEC refresh&ends:1/10", "corrected", T, cache=CACHE, steps="refresh & ends:1/10"),
    Arm(f"DeepCache 1:5, {T} steps + IEC refresh", "corrected", T, cache=CACHE, steps="refresh"),
    Arm("DeepCache 1:5, 60 steps (Euler)", "control", 60, scheduler=EULER, cache=CACHE),
    Arm(f"CacheQuant 1:5, W8A8, {T} steps", "plain", T, quant="w8a8", cache=PLANNED),
    Arm(f"CacheQuant 1:5, W8A8, {T} steps + IEC refresh", "corrected", T, quant="w8a8", cache=PLANNED, steps="refresh"),
    Arm("CacheQuant 1:5, W8A8, 60 steps (Euler)", "control", 60, scheduler=EULER, quant="w8a8", cache=PLANNED),
)


@dataclass(frozen=True)
class Report:
    """The outcomes of a demo, the reference first, and the files that show them."""

    outcomes: tuple[Outcome, ...]
    grid: Path
    html: Path
    results: Path


def demo(
    model: str = "fashion-mnist",
    num: int = 16,
    seed: int = 0,
    batch_size: int = 16,
    out: Path = Path("out/demo"),
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Run every arm on the seeds `seed` … `seed + num − 1` and write grid.png, index.html and results.json to `out`.

    A quantized denoiser has a calibration that is bundled with the model, or one that is made here, on a few samples of other
    seeds. `progress(name, done, total)` is called before each arm and calibration, of which `done` arms are finished. Raises
    ValueError for an unknown model or `num` below 1.
    """
    if num < 1:
        raise ValueError(f"num is {num}, expected at least one image")
    pipe = load(model)
    pipe.set_progress_bar_config(disable=True)
    seeds = range(seed, seed + num)
    outcomes: list[Outcome] = []
    every = (FINE, *ARMS)

    def tell(name: str) -> None:
        if progress is not None:
            progress(name, len(outcomes), len(every))

    calibrations = Calibrations(pipe, model, seeds.stop, batch_size, lambda arm: tell(f"calibrating {arm.name}"))
    for arm in every:
        calibration = calibrations.of(arm)
        tell(arm.name)
        outcome = run_arm(pipe, arm, seeds, batch_size, outcomes[0].images if outcomes else None, calibration)
        if num >= ENOUGH_FOR_FID and model in feature_networks():
            outcome = replace(outcome, fid=domain_metrics(outcome.images, model).fid)
        outcomes.append(outcome)
    out = Path(out)
    report = Report(tuple(outcomes), out / "grid.png", out / "index.html", out / "results.json")
    picture = comparison_grid(outcomes)
    with replacing(report.grid) as file:
        picture.save(file, format="PNG")
    write_text(report.html, page(outcomes, picture, model=model, num=num, seed=seed))
    write_json(report.results, [row(outcome) for outcome in outcomes])
    return report


def row(outcome: Outcome) -> dict[str, Any]:
    """An outcome's numbers, for JSON."""
    return {
        "name": outcome.arm.name,
        "kind": outcome.arm.kind,
        "quant": outcome.arm.quant,
        "kernel": outcome.kernel,
        "evaluations": outcome.evaluations,
        "reused": outcome.reused,
        "seconds": round(outcome.seconds, 3),
        "weights": outcome.weights,
        "rmse": outcome.rmse,
        "psnr": outcome.psnr,
        "fid": outcome.fid,
    }
