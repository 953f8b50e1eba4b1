"""What is quantized and how: the options of a quantization, stated once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from iec.core.affine import check_bits, check_method

Scheme = Literal["asymmetric", "symmetric"]


@dataclass(frozen=True)
class QuantConfig:
    """Uniform affine quantization of a denoiser: weights per output channel, activations per tensor and per step (METHOD 5).

    Args:
        weight_bits: 2 … 8, of weights.
        act_bits: 2 … 8, of the inputs of layers; 8 and 6 are usual.
        edge_bits: of weights and inputs of the first and of the last layer.
        softmax_bits: of the attention probabilities.
        weight_scheme: "asymmetric" or "symmetric"; "auto" is asymmetric, but symmetric at 8 bits, where code minus zero point of
            an asymmetric weight needs nine bits and int8 kernels would have to correct for the ninth.
        act_scheme: "asymmetric" or "symmetric".
        weight_method: "mse", "max" or "percentile:P" (see `iec.core.affine.search`).
        act_method: the same for activations.
        momentum: what an activation's scale keeps of itself when a further calibration batch comes.
        split: give the two halves of a concatenation with a skip connection quantizers of their own.
        products: quantize the operands of the attention products (query, key, probabilities, value).
        bias_correction: "last", "all" or "none": the layers whose bias takes up what rounding does to their mean output (see
            `iec.quant.bias`). The paper's code has none.
        output_correction: "affine", "bias" or "none": what the last layer is given per step and channel, so that its output is
            that of full precision in the mean ("bias"), and by least squares ("affine"; see `iec.calibration.outputs`). The
            paper's code has none.
        layers: which layers: glob patterns on their names ("down_blocks.*"), "!" before one excludes, the last match wins; or
            a function (name, module) → bool. By default all convolutions and linear layers.

    Raises TypeError or ValueError for anything else.
    """

    weight_bits: int = 8
    act_bits: int = 8
    edge_bits: int = 8
    softmax_bits: int = 8
    weight_scheme: Literal["auto", "asymmetric", "symmetric"] = "auto"
    act_scheme: Scheme = "asymmetric"
    weight_method: str = "mse"
    act_method: str = "mse"
    momentum: float = 0.9
    split: bool = True
    products: bool = True
    bias_correction: Literal["last", "all", "none"] = "last"
    output_correction: Literal["affine", "bias", "none"] = "affine"
    layers: str | Sequence[str] | Callable[[str, nn.Module], bool] = ("*",)

    def __post_init__(self) -> None:
        for bits in (self.weight_bits, self.act_bits, self.edge_bits, self.softmax_bits):
            check_bits(bits)
        for method in (self.weight_method, self.act_method):
            check_method(method)
        if self.weight_scheme not in ("auto", "asymmetric", "symmetric"):
            raise ValueError(f"weight_scheme is {self.weight_scheme!r}, expected auto, asymmetric or symmetric")
        if self.act_scheme not in ("asymmetric", "symmetric"):
            raise ValueError(f"act_scheme is {self.act_scheme!r}, expected asymmetric or symmetric")
        if self.bias_correction not in ("last", "all", "none"):
            raise ValueError(f"bias_correction is {self.bias_correction!r}, expected last, all or none")
        if self.output_correction not in ("affine", "bias", "none"):
            raise ValueError(f"output_correction is {self.output_correction!r}, expected affine, bias or none")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum is {self.momentum!r}, expected 0 (the last batch alone) up to below 1")
        if isinstance(self.layers, str):
            object.__setattr__(self, "layers", (self.layers,))
        elif not callable(self.layers):
            object.__setattr__(self, "layers", tuple(self.layers))
            if not self.layers or not all(isinstance(pattern, str) for pattern in self.layers):
                raise TypeError(
                    f"layers is {self.layers!r}, expected glob patterns or a function (name, module) -> bool"
                )

    def chooses(self, name: str, module: nn.Module) -> bool:
        """Whether `layers` takes the layer `name`."""
        if callable(self.layers):
            return bool(self.layers(name, module))
        chosen = self.layers[0].startswith("!")  # a list of exclusions begins with everything
        for pattern in self.layers:
            if fnmatchcase(name, pattern.removeprefix("!")):
                chosen = not pattern.startswith("!")
        return chosen

    def symmetric(self, bits: int) -> bool:
        """Whether weights of `bits` are symmetric."""
        return self.weight_scheme == "symmetric" or (self.weight_scheme == "auto" and bits == 8)

    @property
    def label(self) -> str:
        """The field's short name, "W8A8"."""
        return f"W{self.weight_bits}A{self.act_bits}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data; a function given as `layers` is named, not kept."""
        plain = asdict(self)
        chosen = self.layers
        plain["layers"] = (
            list(chosen) if isinstance(chosen, tuple) else f"function {getattr(chosen, '__name__', chosen)}"
        )
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> QuantConfig:
        """What `as_dict` gave. Raises ValueError for an unknown option."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(plain) - known)
        if unknown:
            raise ValueError(f"unknown quantization options {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        chosen = plain.get("layers", ["*"])
        plain = {"output_correction": "none", **plain}  # which calibrations of release 0.1 had not
        return cls(**{**plain, "layers": ("*",) if isinstance(chosen, str) else tuple(chosen)})
