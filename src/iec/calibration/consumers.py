"""The passage that finds the compensation for rounding in the layers that take the cached feature (DEC, METHOD 4.4).

Their part behind the feature is computed in full precision and rounded, on the input that it has in a run (compensated at reuse
steps), both without bias; per step and output channel one is regressed on the other. The fit goes into the part's gain and the
layer's bias, so it costs nothing at run time.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from iec.artifact.calibration import Quantization, QuantizedLayer
from iec.calibration.activations import Reuse
from iec.calibration.journal import State, within
from iec.calibration.passage import Call, Passage
from iec.core.regression import PairMoments
from iec.patch import replace_forward
from iec.pipeline.installation import Installation
from iec.quant.kernels.reference import ReferenceLayer

CONSUMERS = ("conv1", "conv_shortcut")  # of the resnet that takes the feature


class Consumer:
    """The part of a layer that takes the feature: in full precision, rounded, and the moments of both."""

    def __init__(self, module: nn.Conv2d, layer: QuantizedLayer, num_steps: int) -> None:
        self.module, self.part = module, layer.parts[0]
        self.plain = copy.deepcopy(module)
        self.plain.in_channels = self.part.end
        self.plain.weight = nn.Parameter(module.weight[:, : self.part.end].detach().clone(), requires_grad=False)
        self.plain.bias = None
        self.rounded = ReferenceLayer(self.plain, QuantizedLayer(layer.kind, (self.part,)))
        self.moments = PairMoments(module.out_channels, (num_steps,))

    def take(self, x: Tensor, step: int) -> None:
        """Take an input (B, C, H, W) of the whole layer into account."""
        given = x[:, : self.part.end]
        self.moments.update(self.rounded(given, step), self.plain(given), step)

    def mean_error(self) -> Tensor:
        """Full precision minus rounded, the mean over all steps: float64 (out,)."""
        share = self.moments.count.double() / self.moments.count.sum()
        return share @ self.moments.shift().offset


class Consumers(Passage):
    """The moments of the layers that take the feature, over samples.

    Args:
        held: the pipeline's installation.
        quant: the quantized layers, by "component.layer".
        component: the denoiser that is cached.
        reuse: its cache.
    """

    what = "compensation"

    def __init__(self, held: Installation, quant: Quantization, component: str, reuse: Reuse) -> None:
        super().__init__(held)
        self.reuse, self.component = reuse, component
        model, resnet = self.models[component], reuse.cut.site.consumer
        name = next(name for name, module in model.named_modules() if module is resnet)
        full = {layer: f"{component}.{name}.{layer}" for layer in CONSUMERS}
        self.consumers = {
            full[layer]: Consumer(getattr(resnet, layer), quant.layers[full[layer]], reuse.plan.num_steps)
            for layer in CONSUMERS
            if full[layer] in quant.layers
        }
        self._step: int | None = None
        self._hooks: list[Callable[[], None]] = []

    def install(self) -> None:
        """Stand in for the forwards of the layers and of the denoisers, and cut the model."""
        for consumer in self.consumers.values():
            self._hooks.append(replace_forward(consumer.module, functools.partial(self._taken, consumer=consumer)))
        self.reuse.cut.install()
        super().install()

    def remove(self) -> None:
        """Step aside."""
        super().remove()
        self.reuse.cut.remove()
        for undo in reversed(self._hooks):
            undo()
        self._hooks = []

    def evaluate(self, name: str, call: Call) -> Any:
        """The evaluation of a run with the cache, in full precision, is looked at; then the whole one is made."""
        self._step = call.step
        try:
            if call in self.reuse:
                self.reuse.shallow(call)
                self._step = None
            return self.reuse.whole(call)
        finally:
            self._step = None

    def _taken(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any], consumer: Consumer) -> Any:
        if self._step is not None:
            with torch.no_grad():
                consumer.take(args[0] if args else kwargs["input"], self._step)
        return forward(*args, **kwargs)

    def learnt(self) -> State:
        """See `Passage`."""
        moments = {name: consumer.moments.state() for name, consumer in self.consumers.items()}
        return {f"{name}/{key}": value for name, held in moments.items() for key, value in held.items()}, None

    def relearn(self, tensors: dict[str, Tensor], plain: Any) -> None:
        """See `Passage`."""
        for name, consumer in self.consumers.items():
            consumer.moments = PairMoments.from_state(within(f"{name}/", tensors))

    def result(self, quant: Quantization) -> Quantization:
        """`quant` with the gain of the consumers' first parts, and their biases, at every step."""
        layers = dict(quant.layers)
        for name, consumer in self.consumers.items():
            fit, layer = consumer.moments.fit(), layers[name]
            own = layer.bias if layer.bias is not None else consumer.module.bias
            bias = fit.offset + (0 if own is None else own.detach().double().cpu())
            if layer.bias is not None:  # which makes up for the mean of this part too, as the offset does
                bias = bias - consumer.mean_error()
            first = dataclasses.replace(consumer.part, gain=fit.gain.float())
            layers[name] = QuantizedLayer(layer.kind, (first, *layer.parts[1:]), bias.float())
        return dataclasses.replace(quant, layers=layers)
