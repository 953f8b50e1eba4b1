"""DDIM at quadratically spaced timesteps, as on CIFAR-10 in the DDIM paper (Song et al. 2021, appendix D.2) and in IEC's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

# diffusers loads a pipeline's component if its module has the base class that the component is of.
__all__ = ["QuadraticDDIMScheduler", "SchedulerMixin"]

SHARE = 0.8  # of the training steps: where the first timestep is


class QuadraticDDIMScheduler(DDIMScheduler):
    """diffusers' `DDIMScheduler` at the timesteps ⌊(j/(T−1) · √(0.8 N))²⌋, j = T − 1 … 0, N being the training steps, in the
    floating point of numpy.linspace, as released (for some T a square of a whole number comes out one lower).

    The lowest of them coincide (for T = 100 and N = 1000 there are 96); a step between equal timesteps changes nothing and is
    left out, so there may be fewer steps than asked for. Each goes to the next timestep of the list, the last one to ᾱ = 1 (or
    what `set_alpha_to_one=False` says). `timestep_spacing` and `steps_offset` of the config have no effect.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps. Raises ValueError for fewer than 2 of them, or more than training steps."""
        count = self.config.num_train_timesteps
        if not 2 <= num_inference_steps <= count:
            raise ValueError(f"num_inference_steps is {num_inference_steps}, expected 2 … {count}")
        self.num_inference_steps = num_inference_steps
        places = np.linspace(0, np.sqrt(SHARE * count), num_inference_steps) ** 2
        found = np.unique(places.astype(np.int64))[::-1].copy()
        self._next = dict(zip(found.tolist(), [*found[1:].tolist(), -1], strict=True))
        self.timesteps = torch.from_numpy(found).to(device)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step, by equations (12) and (16) of the DDIM paper; arguments and result are `DDIMScheduler.step`'s.

        Raises ValueError before `set_timesteps`, for a timestep that is not in the list, and for two sources of noise.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        now = int(timestep)
        if now not in self._next:
            raise ValueError(f"timestep is {now}, expected one of {list(self._next)}")
        if variance_noise is not None and generator is not None:
            raise ValueError("give either generator or variance_noise, not both")
        after = self._next[now]
        alpha = self.alphas_cumprod[now]
        alpha_after = self.alphas_cumprod[after] if after >= 0 else self.final_alpha_cumprod
        original, noise = self._predicted(model_output, sample, alpha)
        if self.config.thresholding:
            original = self._threshold_sample(original)
        elif self.config.clip_sample:
            original = original.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        if use_clipped_model_output:
            noise = (sample - alpha**0.5 * original) / (1 - alpha) ** 0.5
        deviation = eta * self._get_variance(now, after) ** 0.5
        moved = alpha_after**0.5 * original + (1 - alpha_after - deviation**2) ** 0.5 * noise
        if eta > 0:
            if variance_noise is None:
                shape, device, dtype = model_output.shape, model_output.device, model_output.dtype
                variance_noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
            moved = moved + deviation * variance_noise
        return (
            DDIMSchedulerOutput(prev_sample=moved, pred_original_sample=original) if return_dict else (moved, original)
        )

    def _predicted(
        self, output: torch.Tensor, sample: torch.Tensor, alpha: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x_0 and ε from what the model predicts."""
        signal, spread = alpha**0.5, (1 - alpha) ** 0.5
        kind = self.config.prediction_type
        if kind == "epsilon":
            return (sample - spread * output) / signal, output
        if kind == "sample":
            return output, (sample - signal * output) / spread
        if kind == "v_prediction":
            return signal * sample - spread * output, signal * output + spread * sample
        raise ValueError(f"prediction_type is {kind!r}, expected epsilon, sample or v_prediction")
