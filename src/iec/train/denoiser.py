"""Training of an ε-predicting UNet: the loss, the preview grid, and the export as a diffusers pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from iec.train.recipe import TrainRecipe


class DenoiserTask:
    """ε-prediction with an optional min-SNR weight (Hang et al. 2023): w = min(snr, γ) / snr."""

    def __init__(self, recipe: TrainRecipe) -> None:
        from diffusers import DDIMScheduler, UNet2DModel

        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.model = UNet2DModel(**recipe.model)
        self.scheduler: Any = DDIMScheduler(**recipe.scheduler)

    def loss(
        self, model: torch.nn.Module, pixels: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        batch = len(pixels)
        count = self.scheduler.config.num_train_timesteps
        # Stratified over the batch: the same distribution as independent draws, with less variance of the loss.
        strata = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        steps = (strata[torch.randperm(batch, generator=generator)] * count).long().clamp_(0, count - 1)
        noise = torch.randn(pixels.shape, generator=generator).to(pixels)
        noisy = self.scheduler.add_noise(pixels, noise, steps)
        predicted = model(noisy, steps.to(pixels.device), return_dict=False)[0]
        each = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        if self.recipe.snr_gamma > 0:
            kept = self.scheduler.alphas_cumprod[steps]
            snr = (kept / (1 - kept)).to(each)
            each = each * snr.clamp(max=self.recipe.snr_gamma) / snr
        return each.mean()

    def pipeline(self, model: torch.nn.Module) -> Any:
        """The denoiser as a diffusers DDIMPipeline."""
        from diffusers import DDIMPipeline

        return DDIMPipeline(unet=model, scheduler=self.scheduler)  # pyright: ignore[reportArgumentType]

    def preview(self, model: torch.nn.Module, folder: Path, step: int) -> str:
        from iec.evaluate.images import grid

        pipe = self.pipeline(model)
        pipe.set_progress_bar_config(disable=True)
        count = 36
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        images = pipe(batch_size=count, generator=generators, num_inference_steps=25).images
        file = folder / f"samples-{step:06d}.png"
        grid(images, columns=9, scale=2).save(file)
        return f"samples in {file}"

    def export(self, model: torch.nn.Module, folder: Path) -> None:
        # Loaded from files by diffusers itself: config, scheduler and safetensors weights.
        self.pipeline(model).save_pretrained(folder, safe_serialization=True)
