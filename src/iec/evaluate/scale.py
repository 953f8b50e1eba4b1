"""Sampling at scale: the images of an arm in shards, made by any number of workers, and the same whatever that number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iec.evaluate.arms import Arm
from iec.evaluate.conditions import Conditions
from iec.evaluate.held import HELD, calibration_digest
from iec.evaluate.machine import choose_device
from iec.evaluate.memory import peak_memory
from iec.evaluate.sampling import measure, sample
from iec.evaluate.shards import ShardSet
from iec.evaluate.workers import Task, run_tasks
from iec.pipeline.session import summary


@dataclass(frozen=True)
class Sampling:
    """What the images of a set of shards have in common.

    Args:
        arm: the way to sample.
        model: for `iec.load`: a bundled name, a folder, a Hub id.
        options: for `iec.load`, plain data.
        dtype: of the weights, a torch name ("float16").
        batch_size: images at a time. No batch reaches from one shard into the next.
        conditions: what the pipeline is called with beside the seeds.
        device: "cpu", "cuda", "auto", as the worker has it.
        kernel: of quantized layers, see `iec.quantize`.
    """

    arm: Arm
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    batch_size: int = 16
    conditions: Conditions = field(default_factory=Conditions)
    device: str = "auto"
    kernel: str = "auto"

    def identity(self, model: str, threads: int, calibration: Path | None = None) -> dict[str, Any]:
        """What decides the images beside their seeds and shards, for a `ShardSet`.

        Args:
            model: what tells one model from another, as a hash of its weights.
            threads: of each worker, by which sums may be rounded differently.
            calibration: the folder of one, if the arm needs it.

        Raises ValueError when it needs one and there is none.
        """
        self._check(calibration)
        return {
            "model": model,
            "options": self.options,
            "dtype": self.dtype,
            "arm": self.arm.plain(),
            "conditions": self.conditions.identity(),
            "batch_size": self.batch_size,
            "threads": threads,
            "device": self.device.partition(":")[0],
            "calibration": calibration_digest(calibration) if calibration is not None and self.arm.calibrated else None,
            "kernel": self.kernel if self.arm.quant is not None else None,
        }

    def tasks(
        self,
        shards: ShardSet,
        missing: Sequence[tuple[int, int]] | None = None,
        calibration: Path | None = None,
        prefix: str = "",
        after: tuple[str, ...] = (),
        ship: bool = False,
    ) -> list[Task]:
        """A task for each missing shard, `prefix` + number of its first image its key; `keep` takes their results.

        Args:
            shards: where they belong.
            missing: what `shards.missing()` found.
            calibration: the folder of one, if the arm needs it; it need not be there yet.
            after: keys of tasks to be done before, as one that makes the calibration.
            ship: send the folder of the model to the workers, who have it not.

        Raises ValueError when conditions have fewer values than images, or the arm needs a calibration and there is none.
        """
        self._check(calibration)
        files = () if calibration is None or not self.arm.calibrated else (calibration,)
        ships = ship and Path(self.model).is_dir()
        if ships:
            files = (*files, Path(self.model))
        common = {
            "model": None if ships else self.model,
            "options": self.options,
            "dtype": self.dtype,
            "arm": {**self.arm.plain(), "name": self.arm.name, "kind": self.arm.kind},
            "batch_size": self.batch_size,
            "device": self.device,
            "kernel": self.kernel,
        }
        return [
            Task(
                f"{prefix}{start}",
                "iec.evaluate.scale:sample_shard",
                {
                    **common,
                    "start": start,
                    "seeds": list(shards.seeds(start)),
                    "conditions": self.conditions.of(range(start, start + count)),
                },
                files,
                after,
            )
            for start, count in (shards.missing() if missing is None else missing)
        ]

    def _check(self, calibration: Path | None) -> None:
        if self.arm.calibrated and calibration is None:
            raise ValueError(f"{self.arm.name!r} is quantized, or cached by CacheQuant, so it needs a calibration")


def keep(shards: ShardSet, task: Task, result: dict[str, Any]) -> None:
    """Write what a task of `Sampling.tasks` gave; what was measured with a clock is not kept, so equal runs give equal files."""
    counts = {name: result[name] for name in ("evaluations", "reused")}
    shards.write(task.arguments["start"], result["images"], **counts)


def sample_shard(arguments: dict[str, Any], files: tuple[Path, ...]) -> dict[str, Any]:
    """Sample one shard: the task of `Sampling.tasks`.

    Returns "images", uint8 (count, C, H, W); denoiser "evaluations" of all batches together, of which "reused" ran the shallow
    part only; wall "seconds", without what a worker does once for an arm; "peak_memory" in bytes.
    """
    arm, seeds, conditions = Arm.of(arguments["arm"]), arguments["seeds"], arguments["conditions"]
    rest = list(files)
    calibration = rest.pop(0) if arm.calibrated else None
    model = str(rest[0]) if arguments["model"] is None else arguments["model"]
    where = (model, arguments["options"], arguments["dtype"], arguments["device"])
    size = min(arguments["batch_size"], len(seeds))
    first = {key: value[:size] if isinstance(value, list) else value for key, value in conditions.items()}
    pipe = HELD.arm(*where, arm, calibration, arguments["kernel"], seeds[:size], first)
    reused = 0

    def count(*_: int) -> None:
        nonlocal reused
        reused += summary(pipe).reused or 0

    with peak_memory(choose_device(arguments["device"])) as peak, measure(pipe) as cost:
        images = sample(pipe, seeds, arm.num_inference_steps, size, progress=count, **arm.kwargs, **conditions)
    return {
        "images": images.numpy(),
        "evaluations": cost.evaluations,
        "reused": reused,
        "seconds": cost.seconds,
        "peak_memory": peak.bytes,
    }


@dataclass(frozen=True)
class Sampled:
    """What `sample_shards` did: the `shards`; how many it `made`; `evaluations` for them, of which `reused` ran the shallow part
    only; the `seconds` that each took a worker; the most memory, in bytes, that a worker had."""

    shards: ShardSet
    made: int
    evaluations: int
    reused: int
    seconds: tuple[float, ...]
    peak_memory: int


def sample_shards(
    sampling: Sampling,
    folder: Path,
    num: int,
    *,
    model: str,
    seed: int = 0,
    size: int = 50,
    calibration: Path | None = None,
    workers: int | None = None,
    threads: int = 1,
    ray: str | None = None,
    gpus: float = 0.0,
    attempts: int = 3,
    progress: Callable[[int, int], None] | None = None,
    lost: Callable[[str], None] | None = None,
) -> Sampled:
    """Make the images of `folder` that are not there yet.

    Args:
        sampling: what they have in common.
        folder: of the shards.
        num: images in all; image i has the seed `seed` + i.
        model: what tells the model from others, as a hash of its weights.
        size: images of a shard, which a kill can cost and a worker does at a time.
        calibration: the folder of one, if the arm needs it.
        workers, threads, ray, gpus, attempts: see `run_tasks`.
        progress(done, num): called at the beginning and after each shard, with the number of images.
        lost(message): a worker died, and its shard is made again.

    Raises ValueError for a folder of other images; TaskErrors, when all else is done, for shards that failed; RuntimeError for a
    full disk. What is done is kept, and the same call goes on from there.
    """
    shards = ShardSet(folder, sampling.identity(model, threads, calibration), num, size, seed)
    missing = shards.missing()
    tasks = sampling.tasks(shards, missing, calibration, ship=ray not in (None, "local"))
    results: list[dict[str, Any]] = []
    left = sum(count for _, count in missing)

    def tell() -> None:
        if progress is not None:
            progress(num - left, num)

    def done(task: Task, result: dict[str, Any]) -> None:
        nonlocal left
        keep(shards, task, result)
        results.append({key: value for key, value in result.items() if key != "images"})
        left -= len(task.arguments["seeds"])
        tell()

    def died(task: Task, why: str) -> None:
        if lost is not None:
            lost(f"the images from {task.key} on are made again: {why}")

    tell()
    try:
        run_tasks(tasks, workers=workers, threads=threads, ray=ray, gpus=gpus, attempts=attempts, done=done, lost=died)
    finally:
        HELD.release()  # for workers=0: this process goes on to other things
    return Sampled(
        shards,
        made=len(results),
        evaluations=sum(result["evaluations"] for result in results),
        reused=sum(result["reused"] for result in results),
        seconds=tuple(result["seconds"] for result in results),
        peak_memory=max((result["peak_memory"] for result in results), default=0),
    )
