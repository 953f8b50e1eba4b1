"""What full precision does along the trajectories of a calibration, recorded by hooks; and regressions of it by another way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

import iec
from iec.pipeline.batches import batches


class Seen(NamedTuple):
    """One evaluation: the denoiser's first argument, the output of its last layer, the cached feature and its taker's input."""

    sample: Tensor
    last: Tensor
    feature: Tensor | None
    taken: Tensor | None


def runs(pipe: Any, settings: dict[str, Any]) -> Iterator[Any]:
    """Call the pipeline as a calibration with these settings does, one batch at a time."""
    settings = dict(settings)
    seed, count, steps, size = (
        settings.pop(key) for key in ("seed", "num_samples", "num_inference_steps", "batch_size")
    )
    for call in batches(pipe, range(seed, seed + count), steps, size, "latent", **settings):
        yield pipe(**call.arguments)


def trajectory(pipe: Any, model: nn.Module, last: str, settings: dict[str, Any], cache: Any = None) -> list[list[Seen]]:
    """What is seen in each batch, evaluation by evaluation; the feature where `cache` (a CacheQuant) cuts the model."""
    now: dict[str, Tensor] = {}
    found: list[list[Seen]] = []

    def feature(_: Any, __: Any, output: Any) -> None:
        now["feature"] = (output[0] if isinstance(output, tuple) else output).clone()

    def taken(_: Any, args: Any) -> None:
        now["taken"] = args[0].clone()

    def out(_: Any, __: Any, output: Tensor) -> None:
        now["last"] = output.clone()

    def whole(_: Any, args: Any, kwargs: Any, __: Any) -> None:
        sample = args[0] if args else kwargs["hidden_states"]
        found[-1].append(Seen(sample.clone(), now["last"], now.get("feature"), now.get("taken")))

    hooks = [model.get_submodule(last).register_forward_hook(out)]
    hooks.append(model.register_forward_hook(whole, with_kwargs=True))
    if cache is not None:
        site = cache.locate(model)
        hooks += [site.source.register_forward_hook(feature), site.consumer.register_forward_pre_hook(taken)]
    found.append([])
    for _ in runs(pipe, settings):
        found.append([])
    for hook in hooks:
        hook.remove()
    return found[:-1]


def at(seen: list[list[Seen]], step: int, what: str) -> Tensor:
    """What was seen at a step in all batches, one after the other."""
    return torch.cat([getattr(batch[step], what) for batch in seen])


def rows(x: Tensor, channel_dim: int = 1) -> Tensor:
    """(…, C, …) → (N, C) in float64."""
    return x.double().movedim(channel_dim, -1).flatten(0, -2)


def regression(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and offset of y on x, (N, C) each, channel by channel: solved as least-squares systems."""
    system = torch.stack([x, torch.ones_like(x)], -1).movedim(1, 0)  # (C, N, 2)
    solved = torch.linalg.lstsq(system, y.T[..., None]).solution[..., 0]
    return solved[:, 0], solved[:, 1]


def compensated(made: iec.Calibration, seen: list[list[Seen]], step: int) -> Tensor:
    """What a full-precision run puts in the place of the feature at `step`; the feature itself at a whole pass."""
    tables = made.cache
    assert tables is not None
    feature = at(seen, max(start for start in tables.refresh if start <= step), "feature")
    gain, offset = (table[step].view(1, -1, 1, 1) for table in (tables.gain, tables.offset))
    return feature if step in tables.refresh else gain * feature + offset


class GuidedDDIM(diffusers.DDIMPipeline):
    """DDIM whose guidance calls the denoiser twice in a step, instead of once with twice the rows."""

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Any = None,
        num_inference_steps: int = 50,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> Any:
        shape = (batch_size, 3, 8, 8)
        x = diffusers.utils.torch_utils.randn_tensor(shape, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            one, two = self.unet(x, t).sample, self.unet(x.flip(1), t).sample
            x = self.scheduler.step(one + 0.5 * (one - two), t, x).prev_sample
        return (x,)
