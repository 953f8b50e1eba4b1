"""Stand-ins have the architecture of the paper's models; the class-conditional pipeline does what guidance says."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import nn

import iec
from iec.bench import standins
from iec.evaluate.sampling import sample

CONDITIONS: dict[str, dict[str, Any]] = {
    "ldm4-imagenet": {"class_labels": [3, 999]},
    "stable-diffusion-v1-4": {"prompt": ["a photo of the cat", "a cat"]},
}


@functools.cache
def made(name: str) -> Any:
    return standins.build(name, sample_size=16)


def images(pipe: Any, name: str, seeds: tuple[int, ...] = (0, 1), batch_size: int = 2, **kwargs: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return sample(pipe, seeds, 3, batch_size, **{**CONDITIONS.get(name, {}), **kwargs})


def alike(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether images are equal but for rounding, which random weights and a quantized latent can enlarge here and there."""
    return first.shape == second.shape and bool((first.int() - second.int()).abs().float().mean() < 0.5)


# Levels, resnets on the way up, levels with attention, latent channels, pixels for a latent: METHOD 1.5, the models' configs.
@pytest.mark.parametrize(
    ("name", "levels", "attention", "channels", "factor"),
    [
        ("ddpm-cifar10", 4, [1], 3, 1),
        ("ldm8-church", 5, [0, 1, 2, 3], 4, 8),
        ("ldm4-bedroom", 4, [1, 2, 3], 3, 4),
        ("ldm4-imagenet", 4, [1, 2, 3], 3, 4),
        ("stable-diffusion-v1-4", 4, [0, 1, 2], 4, 8),
    ],
)
def test_stand_ins_have_the_architecture(
    name: str, levels: int, attention: list[int], channels: int, factor: int
) -> None:
    pipe = made(name)
    blocks = pipe.unet.down_blocks
    assert len(blocks) == levels
    assert sum(len(block.resnets) for block in pipe.unet.up_blocks) == 3 * levels  # church 15, the others 12
    assert [index for index, block in enumerate(blocks) if getattr(block, "attentions", None)] == attention
    assert pipe.unet.config.in_channels == channels
    autoencoder = getattr(pipe, "vqvae", None) or getattr(pipe, "vae", None)
    assert 2 ** (len(autoencoder.config.block_out_channels) - 1 if autoencoder else 0) == factor
    assert sum(p.numel() for p in pipe.unet.parameters()) < 5e6
    assert not any(isinstance(m, nn.Dropout) and m.training for m in pipe.unet.modules())
    shown = images(pipe, name)
    assert shown.shape == (2, 3, 16 * factor, 16 * factor) and shown.float().std() > 5
    assert alike(
        shown[1:], images(pipe, name, (1,), **{key: value[1:] for key, value in CONDITIONS.get(name, {}).items()})
    )


@pytest.mark.parametrize("name", ["ddpm-cifar10", "ldm8-church", "ldm4-imagenet", "stable-diffusion-v1-4"])
def test_stand_ins_load_from_their_folder(name: str, tmp_path: Path) -> None:
    pipe = made(name)
    pipe.save_pretrained(tmp_path)
    again = iec.load(str(tmp_path))
    assert type(again) is type(pipe)
    assert alike(images(again, name), images(pipe, name))


def test_stand_ins_depend_on_their_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first, same, other = (standins.build("ddpm-cifar10", seed=seed, sample_size=16).unet for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    weights = [next(iter(unet.parameters())) for unet in (first, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", ["ddpm-cifar10", "ldm8-church", "ldm4-imagenet"])
def test_stand_ins_take_caches_and_corrections(name: str) -> None:
    pipe = made(name)
    plain = images(pipe, name)
    try:
        iec.cache(pipe, iec.DeepCache(2, branch=2 if name == "ddpm-cifar10" else 0))
        cached = images(pipe, name)
        iec.enable(pipe, steps="refresh")
        corrected = images(pipe, name)
        assert iec.summary(pipe).evaluations > 3
    finally:
        iec.undo(pipe)
    assert not torch.equal(cached, plain) and not torch.equal(corrected, cached)
    assert torch.equal(images(pipe, name), plain)


def test_unknown_stand_ins_and_sizes() -> None:
    with pytest.raises(ValueError, match="no stand-in 'x'; known are ddpm-cifar10, "):
        standins.build("x")
    with pytest.raises(ValueError, match="sample_size is 20, expected a multiple of 16"):
        standins.build("ddpm-cifar10", sample_size=20)


def test_guidance_goes_from_the_null_class_to_the_class() -> None:
    pipe = made("ldm4-imagenet")
    seen: list[torch.Tensor] = []
    handle = pipe.unet.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(torch.stack([args[0], output.sample])), with_kwargs=True
    )
    context: list[torch.Tensor] = []
    inner = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: context.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    try:
        done = pipe(
            [5], guidance_scale=3.0, generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np"
        )
    finally:
        handle.remove()
        inner.remove()
    assert done.images.shape == (1, 64, 64, 3)
    (given, output), (following, _) = seen
    table = pipe.class_embedder.embedding.weight
    assert torch.equal(context[0][:, 0], table[[1000, 5]]), "the null class comes first, then the class"
    assert torch.equal(given[0], given[1])
    guided = output[:1] + 3.0 * (output[1:] - output[:1])
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(2)
    expected = scheduler.step(guided, scheduler.timesteps[0], given[:1]).prev_sample
    assert torch.allclose(following[:1], expected, atol=1e-5)


def test_without_guidance_the_class_alone_is_evaluated() -> None:
    pipe, name = made("ldm4-imagenet"), "ldm4-imagenet"
    batches: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    try:
        alone = images(pipe, name, guidance_scale=1.0)
        guided = images(pipe, name)
    finally:
        handle.remove()
    assert batches == [2, 2, 2, 4, 4, 4] and not torch.equal(alone, guided)
    assert not torch.equal(images(pipe, name, class_labels=[3, 3]), guided)


def test_class_conditional_pipelines_take_other_solvers() -> None:
    pipe = made("ldm4-imagenet")
    other = type(pipe)(
        **{**pipe.components, "scheduler": DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)}
    )
    assert images(other, "ldm4-imagenet").float().std() > 5


@pytest.mark.parametrize("labels", [[1000], [-1], [True], [], [1.5]])
def test_classes_that_are_not_there(labels: list[Any]) -> None:
    with pytest.raises(ValueError, match="class_labels are"):
        made("ldm4-imagenet")(labels, num_inference_steps=1)


def test_as_many_generators_as_images() -> None:
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        made("ldm4-imagenet")([1, 2], generator=[torch.Generator()], num_inference_steps=1)
