"""The passage that corrects what the quantized model does to the output, step by step.

The model as it will run is evaluated along full-precision trajectories. Per step and channel of its last layer the true
output is regressed on its own: rounding shifts the mean of ε and shrinks ε by some tenths of a percent, and such errors
have the same sign at every step, so they add up where others average out. The fit goes into the last layer's gain and
bias. (PTQD, He et al., NeurIPS 2023, takes the same two apart: noise that is correlated with the output, and its mean.)
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from iec.artifact.calibration import CacheTables, Quantization, QuantizedLayer
from iec.caches.cachequant import CacheQuant
from iec.caches.cut import Cut
from iec.calibration.activations import Reuse
from iec.calibration.journal import State, within
from iec.calibration.passage import Call, Passage
from iec.core.regression import PairMoments
from iec.pipeline.installation import Installation
from iec.plan import StepClock
from iec.quant.kernels import choose
from iec.quant.layer import QuantizedModel


class Twin:
    """A quantized copy of a denoiser, under its cache if it has one; the moments of its last layer's output and of the true one.

    Args:
        model: the denoiser.
        layers, products: as in `QuantizedModel`.
        last: its last layer ("conv_out").
        num_steps: T.
        tables: of its cache, None without.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, Any],
        products: dict[str, Any],
        last: str,
        num_steps: int,
        tables: CacheTables | None,
    ) -> None:
        self.layer = model.get_submodule(last)
        self.copy, self.clock = copy.deepcopy(model), StepClock()
        self.clock.start(num_steps)
        kernel = choose("reference", next(model.parameters()).device)
        QuantizedModel(self.copy, layers, products, self.clock, kernel).install()
        self.reuse: Reuse | None = None
        if tables is not None:
            cut = Cut(self.copy, CacheQuant.from_dict(tables.config).locate(self.copy))
            cut.install()
            self.reuse = Reuse(cut, tables)
        self._rounded: Tensor | None = None
        self.copy.get_submodule(last).register_forward_hook(self._keep)
        self.moments = PairMoments(self.layer.weight.shape[0], (num_steps,))
        self._axis = -1 if isinstance(self.layer, nn.Linear) else 1

    def _keep(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self._rounded = output

    def evaluate(self, call: Call) -> None:
        """Evaluate the copy; its output waits for the true one."""
        self.clock.move(call.step, 0, True)
        here = call.of(self.copy.forward)
        with torch.no_grad():
            if self.reuse is None:
                here()
            elif here in self.reuse:
                self.reuse.shallow(here)
            else:
                self.reuse.whole(here)

    def compare(self, exact: Tensor, step: int) -> None:
        """Take the true output of the last layer into account."""
        assert self._rounded is not None
        self.moments.update(self._rounded, exact.detach(), step, self._axis)


class Outputs(Passage):
    """The moments of the last layers' outputs, over samples.

    Args:
        held: the pipeline's installation.
        quant: the quantized layers, by "component.layer", as they will run.
        last: of each denoiser that ran, its last layer.
        num_steps: T.
        tables: of the cache, None without.
        gain: whether the output is scaled, or its mean alone corrected.
    """

    what = "outputs"

    def __init__(
        self,
        held: Installation,
        quant: Quantization,
        last: dict[str, str],
        num_steps: int,
        tables: CacheTables | None,
        gain: bool,
    ) -> None:
        super().__init__(held)
        self.gain = gain
        self.last = {name: layer for name, layer in last.items() if f"{name}.{layer}" in quant.layers}
        self.twins = {
            name: Twin(
                self.models[name],
                within(f"{name}.", quant.layers),
                within(f"{name}.", quant.products),
                layer,
                num_steps,
                tables if tables is not None and tables.component == name else None,
            )
            for name, layer in self.last.items()
        }

    def evaluate(self, name: str, call: Call) -> Any:
        """Evaluate the quantized copy, then the denoiser, and compare the outputs of their last layers."""
        twin = self.twins.get(name)
        if twin is None:
            return call()
        twin.evaluate(call)
        hook = twin.layer.register_forward_hook(lambda _, __, output: twin.compare(output, call.step))
        try:
            return call()
        finally:
            hook.remove()

    def learnt(self) -> State:
        """See `Passage`."""
        moments = {name: twin.moments.state() for name, twin in self.twins.items()}
        return {f"{name}/{key}": value for name, held in moments.items() for key, value in held.items()}, None

    def relearn(self, tensors: dict[str, Tensor], plain: Any) -> None:
        """See `Passage`."""
        for name, twin in self.twins.items():
            twin.moments = PairMoments.from_state(within(f"{name}/", tensors))

    def result(self, quant: Quantization) -> Quantization:
        """`quant` with the gains and biases of the last layers, at every step."""
        layers = dict(quant.layers)
        for name, twin in self.twins.items():
            full = f"{name}.{self.last[name]}"
            layer, fit = layers[full], twin.moments.fit() if self.gain else twin.moments.shift()
            own = layer.bias if layer.bias is not None else twin.layer.bias
            bias = fit.offset + (0 if own is None else fit.gain * own.detach().double().cpu())
            parts = tuple(
                dataclasses.replace(part, gain=(fit.gain if part.gain is None else fit.gain * part.gain).float())
                for part in layer.parts
            )
            layers[full] = QuantizedLayer(layer.kind, parts, bias.float())
        return dataclasses.replace(quant, layers=layers)
