"""DeepCache on a model: whole passes capture a feature, reuse passes put it back and skip what led to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import iec
import tiny
from cached import AtStep, executed, forwards, unet
from iec.plan import CachePlan, uniform

# --- the plan -------------------------------------------------------------------------------------------------------


def test_uniform_plan() -> None:
    assert uniform(5, 12) == CachePlan((0, 5, 10), 12)
    assert uniform(1, 3).refresh == (0, 1, 2) and uniform(9, 3).refresh == (0,)
    assert 5 in uniform(5, 12) and 4 not in uniform(5, 12) and len(uniform(5, 12)) == 3


@pytest.mark.parametrize(
    ("refresh", "steps", "words"),
    [
        ((), 3, "begin with step 0"),
        ((1, 2), 3, "begin with step 0"),
        ((0, 2, 1), 3, "ascending"),
        ((0, 1, 1), 3, "ascending"),
        ((0, 3), 3, r"3 not in 0\.\.2"),
        ((0,), 0, "at least 1"),
    ],
)
def test_plan_refuses(refresh: tuple[int, ...], steps: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CachePlan(refresh, steps)


def test_config_refuses() -> None:
    for bad in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            iec.DeepCache(interval=bad)
    for other in (2.0, True, "5"):
        with pytest.raises(TypeError, match="integer"):
            iec.DeepCache(interval=other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 0"):
        iec.DeepCache(branch=-2)
    with pytest.raises(TypeError, match="integers"):
        CachePlan((0, 1.5), 3)  # type: ignore[arg-type]


# --- one model ------------------------------------------------------------------------------------------------------

MODELS = {
    "3x2": (2, 3, {}),
    "2x1": (1, 2, {}),
    "3x3": (3, 3, {}),
    "1x2": (2, 1, {}),
    "resnet-sampling": (2, 2, {"downsample_type": "resnet", "upsample_type": "resnet"}),
    "resnet-blocks": (
        1,
        2,
        {
            "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
        },
    ),
    "no-mid": (2, 2, {"mid_block_type": None}),
}


def branches() -> list[Any]:
    found = []
    for name, (layers, levels, other) in MODELS.items():
        count = (layers + 1) * levels - (2 if other.get("mid_block_type", 1) is None else 1)
        found += [pytest.param(name, branch, id=f"{name}-{branch}") for branch in range(count)]
    return found


@pytest.mark.parametrize(("name", "branch"), branches())
def test_reuse_of_the_same_input_is_the_whole_pass(name: str, branch: int) -> None:
    layers, levels, other = MODELS[name]
    model, x, z = unet(layers, levels, **other), tiny.noise(2, 3, 8, 8), tiny.noise(2, 3, 8, 8, seed=1)
    with torch.no_grad():
        plain, plain_z = model(x, 400).sample, model(z, 300).sample
    with AtStep(model, iec.DeepCache(5, branch)) as at:
        assert torch.equal(at(0, x), plain)
        torch.testing.assert_close(at(1, x), plain, atol=1e-6, rtol=1e-6)
        kept = at.feature.clone()
        mixed = at(2, z, 300)  # another input: the shallow part of it, the deep part of x
        assert not torch.equal(mixed, plain_z) and not torch.equal(mixed, plain)
        assert torch.equal(at.feature, kept)
        assert torch.equal(at(5, z, 300), plain_z)
        assert not torch.equal(at.feature, kept)
    assert torch.equal(model(x, 400).sample, plain)


@pytest.mark.parametrize(("name", "branch"), branches())
def test_reuse_runs_exactly_the_shallow_part(name: str, branch: int) -> None:
    """From METHOD 3.2, stated by what stays: down path to skip branch + 1, up path from the resnet that takes it."""
    layers, levels, other = MODELS[name]
    model, x, n = unet(layers, levels, **other), tiny.noise(2, 3, 8, 8), layers + 1
    whole = executed(model, lambda: model(x, 400))
    level, q = divmod(branch, n)
    kept = {"conv_in", "time_embedding", "time_proj", "conv_norm_out", "conv_act", "conv_out"}
    kept |= {f"down_blocks.{i}" for i in range(level)}
    if q == n - 1:
        kept.add(f"down_blocks.{level}")
        up, first = levels - 2 - level, n - 1
    else:
        kept |= {f"down_blocks.{level}.{kind}.{j}" for kind in ("resnets", "attentions") for j in range(q + 1)}
        up, first = levels - 1 - level, n - 2 - q
    kept |= {f"up_blocks.{up}.{kind}.{j}" for kind in ("resnets", "attentions") for j in range(first, n)}
    kept |= {f"up_blocks.{up}.upsamplers"} | {f"up_blocks.{i}" for i in range(up + 1, levels)}
    expected = {leaf for leaf in whole if any(leaf == part or leaf.startswith(part + ".") for part in kept)}
    with AtStep(model, iec.DeepCache(5, branch)) as at:
        assert executed(model, lambda: at(0, x)) == whole
        assert executed(model, lambda: at(1, x)) == expected
        assert executed(model, lambda: at(1, x, visit=1)) == whole
    assert len(expected) < len(whole)


def test_default_branch_recomputes_the_first_level_whole() -> None:
    for layers in (1, 2, 3):
        with AtStep(unet(layers), iec.DeepCache()) as at:
            assert at.cache.site.branch == layers
            assert at.cache.site.source is at.model.up_blocks[1].attentions[layers - 1]
    deepest = iec.DeepCache().build(unet(2, 1), iec.StepClock(), lambda: None)
    assert deepest.site.branch == 1


def test_a_stopped_clock_is_a_whole_pass_that_keeps_nothing() -> None:
    model, x = unet(), tiny.noise(2, 3, 8, 8)
    with AtStep(model, iec.DeepCache()) as at:
        whole = at(0, x)
        held = at.feature
        at.clock.stop()
        assert torch.equal(model(x, 400).sample, whole) and at.feature is held
        at.run = None
        model(x, 400)
        assert at.cache.features == {}


def test_features_end_with_their_run() -> None:
    model, x = unet(), tiny.noise(2, 3, 8, 8)
    with AtStep(model, iec.DeepCache()) as at:
        at(0, x)
        at(1, x)
        assert (at.cache.refreshed, at.cache.reused) == (1, 1)
        at.run = type("Next", (), {"begin": 0})()
        with pytest.raises(RuntimeError, match="step 1 should reuse a feature, but no whole pass of this run"):
            at(1, x)
        at(0, x)
        assert (at.cache.refreshed, at.cache.reused) == (1, 0)


def test_the_first_step_of_a_run_is_whole_wherever_it_begins() -> None:
    model, x = unet(), tiny.noise(2, 3, 8, 8)
    with AtStep(model, iec.DeepCache(), begin=3) as at:
        for step in range(3, 10):
            at(step, x)
        assert (at.cache.refreshed, at.cache.reused) == (2, 5)  # 3 and 5


@pytest.mark.parametrize("other", [tiny.noise(3, 3, 8, 8), tiny.noise(2, 3, 16, 16), tiny.noise(2, 3, 8, 8).double()])
def test_another_kind_of_sample_is_a_whole_pass(other: Tensor) -> None:
    """Its feature is then the one that is reused."""
    model = unet()
    with AtStep(model, iec.DeepCache()) as at:
        at(0, tiny.noise(2, 3, 8, 8))
        model.to(other.dtype)
        with torch.no_grad():
            whole = at.cache.cut.evaluate(model.forward, (other, 400), {}).sample
        assert torch.equal(at(1, other), whole)
        torch.testing.assert_close(at(2, other), whole, atol=1e-6, rtol=1e-6)
        assert (at.cache.refreshed, at.cache.reused) == (2, 1)


def test_several_calls_in_a_step_have_a_feature_each() -> None:
    model, x, z = unet(), tiny.noise(2, 3, 8, 8), tiny.noise(2, 3, 8, 8, seed=1)
    with AtStep(model, iec.DeepCache()) as at:
        whole = at(0, x), at(0, z)
        for step in (1, 2):
            for given, expected in zip((x, z), whole, strict=True):
                torch.testing.assert_close(at(step, given), expected, atol=1e-6, rtol=1e-6)
        assert (at.cache.refreshed, at.cache.reused) == (2, 4)


def test_a_further_call_is_a_whole_pass() -> None:
    """Guidance that begins or ends between two refreshes makes calls that the last refresh had no feature for."""
    model, x, z = unet(), tiny.noise(2, 3, 8, 8), tiny.noise(2, 3, 8, 8, seed=1)
    with torch.no_grad():
        plain = model(z, 300).sample
    with AtStep(model, iec.DeepCache()) as at:
        at(0, x)
        at(1, x)
        assert torch.equal(at(1, z, 300), plain)  # begins here
        torch.testing.assert_close(at(2, x), at(1, x), atol=0, rtol=0)
        at(2, x)
        torch.testing.assert_close(at(2, z, 300), plain, atol=1e-6, rtol=1e-6)
        at(5, x)  # ends here: what it left is not reused after another refresh
        at(6, x)
        kept = at.cache.reused
        assert torch.equal(at(6, z, 300), plain) and at.cache.reused == kept


def test_a_pass_that_failed_can_be_taken_again() -> None:
    model, x = unet(), tiny.noise(2, 3, 8, 8)
    with AtStep(model, iec.DeepCache()) as at:
        whole = at(0, x)
        hook = model.conv_out.register_forward_hook(lambda *_: 1 / 0)
        for step in (1, 5):
            with pytest.raises(ZeroDivisionError):
                at(step, x)
            ran = executed(model, lambda: model.mid_block(torch.zeros(1, 24, 2, 2), torch.zeros(1, 32)))
            assert ran  # outside a pass of the model nothing is skipped
        hook.remove()
        assert torch.equal(at(5, x), whole)
        torch.testing.assert_close(at(6, x), whole, atol=1e-6, rtol=1e-6)
        assert (at.cache.refreshed, at.cache.reused) == (2, 1)


def test_removal_restores_every_forward() -> None:
    model = unet()
    custom = model.mid_block.forward
    model.mid_block.forward = custom  # an instance forward of someone else
    before = forwards(model)
    with AtStep(model, iec.DeepCache(branch=1)) as at:
        assert forwards(model) != before
    assert forwards(model) == before
    at.cache.remove()
    assert forwards(model) == before and model.mid_block.forward is custom


def test_a_forward_wrapped_since_stays_and_is_told() -> None:
    model, x = unet(), tiny.noise(2, 3, 8, 8)
    plain = model(x, 400).sample
    at = AtStep(model, iec.DeepCache())
    with at:
        under = model.mid_block.forward
        model.mid_block.forward = lambda *args, **kwargs: under(*args, **kwargs)
        at(0, x)
        with pytest.warns(RuntimeWarning, match="wrapped again"):
            at.cache.remove()
    assert torch.equal(at(1, x), plain)
