"""Caches of other libraries on tiny pipelines: `CACHES` lists them, for the tests that IEC corrects past them."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
from diffusers import DiffusionPipeline

from tiny import CASES, Case, _lively, noise, seeds

STEPS = 8


def _flux() -> DiffusionPipeline:
    """Flux with enough blocks for a first, a last and some between."""
    pipe = CASES["flux"].make()
    config = {**pipe.transformer.config, "num_layers": 3, "num_single_layers": 3}
    return _with(pipe, diffusers.FluxTransformer2DModel.from_config(config))


def _with(pipe: DiffusionPipeline, transformer: Any) -> DiffusionPipeline:
    pipe.transformer = _lively(transformer)
    return pipe


def _cogvideox() -> DiffusionPipeline:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=5,
    )
    return diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=_lively(transformer),
        scheduler=diffusers.DDIMScheduler(),
    )


def _wan() -> DiffusionPipeline:
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=4,
        rope_max_seq_len=32,
    )
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=_lively(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _video(**other: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "prompt_embeds": noise(1, 5, 16, seed=3),
        "negative_prompt_embeds": noise(1, 5, 16, seed=4),
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "guidance_scale": 4.0,
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "generator": seeds(1),
        **other,
    }


def _longer(name: str, make: Callable[[], DiffusionPipeline] | None = None, **changes: Any) -> Case:
    case = CASES[name]
    changes = {"num_inference_steps": STEPS, **changes}
    return Case(name, make or case.make, lambda: case.kwargs(**changes), STEPS, case.denoiser)


PIPELINES = {
    "sd": _longer("sd"),
    # guidance_scale=1 of Flux has no second pass; strength 0.75 begins at step 2 of 8
    "sd-img2img": Case("sd-img2img", CASES["sd-img2img"].make, lambda: _cut("sd-img2img"), 6),
    "flux": _longer("flux", _flux),
    "cogvideox": Case("cogvideox", _cogvideox, _video(), STEPS, "transformer"),
    "wan": Case("wan", _wan, _video(), 2 * STEPS, "transformer"),  # guidance in two passes
}


def _cut(name: str) -> dict[str, Any]:
    return CASES[name].kwargs(num_inference_steps=STEPS, strength=0.75)


def of_diffusers(config: str, **options: Any) -> Callable[[DiffusionPipeline], Any]:
    """Put a cache of diffusers on the transformer; skip the test where the release has none such."""

    @contextlib.contextmanager
    def put_on(pipe: DiffusionPipeline) -> Iterator[None]:
        kind = getattr(diffusers.hooks, config, None)
        if kind is None:
            pytest.skip(f"diffusers {diffusers.__version__} has no {config}")
        timestep = {"current_timestep_callback": lambda: int(pipe.current_timestep)}
        timed = config in ("PyramidAttentionBroadcastConfig", "FasterCacheConfig")
        pipe.transformer.enable_cache(kind(**options, **(timestep if timed else {})))
        try:
            yield
        finally:
            pipe.transformer.disable_cache()

    return put_on


@contextlib.contextmanager
def deepcache(pipe: DiffusionPipeline) -> Iterator[None]:
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


def cache_dit_package() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports torchao and more, whatever it is used for
        return pytest.importorskip("cache_dit")


@contextlib.contextmanager
def cache_dit(pipe: DiffusionPipeline, whole: bool = True, prune: bool = False) -> Iterator[None]:
    """cache-dit on the pipeline, or on its transformer alone."""
    package = cache_dit_package()
    options = {
        "Fn_compute_blocks": 1,
        "max_warmup_steps": 2,
        "residual_diff_threshold": 1.0,
        "max_continuous_cached_steps": 2,
        "num_inference_steps": STEPS,
    }
    if prune:
        config = package.DBPruneConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=1.0)
    else:
        config = package.DBCacheConfig(**options)
    target = pipe if whole else pipe.transformer
    package.enable_cache(target, cache_config=config)
    try:
        yield
    finally:
        package.disable_cache(target)


@dataclass(frozen=True)
class Cached:
    """A cache on a pipeline. `known`: its refresh steps, where they are known before the run."""

    pipeline: str
    name: str
    put_on: Callable[[DiffusionPipeline], Any]
    known: tuple[int, ...] | None = None
    outermost: bool = False

    @property
    def case(self) -> Case:
        return PIPELINES[self.pipeline]


CACHES: dict[str, Cached] = {
    "pyramid": Cached(
        "cogvideox",
        "PyramidAttentionBroadcast of diffusers",
        of_diffusers(
            "PyramidAttentionBroadcastConfig",
            spatial_attention_block_skip_range=3,
            spatial_attention_timestep_skip_range=(50, 950),
        ),
    ),
    "faster": Cached(
        "cogvideox",
        "FasterCache of diffusers",
        of_diffusers(
            "FasterCacheConfig",
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 901),
            unconditional_batch_skip_range=3,
            unconditional_batch_timestep_skip_range=(-1, 901),
            attention_weight_callback=lambda _: 0.3,
            tensor_format="BFCHW",
        ),
        outermost=True,
    ),
    "first-block": Cached("flux", "FirstBlockCache of diffusers", of_diffusers("FirstBlockCacheConfig", threshold=0.3)),
    "first-block-wan": Cached(
        "wan", "FirstBlockCache of diffusers", of_diffusers("FirstBlockCacheConfig", threshold=0.3)
    ),
    "mag": Cached(
        "flux",
        "MagCache of diffusers",
        of_diffusers(
            "MagCacheConfig",
            threshold=0.2,
            max_skip_steps=2,
            retention_ratio=0.2,
            num_inference_steps=STEPS,
            mag_ratios=[1.0, 1.0, 0.98, 0.97, 0.95, 0.93, 0.9, 0.8],
        ),
    ),
    "sea": Cached("wan", "SeaCache of diffusers", of_diffusers("SeaCacheConfig", threshold=5.0), outermost=True),
    "taylorseer": Cached(
        "flux",
        "TaylorSeer of diffusers",
        of_diffusers("TaylorSeerCacheConfig", cache_interval=3, disable_cache_before_step=2),
        (0, 1, 3, 6),
    ),
    "deepcache": Cached("sd", "DeepCache (pip, interval 3)", deepcache, (0, 3, 6), outermost=True),
    "deepcache-img2img": Cached("sd-img2img", "DeepCache (pip, interval 3)", deepcache, (0, 3), outermost=True),
    "cache-dit": Cached("flux", "cache-dit 1.5.3", cache_dit, outermost=True),
    "cache-dit-transformer": Cached(
        "flux", "cache-dit 1.5.3", functools.partial(cache_dit, whole=False), outermost=True
    ),
    "cache-dit-prune": Cached("flux", "cache-dit 1.5.3", functools.partial(cache_dit, prune=True), outermost=True),
}
