"""Reconstruction: learn which way the weights are rounded, so that the outputs of a model's parts stay what they were.

Part by part, in the order of the forward pass: the part gets what the quantized parts before it give, and its output is to
be that of the model in full precision (METHOD 5.1; AdaRound, Nagel et al. 2020; BRECQ, Li et al. 2021; QDrop, Wei et al. 2022).
Under a cache what it gets is what it gets in a run, and its output is to be that of whole passes: parts behind the cached
feature learn to make up for its age too.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from iec.artifact.calibration import Product, QuantizedLayer
from iec.quant.data import Data, Shallow
from iec.quant.rounding import SimulatedLayer, cosine, temperature, undecided
from iec.quant.simulate import Record, Simulation


@dataclass(frozen=True)
class Reconstruction:
    """How low-bit weights are reconstructed.

    Args:
        unit: "block": residual, attention and transformer blocks as a whole, remaining layers singly (BRECQ); "layer": every
            layer by itself, as in IEC's released code.
        iters: optimiser steps per unit.
        batch_size: tuples per step.
        num_tuples: (sample, step) pairs whose inputs are kept; the released code takes 1024.
        lr_weight: learning rate of the rounding variables α.
        lr_scale: of the activation scales, relative to their mean; 0 leaves them.
        lr_zero: of the activation zero points, which are rounded at the end; 0 leaves them.
        lr_float: of the floating-point weights under the rounding, in `region`; 0 (off) leaves them.
        lr_bias: of biases, in `region`; 0 leaves them.
        region: glob patterns on layer names: where weights and biases are learned too (released: from the cached features on).
        regularizer: weight of AdaRound's regulariser. What is minimised is E/E₀ + regularizer · mean(1 − |2h(α) − 1|^β), with
            the unit's squared error E and that of rounding to nearest E₀, so that one weight suits all units (BRECQ's 0.01 on
            sums comes to some 300 … 4000 on the bundled model). None is 500 for blocks and 0 for layers (released).
        warm_up: share of the iterations without the regulariser.
        input_prob: share of quantized inputs in a batch; the others are inputs of the full-precision model. From what takes a
            cached feature on, all are quantized.
        drop: probability with which an activation stays unquantized while learning (QDrop).
        all_bits: reconstruct layers of 8 bits as well.
        capture_batch: tuples evaluated at once when inputs and targets are recorded.
        seed: of tuples, batches and drops.

    Raises ValueError for values out of range.
    """

    unit: Literal["block", "layer"] = "block"
    iters: int = 800
    batch_size: int = 16
    num_tuples: int = 512
    lr_weight: float = 0.2
    lr_scale: float = 3e-4
    lr_zero: float = 0.0
    lr_float: float = 0.0
    lr_bias: float = 0.0
    region: tuple[str, ...] = ("*",)
    regularizer: float | None = None
    warm_up: float = 0.2
    input_prob: float = 1.0
    drop: float = 0.0
    all_bits: bool = False
    capture_batch: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.unit not in ("block", "layer"):
            raise ValueError(f"unit is {self.unit!r}, expected 'block' or 'layer'")
        for name in ("iters", "batch_size", "num_tuples", "capture_batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected an int of at least 1")
        for name in ("lr_weight", "lr_scale", "lr_zero", "lr_float", "lr_bias"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a number of at least 0")
        for name in ("warm_up", "input_prob", "drop"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a share from 0 to 1")
        if self.regularizer is not None and not 0.0 <= self.regularizer < float("inf"):
            raise ValueError(f"regularizer is {self.regularizer!r}, expected None or a number of at least 0")
        region = (self.region,) if isinstance(self.region, str) else tuple(self.region)
        object.__setattr__(self, "region", region)

    @property
    def penalty(self) -> float:
        """The regulariser's weight."""
        if self.regularizer is not None:
            return self.regularizer
        return 500.0 if self.unit == "block" else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "region": list(self.region)}


@dataclass(frozen=True)
class Outcome:
    """What became of one unit: the mean squared errors of its output over its tuples, and its layers, learned or not."""

    unit: str
    nearest: float
    learned: float
    layers: dict[str, QuantizedLayer]

    @property
    def kept(self) -> str:
        """Which of the two is kept: never the worse one."""
        return "learned" if self.learned < self.nearest else "nearest"

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "layers": sorted(self.layers),
            "mse_nearest": self.nearest,
            "mse_learned": self.learned,
            "kept": self.kept,
        }


def reconstruct(
    model: nn.Module,
    layers: dict[str, QuantizedLayer],
    products: dict[str, dict[Product, Any]],
    data: Data,
    options: Reconstruction,
    output: str | None = None,
    finished: dict[str, dict[str, QuantizedLayer]] | None = None,
    started: Callable[[list[str]], None] | None = None,
    shallow: Callable[[nn.Module], Shallow] | None = None,
) -> Iterator[Outcome]:
    """Reconstruct `model` unit by unit; yields the outcome of each. The model itself is left alone.

    Args:
        model: in full precision. A copy of it is worked on.
        layers: quantized layers by module name, rounded to nearest.
        products: quantizers of attention products by name of the attention.
        data: at least one tuple.
        output: the layer that gives the model's output: at the end its bias takes up what is left of a mean error, which unlike
            other errors does not average out along a trajectory. None: no layer's.
        finished: units done before, with their layers: they are put in place and not yielded.
        started: called once with the names of all units, in order.
        shallow: what makes the reuse passes of the copy under a cache; None without. Parts that these skip learn from the
            tuples at refresh steps alone, the others from all.

    The result of a unit depends on `options.seed`, its place and the units before it, not on where the run was resumed.
    Memory: the copy, and inputs and outputs of one unit for all tuples.

    Raises ValueError where there are no tuples to learn from.
    """
    if not len(data.steps):
        raise ValueError("no tuples to reconstruct from; calibrate with num_tuples of at least 1")
    work = copy.deepcopy(model).eval().requires_grad_(False).float().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    simulation = Simulation(work, layers, products, shallow)
    wanted = [name for name in layers if options.all_bits or _bits(layers[name]) < 8]
    units = simulation.units(options.unit, wanted, data, output)
    if bool(data.reused.all()) and any(simulation.sides[unit] == "inside" for unit in units):
        raise ValueError(
            f"none of the {len(data.steps)} tuples is at a refresh step of the cache, so the part that reuse steps skip has "
            "nothing to learn from; calibrate with more num_tuples"
        )
    names = list(units) if output not in simulation.factors or not units else [*units, f"{output} (mean)"]
    if started is not None:
        started(names)
    for place, unit in enumerate(names):
        if finished is not None and unit in finished:
            for name, layer in finished[unit].items():
                simulation.layers[name].take(layer)
        elif unit in units:
            generator = torch.Generator().manual_seed(options.seed * 1_000_003 + place)
            yield _unit(simulation, unit, units[unit], data, options, generator)
        else:
            assert output is not None
            yield _centred(simulation, unit, output, data, options)


def _bits(layer: QuantizedLayer) -> int:
    return min(part.weight.bits for part in layer.parts)


def _unit(
    simulation: Simulation, unit: str, names: list[str], data: Data, options: Reconstruction, generator: torch.Generator
) -> Outcome:
    record = simulation.record(unit, data, options.capture_batch, options.input_prob < 1.0)
    layers = {name: simulation.layers[name] for name in names}
    before = {name: layer.layer for name, layer in layers.items()}
    nearest = simulation.error(unit, record, options.capture_batch)
    if nearest == 0.0:  # nothing to gain
        return Outcome(unit, nearest, nearest, before)
    for layer in layers.values():
        layer.learn()
    _learn(simulation, unit, layers, record, nearest, options, generator)
    after = {name: layer.learned() for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.take(after[name])
    learned = simulation.error(unit, record, options.capture_batch)
    outcome = Outcome(unit, nearest, learned, after if learned < nearest else before)
    for name, layer in layers.items():
        layer.take(outcome.layers[name])
    return outcome


def _centred(simulation: Simulation, unit: str, name: str, data: Data, options: Reconstruction) -> Outcome:
    """A layer with the bias that gives its output the mean that it has in full precision."""
    record = simulation.record(name, data, options.capture_batch, False)
    layer = simulation.layers[name]
    before, nearest = layer.layer, simulation.error(name, record, options.capture_batch)
    shift = simulation.shift(name, record, options.capture_batch)
    bias = -shift if layer.bias is None else layer.bias.detach() - shift
    after = dataclasses.replace(before, bias=bias.cpu())
    layer.take(after)
    learned = simulation.error(name, record, options.capture_batch)
    outcome = Outcome(unit, nearest, learned, {name: after if learned < nearest else before})
    layer.take(outcome.layers[name])
    return outcome


def _learn(
    simulation: Simulation,
    unit: str,
    layers: dict[str, SimulatedLayer],
    record: Record,
    nearest: float,
    options: Reconstruction,
    generator: torch.Generator,
) -> None:
    groups = _parameters(layers, options)
    optimizer = torch.optim.Adam(groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    simulation.drop = (options.drop, generator)
    # Times the number of weights, what each of them feels is of the order of 1, far above Adam's ε.
    weights = sum(rounding.alpha.numel() for layer in layers.values() for rounding in layer.roundings)  # type: ignore[operator]
    count, size = len(record.steps), min(options.batch_size, len(record.steps))
    with torch.enable_grad(), _flushed_denormals():
        for iteration in range(options.iters):
            progress = iteration / options.iters
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * cosine(progress)
            places = torch.randperm(count, generator=generator)[:size]
            exact = None
            if record.exact:
                exact = torch.rand(size, generator=generator) >= options.input_prob
            loss = simulation.loss(unit, record, places, exact) * (weights / nearest)
            if options.penalty > 0.0 and progress >= options.warm_up:
                beta = temperature(progress, options.warm_up)
                for layer in layers.values():
                    for h in layer.regularity:
                        loss = loss + options.penalty * undecided(h, beta)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            for layer in layers.values():
                for table in layer.tables:
                    table.confine()  # type: ignore[operator]
    simulation.drop = None


@contextlib.contextmanager
def _flushed_denormals() -> Iterator[None]:
    """Denormal numbers count as zero: they would slow the optimiser down fivefold.

    They come up in the momentum of weights beyond the clipping range, whose gradient is zero, and in high powers of small
    numbers.
    """
    before = float(torch.tensor(1e-40) * 1.0) == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _parameters(layers: dict[str, SimulatedLayer], options: Reconstruction) -> list[dict[str, Any]]:
    """The optimiser's groups; what is in them requires gradients from now on."""
    groups: list[dict[str, Any]] = []

    def add(parameter: nn.Parameter | None, rate: float) -> None:
        if parameter is not None and rate > 0.0:
            groups.append({"params": [parameter.requires_grad_(True)], "lr": rate})

    for name, layer in layers.items():
        chosen = any(fnmatchcase(name, pattern) for pattern in options.region)
        for rounding, table in zip(layer.roundings, layer.tables, strict=True):
            add(rounding.alpha, options.lr_weight)  # type: ignore[arg-type]
            add(rounding.weight, options.lr_float if chosen else 0.0)  # type: ignore[arg-type]
            add(table.scale, options.lr_scale * float(table.scale.mean()))  # type: ignore[arg-type, operator]
            add(table.zero, options.lr_zero)  # type: ignore[arg-type]
        add(layer.bias, options.lr_bias if chosen else 0.0)
    return groups
