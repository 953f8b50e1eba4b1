"""Calibrations of the pipelines of `tiny`, an independent emulation of a quantized model, and what could be left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import iec
from iec.artifact.calibration import Calibration, Quantization, QuantizedLayer, StepTable
from iec.quant.kernels import KERNELS
from tiny import CASES, Case

_SET_BY_IEC = ("generator", "num_inference_steps", "output_type", "batch_size")
QUICK: dict[str, Any] = {"act_method": "max", "weight_method": "max"}  # no search, for tests that only want numbers


def needs_onednn() -> str | None:
    """Why the integer kernel of the CPU cannot run here, if so."""
    return KERNELS["onednn"].why_not(torch.device("cpu"))


def arguments(case: Case) -> dict[str, Any]:
    """The arguments of a case's call that calibration takes: for two samples."""
    return {key: value for key, value in case.kwargs().items() if key not in _SET_BY_IEC}


@functools.cache
def calibration(name: str, steps: int = 4, **options: Any) -> Calibration:
    """A calibration of a case on the two samples of its call, made once in a process."""
    case = CASES[name]
    config = iec.QuantConfig(**{**QUICK, **options})
    pipe = case.build()
    return iec.calibrate(pipe, config, num_inference_steps=steps, num_samples=2, batch_size=2, **arguments(case))


def changed(made: Calibration, change: Callable[[StepTable], StepTable]) -> Calibration:
    """The calibration with every table of activations changed."""
    assert made.quant is not None
    layers = {
        name: dataclasses.replace(
            layer, parts=tuple(dataclasses.replace(part, act=change(part.act)) for part in layer.parts)
        )
        for name, layer in made.quant.layers.items()
    }
    products = {name: {key: change(table) for key, table in of.items()} for name, of in made.quant.products.items()}
    return dataclasses.replace(made, quant=dataclasses.replace(made.quant, layers=layers, products=products))


def stepwise(made: Calibration) -> Calibration:
    """The calibration with scales that differ widely from step to step: 1, 2, 4, 1/2, ... times what was found."""

    def change(table: StepTable) -> StepTable:
        factors = torch.tensor([(1.0, 2.0, 4.0, 0.5, 3.0)[step % 5] for step in range(len(table.scale))])
        return dataclasses.replace(table, scale=table.scale * factors)

    return changed(made, change)


def compensated(made: Calibration, seed: int = 0) -> Calibration:
    """The calibration with gains, some of them negative, in the first part of every layer, and a bias for each step."""
    assert made.quant is not None
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, layer in made.quant.layers.items():
        shape = (len(layer.parts[0].act.scale), len(layer.parts[0].weight.scale))
        gain, bias = 1 + 0.5 * torch.randn(shape, generator=generator), 0.2 * torch.randn(shape, generator=generator)
        first = dataclasses.replace(layer.parts[0], gain=gain)
        layers[name] = dataclasses.replace(layer, parts=(first, *layer.parts[1:]), bias=bias)
    return dataclasses.replace(made, quant=dataclasses.replace(made.quant, layers=layers))


def without_products(made: Calibration) -> Calibration:
    """The calibration of the layers alone."""
    assert made.quant is not None
    return dataclasses.replace(made, quant=dataclasses.replace(made.quant, products={}))


def emulated(layer: QuantizedLayer, module: Any, x: Tensor, step: int) -> Tensor:
    """What a quantized layer returns, from its definition; codes as they are defined, in float32, all else in float64."""
    axis = -1 if layer.kind == "linear" else 1
    inputs, weights = [], []
    for part in layer.parts:
        scale, zero = part.act.scale[step], part.act.zero[step].float()
        piece = x.float().narrow(axis, part.begin, part.end - part.begin)
        codes = (torch.round(piece / scale) + zero).clamp(0, 2**part.act.bits - 1)
        inputs.append((codes.double() - zero) * scale.double())
        shape = (-1, *(1,) * (part.weight.codes.dim() - 1))
        weight = part.weight.codes.double() - part.weight.zero.double().view(shape)
        gain = torch.ones(1) if part.gain is None else part.gain[step]
        weights.append(weight * part.weight.scale.double().view(shape) * gain.double().view(shape))
    bias = layer.bias if layer.bias is not None else module.bias
    bias = bias[step] if layer.bias is not None and layer.bias.dim() == 2 else bias
    bias = None if bias is None else bias.double()
    rounded, weight = torch.cat(inputs, axis), torch.cat(weights, 1)
    if layer.kind == "linear":
        return F.linear(rounded, weight, bias)
    return F.conv2d(rounded, weight, bias, module.stride, module.padding, module.dilation, module.groups)


@contextlib.contextmanager
def by_hand(model: nn.Module, made: Calibration, prefix: str, step: Callable[[], int]) -> Iterator[None]:
    """Quantize the layers of `model` without `iec.quantize`: hooks that replace each layer's output by `emulated`."""
    assert made.quant is not None
    hooks = []
    for name, layer in made.quant.layers.items():
        module = model.get_submodule(name.removeprefix(f"{prefix}."))

        def replaced(
            module: nn.Module, args: tuple[Tensor, ...], output: Tensor, layer: QuantizedLayer = layer
        ) -> Tensor:
            return emulated(layer, module, args[0], step()).to(output.dtype)

        hooks.append(module.register_forward_hook(replaced))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


WATCHING: list[Times] = []  # whose hooks a test has to take off again


class Times:
    """The step that a model is evaluated at, from nothing but the timestep that it is called with. Also counts its calls."""

    def __init__(self, model: nn.Module, timesteps: tuple[float, ...]) -> None:
        divided = type(model).__name__ == "FluxTransformer2DModel"  # its pipelines hand it t / 1000
        self.timesteps = tuple(t / 1000 for t in timesteps) if divided else timesteps
        self.step, self.calls = -1, 0
        self.handle = model.register_forward_pre_hook(self._called, with_kwargs=True)
        WATCHING.append(self)

    def _called(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = float(torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"]).flatten()[0])
        self.calls += 1
        self.step = min(range(len(self.timesteps)), key=lambda index: abs(self.timesteps[index] - given))

    def __call__(self) -> int:
        return self.step

    def counted(self) -> int:
        """The step that someone who counts the calls takes it for."""
        return (self.calls - 1) % len(self.timesteps)


def calls(model: nn.Module, evaluate: Callable[[], Any]) -> int:
    """How often `evaluate` calls layers of `model` that can be quantized. Some models call one twice in an evaluation."""
    count = [0]

    def called(*_: Any) -> None:
        count[0] += 1

    layers = [part for part in model.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(called) for layer in layers]
    evaluate()
    for hook in hooks:
        hook.remove()
    return count[0]


def state(pipe: Any) -> dict[str, Any]:
    """What of a pipeline calibration and quantization could leave changed: compare with ==."""
    ours = [key for key in vars(pipe) if key in ("_iec", "get_timesteps")]  # what a run leaves of its own is not asked
    told: dict[str, Any] = {"pipe": ours, "scheduler": id(pipe.scheduler)}
    for component, model in pipe.components.items():
        if not isinstance(model, nn.Module):
            continue
        for name, part in model.named_modules():
            hooks = (len(part._forward_hooks), len(part._forward_pre_hooks))
            kept = {key: id(value) for key, value in vars(part).items() if key in ("forward", "processor")}
            told[f"{component}.{name}"] = (sorted(vars(part)), hooks, kept, part.training)
        for name, value in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            told[f"{component}.{name}!"] = (id(value), value.data_ptr(), value.sum().item(), value.stride())
    return told


def same(one: Quantization | None, other: Quantization | None) -> bool:
    """Whether two quantizations agree bit for bit."""
    assert one is not None and other is not None
    return _plain(one) == _plain(other)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(value.shape), value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
