"""A class-conditional latent pipeline, as the ImageNet model of latent diffusion needs: diffusers has none.

The class is one token of the cross-attention's context, from a table of embeddings whose last row is the null class.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn


class ClassEmbedder(ModelMixin, ConfigMixin):
    """Class numbers (B,) to a context (B, 1, `dim`); the class after the last of `num_classes` is the null class."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, num_classes: int = 1000, dim: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, dim)

    def forward(self, classes: Tensor) -> Tensor:
        """Embed `classes`, integers in 0 … num_classes."""
        return self.embedding(classes)[:, None]


class ClassConditionalLatentPipeline(DiffusionPipeline):
    """Images of given classes by latent diffusion with classifier-free guidance, by any diffusers scheduler.

    `vqvae`: an autoencoder (`VQModel` or `AutoencoderKL`), `unet`: a `UNet2DConditionModel`, `class_embedder`: the context.
    With guidance the two halves of a batch are the null class and the classes, in one evaluation.
    """

    model_cpu_offload_seq = "class_embedder->unet->vqvae"

    def __init__(self, vqvae: Any, unet: Any, class_embedder: ClassEmbedder, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(vqvae=vqvae, unet=unet, class_embedder=class_embedder, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int],
        guidance_scale: float = 1.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Sample an image for each of `class_labels`; `output_type` is "pil", or "np" for floats (B, H, W, C) in 0..1.

        A `guidance_scale` of 1 evaluates the classes alone. Raises ValueError for classes that are not there, and when there
        are not as many generators as images.
        """
        labels = [class_labels] if isinstance(class_labels, int) else list(class_labels)
        known = self.class_embedder.config.num_classes
        strange = [
            label for label in labels if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < known
        ]
        if strange or not labels:
            raise ValueError(f"class_labels are {labels}, expected at least one number in 0 … {known - 1}")
        if isinstance(generator, list) and len(generator) != len(labels):
            raise ValueError(f"{len(generator)} generators for {len(labels)} images; give one each, or a single one")
        guided, device = guidance_scale != 1, self._execution_device
        classes = torch.tensor([known] * len(labels) * guided + labels, device=device)
        context = self.class_embedder(classes)
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (len(labels), self.unet.config.in_channels, height, width)
        self.scheduler.set_timesteps(num_inference_steps)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        latents = latents * self.scheduler.init_noise_sigma
        taken = inspect.signature(self.scheduler.step).parameters
        extra = {key: value for key, value in {"eta": eta, "generator": generator}.items() if key in taken}
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(latents, t)
            given = torch.cat([scaled, scaled]) if guided else scaled
            output = self.unet(given, t, encoder_hidden_states=context).sample
            if guided:
                without, with_class = output.chunk(2)
                output = without + guidance_scale * (with_class - without)
            latents = self.scheduler.step(output, t, latents, **extra).prev_sample
        image = self.vqvae.decode(latents / self.vqvae.config.scaling_factor).sample
        image = (image / 2 + 0.5).clamp(0, 1).float().cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            image = self.numpy_to_pil(image)
        return ImagePipelineOutput(images=image) if return_dict else (image,)
