"""Integer convolutions and products on CUDA devices. NOT YET RUN ON A GPU.

What has been run: this file on the CPU, where `torch._int_mm` exists too, against `reference`; the Triton kernel in Triton's
interpreter, against the same (the tests do that with Triton and TRITON_INTERPRET=1); and Triton 3.7's compiler for compute
capability 8.0 and 9.0 (it makes int8 tensor core instructions of it). That it runs on a device, and how fast, remains to be
seen.

Linear layers and 1×1 convolutions are one `torch._int_mm`; other convolutions are an implicit matrix product in Triton
(`triton_conv`) or, without Triton, a matrix product of the windows written out.

Codes travel as int8, a = q_x − 128, and weights as int8 w = q_w − z_w − k with the k[o] of `geometry.fit_int8`. With z the
step's zero point cut to 0..255 and padding by a = z − 128, whose value is 0,

    y[o] = d_x d_w[o] (Σ a w + (128 − z) Σ w + k[o] (Σ a + (128 − z) K)) + b[o],      K: the number of terms,

where d_w has the step's gain in it, if the part has one, and the first two terms are summed in int32. What is cut off a zero
point beyond 0..255 is a constant image, whose convolution is added.

The bound is that of `onednn`: 1e-6 of Σ |x̂| (|ŵ| + |k d_w|) + |b|, given equal codes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iec.artifact.calibration import LayerPart, QuantizedLayer
from iec.quant.kernels.geometry import Geometry, Steps, biases, centred, describe, fit_int8, per_step

OLDEST = (8, 0)  # compute capability; Triton 3.7 does not compile int8 products for 7.5


def int_product(a: Tensor, weight: Tensor) -> Tensor:
    """a (M, K) · weight (O, K)ᵀ in int32 (M, O), for int8 of any shape; weight's K may be padded with zeros.

    `torch._int_mm` on CUDA needs M > 16 and K, O multiples of 8: what is missing is padded with zeros and cut off.
    """
    rows, outputs = a.shape[0], weight.shape[0]
    size = -(-weight.shape[1] // 8) * 8
    a = F.pad(a, (0, size - a.shape[1], 0, max(0, 17 - rows)))
    weight = F.pad(weight, (0, size - weight.shape[1], 0, -outputs % 8))
    return torch._int_mm(a.contiguous(), weight.t())[:rows, :outputs]


def windows(a: Tensor, at: Geometry, beyond: int) -> Tensor:
    """The windows of an image a (N, H, W, C) written out: (N, h, w, ky, kx, C), `beyond` where it is padded."""
    a = F.pad(a, (0, 0, at.padding[1], at.padding[1], at.padding[0], at.padding[0]), value=beyond)
    rows, columns = at.uncropped(a.shape[1] - 2 * at.padding[0], a.shape[2] - 2 * at.padding[1])
    n, y, x, c = a.contiguous().stride()
    shape = (a.shape[0], rows, columns, *at.kernel, a.shape[3])
    steps = (n, y * at.stride[0], x * at.stride[1], y * at.dilation[0], x * at.dilation[1], c)
    return a.contiguous().as_strided(shape, steps)


@functools.cache
def _triton() -> Callable[..., Any] | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from iec.quant.kernels import triton_conv

    return triton_conv.convolve


class CudaPart:
    """One range of input channels: its int8 weight (O, K) with K = (ky, kx, channel of the group), and its steps."""

    def __init__(self, at: Geometry, part: LayerPart, device: torch.device) -> None:
        self.at, self.begin, self.end = at, part.begin, part.end
        self.steps = Steps(part)
        self.act_scale = part.act.scale.float().to(device)  # on the device: x / d is a true division by a tensor only
        whole = centred(part).to(device)
        weight, self.moved = fit_int8(whole)
        self.has_moved = bool(self.moved.any())
        weight = weight.reshape(at.outputs, weight.shape[1], *at.kernel).permute(0, 2, 3, 1)
        self.size = weight[0].numel()
        self.weight = weight.reshape(at.outputs, -1).contiguous()
        self.sums = self.weight.sum(1, dtype=torch.int32)
        self.scale = part.weight.scale.float().to(device)
        self.scales = per_step(part, self.scale.double())  # times the gain
        self.taps: Tensor | None = None  # (O, 1, ky, kx), the sums over the channels, where a step needs them
        if any(not 0 <= zero <= 255 for zero in self.steps.zero):
            taps = whole.reshape(at.outputs, whole.shape[1], *at.kernel).sum(1, keepdim=True)
            self.taps = taps.double()

    def codes(self, x: Tensor, step: int) -> Tensor:
        """a = q − 128 as int8 (…, C') contiguous for x (…, C), float32, channels last."""
        x = x[..., self.begin : self.end] / self.act_scale[step]
        x = x.round_().add_(self.steps.zero[step]).clamp_(0, self.steps.top)
        return x.sub_(128).to(torch.int8).contiguous()

    def product(self, a: Tensor, step: int, bias: Tensor | None, dtype: torch.dtype, triton: bool) -> Tensor:
        """The part's output for codes (N, H, W, C') or (…, C'), channels last, bias included."""
        at, scale, by = self.at, self.steps.scale[step], self.scales[step]
        zero = min(max(self.steps.zero[step], 0), 255)
        simple = at.kind == "linear" or (
            at.groups == 1 and at.kernel == at.stride == (1, 1) and at.padding == (0, 0) == at.crop
        )
        if simple:
            y = self._matrix(a.reshape(-1, a.shape[-1]), self._all(), zero, scale, by, bias)
            y = y.reshape(*a.shape[:-1], at.outputs)
        elif triton:
            y = self._implicit(a, zero, scale, by, bias, dtype)
        else:
            y = self._explicit(a, zero, scale, by, bias)
        if zero != self.steps.zero[step]:
            assert self.taps is not None
            rest = scale * (zero - self.steps.zero[step]) * by.double()
            if at.kind == "linear":
                y = y + (rest * self.taps.flatten()).float()
            else:
                ones = torch.ones((1, 1, *a.shape[1:3]), dtype=torch.float64, device=a.device)
                plane = F.conv2d(ones, self.taps, None, at.stride, at.padding, at.dilation)
                y = y + (plane.permute(0, 2, 3, 1) * rest).float()
        return y

    def _all(self) -> slice:
        return slice(0, self.at.outputs)

    def _matrix(self, a: Tensor, which: slice, zero: int, scale: float, by: Tensor, bias: Tensor | None) -> Tensor:
        """The formula for windows a (M, K) and the output channels `which`."""
        total = int_product(a, self.weight[which]) + (128 - zero) * self.sums[which]
        y = total.float()
        if self.has_moved:
            inputs = a.sum(1, keepdim=True, dtype=torch.int32) + (128 - zero) * self.size
            y += inputs.float() * self.moved[which].float()
        y *= scale * by[which]
        return y if bias is None else y + bias[which]

    def _explicit(self, a: Tensor, zero: int, scale: float, by: Tensor, bias: Tensor | None) -> Tensor:
        at = self.at
        found = windows(a, at, zero - 128)
        inputs, outputs = a.shape[3] // at.groups, at.outputs // at.groups
        parts = []
        for group in range(at.groups):
            window = found[..., group * inputs : (group + 1) * inputs].reshape(-1, self.size)
            which = slice(group * outputs, (group + 1) * outputs)
            parts.append(self._matrix(window, which, zero, scale, by, bias))
        return torch.cat(parts, 1).reshape(*found.shape[:3], at.outputs)

    def _implicit(
        self, a: Tensor, zero: int, scale: float, by: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        convolve: Any = _triton()
        at = self.at
        count, height, width, channels = a.shape
        rows, columns = at.uncropped(height, width)
        outputs = at.outputs // at.groups
        y = torch.empty((count, rows, columns, at.outputs), dtype=dtype, device=a.device)
        block_n = 16 if outputs <= 16 else 32 if outputs <= 32 else 64
        grid = (-(-count * rows * columns // 128), -(-outputs // block_n), at.groups)
        with torch.cuda.device(a.device) if a.is_cuda else contextlib.nullcontext():
            convolve[grid](
                a, self.weight, self.sums, self.moved, by, by if bias is None else bias, y,
                scale, zero, count, height, width, rows, columns, self.weight.stride(0),
                GROUPS=at.groups, CHANNELS=channels // at.groups, OUTPUTS=outputs,
                KERNEL_Y=at.kernel[0], KERNEL_X=at.kernel[1], STRIDE_Y=at.stride[0], STRIDE_X=at.stride[1],
                PADDING_Y=at.padding[0], PADDING_X=at.padding[1], DILATION_Y=at.dilation[0], DILATION_X=at.dilation[1],
                MOVED=self.has_moved, BIAS=bias is not None, BLOCK_M=128, BLOCK_N=block_n, BLOCK_K=64,
            )  # fmt: skip
        return y


class CudaLayer:
    """`op(x, step)`. On a device other than CUDA it computes the same with torch's operators (for tests)."""

    def __init__(self, module: nn.Module, layer: QuantizedLayer) -> None:
        self.geometry: Geometry = describe(module, layer)
        device = module.weight.device
        self.parts = [CudaPart(self.geometry, part, device) for part in layer.parts]
        self.biases = biases(module, layer)
        self.triton = device.type == "cuda" and _triton() is not None

    def __call__(self, x: Tensor, step: int) -> Tensor:
        """Args: x as the module takes it (any floating dtype), step 0..T−1. Returns the module's shape, dtype of x.

        Convolutions return channels_last. There is no gradient: RuntimeError where one would be expected.
        """
        at = self.geometry
        at.check(x)
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "the cuda kernel computes with integers and has no gradient, but its input requires one; "
                "use kernel='reference', or torch.no_grad()"
            )
        wide = x.detach().float()
        last = wide if at.kind == "linear" else at.image(wide).permute(0, 2, 3, 1)
        if last.numel() == 0:
            shape = last.shape[:-1] if at.kind == "linear" else (len(last), *at.uncropped(*last.shape[1:3]))
            y = x.new_empty((*shape, at.outputs))
        else:
            y = self._sum(last, step, x.dtype)
        if at.kind == "linear":
            return y.to(x.dtype)
        y = y.permute(0, 3, 1, 2)[:, :, at.crop[0] :, at.crop[1] :]
        return at.restore(y, x).to(x.dtype)

    def _sum(self, x: Tensor, step: int, dtype: torch.dtype) -> Tensor:
        total = None
        narrow = dtype if len(self.parts) == 1 and dtype != torch.float64 else torch.float32
        for part in self.parts:
            part.steps.check(step)
            bias = self.biases[step] if total is None else None  # once
            y = part.product(part.codes(x, step), step, bias, narrow, self.triton)
            total = y if total is None else total.add_(y)
        assert total is not None
        return total


class Cuda:
    """The kernel named "cuda"."""

    name = "cuda"

    def why_not(self, device: torch.device) -> str | None:
        """None on a CUDA device with tensor cores for int8."""
        if device.type != "cuda":
            return f"it computes on CUDA devices and the model is on {device}"
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} sees no CUDA device"
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            return f"the device has compute capability {capability[0]}.{capability[1]}; the kernel needs 8.0"
        if not hasattr(torch, "_int_mm"):
            return f"torch {torch.__version__} has no torch._int_mm"
        return None

    def build(self, module: nn.Module, layer: QuantizedLayer) -> CudaLayer:
        """Put the int8 weight on the module's device. Raises where `layer` does not fit `module`."""
        return CudaLayer(module, layer)
