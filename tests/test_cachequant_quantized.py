"""Quantized models under a calibrated cache: their quantizers, the compensation of rounding, the correction of the output."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import iec
import quantized
import tiny
from iec.artifact.calibration import LayerPart, QuantizedLayer
from iec.core.affine import search
from quantized import QUICK, Times, emulated, same, stepwise
from tiny import CASES, run
from trajectories import Seen, at, compensated, regression, rows, runs, trajectory

DDIM = CASES["ddim"]
SETTINGS: dict[str, Any] = {"num_inference_steps": 6, "num_samples": 4, "batch_size": 2, "seed": 3}
ONE_BATCH = {**SETTINGS, "num_samples": 2}
CACHE = iec.CacheQuant(interval=3)
ONCE = iec.QuantConfig(output_correction="none", **QUICK)


@pytest.fixture
def pipe() -> Any:
    return DDIM.build()


@pytest.fixture(scope="module")
def made() -> iec.Calibration:
    return iec.calibrate(DDIM.build(), iec.QuantConfig(**QUICK), CACHE, **SETTINGS)


def images(pipe: Any, settings: dict[str, Any] = SETTINGS) -> Tensor:
    return torch.cat([torch.as_tensor(out[0]) for out in runs(pipe, settings)])


def taker(model: Any) -> str:
    """The name of the resnet that takes the cached feature."""
    resnet = CACHE.locate(model).consumer
    return next(name for name, module in model.named_modules() if module is resnet)


def from_the_taker_on(model: Any, name: str) -> list[str]:
    """The modules of the up blocks that come after the cut: blocks run resnet, attention, …, and the upsampler at last."""
    level, index = (int(number) for number in name.split(".")[1::2])
    found = []
    for other, _ in model.named_modules():
        if other.startswith("up_blocks.") and other.count(".") > 2:
            _, block, kind, number = other.split(".")[:4]
            if (int(block), len(model.up_blocks) if kind == "upsamplers" else int(number)) >= (level, index):
                found.append(other)
    return found


def whole_passes(made: iec.Calibration) -> tuple[int, ...]:
    assert made.cache is not None
    return made.cache.refresh


# --- the quantizers ---------------------------------------------------------------------------------------------------


def test_quantizers_are_those_of_a_cached_run(pipe: Any) -> None:
    """Behind the cut every layer has at every step what it has without a cache, as corrections are whole passes; the layers
    from the cut on have it at whole passes alone; the one that takes the feature as it is rounds the compensated one."""
    plain = iec.calibrate(pipe, ONCE, **ONE_BATCH).quant
    made = iec.calibrate(pipe, ONCE, CACHE, **ONE_BATCH)
    quant, refresh, name = made.quant, whole_passes(made), taker(pipe.unet)
    assert plain is not None and quant is not None and 1 < len(refresh) < 6
    following = {"unet.conv_out", *(f"unet.{other}" for other in from_the_taker_on(pipe.unet, name))}
    steps = [step for step in range(6) if step not in refresh]
    others, later = 0, 0
    for other, layer in quant.layers.items():
        for part, expected in zip(layer.parts, plain.layers[other].parts, strict=True):
            assert torch.equal(part.act.scale[list(refresh)], expected.act.scale[list(refresh)])
            assert torch.equal(part.act.zero[list(refresh)], expected.act.zero[list(refresh)])
            if other not in following or other.endswith("time_emb_proj"):
                assert torch.equal(part.act.scale, expected.act.scale) and torch.equal(part.act.zero, expected.act.zero)
                others += 1
            else:
                later += not torch.equal(part.act.scale[steps], expected.act.scale[steps])
    assert others > 20 and later > 3
    for product, tables in quant.products.items():
        for key, table in tables.items():
            expected = plain.products[product][key].scale
            kept = list(refresh) if product in following else list(range(6))
            assert torch.equal(table.scale[kept], expected[kept])
    deep = quant.layers["unet.mid_block.resnets.0.conv1"].parts[0].act.scale
    assert len(set(deep.tolist())) == 6  # and none of them is a stand-in for another step's

    seen = trajectory(pipe, pipe.unet, "conv_out", ONE_BATCH, CACHE)
    shortcut = quant.layers[f"unet.{name}.conv_shortcut"].parts[0]
    for step in steps:
        found = search(compensated(made, seen, step).reshape(1, -1), 8, "max")
        torch.testing.assert_close(shortcut.act.scale[step], found.scale[0], rtol=1e-5, atol=0)
        assert abs(float(shortcut.act.zero[step] - found.zero[0])) <= 0.5
        unaware = search(at(seen, step, "feature").reshape(1, -1), 8, "max").scale[0]
        assert not torch.isclose(shortcut.act.scale[step], unaware, rtol=1e-5, atol=0)


# --- the compensation of rounding in the layers that take the feature -------------------------------------------------


def rounded(part: LayerPart, x: Tensor, step: int) -> Tensor:
    """The input of a part, rounded as its table says."""
    scale, zero = part.act.scale[step], part.act.zero[step].float()
    return ((torch.round(x / scale) + zero).clamp(0, 255) - zero) * scale


def parts_of_the_feature(
    pipe: Any, made: iec.Calibration, seen: list[list[Seen]], step: int, layer: str
) -> tuple[Tensor, Tensor]:
    """(N, C) each: what the feature gives in a layer that takes it, without bias, rounded and in full precision."""
    resnet, name = pipe.unet.get_submodule(taker(pipe.unet)), taker(pipe.unet)
    feature = compensated(made, seen, step)
    x = torch.cat([feature, at(seen, step, "taken")[:, feature.shape[1] :]], 1)
    x = F.silu(resnet.norm1(x)) if layer == "conv1" else x
    module, part = getattr(resnet, layer), made.quant.layers[f"unet.{name}.{layer}"].parts[0]
    assert (part.begin, part.end) == (0, feature.shape[1])
    x = x[:, : part.end]
    weight = part.weight.codes.float() - part.weight.zero.float().view(-1, 1, 1, 1)
    weight = weight * part.weight.scale.view(-1, 1, 1, 1)
    exact = F.conv2d(x, module.weight[:, : part.end], padding=module.padding)
    return rows(F.conv2d(rounded(part, x, step), weight, padding=module.padding)), rows(exact)


@pytest.mark.parametrize("layer", ["conv1", "conv_shortcut"])
def test_takers_are_regressed_without_their_bias(pipe: Any, made: iec.Calibration, layer: str) -> None:
    """The released code regresses with the bias on both sides and then scales without it: (a − 1)·bias is missing there."""
    seen = trajectory(pipe, pipe.unet, "conv_out", SETTINGS, CACHE)
    name = f"unet.{taker(pipe.unet)}.{layer}"
    bias = pipe.unet.get_submodule(name[5:]).bias.double()
    quant = made.quant
    assert quant is not None
    found = quant.layers[name]
    assert found.parts[0].gain is not None and found.bias is not None and found.parts[1].gain is None
    assert found.parts[0].gain.shape == found.bias.shape == (6, len(bias))
    released = []
    for step in range(6):
        x, y = parts_of_the_feature(pipe, made, seen, step, layer)
        gain, offset = regression(x, y)
        torch.testing.assert_close(found.parts[0].gain[step].double(), gain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.bias[step].double(), bias + offset, rtol=1e-5, atol=1e-5)
        # the mean is then that of full precision; with the released code's offset it is not
        own_gain, own_offset = regression(x + bias, y + bias)
        left = (own_gain * x + own_offset + bias).mean(0) - (y + bias).mean(0)
        torch.testing.assert_close(left, (1 - own_gain) * bias, rtol=1e-6, atol=1e-9)
        released.append((found.bias[step].double() - (bias + own_offset)).abs().max())
        ours = found.parts[0].gain[step].double() * x + found.bias[step].double()
        torch.testing.assert_close(ours.mean(0), (y + bias).mean(0), rtol=0, atol=1e-5)
    assert min(released) > 2e-5 and max(released) > 1e-4


def test_a_bias_that_was_corrected_is_not_corrected_twice(pipe: Any) -> None:
    """A layer in one part is compensated as a whole, so what bias_correction="all" did before makes no difference."""
    found = {}
    for correction in ("all", "none"):
        config = iec.QuantConfig(output_correction="none", bias_correction=correction, split=False, **QUICK)
        made = iec.calibrate(pipe, config, CACHE, **ONE_BATCH)
        assert made.quant is not None
        found[correction] = made.quant.layers[f"unet.{taker(pipe.unet)}.conv_shortcut"]
    plain = iec.calibrate(pipe, dataclasses.replace(config, bias_correction="all"), **ONE_BATCH).quant
    assert plain is not None
    layer = f"unet.{taker(pipe.unet)}.conv_shortcut"
    corrected = (plain.layers[layer].bias - pipe.unet.get_submodule(layer[5:]).bias).abs().mean()
    difference = (found["all"].bias - found["none"].bias).abs().mean()
    assert difference < 0.3 * corrected, (difference, corrected)


@pytest.mark.parametrize(
    ("compensate", "feature", "takers"), [("cache", True, False), ("quant", False, True), ("none", False, False)]
)
def test_what_is_compensated_is_chosen(pipe: Any, compensate: Any, feature: bool, takers: bool) -> None:
    config, told = iec.CacheQuant(interval=3, compensate=compensate), []
    settings = {**ONE_BATCH, "num_inference_steps": 4}
    made = iec.calibrate(pipe, ONCE, config, progress=lambda what, *_: told.append(what), **settings)
    assert told == ["features", "samples", *["compensation"] * takers]
    assert made.cache is not None and made.quant is not None
    assert bool(made.cache.offset.any()) is feature and bool((made.cache.gain != 1).any()) is feature
    gains = {name for name, layer in made.quant.layers.items() if any(part.gain is not None for part in layer.parts)}
    resnet = f"unet.{taker(pipe.unet)}"
    assert gains == ({f"{resnet}.conv1", f"{resnet}.conv_shortcut"} if takers else set())


# --- the correction of the output -------------------------------------------------------------------------------------


def outputs_on(
    pipe: Any, model: nn.Module, last: str, seen: list[list[Seen]], settings: dict[str, Any]
) -> list[Tensor]:
    """What the last layer of the model that the pipeline runs gives where full precision went: by step."""
    calls, found = [seen_ for batch in seen for seen_ in batch], []

    def instead(_: Any, args: Any, kwargs: Any) -> Any:
        sample = calls[len(found)].sample
        return ((sample, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": sample})

    hooks = [
        model.register_forward_pre_hook(instead, with_kwargs=True),
        model.get_submodule(last).register_forward_hook(lambda _, __, output: found.append(output.clone())),
    ]
    for _ in runs(pipe, settings):
        pass
    for hook in hooks:
        hook.remove()
    steps = settings["num_inference_steps"]
    assert len(found) == len(calls) == steps * len(seen)
    return [torch.cat(found[step::steps]) for step in range(steps)]


@pytest.mark.parametrize(
    ("name", "correction", "cached"),
    [
        ("ddim", "bias", False),
        ("ddim", "affine", False),
        ("ddim", "affine", True),
        ("dit", "bias", False),
        ("dit", "affine", False),
        ("sd", "affine", True),
    ],
)
def test_mean_and_slope_of_the_output_are_those_of_full_precision(name: str, correction: Any, cached: bool) -> None:
    """Per step and channel of the last layer, along full-precision trajectories, at run time."""
    case = CASES[name]
    pipe = case.build()
    model, last = getattr(pipe, case.denoiser), "proj_out_2" if name == "dit" else "conv_out"
    other: dict[str, dict[str, Any]] = {
        "ddim": {},
        "dit": {"class_labels": [1, 2, 3, 4]},
        "sd": {"prompt": "a cat", "height": 16, "width": 16},
    }
    settings, axis = {**SETTINGS, **other[name]}, -1 if name == "dit" else 1
    seen = trajectory(pipe, model, last, settings)
    missed = []
    for config in (correction, "none"):
        given = iec.QuantConfig(output_correction=config, bias_correction="none", **QUICK)
        made = iec.calibrate(pipe, given, CACHE if cached else None, **settings)
        with iec.quantize(pipe, made, kernel="reference"):
            cache = iec.cache(pipe, None, made) if cached else None
            found = outputs_on(pipe, model, last, seen, settings)
            if cache is not None:
                cache.undo()
        means, slopes = [], []
        for step, output in enumerate(found):
            x, y = rows(output, axis), rows(at(seen, step, "last"), axis)
            means.append((x - y).mean(0).abs().max())
            slopes.append((regression(x, y)[0] - 1).abs().max())
        missed.append((float(max(means)), float(max(slopes))))
    corrected, without = missed
    assert corrected[0] < 1e-5 and without[0] > 1e-4
    if correction == "affine":
        assert corrected[1] < 1e-4 and without[1] > 1e-3


# --- stopped and resumed ----------------------------------------------------------------------------------------------


class Stop(Exception):
    """Ends a calibration."""


BRIEF: dict[str, Any] = {**SETTINGS, "num_inference_steps": 4}
STAGES = ("features", "samples", "compensation", "outputs")


@pytest.fixture(scope="module")
def uninterrupted() -> iec.Calibration:
    told: list[tuple[str, int]] = []
    made = iec.calibrate(
        DDIM.build(),
        iec.QuantConfig(**QUICK),
        CACHE,
        progress=lambda what, done, _: told.append((what, done)),
        **BRIEF,
    )
    assert told == [(what, done) for what in STAGES for done in (2, 4)]
    return made


@pytest.mark.parametrize("stop", [2, 9, 16, 22, 30])
def test_resumed_is_uninterrupted_in_every_stage(
    pipe: Any, uninterrupted: iec.Calibration, stop: int, tmp_path: Path
) -> None:
    """Stopped in the midst of a batch, at evaluation `stop` of the 32: two batches of four steps in four passages."""
    file, config = tmp_path / "checkpoint.safetensors", iec.QuantConfig(**QUICK)
    before, evaluated = quantized.state(pipe), []

    def count(*_: Any) -> None:
        evaluated.append(None)
        if len(evaluated) == stop:
            raise Stop

    hook = pipe.unet.register_forward_hook(count)
    with pytest.raises(Stop):
        iec.calibrate(pipe, config, CACHE, checkpoint_path=file, **BRIEF)
    hook.remove()
    assert quantized.state(pipe) == before
    again: list[None] = []
    hook = pipe.unet.register_forward_hook(lambda *_: again.append(None))
    resumed = iec.calibrate(pipe, config, CACHE, checkpoint_path=file, **BRIEF)
    hook.remove()
    assert len(again) == 32 - 4 * ((stop - 1) // 4)
    assert same(resumed.quant, uninterrupted.quant) and same(resumed.cache, uninterrupted.cache)
    assert resumed.origin == uninterrupted.origin
    if stop == 9:
        for other in (iec.CacheQuant(interval=2), iec.CacheQuant(interval=3, compensate="cache"), None):
            with pytest.raises(ValueError, match="belongs to another run"):
                iec.calibrate(pipe, config, other, checkpoint_path=file, **BRIEF)


# --- both on a pipeline -----------------------------------------------------------------------------------------------


def test_in_either_order_and_off_again(pipe: Any, made: iec.Calibration, tmp_path: Path) -> None:
    before, plain = quantized.state(pipe), images(pipe)
    made.save(tmp_path)
    found = []
    for first, second in ((iec.quantize, iec.cache), (iec.cache, iec.quantize)):
        for put in (first, second):
            put(pipe, None, tmp_path) if put is iec.cache else put(pipe, tmp_path, kernel="reference")
        found.append(images(pipe))
        iec.undo(pipe)
        assert quantized.state(pipe) == before and torch.equal(images(pipe), plain)
    with iec.cache(pipe, None, made):
        assert not torch.equal(images(pipe), found[0])
    assert torch.equal(*found)


def test_released_weights_can_still_be_cached(made: iec.Calibration) -> None:
    other, pipe = DDIM.build(), DDIM.build(fresh=True)
    tiny.GIVEN.remove(pipe)  # nothing takes this off again
    iec.quantize(other, made, kernel="reference")
    iec.cache(other, None, made)
    expected = images(other)
    iec.quantize(pipe, made, kernel="reference", keep_float=False)
    alone = images(pipe)
    with iec.cache(pipe, None, made):
        assert torch.equal(images(pipe), expected)
    assert torch.equal(images(pipe), alone) and not torch.equal(alone, expected)


def test_scales_and_gains_are_those_of_the_step_in_corrections_too(pipe: Any, made: iec.Calibration) -> None:
    """Every quantized layer on the input that it really gets, against its definition, in a corrected and cached run."""
    refresh, made = whole_passes(made), stepwise(quantized.compensated(made))
    iec.quantize(pipe, made, kernel="reference")
    iec.cache(pipe, None, made)
    now, evaluations, ran = Times(pipe.unet, made.origin.timesteps), [], {}
    hooks = [now.handle, pipe.unet.register_forward_pre_hook(lambda *_: evaluations.append(now()))]
    assert made.quant is not None
    for full, layer in made.quant.layers.items():

        def check(
            module: nn.Module, args: tuple[Tensor], output: Tensor, full: str = full, layer: QuantizedLayer = layer
        ) -> None:
            expected = emulated(layer, module, args[0], now()).to(output.dtype)
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
            ran.setdefault(full, []).append(now())

        hooks.append(pipe.unet.get_submodule(full[5:]).register_forward_hook(check))
    with iec.enable(pipe) as session:
        run(DDIM, pipe, num_inference_steps=6)
        assert session.summary().steps == refresh
    for hook in hooks:
        hook.remove()
    corrected = [step for step in range(6) if evaluations.count(step) > 1]
    assert tuple(corrected) == refresh and len(evaluations) == session.summary().evaluations > 6
    assert ran["unet.conv_out"] == evaluations
    assert ran["unet.mid_block.resnets.0.conv1"] == [step for step in evaluations if step in refresh]
