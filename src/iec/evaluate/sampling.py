"""Images of a pipeline, each from its own seed, and what they cost."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from iec.pipeline.adapters import denoisers
from iec.pipeline.batches import batches
from iec.pipeline.installation import installed


def sample(
    pipe: Any,
    seeds: Sequence[int],
    num_inference_steps: int,
    batch_size: int = 16,
    *,
    progress: Callable[[int, int], None] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Images (N, C, H, W), uint8 on the CPU, one per seed, by the pipeline's own call.

    Every image has a CPU generator of its own, so it depends on its seed alone and not on the batch or the device (up
    to the rounding of the kernels). Further `kwargs` go to the pipeline; prompts and class labels may be one value for
    all images or a list with one per image. Values are rounded as x * 255 + 0.5. `progress(done, N)` is called after
    each batch.

    Raises ValueError for no seeds, a bad batch size or number of steps, arguments that the pipeline does not take or
    lacks; RuntimeError when images hold NaN or infinity.
    """
    images: list[torch.Tensor] = []
    done = 0
    for batch in batches(pipe, seeds, num_inference_steps, batch_size, "np", **kwargs):
        images.append(_to_uint8(pipe(**batch.arguments).images, batch.seeds))
        done += len(batch.seeds)
        if progress is not None:
            progress(done, len(seeds))
    return torch.cat(images)


def _to_uint8(images: Any, seeds: Sequence[int]) -> torch.Tensor:
    """The pipeline's floats (B, H, W, C) in 0..1 -> uint8 (B, C, H, W)."""
    pixels = torch.as_tensor(images).float()
    bad = [seed for seed, image in zip(seeds, pixels, strict=True) if not bool(image.isfinite().all())]
    if bad:
        raise RuntimeError(f"the images of seeds {bad} hold NaN or infinity; try a wider dtype, or the plain model")
    return (pixels * 255 + 0.5).clamp(0, 255).to(torch.uint8).permute(0, 3, 1, 2).contiguous()


def with_scheduler(pipe: Any, name: str, **changes: Any) -> Any:
    """A pipeline with the components of `pipe`, but the scheduler class `name` of diffusers or ours, made from its config.

    `changes` override entries of the config. Unconditional pipelines become `UnconditionalPipeline`, which takes them all;
    `pipe` itself is left as it is. Raises ValueError when there is no such scheduler.
    """
    import diffusers

    scheduler = scheduler_like(pipe.scheduler, name, **changes)
    if isinstance(pipe, (diffusers.DDIMPipeline, diffusers.DDPMPipeline)):
        from iec.pipeline.unconditional import UnconditionalPipeline

        made: Any = UnconditionalPipeline(pipe.unet, scheduler)
    else:
        made = type(pipe)(**{**pipe.components, "scheduler": scheduler})
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return made


def scheduler_like(scheduler: Any, name: str, **changes: Any) -> Any:
    """diffusers' scheduler class `name`, or ours, made from the config of `scheduler` with some `changes`.

    Raises ValueError when there is no such scheduler.
    """
    import diffusers

    from iec.schedule.quadratic import QuadraticDDIMScheduler

    ours = {QuadraticDDIMScheduler.__name__: QuadraticDDIMScheduler}
    kind = ours.get(name) or (getattr(diffusers, name, None) if name.endswith("Scheduler") else None)
    if kind is None or not hasattr(kind, "from_config"):
        raise ValueError(
            f"diffusers has no scheduler {name!r}; known are DDIMScheduler, DPMSolverMultistepScheduler, "
            "HeunDiscreteScheduler, UniPCMultistepScheduler and others, and iec's QuadraticDDIMScheduler: "
            "https://huggingface.co/docs/diffusers/api/schedulers/overview"
        )
    return kind.from_config(scheduler.config, **changes)


@dataclasses.dataclass
class Cost:
    """What ran within `measure`: `evaluations` (denoiser forwards, over all batches) and wall-clock `seconds`."""

    evaluations: int = 0
    seconds: float = 0.0


@contextlib.contextmanager
def measure(pipe: Any) -> Iterator[Cost]:
    """Count the denoiser evaluations of `pipe` and the seconds until the end of the block.

    Evaluations are counted by a forward hook on every denoiser, not by IEC itself; calls that IEC spares because a step
    has converged are not evaluations. On an accelerator the clock stops only when its queue is empty. The seconds stand
    when the block ends, also by an exception.

    Raises TypeError for a pipeline without a torch denoiser.
    """
    models = denoisers(pipe)
    for name, model in models.items():
        if not isinstance(model, torch.nn.Module):
            raise TypeError(
                f"{type(pipe).__name__}.{name} is a {type(model).__name__}, not a torch module, so its evaluations "
                "cannot be counted by a hook; read them from iec.summary(pipe)"
            )
    cost = Cost()
    spared = dict.fromkeys(models, 0)

    def hook(name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            held = installed(pipe)
            now = held.gates[name].spared if held is not None else 0
            # The gate's count starts anew with each run; only a higher one means that this call was answered by it.
            if now <= spared[name]:
                cost.evaluations += 1
            spared[name] = now

        return count

    handles = [model.register_forward_hook(hook(name)) for name, model in models.items()]
    devices = {p.device for model in models.values() for p in model.parameters() if p.device.type == "cuda"}
    started = _now(devices)
    try:
        yield cost
    finally:
        cost.seconds = _now(devices) - started
        for handle in handles:
            handle.remove()


def _now(devices: set[torch.device]) -> float:
    for device in devices:
        torch.cuda.synchronize(device)
    return time.perf_counter()
