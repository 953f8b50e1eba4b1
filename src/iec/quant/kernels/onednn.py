"""Integer convolutions and products on the CPU through oneDNN: uint8 codes times int8 weights, summed in int32.

y[o] = d_x d_w[o] Σ (q_x − z_x) w[o] + b[o], with w = q_w − z_w packed once as int8. The step's d_x, z_x and b go along with
each call, and so does d_w, times the step's gain in a part that has one: steps that differ cost nothing. Where z_x is a code,
as it mostly is, the image gets a border of z_x in place of the padding and −d_x d_w[o] z_x Σ w[o] goes into the bias, which
saves oneDNN a quarter of its time; else oneDNN is given z_x.

oneDNN's int8 weights have no zero point, so w must lie in −128..127. It does for up to 7 bits and for symmetric 8 bits.
Where it does not, an output channel is moved by an integer k[o] into range and k[o] d_w[o] Σ (q_x − z_x) d_x is added,
which is exact: one more pass over the codes and the output. Such a layer takes 1.4 to 2.4 times as long.

Sums are int32 and wrap. Where (255 + |z_x|) Σ |w| could reach 2³¹ (z_x in the thousands: inputs far from zero, and weights of
one sign) the zero point is cut to what fits, and the rest of it, a constant image, is convolved by itself and added.

The numbers are those of `reference`, given equal codes, but for float32 roundings in the output: at most 1e-6 of
Σ (|x̂| + |z_x d_x|) (|ŵ| + |k d_w|) + |b|. Codes are bit for bit those of `iec.core.affine.quantize`. A NaN in the input becomes
code 0: it does not come out as a NaN.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from iec.artifact.calibration import LayerPart, QuantizedLayer
from iec.quant.kernels import passes
from iec.quant.kernels.geometry import Geometry, Steps, biases, centred, describe, fit_int8, per_step

NEEDED = {
    # the arguments that are passed by position, in the order that this file passes them
    "qconv_prepack.default": "weight w_scales x_scale x_zp stride padding dilation groups x_shape",
    "qlinear_prepack.default": "weight x_shape",
    "qconv2d_pointwise.default": "qx x_scale x_zero_point qw w_scale w_zero_point bias stride padding dilation groups"
    " output_scale output_zero_point output_dtype attr scalars algorithm",
    "qlinear_pointwise.default": "qx x_scale x_zero_point qw w_scale w_zero_point bias"
    " output_scale output_zero_point output_dtype post_op_name post_op_args post_op_algorithm",
}


class OnednnPart:
    """One range of input channels: its packed weight, its steps, and (rarely) what puts a moved weight right."""

    def __init__(self, at: Geometry, part: LayerPart, folded: bool) -> None:
        self.at, self.begin, self.end = at, part.begin, part.end
        self.steps = Steps(part)
        weight, moved = fit_int8(centred(part).cpu())
        self.scale = part.weight.scale.detach().float().cpu().contiguous()
        self.scales = per_step(part, self.scale.double())  # times the gain
        self.zeros = torch.zeros(at.outputs, dtype=torch.int8)
        limit = (2**31 - 1) // max(int(weight.flatten(1).abs().sum(1, dtype=torch.int64).max()), 1) - 255
        self.zero = [0 if folded else min(max(zero, -limit), limit) for zero in self.steps.zero]
        self.folded = per_step(part, weight.flatten(1).sum(1) * self.scale.double()) if folded else None
        self.packed = self._pack(weight, self.scale)
        self.moved: list[Tensor] | None = None
        self.ones: Tensor | None = None
        if bool(moved.any()):
            self.moved = per_step(part, moved * self.scale.double())
            self.window = torch.tensor([at.kernel, at.stride, at.padding, at.dilation]).T.contiguous()
            self.one = torch.ones(at.groups)
            if at.kind != "linear":
                self.ones = self._pack(torch.ones_like(weight[: at.groups]), self.one)

    def _pack(self, weight: Tensor, scale: Tensor) -> Tensor:
        at = self.at
        if at.kind == "linear":
            return torch.ops.onednn.qlinear_prepack(weight, None)
        if at.kind == "conv1d":
            weight = weight.unsqueeze(2)
        settings = [list(at.stride), list(at.padding), list(at.dilation), at.groups]
        return torch.ops.onednn.qconv_prepack(weight.contiguous(), scale, 1.0, 0, *settings, None)

    def _run(
        self,
        codes: Tensor,
        scale: float,
        zero: int,
        packed: Tensor,
        by: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """scale by[o] Σ (codes − zero) packed[o] + bias[o]."""
        at = self.at
        given = (codes, scale, zero, packed, by, self.zeros[: len(by)], bias)
        if at.kind == "linear":
            return torch.ops.onednn.qlinear_pointwise(*given, 1.0, 0, dtype, "none", [], "")
        return torch.ops.onednn.qconv2d_pointwise(
            *given, at.stride, at.padding, at.dilation, at.groups, 1.0, 0, dtype, "none", [], ""
        )

    def offset(self, step: int, bias: Tensor | None) -> Tensor | None:
        """What `run` is to add at a step: the bias, and what a zero point folded into it takes off."""
        if self.folded is None:
            return bias
        shift = -self.steps.scale[step] * self.steps.zero[step]
        return self.folded[step] * shift if bias is None else torch.add(bias, self.folded[step], alpha=shift)

    def run(self, codes: Tensor, step: int, offset: Tensor | None, total: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The part's output in `dtype`, plus its `offset`; with `total` (float32, channels_last) added to that, in place."""
        if self.moved is not None:
            total = self._add_moved(codes, step, total)
        scale, zero, by = self.steps.scale[step], self.zero[step], self.scales[step]
        if self.folded is None and zero != self.steps.zero[step]:
            total = self._add_rest(codes, step, total)
        # oneDNN's own sum (the operators' "binary" overloads) is no faster: torch copies the total for it.
        if total is None:
            return self._run(codes, scale, zero, self.packed, by, offset, dtype)
        return total.add_(self._run(codes, scale, zero, self.packed, by, offset, torch.float32))

    def _add_rest(self, codes: Tensor, step: int, total: Tensor | None) -> Tensor:
        """d_x d_w[o] Σ (cut zero point − z_x) w[o], the same for all samples, added to `total` or alone."""
        one = torch.ones_like(codes[:1]) if self.at.kind != "linear" else codes.new_ones(codes.shape[-1:])
        rest = self.steps.scale[step] * (self.zero[step] - self.steps.zero[step])
        # a negative scale of the input is not oneDNN's business: its sign goes outside
        plane = self._run(one, abs(rest), 0, self.packed, self.scales[step], None, torch.float32)
        plane = plane if rest > 0 else -plane
        if total is not None:
            return total.add_(plane)
        if self.at.kind == "linear":
            return plane.expand(*codes.shape[:-1], -1).contiguous()
        return plane.expand(len(codes), -1, -1, -1).contiguous(memory_format=torch.channels_last)

    def _add_moved(self, codes: Tensor, step: int, total: Tensor | None) -> Tensor:
        """k[o] d_w[o] Σ (q_x − z_x) d_x, added to `total` or alone; the sum runs over the window and the group."""
        assert self.moved is not None
        at, scale, zero, moved = self.at, self.steps.scale[step], self.steps.zero[step], self.moved[step]
        if at.kind == "linear":
            image, shape = codes.contiguous().view(-1, 1, 1, codes.shape[-1]), (*codes.shape[:-1], at.outputs)
        else:
            image = codes.permute(0, 2, 3, 1).contiguous()
            rows, columns = at.uncropped(*image.shape[1:3])
            shape = (len(image), rows, columns, at.outputs)
        fresh = total is None
        if total is None:
            total = torch.empty(shape)
        elif at.kind != "linear":
            total = total.permute(0, 2, 3, 1)
        whole = total.view(-1, 1, 1, at.outputs) if at.kind == "linear" else total
        if at.groups > 1 or not passes.add_window_sums(image, zero, self.window, moved * scale, whole, fresh):
            sums = self._sums(codes, step)
            torch.mul(sums, moved, out=total) if fresh else total.addcmul_(sums, moved)
        return total if at.kind == "linear" else total.permute(0, 3, 1, 2)

    def _sums(self, codes: Tensor, step: int) -> Tensor:
        """Σ (q_x − z_x) d_x: (…, 1), or (N, h, w, 1) and with groups (N, h, w, O)."""
        at, scale, zero = self.at, self.steps.scale[step], self.steps.zero[step]
        if self.ones is None:  # linear
            return codes.sum(-1, keepdim=True, dtype=torch.int32).sub_(zero * codes.shape[-1]).float().mul_(scale)
        sums = self._run(codes, scale, zero, self.ones, self.one, None, torch.float32).permute(0, 2, 3, 1)
        return sums.repeat_interleave(at.outputs // at.groups, dim=-1) if at.groups > 1 else sums


class OnednnLayer:
    """`op(x, step)`; also in two halves, `quantize` and `from_codes`, for whoever can produce codes or use a sum."""

    def __init__(self, module: nn.Module, layer: QuantizedLayer) -> None:
        self.geometry: Geometry = describe(module, layer)
        folded = all(0 <= int(zero) <= 2**part.act.bits - 1 for part in layer.parts for zero in part.act.zero)
        # Rows above and below the codes of an image, and columns beside it, that stand for its padding.
        self.border = self.geometry.padding if folded else (0, 0)
        at = dataclasses.replace(self.geometry, padding=(0, 0)) if folded else self.geometry
        self.parts = [OnednnPart(at, part, folded) for part in layer.parts]
        self.biases = biases(module, layer)
        # Offsets of the parts by step, once they were needed; none are kept where all would outgrow the packed weights.
        room = sum(part.weight.codes.numel() for part in layer.parts) // (4 * at.outputs * len(layer.parts))
        self.keeps = len(self.biases) <= room
        self.kept: list[tuple[Tensor | None, ...] | None] = [None] * len(self.biases)

    def __call__(self, x: Tensor, step: int) -> Tensor:
        """Args: x as the module takes it (any floating dtype), step 0..T−1. Returns the module's shape, dtype of x.

        Convolutions return channels_last. There is no gradient: RuntimeError where one would be expected.
        """
        at = self.geometry
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        if at.kind != "linear" and x.dim() == at.spatial + 2 and x.shape[0] == 0:
            at.check(x)
            rows, columns = at.size(*at.image(x).shape[2:])
            return at.restore(x.new_empty((0, at.outputs, rows, columns)), x)
        y = self._sum(self.quantize(x, step), step, None, True, dtype)
        return (y if at.kind == "linear" else at.restore(y, x)).to(x.dtype)

    def __deepcopy__(self, memo: object) -> OnednnLayer:
        """Itself: its numbers never change, and packed weights cannot be copied."""
        return self

    def quantize(self, x: Tensor, step: int) -> tuple[Tensor, ...]:
        """Return the input's codes, uint8, one tensor a part: (N, C', H, W) channels_last or (…, C') for a linear layer.

        x is the module's input; a Conv1d's codes are one row high. Padding other than by zeros is in them, and `border`.
        """
        at = self.geometry
        at.check(x)
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "the onednn kernel computes with integers and has no gradient, but its input requires one; "
                "use kernel='reference', or torch.no_grad()"
            )
        spans = self.spans(step)
        return (
            passes.quantize(x, -1, spans)
            if at.kind == "linear"
            else passes.quantize(at.image(x), 1, spans, self.border)
        )

    def with_border(self, codes: Iterable[Tensor], step: int) -> tuple[Tensor, ...]:
        """Codes of an image without its border, one tensor a part, with it."""
        return tuple(
            passes.bordered(c, self.border, p.steps.zero[step]) for c, p in zip(codes, self.parts, strict=True)
        )

    def spans(self, step: int) -> list[passes.Span]:
        """The ranges of input channels with their quantizers at `step`, as `passes` takes them."""
        for part in self.parts:
            part.steps.check(step)
        return [(p.begin, p.end, p.steps.scale[step], p.steps.zero[step], p.steps.top) for p in self.parts]

    def from_codes(
        self, codes: tuple[Tensor, ...], step: int, accumulate: Tensor | None = None, bias: bool = True
    ) -> Tensor:
        """Return the layer's output in float32 for codes as `quantize` returns them: (N, O, H, W) channels_last, (…, O).

        accumulate: a float32 tensor of the output's shape, contiguous (convolutions: channels_last), which is added to
        in place and returned. bias: whether the layer's bias is added.
        """
        if accumulate is not None:
            self._check_total(accumulate)
        return self._sum(codes, step, accumulate, bias, torch.float32)

    def _check_total(self, total: Tensor) -> None:
        form = torch.contiguous_format if self.geometry.kind == "linear" else torch.channels_last
        if total.dtype != torch.float32 or not total.is_contiguous(memory_format=form):
            raise ValueError(
                f"accumulate is {total.dtype} of strides {total.stride()}; expected float32, contiguous in {form}"
            )

    def _sum(
        self, codes: tuple[Tensor, ...], step: int, total: Tensor | None, with_bias: bool, dtype: torch.dtype
    ) -> Tensor:
        offsets = self.kept[step] if with_bias else None
        if offsets is None:
            offsets = self._offsets(step, with_bias)
        given, crop = total, self.geometry.crop
        if any(crop):  # the output is cut afterwards, so nothing can be added to it in place
            total = None
        for part, part_codes, offset in zip(self.parts, codes, offsets, strict=True):
            single = len(self.parts) == 1 and total is None
            total = part.run(part_codes, step, offset, total, dtype if single else torch.float32)
        assert total is not None
        if not any(crop):
            return total
        total = total[:, :, crop[0] :, crop[1] :].contiguous(memory_format=torch.channels_last)
        return total if given is None else given.add_(total)

    def _offsets(self, step: int, with_bias: bool) -> tuple[Tensor | None, ...]:
        """What each part is to add: the first one the bias, once."""
        first, *others = self.parts
        bias = self.biases[step] if with_bias else None
        offsets = (first.offset(step, bias), *(part.offset(step, None) for part in others))
        if with_bias and self.keeps:
            self.kept[step] = offsets
        return offsets


@functools.cache
def _missing() -> str | None:
    """What this build of torch or this processor lacks; None where integer products are exact."""
    if not torch.backends.mkldnn.is_available():
        return "this build of torch is without oneDNN (mkldnn)"
    for name, arguments in NEEDED.items():
        packet, overload = name.split(".")
        try:
            schema = getattr(getattr(torch.ops.onednn, packet), overload)._schema
        except AttributeError:
            return f"torch {torch.__version__} has no torch.ops.onednn.{name}"
        found = " ".join(argument.name for argument in schema.arguments)
        if found != arguments:
            return f"torch {torch.__version__} has another torch.ops.onednn.{name}: its arguments are {found}"
    # Without VNNI, oneDNN adds pairs of products in 16 bits, which saturate: 255·127·2 comes out as 32767.
    one, zero = torch.ones(16), torch.zeros(16, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(torch.full((16, 64), 127, dtype=torch.int8), None)
    codes = torch.full((4, 64), 255, dtype=torch.uint8)
    found = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 0, packed, one, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    if not bool((found == 255 * 127 * 64).all()):
        return "this processor has no VNNI, without which oneDNN's sums of int8 products saturate and are wrong"
    return None


class Onednn:
    """The kernel named "onednn"."""

    name = "onednn"

    def why_not(self, device: torch.device) -> str | None:
        """None on a CPU with VNNI and a torch that has oneDNN's quantized operators."""
        if device.type != "cpu":
            return f"it computes on the CPU and the model is on {device}"
        return _missing()

    def build(self, module: nn.Module, layer: QuantizedLayer) -> OnednnLayer:
        """Pack the weight once; no floating-point weight is kept. Raises where `layer` does not fit `module`."""
        return OnednnLayer(module, layer)
