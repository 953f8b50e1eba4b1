"""Small pipelines with random weights, one per family, built from configurations: nothing is downloaded.

`CASES` lists them. `Case.build()` gives a pipeline whose modules are shared between tests of one process, with a
scheduler of its own; `Case.kwargs()` gives the arguments of a call, with fresh generators; `run()` calls it and records
the denoiser.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import iec

diffusers.utils.logging.set_verbosity_error()

PIXELS = 16  # side of an image; latents are 8 × 8
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def seeds(*numbers: int) -> list[torch.Generator]:
    """One generator per image."""
    return [torch.Generator().manual_seed(number) for number in numbers]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _lively(module: nn.Module, gain: float = 4.0) -> nn.Module:
    """Give zero-initialised weights random values and enlarge the last layer: the output then depends on the input."""
    for parameter in module.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    last = getattr(module, "conv_out", None) or getattr(module, "proj_out", None) or getattr(module, "proj_out_2", None)
    if isinstance(last, nn.Module):
        for parameter in last.parameters():
            parameter.data.mul_(gain)
    return module.eval().requires_grad_(False)


def unet(channels: int = 3) -> nn.Module:
    """An unconditional UNet on 8 × 8."""
    return _lively(
        diffusers.UNet2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )


def unet_text(in_channels: int = 4, **other: Any) -> nn.Module:
    """A text-conditional UNet on 8 × 8 latents."""
    config: dict[str, Any] = {"cross_attention_dim": 16, **other}
    return _lively(
        diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=in_channels,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **config,
        )
    )


def vae(latent_channels: int = 4, **other: Any) -> nn.Module:
    """A KL autoencoder that halves the side of an image."""
    return _lively(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=latent_channels,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=PIXELS,
            **other,
        ),
        gain=1.0,
    )


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of eight tokens, from files as every release of transformers reads them."""
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "cat</w>": 3, "c": 4, "a": 5, "t</w>": 6, "ca": 7}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocab))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=8)


def text_encoder(projection: bool = False) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    encoder = CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)
    return encoder.eval().requires_grad_(False)


def _ddim() -> DiffusionPipeline:
    return diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler())


def _ddpm() -> DiffusionPipeline:
    return diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler())


def _ldm() -> DiffusionPipeline:
    codes = diffusers.VQModel(
        block_out_channels=(8,), latent_channels=3, layers_per_block=1, norm_num_groups=4, num_vq_embeddings=8
    )
    return diffusers.LDMPipeline(_lively(codes, 1.0), unet(), diffusers.DDIMScheduler(**BETAS, clip_sample=False))


def _dit() -> DiffusionPipeline:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,  # the second half is a learned variance, which the pipeline drops
        num_layers=1,
        norm_num_groups=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return diffusers.DiTPipeline(_lively(transformer), vae(), diffusers.DDIMScheduler())


def _stable_diffusion(kind: str, in_channels: int = 4, **other: Any) -> DiffusionPipeline:
    return getattr(diffusers, kind)(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=unet_text(in_channels),
        scheduler=diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **other,
    )


def _controlnet() -> DiffusionPipeline:
    controlnet = diffusers.ControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(4, 8),
    )
    return _stable_diffusion("StableDiffusionControlNetPipeline", controlnet=_lively(controlnet))


def _sdxl(kind: str) -> DiffusionPipeline:
    return getattr(diffusers, kind)(
        vae=vae(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(projection=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet_text(
            cross_attention_dim=32,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def _sd3() -> DiffusionPipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
    )
    absent = dict.fromkeys(
        ["text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"]
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=_lively(transformer),
        vae=vae(shift_factor=0.1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **absent,
    )


def _flux(kind: str) -> DiffusionPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    return getattr(diffusers, kind)(
        transformer=_lively(transformer),
        vae=vae(latent_channels=1, shift_factor=0.1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        **dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"]),
    )


BUILT: dict[Callable[[], DiffusionPipeline], DiffusionPipeline] = {}
GIVEN: list[DiffusionPipeline] = []  # what `Case.build` has handed out since `take_off`


def _built(make: Callable[[], DiffusionPipeline]) -> DiffusionPipeline:
    if make not in BUILT:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            BUILT[make] = make()
        BUILT[make].set_progress_bar_config(disable=True)
    return BUILT[make]


def take_off() -> None:
    """Take IEC off every pipeline handed out; the shared modules are then as they were built."""
    while GIVEN:
        iec.undo(GIVEN.pop())
    for pipe in BUILT.values():
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module):
                assert "forward" not in vars(part), f"something was left on {name}"
                assert not part._forward_hooks and not part._forward_pre_hooks


@dataclass(frozen=True)
class Case:
    """A pipeline of one family and how to call it. `steps`: evaluations of the plain run = sampling steps."""

    name: str
    make: Callable[[], DiffusionPipeline]
    call: Callable[[], dict[str, Any]]
    steps: int
    denoiser: str = "unet"

    def build(self, fresh: bool = False) -> DiffusionPipeline:
        """The pipeline with a scheduler of its own; with `fresh` also with modules of its own."""
        shared = _built(self.make)
        pipe = copy.copy(shared)
        pipe.scheduler = copy.deepcopy(shared.scheduler)
        if fresh:
            setattr(pipe, self.denoiser, copy.deepcopy(getattr(shared, self.denoiser)))
        GIVEN.append(pipe)
        return pipe

    def kwargs(self, **changes: Any) -> dict[str, Any]:
        return {**self.call(), **changes}


def _unconditional(**other: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"batch_size": 2, "num_inference_steps": 4, "output_type": "np", "generator": seeds(1, 2), **other}


def _prompted(**other: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "prompt": ["a cat", "a"],
        "negative_prompt": ["", "cat"],
        "guidance_scale": 5.0,
        "num_inference_steps": 4,
        "output_type": "latent",
        "generator": seeds(1, 2),
        **other,
    }


def _prompted_image(**other: Any) -> Callable[[], dict[str, Any]]:
    image = noise(2, 3, PIXELS, PIXELS, seed=5).sigmoid()
    return _prompted(image=image, num_inference_steps=6, strength=0.7, **other)


def _masked(**other: Any) -> Callable[[], dict[str, Any]]:
    mask = torch.zeros(2, 1, PIXELS, PIXELS)
    mask[:, :, 4:12, 2:10] = 1.0
    return _prompted_image(mask_image=mask, height=PIXELS, width=PIXELS, **other)


def _sized(**other: Any) -> Callable[[], dict[str, Any]]:
    return _prompted(height=PIXELS, width=PIXELS, **other)


def _embedded(**other: Any) -> Callable[[], dict[str, Any]]:
    """Arguments of the pipelines whose text encoders are left out."""
    return lambda: {
        "prompt_embeds": noise(2, 5, 16, seed=3),
        "pooled_prompt_embeds": noise(2, 16, seed=4),
        "height": PIXELS,
        "width": PIXELS,
        "num_inference_steps": 4,
        "output_type": "latent",
        "generator": seeds(1, 2),
        **other,
    }


_SD = "StableDiffusion"
CASES: dict[str, Case] = {
    case.name: case
    for case in [
        Case("ddpm", _ddpm, _unconditional(), 4),
        Case("ddim", _ddim, _unconditional(), 4),
        Case("ddim-eta", _ddim, _unconditional(eta=1.0), 4),
        Case("ldm", _ldm, _unconditional(), 4),
        Case(
            "dit",
            _dit,
            lambda: {"class_labels": [3, 7], "num_inference_steps": 4, "output_type": "np", "generator": seeds(1, 2)},
            4,
            "transformer",
        ),
        Case("sd", functools.partial(_stable_diffusion, f"{_SD}Pipeline"), _sized(guidance_rescale=0.7), 4),
        Case("sd-img2img", functools.partial(_stable_diffusion, f"{_SD}Img2ImgPipeline"), _prompted_image(), 4),
        Case("sd-inpaint4", functools.partial(_stable_diffusion, f"{_SD}InpaintPipeline"), _masked(), 4),
        Case("sd-inpaint9", functools.partial(_stable_diffusion, f"{_SD}InpaintPipeline", 9), _masked(), 4),
        Case("sd-controlnet", _controlnet, _sized(image=noise(2, 3, PIXELS, PIXELS, seed=6).sigmoid()), 4),
        Case("sdxl", functools.partial(_sdxl, f"{_SD}XLPipeline"), _sized(), 4),
        Case("sdxl-img2img", functools.partial(_sdxl, f"{_SD}XLImg2ImgPipeline"), _prompted_image(), 4),
        Case(
            "sd3",
            _sd3,
            _embedded(
                negative_prompt_embeds=noise(2, 5, 16, seed=8),
                negative_pooled_prompt_embeds=noise(2, 16, seed=9),
                guidance_scale=4.0,
            ),
            4,
            "transformer",
        ),
        Case("flux", functools.partial(_flux, "FluxPipeline"), _embedded(), 4, "transformer"),
        Case(
            "flux-img2img",
            functools.partial(_flux, "FluxImg2ImgPipeline"),
            _embedded(image=noise(2, 3, PIXELS, PIXELS, seed=5).sigmoid(), num_inference_steps=6, strength=0.7),
            5,
            "transformer",
        ),
    ]
}


@dataclass
class Record:
    """What a call gave: its `image`; the first input and the timestep of every call of the denoiser.

    `evaluations` are the calls that ran the model: they are counted at its first layer, as a call can also be answered
    without running it.
    """

    image: Tensor = field(default_factory=lambda: torch.empty(0))
    inputs: list[Tensor] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    evaluations: int = 0


@contextlib.contextmanager
def recorded(denoiser: nn.Module) -> Iterator[Record]:
    """Record the calls and evaluations of a module through forward hooks."""
    record = Record()

    def called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        named = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        time = args[1] if len(args) > 1 else kwargs["timestep"]
        record.inputs.append(named.detach().clone())
        record.times.append(float(torch.as_tensor(time).flatten()[0]))

    def evaluated(*_: Any) -> None:
        record.evaluations += 1

    inner = getattr(denoiser, "_orig_mod", denoiser)  # of torch.compile
    layer = next(module for module in inner.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
    handles = [denoiser.register_forward_hook(called, with_kwargs=True), layer.register_forward_hook(evaluated)]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def run(case: Case, pipe: DiffusionPipeline, **changes: Any) -> Record:
    """Call the pipeline as the case says and record its picture and its evaluations."""
    torch.manual_seed(11)  # LDMPipeline draws the noise of eta > 0 from the global generator
    with recorded(getattr(pipe, case.denoiser)) as record:
        image = pipe(**case.kwargs(**changes), return_dict=False)[0]
    record.image = torch.as_tensor(image).clone()
    return record
