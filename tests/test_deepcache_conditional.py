"""DeepCache on UNet2DConditionModel: every branch of several shapes, and what pipelines add to the model's own tensors."""

from __future__ import annotations

import copy
import importlib.util
import threading
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.unets.unet_2d_blocks import KUpBlock2D
from torch import Tensor

import iec
import tiny
from cached import AtStep, executed, flops, forwards
from iec.caches.cut import Cut
from iec.caches.unet import locate

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
SIMPLE = ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")
RESNET = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
ATTN = ("AttnDownBlock2D", "AttnUpBlock2D")
# Blocks by level, layers per block, other settings.
MODELS: dict[str, tuple[tuple[tuple[str, str], ...], Any, dict[str, Any]]] = {
    "sd": ((CROSS, CROSS, PLAIN), 2, {}),
    "sdxl": (
        (PLAIN, CROSS, CROSS),
        2,
        {"transformer_layers_per_block": (1, 1, 2), "use_linear_projection": True},
    ),
    "uneven": ((PLAIN, CROSS, CROSS), (1, 3, 2), {}),
    "no-mid": ((CROSS, PLAIN), 1, {"mid_block_type": None}),
    "one-level": ((CROSS,), 2, {}),
    "simple": ((RESNET, SIMPLE), 1, {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}),
    "attn": ((PLAIN, ATTN), 1, {"mid_block_type": "UNetMidBlock2D"}),
}
SOME = (0, 2, 3, 7, 8)  # of "sd", "sdxl", "uneven": inside a level, below a downsampler, the mid block alone
TEXT = tiny.noise(2, 5, 16, seed=3)


def unet(name: str, **other: Any) -> Any:
    blocks, layers, settings = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return tiny._lively(
            diffusers.UNet2DConditionModel(
                **{
                    "sample_size": 8,
                    "in_channels": 4,
                    "out_channels": 4,
                    "block_out_channels": (8, 16, 24)[: len(blocks)],
                    "layers_per_block": layers,
                    "norm_num_groups": 4,
                    "attention_head_dim": 4,
                    "cross_attention_dim": 16,
                    "down_block_types": tuple(down for down, _ in blocks),
                    "up_block_types": tuple(up for _, up in reversed(blocks)),
                    **settings,
                    **other,
                }
            )
        )


def calling(model: Any, **others: Any) -> Callable[..., Tensor]:
    return lambda x, t=400: model(x, t, **others).sample


def at(model: Any, branch: int | None = None, **others: Any) -> AtStep:
    return AtStep(model, iec.DeepCache(5, branch), call=calling(model, **others))


def layers(model: Any) -> tuple[list[list[str]], list[list[str]]]:
    """By skip tensor: the names of what makes it, and of what takes it."""
    down, up = [["conv_in"]], []
    for i, block in enumerate(model.down_blocks):
        down += [
            [f"down_blocks.{i}.{kind}.{j}" for kind in ("resnets", "attentions")] for j in range(len(block.resnets))
        ]
        down += [[f"down_blocks.{i}.downsamplers"]] * (block.downsamplers is not None)
    for i, block in enumerate(model.up_blocks):
        up += [[f"up_blocks.{i}.{kind}.{j}" for kind in ("resnets", "attentions")] for j in range(len(block.resnets))]
        up[-1].append(f"up_blocks.{i}.upsamplers")
    return down, up[::-1]


def branches() -> list[Any]:
    return [
        pytest.param(name, branch, id=f"{name}-{branch}")
        for name in MODELS
        for branch in range(len(layers(unet(name))[0]) - (1 if name == "no-mid" else 0))
    ]


@pytest.mark.parametrize(("name", "branch"), branches())
def test_every_branch(name: str, branch: int) -> None:
    """Whole and reuse pass of one input agree, and a reuse pass runs what comes before skip `branch` and after it, no more."""
    model, x, z = unet(name), tiny.noise(2, 4, 8, 8), tiny.noise(2, 4, 8, 8, seed=1)
    call, before = calling(model, encoder_hidden_states=TEXT), forwards(model)
    with torch.no_grad():
        plain, other = call(x), call(z, 300)
        whole = executed(model, lambda: call(x))
    down, up = layers(model)
    gone = [name for made in (*down[branch + 1 :], *up[branch + 1 :], ["mid_block"]) for name in made]
    expected = {leaf for leaf in whole if not any(leaf == part or leaf.startswith(f"{part}.") for part in gone)}
    with at(model, branch, encoder_hidden_states=TEXT) as cached:
        assert torch.equal(cached(0, x), plain)
        torch.testing.assert_close(cached(1, x), plain, atol=1e-6, rtol=1e-6)
        kept = cached.feature.clone()
        mixed = cached(2, z, 300)
        assert not torch.equal(mixed, other) and not torch.equal(mixed, plain) and torch.equal(cached.feature, kept)
        assert executed(model, lambda: cached(3, x)) == expected < whole
        assert torch.equal(cached(5, z, 300), other) and torch.equal(cached(3, x, visit=1), plain)
    assert forwards(model) == before and torch.equal(call(x), plain)


@pytest.mark.parametrize("branch", [0, 4, 8])
def test_operations_of_a_reuse_pass(branch: int) -> None:
    """By counting in the tensor library: those of a whole pass less those of the skipped modules, to the last one."""
    model, x = unet("uneven"), tiny.noise(2, 4, 8, 8)
    with torch.no_grad():
        counted = flops(model, lambda: model(x, 400, TEXT))
    down, up = layers(model)
    gone = [name for made in (*down[branch + 1 :], *up[branch + 1 :], ["mid_block"]) for name in made]
    # A module list has no count of its own; those of resamplers have one module each.
    skipped = sum(counted.get(part, counted.get(f"{part}.0", 0)) for part in gone)
    with at(model, branch, encoder_hidden_states=TEXT) as cached:
        cached(0, x)
        assert flops(model, lambda: cached(1, x))["Global"] == counted["Global"] - skipped < counted["Global"]


def test_default_branch_is_the_shallowest() -> None:
    model = unet("sd")
    site = iec.DeepCache().build(model, iec.StepClock(), lambda: None).site
    assert (site.branch, site.skip, site.consumer) == (0, 0, model.up_blocks[-1].resnets[-1])
    assert site.source is model.up_blocks[-1].attentions[-2]


def test_refusals() -> None:
    model = unet("sd")
    for branch in (-1, 9):
        with pytest.raises(ValueError, match=r"this UNet2DConditionModel has branches 0\.\.8"):
            locate(model, branch)
    model.up_blocks[0] = KUpBlock2D(8, 8, 32, 0)
    with pytest.raises(TypeError, match="cannot skip KUpBlock2D"):
        locate(model, 0)
    model = unet("sd")
    model.up_blocks[0].resnets.append(copy.deepcopy(model.up_blocks[0].resnets[0]))
    with pytest.raises(TypeError, match="makes 9 skip tensors and takes 10"):
        locate(model, 0)
    model = unet("sd")
    cut = Cut(model, locate(model, 0))
    cut.install()
    with pytest.raises(ValueError, match="carries a cache already"):
        Cut(model, locate(model, 1))
    cut.remove()


def test_sizes_that_do_not_halve() -> None:
    """Upsamplers are then told the size of a skip tensor, which must not be a placeholder's."""
    model, x = unet("sd"), tiny.noise(2, 4, 11, 9)
    with torch.no_grad():
        plain = calling(model, encoder_hidden_states=TEXT)(x)
    for branch in range(9):
        with at(model, branch, encoder_hidden_states=TEXT) as cached:
            assert torch.equal(cached(0, x), plain)
            torch.testing.assert_close(cached(1, x), plain, atol=1e-6, rtol=1e-6)


# --- residuals of others --------------------------------------------------------------------------------------------


def controls(model: Any, scale: float = 1.0, seed: int = 30) -> dict[str, Any]:
    """What a ControlNet would add to the skip tensors and to the mid block's output."""
    made: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: made.extend(out[1])) for block in model.down_blocks]
    hooks.append(model.conv_in.register_forward_hook(lambda _, __, out: made.append(out)))
    with torch.no_grad():
        model(tiny.noise(2, 4, 8, 8), 400, encoder_hidden_states=TEXT)
    for hook in hooks:
        hook.remove()
    noises = [scale * tiny.noise(*tensor.shape, seed=seed + i) for i, tensor in enumerate([*made, made[-1]])]
    return {"down_block_additional_residuals": tuple(noises[:-1]), "mid_block_additional_residual": noises[-1]}


@pytest.mark.parametrize("name", ["sd", "uneven"])
def test_controlnet_residuals(name: str) -> None:
    """Those of the recomputed part are the pass's own; those of the cached part are those of the last whole pass."""
    model, x = unet(name), tiny.noise(2, 4, 8, 8)
    one, two = controls(model), controls(model, 2.0, 60)
    down = "down_block_additional_residuals"
    assert len(one[down]) == 9
    for branch in SOME:
        others = dict(one)
        with torch.no_grad():
            plain, expected = (
                calling(model, encoder_hidden_states=TEXT, **one)(x),
                by_overwriting(model, branch, x, one, two),
            )
        with AtStep(
            model,
            iec.DeepCache(5, branch),
            call=lambda x, t, others=others: calling(model, encoder_hidden_states=TEXT, **others)(x, t),
        ) as cached:
            assert torch.equal(cached(0, x), plain)
            torch.testing.assert_close(cached(1, x), plain, atol=1e-5, rtol=1e-5)
            others.update(two)
            torch.testing.assert_close(cached(2, x), expected, atol=1e-5, rtol=1e-5)
            assert (expected - plain).abs().max() > 1e-2
        given_by_place = (x, 400, TEXT, None, None, None, None, None, one[down], one["mid_block_additional_residual"])
        with AtStep(
            model, iec.DeepCache(5, branch), call=lambda x, t, place=given_by_place: model(*place)[0]
        ) as cached:
            assert torch.equal(cached(0, x), plain)
            torch.testing.assert_close(cached(1, x), plain, atol=1e-5, rtol=1e-5)


def by_overwriting(model: Any, branch: int, x: Tensor, one: dict[str, Any], two: dict[str, Any]) -> Tensor:
    """A pass with `two` in which a hook replaces the output of the source by that of a pass with `one`; nothing is skipped."""
    held: list[Any] = []

    def hook(_: Any, __: Any, output: Any) -> Any:
        held.append(copy.deepcopy(output))
        if len(held) < 2:
            return None
        return tuple(part.clone() for part in held[0]) if isinstance(output, tuple) else held[0].clone()

    handle = locate(model, branch).source.register_forward_hook(hook)
    with torch.no_grad():
        calling(model, encoder_hidden_states=TEXT, **copied(one))(x)
        result = calling(model, encoder_hidden_states=TEXT, **copied(two))(x)
    handle.remove()
    return result


def copied(given: dict[str, Any]) -> dict[str, Any]:
    """Adapters' residuals are taken out of their list by the model, so every call needs a list of its own."""
    return {key: list(value) if isinstance(value, list) else value for key, value in given.items()}


def adapters(model: Any, scale: float, mid: bool, seed: int = 40) -> dict[str, Any]:
    """What a T2I-adapter would add to each block's hidden states; with `mid` as in SDXL, to the mid block's too."""
    made: list[Tensor] = []
    hooks = []
    for block in model.down_blocks:
        part = block.resnets[-1] if hasattr(block, "attentions") else block
        hooks.append(
            part.register_forward_hook(lambda _, __, out: made.append(out[0] if isinstance(out, tuple) else out))
        )
    with torch.no_grad():
        model(tiny.noise(2, 4, 8, 8), 400, encoder_hidden_states=TEXT)
    for hook in hooks:
        hook.remove()
    shapes = [tensor.shape for tensor in made]
    if mid:
        shapes.append(torch.Size([2, model.config.block_out_channels[-1], *model_bottom(model)]))
    return {
        "down_intrablock_additional_residuals": [scale * tiny.noise(*s, seed=seed + i) for i, s in enumerate(shapes)]
    }


def model_bottom(model: Any) -> tuple[int, int]:
    side = 8 // 2 ** (len(model.down_blocks) - 1)
    return side, side


@pytest.mark.parametrize(("name", "mid"), [("sd", False), ("sd", True), ("sdxl", True)])
def test_adapter_residuals(name: str, mid: bool) -> None:
    """Also on the mid block, to whose output the model adds in place: the feature must not take that in."""
    model, x = unet(name), tiny.noise(2, 4, 8, 8)
    one, two = adapters(model, 1.0, mid), adapters(model, 2.0, mid, 70)
    for branch in SOME:
        with torch.no_grad():
            plain, expected = (
                calling(model, encoder_hidden_states=TEXT, **copied(one))(x),
                by_overwriting(model, branch, x, one, two),
            )
        now = [one]
        with AtStep(
            model,
            iec.DeepCache(5, branch),
            call=lambda x, t, now=now: calling(model, encoder_hidden_states=TEXT, **copied(now[0]))(x, t),
        ) as cached:
            assert torch.equal(cached(0, x), plain)
            for step in (1, 2):
                torch.testing.assert_close(cached(step, x), plain, atol=1e-5, rtol=1e-5)
            now[0] = two
            for step in (3, 4):
                torch.testing.assert_close(cached(step, x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Passing intrablock residual connections:FutureWarning")
def test_adapter_residuals_under_their_older_name() -> None:
    model, x = unet("sd"), tiny.noise(2, 4, 8, 8)
    residuals = adapters(model, 1.0, False)["down_intrablock_additional_residuals"]
    call = lambda x, _=None: model(x, 400, TEXT, down_block_additional_residuals=list(residuals))[0]  # noqa: E731
    with torch.no_grad():
        plain = call(x)
    for branch in SOME:
        with AtStep(model, iec.DeepCache(5, branch), call=call) as cached:
            assert torch.equal(cached(0, x), plain)
            for step in (1, 2):
                torch.testing.assert_close(cached(step, x), plain, atol=1e-5, rtol=1e-5)


# --- what else people put on a UNet ---------------------------------------------------------------------------------


def test_freeu() -> None:
    """FreeU scales what an up block is given in place; on or off in the middle of a run, the feature stays what it was."""
    model, x, z = unet("sd"), tiny.noise(2, 4, 8, 8), tiny.noise(2, 4, 8, 8, seed=1)
    call = calling(model, encoder_hidden_states=TEXT)
    with torch.no_grad():
        plain = call(x)
        model.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        freed = call(x)
    assert (freed - plain).abs().max() > 1e-2
    for branch in SOME:
        with at(model, branch, encoder_hidden_states=TEXT) as cached:
            model.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
            assert torch.equal(cached(0, x), freed)
            kept = cached.feature.clone()
            for step in (1, 2):
                torch.testing.assert_close(cached(step, x), freed, atol=1e-5, rtol=1e-5)
            assert torch.equal(cached.feature, kept)
            expected = by_overwriting(model, branch, x, {}, {})
            torch.testing.assert_close(expected, freed, atol=1e-5, rtol=1e-5)
            cached(3, z)
            model.disable_freeu()
            assert torch.equal(cached.feature, kept) and torch.equal(cached(5, x), plain)
            torch.testing.assert_close(cached(6, x), plain, atol=1e-5, rtol=1e-5)


def test_attention_processors_are_replaced_under_a_cache() -> None:
    model, x = unet("sd"), tiny.noise(2, 4, 8, 8)
    with torch.no_grad():
        plain = calling(model, encoder_hidden_states=TEXT)(x)
    with at(model, 1, encoder_hidden_states=TEXT) as cached:
        cached(0, x)
        model.set_attn_processor(AttnProcessor())
        for step in (1, 5, 6):
            torch.testing.assert_close(cached(step, x), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_lora_is_loaded_under_a_cache() -> None:
    from peft import LoraConfig

    model, x = unet("sd"), tiny.noise(2, 4, 8, 8)
    with torch.no_grad():
        plain = calling(model, encoder_hidden_states=TEXT)(x)
    with at(model, 1, encoder_hidden_states=TEXT) as cached:
        assert torch.equal(cached(0, x), plain)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]
            model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        adapted = cached(5, x)
        assert (adapted - plain).abs().max() > 1e-3
        torch.testing.assert_close(cached(6, x), adapted, atol=1e-5, rtol=1e-5)
        model.disable_adapters()
        assert torch.equal(cached(5, x), plain)


def test_ip_adapter_states() -> None:
    """Pictures as prompts reach the model beside the text and change from call to call."""
    model = unet("sd")
    x, picture = tiny.noise(2, 4, 8, 8), tiny.noise(2, 1, 16, seed=6)
    model.register_to_config(encoder_hid_dim_type="ip_image_proj")
    model.encoder_hid_proj = diffusers.models.embeddings.MultiIPAdapterImageProjection(
        [diffusers.models.embeddings.ImageProjection(16, 16, 2)]
    ).requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.set_attn_processor(
            {
                name: AttnProcessor()
                if "attn1" in name
                else diffusers.models.attention_processor.IPAdapterAttnProcessor(
                    model.get_submodule(name.removesuffix(".processor")).inner_dim, 16, num_tokens=(2,)
                )
                for name in model.attn_processors
            }
        )
    model.requires_grad_(False)
    others = {"encoder_hidden_states": TEXT, "added_cond_kwargs": {"image_embeds": [picture[:, None]]}}
    with torch.no_grad():
        plain = calling(model, **others)(x)
        without = calling(model, **{**others, "added_cond_kwargs": {"image_embeds": [0 * picture[:, None]]}})(x)
    assert (plain - without).abs().max() > 1e-4
    for branch in (0, 3, 8):
        with at(model, branch, **others) as cached:
            assert torch.equal(cached(0, x), plain)
            torch.testing.assert_close(cached(1, x), plain, atol=1e-5, rtol=1e-5)


# --- pipelines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sd-img2img", "sd-inpaint9", "sd-controlnet", "sdxl", "sdxl-img2img"])
def test_pipelines(name: str) -> None:
    case = tiny.CASES[name]
    pipe = case.build(fresh=True)
    before, plain = forwards(pipe.unet), tiny.run(case, pipe).image
    with iec.cache(pipe, iec.DeepCache(interval=1)) as handle:
        assert torch.equal(tiny.run(case, pipe).image, plain) and handle.counts() == (case.steps, 0)
    with iec.cache(pipe, iec.DeepCache(interval=2)) as handle:
        cached = tiny.run(case, pipe).image
        assert handle.counts() == (2, 2) and not torch.equal(cached, plain)
        with iec.enable(pipe):
            assert not torch.equal(tiny.run(case, pipe).image, cached)
            assert handle.counts() == (4, 2) and iec.summary(pipe).steps == (0, 2)
        calls = iter(range(10))
        failing = pipe.unet.conv_out.register_forward_hook(lambda *_: 1 // (next(calls) != 3) and None)
        with pytest.raises(ZeroDivisionError):
            tiny.run(case, pipe)
        failing.remove()
        assert torch.equal(tiny.run(case, pipe).image, cached)
    assert torch.equal(tiny.run(case, pipe).image, plain)
    iec.undo(pipe)
    assert forwards(pipe.unet) == before


def test_two_threads_do_not_see_each_other() -> None:
    """One model, cut for one thread's run: passes of another thread in between are whole, and keep nothing."""
    model, x, z = unet("sd"), tiny.noise(2, 4, 8, 8), tiny.noise(2, 4, 8, 8, seed=1)
    call = calling(model, encoder_hidden_states=TEXT)
    with torch.no_grad():
        plain, other = call(x), call(z)
    cut, kept, found = Cut(model, locate(model, 2)), [], []
    cut.install()

    def elsewhere() -> None:
        with torch.no_grad():
            cut.whole(found.append)
            assert torch.equal(call(z), other)
            found.append(call(z))

    def together(_: Any, __: Any) -> None:
        thread = threading.Thread(target=elsewhere)
        hook.remove()
        thread.start()
        thread.join()

    with torch.no_grad():
        cut.whole(kept.append)
        hook = model.conv_in.register_forward_pre_hook(together)
        assert torch.equal(call(x), plain)
        assert len(kept) == 1 and len(found) == 2 and torch.equal(found[1], other)
        hook = model.conv_in.register_forward_pre_hook(together)
        cut.reuse(kept[0])
        torch.testing.assert_close(call(x), plain, atol=1e-6, rtol=1e-6)
        assert len(found) == 4 and torch.equal(found[3], other) and torch.equal(found[2], found[0])
        assert torch.equal(call(z), other)  # what was said held for one pass
    cut.remove()


def test_guidance_that_is_cut_off() -> None:
    """The batch halves between two refresh steps: the next pass is whole, those that follow reuse its feature."""
    case = tiny.CASES["sd"]
    pipe = case.build()
    cut_off = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=4)
    given = {"prompt": "a cat", "height": 16, "width": 16, "num_inference_steps": 9, "output_type": "latent"}
    given |= {"callback_on_step_end": cut_off, "callback_on_step_end_tensor_inputs": cut_off.tensor_inputs}

    def call() -> Tensor:
        return pipe(**given, generator=tiny.seeds(1)).images

    plain = call()
    with iec.cache(pipe, iec.DeepCache(interval=3)) as handle:
        cached = call()
        assert handle.counts() == (4, 5)  # whole at 0, 3, 5 and 6
        assert 0 < (cached - plain).norm() < 0.5 * plain.norm()
