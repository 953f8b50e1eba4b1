"""Calibration: the quantizers of all activations, found while the model runs.

At each step the weights are in floating point and every activation is rounded by the quantizer found for it so far, so a
layer sees what the layers before it will give it (METHOD 5). Nothing but the tables is kept: memory does not grow with samples.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from iec.artifact.calibration import LayerPart, Product, QuantizedLayer, StepTable, WeightCodes
from iec.core.affine import fake_quantize, quantize, search
from iec.patch import replace_forward
from iec.quant.attention import PRODUCTS, QuantizedProducts, replace_processor
from iec.quant.bias import MeanInput, corrected_bias
from iec.quant.config import QuantConfig
from iec.quant.sites import Site, Sites

SAMPLE = (
    2**14
)  # values of a tensor that the search looks at, beside its extremes; a tensor that is smaller is searched whole


class StepSearch:
    """The quantizer of one activation in the making: scale and zero point for each of `num_steps` steps, as running means.

    The first batch of a step sets them, each further one moves them by 1 − momentum (METHOD 5); until the end zero points are
    fractions.
    """

    def __init__(self, num_steps: int, bits: int, config: QuantConfig) -> None:
        self.bits, self.config = bits, config
        self.scale = torch.zeros(num_steps)
        self.zero = torch.zeros(num_steps)
        self.seen = torch.zeros(num_steps, dtype=torch.int32)

    def __call__(self, x: Tensor, step: int) -> Tensor:
        """Take `x` (any shape) into account at `step`, and return it rounded as it will be."""
        found = search(_sampled(x), self.bits, self.config.act_method, symmetric=self.config.act_scheme == "symmetric")
        keep = self.config.momentum if self.seen[step] else 0.0
        for table, value in ((self.scale, found.scale), (self.zero, found.zero)):
            table[step] = keep * table[step] + (1.0 - keep) * value[0].cpu()
        self.seen[step] += 1
        return self.rounded(x, step)

    def rounded(self, x: Tensor, step: int) -> Tensor:
        """`x` rounded by what is known of `step`."""
        return fake_quantize(x, self.scale[step].to(x.device), self.zero[step].to(x.device), self.bits)

    def table(self) -> StepTable:
        """The finished table. Steps at which the layer did not run hold what the first one that ran does; nothing reads them."""
        ran = self.seen > 0
        if not bool(ran.any()):
            raise ValueError("never ran")
        first = int(ran.nonzero()[0])
        scale = torch.where(ran, self.scale, self.scale[first])
        zero = torch.where(ran, self.zero, self.zero[first])
        return StepTable(scale, torch.round(zero).to(torch.int16), self.bits)


class Observers:
    """The quantizers of a whole denoiser in the making; between `learning` blocks the model runs as it is."""

    def __init__(self, sites: Sites, config: QuantConfig, num_steps: int) -> None:
        self.sites, self.config = sites, config
        self.step: int | None = None
        self._seen: set[str] = set()
        self._but: frozenset[str] = frozenset()
        self.layers = {
            site.name: [StepSearch(num_steps, site.act_bits, config) for _ in site.parts] for site in sites.layers
        }
        self.products: dict[str, dict[Product, StepSearch]] = {
            name: {
                product: StepSearch(num_steps, config.softmax_bits if product == "probs" else config.act_bits, config)
                for product in PRODUCTS
            }
            for name in sites.attentions
        }
        corrected = {"none": (), "last": [s for s in sites.layers if s.last], "all": sites.layers}
        self.means = {site.name: MeanInput(site.parts[-1][1]) for site in corrected[config.bias_correction]}
        self._removers: list[Callable[[], None]] = []

    def install(self) -> None:
        """Stand in for the forwards of all sites."""
        for site in self.sites.layers:
            around = functools.partial(self._observed, site=site, searches=self.layers[site.name])
            self._removers.append(replace_forward(site.module, around))
        for name, module in self.sites.attentions.items():
            self._removers.append(replace_processor(module, self._processor(name, module)))

    def remove(self) -> None:
        """Step aside."""
        for undo in reversed(self._removers):
            undo()
        self._removers = []

    @contextlib.contextmanager
    def learning(self, step: int, but: Collection[str] = ()) -> Iterator[set[str]]:
        """Evaluations within are rounded, and their activations those of `step`; gives the names of the sites that ran.

        Sites named in `but` are rounded by what they have learnt already.
        """
        self.step, self._but, self._seen = step, frozenset(but), set()
        try:
            yield self._seen
        finally:
            self.step, self._but = None, frozenset()

    def _look(self, site: str, search_: StepSearch, x: Tensor) -> Tensor:
        assert self.step is not None
        self._seen.add(site)
        return search_.rounded(x, self.step) if site in self._but else search_(x, self.step)

    def _observed(
        self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any], site: Site, searches: list[StepSearch]
    ) -> Any:
        if self.step is None:
            return forward(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        axis = -1 if site.kind == "linear" else 1
        pieces = [
            self._look(site.name, search_, x.narrow(axis, begin, end - begin))
            for search_, (begin, end) in zip(searches, site.parts, strict=True)
        ]
        rounded = pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)
        if site.name in self.means and site.name not in self._but:
            self.means[site.name].add(x, rounded, axis)
        return forward(rounded)

    def _processor(self, name: str, attn: nn.Module) -> Any:
        searches = self.products[name]
        quantized = QuantizedProducts(
            {product: functools.partial(self._look, name, searches[product]) for product in PRODUCTS}
        )
        return _Switching(self, attn.processor, quantized)

    def searches(self) -> dict[str, StepSearch]:
        """Every quantizer by a name of its own."""
        named = {f"{name}#{part}": s for name, parts in self.layers.items() for part, s in enumerate(parts)}
        return named | {f"{name}#{product}": s for name, of in self.products.items() for product, s in of.items()}

    def state(self) -> dict[str, Tensor]:
        """All that was learnt so far, for a checkpoint."""
        searches = list(self.searches().values())
        state = {key: torch.stack([getattr(s, key) for s in searches]) for key in ("scale", "zero", "seen")}
        for name, mean in self.means.items():
            state |= {f"{name}#sums": mean.sums.clone(), f"{name}#count": mean.count.clone()}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `state()` of observers of the same sites and steps."""
        for index, search_ in enumerate(self.searches().values()):
            search_.scale, search_.zero, search_.seen = (state[key][index].clone() for key in ("scale", "zero", "seen"))
        for name, mean in self.means.items():
            mean.sums, mean.count = state[f"{name}#sums"].clone(), state[f"{name}#count"].clone()

    def result(self) -> tuple[dict[str, QuantizedLayer], dict[str, dict[Product, StepTable]], dict[str, str]]:
        """Quantized layers and products by name, and why some layers have none."""
        layers: dict[str, QuantizedLayer] = {}
        skipped: dict[str, str] = {}
        for site in self.sites.layers:
            searches = self.layers[site.name]
            if not bool(searches[0].seen.any()):
                skipped[site.name] = "never ran during the calibration"
                continue
            weights = quantize_weight(site, self.config)
            layers[site.name] = QuantizedLayer(
                site.kind,
                tuple(
                    LayerPart(begin, end, weight, search_.table())
                    for (begin, end), weight, search_ in zip(site.parts, weights, searches, strict=True)
                ),
                self._bias(site, weights),
            )
        products = {
            name: {product: search_.table() for product, search_ in of.items()}
            for name, of in self.products.items()
            if bool(of["query"].seen.any())
        }
        return layers, products, skipped

    def _bias(self, site: Site, weights: list[WeightCodes]) -> Tensor | None:
        if site.name not in self.means:
            return None
        return corrected_bias(site, torch.cat([dequantized(weight) for weight in weights], 1), self.means[site.name])


class _Switching:
    """An attention processor: the quantized one while the observers learn, else the one that was there."""

    def __init__(self, observers: Observers, plain: Any, quantized: QuantizedProducts) -> None:
        self.observers, self.plain, self.quantized = observers, plain, quantized

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        chosen = self.plain if self.observers.step is None else self.quantized
        return chosen(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def quantize_weight(site: Site, config: QuantConfig) -> list[WeightCodes]:
    """The weight of a layer rounded to the nearest codes, part by part: one (scale, zero point) per output channel and part."""
    weight, bits = site.module.weight.detach().float(), site.weight_bits
    pieces = []
    for begin, end in site.parts:
        # Grouped convolutions have one part, whose weight has fewer input channels than the layer.
        piece = weight if len(site.parts) == 1 else weight[:, begin:end]
        scale, zero = search(piece.flatten(1), bits, config.weight_method, symmetric=config.symmetric(bits))
        shape = (-1, *[1] * (piece.dim() - 1))
        codes = quantize(piece, scale.view(shape), zero.view(shape), bits)
        pieces.append(WeightCodes(codes.to(torch.uint8).cpu(), scale.cpu(), zero.to(torch.int16).cpu(), bits))
    return pieces


def dequantized(weight: WeightCodes) -> Tensor:
    """The float weight that codes stand for."""
    shape = (-1, *[1] * (weight.codes.dim() - 1))
    return (weight.codes.float() - weight.zero.float().view(shape)) * weight.scale.view(shape)


def _sampled(x: Tensor) -> Tensor:
    """`x` as one row (1, M); of a large tensor SAMPLE values at random, though always the same, places, and the extremes."""
    row = x.detach().reshape(-1).float()
    if row.numel() > SAMPLE + 2:
        row = torch.cat([row[_places(row.numel()).to(row.device)], row.amin()[None], row.amax()[None]])
    return row[None]


@functools.lru_cache(maxsize=256)
def _places(count: int) -> Tensor:
    return torch.randint(count, (SAMPLE,), generator=torch.Generator().manual_seed(0))
