"""A cut beneath which layers are quantized: reuse passes at every branch, with the blocks that are left as fused as ever."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import iec
from iec.caches.cut import Cut
from iec.caches.unet import locate
from iec.quant import fused
from iec.quant.fused import Concatenated
from iec.quant.kernels.passes import norm_silu_quantize
from quantized import calibration, compensated, needs_onednn
from tiny import CASES, noise, run

BRANCHES = {"ddim": (-1, 0, 1, 2), "sd": (0, 1, 2, 3)}
TEXT = noise(2, 5, 16, seed=3)


@pytest.fixture(params=["reference", "onednn"])
def kernel(request: pytest.FixtureRequest) -> str:
    if request.param == "onednn" and needs_onednn() is not None:
        pytest.skip("no oneDNN here")
    return request.param


@pytest.fixture(params=["ddim", "sd"])
def quantized(request: pytest.FixtureRequest, kernel: str) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """A quantized denoiser whose clock stands at step 1, with gains and a bias for each step; its branches."""
    case = CASES[request.param]
    pipe = case.build()
    part = iec.quantize(pipe, compensated(calibration(request.param)), kernel=kernel)
    clock = part.held.state.clock
    clock.start(4)
    clock.move(1, 0, True)
    with torch.no_grad():
        yield pipe.unet, BRANCHES[request.param]
    clock.stop()
    iec.undo(pipe)


def evaluate(model: Any, x: Tensor) -> Tensor:
    more = {"encoder_hidden_states": TEXT} if hasattr(model.config, "cross_attention_dim") else {}
    return model(x, torch.tensor(3), **more).sample


def test_every_branch(quantized: tuple[Any, tuple[int, ...]]) -> None:
    """To the last bit: the layers after the cut compute on the same feature what they computed in the whole pass."""
    model, branches = quantized
    x, z = (noise(2, model.config.in_channels, 8, 8, seed=seed) for seed in (0, 1))
    plain, other = evaluate(model, x), evaluate(model, z)
    for branch in branches:
        cut, held = Cut(model, locate(model, branch)), list[Any]()
        cut.install()
        cut.whole(held.append)
        assert torch.equal(evaluate(model, x), plain)
        kept = held[0].clone()
        cut.reuse(held[0])
        torch.testing.assert_close(evaluate(model, x), plain, atol=0, rtol=0)
        cut.reuse(held[0])
        mixed = evaluate(model, z)
        assert not torch.equal(mixed, plain) and not torch.equal(mixed, other) and torch.equal(held[0], kept)
        # Whatever its memory layout, as a compensated one's may be, and as another pass may leave it.
        for layout in (torch.contiguous_format, torch.channels_last):
            cut.reuse((kept + 0).contiguous(memory_format=layout))
            torch.testing.assert_close(evaluate(model, z), mixed, atol=0, rtol=0)
        assert torch.equal(evaluate(model, z), other)
        cut.remove()
    assert torch.equal(evaluate(model, x), plain)


@pytest.mark.skipif(needs_onednn() is not None, reason="no oneDNN here")
@pytest.mark.parametrize("branch", BRANCHES["ddim"])
def test_what_is_left_is_fused(branch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every resnet of a reuse pass goes through the fused passes, and those that take a skip tensor take it uncopied."""
    pipe = CASES["ddim"].build()
    part = iec.quantize(pipe, calibration("ddim"), kernel="onednn")
    model, clock, x = pipe.unet, part.held.state.clock, noise(2, 3, 8, 8)
    clock.start(4)
    clock.move(1, 0, True)
    site, held, inputs = locate(model, branch), list[Any](), list[Any]()
    cut = Cut(model, site)
    cut.install()

    def passing(x: Any, *args: Any, **kwargs: Any) -> Any:
        inputs.append(x)
        return norm_silu_quantize(x, *args, **kwargs)

    def apart(*_: Any, **__: Any) -> Any:
        raise AssertionError("a norm was computed apart from the convolution after it")

    monkeypatch.setattr(fused, "norm_silu_quantize", passing)
    monkeypatch.setattr(torch.nn.functional, "group_norm", apart)
    with torch.no_grad():
        cut.whole(held.append)
        evaluate(model, x)
        whole = len(inputs)
        inputs.clear()
        cut.reuse(held[0])
        evaluate(model, x)
    cut.remove()
    clock.stop()
    iec.undo(pipe)
    below, above = (
        branch + 1,
        branch + 2,
    )  # down: conv_in, resnet, downsampler, resnet; up: one resnet for each of these
    resnets = len({1, 3} & set(range(below + 1))) + above
    attentions = len({3} & set(range(below + 1))) + max(0, above - 2)
    assert len(inputs) == 2 * resnets + attentions + 1 < whole
    pairs = [given for given in inputs if isinstance(given, Concatenated)]
    assert len(pairs) == above and pairs[0].below is held[0]


def test_pipelines(kernel: str) -> None:
    """Both orders of cache and quantization, corrections, and what one leaves when it is taken off."""
    case = CASES["sd"]
    pipe = case.build()
    plain = run(case, pipe).image
    iec.quantize(pipe, calibration("sd"), kernel=kernel)
    rounded = run(case, pipe).image
    with iec.cache(pipe, iec.DeepCache(interval=1)):
        assert torch.equal(run(case, pipe).image, rounded)
    with iec.cache(pipe, iec.DeepCache(interval=2)) as handle:
        both = run(case, pipe).image
        assert handle.counts() == (2, 2) and not torch.equal(both, rounded)
        with iec.enable(pipe):
            run(case, pipe)
            assert handle.counts() == (4, 2)
        assert torch.equal(run(case, pipe).image, both)
    assert torch.equal(run(case, pipe).image, rounded)
    iec.undo(pipe)
    iec.cache(pipe, iec.DeepCache(interval=2))
    iec.quantize(pipe, calibration("sd"), kernel=kernel)
    assert torch.equal(run(case, pipe).image, both)
    iec.undo(pipe)
    assert torch.equal(run(case, pipe).image, plain)
