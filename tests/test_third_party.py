"""IEC on denoisers that other libraries quantized: nothing is needed but `iec.enable`. What ran where: docs/third-party.md.

A test whose library is not installed is skipped; int8 in ONNX has a file of its own, test_onnx.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

import iec
import tiny

CORRECTED = (0, 2)
RELAX = (0.5, 0.25)
EXTRA = len(CORRECTED) * len(RELAX)

Calibrate = Callable[[], object]  # one run of the pipeline


def torchao(config: str) -> Callable[[nn.Module, Calibrate], None]:
    def quantize(module: nn.Module, _: Calibrate) -> None:
        library = pytest.importorskip("torchao.quantization")
        library.quantize_(module, getattr(library, config)())

    return quantize


def quanto(activations: bool, **options: Any) -> Callable[[nn.Module, Calibrate], None]:
    def quantize(module: nn.Module, calibrate: Calibrate) -> None:
        library = pytest.importorskip("optimum.quanto")
        library.quantize(module, weights=library.qint8, activations=library.qint8 if activations else None, **options)
        if activations:
            with library.Calibration():
                calibrate()
        library.freeze(module)

    return quantize


def bitsandbytes(bits: int) -> Callable[[nn.Module, Calibrate], None]:
    """Its layers put in by hand: diffusers' own loading with BitsAndBytesConfig asks for a GPU."""

    def layer(module: nn.Linear) -> nn.Module:
        library = pytest.importorskip("bitsandbytes.nn")
        weight = module.weight.data.clone()
        sizes = (module.in_features, module.out_features, module.bias is not None)
        if bits == 8:
            made = library.Linear8bitLt(*sizes, has_fp16_weights=False)
            made.weight = library.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            made = library.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
            made.weight = library.Params4bit(weight, requires_grad=False, quant_type="nf4")
        made.bias = module.bias
        return made.to("cpu")  # the move is what quantizes

    def quantize(module: nn.Module, _: Calibrate) -> None:
        for parent in list(module.modules()):
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    setattr(parent, name, layer(child))

    return quantize


@dataclass(frozen=True)
class Method:
    """How a library quantizes a module in place, the type of its weights, and the error of a sample that we accept."""

    quantize: Callable[[nn.Module, Calibrate], None]
    weights: str
    error: float = 0.15  # relative to the full precision sample


METHODS = {
    "torchao-weights": Method(torchao("Int8WeightOnlyConfig"), "Int8Tensor"),
    "torchao-dynamic": Method(torchao("Int8DynamicActivationInt8WeightConfig"), "Int8Tensor"),
    "quanto-weights": Method(quanto(activations=False), "WeightQBytesTensor"),
    "quanto-activations": Method(quanto(activations=True), "WeightQBytesTensor"),
    "bitsandbytes-8bit": Method(bitsandbytes(8), "Int8Params"),
    "bitsandbytes-4bit": Method(bitsandbytes(4), "Params4bit", 0.4),
}
FAMILIES = ("ddim", "sd", "dit", "flux")  # unconditional and conditional UNet, two transformers


def weights(module: nn.Module) -> set[str]:
    """The types of a module's parameters and of what they hold."""
    return {type(held).__name__ for parameter in module.parameters() for held in (parameter, parameter.data)}


def quantized(family: str, method: str) -> Any:
    """A pipeline of `tiny` whose denoiser, a copy of its own, is quantized."""
    case = tiny.CASES[family]
    pipe = case.build(fresh=True)
    denoiser = getattr(pipe, case.denoiser)
    METHODS[method].quantize(denoiser, lambda: tiny.run(case, pipe))
    assert METHODS[method].weights in weights(denoiser)
    return pipe


def distance(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def check_end_to_end(case: tiny.Case, pipe: Any, error: float) -> None:
    """Enable, sample, summary, disable; `error` bounds what quantization alone may change."""
    full = tiny.run(case, case.build()).image
    plain = tiny.run(case, pipe)
    assert plain.evaluations == case.steps
    assert 0 < distance(plain.image, full) < error
    scheduler, held = pipe.scheduler, set(vars(getattr(pipe, case.denoiser)))

    session = iec.enable(pipe, steps=CORRECTED, relax=RELAX)
    corrected = tiny.run(case, pipe)
    assert corrected.evaluations == session.evaluations == case.steps + EXTRA
    assert torch.isfinite(corrected.image).all()
    assert not torch.equal(corrected.image, plain.image)
    assert torch.equal(tiny.run(case, pipe).image, corrected.image)

    told = iec.summary(pipe)
    assert (told.steps, told.corrections, told.evaluations) == (CORRECTED, EXTRA, session.evaluations)
    assert told.residuals is not None and all(len(told.residuals[step]) == len(RELAX) for step in CORRECTED)
    assert f"{session.evaluations} ({EXTRA} corrections)" in str(told)

    iec.disable(pipe)
    assert pipe.scheduler is scheduler
    assert set(vars(getattr(pipe, case.denoiser))) == held
    after = tiny.run(case, pipe)
    assert torch.equal(after.image, plain.image)
    assert after.evaluations == case.steps


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_end_to_end(method: str, family: str) -> None:
    check_end_to_end(tiny.CASES[family], quantized(family, method), METHODS[method].error)


def independent(pipe: Any, steps: int) -> Tensor:
    """The corrected run of a DDIMPipeline in a loop of its own."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    x = randn_tensor((2, 3, 8, 8), generator=tiny.seeds(1, 2))
    for index, t in enumerate(scheduler.timesteps):

        def move(y: Tensor, t: Tensor = t, x: Tensor = x) -> Tensor:
            return scheduler.step(pipe.unet(y, t).sample, t, x).prev_sample

        y = move(x)
        for factor in RELAX if index in CORRECTED else ():
            y = y + factor * (move(y) - y)
        x = y
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_agrees_with_an_independent_loop(method: str) -> None:
    case, pipe = tiny.CASES["ddim"], quantized("ddim", method)
    expected = independent(pipe, case.steps)
    with iec.enable(pipe, steps=CORRECTED, relax=RELAX):
        found = tiny.run(case, pipe).image
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["torchao-dynamic", "quanto-activations"])
def test_convergence_saves_evaluations(method: str) -> None:
    case, pipe = tiny.CASES["ddim"], quantized("ddim", method)
    with iec.enable(pipe, steps="last:1", relax=(1.0,) * 20, tol=1e-2) as session:
        record = tiny.run(case, pipe)
        assert case.steps < record.evaluations == session.evaluations < case.steps + 20
        assert session.summary().spared == case.steps + 20 - record.evaluations


def test_quantized_while_iec_is_on() -> None:
    case = tiny.CASES["ddim"]
    first = quantized("ddim", "torchao-weights")
    iec.enable(first, steps=CORRECTED, relax=RELAX)
    expected = tiny.run(case, first).image

    pipe = case.build(fresh=True)
    iec.enable(pipe, steps=CORRECTED, relax=RELAX)
    METHODS["torchao-weights"].quantize(pipe.unet, lambda: None)
    assert torch.equal(tiny.run(case, pipe).image, expected)
    iec.disable(first)
    iec.disable(pipe)
    assert torch.equal(tiny.run(case, pipe).image, tiny.run(case, first).image)


def sample(pipe: Any) -> Tensor:
    """Two pictures of a bundled model in four steps."""
    made = pipe(batch_size=2, num_inference_steps=4, output_type="np", generator=tiny.seeds(1, 2), return_dict=False)
    return torch.as_tensor(made[0])


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "quantize",
    [
        METHODS["torchao-weights"].quantize,
        METHODS["torchao-dynamic"].quantize,
        # Rounding the last layer to absmax shifts the noise by 0.005, which the first step enlarges by 1/√ᾱ = 157.
        quanto(activations=False, exclude="conv_out"),
    ],
    ids=["torchao-weights", "torchao-dynamic", "quanto-weights"],
)
def test_bundled_model(quantize: Callable[[nn.Module, Calibrate], None]) -> None:
    pipe = quiet(iec.load("fashion-mnist"))
    full = sample(pipe)
    quantize(pipe.unet, lambda: None)
    plain = sample(pipe)
    assert 0 < distance(plain, full) < 0.05

    session = iec.enable(pipe, steps="all")
    corrected = sample(pipe)
    assert session.evaluations == iec.summary(pipe).evaluations == 8
    assert not torch.equal(corrected, plain)
    iec.disable(pipe)
    assert torch.equal(sample(pipe), plain)


def test_bundled_model_loaded_quantized() -> None:
    library = pytest.importorskip("torchao.quantization")
    config = diffusers.TorchAoConfig(library.Int8WeightOnlyConfig())
    # diffusers would load what TorchAoConfig does not quantize in bfloat16, which its DDIMPipeline cannot decode
    pipe = quiet(
        iec.load(
            "fashion-mnist",
            quantization_config=diffusers.PipelineQuantizationConfig(quant_mapping={"unet": config}),
            dtype=torch.float32,
        )
    )
    assert "Int8Tensor" in weights(pipe.unet)
    with iec.enable(pipe, steps="all"):
        corrected = sample(pipe)

    other = quiet(iec.load("fashion-mnist"))
    METHODS["torchao-weights"].quantize(other.unet, lambda: None)
    with iec.enable(other, steps="all"):
        assert torch.equal(sample(other), corrected)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_gguf_file(family: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    case = tiny.CASES[family]
    pipe = case.build()
    denoiser = getattr(pipe, case.denoiser)
    file, kind = tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(file, family)
    for name, parameter in denoiser.state_dict().items():
        value = parameter.numpy()
        if value.ndim == 2 and value.shape[1] % 32 == 0:  # a block of Q8_0
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    denoiser.save_config(tmp_path)

    config = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    loaded = type(denoiser).from_single_file(str(file), config=str(tmp_path), quantization_config=config)
    assert "GGUFParameter" in weights(loaded)
    setattr(pipe, case.denoiser, loaded)
    check_end_to_end(case, pipe, 0.05)
