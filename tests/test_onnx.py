"""IEC on a frozen int8 pipeline of optimum-onnx, exported here from random weights. Run by `make test-onnx`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import iec

pytest.importorskip("optimum.onnxruntime", reason="needs optimum-onnx, see make test-onnx")

import diffusers
import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic
from optimum.onnxruntime import ORTStableDiffusionPipeline

import tiny

STEPS = 4
RELAX = (0.5, 0.25)
CORRECTED = (0, 2)


class Denoiser(nn.Module):
    """A UNet as optimum exports it."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class Decoder(nn.Module):
    """The decoder of an autoencoder as optimum exports it."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.vae.decode(latent_sample, return_dict=False)[0]


def export(module: nn.Module, inputs: dict[str, Tensor], output: str, file: Path) -> None:
    """Write `module` in ONNX, the first dimension of everything but scalars free."""
    file.parent.mkdir()
    batched = [name for name, value in inputs.items() if value.dim()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's remarks on diffusers' shape checks, and on its own age
        torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            str(file),
            input_names=list(inputs),
            output_names=[output],
            dynamic_axes={name: {0: "batch"} for name in [*batched, output]},
            opset_version=17,
            dynamo=False,
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion pipeline in ONNX, its UNet in int8. It has no text encoder: the tests give embeddings."""
    root = tmp_path_factory.mktemp("frozen")
    torch.manual_seed(0)
    unet, vae = tiny.unet_text(), tiny.vae()
    scheduler = diffusers.DDIMScheduler(**tiny.BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    absent = dict.fromkeys(["text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, unet=unet, scheduler=scheduler, requires_safety_checker=False, **absent
    )
    pipe.save_config(root)
    scheduler.save_pretrained(root / "scheduler")

    latents = torch.zeros(2, 4, 8, 8)
    states = {"sample": latents, "timestep": torch.tensor(1), "encoder_hidden_states": torch.zeros(2, 5, 16)}
    export(Denoiser(unet), states, "out_sample", root / "float" / "model.onnx")
    export(Decoder(vae), {"latent_sample": latents}, "sample", root / "vae_decoder" / "model.onnx")
    (root / "unet").mkdir()
    quantize_dynamic(root / "float" / "model.onnx", root / "unet" / "model.onnx", weight_type=QuantType.QUInt8)
    unet.save_config(root / "unet")
    vae.save_config(root / "vae_decoder")
    return root


@pytest.fixture(params=[False, True], ids=["plain", "io-binding"])
def pipe(folder: Path, request: pytest.FixtureRequest) -> Any:
    pipe = ORTStableDiffusionPipeline.from_pretrained(folder, use_io_binding=request.param)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def runs(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The executions of the UNet by the runtime itself, whatever Python says."""
    happened: list[str] = []

    def counted(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            happened.append(name)
            return inner(*args, **kwargs)

        return call

    for name in ("run", "run_with_iobinding"):
        monkeypatch.setattr(pipe.unet.session, name, counted(name, getattr(pipe.unet.session, name)))
    return happened


EMBEDS = {"prompt_embeds": tiny.noise(2, 5, 16, seed=3), "negative_prompt_embeds": tiny.noise(2, 5, 16, seed=4)}


def sample(pipe: Any, guidance: float, output_type: str = "latent") -> Tensor:
    made = pipe(
        **EMBEDS,
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        latents=tiny.noise(2, 4, 8, 8),
        output_type=output_type,
    )
    return torch.as_tensor(made.images).clone()


def independent(pipe: Any, guidance: float) -> Tensor:
    """The corrected run in a loop of its own, which hands the runtime none of its tensors."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    prompt, negative = EMBEDS["prompt_embeds"], EMBEDS["negative_prompt_embeds"]

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if guidance == 1.0:
            return pipe.unet(x.clone(), t, encoder_hidden_states=prompt, return_dict=False)[0].clone()
        both = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([negative, prompt]), return_dict=False)[
            0
        ]
        without, given = both.clone().chunk(2)
        return without + guidance * (given - without)

    x = tiny.noise(2, 4, 8, 8)
    for index, t in enumerate(scheduler.timesteps):
        y = scheduler.step(denoise(x, t), t, x, return_dict=False)[0]
        for factor in RELAX if index in CORRECTED else ():
            y = y + factor * (scheduler.step(denoise(y, t), t, x, return_dict=False)[0] - y)
        x = y
    return x


def test_the_denoiser_is_int8(folder: Path) -> None:
    kinds = {node.op_type for node in onnx.load(folder / "unet" / "model.onnx").graph.node}
    assert {"ConvInteger", "MatMulInteger"} <= kinds


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_agrees_with_an_independent_loop(pipe: Any, guidance: float) -> None:
    expected = independent(pipe, guidance)
    with iec.enable(pipe, steps=CORRECTED, relax=RELAX):
        found = sample(pipe, guidance)
    # Without guidance optimum-onnx binds its output over its input, which would be the scheduler's sample.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_evaluations_and_the_way_back(pipe: Any, runs: list[str], guidance: float) -> None:
    plain = sample(pipe, guidance, "np")
    scheduler, held = pipe.scheduler, set(vars(pipe.unet))
    assert len(runs) == STEPS
    runs.clear()

    session = iec.enable(pipe, steps=CORRECTED, relax=RELAX)
    corrected = sample(pipe, guidance, "np")
    assert len(runs) == session.evaluations == STEPS + len(CORRECTED) * len(RELAX)
    assert not torch.equal(corrected, plain)
    assert str(session.evaluations) in str(iec.summary(pipe))

    iec.disable(pipe)
    assert pipe.scheduler is scheduler
    assert set(vars(pipe.unet)) == held
    runs.clear()
    assert torch.equal(sample(pipe, guidance, "np"), plain)
    assert len(runs) == STEPS


def test_none_is_the_plain_pipeline(pipe: Any, runs: list[str]) -> None:
    plain = sample(pipe, 5.0)
    with iec.enable(pipe, steps="none"):
        assert torch.equal(sample(pipe, 5.0), plain)
    assert len(runs) == 2 * STEPS


def test_convergence_saves_evaluations(pipe: Any, runs: list[str]) -> None:
    with iec.enable(pipe, steps="last:1", relax=(1.0,) * 20, tol=1e-2) as session:
        sample(pipe, 5.0)
    assert STEPS < len(runs) == session.evaluations < STEPS + 20
