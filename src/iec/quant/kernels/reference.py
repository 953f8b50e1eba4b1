"""The oracle: inputs and weights rounded to their codes and back, the layer itself in floating point.

x̂ = (q(x) − z_t) d_t per step t, ŵ = (q_w − z_w) d_w per output channel, y = conv(x̂, ŵ) + b_t. A part's gain multiplies
its ŵ, which is the same as its output. Runs on every device and carries gradients (straight through the rounding). It is no
faster than the layer that it replaces.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iec.artifact.calibration import QuantizedLayer
from iec.core import affine
from iec.quant.kernels.geometry import Geometry, Steps, biases, centred, describe


class ReferenceLayer:
    """`op(x, step)`: what the module returns for x when input and weight are quantized; computed in float32 at least."""

    def __init__(self, module: nn.Module, layer: QuantizedLayer) -> None:
        self.geometry: Geometry = describe(module, layer)
        device = module.weight.device
        weights = []
        for part in layer.parts:
            scale = part.weight.scale.reshape(-1, *(1,) * (part.weight.codes.dim() - 1))
            weights.append((centred(part) * scale.float()).to(device))
        self.weight = torch.cat(weights, dim=1)  # (out, in/groups, *kernel)
        if self.geometry.kind == "conv1d":
            self.weight = self.weight.unsqueeze(2)
        self.biases = biases(module, layer)
        self.gains = [None if part.gain is None else part.gain.detach().to(device) for part in layer.parts]
        self.spans = [(part.begin, part.end) for part in layer.parts]
        self.bits = [part.act.bits for part in layer.parts]
        self.steps = [Steps(part) for part in layer.parts]

    def __call__(self, x: Tensor, step: int) -> Tensor:
        """Args: x as the module takes it (any floating dtype), step 0..T−1. Returns the module's shape, dtype of x."""
        at = self.geometry
        at.check(x)
        for steps in self.steps:
            steps.check(step)
        wide = x if x.dtype == torch.float64 else x.float()
        weight, bias = self._weight(step, wide.dtype), self.biases[step]
        bias = None if bias is None else bias.to(wide.dtype)
        if at.kind == "linear":
            return F.linear(self._rounded(wide, step, -1), weight, bias).to(x.dtype)
        rounded = self._rounded(at.image(wide), step, 1)
        y = F.conv2d(rounded, weight, bias, at.stride, at.padding, at.dilation, at.groups)
        y = y[:, :, at.crop[0] :, at.crop[1] :]
        return at.restore(y, x).to(x.dtype)

    def _weight(self, step: int, dtype: torch.dtype) -> Tensor:
        weight = self.weight.to(dtype)
        if all(gain is None for gain in self.gains):
            return weight
        parts = []
        for (begin, end), gain in zip(self.spans, self.gains, strict=True):
            piece = weight if len(self.spans) == 1 else weight[:, begin:end]
            form = (-1, *(1,) * (weight.dim() - 1))
            parts.append(piece if gain is None else piece * gain[step].to(dtype).reshape(form))
        return torch.cat(parts, dim=1)

    def _rounded(self, x: Tensor, step: int, dim: int) -> Tensor:
        parts = []
        for (begin, end), bits, steps in zip(self.spans, self.bits, self.steps, strict=True):
            scale, zero = x.new_tensor(steps.scale[step]), x.new_tensor(float(steps.zero[step]))
            parts.append(affine.fake_quantize(x.narrow(dim, begin, end - begin), scale, zero, bits))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class Reference:
    """The kernel named "reference"."""

    name = "reference"

    def why_not(self, device: torch.device) -> str | None:
        """None: it runs everywhere."""
        return None

    def build(self, module: nn.Module, layer: QuantizedLayer) -> ReferenceLayer:
        """Dequantise the weight once. Raises TypeError or ValueError where `layer` does not fit `module`."""
        return ReferenceLayer(module, layer)
