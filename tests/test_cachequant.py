"""iec.calibrate(cache=...) and iec.cache(pipe, CacheQuant): the plan, the compensation, and the cached run."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import iec
import quantized
import tiny
from iec.artifact.calibration import CacheTables
from iec.caches.cachequant import Compensation
from quantized import Times
from tiny import CASES, run
from trajectories import GuidedDDIM, at, regression, rows, runs, trajectory

DDIM, SD = CASES["ddim"], CASES["sd"]
SETTINGS: dict[str, Any] = {"num_inference_steps": 8, "num_samples": 4, "batch_size": 2, "seed": 3}
SD_SETTINGS = {**SETTINGS, "prompt": "a cat", "guidance_scale": 5.0, "height": 16, "width": 16}
OF = {"ddim": SETTINGS, "sd": SD_SETTINGS}


@pytest.fixture
def pipe() -> Any:
    return DDIM.build()


@pytest.fixture(scope="module")
def made() -> iec.Calibration:
    return iec.calibrate(DDIM.build(), cache=iec.CacheQuant(interval=3), **SETTINGS)


def images(pipe: Any, settings: dict[str, Any] = SETTINGS) -> Tensor:
    return torch.cat([torch.as_tensor(out[0]) for out in runs(pipe, settings)])


# --- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "sd"])
def test_interval_one_is_no_cache(name: str) -> None:
    pipe, settings = CASES[name].build(), {**OF[name], "num_samples": 2}
    plain = images(pipe, settings)
    made = iec.calibrate(pipe, cache=iec.CacheQuant(interval=1), **settings)
    assert made.quant is None and made.cache is not None and made.cache.refresh == tuple(range(8))
    assert bool((made.cache.gain == 1).all()) and not made.cache.offset.any()
    assert torch.equal(images(pipe, settings), plain)
    iec.cache(pipe, None, made)
    assert torch.equal(images(pipe, settings), plain)


@pytest.mark.parametrize("name", ["ddim", "sd"])
@pytest.mark.parametrize("branch", [None, 0])
def test_uniform_without_compensation_is_deepcache(name: str, branch: int | None) -> None:
    pipe, settings = CASES[name].build(), {**OF[name], "num_samples": 2}
    config = iec.CacheQuant(interval=3, branch=branch, schedule="uniform", compensate="none")
    made = iec.calibrate(pipe, cache=config, **settings)
    with iec.cache(pipe, iec.DeepCache(interval=3, branch=branch)):
        expected = images(pipe, settings)
    handle = iec.cache(pipe, config, made)
    assert torch.equal(images(pipe, settings), expected) and handle.counts() == (3, 5)
    handle.undo()
    assert not torch.equal(images(pipe, settings), expected)


# --- the plan and the compensation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "interval"), [("ddim", 2), ("ddim", 3), ("sd", 3)])
def test_the_plan_is_the_best_of_all(name: str, interval: int) -> None:
    """Of ⌈8/N⌉ groups of ⌈N/2⌉ … 2N steps, by trying them all on features that a hook recorded."""
    pipe, config = CASES[name].build(), iec.CacheQuant(interval=interval)
    made = iec.calibrate(pipe, cache=config, **OF[name])
    seen = trajectory(pipe, pipe.unet, "conv_out", OF[name], config)
    features = [at(seen, step, "feature").double() for step in range(8)]

    def cost(starts: tuple[int, ...]) -> float:
        groups = itertools.pairwise((*starts, 8))
        return sum(float((features[i] - features[a]).abs().sum()) for a, b in groups for i in range(a, b))

    splits = [(0, *rest) for rest in itertools.combinations(range(1, 8), math.ceil(8 / interval) - 1)]
    allowed = [
        starts
        for starts in splits
        if all(math.ceil(interval / 2) <= b - a <= 2 * interval for a, b in itertools.pairwise((*starts, 8)))
    ]
    ranked = sorted(allowed, key=cost)
    assert len(ranked) > 3 and cost(ranked[0]) < 0.999 * cost(ranked[1])  # so it is not a matter of rounding
    assert made.cache is not None and made.cache.refresh == ranked[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddim", {}),
        ("ddim", {"branch": 0, "schedule": "at:0,1,5"}),
        ("ddim", {"schedule": "uniform", "window": (2, 7)}),
        ("sd", {}),
    ],
)
def test_gain_and_offset_are_the_regression_of_the_features(name: str, options: dict[str, Any]) -> None:
    pipe, config = CASES[name].build(), iec.CacheQuant(**{"interval": 3, **options})
    tables = iec.calibrate(pipe, cache=config, **OF[name]).cache
    seen = trajectory(pipe, pipe.unet, "conv_out", OF[name], config)
    assert tables is not None and tables.component == "unet"
    assert tables.gain.shape == tables.offset.shape == (8, at(seen, 0, "feature").shape[1])
    if "window" in options:
        assert tables.refresh == (0, 1, 2, 5, 7)
    reused = 0
    for step in range(8):
        start = max(start for start in tables.refresh if start <= step)
        if start == step:
            assert bool((tables.gain[step] == 1).all()) and not tables.offset[step].any()
            continue
        gain, offset = regression(rows(at(seen, start, "feature")), rows(at(seen, step, "feature")))
        torch.testing.assert_close(tables.gain[step].double(), gain, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(tables.offset[step].double(), offset, rtol=1e-6, atol=1e-6)
        reused += 1
    assert reused == 8 - len(tables.refresh) > 2


def drifting(pipe: Any) -> tuple[Tensor, Tensor, Times]:
    """Make the feature of every step an affine map of the first one's, per channel; gives the maps (T, C) and a hook."""
    source = iec.CacheQuant().locate(pipe.unet).source
    kind, held = type(source), {}
    gain = 1 + 0.4 * tiny.noise(8, 16, seed=1)
    offset = 0.5 * tiny.noise(8, 16, seed=2)
    pipe.scheduler.set_timesteps(8)
    now = Times(pipe.unet, tuple(pipe.scheduler.timesteps.tolist()))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        output = kind.forward(self, *args, **kwargs)
        if now() == 0:
            held["first"] = output
        channels = output.shape[1]
        return gain[now(), :channels].view(1, -1, 1, 1) * held["first"] + offset[now(), :channels].view(1, -1, 1, 1)

    source.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return gain, offset, now


def test_an_affine_drift_is_undone() -> None:
    """A model whose feature is an affine map of the one before is cached without loss; with the plan alone it is not.

    Nor is there a loss with corrections at all steps, whose features are then reused.
    """
    pipe = DDIM.build(fresh=True)
    gain, offset, now = drifting(pipe)
    plain = images(pipe)
    with iec.enable(pipe, steps="all"):
        corrected = images(pipe)
    found = {}
    for compensate in ("cache", "none"):
        made = iec.calibrate(pipe, cache=iec.CacheQuant(interval=3, compensate=compensate), **SETTINGS)
        with iec.cache(pipe, None, made) as handle:
            found[compensate] = images(pipe)
            assert handle.counts() == (3, 5)
            with iec.enable(pipe, steps="all"):
                found[f"{compensate}, corrected"] = images(pipe)
                assert handle.counts() == (3 + 8, 5)
        if compensate == "cache":
            tables = made.cache
    now.handle.remove()
    torch.testing.assert_close(found["cache"], plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["cache, corrected"], corrected, rtol=1e-4, atol=1e-4)
    assert (found["none"] - plain).abs().max() > 0.01
    assert (found["none, corrected"] - corrected).abs().max() > 0.01
    assert tables is not None
    for step in range(8):
        start = max(start for start in tables.refresh if start <= step)
        ratio = (gain[step] / gain[start])[: tables.gain.shape[1]]
        torch.testing.assert_close(tables.gain[step], ratio, rtol=1e-4, atol=1e-4)
        shift = offset[step][: len(ratio)] - ratio * offset[start][: len(ratio)]
        torch.testing.assert_close(tables.offset[step], shift, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_of_other_steps_are_compensated_for_the_drift_that_is_left(dtype: torch.dtype) -> None:
    """Refresh at 0 and 3; a feature of step 1 is brought to step 2. Gains are finer than bfloat16, and layouts are kept."""
    gain = torch.tensor([[1.0, 1.0], [0.5, 0.05], [0.25097, 0.5], [1.0, 1.0]])
    offset = torch.tensor([[0.0, 0.0], [0.25, 1.0], [1.0, 2.0], [0.0, 0.0]])
    put_back = Compensation(CacheTables("unet", iec.CacheQuant().as_dict(), 2, (0, 3), gain, offset))
    feature = 64 * tiny.noise(2, 2, 4, 4, seed=1).to(dtype, memory_format=torch.channels_last)
    kept = feature.clone()
    for taken, ratio, shift in (
        (None, (0.25097, 0.5), (1.0, 2.0)),
        (0, (0.25097, 0.5), (1.0, 2.0)),
        (1, (0.50194, 1.0), (1.0 - 0.50194 * 0.25, 0.0)),  # the second channel has nearly nothing of step 0 at step 1
    ):
        found = put_back(2, feature, taken)
        a, b = (torch.tensor(values, dtype=torch.float64).view(1, 2, 1, 1) for values in (ratio, shift))
        assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
        close = 1e-6 if dtype == torch.float32 else 2**-8 + 1e-6  # half a unit in the last place
        torch.testing.assert_close(found.double(), a * feature.double() + b, rtol=close, atol=1e-5)
    assert torch.equal(feature, kept)


def test_what_is_put_back_is_the_compensated_feature(pipe: Any, made: iec.Calibration) -> None:
    """At every reuse step gain · feature + offset of the last whole pass, corrections among these (METHOD 1.4)."""
    tables = made.cache
    assert tables is not None
    iec.cache(pipe, None, made)
    now, last, reused = Times(pipe.unet, made.origin.timesteps), {}, []
    evaluations = []

    def check(_: Any, __: Any, output: Any) -> None:
        feature = output[0] if isinstance(output, tuple) else output
        visit = evaluations.count(now())
        evaluations.append(now())
        if now() in tables.refresh or visit > 0:
            last["feature"] = feature.clone()
            return
        gain, offset = (table[now()].view(1, -1, 1, 1) for table in (tables.gain, tables.offset))
        torch.testing.assert_close(feature, gain * last["feature"] + offset, rtol=1e-6, atol=1e-6)
        reused.append(now())

    hook = iec.CacheQuant().locate(pipe.unet).source.register_forward_hook(check)
    with iec.enable(pipe, relax=(0.5,)) as session:
        run(DDIM, pipe, num_inference_steps=8)
        assert session.summary().steps == tables.refresh and session.summary().spec == "refresh"
    hook.remove()
    now.handle.remove()
    assert len(evaluations) == 8 + len(tables.refresh) and len(reused) == 8 - len(tables.refresh)


def test_guidance_by_two_calls_in_a_step() -> None:
    """Distances and regression are of each call with the same call of other steps; in the run each reuses its own feature."""
    pipe = GuidedDDIM(DDIM.build().unet, DDIM.build().scheduler)
    pipe.set_progress_bar_config(disable=True)
    config = iec.CacheQuant(interval=3, schedule="uniform")
    tables = (made := iec.calibrate(pipe, cache=config, **SETTINGS)).cache
    seen = trajectory(pipe, pipe.unet, "conv_out", SETTINGS, config)
    assert tables is not None and [len(batch) for batch in seen] == [16, 16]
    calls = [[batch[number::2] for batch in seen] for number in (0, 1)]
    for step, start in ((1, 0), (2, 0), (4, 3), (7, 6)):
        x, y = (torch.cat([rows(at(call, i, "feature")) for call in calls]) for i in (start, step))
        gain, offset = regression(x, y)
        torch.testing.assert_close(tables.gain[step].double(), gain, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(tables.offset[step].double(), offset, rtol=1e-6, atol=1e-6)
    plain = images(pipe)
    with iec.cache(pipe, config, made) as handle:
        cached = images(pipe)
        assert handle.counts() == (6, 10)  # of the two calls of a step
    one_of_both = iec.calibrate(pipe, cache=iec.CacheQuant(interval=1), **SETTINGS)
    with iec.cache(pipe, None, one_of_both):
        assert torch.equal(images(pipe), plain)
    assert 1e-6 < (cached - plain).abs().mean() < 0.5


# --- the cache on the pipeline ----------------------------------------------------------------------------------------


def test_undo_restores_bit_for_bit(pipe: Any, made: iec.Calibration, tmp_path: Path) -> None:
    before, plain = quantized.state(pipe), images(pipe)
    assert made.cache is not None
    tables = copy.deepcopy(made.cache)
    with iec.cache(pipe, None, made) as handle:
        cached = images(pipe)
        assert handle.active and handle.counts() == (len(made.cache.refresh), 8 - len(made.cache.refresh))
    assert not torch.equal(cached, plain)
    assert quantized.state(pipe) == before and torch.equal(images(pipe), plain)
    made.save(tmp_path)
    iec.cache(pipe, iec.CacheQuant(interval=3), tmp_path)
    assert torch.equal(images(pipe), cached)
    iec.undo(pipe)
    assert quantized.state(pipe) == before and torch.equal(images(pipe), plain)
    assert torch.equal(made.cache.gain, tables.gain) and torch.equal(made.cache.offset, tables.offset)


def test_nothing_is_left_by_a_calibration_that_broke_off(pipe: Any) -> None:
    class Stop(Exception):
        pass

    def stopped(*_: Any) -> None:
        raise Stop

    before, plain = quantized.state(pipe), images(pipe)
    with pytest.raises(Stop):
        iec.calibrate(pipe, cache=iec.CacheQuant(interval=3), progress=stopped, **SETTINGS)
    assert quantized.state(pipe) == before and torch.equal(images(pipe), plain)
    broken = pipe.unet.mid_block.register_forward_hook(stopped)
    with pytest.raises(Stop):
        iec.calibrate(pipe, cache=iec.CacheQuant(interval=3), **SETTINGS)
    broken.remove()
    assert quantized.state(pipe) == before and torch.equal(images(pipe), plain)


def test_two_pipelines_do_not_see_each_other(made: iec.Calibration) -> None:
    one, two = DDIM.build(fresh=True), DDIM.build(fresh=True)
    other = iec.calibrate(two, cache=iec.CacheQuant(interval=2, branch=0, schedule="uniform"), **SETTINGS)
    alone = []
    for pipe, calibration in ((one, made), (two, other)):
        with iec.cache(pipe, None, calibration):
            alone.append(images(pipe))
    assert not torch.equal(*alone)
    iec.cache(one, None, made)
    iec.cache(two, None, other)
    assert torch.equal(images(one), alone[0]) and torch.equal(images(two), alone[1])
    within: list[Tensor] = []  # a run of the second in the midst of one of the first

    def once(*_: Any) -> None:
        if not within:
            within.append(torch.empty(0))
            within[0] = images(two)

    hook = one.unet.register_forward_hook(once)
    assert torch.equal(images(one), alone[0]) and torch.equal(within[0], alone[1])
    hook.remove()


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_does_not_belong_together_is_refused(pipe: Any, made: iec.Calibration, tmp_path: Path) -> None:
    before = quantized.state(pipe)
    only_quant = quantized.calibration("ddim")
    config = iec.CacheQuant(interval=3)
    for arguments_, error, message in (
        (
            (config,),
            ValueError,
            r"needs a calibration: calibration = iec\.calibrate\(pipe, cache=CacheQuant\(interval=3",
        ),
        ((None,), TypeError, r"config is None, expected iec\.DeepCache"),
        ((), TypeError, r"config is None, expected iec\.DeepCache"),
        ((5, made), TypeError, r"config is 5, expected"),
        ((config, "nowhere"), ValueError, "nowhere"),
        ((config, 5), TypeError, r"calibration is 5, expected an iec\.Calibration"),
        (
            (iec.CacheQuant(interval=4), made),
            ValueError,
            r"interval=4.*made for CacheQuant\(interval=3.*calibrate anew",
        ),
        ((iec.CacheQuant(interval=3, compensate="none"), made), ValueError, "the calibration was made for"),
        ((iec.DeepCache(interval=3), made), ValueError, r"needs no calibration; leave it out"),
        ((config, only_quant), ValueError, r"holds no cache; calibrate with cache=iec\.CacheQuant"),
        ((None, only_quant), ValueError, "holds no cache"),
    ):
        with pytest.raises(error, match=message):
            iec.cache(pipe, *arguments_)
        assert quantized.state(pipe) == before
    with pytest.raises(ValueError, match="holds no quantization; calibrate with quant="):
        iec.quantize(pipe, made)
    assert quantized.state(pipe) == before


def test_another_model_or_scheduler_is_refused(made: iec.Calibration) -> None:
    from iec.evaluate.sampling import with_scheduler

    other = DDIM.build(fresh=True)
    with torch.no_grad():
        other.unet.conv_in.weight[0, 0, 0, 0] += 1e-3
    before = quantized.state(other)
    with pytest.raises(ValueError, match="made on another pipeline: weights of unet"):
        iec.cache(other, None, made)
    assert quantized.state(other) == before
    euler = with_scheduler(DDIM.build(), "EulerDiscreteScheduler")
    with pytest.raises(ValueError, match="made on another pipeline: scheduler: calibrated on DDIMScheduler"):
        iec.cache(euler, None, made)


def test_another_number_of_steps_is_refused_at_the_run(pipe: Any, made: iec.Calibration) -> None:
    iec.cache(pipe, None, made)
    expected = images(pipe)
    for steps in (7, 9):
        with pytest.raises(ValueError, match=f"cached for 8 steps.*this run has {steps}.*num_inference_steps=8"):
            images(pipe, {**SETTINGS, "num_inference_steps": steps})
    assert torch.equal(images(pipe), expected)
    with iec.enable(pipe), pytest.raises(ValueError, match=r"cached for 8 steps.*this run has 5"):
        images(pipe, {**SETTINGS, "num_inference_steps": 5})
    assert torch.equal(images(pipe), expected)


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("ddim", {"cache": iec.DeepCache(interval=3)}, TypeError, r"cache is DeepCache.*expected an iec\.CacheQuant"),
        ("ddim", {"cache": iec.CacheQuant(branch=9)}, ValueError, "branch is 9; this UNet2DModel has branches"),
        ("ddim", {"cache": iec.CacheQuant(schedule="at:0,12")}, ValueError, "12"),
        ("ddim", {"reconstruct": iec.Reconstruction()}, ValueError, "nothing is quantized; give quant="),
        ("dit", {"class_labels": 1}, TypeError, "DiTTransformer2DModel"),
    ],
)
def test_what_cannot_be_calibrated(name: str, changes: dict[str, Any], error: Any, message: str) -> None:
    pipe = CASES[name].build()
    before = quantized.state(pipe)
    with pytest.raises(error, match=message):
        iec.calibrate(pipe, **{"cache": iec.CacheQuant(interval=3), **SETTINGS, **changes})
    assert quantized.state(pipe) == before


@pytest.mark.parametrize("schedule", ["dps", "uniform"])
def test_runs_that_begin_in_the_middle(schedule: str) -> None:
    """Image-to-image: the first step of the run is a whole pass, what follows is compensated against it."""
    case = CASES["sd-img2img"]
    pipe, config = case.build(), iec.CacheQuant(interval=3, schedule=schedule)
    settings = {**SETTINGS, "num_inference_steps": 12, "strength": 0.67, "prompt": "a cat"}
    settings["image"] = tiny.noise(2, 3, tiny.PIXELS, tiny.PIXELS, seed=5).sigmoid()
    made = iec.calibrate(pipe, iec.QuantConfig(**quantized.QUICK), config, **settings)
    tables, begin = made.cache, 4
    assert tables is not None and made.origin.num_steps == 12 and begin in tables.refresh
    assert (tables.refresh == (0, 3, 4, 6, 9)) if schedule == "uniform" else len(tables.refresh[4:]) == 3
    seen = trajectory(pipe, pipe.unet, "conv_out", settings, config)
    for step in (step for step in range(begin, 12) if step not in tables.refresh):
        start = max(start for start in tables.refresh if start <= step)
        gain, offset = regression(rows(at(seen, start - begin, "feature")), rows(at(seen, step - begin, "feature")))
        torch.testing.assert_close(tables.gain[step].double(), gain, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(tables.offset[step].double(), offset, rtol=1e-6, atol=1e-6)
    whole = len([step for step in tables.refresh if step >= begin])
    with iec.cache(pipe, None, made) as handle:
        images(pipe, {**settings, "num_samples": 2})
        assert handle.counts() == (whole, 8 - whole)
        with iec.quantize(pipe, made, kernel="reference"):
            images(pipe, {**settings, "num_samples": 2})
            assert handle.counts() == (whole, 8 - whole)
