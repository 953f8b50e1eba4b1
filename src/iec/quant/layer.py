"""Run time: the forwards of quantized layers, which take their scales from the clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from iec.artifact.calibration import Product, QuantizedLayer, StepTable
from iec.patch import replace_forward
from iec.plan import StepClock
from iec.quant.attention import PRODUCTS, RoundedProduct, replace_processor
from iec.quant.fused import attention_processor, fused_forwards
from iec.quant.kernels import Kernel

Op = Callable[[Tensor, int], Tensor]


class QuantizedModel:
    """The quantized layers of one denoiser, in place from `install()` to `remove()`.

    Args:
        model: the denoiser.
        layers: quantized layers by module name within the model.
        products: quantizers of attention products by module name.
        clock: says at which step the model is evaluated, which is all that the choice of scales depends on: a correction has
            the step, and so the scales, of its ordinary visit.
        kernel: computes the layers.

    Raises KeyError for a name that the model lacks.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, QuantizedLayer],
        products: dict[str, dict[Product, StepTable]],
        clock: StepClock,
        kernel: Kernel,
    ) -> None:
        self.model, self.clock, self.kernel = model, clock, kernel
        self.modules = {name: model.get_submodule(name) for name in layers}
        self.ops: dict[str, Op] = {name: kernel.build(self.modules[name], layer) for name, layer in layers.items()}
        self.products = {
            name: {product: RoundedProduct(tables[product]) for product in PRODUCTS}
            for name, tables in products.items()
        }
        self._removers: list[Callable[[], None]] = []

    def install(self) -> None:
        """Stand in for the forwards of the layers and for the processors of the attentions."""
        for name, module in self.modules.items():
            self._removers.append(replace_forward(module, self._forward(self.ops[name])))
        for block, around in fused_forwards(self.model, self.ops, self.step).items():
            self._removers.append(replace_forward(block, around))
        for name, of in self.products.items():
            attn = self.model.get_submodule(name)
            processor = attention_processor(attn, name, self.ops, of, self.step)
            self._removers.append(replace_processor(attn, processor))

    def remove(self) -> None:
        """Step aside."""
        for undo in reversed(self._removers):
            undo()
        self._removers = []

    def step(self) -> int:
        """The step of the clock. Raises RuntimeError when it stands still."""
        tick = self.clock.now
        if tick is None:
            raise RuntimeError(
                f"this {type(self.model).__name__} is quantized with scales that belong to sampling steps, and was evaluated "
                "outside a run of its pipeline; call the pipeline, or iec.undo(pipe) before evaluating the model by itself"
            )
        return tick.step

    def _forward(self, op: Op) -> Any:
        def around(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            return op(args[0] if args else kwargs["input"], self.step())

        return around
