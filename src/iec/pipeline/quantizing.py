"""iec.quantize: a calibration put to work on a pipeline."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from iec.artifact.calibration import Calibration
from iec.pipeline.caching import Caching
from iec.pipeline.installation import Installation, installation, installed, switching
from iec.pipeline.origin import check_origin, steps_check
from iec.quant.config import QuantConfig
from iec.quant.kernels import choose
from iec.quant.layer import QuantizedModel


class Quantizing:
    """The quantization of one pipeline; made by `iec.quantize`. As a context manager it takes it off at the end."""

    def __init__(self, held: Installation, calibration: Calibration, kernel: str, keep_float: bool) -> None:
        assert calibration.quant is not None
        self.held, self.calibration, self.keep_float = held, calibration, keep_float
        self.models: list[QuantizedModel] = []
        self._hooks: list[Any] = []
        for component, gate in held.gates.items():
            prefix = f"{component}."
            layers = {
                name.removeprefix(prefix): layer
                for name, layer in calibration.quant.layers.items()
                if name.startswith(prefix)
            }
            products = {
                name.removeprefix(prefix): tables
                for name, tables in calibration.quant.products.items()
                if name.startswith(prefix)
            }
            device = next(gate.module.parameters()).device
            chosen = choose(kernel, device)
            self.models.append(QuantizedModel(gate.module, layers, products, held.state.clock, chosen))

    @property
    def pipe(self) -> Any:
        """The pipeline."""
        return self.held.pipe

    @property
    def kernel(self) -> str:
        """The kernel that computes the layers."""
        return ", ".join(sorted({model.kernel.name for model in self.models}))

    @property
    def active(self) -> bool:
        """Whether the pipeline carries this quantization."""
        return installed(self.pipe) is self.held and self.held.in_place and self in self.held.parts

    def describe(self) -> str:
        """One line: bits, kernel, layers, size of the quantized weights."""
        quant = self.calibration.quant
        assert quant is not None
        mib, whole = (size / 2**20 for size in (self.calibration.weight_bytes, self.calibration.float_bytes))
        recon = ", reconstructed" if quant.reconstruction else ""
        label = QuantConfig.from_dict(quant.config).label
        return f"{label}{recon}, kernel {self.kernel}, {len(quant.layers)} layers, weights {mib:.2f} MiB for {whole:.2f} MiB"

    def install(self) -> None:
        """Put the quantized layers in place, under a cache if there is one."""
        self.held.state.end_run()
        with _beneath_cache(self.held):
            for model in self.models:
                model.install()
                check = steps_check(self.held, self.calibration.origin.timesteps, "quantized")
                self._hooks.append(model.model.register_forward_pre_hook(check))
        if not self.keep_float:
            self.held.weights = self.calibration.origin.weights
            for model in self.models:
                for module in model.modules.values():
                    module.weight.data = module.weight.data.new_empty(0)

    def remove(self) -> None:
        """Put the float layers back; `Installation.drop` calls it. Raises RuntimeError where they were given away."""
        if not self.keep_float:
            raise RuntimeError(
                "the floating-point weights were released (keep_float=False), so this pipeline stays quantized; load it anew"
            )
        self.held.state.end_run()
        with _beneath_cache(self.held):
            for hook in self._hooks:
                hook.remove()
            for model in reversed(self.models):
                model.remove()
        self._hooks = []

    def undo(self) -> None:
        """Take the quantization off the pipeline, and nothing else; nothing happens if it is off already."""
        with switching:
            if self in self.held.parts:
                self.held.drop(self)

    def __enter__(self) -> Quantizing:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Quantizing({type(self.pipe).__name__}, {self.describe()}, {'active' if self.active else 'off'})"


def quantize(
    pipe: Any, calibration: Calibration | str | os.PathLike[str], kernel: str = "auto", keep_float: bool = True
) -> Quantizing:
    """Quantize the denoiser of `pipe` in place, as calibrated; `iec.undo(pipe)` brings back what it was, bit for bit.

    Args:
        pipe: the pipeline that was calibrated, or one with the same weights, architecture and scheduler.
        calibration: what `iec.calibrate` made, or a folder it was saved in.
        kernel: "reference" (rounded floats, the oracle), "onednn" (int8 on a CPU), "cuda" (int8 on a GPU), or "auto", the
            fastest that runs on the pipeline's device.
        keep_float: keep the floating-point weights for `undo`. With False their memory is released, for good.

    Raises TypeError for a pipeline that cannot be quantized; ValueError for a calibration without quantization or of another
    model or scheduler (it names what differs), or when the pipeline is quantized already; RuntimeError for a kernel that cannot
    run here. The pipeline is then as it was.
    """
    if isinstance(calibration, (str, os.PathLike)):
        calibration = Calibration.load(calibration)
    if not isinstance(calibration, Calibration):
        raise TypeError(f"calibration is {calibration!r}, expected an iec.Calibration or the folder of one")
    if calibration.quant is None:
        raise ValueError("this calibration holds no quantization; calibrate with quant=iec.QuantConfig(...)")
    with switching:
        there = quantized(installed(pipe))
        if there is not None:
            raise ValueError(
                f"this pipeline is quantized already ({there.describe()}); take that off first, by iec.undo(pipe)"
            )
        check_origin(pipe, calibration.origin)
        held = installation(pipe)
        part = Quantizing(held, calibration, kernel, keep_float)
        held.add(part)
        part.install()
        return part


def quantized(held: Installation | None) -> Quantizing | None:
    """The quantization among the parts of an installation, if any."""
    return next((part for part in held.parts if isinstance(part, Quantizing)), None) if held is not None else None


@contextlib.contextmanager
def _beneath_cache(held: Installation) -> Iterator[None]:
    """Lift a cache off the model for as long as something is done to the layers under it."""
    caches = [part.feature for part in held.parts if isinstance(part, Caching)]
    for feature in caches:
        feature.remove()
    try:
        yield
    finally:
        for feature in caches:
            feature.install()
