"""The kernels of quantized layers: `reference` against float64, `onednn` against `reference`, the passes around them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iec.artifact.calibration import LayerPart, QuantizedLayer, StepTable, WeightCodes
from iec.core import affine
from iec.quant.kernels import KERNELS, choose

CPU = torch.device("cpu")
onednn = KERNELS["onednn"]
needs_onednn = pytest.mark.skipif(onednn.why_not(CPU) is not None, reason=str(onednn.why_not(CPU)))
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def weights(shape: tuple[int, ...], bits: int, style: str, rng: torch.Generator) -> WeightCodes:
    """Codes over all levels; zero points as their style has them."""
    levels = 2**bits
    codes = torch.randint(0, levels, shape, generator=rng, dtype=torch.int64)
    codes.view(shape[0], -1)[:, 0], codes.view(shape[0], -1)[:, -1] = 0, levels - 1
    if style == "symmetric":
        zero = torch.full((shape[0],), levels // 2)
    elif style == "asymmetric":
        zero = torch.randint(0, levels, (shape[0],), generator=rng)
    elif style == "positive":  # one-signed: the zero point is below the codes
        zero = torch.randint(-2 * levels, 1, (shape[0],), generator=rng)
    else:  # constant channels: the multiple searched for them is 1 of scale c, z = 0
        codes[:], zero = 1, torch.zeros(shape[0])
    scale = torch.rand(shape[0], generator=rng) * 0.02 + 0.001
    return WeightCodes(codes.to(torch.uint8), scale, zero.to(torch.int16), bits)


def layer_for(
    module: nn.Module, rng: torch.Generator, *, bits: int = 8, style: str = "symmetric", act_bits: int = 8,
    cuts: tuple[int, ...] = (), zeros: tuple[int, ...] = (128, 3), scales: tuple[float, ...] = (0.021, 0.034),
) -> QuantizedLayer:  # fmt: skip
    kind = {nn.Conv2d: "conv2d", nn.Conv1d: "conv1d", nn.Linear: "linear"}[type(module)]
    out, inputs, *window = module.weight.shape
    ends = (*cuts, inputs)
    parts, begin = [], 0
    for number, end in enumerate(ends):
        table = StepTable(
            torch.tensor(scales) * (1 + number), torch.tensor([z + number for z in zeros], dtype=torch.int16), act_bits
        )
        if len(ends) == 1:
            end_of_module = module.in_features if kind == "linear" else module.in_channels
            parts.append(LayerPart(0, end_of_module, weights((out, inputs, *window), bits, style, rng), table))
        else:
            parts.append(LayerPart(begin, end, weights((out, end - begin, *window), bits, style, rng), table))
        begin = end
    return QuantizedLayer(kind, tuple(parts))


def rounded64(x: Tensor, table: StepTable, step: int) -> Tensor:
    """x̂ in float64 of codes computed as affine.quantize does, in float32."""
    scale, zero = table.scale[step], table.zero[step]
    codes = (torch.round(x.float() / scale) + zero).clamp(0, 2**table.bits - 1)
    return (codes.double() - zero) * scale.double()


def emulate(
    module: nn.Module, layer: QuantizedLayer, x: Tensor, step: int, moved: list[Any] | None = None
) -> tuple[Tensor, Tensor]:
    """(the layer in float64 written out, Σ |x̂| (|ŵ| + |moved|) + |b|); moved: (out,) or None for each part."""
    axis = -1 if layer.kind == "linear" else -len(module.weight.shape) + 1
    xs, ws, extra = [], [], []
    for part in layer.parts:
        xs.append(rounded64(x.narrow(axis, part.begin, part.end - part.begin), part.act, step))
        form = (-1, *(1,) * (part.weight.codes.dim() - 1))
        zero, scale = part.weight.zero.reshape(form).double(), part.weight.scale.reshape(form).double()
        ws.append((part.weight.codes.double() - zero) * scale)
        more = None if moved is None else moved[layer.parts.index(part)]
        extra.append(ws[-1].abs() + (0 if more is None else more.double().abs().reshape(form)))
    xhat, what, size = torch.cat(xs, axis), torch.cat(ws, 1), torch.cat(extra, 1)
    bias = layer.bias if layer.bias is not None else module.bias
    bias = None if bias is None else bias.detach().double()
    results = []
    for a, b, c in ((xhat, what, bias), (xhat.abs(), size, None if bias is None else bias.abs())):
        if layer.kind == "linear":
            results.append(F.linear(a, b, c))
            continue
        conv = F.conv2d if layer.kind == "conv2d" else F.conv1d
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        a = F.pad(a, module._reversed_padding_repeated_twice, mode)  # right for "same" and "valid" too
        results.append(conv(a, b, c, module.stride, 0, module.dilation, module.groups))
    return results[0], results[1]


def distance(found: Tensor, exact: Tensor, size: Tensor) -> float:
    assert found.shape == exact.shape
    return float(((found.double() - exact).abs() / (size + 1e-30)).max()) if exact.numel() else 0.0


def case(seed: int) -> tuple[nn.Module, QuantizedLayer, Tensor]:
    """A random layer, calibration and input."""
    rng, pick = torch.Generator().manual_seed(seed), random.Random(seed)
    style = pick.choice(["symmetric", "asymmetric", "positive", "constant"])
    bits, act_bits = pick.choice([2, 3, 4, 5, 6, 7, 8, 8, 8]), pick.choice([6, 8, 8])
    zeros = tuple(pick.choice([0, 3, 64, 128, 255, -40, 300, -1000, 16384]) for _ in range(2))
    kind = pick.choice(["conv2d", "conv2d", "conv2d", "conv1d", "linear"])
    bias = pick.random() < 0.7
    if kind == "linear":
        inputs, outputs = pick.choice([1, 7, 33, 64]), pick.choice([1, 5, 19, 32])
        module: nn.Module = nn.Linear(inputs, outputs, bias)
        shape = (*pick.choice([(1,), (5,), (2, 3), (2, 1, 3), ()]), inputs)
        groups = 1
    else:
        groups = pick.choice([1, 1, 1, 2, 4, "depthwise"])
        per = pick.choice([1, 3, 8, 16])
        inputs = per * (groups if isinstance(groups, int) else 1)
        groups = inputs if groups == "depthwise" else groups
        outputs = groups * pick.choice([1, 2, 5])
        padding = pick.choice([0, 1, 2, "same", "valid"])
        options = {
            "stride": 1 if padding == "same" else pick.choice([1, 1, 2, 3]),
            "dilation": pick.choice([1, 1, 2]),
            "padding": padding,
            "padding_mode": pick.choice(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"]),
            "groups": groups,
            "bias": bias,
        }
        if kind == "conv2d":
            kernel: Any = pick.choice([1, 2, 3, (1, 3), (3, 2)])
            module = nn.Conv2d(inputs, outputs, kernel, **options)
            shape = (pick.choice([1, 2, 3]), inputs, pick.choice([5, 7, 10]), pick.choice([6, 9]))
        else:
            module = nn.Conv1d(inputs, outputs, pick.choice([1, 2, 3]), **options)
            shape = (pick.choice([1, 2]), inputs, pick.choice([7, 12]))
    cuts = (inputs // 2,) if groups == 1 and inputs > 1 and pick.random() < 0.4 else ()
    layer = layer_for(module, rng, bits=bits, style=style, act_bits=act_bits, cuts=cuts, zeros=zeros)
    x = torch.randn(shape, generator=rng) * 2
    if len(shape) == 4 and pick.random() < 0.5:
        x = x.contiguous(memory_format=torch.channels_last)
    return module, layer, x


@pytest.mark.parametrize("seed", range(40))
@torch.no_grad()
def test_reference_is_the_layer_in_float64(seed: int) -> None:
    module, layer, x = case(seed)
    op = KERNELS["reference"].build(module, layer)
    for step in (0, 1):
        exact, size = emulate(module, layer, x, step)
        assert distance(op(x, step), exact, size) < 1e-6
        assert distance(op(x.float().double(), step), exact, size) < 1e-6


@needs_onednn
@pytest.mark.parametrize("seed", range(150))
@torch.no_grad()
def test_onednn_is_the_reference(seed: int) -> None:
    """The codes are equal, so what remains is the float32 rounding of the output: 1e-6 of Σ |x̂| (|ŵ| + |k d_w|) + |b|."""
    module, layer, x = case(seed)
    op, reference = onednn.build(module, layer), KERNELS["reference"].build(module, layer)
    for step in (0, 1):
        exact, size = emulate(module, layer, x, step, [part.moved for part in op.parts])
        found = op(x, step)
        assert found.dtype == x.dtype
        assert distance(found, exact, size) < 1e-6
        assert distance(reference(x, step), found.double(), size) < 2e-6


@needs_onednn
@pytest.mark.parametrize("zero", [16384, -16384, 7000])
@torch.no_grad()
def test_sums_do_not_wrap(zero: int) -> None:
    """(255 + 16384)·127·2304 is beyond int32."""
    rng = torch.Generator().manual_seed(0)
    for module, shape in (
        (nn.Conv2d(256, 4, 3, padding=1), (2, 256, 5, 5)),
        (nn.Conv1d(1024, 4, 3, padding=1), (2, 1024, 5)),
        (nn.Linear(2304, 4), (2, 3, 2304)),
    ):
        layer = layer_for(module, rng, style="positive", zeros=(zero, 5))
        x = torch.rand(shape, generator=rng) * 5 - zero * 0.021
        op = onednn.build(module, layer)
        for step in (0, 1):
            exact, size = emulate(module, layer, x, step, [part.moved for part in op.parts])
            assert distance(op(x, step), exact, size) < 1e-6
            codes = op.quantize(x, step)
            total = torch.ones_like(op.from_codes(codes, step))
            op.from_codes(codes, step, total)
            assert distance(total.reshape(exact.shape), exact + 1, size + 1) < 1e-6


# --- cuda -------------------------------------------------------------------------------------------------------------


def check_cuda(op: Any, module: nn.Module, layer: QuantizedLayer, x: Tensor) -> None:
    moved = [part.moved.cpu() * part.scale.cpu() for part in op.parts]
    for step in (0, 1):
        exact, size = emulate(module, layer, x.cpu(), step, moved)
        assert distance(op(x, step).cpu(), exact, size) < 1e-6


@pytest.mark.parametrize("seed", range(80))
@torch.no_grad()
def test_the_arithmetic_of_cuda(seed: int) -> None:
    """Its formula with the windows written out, on the CPU."""
    module, layer, x = case(seed)
    check_cuda(KERNELS["cuda"].build(module, layer), module, layer, x)


@needs_cuda
@pytest.mark.parametrize("seed", range(80))
@torch.no_grad()
def test_cuda_is_the_reference(seed: int) -> None:
    module, layer, x = case(seed)
    op = KERNELS["cuda"].build(module.cuda(), layer)
    check_cuda(op, module.cpu(), layer, x.cuda())
