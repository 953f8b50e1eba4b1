"""The kernels of quantized layers: `reference` against float64, `onednn` and `cuda` against it."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import os
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iec.artifact.calibration import LayerPart, QuantizedLayer, StepTable, WeightCodes
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


def bias_at(module: nn.Module, layer: QuantizedLayer, step: int) -> Tensor | None:
    bias = module.bias if layer.bias is None else layer.bias[step] if layer.bias.dim() == 2 else layer.bias
    return None if bias is None else bias.detach()


def moved_at(op: Any, step: int) -> list[Tensor | None]:
    """k d_w, times the gain, of each part of a layer of onednn."""
    return [None if part.moved is None else part.moved[step] for part in op.parts]


def emulate(
    module: nn.Module, layer: QuantizedLayer, x: Tensor, step: int, moved: list[Any] | None = None
) -> tuple[Tensor, Tensor]:
    """(the layer in float64 written out, Σ (|x̂| + |z d|) (|ŵ| + |moved|) + |b|); moved: (out,) or None for each part.

    ŵ has the gain of its part and step in it.
    """
    axis = -1 if layer.kind == "linear" else -len(module.weight.shape) + 1
    xs, ws, extra, zeros = [], [], [], []
    for part in layer.parts:
        xs.append(rounded64(x.narrow(axis, part.begin, part.end - part.begin), part.act, step))
        zeros += [abs(float(part.act.zero[step]) * float(part.act.scale[step]))] * (part.end - part.begin)
        form = (-1, *(1,) * (part.weight.codes.dim() - 1))
        zero, scale = part.weight.zero.reshape(form).double(), part.weight.scale.reshape(form).double()
        gain = torch.ones(1) if part.gain is None else part.gain[step]
        ws.append((part.weight.codes.double() - zero) * scale * gain.double().reshape(form))
        more = None if moved is None else moved[layer.parts.index(part)]
        extra.append(ws[-1].abs() + (0 if more is None else more.double().abs().reshape(form)))
    xhat, what, size = torch.cat(xs, axis), torch.cat(ws, 1), torch.cat(extra, 1)
    bias = bias_at(module, layer, step)
    bias = None if bias is None else bias.double()
    results = []
    offset = torch.tensor(zeros, dtype=torch.float64)
    for a, b, c in ((xhat, what, bias), (xhat.abs(), size, None if bias is None else bias.abs())):
        more = torch.zeros_like(offset) if a is xhat else offset
        if layer.kind == "linear":
            results.append(F.linear(a + more, b, c))
            continue
        conv = F.conv2d if layer.kind == "conv2d" else F.conv1d
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        a = F.pad(a, module._reversed_padding_repeated_twice, mode)  # right for "same" and "valid" too
        a = a + more.reshape(-1, *(1,) * (len(module.weight.shape) - 2))  # codes have a border of zero points
        results.append(conv(a, b, c, module.stride, 0, module.dilation, module.groups))
    return results[0], results[1]


def distance(found: Tensor, exact: Tensor, size: Tensor) -> float:
    assert found.shape == exact.shape
    return float(((found.double() - exact).abs() / (size + 1e-30)).max()) if exact.numel() else 0.0


def compensated(layer: QuantizedLayer, rng: torch.Generator, pick: random.Random) -> QuantizedLayer:
    """Perhaps with gains, of any sign, in some of its parts, and perhaps with a bias of its own, perhaps one per step."""
    steps, outputs = len(layer.parts[0].act.scale), layer.parts[0].weight.codes.shape[0]

    def gain() -> Tensor:
        table = 1 + 0.3 * torch.randn(steps, outputs, generator=rng)
        table[:, 0] *= pick.choice([1, 0, -1, 1e-4, 50])
        return table

    parts = tuple(dataclasses.replace(part, gain=gain()) if pick.random() < 0.5 else part for part in layer.parts)
    shape = pick.choice([None, (outputs,), (steps, outputs), (steps, outputs)])
    return QuantizedLayer(layer.kind, parts, None if shape is None else torch.randn(shape, generator=rng))


def case(seed: int) -> tuple[nn.Module, QuantizedLayer, Tensor]:
    """A random layer, calibration and input; every second layer is compensated."""
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
    return module, compensated(layer, rng, pick) if seed % 2 else layer, x


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
    """The codes are equal. What remains is float32's rounding: 1e-6 of Σ (|x̂| + |z d|) (|ŵ| + |k d_w|) + |b|."""
    module, layer, x = case(seed)
    op, reference = onednn.build(module, layer), KERNELS["reference"].build(module, layer)
    for step in (0, 1):
        exact, size = emulate(module, layer, x, step, moved_at(op, step))
        found = op(x, step)
        assert found.dtype == x.dtype
        assert distance(found, exact, size) < 1e-6
        assert distance(reference(x, step), found.double(), size) < 2e-6


@needs_onednn
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("zero", [16384, -16384, 7000])
@torch.no_grad()
def test_sums_do_not_wrap(zero: int, gained: bool) -> None:
    """(255 + 16384)·127·2304 is beyond int32."""
    rng = torch.Generator().manual_seed(0)
    for module, shape in (
        (nn.Conv2d(256, 4, 3, padding=1), (2, 256, 5, 5)),
        (nn.Conv1d(1024, 4, 3, padding=1), (2, 1024, 5)),
        (nn.Linear(2304, 4), (2, 3, 2304)),
    ):
        layer = layer_for(module, rng, style="positive", zeros=(zero, 5))
        if gained:
            part = dataclasses.replace(layer.parts[0], gain=torch.randn(2, 4, generator=rng))
            layer = dataclasses.replace(layer, parts=(part,))
        x = torch.rand(shape, generator=rng) * 5 - zero * 0.021
        op = onednn.build(module, layer)
        for step in (0, 1):
            exact, size = emulate(module, layer, x, step, moved_at(op, step))
            assert distance(op(x, step), exact, size) < 1e-6
            codes = op.quantize(x, step)
            total = torch.ones_like(op.from_codes(codes, step))
            op.from_codes(codes, step, total)
            assert distance(total.reshape(exact.shape), exact + 1, size + 1) < 1e-6


# --- onednn in two halves ---------------------------------------------------------------------------------------------


@needs_onednn
@pytest.mark.parametrize("seed", range(30))
@torch.no_grad()
def test_codes_and_sums(seed: int) -> None:
    """`from_codes(quantize(x))` is the op; it adds to a given tensor in place, with or without the bias."""
    module, layer, x = case(seed)
    op = onednn.build(module, layer)
    moved = moved_at(op, 1)
    codes = op.quantize(x, 1)
    assert all(part.dtype == torch.uint8 for part in codes)
    if layer.kind != "linear":
        assert all(part.is_contiguous(memory_format=torch.channels_last) for part in codes)
    found = op.from_codes(codes, 1)
    assert torch.equal(found.reshape(op(x, 1).shape), op(x, 1))
    exact, size = emulate(module, layer, x, 1, moved)
    total = torch.randn_like(found)
    before = total.clone().reshape(exact.shape)
    back = op.from_codes(codes, 1, total)
    assert back.data_ptr() == total.data_ptr()
    assert distance(total.reshape(exact.shape), exact + before, size + before.abs()) < 1e-6
    bias = bias_at(module, layer, 1)
    if bias is not None:
        bias = bias.reshape(-1, *(1,) * (module.weight.dim() - 2))
        bare = op.from_codes(codes, 1, bias=False).reshape(exact.shape)
        assert distance(bare + bias, exact, size) < 1e-6


@needs_onednn
@torch.no_grad()
def test_a_wrong_accumulator_is_refused() -> None:
    module, rng = nn.Conv2d(4, 6, 1), torch.Generator().manual_seed(0)
    op = onednn.build(module, layer_for(module, rng))
    codes = op.quantize(torch.randn(2, 4, 5, 5), 0)
    for total in (torch.zeros(2, 6, 5, 5), torch.zeros(2, 6, 5, 5, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="accumulate"):
            op.from_codes(codes, 0, total)


@pytest.mark.parametrize("name", ["reference", pytest.param("onednn", marks=needs_onednn), "cuda"])
class TestEveryKernel:
    def build(self, name: str, module: nn.Module, **options: Any) -> tuple[Any, QuantizedLayer]:
        layer = layer_for(module, torch.Generator().manual_seed(0), **options)
        return KERNELS[name].build(module, layer), layer

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    @pytest.mark.parametrize("style", ["symmetric", "asymmetric"])
    @torch.no_grad()
    def test_keeps_the_dtype(self, name: str, dtype: torch.dtype, style: str) -> None:
        digits = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 2e-6}[dtype]
        for module, x in (
            (nn.Conv2d(8, 6, 3, padding=1), torch.randn(2, 8, 5, 5)),
            (nn.Linear(8, 6), torch.randn(3, 8)),
        ):
            op, layer = self.build(name, module, style=style)
            x = x.to(dtype)
            exact, size = emulate(module, layer, x.float(), 0)
            assert op(x, 0).dtype == dtype
            assert distance(op(x, 0), exact, size) < digits

    @torch.no_grad()
    def test_uses_the_scales_of_the_step(self, name: str) -> None:
        module = nn.Conv2d(4, 4, 3)
        op, layer = self.build(name, module, scales=(0.02, 0.2, 0.01), zeros=(3, 100, 255))
        x = torch.randn(2, 4, 6, 6)
        for step in (2, 0, 1, 1, 0):  # in any order, as often as one likes
            exact, size = emulate(module, layer, x, step)
            assert distance(op(x, step), exact, size) < 2e-6
        for step in (3, -1):
            with pytest.raises(IndexError, match="3 steps"):
                op(x, step)

    @torch.no_grad()
    def test_no_samples(self, name: str) -> None:
        for module, shape in (
            (nn.Conv2d(4, 6, 3, stride=2, padding=1), (0, 4, 7, 9)),
            (nn.Conv1d(4, 6, 3, padding="same"), (0, 4, 9)),
            (nn.Linear(4, 6), (0, 4)),
        ):
            x = torch.zeros(shape)
            assert self.build(name, module)[0](x, 0).shape == module(x).shape

    @torch.no_grad()
    def test_without_a_batch_dimension(self, name: str) -> None:
        for module, shape in ((nn.Conv2d(4, 6, 3), (4, 7, 9)), (nn.Conv1d(4, 6, 3), (4, 9)), (nn.Linear(4, 6), (4,))):
            x = torch.randn(shape)
            op = self.build(name, module)[0]
            assert op(x, 0).shape == module(x).shape
            torch.testing.assert_close(op(x, 0), op(x.unsqueeze(0), 0).squeeze(0))

    @torch.no_grad()
    def test_refuses_other_inputs(self, name: str) -> None:
        op = self.build(name, nn.Conv2d(4, 6, 3))[0]
        with pytest.raises(ValueError, match=r"\(N, 4, H, W\)"):
            op(torch.randn(2, 5, 7, 7), 0)
        with pytest.raises(TypeError, match=r"int64"):
            op(torch.zeros(2, 4, 7, 7, dtype=torch.int64), 0)
        with pytest.raises(ValueError, match=r"\(…, 4\)"):
            self.build(name, nn.Linear(4, 6))[0](torch.randn(2, 5), 0)

    def test_refuses_layers_that_do_not_fit(self, name: str) -> None:
        layer = layer_for(nn.Conv2d(4, 6, 3), torch.Generator().manual_seed(0))
        for module, kind, said in (
            (nn.Conv2d(8, 6, 3), ValueError, "tile its 8"),
            (nn.Conv2d(4, 6, 1), ValueError, "weight codes"),
            (nn.Linear(4, 6), ValueError, "conv2d where the model has a linear"),
            (nn.ConvTranspose2d(4, 6, 3), TypeError, "ConvTranspose2d"),
        ):
            with pytest.raises(kind, match=said):
                KERNELS[name].build(module, layer)
        gained = dataclasses.replace(layer.parts[0], gain=torch.ones(3, 6))  # of three steps
        for other, said in (
            (dataclasses.replace(layer, parts=(gained,)), r"gain of a part is \(3, 6\); expected \(2, 6\)"),
            (
                dataclasses.replace(layer, bias=torch.ones(3, 6)),
                r"bias of a layer is \(3, 6\); expected \(6,\), or \(2, 6\)",
            ),
            (dataclasses.replace(layer, bias=torch.ones(2)), r"bias of a layer is \(2,\)"),
        ):
            with pytest.raises(ValueError, match=said):
                KERNELS[name].build(nn.Conv2d(4, 6, 3), other)

    @torch.no_grad()
    def test_gains_and_biases_are_those_of_the_step(self, name: str) -> None:
        """A gain scales what its part gives, not the bias; what is not compensated is 1 and 0, to the bit."""
        module, rng = nn.Conv2d(4, 6, 3, padding=1), torch.Generator().manual_seed(3)
        layer = layer_for(module, rng, cuts=(3,))
        gain, bias = torch.randn(2, 6, generator=rng), torch.randn(2, 6, generator=rng)
        x = torch.randn(2, 4, 5, 5, generator=rng)

        def op(of: QuantizedLayer) -> Any:
            return KERNELS[name].build(module, of)

        def with_gains(*gains: Tensor | None) -> tuple[LayerPart, ...]:
            return tuple(dataclasses.replace(part, gain=g) for part, g in zip(layer.parts, gains, strict=True))

        nought, none = torch.zeros(2, 6), torch.zeros(6)
        ones = dataclasses.replace(layer, parts=with_gains(torch.ones(2, 6), torch.ones(2, 6)))
        first = op(QuantizedLayer("conv2d", with_gains(None, nought), none))
        second = op(QuantizedLayer("conv2d", with_gains(nought, None), none))
        made = op(QuantizedLayer("conv2d", with_gains(gain, None), bias))
        for step in (1, 0):
            assert torch.equal(op(ones)(x, step), op(layer)(x, step))
            expected = first(x, step) * gain[step][:, None, None] + second(x, step) + bias[step][:, None, None]
            torch.testing.assert_close(made(x, step), expected, atol=1e-4, rtol=1e-5)
            own = op(dataclasses.replace(layer, bias=torch.stack([module.bias.detach()] * 2)))
            assert torch.equal(own(x, step), op(layer)(x, step))

    def test_gradients_flow_or_are_refused(self, name: str) -> None:
        op = self.build(name, nn.Linear(4, 6))[0]
        x = torch.randn(3, 4, requires_grad=True)
        if name == "reference":
            op(x, 0).sum().backward()
            assert x.grad is not None and x.grad.abs().sum() > 0
            return
        with pytest.raises(RuntimeError, match="reference"):
            op(x, 0)
        with torch.no_grad():
            assert not op(x, 0).requires_grad

    @torch.no_grad()
    def test_uses_the_reconstructed_bias_and_not_the_module(self, name: str) -> None:
        module, x = nn.Linear(4, 6), torch.randn(3, 4)
        layer = layer_for(module, torch.Generator().manual_seed(0))
        learned = QuantizedLayer("linear", layer.parts, torch.arange(6.0))
        plain, op = KERNELS[name].build(module, layer), KERNELS[name].build(module, learned)
        expected = op(x, 0)
        torch.testing.assert_close(expected, plain(x, 0) - module.bias + torch.arange(6.0))
        module.weight.zero_()
        module.bias.zero_()
        assert torch.equal(op(x, 0), expected)


@needs_onednn
def test_may_be_part_of_a_deep_copy() -> None:
    module, x = nn.Linear(4, 6), torch.randn(3, 4)
    op = onednn.build(module, layer_for(module, torch.Generator().manual_seed(0)))
    assert torch.equal(copy.deepcopy(op)(x, 0), op(x, 0))


@needs_onednn
@pytest.mark.parametrize("style", ["symmetric", "asymmetric"])
def test_no_float_weight_is_kept(style: str) -> None:
    """Neither floats nor codes: oneDNN's packed int8 is all that is as large as the weight."""
    module = nn.Conv2d(64, 64, 3)
    op = onednn.build(module, layer_for(module, torch.Generator().manual_seed(0), style=style))
    held = [value for part in op.parts for value in vars(part).values() if isinstance(value, Tensor)]
    held += [value for value in vars(op).values() if isinstance(value, Tensor)]
    assert [value.dtype for value in held if value.numel() >= 64 * 9] == [torch.int8] * (1 + (style == "asymmetric"))
    assert sum(value.numel() * value.element_size() for value in held) < 1.1 * 64 * 64 * 9


@needs_onednn
@torch.no_grad()
def test_offsets_are_kept_where_they_are_small() -> None:
    """Biases with zero points folded in: computed once a step, but not kept where they would outweigh the weight."""
    rng = torch.Generator().manual_seed(0)
    for module, x, kept in (
        (nn.Conv2d(8, 6, 3), torch.randn(2, 8, 5, 5), True),  # 72 bytes an output, and 4 a step
        (nn.Linear(8, 6), torch.randn(3, 8), False),
    ):
        zeros = tuple(range(12))
        layer = layer_for(module, rng, zeros=zeros, scales=tuple(0.02 + 0.01 * z for z in zeros))
        layer = dataclasses.replace(layer, bias=torch.randn(12, 6, generator=rng))
        op, fresh = onednn.build(module, layer), onednn.build(module, layer)
        first = [op(x, step) for step in zeros]
        held = [None if of is None else of[0] for of in op.kept]
        assert all((of is not None) == kept for of in held)
        for step in reversed(zeros):
            assert torch.equal(op(x, step), first[step]) and torch.equal(fresh(x, step), first[step])
            assert held[step] is (op.kept[step][0] if kept else None)
            codes = op.quantize(x, step)
            bare = op.from_codes(codes, step, bias=False)
            bias = layer.bias[step].reshape(-1, *(1,) * (module.weight.dim() - 2))
            torch.testing.assert_close(bare + bias, first[step].reshape(bare.shape), atol=1e-4, rtol=1e-5)


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_auto_takes_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(onednn), "why_not", lambda self, device: None)
    assert choose("auto", "cpu").name == "onednn"
    assert choose("reference", "cpu").name == "reference"
    assert choose("auto", torch.device("meta")).name == "reference"
    monkeypatch.setattr(type(onednn), "why_not", lambda self, device: "it is Sunday")
    assert choose("auto", "cpu").name == "reference"


def test_a_named_kernel_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(onednn), "why_not", lambda self, device: "it is Sunday")
    with pytest.raises(RuntimeError, match=r"'onednn' cannot run here: it is Sunday; use kernel='reference'"):
        choose("onednn", "cpu")
    with pytest.raises(RuntimeError, match=r"CUDA devices and the model is on cpu; use kernel='reference'"):
        choose("cuda", "cpu")
    with pytest.raises(ValueError, match="'openvino'; expected 'auto' or one of 'reference', 'onednn', 'cuda'"):
        choose("openvino", "cpu")


def test_onednn_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from iec.quant.kernels import onednn as file

    assert "CPU" in str(onednn.why_not(torch.device("cuda")))
    file._missing.cache_clear()
    monkeypatch.setitem(file.NEEDED, "qconv_prepack.default", "weight")
    assert "another torch.ops.onednn.qconv_prepack" in str(onednn.why_not(CPU))
    file._missing.cache_clear()
    monkeypatch.setitem(file.NEEDED, "qconv9d_prepack.default", "weight")
    monkeypatch.delitem(file.NEEDED, "qconv_prepack.default")
    assert "has no torch.ops.onednn.qconv9d_prepack" in str(onednn.why_not(CPU))
    file._missing.cache_clear()


@needs_onednn
def test_a_processor_that_saturates_is_refused() -> None:
    """oneDNN without VNNI: 255·127 + 255·127 is 32767 there."""
    code = (
        "import torch; from iec.quant.kernels import choose; print(choose('auto', 'cpu').name, choose('onednn', 'cpu'))"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "no VNNI" in done.stderr and "use kernel='reference'" in done.stderr


# --- cuda -------------------------------------------------------------------------------------------------------------


def check_cuda(op: Any, module: nn.Module, layer: QuantizedLayer, x: Tensor) -> None:
    for step in (0, 1):
        moved = [part.moved.cpu() * part.scales[step].cpu() for part in op.parts]
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


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton and TRITON_INTERPRET=1",
)
@pytest.mark.parametrize("seed", range(60))
@torch.no_grad()
def test_the_triton_kernel_interpreted(seed: int) -> None:
    module, layer, x = case(seed)
    op = KERNELS["cuda"].build(module, layer)
    op.triton = True
    check_cuda(op, module, layer, x)
