"""First passage of a cache's calibration: how the cached feature changes from step to step, in full precision.

Of every pair of steps that one group of a plan could hold, two things are kept: the distance of their features, from which the
plan is made (DPS, METHOD 4.1), and the moments of their per-channel regression, from which the compensation is (DEC, METHOD 4.3).
So one passage serves whatever plan comes out, and no more features are held than a group may be long.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from iec.artifact.calibration import CacheTables
from iec.caches.cachequant import CacheQuant
from iec.caches.cut import Cut, Feature
from iec.calibration.journal import State
from iec.calibration.passage import Call, Passage
from iec.core.regression import PairMoments
from iec.core.segmentation import group_costs
from iec.pipeline.installation import Installation


class Features(Passage):
    """Distances and moments of the features of one denoiser, over samples.

    Args:
        held: the pipeline's installation.
        config: where the model is cut, and which plans may come out.
        num_steps: T.
    """

    what = "features"

    def __init__(self, held: Installation, config: CacheQuant, num_steps: int) -> None:
        super().__init__(held)
        self.component, self.cut = cut_of(self.models, config)
        self.config, self.num_steps = config, num_steps
        self.longest = config.longest(num_steps)
        self.first = 0  # the step that the runs begin at
        self.distances = torch.zeros(num_steps, self.longest, dtype=torch.float64)
        self.moments: PairMoments | None = None
        self._window: dict[int, dict[int, Tensor]] = {}  # of each call of a step, the features of the steps before

    def install(self) -> None:
        """Stand in for the forwards, and cut the model."""
        self.cut.install()
        super().install()

    def remove(self) -> None:
        """Step aside."""
        super().remove()
        self.cut.remove()
        self._window = {}

    def begin(self, first: int, count: int) -> None:
        """Other samples: the features of those before say nothing about them."""
        super().begin(first, count)
        self._window = {}

    def evaluate(self, name: str, call: Call) -> Any:
        """A whole pass, whose feature is compared with those before."""
        assert self.held.state.run is not None
        self.first = self.held.state.run.begin
        self.cut.whole(functools.partial(self._take, call))
        return self.cut.evaluate(call.forward, call.args, call.kwargs)

    def _take(self, call: Call, feature: Feature) -> None:
        assert isinstance(feature, Tensor)
        feature = feature.detach()
        if self.moments is None:
            self.moments = PairMoments(feature.shape[1], (self.num_steps, self.longest))
        window = self._window.setdefault(call.number, {})
        for start in [start for start in window if start <= call.step - self.longest]:
            del window[start]
        for start, before in window.items():
            if self.config.pairs(start, call.step, self.num_steps, self.first):
                lag = call.step - start
                self.distances[start, lag] += float((feature - before).abs().sum(dtype=torch.float64))
                self.moments.update(before, feature, (start, lag))
        window[call.step] = feature.clone()

    def learnt(self) -> State:
        """See `Passage`."""
        return {"distances": self.distances, **({} if self.moments is None else self.moments.state())}, self.first

    def relearn(self, tensors: dict[str, Tensor], plain: Any) -> None:
        """See `Passage`."""
        self.distances, self.first = tensors["distances"].clone(), plain
        moments = {name: value for name, value in tensors.items() if name != "distances"}
        self.moments = PairMoments.from_state(moments) if moments else None

    def result(self) -> CacheTables:
        """The plan, and the compensation at its reuse steps. Raises RuntimeError where the denoiser never ran."""
        if self.moments is None:
            raise RuntimeError(
                f"{self.component} was never evaluated during the calibration, so there is nothing to cache"
            )
        plan = self.config.plan(self.num_steps, group_costs(self.distances), self.first)
        fit = self.moments.fit()
        gain = torch.ones(self.num_steps, self.moments.channels)
        offset = torch.zeros_like(gain)
        if self.config.compensates_cache:
            for step in range(self.num_steps):
                start = plan.reference(step)
                if start != step:
                    gain[step] = fit.gain[start, step - start].float()
                    offset[step] = fit.offset[start, step - start].float()
        return CacheTables(self.component, self.config.as_dict(), self.cut.site.branch, plan.refresh, gain, offset)


def cut_of(models: dict[str, Any], config: CacheQuant) -> tuple[str, Cut]:
    """The one denoiser, and where it is cut. Raises TypeError where there are several, or it cannot be cut."""
    if len(models) != 1:
        raise TypeError(
            f"the pipeline has several denoisers ({', '.join(models)}); a cache takes one; leave it out for this pipeline"
        )
    ((component, model),) = models.items()
    return component, Cut(model, config.locate(model))
