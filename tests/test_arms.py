"""Arms as plain data, prepared, and their calibrations: other schedulers, fresh noise."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import iec
from iec.bench.demo import ARMS, FINE
from iec.caches import CacheQuant, DeepCache
from iec.calibration.calibrate import calibrate
from iec.evaluate.arms import Arm, calibration_name, calibration_options, prepared, rescheduled
from iec.evaluate.cost import passes
from iec.evaluate.sampling import measure, sample
from iec.pipeline.quantizing import quantized

T = 4
OTHER: dict[str, Any] = {
    "num_inference_steps": 7,
    "scheduler": "EulerDiscreteScheduler",
    "scheduler_options": {"use_karras_sigmas": True},
    "quant": "w4a8",
    "layers": ["*", "!conv_in"],
    "reconstruct": True,
    "cache": "deepcache:3,window=0.1-0.9",
    "steps": "at:1,3",
    "relax": [1.0, 0.5],
    "tol": 0.001,
    "probe": "start:1",
    "scale": 0.99,
    "eta": 0.5,
}


def tiny() -> DDIMPipeline:
    torch.manual_seed(0)
    down, up = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 8), down_block_types=down, up_block_types=up, norm_num_groups=4)
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipe = DDIMPipeline(unet.eval().requires_grad_(False), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- plain data -------------------------------------------------------------------------------------------------------


def test_plain_leaves_out_defaults_names_and_kinds() -> None:
    assert Arm("a", "reference", 50).plain() == {"num_inference_steps": 50}
    assert set(OTHER) == {each.name for each in fields(Arm)} - {"name", "kind"}, "every field is tested below"
    assert Arm.of(OTHER).plain() == OTHER
    for arm in (*ARMS, FINE):
        plain = json.loads(json.dumps(arm.plain()))
        assert Arm.of({**plain, "name": arm.name, "kind": arm.kind}) == arm
        assert Arm.of(plain).plain() == plain
        hash(arm)


@pytest.mark.parametrize("key", sorted(OTHER))
def test_every_field_tells_arms_apart(key: str) -> None:
    base = {"num_inference_steps": 50, "quant": "w8a8", "steps": "all"}
    assert Arm.of({**base, key: OTHER[key]}).plain() != Arm.of(base).plain()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"steps": "none"}, {}),
        ({"relax": (1.0,), "tol": 0.1, "probe": "next"}, {}),  # of no correction
        ({"steps": " Refresh & ends : 1/10 "}, {"steps": "refresh&ends:1/10"}),
        ({"steps": "all", "relax": "released-ldm"}, {"steps": "all", "relax": [1.0, 0.5], "tol": 1e-6}),
        ({"steps": "all", "relax": 0.5}, {"steps": "all"}),
        ({"steps": "all", "probe": "Start:0"}, {"steps": "all", "probe": "start"}),
        ({"cache": DeepCache(5)}, {"cache": "deepcache"}),
        ({"cache": DeepCache(5, schedule="at:0, 3")}, {"cache": "deepcache:5,schedule=at:0,3"}),
        ({"cache": CacheQuant(5, branch=0)}, {"cache": "cachequant:5,branch=0"}),
        ({"cache": DeepCache(5, window=(0.00001, 7))}, {"cache": "deepcache:5,window=0.00001-7"}),
        ({"scale": 1, "eta": 0}, {}),
        ({"scheduler_options": {"b": 1, "a": 2}}, {"scheduler_options": {"a": 2, "b": 1}}),
    ],
)
def test_equal_arms_have_equal_plain_data(one: dict[str, Any], other: dict[str, Any]) -> None:
    made = [Arm.of({"num_inference_steps": 9, **each}) for each in (one, other)]
    assert json.dumps(made[0].plain()) == json.dumps(made[1].plain())


def test_names_and_kinds_are_made_where_there_are_none() -> None:
    assert Arm.of({"num_inference_steps": 50}).kind == "plain"
    made = Arm.of(OTHER)
    assert made.kind == "corrected"
    assert made.name == (
        "W4A8 (* !conv_in) reconstructed, deepcache:3,window=0.1-0.9, 7 steps (Euler, use_karras_sigmas=True), η 0.5, ε × 0.99 "
        "+ averaging at x_t, ρ 1, at:1,3 (λ 1/0.5, tol 0.001)"
    )
    bare = made.without_correction()
    assert bare == replace(made, steps=None, kind="plain", name=bare.name) and "averaging" not in bare.name
    assert bare.without_correction() is bare


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"num_inference_steps": 0}, ValueError, "expected at least 1"),
        ({"num_inference_steps": 2.5}, TypeError, "expected a whole number"),
        ({"quant": "w2a2"}, ValueError, "w8a8, w4a8"),
        ({"reconstruct": True}, ValueError, "nothing is quantized"),
        ({"layers": ["conv_in"]}, ValueError, "layers is given, but nothing is quantized"),
        ({"quant": "w8a8", "layers": "conv_in"}, TypeError, "a list of patterns"),
        ({"quant": "w8a8", "layers": []}, TypeError, "expected glob patterns"),
        ({"cache": "slowcache:5"}, ValueError, "not understood"),
        ({"cache": 5}, TypeError, "deepcache:5"),
        ({"steps": "some"}, ValueError, "not understood"),
        ({"steps": "all", "relax": -1}, ValueError, "relax"),
        ({"steps": "all", "probe": "there"}, ValueError, "estimate, next, start"),
        ({"scale": 0}, ValueError, "a number above 0"),
        ({"scale": "1"}, ValueError, "a number above 0"),
        ({"eta": 1.5}, ValueError, r"0 … 1"),
        ({"scheduler_options": 3}, TypeError, "a table"),
        ({"kind": "best"}, ValueError, "reference, plain"),
        ({"probes": "next"}, ValueError, "no 'probes'; did you mean 'probe'"),
    ],
)
def test_bad_arms_are_told(changes: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        Arm.of({"num_inference_steps": 50, **changes})


def test_an_arm_needs_its_number_of_steps() -> None:
    with pytest.raises(ValueError, match="needs num_inference_steps"):
        Arm.of({"steps": "all"})


# --- calibrations -----------------------------------------------------------------------------------------------------


def test_what_a_calibration_depends_on() -> None:
    base = {"num_inference_steps": 50, "quant": "w8a8"}
    arm = Arm.of(base)
    assert arm.calibration() == base and calibration_name(arm) == "w8a8-50"
    for same in ({"steps": "all"}, {"steps": "all", "probe": "next"}, {"scale": 0.9}, {"cache": "deepcache:5"}):
        other = Arm.of({**base, **same})
        assert other.calibration() == base and calibration_name(other) == "w8a8-50"
    names = {calibration_name(arm)}
    for changes in (
        {"num_inference_steps": 60},
        {"scheduler": "HeunDiscreteScheduler"},
        {"scheduler_options": {"eta": 1}},
        {"quant": "w4a8"},
        {"reconstruct": True},
        {"layers": ["*", "!conv_in"]},
        {"eta": 0.5},
        {"cache": "cachequant:5"},
        {"cache": "cachequant:5,branch=0"},
    ):
        other = Arm.of({**base, **changes})
        assert other.calibration() != base
        names.add(calibration_name(other))
    assert len(names) == 10
    free = Arm.of({"num_inference_steps": 50, "cache": "deepcache:5", "steps": "all"})
    assert free.calibration() == {} and not free.calibrated
    with pytest.raises(ValueError, match="needs no calibration"):
        calibration_options(free)
    assert calibration_options(Arm.of({**OTHER, "cache": "cachequant"}))["eta"] == 0.5


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"scheduler": "HeunDiscreteScheduler"}, 2 * T - 1),
        ({"scheduler": "DPMSolverMultistepScheduler", "steps": "all"}, T),
        ({"scheduler": "HeunDiscreteScheduler", "cache": "cachequant:2", "steps": "refresh"}, 2 * T - 1),
        ({"eta": 0.5, "steps": "all", "relax": [0.5, 0.5]}, T),
        ({"eta": 1.0, "cache": "cachequant:2", "steps": "refresh & ends:1/2"}, T),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_quantized_arms_of_every_kind_are_calibrated_and_sampled(changes: dict[str, Any], steps: int) -> None:
    pipe, arm = tiny(), Arm.of({"num_inference_steps": T, "quant": "w8a8", **changes})
    before = sample(pipe, [1, 2], 4)
    options = calibration_options(arm)
    options["quant"] = replace(options["quant"], act_method="max", weight_method="max", output_correction="none")
    made = calibrate(rescheduled(pipe, arm), **options, num_samples=2, batch_size=2, seed=9)
    assert made.origin.num_steps == steps and made.origin.settings.get("eta", 0.0) == arm.eta
    refresh = None if made.cache is None else made.cache.refresh
    with prepared(pipe, arm, made) as ready, measure(ready) as cost:
        images = sample(ready, [1, 2], arm.num_inference_steps, 2, **arm.kwargs)
        assert torch.equal(sample(ready, [1, 2], arm.num_inference_steps, 2, **arm.kwargs), images)
        assert cost.evaluations == 2 * sum(passes(arm, pipe.scheduler, refresh))
        assert (iec.summary(ready).reused or 0) == passes(arm, pipe.scheduler, refresh).reused
        assert quantized(ready._iec) is not None
    assert torch.equal(sample(pipe, [1, 2], 4), before)


# --- fresh noise ------------------------------------------------------------------------------------------------------


def test_noise_is_the_images_own_and_is_used_again_in_corrections() -> None:
    pipe = tiny()
    arm = Arm.of({"num_inference_steps": T, "eta": 1.0, "steps": "all"})

    def images(made: Arm, batch_size: int = 3) -> torch.Tensor:
        with prepared(pipe, made) as ready:
            return sample(ready, [1, 2, 3], T, batch_size, **made.kwargs)

    plain = images(arm.without_correction())
    assert not torch.equal(plain, images(replace(arm.without_correction(), eta=0.0)))
    assert torch.equal(images(replace(arm, relax=(0.0,))), plain)
    assert torch.equal(images(replace(arm, probe="start")), plain)
    corrected = images(arm)
    assert not torch.equal(corrected, plain)
    assert torch.equal(images(arm, 1), corrected), "the noise of an image depends on its seed alone"


def test_calibrations_know_the_noise() -> None:
    found = []
    for eta in (0.0, 1.0):
        made = iec.calibrate(tiny(), cache=CacheQuant(2), num_inference_steps=4, num_samples=2, eta=eta)
        assert made.cache is not None
        found.append(made.cache.gain)
    assert not torch.equal(*found), "features were gathered along trajectories with noise"


def test_a_solver_that_takes_no_noise_is_refused() -> None:
    pipe = tiny()
    arm = Arm.of({"num_inference_steps": T, "scheduler": "HeunDiscreteScheduler", "eta": 0.5})
    with pytest.raises(ValueError, match="HeunDiscreteScheduler takes none"), prepared(pipe, arm):
        pass
    with pytest.raises(ValueError, match="needs a calibration"), prepared(pipe, replace(arm, quant="w8a8")):
        pass


# --- prepared ---------------------------------------------------------------------------------------------------------


def test_prepared_puts_everything_on_and_takes_it_off() -> None:
    pipe = tiny()
    before, scheduler = sample(pipe, [1, 2], T), pipe.scheduler
    arm = Arm.of(
        {
            k: v
            for k, v in OTHER.items()
            if k not in ("quant", "layers", "reconstruct", "scheduler", "scheduler_options")
        }
    )
    with prepared(pipe, arm) as ready:
        assert ready is pipe
        sample(ready, [1, 2], arm.num_inference_steps, **arm.kwargs)
        told = iec.summary(ready)
        assert (told.spec, told.relax, told.tol) == ("at:1,3", (1.0, 0.5), 0.001)
        assert (told.probe, told.scale) == ("start:1", 0.99)
        assert told.cache == "DeepCache(interval=3, branch=None, window=(0.1, 0.9))"
    assert pipe.scheduler is scheduler
    assert torch.equal(sample(pipe, [1, 2], T), before)


def test_a_scale_of_one_is_the_plain_arm_and_another_is_not() -> None:
    pipe, images = tiny(), {}
    for factor in (1.0, 0.9):
        with prepared(pipe, Arm("scaled", "control", T, scale=factor)) as ready:
            images[factor] = sample(ready, [1, 2], T)
    assert torch.equal(images[1.0], sample(pipe, [1, 2], T))
    assert not torch.equal(images[0.9], images[1.0])


def test_options_change_the_pipelines_own_scheduler() -> None:
    pipe = tiny()
    made = rescheduled(pipe, Arm.of({"num_inference_steps": T, "scheduler_options": {"timestep_spacing": "leading"}}))
    assert type(made.scheduler).__name__ == "DDIMScheduler" and made.scheduler.config.timestep_spacing == "leading"
    assert pipe.scheduler.config.timestep_spacing == "trailing" and made.unet is pipe.unet
    assert rescheduled(pipe, Arm("a", "plain", T)) is pipe
