"""Reconstruction of all denoisers of a pipeline, unit by unit, so that a killed run goes on after the last finished unit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from iec.artifact.calibration import LayerPart, Quantization, QuantizedLayer, StepTable, WeightCodes
from iec.caches.cachequant import CacheQuant
from iec.caches.cut import Cut, Pass
from iec.calibration.journal import within
from iec.calibration.tuples import Tuples
from iec.quant.reconstruct import Outcome, Reconstruction, reconstruct


class Finished:
    """The outcomes of finished units, by component and unit, in the order in which they came.

    `nearest` are the layers before reconstruction.
    """

    what = "reconstruction"

    def __init__(self, nearest: dict[str, QuantizedLayer]) -> None:
        self.nearest = nearest
        self.outcomes: list[tuple[str, Outcome]] = []

    def state(self) -> tuple[dict[str, Tensor], list[Any]]:
        """Tensors, and the plain rest, for a checkpoint."""
        tensors: dict[str, Tensor] = {}
        plain: list[Any] = []
        for place, (component, outcome) in enumerate(self.outcomes):
            plain.append([component, outcome.unit, outcome.nearest, outcome.learned, list(outcome.layers)])
            for name, layer in outcome.layers.items():
                tensors |= {f"{place}/{name}/{key}": value for key, value in _tensors(layer)}
        return tensors, plain

    def load_state(self, tensors: dict[str, Tensor], plain: list[Any]) -> None:
        """Continue from `state()`."""
        for place, (component, unit, before, learned, names) in enumerate(plain):
            layers = {name: _layer(self.nearest[f"{component}.{name}"], tensors, f"{place}/{name}") for name in names}
            self.outcomes.append((component, Outcome(unit, before, learned, layers)))

    def of(self, component: str) -> dict[str, dict[str, QuantizedLayer]]:
        """The layers of the finished units of one denoiser."""
        return {outcome.unit: outcome.layers for name, outcome in self.outcomes if name == component}


class ReusePasses:
    """The reuse passes of the copy of a denoiser that is reconstructed (`iec.quant.data.Shallow`); its cut stays on it."""

    def __init__(self, model: nn.Module, cache: CacheQuant) -> None:
        self.model, self.cut = model, Cut(model, cache.locate(model))
        modules = {module for module, _ in self.cut.site.stand_ins(Pass())}
        self.skipped = tuple(name for name, module in model.named_modules() if module in modules)
        self.cut.install()

    def evaluate(self, arguments: dict[str, Any], feature: Tensor) -> Any:
        """Evaluate the model on `feature`, which is compensated."""
        self.cut.reuse(feature)
        return self.cut.evaluate(self.model.forward, (), arguments)


def reconstructed(
    models: dict[str, nn.Module],
    quant: Quantization,
    tuples: dict[str, Tuples],
    options: Reconstruction,
    outputs: dict[str, str],
    finished: Finished,
    after: Callable[[int, int], None],
    cache: CacheQuant | None = None,
) -> Quantization:
    """`quant` with reconstructed layers; `after(done, units)` is called after each unit, whose outcome `finished` then holds.

    `outputs`: of denoisers whose mean output is to be corrected, the last layer ("conv_out"). `cache`: where the denoiser, the
    only one then, is cut; the tuples know what is reused.
    """
    shallow = None if cache is None else functools.partial(ReusePasses, cache=cache)
    units = 0
    for component, model in models.items():
        prefix = f"{component}."
        if not len(tuples[component]):  # it never ran
            continue

        def count(names: list[str]) -> None:
            nonlocal units
            units += len(names)

        outcomes = reconstruct(
            model,
            within(prefix, quant.layers),
            within(prefix, quant.products),
            tuples[component],
            options,
            outputs.get(component),
            finished.of(component),
            count,
            shallow,
        )
        for outcome in outcomes:
            finished.outcomes.append((component, outcome))
            after(len(finished.outcomes), units)
    layers = dict(quant.layers)
    for component, outcome in finished.outcomes:
        layers |= {f"{component}.{name}": layer for name, layer in outcome.layers.items()}
    report = {
        "options": options.as_dict(),
        "tuples": {component: len(of) for component, of in tuples.items()},
        "units": {f"{component}.{o.unit}": o.as_dict() for component, o in finished.outcomes},
    }
    return dataclasses.replace(quant, layers=layers, reconstruction=report)


def _tensors(layer: QuantizedLayer) -> Iterator[tuple[str, Tensor]]:
    """What reconstruction may have changed of a layer."""
    for index, part in enumerate(layer.parts):
        yield f"{index}/codes", part.weight.codes
        yield f"{index}/scale", part.act.scale
        yield f"{index}/zero", part.act.zero
    if layer.bias is not None:
        yield "bias", layer.bias


def _layer(nearest: QuantizedLayer, tensors: dict[str, Tensor], path: str) -> QuantizedLayer:
    parts: list[LayerPart] = []
    for index, part in enumerate(nearest.parts):
        codes, scale, zero = (tensors[f"{path}/{index}/{key}"] for key in ("codes", "scale", "zero"))
        weight: WeightCodes = dataclasses.replace(part.weight, codes=codes)
        parts.append(dataclasses.replace(part, weight=weight, act=StepTable(scale, zero, part.act.bits)))
    return QuantizedLayer(nearest.kind, tuple(parts), tensors.get(f"{path}/bias"))
