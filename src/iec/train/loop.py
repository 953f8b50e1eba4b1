"""The training loop, the same for every task: EMA, checkpoints, resume after a kill, progress with ETA.

Randomness is a function of (seed, step) alone: the batch of a step, its noise and its augmentation. So a run that is
killed and resumed makes the weights of an uninterrupted run.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from iec.artifact import checkpoint
from iec.train.data import Images
from iec.train.recipe import TrainRecipe


class Task(Protocol):
    """What is trained.

    `loss` sees pixels as float (B, C, H, W) in -1..1 and labels (B,); it draws its noise from `generator`.
    """

    model: torch.nn.Module

    def loss(
        self, model: torch.nn.Module, pixels: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor: ...

    def preview(self, model: torch.nn.Module, folder: Path, step: int) -> str:
        """Look at the averaged model at `step`: may write files to `folder`; returns a short line for the log."""
        ...

    def export(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the finished, averaged model to `folder`."""
        ...


def _mixed(seed: int, number: int) -> int:
    """A seed for draw `number` of the run with `seed`. torch's CPU generator takes 32 bits and ignores all above."""
    return (seed * 0x9E3779B1 + number) % 2**32


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> torch.Tensor:
    """Indices (batch_size,) of optimiser step `step`: consecutive slices of one permutation of `count` per epoch."""
    first = step * batch_size
    indices: list[torch.Tensor] = []
    while batch_size > 0:
        epoch, offset = divmod(first, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(_mixed(seed, epoch)))
        taken = order[offset : offset + batch_size]
        indices.append(taken)
        first += len(taken)
        batch_size -= len(taken)
    return torch.cat(indices)


def augment(pixels: torch.Tensor, recipe: TrainRecipe, generator: torch.Generator) -> torch.Tensor:
    """Mirror and translate float images (B, C, H, W) at random, one draw per image; the border is -1 (black)."""
    batch, _, height, width = pixels.shape
    if recipe.flip:
        mirrored = torch.rand(batch, generator=generator) < 0.5
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    if recipe.shift:
        s = recipe.shift
        padded = torch.nn.functional.pad(pixels, (s, s, s, s), value=-1.0)
        dy, dx = torch.randint(0, 2 * s + 1, (2, batch), generator=generator)
        rows = dy[:, None] + torch.arange(height)
        columns = dx[:, None] + torch.arange(width)
        each = torch.arange(batch)[:, None, None]
        pixels = padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return pixels


def train(
    recipe: TrainRecipe,
    task: Task,
    images: Images,
    folder: str | os.PathLike[str],
    *,
    device: str = "cpu",
    progress: Callable[[int, int, float], None] | None = None,
    log: Callable[[str], None] = print,
    stop_after: int | None = None,
) -> Path:
    """Run `recipe` to its end in `folder` and return the folder of the exported model, `folder/model`.

    Continues from `folder/checkpoint.safetensors` when there is one; raises ValueError when that belongs to another
    run, RuntimeError when the loss is not finite. `progress(step, steps, loss)` is called after every step.
    `stop_after` ends the call at that step, checkpointed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "checkpoint.safetensors"
    model = task.model.to(device)
    if device == "cpu":  # measured: a few per cent faster convolutions
        model = model.to(memory_format=torch.channels_last)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    start = _restore(file, recipe, model, average, optimizer) if file.exists() else 0
    if start:
        log(f"resumed {recipe.name} at step {start} of {recipe.steps}")
    run = torch.compile(model) if recipe.compile else model
    end = min(recipe.steps, stop_after or recipe.steps)
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=recipe.precision == "bf16")

    model.train()
    for step in range(start, end):
        generator = torch.Generator().manual_seed(_mixed(recipe.seed, 2 * step))
        chosen = batch_indices(len(images.pixels), recipe.batch_size, step, recipe.seed)
        pixels = augment(images.pixels[chosen].float() / 127.5 - 1.0, recipe, generator)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step)
        torch.manual_seed(_mixed(recipe.seed, 2 * step + 1))  # dropout
        with autocast:
            loss = task.loss(run, pixels.to(device), images.labels[chosen].to(device), generator)
        if not math.isfinite(loss.item()):
            raise RuntimeError(
                f"{recipe.name}: the loss is {loss.item()} at step {step}; lower the learning rate and resume"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        optimizer.step()
        _update_average(average, model, min(recipe.ema, (1 + step) / (10 + step)))
        if progress is not None:
            progress(step + 1, recipe.steps, loss.item())
        done = step + 1
        if done % recipe.checkpoint_every == 0 or done == end:
            _save(file, recipe, done, model, average, optimizer)
        if done % recipe.sample_every == 0 or done == recipe.steps:
            log(f"step {done}: {task.preview(average, folder, done)}")
    if end == recipe.steps:
        task.export(average.to("cpu", memory_format=torch.contiguous_format), folder / "model")
    return folder / "model"


@torch.no_grad()
def _update_average(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """Exponential moving average of the parameters; buffers (batch statistics) are taken over as they are."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1.0 - decay)
    for held, new in zip(average.buffers(), model.buffers(), strict=True):
        held.copy_(new)


def _save(
    file: Path,
    recipe: TrainRecipe,
    step: int,
    model: torch.nn.Module,
    average: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
    checkpoint.save(file, tensors, {"fingerprint": recipe.fingerprint(), "name": recipe.name, "step": step})


def _restore(
    file: Path, recipe: TrainRecipe, model: torch.nn.Module, average: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    tensors, meta = checkpoint.load(file, fingerprint=recipe.fingerprint())

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    model.load_state_dict(part("model."))
    average.load_state_dict(part("average."))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in part("optimizer.").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(meta["step"])
