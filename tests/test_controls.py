"""Controls: they cost what the corrected arm costs, by counting, and there is no better number of steps for that cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from torch import nn

import iec
from iec.caches import CacheQuant, DeepCache
from iec.evaluate.arms import Arm, prepared
from iec.evaluate.controls import SCALES, controls, sweeps
from iec.evaluate.cost import Passes, arm_scheduler, length, passes, reuse_share
from iec.evaluate.sampling import measure, sample
from iec.pipeline.installation import installed
from test_arms import tiny
from tiny import CASES

DDIM = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")


def arm(**changes: Any) -> Arm:
    return Arm.of({"num_inference_steps": 50, "steps": "ends:1/10", **changes})


# --- what an arm costs ------------------------------------------------------------------------------------------------

COUNTED = [
    {"steps": None},
    {"steps": "first:3", "relax": (0.5, 0.5)},
    {"steps": "all", "probe": "next"},
    {"steps": "first:2", "probe": "next"},
    {"steps": "all", "probe": "start:1"},
    {"cache": "deepcache:3"},
    {"cache": "deepcache:3", "steps": "refresh", "relax": (0.5, 0.5)},
    {"cache": "deepcache:3", "steps": "refresh & ends:1/5", "probe": "next"},
    {"cache": "deepcache:3,window=0.2-0.8", "steps": "all"},
    {"scheduler": "HeunDiscreteScheduler", "steps": "last:2"},
    {"scheduler": "HeunDiscreteScheduler", "steps": None, "cache": "deepcache:4"},
    {"scheduler": "PNDMScheduler", "steps": None},
    {"scheduler": "KDPM2DiscreteScheduler", "steps": "all"},
]


@pytest.mark.parametrize("changes", COUNTED, ids=lambda value: "-".join(str(part) for part in value.values()))
def test_passes_are_those_of_the_run(changes: dict[str, Any]) -> None:
    pipe, made = tiny(), arm(num_inference_steps=10, **changes)
    found = passes(made, pipe.scheduler)
    with prepared(pipe, made) as ready, measure(ready) as cost:
        sample(ready, [0], 10, 1)
        reused = iec.summary(ready).reused or 0
    assert found == Passes(cost.evaluations - reused, reused)
    assert found.equivalents(0.25) == found.whole + 0.25 * found.reused


@pytest.mark.parametrize("cache", ["cachequant:3", "cachequant:4,window=2-9", "cachequant:3,schedule=quadratic:1.5"])
@pytest.mark.parametrize("steps", [None, "refresh", "ends:1/5", "refresh & ends:1/3"])
def test_passes_of_a_planned_cache(cache: str, steps: str | None) -> None:
    pipe, made = tiny(), arm(num_inference_steps=10, steps=steps, cache=cache)
    calibration = iec.calibrate(pipe, cache=made.cache, num_inference_steps=10, num_samples=1)
    assert calibration.cache is not None
    refresh = calibration.cache.refresh
    with prepared(pipe, made, calibration) as ready, measure(ready) as cost:
        sample(ready, [0], 10, 1)
        reused = iec.summary(ready).reused or 0
    found = Passes(cost.evaluations - reused, reused)
    assert passes(made, pipe.scheduler, refresh) == found
    if steps == "refresh & ends:1/3" and "schedule" not in cache:
        with pytest.raises(ValueError, match=r"refresh=calibration\.cache\.refresh"):
            passes(made, pipe.scheduler)
    else:
        assert passes(made, pipe.scheduler) == found


@pytest.mark.parametrize("name", ["ddim", "ldm", "sd"])
def test_the_share_of_a_reuse_pass_is_that_of_its_multiplications(name: str) -> None:
    """Counted again by hooks on the convolutions and linear layers that run; attention's products are the rest."""
    case = CASES[name]
    pipe = case.build()
    conditions = {key: value for key, value in case.call().items() if key in ("prompt", "guidance_scale")}
    conditions = {key: value[0] if isinstance(value, list) else value for key, value in conditions.items()}
    found = reuse_share(pipe, DeepCache(5), **conditions)
    assert installed(pipe) is None and not pipe.unet._forward_hooks
    counts: list[int] = []

    def multiplications(layer: Any, _: Any, output: torch.Tensor) -> None:
        counts[-1] += output.numel() * layer.weight[0].numel()

    layers = [m for m in pipe.unet.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(multiplications) for layer in layers]
    hooks.append(pipe.unet.register_forward_pre_hook(lambda *_: counts.append(0)))
    with iec.cache(pipe, DeepCache(2)):
        pipe(**case.kwargs())
    for hook in hooks:
        hook.remove()
    assert found == pytest.approx(counts[1] / counts[0], rel=0.1)
    assert 0 < found < 0.95 and reuse_share(pipe, CacheQuant(7), **conditions) == found
    assert reuse_share(pipe, None) == 1.0


def test_the_bundled_models_share() -> None:
    pipe = iec.load("fashion-mnist")
    pipe.set_progress_bar_config(disable=True)
    shares = [reuse_share(pipe, DeepCache(5, branch=branch)) for branch in (0, 2)]
    assert shares == pytest.approx([0.22, 0.57], abs=0.01)  # docs/results/caching.md


# --- controls ---------------------------------------------------------------------------------------------------------

CORRECTED = {
    "full precision": (arm(), None),
    "quantized": (arm(quant="w8a8", steps="all"), None),
    "cached": (arm(cache="deepcache:5", steps="refresh"), 0.4),
    "both": (arm(cache="cachequant:5", quant="w4a8", steps="refresh", relax=(1.0, 0.5)), 0.4),
    "noisy": (arm(eta=0.5, steps="all"), None),
    "K": (arm(relax=(0.5, 0.5, 0.5), steps="first:1/4"), None),
}


def cost(made: Arm, share: float | None, scheduler: Any = DDIM) -> float:
    return passes(made, scheduler).equivalents(1.0 if share is None else share)


@pytest.mark.parametrize("name", CORRECTED)
def test_controls_cost_what_the_arm_costs(name: str) -> None:
    corrected, share = CORRECTED[name]
    budget = cost(corrected, share) * (1 + 1e-9)
    found = controls(corrected, DDIM, share=share)
    plain = [repr(each.plain()) for each in found]
    assert len(set(plain)) == len(found) and len({each.name for each in found}) == len(found)
    assert repr(corrected.plain()) not in plain and repr(corrected.without_correction().plain()) not in plain
    assert all(each.kind == "control" for each in found)
    for each in found:
        assert cost(each, share) <= budget, each.name
        if each.steps is None and each.scale == 1:
            more = replace(each, num_inference_steps=each.num_inference_steps + 1)
            # DDIM with fresh noise has numbers of steps that divide 1000 only
            assert cost(more, share) > budget or each.scheduler is None, each.name


@pytest.mark.parametrize("name", CORRECTED)
def test_every_way_is_there_on_the_efficient_model_and_on_full_precision(name: str) -> None:
    corrected, share = CORRECTED[name]
    found = controls(corrected, DDIM, share=share)
    efficient = corrected.quant is not None or corrected.cache is not None
    for full in (False, True) if efficient else (False,):
        some = [each for each in found if each.name.startswith("full precision") == full]
        bare = [(each.quant, each.cache, each.reconstruct) for each in some]
        expected = (None, None, False) if full else (corrected.quant, corrected.cache, corrected.reconstruct)
        assert set(bare) == {expected}
        solvers = {each.scheduler for each in some if each.steps is None and each.scale == 1}
        own = None if corrected.eta else "EulerDiscreteScheduler"
        others = ("HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
        assert solvers == {own, *others}
        assert {each.probe for each in some if each.steps is not None} == {"start:0.1", "start:1", "next"}
        assert {each.scale for each in some} == {1.0, *SCALES}
        assert {each.relax for each in some if each.steps is not None} == {corrected.relax}


def test_the_numbers_of_an_example() -> None:
    """50 steps and 10 corrections: 60 passes. Cached: 10 + 10 whole and 40 at 0.4 are 36."""
    by = {each.name: each for each in controls(*[CORRECTED["full precision"][0], DDIM])}
    assert [name for name in by if "ε" not in name] == [
        "60 steps (Euler)",
        "30 steps (Heun)",
        "60 steps (DPMSolverMultistep)",
        "60 steps (UniPCMultistep)",
        "50 steps + averaging at x_t, ρ 0.1, ends:1/10",
        "50 steps + averaging at x_t, ρ 1, ends:1/10",
        "50 steps + IEC at t − 1, ends:1/10",
    ]
    cached = {each.name for each in controls(CORRECTED["cached"][0], DDIM, share=0.4)}
    assert "deepcache:5, 69 steps (Euler)" in cached  # 14 whole and 55 reused are 36, too
    assert "full precision, 36 steps (Euler)" in cached
    # 30 steps, 3 at each end: 36
    assert "full precision, 30 steps (Euler) + IEC at t − 1, ends:1/10" in cached


def test_fresh_noise_stays_with_solvers_that_take_it() -> None:
    for each in controls(CORRECTED["noisy"][0], DDIM):
        assert each.eta == (0.5 if each.scheduler is None else 0.0)
    (more,) = [each for each in controls(CORRECTED["noisy"][0], DDIM) if each.name == "100 steps, η 0.5"]
    assert more.num_inference_steps == 100
    less = controls(arm(eta=0.5), DDIM)
    assert not [each for each in less if each.name.endswith("steps, η 0.5")], "none of 51 … 60 divides 1000"


def test_other_schedulers() -> None:
    plms = controls(arm(), PNDMScheduler(skip_prk_steps=True, steps_offset=1), scales=(0.98,))
    # PLMS takes one evaluation more than steps, so it is 61
    assert [each.name for each in plms][:2] == ["60 steps", "31 steps (Heun)"]
    assert [each.name for each in plms if each.scale != 1] == ["50 steps, ε × 0.98"]
    flow = controls(arm(), diffusers.FlowMatchEulerDiscreteScheduler())
    assert [each.name for each in flow] == [
        "60 steps",
        "30 steps (FlowMatchHeun)",
        "50 steps + averaging at x_t, ρ 0.1, ends:1/10",
        "50 steps + averaging at x_t, ρ 1, ends:1/10",
        "50 steps + IEC at t − 1, ends:1/10",
    ]
    edm = controls(arm(), diffusers.EDMEulerScheduler())
    assert [each.name for each in edm][:2] == ["60 steps", "60 steps (EDMDPMSolverMultistep)"]
    velocity = controls(arm(), DDIMScheduler(prediction_type="v_prediction"))
    assert len(velocity) == 7 and all(each.scale == 1 for each in velocity)
    own = controls(arm(scheduler="DPMSolverMultistepScheduler", scheduler_options={"use_karras_sigmas": True}), DDIM)
    names = [each.name for each in own]
    assert names[0] == "60 steps (DPMSolverMultistep, use_karras_sigmas=True)"
    assert names[1] == "30 steps (Heun, use_karras_sigmas=True)" and len(names) == 9


def test_what_cannot_be_equalled_is_told() -> None:
    with pytest.raises(ValueError, match="corrects nothing"):
        controls(arm(steps=None), DDIM)
    with pytest.raises(ValueError, match="is cached: give share=reuse_share"):
        controls(arm(cache="deepcache:5", steps="refresh"), DDIM)
    with pytest.raises(ValueError, match="corrects nothing"):
        sweeps(arm(steps=None), T=(10,))


def test_the_last_step_alone_has_no_correction_at_the_next_timestep() -> None:
    """Such an arm would be refused when it is sampled."""
    made = Arm.of({"num_inference_steps": 4, "steps": "last:1"})
    refused = replace(made, probe="next")
    with prepared(tiny(), refused) as pipe, pytest.raises(ValueError, match="has no next timestep"):
        sample(pipe, [0], 4)
    assert {each.probe for each in controls(made, DDIM)} == {"estimate", "start:0.1", "start:1"}
    assert "next" in {each.probe for each in controls(replace(made, steps="last:2"), DDIM)}


def test_every_control_can_be_sampled() -> None:
    pipe = tiny()
    corrected = arm(num_inference_steps=10, cache="deepcache:3", steps="refresh")
    share = reuse_share(pipe, corrected.cache)
    before = sample(pipe, [0], 4)
    for each in controls(corrected, pipe.scheduler, share=share, scales=(0.99,)):
        with prepared(pipe, each) as ready, measure(ready) as spent:
            sample(ready, [0], each.num_inference_steps, 1, **each.kwargs)
        assert spent.evaluations == sum(passes(each, pipe.scheduler)), each.name
    assert torch.equal(sample(pipe, [0], 4), before)


# --- sweeps -----------------------------------------------------------------------------------------------------------


def test_sweeps_change_one_thing_at_a_time() -> None:
    base = arm(quant="w8a8")
    found = sweeps(
        base,
        T=(10, 50, 100),
        eta=(0, 0.5, 1),
        K=(1, 2, 3),
        lam=(0.25, 0.5),
        steps=("ends:1/4", "ends:1/10", "first:1/10"),
    )
    assert [(each.num_inference_steps, each.eta, each.relax, each.steps) for each in found] == [
        (10, 0, (0.5,), None),
        (10, 0, (0.5,), "ends:1/10"),
        (50, 0, (0.5,), None),
        (100, 0, (0.5,), None),
        (100, 0, (0.5,), "ends:1/10"),
        (50, 0.5, (0.5,), None),
        (50, 0.5, (0.5,), "ends:1/10"),
        (50, 1, (0.5,), None),
        (50, 1, (0.5,), "ends:1/10"),
        (50, 0, (0.5, 0.5), "ends:1/10"),
        (50, 0, (0.5, 0.5, 0.5), "ends:1/10"),
        (50, 0, (0.25,), "ends:1/10"),
        (50, 0, (0.5,), "ends:1/4"),
        (50, 0, (0.5,), "first:1/10"),
    ]
    assert all(each.quant == "w8a8" for each in found)
    assert all((each.kind == "plain") == (each.steps is None) for each in found)
    assert len({each.name for each in found}) == len(found)


def test_the_length_of_a_run_is_the_schedulers() -> None:
    assert length(DDIM, arm()) == 50 and length(DDIM, arm(scheduler="HeunDiscreteScheduler")) == 99
    assert length(PNDMScheduler(skip_prk_steps=True), arm()) == 51
    assert length(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), arm()) == 50
    assert arm_scheduler(DDIM, arm()) is not DDIM
