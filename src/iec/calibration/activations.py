"""The passage that finds the quantizers: every evaluation is made as it is, and beside it observed with rounded activations.

Under a cache the observed evaluation is the one that a run will make: at a reuse step the shallow part alone, on the feature that
full precision left at the last whole pass, compensated. The layers that it skips are needed there all the same, by corrections,
which are whole passes; so they are observed by a third evaluation.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from iec.artifact.calibration import CacheTables, Quantization
from iec.caches.cachequant import CacheQuant, Compensation
from iec.caches.cut import Cut, Feature
from iec.calibration.journal import State, within
from iec.calibration.passage import Call, Passage
from iec.calibration.tuples import Capture
from iec.pipeline.installation import Installation
from iec.plan import CachePlan
from iec.quant.config import QuantConfig
from iec.quant.observe import Observers
from iec.quant.reconstruct import Reconstruction
from iec.quant.sites import check_patterns, find


class Reuse:
    """A cache driven by hand along full-precision trajectories: whole passes leave their feature, reuse passes get it back."""

    def __init__(self, cut: Cut, tables: CacheTables) -> None:
        self.cut, self.plan = cut, CachePlan(tables.refresh, len(tables.gain))
        config = CacheQuant.from_dict(tables.config)
        self._compensate = Compensation(tables) if config.compensates_cache else lambda _, feature: feature
        self._features: dict[int, Feature] = {}

    def __contains__(self, call: Call) -> bool:
        """Whether a run reuses a feature at `call`: at a reuse step, if the last whole pass had a call of this number."""
        return call.step not in self.plan and call.number in self._features

    def whole(self, call: Call) -> Any:
        """Make the evaluation whole; at a refresh step its feature is kept."""
        self.cut.whole(functools.partial(self._keep, call.number) if call.step in self.plan else None)
        return self.cut.evaluate(call.forward, call.args, call.kwargs)

    def _keep(self, number: int, feature: Feature) -> None:
        if number == 0:
            self._features = {}
        self._features[number] = feature

    def feature(self, call: Call) -> Feature:
        """What is reused at a reuse step."""
        return self._compensate(call.step, self._features[call.number])

    def shallow(self, call: Call) -> Any:
        """Make the evaluation of a reuse step."""
        self.cut.reuse(self.feature(call))
        return self.cut.evaluate(call.forward, call.args, call.kwargs)


class Activations(Passage):
    """The observers on a pipeline, from `install()` to `remove()`.

    The observed evaluation is thrown away, so the trajectory is that of full precision. `captures` keep some of the arguments.

    Args:
        held: the pipeline's installation.
        config: what is quantized and how.
        num_steps: T.
        reuse: the cache that the quantized model will run with, None without.
    """

    what = "samples"

    def __init__(self, held: Installation, config: QuantConfig, num_steps: int, reuse: Reuse | None = None) -> None:
        super().__init__(held)
        check_patterns(self.models.values(), config)
        self.observers = {
            name: Observers(find(model, config, prefix=name), config, num_steps) for name, model in self.models.items()
        }
        self.reuse = reuse
        self.captures: dict[str, Capture] = {}

    def capture(self, num_samples: int, options: Reconstruction) -> None:
        """Keep tuples for reconstruction from now on."""
        for name, model in self.models.items():
            steps = len(next(iter(self.observers[name].searches().values())).scale)
            reused = () if self.reuse is None else [step for step in range(steps) if step not in self.reuse.plan]
            self.captures[name] = Capture(model, num_samples, steps, options.num_tuples, options.seed, reused)

    def install(self) -> None:
        """Stand in for the forwards of the layers and of the denoisers."""
        for observers in self.observers.values():
            observers.install()
        if self.reuse is not None:
            self.reuse.cut.install()
        super().install()

    def remove(self) -> None:
        """Step aside."""
        super().remove()
        if self.reuse is not None:
            self.reuse.cut.remove()
        for observers in self.observers.values():
            observers.remove()

    def evaluate(self, name: str, call: Call) -> Any:
        """Observe the evaluation, then make it in full precision."""
        observers, reuse = self.observers[name], self.reuse
        if name in self.captures:
            feature = reuse.feature(call) if reuse is not None and call in reuse else None
            assert feature is None or isinstance(feature, torch.Tensor)  # a UNet's
            self.captures[name].take(call.step, *self.samples, call.args, call.kwargs, feature)
        if reuse is not None and call in reuse:
            with observers.learning(call.step) as seen:
                reuse.shallow(call)
            with observers.learning(call.step, but=seen):
                call()
        else:
            with observers.learning(call.step):
                call()
        return call() if reuse is None else reuse.whole(call)

    def learnt(self) -> State:
        """See `Passage`."""
        tensors = {f"{name}/{key}": value for name, o in self.observers.items() for key, value in o.state().items()}
        templates = {}
        for name, capture in self.captures.items():
            held, templates[name] = capture.state()
            tensors |= {f"tuples/{name}/{key}": value for key, value in held.items()}
        return tensors, templates

    def relearn(self, tensors: dict[str, Tensor], plain: Any) -> None:
        """See `Passage`."""
        for name, observers in self.observers.items():
            observers.load_state(within(f"{name}/", tensors))
        for name, capture in self.captures.items():
            capture.load_state(within(f"tuples/{name}/", tensors), plain[name])

    def outputs(self) -> dict[str, str]:
        """The last layer of each denoiser ("conv_out")."""
        return {
            name: site.name.removeprefix(f"{name}.")
            for name, observers in self.observers.items()
            for site in observers.sites.layers
            if site.last
        }

    def result(self, config: QuantConfig) -> Quantization:
        """The quantized layers and products of all denoisers."""
        layers, products, skipped = {}, {}, {}
        for observers in self.observers.values():
            of_one = observers.result()
            layers |= of_one[0]
            products |= of_one[1]
            skipped |= {**observers.sites.skipped, **of_one[2]}
        return Quantization(config.as_dict(), layers, products, skipped)
