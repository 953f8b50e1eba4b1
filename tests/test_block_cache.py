"""DeepCache on transformers: a reuse pass skips a range of blocks and adds what they added in the last whole pass."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import blocks
import iec
import tiny
from cached import AtStep, executed, flops, forwards
from iec.caches.transformer import MODELS

RANGES = {"dit": (1, 3), "flux": (1, 4), "chroma": (1, 4), "auraflow": (1, 4), "hunyuan": (1, 4)}


def build(name: str) -> tuple[Any, Any, Any]:
    """A model, inputs from seeds, and how to call it."""
    model, make, others = blocks.build(name)
    return model, make, lambda x, _=None: model(hidden_states=x, **others).sample


def modules(model: Any) -> list[tuple[str, Any]]:
    """All blocks of a model, with their names."""
    lists = MODELS[type(model).__name__]
    return [(f"{key}.{i}", block) for key in lists for i, block in enumerate(getattr(model, key))]


@torch.no_grad()
def by_hand(model: Any, call: Any, begin: int, end: int, x: Tensor, z: Tensor) -> Tensor:
    """The output for z with the range's sum for x, through hooks that overwrite what the last block of the range returns."""
    (_, first), (_, last) = modules(model)[begin], modules(model)[end - 1]
    order = [part for streams in MODELS[type(model).__name__].values() for part in streams][:2]
    names = [name for name in dict.fromkeys(order) if name in ("hidden_states", "encoder_hidden_states")]
    now: dict[str, Any] = {}

    def entering(module: Any, args: Any, kwargs: Any) -> None:
        places = [name for name in type(module).forward.__code__.co_varnames[1:] if name.endswith("hidden_states")]
        given = {**dict(zip(places, args, strict=False)), **kwargs}
        now["in"] = [given[name] for name in names]

    def leaving(_: Any, __: Any, output: Any) -> Any:
        left = list(output) if isinstance(output, tuple) else [output]
        came = now["in"] if len(left) == len(now["in"]) else [torch.cat(now["in"], 1)]
        if "sum" not in now:
            now["sum"] = [a - b for a, b in zip(left, came, strict=True)]
            return None
        new = tuple(a + b for a, b in zip(came, now["sum"], strict=True))
        return new if isinstance(output, tuple) else new[0]

    handles = [first.register_forward_pre_hook(entering, with_kwargs=True), last.register_forward_hook(leaving)]
    call(x)
    result = call(z)
    for handle in handles:
        handle.remove()
    return result


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # by diffusers' own Chroma
@pytest.mark.parametrize("name", blocks.MODELS)
def test_every_class(name: str) -> None:
    model, make, call = build(name)
    x, z, before = make(0), make(1), forwards(model)
    with torch.no_grad():
        plain, other = call(x), call(z)
    begin, end = RANGES.get(name, (1, 3))
    expected = by_hand(model, call, begin, end, x, z)
    whole = executed(model, lambda: call(x))
    inside = [key for key, _ in modules(model)][begin:end]
    shallow = {leaf for leaf in whole if not any(leaf.startswith(f"{key}.") for key in inside)}
    with AtStep(model, iec.DeepCache(5), call=call) as at:
        assert torch.equal(at(0, x), plain)
        torch.testing.assert_close(at(1, x), plain, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(at(2, z), expected, atol=1e-5, rtol=1e-5)
        assert (expected - other).abs().mean() > 0.01 and (expected - plain).abs().mean() > 0.01
        assert executed(model, lambda: at(3, x)) == shallow < whole
        assert torch.equal(at(5, z), other) and torch.equal(at(3, x, visit=1), plain)
    assert forwards(model) == before


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux"])
@pytest.mark.parametrize("span", [(0, 1), (1, 2), (0, 4), (2, 4), (1, 4)])
def test_every_range(name: str, span: tuple[int, int]) -> None:
    """Also the first block alone, and the last one, in which Stable Diffusion 3 drops the text."""
    model, make, call = build(name)
    x, z = make(0), make(1)
    begin, end = span[0], span[1] + (name == "flux" and span[1] == 4)
    with torch.no_grad():
        plain, counted = call(x), flops(model, lambda: call(x))
    inside = [key for key, _ in modules(model)][begin:end]
    with AtStep(model, iec.DeepCache(5, blocks=(begin, end)), call=call) as at:
        assert torch.equal(at(0, x), plain)
        torch.testing.assert_close(at(1, x), plain, atol=1e-4, rtol=1e-4)
        kept = at.feature
        if name in ("dit", "pixart"):
            torch.testing.assert_close(at(2, z), by_hand_copy(name, begin, end, x, z), atol=1e-5, rtol=1e-5)
        else:
            at(2, z)
        reused = flops(model, lambda: at(3, z))
        assert reused["Global"] == counted["Global"] - sum(counted[key] for key in inside)
        assert at.feature is kept


def by_hand_copy(name: str, begin: int, end: int, x: Tensor, z: Tensor) -> Tensor:
    model, _, call = build(name)
    return by_hand(model, call, begin, end, x, z)


def test_default_range() -> None:
    for layers, span in ((3, (1, 2)), (4, (1, 3)), (15, (1, 14)), (28, (3, 25))):
        model = diffusers.DiTTransformer2DModel(
            **blocks.HEADS, in_channels=4, num_layers=layers, norm_num_groups=4, sample_size=8, num_embeds_ada_norm=4
        )
        site = iec.DeepCache().build(model, iec.StepClock(), lambda: None).site
        assert (site.begin, site.end) == span


def test_in_place_additions_between_blocks_do_not_reach_the_feature() -> None:
    """A model that adds to the hidden states in place, as one could for a ControlNet."""
    model, make, call = build("dit")
    x = make(0)
    model.transformer_blocks[2].register_forward_pre_hook(lambda _, args: (args[0].add_(0.1), *args[1:]))
    with torch.no_grad():
        plain = call(x)
    with AtStep(model, iec.DeepCache(5), call=call) as at:
        assert torch.equal(at(0, x), plain)
        for step in (1, 2, 3):
            torch.testing.assert_close(at(step, x), plain, atol=1e-4, rtol=1e-4)


def test_skip_layer_guidance_leaves_out_an_end_of_the_range() -> None:
    model, make, call = build("sd3")
    x, others = make(0), blocks.build("sd3")[2]
    for skip in ([1], [2], [1, 2], [3]):
        with torch.no_grad():
            plain = model(hidden_states=x, **others, skip_layers=skip).sample
        with AtStep(
            model, iec.DeepCache(5), call=lambda x, _, skip=skip: model(hidden_states=x, **others, skip_layers=skip)[0]
        ) as at:
            assert torch.equal(at(0, x), plain)
            if skip == [1, 2]:
                assert at.cache.features == {}  # nothing of the range runs, so there is nothing to reuse
            else:
                torch.testing.assert_close(at(1, x), plain, atol=1e-4, rtol=1e-4)
    assert call(x).isfinite().all()


def test_controlnet_residuals() -> None:
    """What is added after blocks of the range belongs to its sum; what is added elsewhere is the pass's own."""
    model, make, _ = build("sd3")
    x, others = make(0), blocks.build("sd3")[2]
    added = [tiny.noise(2, 16, 16, seed=20 + i) for i in range(4)]
    given = [added]

    def call(x: Tensor, _: Any = None) -> Tensor:
        return model(hidden_states=x, **others, block_controlnet_hidden_states=given[0]).sample

    with torch.no_grad():
        plain = call(x)
        given[0] = [2 * added[0], *added[1:]]
        first = call(x)
    with AtStep(model, iec.DeepCache(5), call=call) as at:
        given[0] = added
        at(0, x)
        torch.testing.assert_close(at(1, x), plain, atol=1e-4, rtol=1e-4)
        given[0] = [added[0], 9 * added[1], *added[2:]]  # within the range: of the last whole pass
        torch.testing.assert_close(at(2, x), plain, atol=1e-4, rtol=1e-4)
        given[0] = [2 * added[0], *added[1:]]  # before it: acts at once
        moved = at(3, x)
        assert (moved - plain).abs().mean() > 0.01 and (moved - first).abs().mean() > 1e-5


def test_refusals() -> None:
    model = blocks.build("dit")[0]
    made = lambda **given: iec.DeepCache(**given).build(model, iec.StepClock(), lambda: None)  # noqa: E731
    for bad in ((2, 2), (3, 1), (-1, 2)):
        with pytest.raises(ValueError, match="begin < end"):
            made(blocks=bad)
    with pytest.raises(ValueError, match=r"this DiTTransformer2DModel has 4, expected 0 <= begin < end <= 4"):
        made(blocks=(1, 5))
    for odd in ((1,), 3, (1.0, 2.0), (True, 2), "12"):
        with pytest.raises(TypeError, match="two integers"):
            made(blocks=odd)
    with pytest.raises(ValueError, match="for a DiTTransformer2DModel choose blocks"):
        made(branch=1)
    with pytest.raises(ValueError, match="for a UNet2DModel choose a branch"):
        iec.DeepCache(blocks=(1, 2)).build(tiny.unet(), iec.StepClock(), lambda: None)
    with pytest.raises(ValueError, match="has 1 blocks, expected at least 3"):
        iec.cache(tiny.CASES["dit"].build(), iec.DeepCache())
    model.transformer_blocks[1].compile(backend="eager")
    with pytest.raises(TypeError, match="compiled in place"):
        made()


# --- pipelines ------------------------------------------------------------------------------------------------------


def pipeline(name: str, **other: Any) -> tuple[Any, Any]:
    """A pipeline around the model `name` and a call of it with 6 steps."""
    model, _, _ = blocks.build(name)
    text = {"prompt_embeds": tiny.noise(2, 5, 16, seed=3), "negative_prompt_embeds": tiny.noise(2, 5, 16, seed=8)}
    if name in ("pixart", "sana"):
        kind = {"pixart": diffusers.PixArtAlphaPipeline, "sana": diffusers.SanaPipeline}[name]
        scheduler = {"pixart": diffusers.DDIMScheduler, "sana": diffusers.FlowMatchEulerDiscreteScheduler}[name]()
        vae = tiny.vae() if name == "pixart" else None
        pipe = kind(tokenizer=None, text_encoder=None, vae=vae, transformer=model, scheduler=scheduler)
        masks = {"prompt_attention_mask": blocks.MASK, "negative_prompt_attention_mask": blocks.MASK}
        given = {**text, **masks, "negative_prompt": None, "use_resolution_binning": False, "output_type": "latent"}
        given |= {"height": 32, "width": 32}
        pipe.vae_scale_factor = 4
    else:
        case = tiny.CASES[name]
        pipe = case.build()
        pipe.register_modules(transformer=model)
        given = {key: value for key, value in case.kwargs().items() if key not in ("generator", "num_inference_steps")}
    pipe.set_progress_bar_config(disable=True)

    def call() -> Tensor:
        out = pipe(**given, **other, num_inference_steps=6, generator=tiny.seeds(1, 2), return_dict=False)[0]
        return torch.as_tensor(out)

    return pipe, call


@pytest.mark.parametrize("name", ["dit", "pixart", "sana", "sd3", "flux"])
def test_pipelines(name: str) -> None:
    pipe, call = pipeline(name)
    plain, before = call(), forwards(pipe.transformer)
    with iec.cache(pipe, iec.DeepCache(interval=1)) as handle:
        assert torch.equal(call(), plain) and handle.counts() == (6, 0)
    with iec.cache(pipe, iec.DeepCache(interval=2)) as handle:
        cached = call()
        assert handle.counts() == (3, 3) and not torch.equal(cached, plain)
        with iec.enable(pipe):
            corrected = call()
            assert handle.counts() == (6, 3) and iec.summary(pipe).steps == (0, 2, 4)
        assert not torch.equal(corrected, cached)
        calls = iter(range(10))
        failing = modules(pipe.transformer)[-1][1].register_forward_hook(lambda *_: 1 // (next(calls) != 4) and None)
        with pytest.raises(ZeroDivisionError):
            call()
        failing.remove()
        assert torch.equal(call(), cached)
    assert torch.equal(call(), plain)
    iec.undo(pipe)
    assert forwards(pipe.transformer) == before


def test_guidance_in_some_of_the_steps() -> None:
    """Skip-layer guidance calls the model once more in steps 2 to 5: whole where the last refresh had no such call."""
    pipe, call = pipeline("sd3", skip_guidance_layers=[0], skip_layer_guidance_start=0.2, skip_layer_guidance_stop=0.9)
    plain = call()
    with iec.cache(pipe, iec.DeepCache(interval=3)) as handle:
        assert not torch.equal(call(), plain)
        assert handle.counts() == (
            2 + 2,
            4 + 2,
        )  # steps 0 and 3, once more at 2 and 3; the others, once more at 4 and 5
    with iec.cache(pipe, iec.DeepCache(interval=1)):
        assert torch.equal(call(), plain)


TIMES = {
    "as it is": lambda t: t.expand(2),
    "one for each token, none for those of a picture": lambda t: t.expand(2)[:, None] * (torch.arange(16) > 3),
    "in bfloat16, then divided": lambda t: t.expand(2).bfloat16() / 1000,
    "divided, then in bfloat16": lambda t: torch.tensor([t / 1000]).expand(2).bfloat16(),
}


@pytest.mark.parametrize("name", TIMES)
def test_the_timestep_as_pipelines_give_it(name: str) -> None:
    """LTX and Wan with a picture, Flux, AuraFlow: at every step the call is known for the run's, and at that one only."""
    model, make, others = blocks.build("ltx")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.LTXPipeline(scheduler, None, None, None, model)
    with torch.no_grad(), iec.cache(pipe, iec.DeepCache(interval=3)) as handle:
        pipe.scheduler.set_timesteps(12)
        x = make(0)
        for t in pipe.scheduler.timesteps:
            time = TIMES[name](t)
            # outside the run's: a callback that looks at another step
            model(hidden_states=x, **{**others, "timestep": TIMES[name](t + 40)}) if t < 900 else None
            out = model(hidden_states=x, **{**others, "timestep": time}).sample
            x = pipe.scheduler.step(out, t, x, return_dict=False)[0]
        assert handle.counts() == (4, 8)
