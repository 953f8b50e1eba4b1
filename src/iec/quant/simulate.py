"""A quantized model in floating point, evaluated on tuples that are each at a step of their own, whole or part by part.

Under a cache the quantized model is evaluated as in a run: tuples at refresh steps by whole passes, those at reuse steps by
reuse passes. A part that these skip sees the former alone.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from iec.artifact.calibration import Product, QuantizedLayer
from iec.patch import replace_forward
from iec.quant import rows
from iec.quant.attention import PRODUCTS, QuantizedProducts, replace_processor
from iec.quant.data import Data, Shallow
from iec.quant.rounding import SimulatedLayer, StepScales

# Blocks that are reconstructed as a whole, by the class names of diffusers; the outermost one counts.
BLOCKS = re.compile(r"ResnetBlock\w*|\w*TransformerBlock|\w*Attention\w*")


@dataclass
class Record:
    """Inputs and full-precision outputs of one unit for all tuples that it sees; `steps` are theirs."""

    steps: Tensor
    template: rows.Template
    kept: dict[str, Tensor] = field(default_factory=dict)  # inputs without rows
    inputs: dict[str, rows.RowStore] = field(default_factory=dict)
    exact: dict[str, rows.RowStore] = field(default_factory=dict)  # inputs in full precision
    targets: dict[str, rows.RowStore] = field(default_factory=dict)


# Where a unit is as a reuse pass sees it (METHOD's skip_state 0, 1, 2): computed on the way to the cached feature or apart from
# it, skipped, or computed from what takes the feature on. Without a cache all units are "before".
Side = Literal["before", "inside", "after"]


class _Reached(Exception):
    """The unit was reached: what comes after it is not needed."""


class Simulation:
    """The simulated layers and attention products on `model`, for good: the model is ours.

    `quantized` says whether it is evaluated as quantized or in full precision, `steps` which step each row is at. `shallow`
    makes the reuse passes of the model under a cache; None without.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, QuantizedLayer],
        products: dict[str, dict[Product, Any]],
        shallow: Callable[[nn.Module], Shallow] | None = None,
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.quantized = False
        self.steps = torch.zeros(0, dtype=torch.int64)
        self.drop: tuple[float, torch.Generator] | None = None
        self.factors: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
        self.sides: dict[str, Side] = {}
        self.layers = {name: SimulatedLayer(model.get_submodule(name), layer) for name, layer in layers.items()}
        for layer in self.layers.values():
            replace_forward(layer.module, functools.partial(self._layer, layer=layer))
        for name, tables in products.items():
            tables_ = {product: StepScales(tables[product]).to(self.device) for product in PRODUCTS}
            processor = QuantizedProducts({p: functools.partial(self._product, table=t) for p, t in tables_.items()})
            replace_processor(model.get_submodule(name), processor)
        self.shallow = None if shallow is None else shallow(model)  # last: what it skips it skips with all that is ours

    def _layer(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any], layer: SimulatedLayer) -> Tensor:
        if not self.quantized:
            return forward(*args, **kwargs)
        return layer(args[0] if args else kwargs["input"], self.steps, self.drop)

    def _product(self, x: Tensor, table: StepScales) -> Tensor:
        return table(x, self.steps) if self.quantized else x

    def units(
        self, kind: Literal["block", "layer"], wanted: list[str], data: Data, also: str | None = None
    ) -> dict[str, list[str]]:
        """Units in the order in which they run, with those of their layers that are `wanted`; `also` is looked at as well.

        A unit that runs more than once in a forward is left out: it has no one input. Two forwards of different batch sizes
        tell which of a unit's inputs and outputs have rows of the batch.
        """
        found: dict[str, list[str]] = {}
        for name in wanted:
            found.setdefault(name if kind == "layer" else self._block(name), []).append(name)
        units = dict.fromkeys([*found, *([also] if also is not None else [])])
        skipped = () if self.shallow is None else self.shallow.skipped
        order: list[str] = []
        seen: list[dict[str, tuple[dict[str, int], dict[str, int]]]] = []
        for size in (2, 3):
            places = torch.arange(size) % len(data.steps)
            sizes: dict[str, tuple[dict[str, int], dict[str, int]]] = {}

            def ran(_: Any, args: Any, kwargs: Any, out: Any, *, unit: str, sizes: Any = sizes) -> None:
                order.append(unit)
                sizes[unit] = _lengths((args, kwargs)), _lengths(out)

            hooks = [
                self.model.get_submodule(unit).register_forward_hook(
                    functools.partial(ran, unit=unit), with_kwargs=True
                )
                for unit in dict.fromkeys([*units, *skipped])
            ]
            try:
                self._run(data, places, quantized=False)
            finally:
                for hook in hooks:
                    hook.remove()
            seen.append(sizes)
        times = Counter(order)
        once = [unit for unit in dict.fromkeys(order) if times[unit] == 2 and unit in units]
        self.factors = {unit: (_factors(seen, unit, 0), _factors(seen, unit, 1)) for unit in once}
        first = min((order.index(name) for name in skipped if name in times), default=len(order))
        self.sides = {unit: "after" if order.index(unit) > first else "before" for unit in once}
        for name in skipped:
            self.sides |= {unit: "inside" for unit in once if f"{unit}.".startswith(f"{name}.")}
        return {unit: found[unit] for unit in once if unit in found}

    def _block(self, name: str) -> str:
        """The outermost block around a layer, or the layer itself."""
        parts = name.split(".")
        for depth in range(1, len(parts)):
            outer = ".".join(parts[:depth])
            if BLOCKS.fullmatch(type(self.model.get_submodule(outer)).__name__):
                return outer
        return name

    def record(self, unit: str, data: Data, size: int, exact: bool) -> Record:
        """Run all tuples up to `unit`, in full precision for the targets (and `exact` inputs), and quantized for the inputs.

        Passes in full precision are whole, so behind the cached feature the targets are those without a cache. There the
        inputs are always those of the quantized model, `exact` or not: they are off by more than rounding.
        """
        side = self.sides[unit]
        chosen = (~data.reused).nonzero()[:, 0] if side == "inside" else torch.arange(len(data.steps))
        exact = exact and side != "after"
        record = Record(data.steps[chosen], ["plain", None])
        module = self.model.get_submodule(unit)
        of_inputs, of_outputs = self.factors[unit]
        for places, reused in self._passes(data, chosen, size):

            def came_in(
                _: Any, args: Any, kwargs: Any, store: Any, places: Tensor = places, stop: bool = False
            ) -> None:
                if store is not None:
                    record.template = rows.template((args, kwargs))
                    for path, value in rows.leaves((args, kwargs)):
                        if path in of_inputs:
                            _put(store, path, record, of_inputs[path], places, value)
                        else:
                            record.kept[path] = value
                if stop:
                    raise _Reached

            def went_out(_: Any, __: Any, out: Any, places: Tensor = places) -> None:
                for path, value in rows.leaves(out):
                    if path in of_outputs:
                        _put(record.targets, path, record, of_outputs[path], places, value)
                raise _Reached

            for quantized in (False, True):
                store = record.inputs if quantized else record.exact if exact else None
                before = functools.partial(came_in, store=store, stop=quantized)
                hooks = [module.register_forward_pre_hook(before, with_kwargs=True)]
                hooks += [] if quantized else [module.register_forward_hook(went_out)]
                try:
                    self._run(data, chosen[places], quantized, reused and quantized)
                except _Reached:
                    pass
                finally:
                    for hook in hooks:
                        hook.remove()
        return record

    def _passes(self, data: Data, chosen: Tensor, size: int) -> Iterator[tuple[Tensor, bool]]:
        """Places in `chosen` of tuples to evaluate at once, and whether by reuse passes: a batch is of one kind."""
        if self.shallow is None:
            for places in _chunks(len(chosen), size):
                yield places, False
            return
        for reused in (False, True):
            of_kind = (data.reused[chosen] == reused).nonzero()[:, 0]
            for places in of_kind.split(size) if len(of_kind) else ():
                yield places, reused

    @torch.no_grad()
    def _run(self, data: Data, places: Tensor, quantized: bool, reused: bool = False) -> None:
        self.at(data.steps[places], quantized)
        arguments = data.batch(places, self.device)
        if reused:
            assert self.shallow is not None
            self.shallow.evaluate(arguments, data.feature(places, self.device))
        else:
            self.model(**arguments)

    def at(self, steps: Tensor, quantized: bool) -> None:
        """Evaluate rows at `steps` from now on, as quantized or in full precision."""
        self.steps, self.quantized = steps.to(self.device), quantized

    def differences(self, unit: str, record: Record, places: Tensor, exact: Tensor | None = None) -> Iterator[Tensor]:
        """Output minus target for the tuples at `places`, for every tensor that the unit returns.

        exact: bool (len(places),), for which of them the input is that of full precision.
        """

        def tensor(path: str) -> Tensor:
            if path in record.kept:
                return record.kept[path]
            value = record.inputs[path].get(places, self.device)
            if exact is not None:
                factor = record.inputs[path].factor
                rows_ = exact.repeat_interleave(factor).to(self.device).view(-1, *[1] * (value.dim() - 1))
                value = torch.where(rows_, record.exact[path].get(places, self.device), value)
            return value

        args, kwargs = rows.fill(record.template, tensor)
        self.at(record.steps[places], quantized=True)
        out = dict(rows.leaves(self.model.get_submodule(unit)(*args, **kwargs)))
        for path, store in record.targets.items():
            yield out[path] - store.get(places, self.device)

    def loss(self, unit: str, record: Record, places: Tensor, exact: Tensor | None) -> Tensor:
        """Mean squared error of the unit's output for the tuples at `places`, with gradients."""
        differences = list(self.differences(unit, record, places, exact))
        total: Any = sum(difference.square().sum() for difference in differences)
        return total / sum(difference.numel() for difference in differences)

    @torch.no_grad()
    def shift(self, unit: str, record: Record, size: int) -> Tensor:
        """Mean of output minus target per channel, over all tuples, of a unit that returns one tensor."""
        total: Any = 0.0
        for places in _chunks(len(record.steps), size):
            (difference,) = self.differences(unit, record, places)
            channels = difference.movedim(1, -1) if difference.dim() == 4 else difference
            total = total + channels.reshape(-1, channels.shape[-1]).double().mean(0) * len(places)
        return (total / len(record.steps)).float()

    @torch.no_grad()
    def error(self, unit: str, record: Record, size: int) -> float:
        """Mean squared error of the unit's output over all tuples."""
        total, count = 0.0, 0
        for places in _chunks(len(record.steps), size):
            for difference in self.differences(unit, record, places):
                total += float(difference.double().square().sum())
                count += difference.numel()
        return total / max(count, 1)


def _chunks(count: int, size: int) -> Iterator[Tensor]:
    return iter(torch.arange(count).split(size))


def _put(
    stores: dict[str, rows.RowStore], path: str, record: Record, factor: int, places: Tensor, value: Tensor
) -> None:
    if path not in stores:
        stores[path] = rows.RowStore(len(record.steps), factor, value)
    stores[path].put(places, value)


def _lengths(tree: Any) -> dict[str, int]:
    return {path: value.shape[0] for path, value in rows.leaves(tree) if value.dim()}


def _factors(seen: list[dict[str, tuple[dict[str, int], dict[str, int]]]], unit: str, which: int) -> dict[str, int]:
    """Paths of the tensors whose first dimension grows with the batch (of 2, then of 3), and by how much per row."""
    two, three = seen[0][unit][which], seen[1][unit][which]
    return {p: n // 2 for p, n in two.items() if n and n % 2 == 0 and three.get(p) == n // 2 * 3}
