"""iec.quantize on pipelines: undone bit for bit, the scales of the clock's step, refusals, kernels, company of caches and IEC."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

import iec
import quantized
import tiny
from iec.artifact.calibration import Calibration, QuantizedLayer
from iec.quant.kernels import KERNELS
from iec.quant.kernels.reference import Reference
from quantized import QUICK, Times, arguments, by_hand, calibration, emulated, stepwise, without_products
from sampling import deviation
from tiny import CASES, run

DDIM, SD, DIT, FLUX = (CASES[name] for name in ("ddim", "sd", "dit", "flux"))
onednn = pytest.param("onednn", marks=pytest.mark.skipif(quantized.needs_onednn() is not None, reason="no oneDNN here"))
both = pytest.mark.parametrize("kernel", ["reference", onednn])
FAMILIES = ["ddim", "sd", "dit", "flux"]


@pytest.fixture(autouse=True)
def unwatched() -> Iterator[None]:
    yield
    while quantized.WATCHING:
        quantized.WATCHING.pop().handle.remove()


@pytest.fixture
def pipe() -> Any:
    return DDIM.build()


# --- on and off -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@both
def test_undo_is_bit_for_bit(name: str, kernel: str) -> None:
    case = CASES[name]
    made = calibration(name)
    pipe = case.build()
    plain, before = run(case, pipe).image, quantized.state(pipe)
    part = iec.quantize(pipe, made, kernel=kernel)
    assert part.active and part.kernel == kernel and part.pipe is pipe
    rounded = run(case, pipe).image
    assert torch.equal(run(case, pipe).image, rounded)  # nothing is left by one run for the next
    assert not torch.equal(rounded, plain) and deviation(rounded, plain) < 0.5
    iec.undo(pipe)
    assert quantized.state(pipe) == before and not part.active
    assert torch.equal(run(case, pipe).image, plain)
    assert quantized.state(pipe) == before


def test_all_ways_off_are_one(pipe: Any) -> None:
    made, before = calibration("ddim"), quantized.state(pipe)
    plain = run(DDIM, pipe).image
    with iec.quantize(pipe, made, kernel="reference") as part:
        rounded = run(DDIM, pipe).image
        assert part.active
    assert not part.active and quantized.state(pipe) == before
    with pytest.raises(ZeroDivisionError), iec.quantize(pipe, made, kernel="reference"):
        raise ZeroDivisionError
    assert quantized.state(pipe) == before
    part = iec.quantize(pipe, made, kernel="reference")
    assert torch.equal(run(DDIM, pipe).image, rounded)
    for _ in range(2):
        part.undo()
        iec.undo(pipe)
    assert quantized.state(pipe) == before and torch.equal(run(DDIM, pipe).image, plain)


@both
def test_undo_after_an_aborted_run(pipe: Any, kernel: str) -> None:
    plain, before = run(DDIM, pipe).image, quantized.state(pipe)
    iec.quantize(pipe, calibration("ddim"), kernel=kernel)
    rounded = run(DDIM, pipe).image
    _abort(pipe, after=2)
    assert torch.equal(run(DDIM, pipe).image, rounded)
    _abort(pipe, after=3)
    iec.undo(pipe)
    assert quantized.state(pipe) == before and torch.equal(run(DDIM, pipe).image, plain)


def _abort(pipe: Any, after: int) -> None:
    """A run that an exception ends in its evaluation number `after`."""
    count = itertools.count(1)

    def boom(*_: Any) -> None:
        if next(count) == after:
            raise ZeroDivisionError

    handle = pipe.unet.register_forward_pre_hook(boom)
    with pytest.raises(ZeroDivisionError):
        run(DDIM, pipe)
    handle.remove()


def test_the_description_of_what_is_on(pipe: Any) -> None:
    made = calibration("ddim")
    part = iec.quantize(pipe, made, kernel="reference")
    found = re.fullmatch(
        r"W8A8, kernel reference, (\d+) layers, weights ([\d.]+) MiB for ([\d.]+) MiB", part.describe()
    )
    assert found is not None and made.quant is not None and int(found[1]) == len(made.quant.layers)
    assert float(found[2]) == round(made.weight_bytes / 2**20, 2) and "active" in repr(part)
    plain = iec.summary(pipe)  # also where IEC is not enabled
    assert plain.quant == part.describe() and plain.as_dict()["quant"] == plain.quant and not plain.enabled
    assert str(plain).splitlines() == ["IEC is not enabled on this DDIMPipeline.", f"  quant        {plain.quant}"]
    with iec.enable(pipe, steps="all") as session:
        run(DDIM, pipe)
    assert f"  quant        {plain.quant}" in str(session.summary()).splitlines()
    iec.undo(pipe)
    assert iec.summary(pipe).quant is None and "quant " not in str(iec.summary(pipe)) and "off" in repr(part)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_is_no_calibration(pipe: Any, tmp_path: Path) -> None:
    made, before = calibration("ddim"), quantized.state(pipe)
    with pytest.raises(TypeError, match=r"expected an iec\.Calibration"):
        iec.quantize(pipe, 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="holds no quantization"):
        iec.quantize(pipe, dataclasses.replace(made, quant=None))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        iec.quantize(pipe, tmp_path)
    with pytest.raises(TypeError, match="no scheduler"):
        iec.quantize(object(), made)
    with pytest.raises(ValueError, match="kernel is 'fast'"):
        iec.quantize(pipe, made, kernel="fast")
    with pytest.raises(RuntimeError, match="kernel 'cuda' cannot run here"):
        iec.quantize(pipe, made, kernel="cuda")
    assert quantized.state(pipe) == before


def test_quantizing_twice(pipe: Any) -> None:
    iec.quantize(pipe, calibration("ddim"), kernel="reference")
    rounded = run(DDIM, pipe).image
    with pytest.raises(ValueError, match=r"quantized already \(W8A8, kernel reference.*iec\.undo\(pipe\)"):
        iec.quantize(pipe, calibration("ddim"))
    with pytest.raises(ValueError, match=r"IEC is on this pipeline.*iec\.undo\(pipe\)"):
        iec.calibrate(pipe, num_inference_steps=2, num_samples=1)
    assert torch.equal(run(DDIM, pipe).image, rounded)


def _other_weights(pipe: Any) -> None:
    pipe.unet.conv_in.weight.data.view(-1)[3] += 1e-3


def _other_architecture(pipe: Any) -> None:
    pipe.unet.register_to_config(norm_eps=1e-6)


def _other_scheduler(pipe: Any) -> None:
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)


def _other_noise(pipe: Any) -> None:
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, beta_end=0.03)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_other_weights, "weights of unet"),
        (_other_architecture, "architecture of unet"),
        (_other_scheduler, "scheduler: calibrated on DDIMScheduler, found DDPMScheduler"),
        (_other_noise, "scheduler_config"),
    ],
)
def test_another_pipeline_is_refused_and_the_field_named(change: Callable[[Any], None], field: str) -> None:
    made = calibration("ddim")
    pipe = DDIM.build(fresh=True)
    change(pipe)
    before = quantized.state(pipe)
    with pytest.raises(ValueError, match=f"made on another pipeline: .*{field}"):
        iec.quantize(pipe, made)
    assert quantized.state(pipe) == before
    with pytest.raises(ValueError, match=r"class of unet: .*class of transformer"):
        iec.quantize(DIT.build(), made)


def test_another_number_of_steps_is_refused(pipe: Any) -> None:
    iec.quantize(pipe, calibration("ddim"), kernel="reference")
    rounded = run(DDIM, pipe).image
    with pytest.raises(ValueError, match=r"quantized for 4 steps \(750 … 0\).*has 5 steps;.*num_inference_steps=4"):
        run(DDIM, pipe, num_inference_steps=5)
    assert torch.equal(run(DDIM, pipe).image, rounded)
    with iec.enable(pipe, steps="all"), pytest.raises(ValueError, match="has 3 steps"):
        run(DDIM, pipe, num_inference_steps=3)


def test_other_timesteps_are_refused() -> None:
    """Flux shifts its schedule by the size of the picture, so that as many steps may be others."""
    pipe = FLUX.build()
    iec.quantize(pipe, calibration("flux"), kernel="reference")
    run(FLUX, pipe)
    with pytest.raises(ValueError, match=r"this run has 4 steps whose timesteps differ"):
        run(FLUX, pipe, height=32, width=32)


def test_evaluations_outside_a_run_are_refused(pipe: Any) -> None:
    x = torch.zeros(1, 3, 8, 8)
    iec.quantize(pipe, calibration("ddim"), kernel="reference")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"outside a run of its pipeline.*iec\.undo\(pipe\)"):
            pipe.unet(x, 10)
        run(DDIM, pipe)
    iec.undo(pipe)
    pipe.unet(x, 10)


def test_keep_float_false_releases_the_weights() -> None:
    made = calibration("ddim")
    assert made.quant is not None
    pipe = DDIM.build(fresh=True)
    other = DDIM.build()
    iec.quantize(other, made, kernel="reference")
    expected = run(DDIM, other).image
    tiny.GIVEN.remove(pipe)  # nothing takes this off again
    held = sum(p.numel() for p in pipe.unet.parameters())
    part = iec.quantize(pipe, made, kernel="reference", keep_float=False)
    gone = sum(part.weight.codes.numel() for layer in made.quant.layers.values() for part in layer.parts)
    assert sum(p.numel() for p in pipe.unet.parameters()) == held - gone > 0
    assert all(pipe.unet.get_submodule(name[5:]).weight.untyped_storage().nbytes() == 0 for name in made.quant.layers)
    assert torch.equal(run(DDIM, pipe).image, expected)
    with iec.enable(pipe, steps="all", relax=0.0):
        assert torch.equal(run(DDIM, pipe).image, expected)
    for off in (part.undo, lambda: iec.undo(pipe)):
        with pytest.raises(RuntimeError, match=r"keep_float=False.*load it anew"):
            off()
        assert part.active and torch.equal(run(DDIM, pipe).image, expected)


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "sd", "dit"])
@both
def test_layer_by_layer_against_an_emulation_in_float64(name: str, kernel: str) -> None:
    """Every layer, at every step, on the input that it really gets."""
    case = CASES[name]
    made = stepwise(calibration(name))
    pipe = case.build()
    model = getattr(pipe, case.denoiser)
    iec.quantize(pipe, made, kernel=kernel)
    assert made.quant is not None
    now = Times(model, made.origin.timesteps)
    seen: dict[str, set[int]] = {}
    hooks = [now.handle]
    for full, layer in made.quant.layers.items():

        def check(
            module: nn.Module, args: tuple[Tensor], output: Tensor, full: str = full, layer: QuantizedLayer = layer
        ) -> None:
            expected = emulated(layer, module, args[0], now())
            assert (output.double() - expected).abs().max() <= 2e-6 * expected.abs().max() * len(layer.parts) + 1e-5
            seen.setdefault(full, set()).add(now())

        hooks.append(model.get_submodule(full.split(".", 1)[1]).register_forward_hook(check))
    run(case, pipe)
    for hook in hooks:
        hook.remove()
    fused = set(made.quant.layers) - set(seen)  # with their neighbours: those are below
    assert not fused or kernel == "onednn"
    assert seen == {full: {0, 1, 2, 3} for full in made.quant.layers if full not in fused}


@pytest.mark.skipif(quantized.needs_onednn() is not None, reason="no oneDNN here")
@pytest.mark.parametrize("name", [*FAMILIES, "sdxl"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_integer_kernel_on_whole_pipelines(name: str, bits: int) -> None:
    """Against the reference. A layer agrees to float32's rounding; where that turns a code of a later layer, one level of
    that layer's quantizer comes in, which sampling carries on. Measured, relative to the picture: 1e-7 … 3e-4 where no
    code turns, up to 0.06 where one does at an early step; the quantization itself is 0.1 from full precision.
    """
    case = CASES[name]
    made = calibration(name, weight_bits=bits)
    images = {}
    for kernel in ("reference", "onednn"):
        pipe = case.build()
        with iec.quantize(pipe, made, kernel=kernel):
            images[kernel] = run(case, pipe).image
    plain = run(case, case.build()).image
    effect = deviation(images["reference"], plain)
    assert deviation(images["onednn"], images["reference"]) < effect


def test_weights_of_eight_bits_come_closer(pipe: Any) -> None:
    plain = run(DDIM, pipe).image
    errors = []
    for bits in (8, 6, 4, 2):
        # at 8 and 6 bits it is the activations that err most, and correcting the output hides what the weights do
        made = calibration("ddim", weight_bits=bits, output_correction="none")
        with iec.quantize(pipe, made, kernel="reference"):
            errors.append(deviation(run(DDIM, pipe).image, plain))
    assert errors == sorted(errors)


@both
def test_an_image_depends_on_its_seed_and_not_on_its_batch(kernel: str) -> None:
    """Per-tensor scales are constants, so batches differ by float32's rounding at most (which may turn single codes)."""
    from iec.evaluate.sampling import sample

    pipe = DDIM.build()
    with iec.quantize(pipe, calibration("ddim"), kernel=kernel):
        one, two = (sample(pipe, range(4), 4, batch_size=size).float() for size in (1, 4))
        assert torch.equal(two, sample(pipe, range(4), 4, batch_size=4).float())
    assert (one - two).abs().max() <= 2 and (one != two).float().mean() < 0.05


@pytest.mark.parametrize("name", FAMILIES)
@both
def test_corrections_of_weight_zero_are_the_plain_quantized_run(name: str, kernel: str) -> None:
    case = CASES[name]
    pipe = case.build()
    iec.quantize(pipe, calibration(name), kernel=kernel)
    rounded = run(case, pipe)
    off: list[dict[str, Any]] = [{"steps": "all", "relax": (0.0, 0.0)}, {"steps": "none"}]
    for options in off:
        with iec.enable(pipe, **options) as session:
            found = run(case, pipe)
        assert torch.equal(found.image, rounded.image), options
        assert session.evaluations == found.evaluations
    with iec.enable(pipe, steps="all"):
        assert not torch.equal(run(case, pipe).image, rounded.image)


# --- the scales of the step -------------------------------------------------------------------------------------------


class Spy(Reference):
    """The reference kernel, which writes down the step that every layer is given."""

    name = "spy"

    def __init__(self, now: Callable[[], int]) -> None:
        self.now, self.calls = now, list[tuple[int, int, float]]()

    def build(self, module: nn.Module, layer: QuantizedLayer) -> Any:
        op = super().build(module, layer)
        scales = layer.parts[0].act.scale.tolist()

        def called(x: Tensor, step: int) -> Tensor:
            self.calls.append((self.now(), step, scales[step] / scales[self.now()]))
            return op(x, step)

        return called


def _spied(name: str, monkeypatch: pytest.MonkeyPatch, steps: int = 4) -> tuple[Any, Spy, int]:
    """A pipeline with widely different scales at its steps, what its layers are given, and how many calls of them an
    evaluation of the model makes.
    """
    made = stepwise(calibration(name, steps))
    case = CASES[name]
    pipe = case.build()
    model = getattr(pipe, case.denoiser)
    layers = quantized.calls(model, lambda: run(case, pipe)) // case.steps
    spy = Spy(Times(model, made.origin.timesteps))
    monkeypatch.setitem(KERNELS, "spy", spy)
    iec.quantize(pipe, made, kernel="spy")
    return pipe, spy, layers


def _check(spy: Spy, visits: dict[int, int], layers: int) -> None:
    """Every layer was given the step of the timestep that its model was called with, `visits` times each."""
    assert all(step == now and ratio == 1.0 for now, step, ratio in spy.calls)
    steps = [now for now, _, _ in spy.calls]
    assert {step: steps.count(step) for step in set(steps)} == {step: n * layers for step, n in visits.items()}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("relax", [(0.5,), (1.0, 0.5)])
def test_corrections_use_the_scales_of_their_step(
    name: str, relax: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails where a layer counts its own calls."""
    case = CASES[name]
    pipe, spy, layers = _spied(name, monkeypatch)
    with iec.enable(pipe, steps="all", relax=relax):
        run(case, pipe)
        _check(spy, dict.fromkeys(range(4), 1 + len(relax)), layers)
    spy.calls.clear()
    with iec.enable(pipe, steps="at:0,2", relax=relax):
        run(case, pipe)
        _check(spy, {0: 1 + len(relax), 1: 1, 2: 1 + len(relax), 3: 1}, layers)
    spy.calls.clear()
    run(case, pipe)
    _check(spy, dict.fromkeys(range(4), 1), layers)


def test_scales_after_an_aborted_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, spy, layers = _spied("ddim", monkeypatch)
    with iec.enable(pipe, steps="all"):
        right = run(DDIM, pipe).image
        for after in (2, 4, 7):  # in a correction, in an ordinary visit
            _abort(pipe, after)
            spy.calls.clear()
            assert torch.equal(run(DDIM, pipe).image, right)
            _check(spy, dict.fromkeys(range(4), 2), layers)


def test_scales_where_converged_corrections_are_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, spy, layers = _spied("ddim", monkeypatch)
    with iec.enable(pipe, steps="at:1", relax=(0.5,) * 3, tol=10.0):
        run(DDIM, pipe)
    _check(spy, {0: 1, 1: 2, 2: 1, 3: 1}, layers)


def test_scales_of_image_to_image_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They begin in the middle of the list: with the scales of that step, not of the first."""
    case = CASES["sd-img2img"]
    assert calibration("sd-img2img", 6).origin.num_steps == 6
    pipe, spy, layers = _spied("sd-img2img", monkeypatch, 6)
    run(case, pipe)
    _check(spy, dict.fromkeys(range(2, 6), 1), layers)
    spy.calls.clear()
    with iec.enable(pipe, steps="all"):
        run(case, pipe)
    _check(spy, dict.fromkeys(range(2, 6), 2), layers)
    with pytest.raises(ValueError, match="quantized for 6 steps"):
        run(case, pipe, num_inference_steps=5)


def test_scales_under_a_cache_that_skips_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, spy, whole = _spied("ddim", monkeypatch)
    iec.cache(pipe, iec.DeepCache(interval=2))
    with iec.enable(pipe, steps="all"):
        run(DDIM, pipe)
        assert iec.summary(pipe).reused == 2 and iec.summary(pipe).refreshed == 6
    assert all(step == now and ratio == 1.0 for now, step, ratio in spy.calls)
    steps = [now for now, _, _ in spy.calls]
    assert steps.count(0) == steps.count(2) == 2 * whole
    assert whole < steps.count(1) == steps.count(3) < 2 * whole  # a reuse, and a correction that is a whole pass


@pytest.mark.parametrize("options", [{"steps": "all"}, {"steps": "at:1,3", "relax": (1.0, 0.5)}, {"steps": "none"}])
@pytest.mark.parametrize("name", ["ddim", "dit", "sd"])
def test_samples_are_those_of_a_model_quantized_by_hand(name: str, options: dict[str, Any]) -> None:
    """By hand: hooks that choose the scales by the timestep that the model is called with. A third model, whose layers
    count their calls, gives something else, so that the test can tell.
    """
    case = CASES[name]
    made = without_products(stepwise(calibration(name)))
    images: dict[str, Tensor] = {}
    for way in ("ours", "by timestep", "by counting"):
        pipe = case.build()
        model = getattr(pipe, case.denoiser)
        now = Times(model, made.origin.timesteps)
        with iec.enable(pipe, **options):
            if way == "ours":
                iec.quantize(pipe, made, kernel="reference")
                images[way] = run(case, pipe).image
            else:
                step = now if way == "by timestep" else now.counted
                with by_hand(model, made, case.denoiser, step):
                    images[way] = run(case, pipe).image
        now.handle.remove()
        iec.undo(pipe)
    near = deviation(images["ours"], images["by timestep"])  # where rounding in float64 turns a code: 0.06
    assert near < 0.1
    if options["steps"] != "none":
        assert deviation(images["by counting"], images["by timestep"]) > max(0.1, 1.5 * near)


# --- company ----------------------------------------------------------------------------------------------------------


@both
def test_before_and_after_a_cache(kernel: str) -> None:
    made, pipe = calibration("ddim"), DDIM.build()
    before, plain = quantized.state(pipe), run(DDIM, pipe).image
    with iec.cache(pipe, iec.DeepCache(interval=2)):
        reused = run(DDIM, pipe).image

    def on(part: str) -> Any:
        if part == "quantize":
            return iec.quantize(pipe, made, kernel=kernel)
        return iec.cache(pipe, iec.DeepCache(interval=2)) if part == "cache" else iec.enable(pipe, steps="refresh")

    with iec.quantize(pipe, made, kernel=kernel):
        rounded = run(DDIM, pipe).image
    images = []
    orders = itertools.permutations(("quantize", "cache", "enable"))
    for order, first in zip(orders, itertools.cycle(("quantize", "cache")), strict=False):
        parts = {part: on(part) for part in order}
        images.append(run(DDIM, pipe).image)
        parts[first].undo()
        iec.disable(pipe)
        assert torch.equal(run(DDIM, pipe).image, reused if first == "quantize" else rounded)
        iec.undo(pipe)
        assert quantized.state(pipe) == before
    assert all(torch.equal(image, images[0]) for image in images)
    assert not torch.equal(images[0], plain) and torch.equal(run(DDIM, pipe).image, plain)


def test_a_scheduler_assigned_later(pipe: Any) -> None:
    plain = quantized.state(pipe)
    iec.quantize(pipe, calibration("ddim"), kernel="reference")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(RuntimeError, match="outside a run of its pipeline"):
        run(DDIM, pipe)
    iec.undo(pipe)
    assert quantized.state(pipe) == {**plain, "scheduler": id(pipe.scheduler)}


def test_two_pipelines_in_one_process() -> None:
    """With models of their own, in turns; each has its clock."""
    pipes = [DDIM.build(fresh=True), DIT.build(fresh=True), DDIM.build(fresh=True)]
    cases = [DDIM, DIT, DDIM]
    made = [calibration("ddim"), calibration("dit"), calibration("ddim", weight_bits=4)]
    alone = []
    for pipe, case, one in zip(pipes, cases, made, strict=True):
        with iec.quantize(pipe, one, kernel="reference"):
            alone.append(run(case, pipe).image)
    for pipe, one in zip(pipes, made, strict=True):
        iec.quantize(pipe, one, kernel="reference")
    iec.enable(pipes[2], steps="all", relax=0.0)
    for _ in range(2):
        for pipe, case, image in zip(pipes, cases, alone, strict=True):
            assert torch.equal(run(case, pipe).image, image)
    iec.undo(pipes[0])
    assert torch.equal(run(DDIM, pipes[2]).image, alone[2])


def test_a_model_that_two_pipelines_share() -> None:
    """The layers of one model have one forward: the other pipeline is told, and not given wrong pictures."""
    one, two = DDIM.build(), DDIM.build()
    plain = run(DDIM, two).image
    iec.quantize(one, calibration("ddim"), kernel="reference")
    with pytest.raises(RuntimeError, match="outside a run of its pipeline"):
        run(DDIM, two)
    iec.undo(one)
    assert torch.equal(run(DDIM, two).image, plain)


def test_copies_are_refused(pipe: Any) -> None:
    iec.quantize(pipe, calibration("ddim"), kernel="reference")
    with pytest.raises(RuntimeError, match="before copying"):
        copy.deepcopy(pipe)


# --- end to end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "ddpm", "ldm", "sd", "sd-controlnet", "sdxl", "sd3", "dit", "flux"])
def test_end_to_end(name: str, tmp_path: Path) -> None:
    """Calibrate with the pipeline's own arguments (guidance doubles the batch), save, load, quantize, correct, undo."""
    case = CASES[name]
    pipe = case.build()
    before, plain = quantized.state(pipe), run(case, pipe)
    config = iec.QuantConfig(**QUICK)
    made = iec.calibrate(pipe, config, num_inference_steps=4, num_samples=2, batch_size=2, **arguments(case))
    assert quantized.state(pipe) == before
    assert made.quant is not None and made.origin.num_steps == case.steps and made.origin.num_samples == 2
    layers = [m for m in getattr(pipe, case.denoiser).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(made.quant.layers) + sum("never ran" in why for why in made.quant.skipped.values()) == len(layers)
    assert made.weight_bytes < 0.55 * made.float_bytes  # tiny layers: six bytes a channel count
    made.save(tmp_path / "calibration")
    iec.quantize(pipe, tmp_path / "calibration")
    session = iec.enable(pipe, steps="ends:1")
    found = run(case, pipe)
    summary = iec.summary(pipe)
    assert summary.evaluations == session.evaluations == found.evaluations == case.steps + 2
    assert summary.quant is not None and summary.quant.startswith("W8A8, kernel ")
    assert found.image.isfinite().all() and found.image.shape == plain.image.shape
    iec.undo(pipe)
    assert quantized.state(pipe) == before and torch.equal(run(case, pipe).image, plain.image)


def test_saved_and_loaded_is_bit_identical(tmp_path: Path) -> None:
    images = []
    made = calibration("sd", weight_bits=4, act_bits=6)
    made.save(tmp_path)
    loaded = Calibration.load(tmp_path)
    assert quantized.same(made.quant, loaded.quant) and made.origin == loaded.origin
    for kernel in ("reference", *(["onednn"] if quantized.needs_onednn() is None else [])):
        for one in (made, loaded, str(tmp_path)):
            pipe = SD.build()
            with iec.quantize(pipe, one, kernel=kernel), iec.enable(pipe, steps="all"):
                images.append(run(SD, pipe).image)
        assert torch.equal(images[-3], images[-2]) and torch.equal(images[-3], images[-1])
