"""iec.cache on a pipeline: beside iec.enable, in runs that break off, and taken off again."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import iec
import tiny
from cached import forwards, unet


@pytest.fixture
def pipe() -> Any:
    return pipeline(unet())


def pipeline(model: Any, kind: str = "DDIMScheduler") -> Any:
    made = diffusers.DDIMPipeline(model, getattr(diffusers, kind)(clip_sample=False))
    made.set_progress_bar_config(disable=True)
    return made


def image(pipe: Any, steps: int = 7, **other: Any) -> Tensor:
    options = {"batch_size": 2, "generator": tiny.seeds(1, 2), "output_type": "np", "use_clipped_model_output": False}
    return torch.as_tensor(pipe(num_inference_steps=steps, **{**options, **other}).images)


def test_interval_one_is_no_cache(pipe: Any) -> None:
    plain = image(pipe)
    iec.cache(pipe, iec.DeepCache(interval=1))
    assert torch.equal(image(pipe), plain)
    with iec.enable(pipe, steps="none"):
        assert torch.equal(image(pipe), plain)


def test_cached_run_against_a_loop_by_hand(pipe: Any) -> None:
    """The pipeline's picture from a plain loop that overwrites the output of the source module itself."""
    model, held = pipe.unet, {}
    source = model.up_blocks[1].attentions[1]
    expected = by_hand(pipe, source, lambda step, visit: step % 3 == 0, held)
    handle = iec.cache(pipe, iec.DeepCache(interval=3))
    torch.testing.assert_close(image(pipe), expected, atol=1e-5, rtol=1e-5)
    assert handle.counts() == (3, 4)
    assert not torch.equal(expected, by_hand(pipe, source, lambda step, visit: True, held))


@pytest.mark.parametrize("relax", [(0.5,), (0.0,), (1.0, 0.5)])
def test_reuse_follows_the_last_correction(pipe: Any, relax: tuple[float, ...]) -> None:
    """METHOD 1.4: corrections are whole passes, and later steps reuse the last one's feature, even at λ = 0."""
    source = pipe.unet.up_blocks[1].attentions[1]
    expected = by_hand(pipe, source, lambda step, visit: step % 3 == 0 or visit > 0, {}, relax, {0, 3, 6})
    iec.cache(pipe, iec.DeepCache(interval=3))
    with iec.enable(pipe, relax=relax) as session:
        found = image(pipe)
        summary = session.summary()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert summary.steps == (0, 3, 6) and summary.spec == "refresh"
    assert (summary.refreshed, summary.reused) == (3 + 3 * len(relax), 4)
    assert summary.evaluations == summary.refreshed + summary.reused


def by_hand(
    pipe: Any,
    source: nn.Module,
    whole: Any,
    held: dict[str, Tensor],
    relax: tuple[float, ...] = (),
    corrected: Any = (),
) -> Tensor:
    """DDIM with the source's output replaced by a hook (nothing is skipped), corrections written out; no IEC in it."""
    scheduler, model = copy.deepcopy(pipe.scheduler), copy.deepcopy(pipe.unet)
    at = dict((name, part) for name, part in model.named_modules())
    target = at[next(name for name, part in pipe.unet.named_modules() if part is source)]
    now: dict[str, bool] = {}

    def hook(_: Any, __: Any, output: Tensor) -> Tensor | None:
        if now["whole"]:
            held["feature"] = output
            return None
        return held["feature"]

    target.register_forward_hook(hook)
    x = diffusers.utils.torch_utils.randn_tensor((2, 3, 8, 8), generator=tiny.seeds(1, 2))
    scheduler.set_timesteps(7)
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            now["whole"] = whole(step, 0)
            y = scheduler.step(model(x, t).sample, t, x).prev_sample
            for visit, factor in enumerate(relax if step in corrected else (), 1):
                now["whole"] = whole(step, visit)
                y = y + factor * (scheduler.step(model(y, t).sample, t, x).prev_sample - y)
            x = y
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def test_lambda_zero_is_the_cached_run_where_no_reuse_follows(pipe: Any) -> None:
    """At λ = 0 a correction still refreshes the cache, so it changes nothing only before a refresh or at the end."""
    iec.cache(pipe, iec.DeepCache(interval=3))
    cached = image(pipe)
    for steps, same in (("at:6", True), ("at:2,5", True), ("none", True), ("refresh", False), ("at:1", False)):
        with iec.enable(pipe, steps=steps, relax=(0.0,)):
            assert torch.equal(image(pipe), cached) is same, steps
    assert torch.equal(image(pipe), cached)


@pytest.mark.parametrize("first", ["cache", "enable"])
def test_either_order(pipe: Any, first: str) -> None:
    plain, before, scheduler = image(pipe), forwards(pipe.unet), pipe.scheduler
    put = {"cache": lambda: iec.cache(pipe, iec.DeepCache(interval=3)), "enable": lambda: iec.enable(pipe)}
    for name in (first, *({"cache", "enable"} - {first})):
        put[name]()
    both = image(pipe)
    assert iec.summary(pipe).steps == (0, 3, 6)
    iec.disable(pipe)
    assert "whole passes" not in str(iec.summary(pipe)) or iec.summary(pipe).reused is None
    cached = image(pipe)
    assert not torch.equal(cached, plain) and not torch.equal(cached, both)
    assert (iec.summary(pipe).refreshed, iec.summary(pipe).reused, iec.summary(pipe).enabled) == (3, 4, False)
    iec.enable(pipe)
    assert torch.equal(image(pipe), both)
    iec.undo(pipe)
    assert forwards(pipe.unet) == before and pipe.scheduler is scheduler
    assert torch.equal(image(pipe), plain)


def test_undo_of_the_cache_leaves_the_session(pipe: Any) -> None:
    before = forwards(pipe.unet)
    with iec.enable(pipe, relax=(0.5,)):
        corrected = image(pipe, steps=20)
        with iec.cache(pipe, iec.DeepCache(interval=2)) as handle:
            assert handle.active and iec.summary(pipe).cache == "DeepCache(interval=2, branch=None)"
            image(pipe, steps=20)
        assert not handle.active and iec.summary(pipe).cache is None
        assert torch.equal(image(pipe, steps=20), corrected)
        assert iec.summary(pipe).spec == "ends:1/10"
    assert forwards(pipe.unet) == before


def test_refresh_needs_the_cache(pipe: Any) -> None:
    handle = iec.cache(pipe, iec.DeepCache(interval=3))
    iec.enable(pipe, steps="refresh")
    image(pipe)
    handle.undo()
    with pytest.raises(ValueError, match="needs an active cache"):
        image(pipe)
    iec.undo(pipe)


def test_summary_says_what_was_reused(pipe: Any) -> None:
    assert iec.summary(pipe).cache is None and iec.summary(pipe).refreshed is None
    iec.cache(pipe, iec.DeepCache(interval=3))
    assert iec.summary(pipe).refreshed is None
    assert "DeepCache(interval=3, branch=None)" in str(iec.summary(pipe))
    image(pipe)
    assert "3 whole passes, 4 reused" in str(iec.summary(pipe))
    iec.enable(pipe)
    image(pipe)
    assert "6 whole passes, 4 reused" in str(iec.summary(pipe))
    assert iec.summary(pipe).as_dict()["reused"] == 4


def test_converged_corrections_are_spared(pipe: Any) -> None:
    iec.cache(pipe, iec.DeepCache(interval=3))
    cached = image(pipe)
    iec.enable(pipe, relax=(0.0, 0.0), tol=1e9)  # all samples count as converged after one correction
    image(pipe)
    summary = iec.summary(pipe)
    assert summary.spared == 3 and (summary.refreshed, summary.reused) == (6, 4)
    iec.disable(pipe)
    assert torch.equal(image(pipe), cached)


def test_an_exception_in_the_middle(pipe: Any) -> None:
    iec.cache(pipe, iec.DeepCache(interval=3))
    iec.enable(pipe)
    expected, x = image(pipe), tiny.noise(2, 3, 8, 8)
    whole = copy.deepcopy(unet())(x, 400).sample
    for at in (1, 4, 6):
        calls = []

        def fail(*_: Any, at: int = at, calls: list[int] = calls) -> None:
            calls.append(0)
            if len(calls) > at:
                raise KeyError("on purpose")

        hook = pipe.unet.conv_out.register_forward_hook(fail)
        with pytest.raises(KeyError, match="on purpose"):
            image(pipe)
        hook.remove()
        assert torch.equal(pipe.unet(x, 400).sample, whole)  # the abandoned run does not own this call
        assert torch.equal(image(pipe), expected)


def test_two_pipelines() -> None:
    one, two = pipeline(unet()), pipeline(unet(1, 2))
    plain = image(two)
    iec.cache(one, iec.DeepCache(interval=3))
    alone = image(one)
    iec.cache(two, iec.DeepCache(interval=2))
    other = image(two)
    assert not torch.equal(other, plain)
    # Their runs interleaved, evaluation by evaluation.
    found: list[Tensor] = []
    hook = one.unet.register_forward_hook(lambda *_: found.append(image(two)))
    assert torch.equal(image(one), alone)
    hook.remove()
    assert len(found) == 7 and all(torch.equal(each, other) for each in found)
    iec.undo(one)
    assert torch.equal(image(two), other)
    iec.undo(two)
    assert torch.equal(image(two), plain)


def test_two_pipelines_in_two_threads() -> None:
    pipes = pipeline(unet()), pipeline(unet(1, 2))
    for pipe, interval in zip(pipes, (3, 2), strict=True):
        iec.cache(pipe, iec.DeepCache(interval=interval))
    alone = [image(pipe) for pipe in pipes]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            together = list(pool.map(image, pipes))
            assert all(torch.equal(found, expected) for found, expected in zip(together, alone, strict=True))


def test_shared_weights(pipe: Any) -> None:
    sharing = pipeline(pipe.unet)
    plain = image(sharing)
    iec.cache(pipe, iec.DeepCache(interval=3))
    cached = image(pipe)
    assert torch.equal(image(sharing), plain) and torch.equal(image(pipe), cached)
    with pytest.raises(ValueError, match="another pipeline that shares it"):
        iec.cache(sharing, iec.DeepCache(interval=2))
    iec.undo(pipe)
    assert torch.equal(image(sharing), plain)


def test_a_second_cache_is_refused(pipe: Any) -> None:
    iec.cache(pipe, iec.DeepCache(interval=3))
    cached = image(pipe)
    with pytest.raises(ValueError, match=r"has a cache already, DeepCache\(interval=3"):
        iec.cache(pipe, iec.DeepCache(interval=2))
    assert torch.equal(image(pipe), cached)


def test_other_denoisers_are_refused() -> None:
    pipe = pipeline(diffusers.UNet1DModel(block_out_channels=(8, 8, 8), norm_num_groups=4))
    scheduler = pipe.scheduler
    with pytest.raises(TypeError, match="not of UNet1DModel; leave the cache out"):
        iec.cache(pipe, iec.DeepCache())
    assert pipe.scheduler is scheduler and "_iec" not in vars(pipe)


def test_what_cannot_be_skipped_is_refused(pipe: Any) -> None:
    with pytest.raises(TypeError, match=r"expected iec\.DeepCache"):
        iec.cache(pipe, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"branches -1\.\.7"):
        iec.cache(pipe, iec.DeepCache(branch=8))
    skipping = unet(
        1, 2, down_block_types=("SkipDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "SkipUpBlock2D")
    )
    with pytest.raises(TypeError, match="cannot skip SkipDownBlock2D"):
        iec.cache(pipeline(skipping), iec.DeepCache())
    pipe.unet.mid_block.compile(backend="eager")
    with pytest.raises(TypeError, match="compiled in place"):
        iec.cache(pipe, iec.DeepCache())
    assert "_iec" not in vars(pipe)


def test_the_contract_name_is_the_function() -> None:
    import iec.caches.deepcache

    assert callable(iec.cache) and iec.DeepCache is iec.caches.deepcache.DeepCache


@pytest.mark.parametrize("kind", ["ddpm", "ddim-eta", "ldm"])
def test_pipelines(kind: str) -> None:
    case = tiny.CASES[kind]
    pipe = case.build(fresh=True)
    plain = tiny.run(case, pipe).image
    iec.cache(pipe, iec.DeepCache(interval=2))
    iec.enable(pipe)
    corrected = tiny.run(case, pipe)
    assert corrected.evaluations == case.steps + 2 and corrected.image.isfinite().all()
    assert (iec.summary(pipe).refreshed, iec.summary(pipe).reused) == (4, 2)
    iec.undo(pipe)
    assert torch.equal(tiny.run(case, pipe).image, plain)
