"""IEC beside caches of other libraries: the cached run stays what it is, and corrections go past the cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import iec
from foreign import CACHES, STEPS, Cached, cache_dit_package, deepcache
from iec.pipeline.foreign import find
from tiny import CASES, Record, run

# FasterCache of diffusers
pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")

KNOWN = [name for name, cache in CACHES.items() if cache.known is not None]
DECIDING = [name for name, cache in CACHES.items() if cache.known is None]
OUTERMOST = [name for name, cache in CACHES.items() if cache.outermost]
_cached_runs: dict[str, Record] = {}


@pytest.fixture(params=list(CACHES))
def cache(request: pytest.FixtureRequest) -> Cached:
    return CACHES[request.param]


def fresh(cache: Cached) -> DiffusionPipeline:
    return cache.case.build(fresh=True)


def cached_run(cache: Cached) -> Record:
    """The run with the cache and without IEC; it is checked that the cache does something.

    Not to be called first while a cache is on another pipeline: cache-dit changes the class of the pipeline, and two of them at
    once leave it changed.
    """
    key = next(name for name, other in CACHES.items() if other is cache)
    if key not in _cached_runs:
        pipe = fresh(cache)
        plain = run(cache.case, pipe)
        with cache.put_on(pipe):
            _cached_runs[key] = run(cache.case, pipe)
        assert plain.image.isfinite().all() and not torch.equal(plain.image, _cached_runs[key].image)
    return _cached_runs[key]


def denoiser(cache: Cached, pipe: DiffusionPipeline) -> nn.Module:
    return getattr(pipe, cache.case.denoiser)


def begin_anew(pipe: DiffusionPipeline) -> None:
    """What an aborted run left in a cache is its own matter."""
    if hasattr(pipe, "transformer"):
        pipe.transformer._reset_stateful_cache()
        if hasattr(pipe.transformer, "_context_manager"):
            cache_dit_package().refresh_context(pipe.transformer)


# --- the law ----------------------------------------------------------------------------------------------------------


def test_zero_is_the_cached_run(cache: Cached) -> None:
    plain, pipe = cached_run(cache), fresh(cache)
    steps, relax = "at:1,2,5", (0.0, 0.0)
    count = STEPS if cache.pipeline != "sd-img2img" else 6
    calls = cache.case.steps // count
    with cache.put_on(pipe):
        with iec.enable(pipe, steps=steps, relax=relax) as session:
            found = run(cache.case, pipe)
        assert torch.equal(found.image, plain.image)
        corrected = len(iec.plan.resolve(steps, count).steps)
        assert session.evaluations == calls * (count + corrected * len(relax))


@pytest.mark.parametrize("name", ["faster", "sea", "deepcache", "cache-dit"])
def test_spared_corrections_leave_the_cached_run(name: str) -> None:
    cache = CACHES[name]
    plain, pipe = cached_run(cache), fresh(cache)
    with cache.put_on(pipe), iec.enable(pipe, steps="all", relax=(0.0, 0.5), tol=1e9) as session:
        found = run(cache.case, pipe)
        assert session.summary().spared > 0  # every sample is frozen by its first correction
        assert torch.equal(found.image, plain.image)


def test_a_correction_evaluates_the_whole_model(cache: Cached) -> None:
    whole, pipe = denoiser(cache, cache.case.build()), fresh(cache)
    visits: list[tuple[bool, Any, Any, Any]] = []
    with cache.put_on(pipe), iec.enable(pipe, steps="all", relax=(0.5,)) as session:

        def record(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tick = session.clock.now
            assert tick is not None
            kept = {key: value.clone() if torch.is_tensor(value) else value for key, value in kwargs.items()}
            visits.append((tick.correction, tuple(map(torch.clone, args)), kept, output[0].clone()))

        handle = denoiser(cache, pipe).register_forward_hook(record, with_kwargs=True)
        found = run(cache.case, pipe)
        handle.remove()
    assert not torch.equal(found.image, cached_run(cache).image)
    with torch.no_grad():
        exact = [(correction, torch.equal(whole(*a, **k)[0], out)) for correction, a, k, out in visits]
    assert len(exact) == 2 * cache.case.steps
    assert all(same for correction, same in exact if correction)
    assert not all(same for correction, same in exact if not correction)


def test_an_exception_leaves_no_cache_bypassed(cache: Cached) -> None:
    plain, pipe = cached_run(cache), fresh(cache)

    def fail(*_: Any) -> None:
        tick = session.clock.now
        if tick is not None and tick.correction and tick.step == 2:
            raise KeyboardInterrupt

    *_, last = (part for part in denoiser(cache, pipe).modules() if isinstance(part, (nn.Linear, nn.Conv2d)))
    with cache.put_on(pipe):
        with iec.enable(pipe, steps="all", relax=(0.0,)) as session:
            handle = last.register_forward_pre_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                run(cache.case, pipe)
            handle.remove()
            begin_anew(pipe)
            assert torch.equal(run(cache.case, pipe).image, plain.image)
        begin_anew(pipe)
        assert torch.equal(run(cache.case, pipe).image, plain.image)


# --- which steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN)
def test_known_refresh_steps_are_the_default(name: str) -> None:
    cache = CACHES[name]
    pipe = fresh(cache)
    model = denoiser(cache, pipe)
    inside = model.mid_block.resnets[0] if cache.case.denoiser == "unet" else model.transformer_blocks[1].attn.to_q
    with cache.put_on(pipe), iec.enable(pipe) as session:
        ran: list[tuple[int, bool]] = []
        handle = inside.register_forward_hook(lambda *_: ran.append(session.clock.now[:2]))
        run(cache.case, pipe)
        handle.remove()
        begin = session.held.state.last_run.begin
    assert session.summary().steps == cache.known
    assert ran == [(step + begin, visit) for step in cache.known for visit in (0, 1)]
    with cache.put_on(pipe), iec.enable(pipe, steps="refresh & last:3") as session:
        run(cache.case, pipe)
    assert session.summary().steps == cache.known[-1:]


@pytest.mark.parametrize("name", DECIDING)
def test_unknown_refresh_steps_are_refused(name: str) -> None:
    cache = CACHES[name]
    pipe = fresh(cache)
    with cache.put_on(pipe):
        scheduler = pipe.scheduler
        with pytest.raises(ValueError, match=rf"'refresh \+ last:1': {cache.name} has no refresh steps.* as it "):
            iec.enable(pipe, steps="refresh + last:1")
        assert pipe.scheduler is scheduler and not hasattr(pipe, "_iec")
        with iec.enable(pipe) as session:
            run(cache.case, pipe)
        assert session.summary().steps == (0, STEPS - 1)


def test_refresh_is_refused_when_the_cache_comes_later() -> None:
    cache = CACHES["first-block"]
    pipe = fresh(cache)
    iec.enable(pipe, steps="refresh")
    with cache.put_on(pipe), pytest.raises(ValueError, match="FirstBlockCache of diffusers has no refresh steps"):
        run(cache.case, pipe)
    with pytest.raises(ValueError, match="needs an active cache, and this pipeline has none"):
        run(cache.case, pipe)


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CACHES if name not in OUTERMOST])
def test_a_cache_of_blocks_may_come_after_iec(name: str) -> None:
    cache = CACHES[name]
    expected, pipe = cached_run(cache), fresh(cache)
    plain = run(cache.case, pipe)
    with iec.enable(pipe, steps="all", relax=(0.0,)):
        with cache.put_on(pipe):
            assert torch.equal(run(cache.case, pipe).image, expected.image)
        assert torch.equal(run(cache.case, pipe).image, plain.image)


@pytest.mark.parametrize("name", OUTERMOST)
def test_a_cache_over_iec_is_refused(name: str) -> None:
    cache = CACHES[name]
    expected, pipe = cached_run(cache), fresh(cache)
    iec.enable(pipe, steps="all", relax=(0.0,))
    with cache.put_on(pipe):
        with pytest.raises(RuntimeError, match=rf"{cache.name.split('(')[0]}.* was put on the .* after IEC.* iec.undo"):
            run(cache.case, pipe)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that IEC's wrapper stays behind, open
            iec.undo(pipe)
        begin_anew(pipe)
        with iec.enable(pipe, steps="all", relax=(0.0,)):
            assert torch.equal(run(cache.case, pipe).image, expected.image)


def test_without_corrections_no_order_is_asked_for() -> None:
    cache = CACHES["faster"]
    expected, pipe = cached_run(cache), fresh(cache)
    with iec.enable(pipe, steps="none"), cache.put_on(pipe):
        assert torch.equal(run(cache.case, pipe).image, expected.image)


# --- what is told, and what is refused --------------------------------------------------------------------------------


def test_the_summary_names_it(cache: Cached) -> None:
    pipe = fresh(cache)
    assert iec.summary(pipe).cache is None
    with cache.put_on(pipe):
        assert iec.summary(pipe).cache == cache.name
        with iec.enable(pipe) as session:
            assert session.summary().cache == cache.name and f"cache        {cache.name}\n" in str(session.summary())
        assert session.summary().cache == cache.name


@pytest.fixture
def ddim() -> DiffusionPipeline:
    return CASES["ddim"].build(fresh=True)


def test_two_caches_are_refused(ddim: DiffusionPipeline) -> None:
    before = run(CASES["ddim"], ddim).image
    with deepcache(ddim):
        with pytest.raises(ValueError, match=r"has a cache already, DeepCache .pip, interval 3."):
            iec.cache(ddim, iec.DeepCache(interval=2))
        assert not hasattr(ddim, "_iec")
    iec.cache(ddim, iec.DeepCache(interval=2))
    with deepcache(ddim), pytest.raises(ValueError, match=r"carries two caches, IEC's own and DeepCache .pip"):
        run(CASES["ddim"], ddim)
    iec.undo(ddim)
    assert torch.equal(run(CASES["ddim"], ddim).image, before)


def _new_hook(name: str) -> Any:
    return type(name, (diffusers.hooks.ModelHook,), {"__module__": "diffusers.hooks.brand_new_cache"})()


def test_a_cache_of_diffusers_that_nobody_knows_is_refused() -> None:
    pipe = fresh(CACHES["first-block"])
    block = pipe.transformer.transformer_blocks[0]
    diffusers.hooks.HookRegistry.check_if_exists_or_initialize(block).register_hook(_new_hook("BrandNewHook"), "new")
    with pytest.raises(TypeError, match="does not know the cache BrandNewHook of diffusers on this FluxTransformer"):
        iec.enable(pipe)
    assert not hasattr(pipe, "_iec") and iec.summary(pipe).cache == "a cache that IEC does not know"
    block._diffusers_hook.remove_hook("new")
    block._diffusers_hook.register_hook(_new_hook("TextKVCacheBlockHook"), "exact")  # what it keeps is exact
    assert find(pipe.transformer) == []


def _lacking_interval(pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = find(pipe.unet)[0].helper
    monkeypatch.delitem(helper.params, "cache_interval")


def _lacking_error(pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("cache_dit.caching.cache_contexts.ContextNotExistError")


@pytest.mark.parametrize(("name", "change"), [("deepcache", _lacking_interval), ("cache-dit", _lacking_error)])
def test_another_release_of_a_package_is_refused(
    name: str, change: Callable[[DiffusionPipeline, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CACHES[name]
    pipe = fresh(cache)
    with cache.put_on(pipe):
        change(pipe, monkeypatch)
        with pytest.raises(TypeError, match=r"is not built like that of .* cannot keep it out of its corrections"):
            iec.enable(pipe)
        assert not hasattr(pipe, "_iec")
        monkeypatch.undo()
