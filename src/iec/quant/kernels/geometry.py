"""The module that a kernel stands in for, as plain numbers: everything as a two-dimensional convolution or a product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iec.artifact.calibration import LayerPart, QuantizedLayer


@dataclass(frozen=True)
class Geometry:
    """What the kernels need to know of a Conv2d, Conv1d (taken as a convolution one row high) or Linear.

    Attributes:
        kind: "conv2d", "conv1d" or "linear".
        inputs, outputs: channels (features) in and out.
        kernel, stride, dilation: (rows, columns); all 1 for a linear layer.
        padding: (rows, columns) of zeros on both sides.
        groups: of the convolution.
        crop: (rows, columns) to drop from the beginning of the output, where padding="same" needs one zero less before
            the image than behind it.
        border: what F.pad takes, to pad the input itself; empty unless the padding is other than by zeros.
        border_mode: of F.pad, for instance "reflect".
    """

    kind: str
    inputs: int
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    crop: tuple[int, int] = (0, 0)
    border: tuple[int, ...] = ()
    border_mode: str = "constant"

    @property
    def spatial(self) -> int:
        """Number of image dimensions of the module's input: 2, 1 or (linear) 0."""
        return {"conv2d": 2, "conv1d": 1, "linear": 0}[self.kind]

    def uncropped(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns that a convolution puts out for an input (with its border) of that size, before the crop."""
        result = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                (rows, columns), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        ]
        return result[0], result[1]

    def size(self, rows: int, columns: int) -> tuple[int, int]:
        """The same after it."""
        rows, columns = self.uncropped(rows, columns)
        return rows - self.crop[0], columns - self.crop[1]

    def image(self, x: Tensor) -> Tensor:
        """The input of a convolution as (N, C, H, W) with its border (a view where it can be)."""
        if x.dim() == self.spatial + 1:
            x = x.unsqueeze(0)
        if self.kind == "conv1d":
            x = x.unsqueeze(2)
        return F.pad(x, self.border, self.border_mode) if self.border else x

    def restore(self, y: Tensor, like: Tensor) -> Tensor:
        """The output (N, O, H, W) of a convolution in the shape that the module returns for an input like `like`."""
        if self.kind == "conv1d":
            y = y.squeeze(2)
        return y.squeeze(0) if like.dim() == self.spatial + 1 else y

    def check(self, x: Tensor) -> None:
        """Raise ValueError for an input that the module itself would refuse."""
        if self.kind == "linear":
            good = x.dim() >= 1 and x.shape[-1] == self.inputs
            want = f"(…, {self.inputs})"
        else:
            good = x.dim() in (self.spatial + 1, self.spatial + 2) and x.shape[-1 - self.spatial] == self.inputs
            want = f"(N, {self.inputs}, {'H, W' if self.spatial == 2 else 'L'})"
        if not good:
            raise ValueError(f"a quantized {self.kind} got an input of shape {tuple(x.shape)}; expected {want}")
        if not x.is_floating_point():
            raise TypeError(f"a quantized {self.kind} got an input of dtype {x.dtype}; expected a floating dtype")


def _pair(value: int | tuple[int, ...], flat: bool, fill: int) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return (fill, values[0]) if flat else (values[0], values[-1])


def describe(module: nn.Module, layer: QuantizedLayer) -> Geometry:
    """Return the geometry of `module`, checked against what the calibration holds for it.

    Raises TypeError for a module that is no Conv2d, Conv1d or Linear, ValueError where `layer` does not fit it.
    """
    if isinstance(module, nn.Linear):
        found = Geometry("linear", module.in_features, module.out_features)
    elif isinstance(module, nn.Conv2d | nn.Conv1d) and not isinstance(module, nn.modules.conv._ConvTransposeNd):
        found = _convolution(module)
    else:
        raise TypeError(f"{type(module).__name__} cannot be quantized; expected a Conv2d, Conv1d or Linear")
    if layer.kind != found.kind:
        raise ValueError(f"the calibration holds a {layer.kind} where the model has a {found.kind}; they do not match")
    ends = [0, *(part.end for part in layer.parts)]
    if [part.begin for part in layer.parts] != ends[:-1] or ends[-1] != found.inputs:
        spans = ", ".join(f"{part.begin}:{part.end}" for part in layer.parts)
        raise ValueError(f"the parts of a layer are {spans}; expected them to tile its {found.inputs} input channels")
    if len(layer.parts) > 1 and found.groups > 1:
        raise ValueError(f"a convolution with {found.groups} groups cannot be split; calibrate it in one part")
    window = () if found.kind == "linear" else found.kernel[-found.spatial :]
    for part in layer.parts:
        want = (found.outputs, (part.end - part.begin) // found.groups, *window)
        if tuple(part.weight.codes.shape) != want:
            raise ValueError(f"weight codes are {tuple(part.weight.codes.shape)}; the module needs {want}")
        gains = (len(part.act.scale), found.outputs)
        if part.gain is not None and tuple(part.gain.shape) != gains:
            raise ValueError(
                f"the gain of a part is {tuple(part.gain.shape)}; expected {gains}: steps, output channels"
            )
    return found


def _convolution(module: nn.Conv2d | nn.Conv1d) -> Geometry:
    flat = isinstance(module, nn.Conv1d)
    kernel, dilation = _pair(module.kernel_size, flat, 1), _pair(module.dilation, flat, 1)
    crop, border, mode = (0, 0), (), "constant"
    if module.padding_mode != "zeros":
        padding = (0, 0)
        mode = module.padding_mode
        border = tuple(module._reversed_padding_repeated_twice)
        if flat:
            border = (*border, 0, 0)  # the row above and below: none
    elif module.padding == "valid":
        padding = (0, 0)
    elif module.padding == "same":
        # total zeros d(k-1); the odd one goes behind the image: pad both sides alike and drop the first output
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = ((total[0] + 1) // 2, (total[1] + 1) // 2)
        crop = (total[0] % 2, total[1] % 2)
    else:
        padding = _pair(module.padding, flat, 0)
    return Geometry(
        kind="conv1d" if flat else "conv2d",
        inputs=module.in_channels,
        outputs=module.out_channels,
        kernel=kernel,
        stride=_pair(module.stride, flat, 1),
        padding=padding,
        dilation=dilation,
        groups=module.groups,
        crop=crop,
        border=border,
        border_mode=mode,
    )


def biases(module: nn.Module, layer: QuantizedLayer) -> list[Tensor | None]:
    """The bias (out,) of each step, float32 on the module's device: the calibration's where it holds one, else the module's.

    Raises ValueError for a shape that fits neither the module nor the steps.
    """
    steps, outputs = len(layer.parts[0].act.scale), module.weight.shape[0]  # type: ignore[index]
    bias = layer.bias if layer.bias is not None else module.bias
    if bias is None:
        return [None] * steps
    if tuple(bias.shape) not in ((outputs,), (steps, outputs)):  # type: ignore[union-attr]
        raise ValueError(
            f"the bias of a layer is {tuple(bias.shape)}; expected {(outputs,)}, or {(steps, outputs)} for one per step"  # type: ignore[union-attr]
        )
    bias = bias.detach().to(device=module.weight.device, dtype=torch.float32).clone()  # type: ignore[union-attr, arg-type]
    return rows(bias) if bias.dim() == 2 else [bias] * steps


def per_step(part: LayerPart, value: Tensor) -> list[Tensor]:
    """gain[t] · value in float32 for each step t; value: float64 (out,). Without a gain, always the same tensor."""
    if part.gain is None:
        return [value.float()] * len(part.act.scale)
    return rows((part.gain.detach().to(value) * value).float())


def rows(table: Tensor) -> list[Tensor]:
    """The rows of a table, each on its own, so that all begin where a kernel likes numbers to begin."""
    return [row.clone() for row in table]


class Steps:
    """The quantizers of a part's input as Python numbers: `scale[t]`, `zero[t]`, `top` = 2**bits − 1."""

    def __init__(self, part: LayerPart) -> None:
        self.scale: list[float] = part.act.scale.double().tolist()
        self.zero: list[int] = [int(z) for z in part.act.zero.tolist()]
        self.top = 2**part.act.bits - 1

    def check(self, step: int) -> None:
        """Raise IndexError for a step that the table does not hold."""
        if not 0 <= step < len(self.scale):
            raise IndexError(f"step {step} is beyond the {len(self.scale)} steps of the calibration")


def centred(part: LayerPart) -> Tensor:
    """The weight's codes less their zero point, int32 (out, in/groups, *kernel)."""
    codes = part.weight.codes
    return codes.int() - part.weight.zero.int().reshape(-1, *(1,) * (codes.dim() - 1))


def fit_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Move each output channel of centred codes into −128..127: (weight − k as int8, k int32 (out,), mostly 0).

    Codes span at most 255, so there is always such a k; the smallest one is taken.
    """
    low, high = weight.flatten(1).amin(1), weight.flatten(1).amax(1)
    moved = (high - 127).clamp(min=0) + (low + 128).clamp(max=0)  # at most one of the two is not 0
    return (weight - moved.reshape(-1, *(1,) * (weight.dim() - 1))).to(torch.int8), moved
