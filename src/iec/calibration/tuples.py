"""Calibration tuples: what a denoiser was called with at some (sample, step) pairs, chosen beforehand at random."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from iec.quant import rows

UNBATCHED = ("img_ids", "txt_ids")  # positions, whose first dimension is tokens (Flux)
TIMES = ("timestep", "timesteps")


class Tuples:
    """Rows of the arguments of one denoiser's calls: `batch` gives calls of them, in any order.

    Attributes:
        steps: int64 (N,), the step of each tuple.
        reused: bool (N,), whether that is a reuse step of the cache.

    Args:
        steps, reused: the attributes; reused None: nowhere.
        template, held, kept: the arguments; the tensors with a row for each tuple, and those without.
        features: (number of reused tuples, C, H, W), what is reused at them, in order.
    """

    def __init__(
        self,
        steps: Tensor,
        template: rows.Template,
        held: dict[str, Tensor],
        kept: dict[str, Tensor],
        reused: Tensor | None = None,
        features: Tensor | None = None,
    ) -> None:
        self.steps, self._template, self._held, self._kept = steps, template, held, kept
        self.reused = torch.zeros(len(steps), dtype=torch.bool) if reused is None else reused
        self._features, self._feature_of = features, self.reused.cumsum(0) - 1

    def __len__(self) -> int:
        return len(self.steps)

    def batch(self, places: Tensor, device: torch.device) -> dict[str, Any]:
        """The keyword arguments of a call of the denoiser with the tuples at `places`, in float32."""

        def tensor(path: str) -> Tensor:
            return _laid_out(self._held[path][places] if path in self._held else self._kept[path], device)

        return rows.fill(self._template, tensor)

    def feature(self, places: Tensor, device: torch.device) -> Tensor:
        """What is reused at the tuples at `places`, (B, C, H, W) in float32; all of them must be `reused`."""
        assert self._features is not None and bool(self.reused[places].all())
        return _laid_out(self._features[self._feature_of[places]], device)


def _laid_out(value: Tensor, device: torch.device) -> Tensor:
    """On `device`, floating-point numbers in float32, pictures with their channels last."""
    value = value.to(device)
    value = value.float() if value.is_floating_point() else value
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


class Capture:
    """The tuples of one denoiser in the making, in memory that does not grow once the first one is in.

    Args:
        model: the denoiser.
        num_samples, num_steps: tuples are (sample, step) pairs of these, drawn without replacement.
        count: how many, at most all there are.
        seed: of the draw.
        reuse_steps: those at which a run reuses a cached feature; tuples there keep it.

    With guidance a sample has several rows at a step, in one call or in several; one of them is taken, each as likely. Rows whose
    arguments have other shapes than those of the first are not taken.
    """

    def __init__(
        self, model: nn.Module, num_samples: int, num_steps: int, count: int, seed: int, reuse_steps: Iterable[int] = ()
    ) -> None:
        self.signature = inspect.signature(model.forward)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(num_samples * num_steps, generator=generator)[:count].sort().values
        self.samples, self.steps = drawn // num_steps, drawn % num_steps
        self.draws = torch.rand(len(drawn), 8, generator=generator)  # which copy; whether a later call takes over
        self.reused = torch.isin(self.steps, torch.tensor(list(reuse_steps), dtype=torch.int64))
        self.taken = torch.zeros(len(drawn), dtype=torch.bool)
        self.template: rows.Template | None = None
        self.held: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self.features: Tensor | None = None  # of the reused ones
        self._last, self._call = (-1, -1), 0

    def take(
        self,
        step: int,
        first: int,
        count: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        feature: Tensor | None = None,
    ) -> None:
        """Take what was chosen from a call at `step` with the samples first … first + count − 1.

        feature: at a reuse step what a run reuses there, (B, C, H, W) with the rows of the call.
        """
        self._call = self._call + 1 if self._last == (first, step) else 0
        self._last = (first, step)
        chosen = (self.samples >= first) & (self.samples < first + count) & (self.steps == step)
        if self._call:  # the k-th call of a step takes over with probability 1/k
            chosen &= self.draws[:, 1 + (self._call - 1) % 7] < 1.0 / (self._call + 1)
        places = chosen.nonzero()[:, 0]
        if not len(places):
            return
        tree = self._arguments(args, kwargs)
        tensors = dict(rows.leaves(tree))
        batch = next(iter(tensors.values())).shape[0]
        if batch % count:  # a part of the samples: whose rows they are is not known
            return
        self._expand_times(tree, tensors, batch)
        batched = {
            path: value
            for path, value in tensors.items()
            if value.dim() and value.shape[0] == batch and path not in UNBATCHED
        }
        if self.template is None:
            self._begin(tree, batched, {path: value for path, value in tensors.items() if path not in batched})
        if {p: v.shape[1:] for p, v in batched.items()} != {p: v.shape[1:] for p, v in self.held.items()}:
            return
        copies = batch // count
        copy = (self.draws[places, 0] * copies).long().clamp(max=copies - 1)
        which = copy * count + (self.samples[places] - first)
        for path, value in batched.items():
            self.held[path][places] = value.detach()[which.to(value.device)].to(self.held[path])
        if feature is not None:
            if self.features is None:
                self.features = torch.zeros(int(self.reused.sum()), *feature.shape[1:], dtype=feature.dtype)
            of_reused = (self.reused.cumsum(0) - 1)[places]
            self.features[of_reused] = feature.detach()[which.to(feature.device)].to(self.features)
        self.taken[places] = True

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        bound = self.signature.bind(*args, **kwargs)
        tree: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                raise TypeError(f"the denoiser takes *{name}; reconstruction needs arguments with names")
            tree |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        return tree

    def _expand_times(self, tree: dict[str, Any], tensors: dict[str, Tensor], batch: int) -> None:
        """Give the timestep one entry per row: the tuples of a batch are at steps of their own."""
        for name in TIMES:
            if name in tree and tree[name] is not None:
                time = torch.as_tensor(tree[name]).reshape(-1)
                tree[name] = tensors[name] = time.expand(batch) if len(time) == 1 else time

    def _begin(self, tree: dict[str, Any], batched: dict[str, Tensor], others: dict[str, Tensor]) -> None:
        self.template = rows.template(tree)
        _check_plain(self.template)
        self.held = {path: torch.zeros(len(self.steps), *v.shape[1:], dtype=v.dtype) for path, v in batched.items()}
        self.kept = {path: value.detach().cpu().clone() for path, value in others.items()}

    def state(self) -> tuple[dict[str, Tensor], Any]:
        """Tensors, and the plain rest, for a checkpoint."""
        tensors = {"taken": self.taken}
        tensors |= {f"held/{path}": value for path, value in self.held.items()}
        tensors |= {f"kept/{path}": value for path, value in self.kept.items()}
        tensors |= {} if self.features is None else {"features": self.features}
        return tensors, self.template

    def load_state(self, tensors: dict[str, Tensor], template: Any) -> None:
        """Continue from `state()`."""
        self.taken, self.template = tensors["taken"].clone(), template
        for name, into in (("held/", self.held), ("kept/", self.kept)):
            into |= {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}
        self.features = tensors.get("features")

    def result(self) -> Tuples:
        """The tuples that were taken."""
        held = {path: value[self.taken] for path, value in self.held.items()}
        features = None if self.features is None else self.features[self.taken[self.reused]]
        template = self.template or ["plain", None]
        return Tuples(self.steps[self.taken], template, held, self.kept, self.reused[self.taken], features)


def _check_plain(template: rows.Template, path: str = "") -> None:
    kind, value = template
    if kind == "dict":
        for key, inner in value.items():
            _check_plain(inner, f"{path}/{key}" if path else key)
    elif kind in ("list", "tuple"):
        for index, inner in enumerate(value):
            _check_plain(inner, f"{path}/{index}")
    elif kind == "plain" and not isinstance(value, (str, int, float, bool, type(None))):
        raise TypeError(
            f"the denoiser's argument {path} is a {type(value).__name__}; reconstruction needs plain arguments"
        )
