"""What reconstruction learns of one layer: which way each weight is rounded, the scales of what comes in, a bias.

Gains, where a layer has them, stay what they are.

The learned rounding is AdaRound's (Nagel et al., 2020): w ≈ (clamp(floor(w/d) + h(α) + z, 0, L−1) − z)·d with
h(α) = clip(1.2·sigmoid(α) − 0.1, 0, 1), a number between rounding down and up that ends as 0 or 1 (METHOD 5.1).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iec.artifact.calibration import QuantizedLayer, StepTable, WeightCodes
from iec.quant.observe import dequantized

LOW, HIGH = -0.1, 1.1  # h's range before it is clipped


def rectified(alpha: Tensor) -> Tensor:
    """h(α) in [0, 1], elementwise; exactly 0 from α ≈ −2.4 down and exactly 1 from 2.4 up."""
    return (torch.sigmoid(alpha) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def inverse(fraction: Tensor) -> Tensor:
    """The α whose h(α) is `fraction`, from [0, 1)."""
    return -torch.log((HIGH - LOW) / (fraction - LOW) - 1.0)


def undecided(h: Tensor, temperature: float) -> Tensor:
    """AdaRound's regulariser Σ 1 − |2h − 1|^β: 0 where every h is 0 or 1; a high β looks only at those near to it."""
    return (1.0 - (2.0 * h - 1.0).abs().pow(temperature)).sum()


class _RowQuantize(torch.autograd.Function):
    """`core.affine.fake_quantize` with its gradients, in a third of its passes: activations are what training waits for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, last: int) -> Tensor:
        u = x / scale
        zero = torch.round(zero)
        raw = torch.round(u).add_(zero)
        codes = raw.clamp(0, last)
        inside = codes == raw
        codes.sub_(zero)
        error = codes - u * inside if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(inside, scale, error)
        return codes.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        inside, scale, error = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx = grad * inside if needs[0] else None
        ds = _summed(grad * error, scale) if needs[1] else None
        dz = _summed(grad * ~inside, scale) * -scale if needs[2] else None
        return dx, ds, dz, None


def _summed(x: Tensor, like: Tensor) -> Tensor:
    return x.sum_to_size(like.shape)


def row_quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """x̂ with one (scale, zero point) per row of the batch: x (B·k, …), scale and zero (B,). Differentiable in all three."""
    shape = (-1, *[1] * (x.dim() - 1))
    scale, zero = (of_rows(values, x.shape[0]).view(shape) for values in (scale, zero))
    out: Any = _RowQuantize.apply(x, scale, zero, 2**bits - 1)
    return out


def of_rows(values: Tensor, count: int) -> Tensor:
    """`values` (B, …) of tuples as those of `count` = B·k rows (B·k, …). Raises RuntimeError for another number of rows."""
    factor, left = divmod(count, len(values))
    if left:
        raise RuntimeError(
            f"an activation has {count} rows in a batch of {len(values)} tuples, so its rows have no step of their own; "
            "leave the layer out, by QuantConfig(layers=...)"
        )
    return values if factor == 1 else values.repeat_interleave(factor, dim=0)


class StepScales(nn.Module):
    """A `StepTable` whose scales and zero points can be learned: `scale`, `zero` float32 (T,)."""

    def __init__(self, table: StepTable) -> None:
        super().__init__()
        self.bits = table.bits
        self.scale = nn.Parameter(table.scale.clone(), requires_grad=False)
        self.zero = nn.Parameter(table.zero.float(), requires_grad=False)
        self.register_buffer("least", table.scale * 0.1)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        """`x` (B·k, …) rounded with the scales of `steps` (B,)."""
        return row_quantize(x, self.scale[steps], self.zero[steps], self.bits)

    @torch.no_grad()
    def confine(self) -> None:
        """Keep the scales well above zero."""
        self.scale.copy_(torch.maximum(self.scale, self.least))

    def table(self) -> StepTable:
        """As it stands, zero points rounded."""
        return StepTable(
            self.scale.detach().cpu().clone(), torch.round(self.zero.detach()).to(torch.int16).cpu(), self.bits
        )


class Rounding(nn.Module):
    """The weight of one part of a layer, rounded down or up as `alpha` says; it starts at the weight itself.

    Args:
        weight: in floating point, (out, in/groups, *kernel).
        codes: as it is rounded now; its scales and zero points stay what they are.
    """

    def __init__(self, weight: Tensor, codes: WeightCodes) -> None:
        super().__init__()
        shape = (-1, *[1] * (weight.dim() - 1))
        self.bits = codes.bits
        self.register_buffer("scale", codes.scale.to(weight.device).view(shape))
        self.register_buffer("zero", codes.zero.to(weight.device).float().view(shape))
        u = weight.detach().float() / self.scale
        self.alpha = nn.Parameter(inverse(u - torch.floor(u)))
        self.weight = nn.Parameter(weight.detach().float().clone(), requires_grad=False)
        self.codes = codes

    def soft(self) -> tuple[Tensor, Tensor]:
        """The weight as it is being rounded, and h(α)."""
        h = rectified(self.alpha)
        u = self.weight / self.scale
        down = torch.floor(u.detach()) if not self.weight.requires_grad else u + (torch.floor(u) - u).detach()
        codes = (down + h + self.zero).clamp(0, 2**self.bits - 1)
        return (codes - self.zero) * self.scale, h

    @torch.no_grad()
    def hard(self) -> WeightCodes:
        """The codes with every weight rounded down (α < 0) or up."""
        codes = torch.floor(self.weight / self.scale) + (self.alpha >= 0).float() + self.zero
        codes = codes.clamp(0, 2**self.bits - 1).to(torch.uint8).cpu()
        return WeightCodes(codes, self.codes.scale, self.codes.zero, self.bits)


class SimulatedLayer(nn.Module):
    """A quantized layer computed in floating point for rows of different steps: as it stands, or as it is being learned.

    `learning` chooses; `regularity` is then the list of h(α) of the last forward.
    """

    def __init__(self, module: nn.Module, layer: QuantizedLayer) -> None:
        super().__init__()
        self.kind, self.learning = layer.kind, False
        self.held = [module]  # in a list: the layer is not a part of this module
        self.regularity: list[Tensor] = []
        self.take(layer)

    @property
    def module(self) -> Any:
        """The layer's module."""
        return self.held[0]

    @property
    def channels(self) -> int:
        """Dimension of the input channels."""
        return -1 if self.kind == "linear" else 1

    def take(self, layer: QuantizedLayer) -> None:
        """Be `layer` from now on; what was learned and not taken is forgotten."""
        self.layer, self.learning = layer, False
        self.roundings: nn.ModuleList = nn.ModuleList()
        device = self.module.weight.device
        self.tables = nn.ModuleList(StepScales(part.act).to(device) for part in layer.parts)
        weights = [dequantized(part.weight).to(device) for part in layer.parts]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights, 1)
        own = self.module.bias
        bias = layer.bias.to(device) if layer.bias is not None else own.detach().float() if own is not None else None
        self.weight = weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight
        self.bias = nn.Parameter(bias.clone(), requires_grad=False) if bias is not None else None  # (out,) or (T, out)
        self.gains = [None if part.gain is None else part.gain.detach().to(device) for part in layer.parts]

    def learn(self) -> None:
        """Round softly from now on, beginning at the floating-point weight."""
        self.learning = True
        weight = self.module.weight.detach().float()
        for part in self.layer.parts:
            piece = weight if len(self.layer.parts) == 1 else weight[:, part.begin : part.end]
            self.roundings.append(Rounding(piece, part.weight))

    def learned(self) -> QuantizedLayer:
        """What was learned, rounded for good."""
        parts = tuple(
            dataclasses.replace(part, weight=rounding.hard(), act=table.table())  # type: ignore[operator]
            for part, rounding, table in zip(self.layer.parts, self.roundings, self.tables, strict=True)
        )
        changed = self.bias is not None and self.bias.requires_grad
        bias = self.bias.detach().cpu().clone() if changed else self.layer.bias  # type: ignore[union-attr]
        return QuantizedLayer(self.kind, parts, bias)

    def forward(self, x: Tensor, steps: Tensor, drop: tuple[float, torch.Generator] | None = None) -> Tensor:
        """The layer's output for `x` (B·k, …), whose rows are at `steps` (B,).

        drop: while it learns, leave each element of `x` as it is with that probability (QDrop).
        """
        pieces = []
        for part, table in zip(self.layer.parts, self.tables, strict=True):
            piece = x.narrow(self.channels, part.begin, part.end - part.begin)
            rounded = table(piece, steps)
            if self.learning and drop is not None and drop[0] > 0.0:
                # drawn on the CPU, so that the draw does not depend on the device
                whole = torch.rand(piece.shape, generator=drop[1]).to(x.device) < drop[0]
                rounded = torch.where(whole, piece, rounded)
            pieces.append(rounded)
        weight = self.weight
        if self.learning:
            soft = [rounding.soft() for rounding in self.roundings]  # type: ignore[operator]
            self.regularity = [h for _, h in soft]
            weight = soft[0][0] if len(soft) == 1 else torch.cat([w for w, _ in soft], 1)
        per_step = self.bias is not None and self.bias.dim() == 2
        bias = None if per_step else self.bias
        if all(gain is None for gain in self.gains):
            y = self._apply_to(pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.channels), weight, bias)
        else:  # the rows of a batch have different gains, so these go on the outputs of the parts
            y = self._gained(pieces, weight, steps)
            y = y if bias is None else y + self._of_outputs(bias[None], y)
        return y + self._of_outputs(self.bias[steps], y) if per_step else y  # type: ignore[index]

    def _gained(self, pieces: list[Tensor], weight: Tensor, steps: Tensor) -> Tensor:
        """The layer without its bias: the sum of what the parts give, each times its gain of the row's step."""
        total: Any = 0.0
        for part, piece, gain in zip(self.layer.parts, pieces, self.gains, strict=True):
            y = self._apply_to(piece, weight if len(pieces) == 1 else weight[:, part.begin : part.end], None)
            total = total + (y if gain is None else y * self._of_outputs(gain[steps], y))
        return total

    def _of_outputs(self, values: Tensor, y: Tensor) -> Tensor:
        """values (B, out), or (1, out) for all rows, so that they meet the output channels of y (B·k, …)."""
        values = values if len(values) == 1 else of_rows(values, y.shape[0])
        count, outputs = values.shape
        between = [1] * (y.dim() - 2)
        return values.view(count, *between, outputs) if self.kind == "linear" else values.view(count, outputs, *between)

    def _apply_to(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        module = self.module
        padding = module.padding
        if module.padding_mode != "zeros":
            x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
        convolve = F.conv2d if self.kind == "conv2d" else F.conv1d
        return convolve(x, weight, bias, module.stride, padding, module.dilation, module.groups)


def temperature(progress: float, warm_up: float, begin: float = 20.0, end: float = 2.0) -> float:
    """β of the regulariser after that share of the iterations, once warmed up: down from `begin` to `end` on a cosine."""
    share = min(max((progress - warm_up) / max(1.0 - warm_up, 1e-9), 0.0), 1.0)
    return end + 0.5 * (begin - end) * (1.0 + math.cos(math.pi * share))


def cosine(progress: float) -> float:
    """The factor of the learning rates after that share of the iterations: from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))
