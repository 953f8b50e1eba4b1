"""A toy denoiser, the schedulers under test, a plain sampling loop, and a correction written without the proxy.

`reference` is the independent statement of the method: it never touches `iec`. It copies the scheduler before every
step and takes the step again from the copy, with the generators put back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

from iec.schedule.quadratic import QuadraticDDIMScheduler

SHAPE = (3, 2, 4, 4)


class Toy:
    """A cheap denoiser that depends on every pixel and on t, sample by sample; counts its evaluations.

    Its Jacobian is around one, so that corrections matter and a wrong one shows.
    """

    def __init__(self, gain: float = 1.5) -> None:
        size = math.prod(SHAPE[1:])
        generator = torch.Generator().manual_seed(3)
        self.mix = gain * torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
        self.phase = torch.randn(size, generator=generator, dtype=torch.float64)
        self.evaluations = 0

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        self.evaluations += 1
        time = torch.as_tensor(t).double().reshape(-1)[0] / 300
        hidden = x.flatten(1) @ self.mix.to(x.dtype) + (torch.cos(time + self.phase) * 0.7).to(x.dtype)
        return torch.tanh(hidden).reshape(x.shape)


def start(dtype: torch.dtype = torch.float64, batch: int = SHAPE[0]) -> Tensor:
    """The noise every run begins with; equal in every dtype up to rounding."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator, dtype=torch.float64)[:batch].to(dtype)


def generators(batch: int = SHAPE[0]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + index) for index in range(batch)]


@dataclass(frozen=True)
class Spec:
    """A scheduler as it is tested: `steps` is given to `set_timesteps`, `extra` to every `step`."""

    name: str
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    steps: int = 5
    random: bool = False  # step() takes a generator and draws from it
    generator: bool = False  # step() takes a generator

    @property
    def type(self) -> Any:
        return OURS.get(self.kind) or getattr(diffusers, self.kind)

    def make(self) -> Any:
        """A fresh scheduler; copied from one that was made once, as some take a second to make."""
        made = _MADE.get(self.name) if self.name else None
        if made is None:
            made = _MADE[self.name] = self.type(**self.config)
        return copy.deepcopy(made)

    def draws(self) -> list[torch.Generator] | None:
        return generators() if self.generator or self.random else None

    def arguments(self, generator: list[torch.Generator] | None) -> dict[str, Any]:
        return {**self.extra, **({"generator": generator} if generator is not None else {})}


OURS = {"QuadraticDDIMScheduler": QuadraticDDIMScheduler}
_MADE: dict[str, Any] = {}
_DPM = "DPMSolverMultistepScheduler"
SPECS = [
    Spec("ddim", "DDIMScheduler", {"clip_sample": False}, generator=True),
    Spec("ddim-clip", "DDIMScheduler", {"timestep_spacing": "trailing"}, generator=True),
    Spec("ddim-eta", "DDIMScheduler", {"clip_sample": False}, {"eta": 1.0}, random=True),
    Spec(
        "ddim-v",
        "DDIMScheduler",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        generator=True,
    ),
    Spec("ddim-parallel", "DDIMParallelScheduler", {"clip_sample": False}, generator=True),
    Spec("ddim-quadratic", "QuadraticDDIMScheduler", {"clip_sample": False}, generator=True),
    Spec("ddim-quadratic-eta", "QuadraticDDIMScheduler", extra={"eta": 1.0}, random=True),
    Spec("ddpm", "DDPMScheduler", random=True),
    Spec("ddpm-parallel", "DDPMParallelScheduler", random=True),
    Spec("pndm-plms", "PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    Spec("pndm-prk", "PNDMScheduler", {"skip_prk_steps": False}),
    Spec("euler", "EulerDiscreteScheduler", generator=True),
    Spec("euler-karras", "EulerDiscreteScheduler", {"use_karras_sigmas": True}, generator=True),
    Spec("euler-churn", "EulerDiscreteScheduler", extra={"s_churn": 2.0}, random=True),
    Spec("euler-ancestral", "EulerAncestralDiscreteScheduler", random=True),
    Spec("heun", "HeunDiscreteScheduler"),
    Spec("dpm-1s", "DPMSolverSinglestepScheduler", {"lower_order_final": True}, steps=6, generator=True),
    Spec(
        "dpm-1s-3",
        "DPMSolverSinglestepScheduler",
        {"solver_order": 3, "lower_order_final": True},
        steps=7,
        generator=True,
    ),
    Spec("dpm++2m", _DPM, generator=True),
    Spec("dpm++3m-karras", _DPM, {"solver_order": 3, "use_karras_sigmas": True}, generator=True),
    Spec("dpm++2m-heun", _DPM, {"solver_type": "heun", "euler_at_final": True}, generator=True),
    Spec("dpm++2m-sde", _DPM, {"algorithm_type": "sde-dpmsolver++"}, random=True),
    Spec("dpm-sde", "DPMSolverSDEScheduler", {"noise_sampler_seed": 5}),
    Spec("unipc", "UniPCMultistepScheduler"),
    Spec(
        "unipc-3",
        "UniPCMultistepScheduler",
        {"solver_order": 3, "predict_x0": False, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    ),
    Spec(
        "unipc-flow",
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ),
    Spec("deis", "DEISMultistepScheduler"),
    Spec("lcm", "LCMScheduler", random=True),
    Spec("tcd", "TCDScheduler", extra={"eta": 0.3}, random=True),
    Spec("flow-euler", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, generator=True),
    Spec("flow-euler-sde", "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    Spec("flow-heun", "FlowMatchHeunDiscreteScheduler", generator=True),
    Spec("edm-euler", "EDMEulerScheduler", {"sigma_max": 10.0}, generator=True),
    Spec("edm-dpm", "EDMDPMSolverMultistepScheduler", {"sigma_max": 10.0}, generator=True),
    Spec("kdpm2", "KDPM2DiscreteScheduler"),
    Spec("kdpm2-ancestral", "KDPM2AncestralDiscreteScheduler", random=True),
    Spec("lms", "LMSDiscreteScheduler"),
    Spec("sa-solver", "SASolverScheduler", random=True),
    Spec("ipndm", "IPNDMScheduler"),
]


def missing(spec: Spec) -> str | None:
    """The optional package without which this scheduler cannot be made, if it is not installed."""
    import importlib.util

    needed = {"DPMSolverSDEScheduler": "torchsde", "LMSDiscreteScheduler": "scipy"}.get(spec.kind)
    return needed if needed and importlib.util.find_spec(needed) is None else None


def sample(
    scheduler: Any,
    spec: Spec,
    denoise: Callable[[Tensor, Any], Tensor],
    x: Tensor,
    generator: list[torch.Generator] | None = None,
    on_step: Callable[[Any, Tensor], None] | None = None,
) -> Tensor:
    """A pipeline's loop, plain: every scheduler is used like this."""
    scheduler.set_timesteps(spec.steps)
    x = x * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else x
    scale = getattr(scheduler, "scale_model_input", lambda value, _: value)
    for t in scheduler.timesteps:
        m = denoise(scale(x, t), t)
        x = scheduler.step(m, t, x, **spec.arguments(generator), return_dict=False)[0]
        if on_step is not None:
            on_step(t, x)
    return x


def _twin(scheduler: Any) -> Any:
    """A copy of a scheduler; a noise sampler made at the first step is the noise, so it is shared."""
    shared = getattr(scheduler, "noise_sampler", None)
    return copy.deepcopy(scheduler, {} if shared is None else {id(shared): shared})


def residuals(new: Tensor, old: Tensor) -> Tensor:
    return (new - old).flatten(1).norm(dim=1) / (old.flatten(1).norm(dim=1) + 1e-6)


def reference(
    scheduler: Any,
    spec: Spec,
    denoise: Callable[[Tensor, Any], Tensor],
    x: Tensor,
    corrected: Sequence[int],
    relax: Sequence[float],
    tol: float | None = None,
    generator: list[torch.Generator] | None = None,
    begin: int | None = None,
    project: Callable[[Tensor, int], Tensor] = lambda y, _: y,
    ahead: int = 0,
) -> Tensor:
    """The corrected run, from METHOD: same t, same x_t, same noise, new model output at the current estimate y.

    The estimate lives at the noise level that the step leads to, so it is scaled as the state after the step says. The
    history of a multistep solver takes the blended model output; the sample returned is the blend of the samples.

    Image to image runs start at step `begin`, from `x` as it is. `project` is what an inpainting loop does to each
    estimate, given the index of the step that it leads to. Corrections are evaluated at the timestep `ahead` of their step.
    """

    def step(state: Any, m: Tensor) -> tuple[Any, Tensor]:
        for held, saved in zip(generator or [], draws, strict=True):
            held.set_state(saved)
        torch.set_rng_state(ambient)
        state = _twin(state)
        y = state.step(m.clone(), t, x.clone(), **spec.arguments(generator), return_dict=False)[0]
        return state, y

    state = copy.deepcopy(scheduler)
    state.set_timesteps(spec.steps)
    if begin is None:
        x = x * getattr(state, "init_noise_sigma", 1.0)
    elif hasattr(state, "set_begin_index"):
        state.set_begin_index(begin)
    for index, t in list(enumerate(state.timesteps))[begin or 0 :]:
        draws = [held.get_state() for held in generator or []]
        ambient = torch.get_rng_state()
        before = state
        scaled = getattr(before, "scale_model_input", lambda value, _: value)(x.clone(), t)
        m = denoise(scaled, t)
        state, y = step(before, m)
        y = project(y, index + 1)
        if hasattr(state, "noise_sampler"):
            before.noise_sampler = state.noise_sampler
        active = torch.ones(len(x), dtype=torch.bool)
        for factor in relax if index in corrected else ():
            scaled = getattr(state, "scale_model_input", lambda value, _: value)(y.clone(), t)
            new_m = denoise(scaled, state.timesteps[index + ahead])
            _, new_y = step(before, new_m)
            change = residuals(new_y, y)
            weight = (factor * active.to(y.dtype)).reshape(-1, *(1,) * (y.dim() - 1))
            y = project(y + weight * (new_y - y), index + 1)
            m = m + weight * (new_m - m)
            state, _ = step(before, m)
            if tol is not None:
                active = active & (change >= tol)
        x = y
    return x


def deviation(found: Tensor, expected: Tensor) -> float:
    """The largest relative deviation over the samples of a batch, in the 2-norm."""
    found, expected = found.double().flatten(1), expected.double().flatten(1)
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())
