"""iec.calibrate: what it learns, that it leaves nothing behind, resumes where it was stopped, and keeps no activations."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import iec
import quantized
from iec.core.affine import search
from quantized import QUICK, arguments, same
from tiny import CASES, run

DDIM, SD = CASES["ddim"], CASES["sd"]
SETTINGS: dict[str, Any] = {"num_inference_steps": 3, "num_samples": 6, "batch_size": 2, "seed": 5}
ONCE = iec.QuantConfig(output_correction="none", **QUICK)  # goes through the samples once, for the activations
TWICE = iec.QuantConfig(**QUICK)  # and a second time, for the outputs


@pytest.fixture
def pipe() -> Any:
    return DDIM.build()


class Stop(Exception):
    """Ends a calibration."""


def stopping(after: int, at: str = "samples") -> Any:
    def progress(what: str, done: int, total: int) -> None:
        if what == at and done >= after:
            raise Stop

    return progress


@pytest.mark.parametrize("name", ["ddim", "sd", "dit", "flux"])
def test_nothing_is_left_and_nothing_is_changed(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    plain, before = run(case, pipe).image, quantized.state(pipe)
    settings = {"num_inference_steps": 4, "num_samples": 2, "batch_size": 2, **arguments(case)}
    made = iec.calibrate(pipe, TWICE, **settings)
    assert quantized.state(pipe) == before and made.quant is not None
    assert torch.equal(run(case, pipe).image, plain)
    for what in ("samples", "outputs"):
        with pytest.raises(Stop):
            iec.calibrate(pipe, TWICE, progress=stopping(1, what), **settings)
        assert quantized.state(pipe) == before
    assert torch.equal(run(case, pipe).image, plain)


def test_the_trajectory_is_that_of_full_precision(pipe: Any) -> None:
    """In each passage the denoiser is called with, and answers, what it does in a plain run of the same seeds."""
    from iec.pipeline.batches import batches

    seen: list[list[Tensor]] = []
    for calibrate in (False, True):
        seen.append([])
        handle = pipe.unet.register_forward_hook(lambda _, args, out: seen[-1].extend((args[0], out[0])))
        if calibrate:
            iec.calibrate(pipe, TWICE, **SETTINGS)
        else:
            for call in batches(pipe, range(5, 11), 3, 2, "latent"):
                pipe(**call.arguments)
        handle.remove()
    assert len(seen[0]) == 2 * 3 * 3 and len(seen[1]) == 2 * len(seen[0])
    assert all(torch.equal(one, two) for one, two in zip(seen[0] * 2, seen[1], strict=True))


def test_scales_are_running_means_of_what_was_seen(pipe: Any) -> None:
    """In the first layer, whose input no rounding has touched: batch by batch, moved by 1 − momentum."""
    inputs: list[Tensor] = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    config = iec.QuantConfig(momentum=0.75, layers="conv_in", products=False, output_correction="none")
    made = iec.calibrate(pipe, config, **SETTINGS)
    handle.remove()
    assert made.quant is not None and len(inputs) == 9
    table = made.quant.layers["unet.conv_in"].parts[0].act
    for step in range(3):
        found = [search(x.reshape(1, -1), 8) for x in inputs[step::3]]
        scale, zero = found[0]
        for other in found[1:]:
            scale, zero = 0.75 * scale + 0.25 * other.scale, 0.75 * zero + 0.25 * other.zero
        assert torch.allclose(table.scale[step], scale, rtol=1e-6)
        assert table.zero[step] == torch.round(zero)


def test_what_a_calibration_tells_of_itself(pipe: Any) -> None:
    told: list[tuple[str, int, int]] = []
    settings, config = {**SETTINGS, "num_samples": 5}, iec.QuantConfig(weight_bits=4, **QUICK)
    made = iec.calibrate(pipe, config, progress=lambda *a: told.append(a), eta=0.0, **settings)
    assert told == [(what, done, 5) for what in ("samples", "outputs") for done in (2, 4, 5)]
    origin, quant = made.origin, made.quant
    assert (origin.pipeline, origin.denoisers, origin.scheduler) == (
        "DDIMPipeline",
        {"unet": "UNet2DModel"},
        "DDIMScheduler",
    )
    assert (origin.num_steps, origin.timesteps) == (3, (666.0, 333.0, 0.0))
    assert (origin.num_samples, origin.seed, origin.settings) == (5, 5, {"batch_size": 2, "eta": 0.0})
    assert quant is not None and iec.QuantConfig.from_dict(quant.config) == config
    for name, layer in quant.layers.items():
        for part in layer.parts:
            edge = name in ("unet.conv_in", "unet.conv_out")
            assert part.weight.bits == (8 if edge else 4) and part.act.bits == 8
            assert part.act.scale.shape == part.act.zero.shape == (3,) and bool((part.act.scale > 0).all())
            assert part.weight.codes.dtype == torch.uint8 and int(part.weight.codes.max()) < 2**part.weight.bits
            assert (part.gain is not None) == (name == "unet.conv_out")
    last = quant.layers["unet.conv_out"]
    assert last.bias is not None and last.parts[0].gain is not None
    assert last.bias.shape == last.parts[0].gain.shape == (3, 3) and last.bias.dtype == torch.float32


def test_the_same_again(pipe: Any) -> None:
    one, two = (iec.calibrate(pipe, TWICE, **SETTINGS) for _ in range(2))
    assert same(one.quant, two.quant) and one.origin == two.origin
    other = iec.calibrate(pipe, TWICE, **{**SETTINGS, "seed": 6})
    assert not same(one.quant, other.quant)


def test_schedules_longer_than_asked_for() -> None:
    """Heun evaluates all steps but the last twice; each evaluation has its own scales."""
    from iec.evaluate.sampling import sample, with_scheduler

    pipe = with_scheduler(DDIM.build(), "HeunDiscreteScheduler")
    made = iec.calibrate(pipe, TWICE, num_inference_steps=4, num_samples=2)
    assert made.origin.num_steps == len(made.origin.timesteps) == 7
    plain = sample(pipe, range(2), 4).float()
    with iec.quantize(pipe, made, kernel="reference"):
        assert 0 < (sample(pipe, range(2), 4).float() - plain).abs().mean() < 20


def test_layers_that_never_run_are_skipped(pipe: Any) -> None:
    pipe = DDIM.build(fresh=True)
    pipe.unet.unused = nn.Linear(3, 3)
    made = iec.calibrate(pipe, TWICE, **{**SETTINGS, "num_samples": 2})
    assert made.quant is not None and "unet.unused" not in made.quant.layers
    assert made.quant.skipped["unet.unused"] == "never ran during the calibration"
    told: list[str] = []
    config = iec.QuantConfig(layers="*.conv1", products=False, **QUICK)
    chosen = iec.calibrate(pipe, config, progress=lambda what, *_: told.append(what), **{**SETTINGS, "num_samples": 2})
    assert told == ["samples"]  # the last layer is not quantized, so there is no output to correct
    assert chosen.quant is not None and all(name.endswith(".conv1") for name in chosen.quant.layers)
    assert not chosen.quant.products and chosen.quant.skipped["unet.conv_in"] == "excluded by the filter"


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"quant": "W8A8"}, TypeError, "expected an iec.QuantConfig"),
        ({"num_samples": 0}, ValueError, "expected at least 1"),
        ({"batch_size": 0}, ValueError, "expected at least 1"),
        ({"num_inference_steps": 0}, ValueError, "expected at least 1"),
        ({"prompt": "a cat"}, ValueError, "takes no prompt"),
        ({"generator": 3}, ValueError, "set by IEC itself"),
        ({"quant": iec.QuantConfig(layers="nowhere")}, ValueError, "no layer is named 'nowhere'; they are conv_in, "),
        ({"quant": iec.QuantConfig(layers=("*", "!conv_inn"))}, ValueError, "named 'conv_inn'; did you mean 'conv_in'"),
        ({"quant": iec.QuantConfig(layers="!*")}, TypeError, "nothing to quantize"),
    ],
)
def test_refusals_leave_the_pipeline_alone(pipe: Any, changes: dict[str, Any], error: Any, message: str) -> None:
    before = quantized.state(pipe)
    with pytest.raises(error, match=message):
        iec.calibrate(pipe, **{**SETTINGS, **changes})
    assert quantized.state(pipe) == before


def test_only_the_plain_pipeline_is_calibrated(pipe: Any) -> None:
    for on in (lambda: iec.enable(pipe), lambda: iec.cache(pipe, iec.DeepCache(interval=2))):
        on()
        with pytest.raises(ValueError, match=r"IEC is on this pipeline; .*iec\.undo\(pipe\)"):
            iec.calibrate(pipe, **SETTINGS)
        iec.undo(pipe)
    with pytest.raises(TypeError, match="expected a pipeline object, found"):
        iec.calibrate(object(), **SETTINGS)


def test_one_prompt_for_all_or_one_for_each() -> None:
    pipe = SD.build()
    settings = {**SETTINGS, "num_samples": 3, "height": 16, "width": 16, "quant": TWICE}
    one = iec.calibrate(pipe, prompt="a cat", **settings)
    three = iec.calibrate(pipe, prompt=["a cat"] * 3, **settings)
    assert same(one.quant, three.quant) and one.origin.settings["prompt"] == "a cat"
    with pytest.raises(ValueError, match="prompt has 2 entries for 3 seeds"):
        iec.calibrate(pipe, prompt=["a", "cat"], **settings)


# --- stopped and resumed ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole() -> Any:
    """A calibration that nothing interrupted."""
    return iec.calibrate(DDIM.build(), TWICE, **SETTINGS)


@pytest.mark.parametrize("stopped", [("samples", 2), ("samples", 6), ("outputs", 4), ("outputs", 6)])
def test_resumed_is_uninterrupted(pipe: Any, whole: Any, stopped: tuple[str, int], tmp_path: Path) -> None:
    """Also after the last batch, but before the calibration was saved: then nothing is left to sample."""
    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Stop):
        iec.calibrate(pipe, TWICE, checkpoint_path=file, progress=stopping(stopped[1], stopped[0]), **SETTINGS)
    assert file.is_file()
    told: list[tuple[str, int]] = []
    evaluated: list[None] = []
    handle = pipe.unet.register_forward_hook(lambda *_: evaluated.append(None))
    resumed = iec.calibrate(
        pipe, TWICE, checkpoint_path=file, progress=lambda what, done, _: told.append((what, done)), **SETTINGS
    )
    handle.remove()
    batches = [(what, done) for what in ("samples", "outputs") for done in (2, 4, 6)]
    left = batches[batches.index(stopped) + 1 :]
    assert told == left and len(evaluated) == 3 * len(left)
    assert same(resumed.quant, whole.quant) and resumed.origin == whole.origin
    assert file.exists()  # until the caller has saved the calibration


def test_a_checkpoint_of_something_else_is_refused(pipe: Any, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Stop):
        iec.calibrate(pipe, TWICE, checkpoint_path=file, progress=stopping(2), **SETTINGS)
    before = quantized.state(pipe)
    for changes in (
        {"seed": 6},
        {"num_inference_steps": 4},
        {"num_samples": 8},
        {"batch_size": 3},
        {"eta": 1.0},
        {"quant": iec.QuantConfig(act_bits=6, **QUICK)},
        {"quant": ONCE},
    ):
        with pytest.raises(ValueError, match="belongs to another run"):
            iec.calibrate(pipe, checkpoint_path=file, **{**SETTINGS, "quant": TWICE, **changes})
        assert file.is_file() and quantized.state(pipe) == before
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="truncated or damaged checkpoint"):
        iec.calibrate(pipe, TWICE, checkpoint_path=file, **SETTINGS)


VICTIM = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import iec
from tiny import CASES

def progress(what, done, total):
    print(what, done, flush=True)
    if (what, done) == {last!r}:
        time.sleep(600)

options = eval({options!r}, {{"iec": iec}})
iec.calibrate(CASES["ddim"].build(), checkpoint_path={file!r}, progress=progress, **options, **{settings!r})
"""
# what is calibrated, what a run tells until it is killed, and what is left to tell
KILLED = {
    "outputs": (
        f"dict(quant=iec.QuantConfig(**{QUICK!r}))",
        ["samples 2", "samples 4", "samples 6", "outputs 2", "outputs 4"],
        ["outputs 6"],
    ),
    "reconstruction under a cache": (
        "dict(quant=iec.QuantConfig(weight_bits=4, layers='up_blocks.1.*', products=False, output_correction='none', "
        "weight_method='max', act_method='max'), cache=iec.CacheQuant(2, schedule='uniform'), "
        "reconstruct=iec.Reconstruction(iters=3, num_tuples=18, batch_size=4))",
        [*(f"features {n}" for n in (2, 4, 6)), *(f"samples {n}" for n in (2, 4, 6)), "reconstruction 1"],
        ["reconstruction 2"],
    ),
}


@pytest.mark.parametrize("case", KILLED)
def test_kill_nine_loses_nothing_but_the_piece_under_way(pipe: Any, case: str, tmp_path: Path) -> None:
    """The models of `tiny` are the same in every process, so the checkpoint of one that was killed fits here."""
    options, before, after = KILLED[case]
    file, last = tmp_path / "checkpoint.safetensors", before[-1].split()
    code = VICTIM.format(
        tests=str(Path(__file__).parent),
        file=str(file),
        settings=SETTINGS,
        options=options,
        last=(last[0], int(last[1])),
    )
    victim = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    assert [victim.stdout.readline().strip() for _ in before] == before
    os.kill(victim.pid, signal.SIGKILL)
    assert victim.wait(timeout=30) == -signal.SIGKILL
    victim.stdout.close()
    left: list[str] = []
    asked = eval(options, {"iec": iec})
    resumed = iec.calibrate(
        pipe, checkpoint_path=file, progress=lambda what, done, _: left.append(f"{what} {done}"), **asked, **SETTINGS
    )
    assert left == after
    assert same(resumed.quant, iec.calibrate(pipe, **asked, **SETTINGS).quant)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_samples(pipe: Any) -> None:
    """Between two batches of a passage, nothing lives that did not live after the first one."""
    kept: dict[str, list[tuple[int, int]]] = {}

    def progress(what: str, *_: object) -> None:
        gc.collect()
        tensors = [held for held in gc.get_objects() if issubclass(type(held), Tensor)]
        kept.setdefault(what, []).append((len(tensors), sum(tensor.numel() for tensor in tensors)))

    iec.calibrate(pipe, TWICE, progress=progress, **SETTINGS)
    assert list(kept) == ["samples", "outputs"]
    assert all(len(found) == 3 and found[1:] == found[:1] * 2 for found in kept.values())


def test_memory_grows_with_steps_by_a_few_numbers_a_layer(pipe: Any, tmp_path: Path) -> None:
    sizes = []
    for steps in (2, 12):
        file = tmp_path / f"{steps}"
        settings = {**SETTINGS, "num_inference_steps": steps, "num_samples": 2}
        with pytest.raises(Stop):
            iec.calibrate(pipe, TWICE, checkpoint_path=file, progress=stopping(1, "outputs"), **settings)
        sizes.append(file.stat().st_size)
    tables = 51 + 5 + 4 * 4  # layers, second halves of split ones, products: about
    moments = 3 * 5 * 8  # of the outputs' three channels
    assert sizes[1] - sizes[0] < 10 * (tables * 4 * 4 + moments)


def test_large_activations_are_searched_in_bounded_time() -> None:
    """A tensor of millions of values is searched on a sample of fixed places, and on its extremes."""
    from iec.quant.observe import SAMPLE, StepSearch

    x = torch.randn(1, 2**22, generator=torch.Generator().manual_seed(0))
    x[0, 12345], x[0, 54321] = -9.0, 11.0
    started = time.perf_counter()
    one, two = (StepSearch(1, 8, iec.QuantConfig(act_method="max")) for _ in range(2))
    assert torch.equal(one(x, 0), two(x, 0)) and time.perf_counter() - started < 5.0
    assert one.scale[0] == pytest.approx(20 / 255) and x.numel() > 100 * SAMPLE
