"""Which diffusers schedulers can be corrected, and why the others cannot."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

# Each of these runs in the tests with the laws of the wrapper.
TESTED = frozenset(
    {
        "DDIMScheduler",
        "DDIMParallelScheduler",
        "DDPMScheduler",
        "DDPMParallelScheduler",
        "PNDMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverSinglestepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSDEScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "LMSDiscreteScheduler",
        "SASolverScheduler",
        "IPNDMScheduler",
        "QuadraticDDIMScheduler",  # ours
    }
)

REFUSED = {
    "ScoreSdeVeScheduler": "it has no step(): a predictor and a corrector alternate inside the pipeline",
    "RePaintScheduler": "it jumps back in time by itself, so a repeated timestep already has another meaning",
    "UnCLIPScheduler": "its pipelines pass the next timestep of the list to step(), which a repeated list would falsify",
    "VQDiffusionScheduler": "its samples are discrete tokens, which cannot be blended",
    "AmusedScheduler": "its samples are discrete tokens, which cannot be blended",
    "DiscreteDDIMScheduler": "its samples are discrete tokens, which cannot be blended",
    "BlockRefinementScheduler": "its samples are discrete tokens, which cannot be blended",
    "EntropyBoundScheduler": "its samples are discrete tokens, which cannot be blended",
    "FlowMapEulerDiscreteScheduler": "it skips the model when a timestep repeats",
    "ConsistencyDecoderScheduler": "it decodes latents in two fixed steps and is no sampler of its own",
    "DDIMInverseScheduler": "it runs from data to noise, where there is no error of an efficient model to correct",
    "DPMSolverMultistepInverseScheduler": "it runs from data to noise, where there is no error of an efficient model to correct",
    "DDPMWuerstchenScheduler": "its pipelines drop the last entry of the timesteps, which a repeated list would falsify",
    "SCMScheduler": "its pipelines drop the last entry of the timesteps, which a repeated list would falsify",
}

# The loop of a pipeline whose class name begins so does what a list with repeats would falsify.
REFUSED_PIPELINES = {
    "AnyFlow": "it skips the model when a timestep repeats",
    "ChronoEdit": "it changes the history of its scheduler in the middle of a run",
    "CosmosTextToWorld": "it steps twice at each timestep and winds its scheduler back by hand",
    "CosmosVideoToWorld": "it steps twice at each timestep and winds its scheduler back by hand",
    "Cosmos2TextToImage": "it writes into the sigmas of its scheduler",
    "Cosmos2VideoToWorld": "it writes into the sigmas of its scheduler",
    "DanceDiffusion": "it writes the list of timesteps back into its scheduler",
    "LEditsPP": "it stores the inversion's noise per entry of the timesteps",
    "LTX2DFR": "it drops the last entry of the timesteps",
    "LTXI2VLongMultiPrompt": "it drops the last entry of the timesteps",
    "StableDiffusionPanorama": "it changes the state of its scheduler between the views of a step",
    "TextToVideoZero": "it copies its scheduler in the middle of a run",
}


def check_scheduler(scheduler: Any) -> None:
    """Raise TypeError, with the reason and the cure, for a scheduler that cannot be corrected.

    A scheduler of another library that has the shape of diffusers' own passes, with a UserWarning.
    """
    name = type(scheduler).__name__
    if isinstance(scheduler, type):
        raise TypeError(
            f"expected a scheduler object, found the class {scheduler.__name__}; make one with .from_config(...)"
        )
    if name in REFUSED:
        raise TypeError(
            f"{name} cannot be corrected: {REFUSED[name]}; choose another, for example "
            "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"
        )
    if name in TESTED:
        return
    missing = [attribute for attribute in ("step", "set_timesteps", "config") if not hasattr(scheduler, attribute)]
    if missing:
        raise TypeError(f"{name} is no diffusers scheduler: it has no {', '.join(missing)}")
    parameters = list(inspect.signature(scheduler.step).parameters)
    expected = ["model_output", "timestep", "sample"]
    if not set(expected) <= set(parameters):
        raise TypeError(
            f"{name} cannot be corrected: its step() takes ({', '.join(parameters)}), expected {', '.join(expected)}"
        )
    warnings.warn(
        f"{name} has not been tested with IEC; check that relax=(0.0,) gives the plain pipeline's images",
        UserWarning,
        stacklevel=3,
    )


def check_pipeline_class(name: str) -> None:
    """Raise TypeError, with the reason, for a pipeline class whose loop a repeated timestep falsifies."""
    for prefix, reason in REFUSED_PIPELINES.items():
        if name.startswith(prefix):
            raise TypeError(f"{name} cannot be corrected: {reason}")
