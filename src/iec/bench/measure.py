"""The numbers of a cell, from what its shards leave behind: metrics with intervals, and paired differences to other cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from iec.artifact import fingerprint
from iec.bench.cells import Cell, Plan
from iec.bench.folder import RunFolder, counts
from iec.bench.recipe import Recipe
from iec.evaluate.bootstrap import Interval
from iec.evaluate.evaluation import Evaluation, difference, evaluate_statistics
from iec.evaluate.machine import choose_device
from iec.evaluate.measures import paired_scores
from iec.evaluate.networks import Extracted, FeatureExtractor, open_network
from iec.evaluate.references import ReferenceSet, open_reference

VERSION = 1
INTERVALS = 2  # how intervals are made: another one has lines measured again, from the same statistics
AGAINST = ("fid", "sfid", "kid", "precision", "recall")  # metrics that need a reference set
OF_NETWORK = (*AGAINST, "is")


class NoNetwork:
    """In the place of a feature network where nothing but images of the same seeds is compared: no features."""

    name, identity, folder = "none", "0" * 16, None

    def features(self, images: torch.Tensor, batch_size: int = 50) -> Extracted:
        """(N, 0) of images (N, C, H, W)."""
        return Extracted(torch.zeros(len(images), 0))


def network_of(spec: str | None, device: str = "auto") -> FeatureExtractor:
    """The feature network of a recipe."""
    return NoNetwork() if spec is None else open_network(spec, choose_device(device))


class Measuring:
    """Measures the cells of `plan` whose shards and statistics are in `folder`.

    Raises ValueError for metrics that cannot be had with the recipe's network and references, before anything is sampled.
    """

    def __init__(self, recipe: Recipe, plan: Plan, folder: RunFolder) -> None:
        self.recipe, self.plan, self.folder = recipe, plan, folder
        self.paired = paired_scores(recipe.metrics.names)
        if "clip" in recipe.metrics.names and "prompt" not in recipe.conditions_of(recipe.run.seed).given:
            raise ValueError("metrics.names: clip compares images with their prompts; give conditions.prompt")
        self.network = network_of(recipe.metrics.network, recipe.run.device)
        self.reference = self._reference()
        self._content = self._digest()
        self._evaluations: dict[str, Evaluation] = {}
        self._counted: dict[str, dict[str, Any]] = {}

    def _reference(self) -> ReferenceSet | None:
        names, data = self.recipe.metrics.names, self.recipe.references.data
        lacking = [name for name in names if name in OF_NETWORK]
        if isinstance(self.network, NoNetwork):
            if lacking:
                raise ValueError(f"metrics.names: {lacking[0]} needs metrics.network")
            return None
        if not any(name in AGAINST for name in names):
            return None
        if data is None and self.network.folder is None:
            raise ValueError(
                f"metrics.names: {lacking[0]} compares with real images, and {self.network.name} has none; give references.data"
            )
        return open_reference(data or self.network.name, self.network, keep=self.folder.root / "references")

    def _digest(self) -> list[str]:
        """A hash of what a given reference holds, as other images may have its name and number; none of the network's own."""
        given, own = self.recipe.references.data, (self.network.name, str(self.network.folder))
        if self.reference is None or given is None or given.partition(":")[0] in own:
            return []
        features, moments = self.reference.features, self.reference.moments
        # Moments that are made of features round by the number of threads.
        held = {"mean": moments.mean, "scatter": moments.scatter} if features is None else {"features": features}
        return [fingerprint.tensors(held)]

    def targets(self, cell: Cell) -> dict[str, Cell]:
        """The cells whose images of the same seeds a cell's are compared with, by what they are called in metrics."""
        found = {"fine": cell.fine, "full": cell.full}
        return {
            name: self.plan.cells[other] for name in self.paired if (other := found.get(name)) not in (None, cell.hash)
        }

    def key(self, cell: Cell) -> str:
        """What the statistics of a cell's shards depend on beside the images."""
        targets = {name: [other.hash, min(other.num, cell.num)] for name, other in self.targets(cell).items()}
        metrics, network = self.recipe.metrics, [self.network.name, self.network.identity]
        clip = [metrics.clip] if "clip" in metrics.names else None
        return fingerprint.plain([VERSION, network, metrics.batch_size, self.paired, targets, clip])[:12]

    def identity(self, cell: Cell) -> str:
        """What a line of results.jsonl depends on beside the images; another one means that it is to be measured again."""
        metrics = self.recipe.metrics
        reference = None if self.reference is None else [self.reference.name, self.reference.count, *self._content]
        return fingerprint.plain(
            [
                VERSION,
                INTERVALS,
                self.key(cell),
                cell.num,
                metrics.names,
                metrics.draws,
                metrics.seed,
                reference,
                cell.needs,
            ]
        )[:12]

    def evaluation(self, cell: Cell) -> Evaluation:
        """The metrics of a cell that can be had. Raises ValueError when its statistics are not all there."""
        if cell.hash not in self._evaluations:
            threads = torch.get_num_threads()
            torch.set_num_threads(self.recipe.run.threads)  # sums over other numbers of parts round differently
            try:
                self._evaluations[cell.hash] = self._evaluate(cell)
            finally:
                torch.set_num_threads(threads)
        return self._evaluations[cell.hash]

    def _evaluate(self, cell: Cell) -> Evaluation:
        statistics = self.folder.statistics(cell, self.key(cell))
        targets, given = self.targets(cell), self.recipe.metrics
        resampled: dict[str, Any] = {}
        refused: dict[str, str] = {}
        for name in given.names:
            if name.partition("_")[2] and name.partition("_")[2] not in targets:
                continue
            try:
                single = evaluate_statistics(statistics, self.reference, [name], draws=given.draws, seed=given.seed)
            except ValueError as error:  # too few images for it
                refused[name] = str(error)
                continue
            resampled |= single.resampled
        references = {} if self.reference is None else {"data": self.reference.name}
        return Evaluation(len(statistics), statistics.network, references, resampled, left_out=refused)

    def line(self, cell: Cell) -> dict[str, Any]:
        """The line of a cell for results.jsonl, which depends on nothing but the images and the recipe."""
        ours = self.evaluation(cell)
        notes = [f"{name} left out: {why}" for name, why in ours.left_out.items()]
        differences = {}
        for other in cell.beside:
            theirs = self.evaluation(self.plan.cells[other])
            if theirs.count == ours.count:
                differences[other] = _plain(difference(ours, theirs))
        infinite = [name for name, interval in ours.metrics.items() if not math.isfinite(interval.value)]
        notes += [f"{name} is infinite: the images are equal" for name in infinite]
        passes = self._passes(cell)
        if len(passes["kernel"].split(", ")) > 1:
            notes.append(f"sampled by different kernels, {passes['kernel']}, which round differently")
        others = {self._passes(self.plan.cells[other])["kernel"] for other in cell.beside}
        if passes["kernel"] and others - {passes["kernel"], ""}:
            told = ", ".join(sorted(others - {passes["kernel"], ""}))
            notes.append(
                f"sampled by the kernel {passes['kernel']}, what it is compared with by {told}: they round differently"
            )
        row = self.plan.row(cell.hash).plain()
        return {
            "version": VERSION,
            **row,
            "measured": self.identity(cell),
            "arm": cell.arm.plain(),
            "baseline": cell.baseline,
            "full": cell.full,
            "fine": cell.fine,
            "num": cell.num,
            **passes,
            "kernel": passes["kernel"] or None,
            "metrics": _plain(ours.metrics),
            "differences": differences,
            "network": None if isinstance(self.network, NoNetwork) else ours.network,
            "references": dict(ours.references),
            "notes": notes,
        }

    def _passes(self, cell: Cell) -> dict[str, Any]:
        """Denoiser passes per image, bytes of the weights, the kernel: what the shards keep of their sampling."""
        if cell.hash in self._counted:
            return dict(self._counted[cell.hash])
        shards, size = self.folder.shards(cell), self.recipe.run.batch_size
        held = [(len(arrays["images"]), counts(arrays)) for arrays in map(shards.read, _starts(self.folder, cell))]
        batches = sum(math.ceil(images / size) for images, _ in held)
        total, reused = (sum(of[name] for _, of in held) / batches for name in ("evaluations", "reused"))
        self._counted[cell.hash] = {
            "evaluations": _whole(total),
            "whole": _whole(total - reused),
            "reused": _whole(reused),
            "weights": held[0][1].get("weights", 0),
            "kernel": ", ".join(sorted({str(of["kernel"]) for _, of in held if of.get("kernel")})),
        }
        return dict(self._counted[cell.hash])


def _starts(folder: RunFolder, cell: Cell) -> Sequence[int]:
    return [start for start, _ in folder.wanted(cell)]


def _whole(value: float) -> float:
    """A mean number of passes, as an integer where it is one."""
    return int(value) if float(value).is_integer() else round(value, 6)


def _plain(intervals: Mapping[str, Interval]) -> dict[str, dict[str, float | None]]:
    """For JSON, which knows no infinity: metrics that are infinite are left out, such bounds are null."""
    return {
        name: {key: value if math.isfinite(value) else None for key, value in interval._asdict().items()}
        for name, interval in intervals.items()
        if math.isfinite(interval.value)
    }
