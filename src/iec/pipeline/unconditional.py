"""An unconditional pipeline that takes any scheduler.

diffusers' DDIMPipeline works with DDIM alone and its DDPMPipeline with the few schedulers that need no input scaling, so
comparing solvers on an unconditional model needs a loop that asks the scheduler what it takes.
"""

# No postponed annotations: when a saved pipeline is loaded, older versions of diffusers look up the types of __init__.
import inspect
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor


class UnconditionalPipeline(DiffusionPipeline):
    """Images of a `UNet2DModel` by any diffusers scheduler; called like DDIMPipeline.

    `eta` and `generator` go to schedulers that take them. With DDIM the images are DDIMPipeline's, bit for bit.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Sample `batch_size` images; `output_type` is "pil", or "np" for floats (B, H, W, C) in 0..1.

        Raises ValueError when there are not as many generators as images.
        """
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for {batch_size} images; give one each, or a single one")
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config.in_channels, height, width)
        self.scheduler.set_timesteps(num_inference_steps)
        image = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        image = image * self.scheduler.init_noise_sigma
        taken = inspect.signature(self.scheduler.step).parameters
        extra = {key: value for key, value in {"eta": eta, "generator": generator}.items() if key in taken}
        for t in self.progress_bar(self.scheduler.timesteps):
            model_output = self.unet(self.scheduler.scale_model_input(image, t), t).sample
            image = self.scheduler.step(model_output, t, image, **extra).prev_sample
        image = (image / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            image = self.numpy_to_pil(image)
        return ImagePipelineOutput(images=image) if return_dict else (image,)
