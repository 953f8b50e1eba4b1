"""Blocks in fewer passes: the numbers of the separate layers, but for codes that lie between two; hooks are not missed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import iec
from iec.quant.fused import Concatenated
from quantized import by_hand, calibration, compensated, needs_onednn, without_products
from tiny import CASES, noise

pytestmark = pytest.mark.skipif(needs_onednn() is not None, reason="no oneDNN here")
KINDS = ("ResnetBlock2D", "Upsample2D", "UpBlock2D", "AttnUpBlock2D", "Attention")


@pytest.fixture(params=["ddim", "ldm", "sd", "ddim compensated", "sd compensated"])
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    """A quantized denoiser whose clock stands at step 1; compensated: with gains and a bias for each step."""
    name, *more = request.param.split()
    case = CASES[name]
    pipe = case.build()
    made = compensated(calibration(name)) if more else calibration(name)
    part = iec.quantize(pipe, made, kernel="onednn")
    clock = part.held.state.clock
    clock.start(4)
    clock.move(1, 0, True)
    with torch.no_grad():
        yield getattr(pipe, case.denoiser)
    clock.stop()
    iec.undo(pipe)


def evaluate(model: Any, seed: int) -> Tensor:
    sample = noise(2, model.config.in_channels, model.config.sample_size, model.config.sample_size, seed=seed)
    more = {}
    if hasattr(model.config, "cross_attention_dim"):
        more["encoder_hidden_states"] = noise(2, 5, model.config.cross_attention_dim, seed=seed + 50)
    return model(sample, torch.tensor(3), **more).sample


def recorded(
    model: nn.Module, kinds: tuple[str, ...], call: Callable[[], Any]
) -> dict[nn.Module, tuple[Any, Any, Any]]:
    """Arguments and output of each block of some kinds, taken around its forward, which a hook would unfuse."""
    seen: dict[nn.Module, tuple[Any, Any, Any]] = {}
    undo = []
    for module in model.modules():
        if type(module).__name__ in kinds:
            forward = module.forward

            def spy(*args: Any, _module: nn.Module = module, _forward: Any = forward, **kwargs: Any) -> Any:
                output = _forward(*args, **kwargs)
                seen[_module] = (args, kwargs, output)
                return output

            module.forward = spy  # type: ignore[method-assign]
            undo.append((module, forward))
    call()
    for module, forward in undo:
        module.forward = forward
    return seen


def separate(block: nn.Module, args: Any, kwargs: Any) -> Any:
    """The block's output layer by layer: a hook on each layer keeps it from being fused."""
    handles = [part.register_forward_hook(lambda *_: None) for part in block.modules() if part is not block]
    try:
        return block(*(torch.cat(a, 1) if isinstance(a, Concatenated) else a for a in args), **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def test_blocks_are_the_sum_of_their_layers(model: nn.Module) -> None:
    """Nearly all blocks agree to float32's rounding; where a code was turned, to a few levels of one quantizer."""
    deviations, kinds = [], set()
    for seed in range(6):
        blocks = recorded(model, KINDS, lambda seed=seed: evaluate(model, seed))
        for block, (args, kwargs, found) in blocks.items():
            expected = separate(block, args, kwargs)
            assert found.shape == expected.shape and found.dtype == expected.dtype
            deviations.append(float((found - expected).norm() / expected.norm()))
            kinds.add(type(block).__name__)
    assert {"ResnetBlock2D"} <= kinds
    exact = sum(deviation < 1e-5 for deviation in deviations)
    assert exact > 0.6 * len(deviations)
    assert max(deviations) < 0.05


@pytest.mark.parametrize("name", ["ddim", "sd"])
@torch.no_grad()
def test_gains_and_biases_of_the_step_reach_every_fused_path(name: str) -> None:
    """Against a model whose layers are computed in float64, one by one, from the definition; products are not quantized there."""
    case, made = CASES[name], compensated(without_products(calibration(name)))
    pipe = case.build()
    model: Any = getattr(pipe, case.denoiser)
    found, expected = [], []
    with iec.quantize(pipe, made, kernel="onednn") as part:
        clock = part.held.state.clock
        clock.start(4)
        for step in (0, 2):
            clock.move(step, 0, True)
            found.append(evaluate(model, 0))
        clock.stop()
    for step in (0, 2):
        with by_hand(model, made, case.denoiser, lambda step=step: step):
            expected.append(evaluate(model, 0))
    assert max(map(relative, found, expected)) < 0.05
    assert relative(found[0], expected[1]) > 0.3


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_no_concatenation_is_made(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = torch.cat
    ups = [block for block in model.up_blocks if type(block).__name__ in ("UpBlock2D", "AttnUpBlock2D")]
    inside: list[bool] = []

    def counted(tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
        if inside and tensors[0].dim() == 4:
            made.append(tensors[0].shape[1])
        return real(tensors, *args, **kwargs)

    monkeypatch.setattr(torch, "cat", counted)
    for block in ups:
        forward = block.forward

        def watched(*args: Any, _forward: Any = forward, **kwargs: Any) -> Any:
            inside.append(True)
            try:
                return _forward(*args, **kwargs)
            finally:
                inside.pop()

        monkeypatch.setattr(block, "forward", watched)
    evaluate(model, 0)
    assert made == []


def test_hooks_inside_a_block_see_their_layer(model: nn.Module) -> None:
    fused = evaluate(model, 1)
    calls = []
    handles = [
        module.register_forward_hook(lambda module, args, output: calls.append((args[0].shape[1], module)))
        for module in model.modules()
        if isinstance(module, (nn.Conv2d, nn.GroupNorm))
    ]
    hooked = evaluate(model, 1)
    assert len(calls) >= len(handles)
    assert all(channels == getattr(m, "in_channels", getattr(m, "num_channels", None)) for channels, m in calls)
    for handle in handles:
        handle.remove()
    assert float((hooked - fused).norm() / fused.norm()) < 0.1
    assert torch.equal(evaluate(model, 1), fused)


def test_skip_tensors_are_not_written_to(model: nn.Module) -> None:
    """Blocks add in place, but only to what they made themselves."""
    blocks = recorded(model, ("ResnetBlock2D", "Attention"), lambda: evaluate(model, 2))
    for block, (args, kwargs, _) in blocks.items():
        inputs = [t for a in args for t in (a if isinstance(a, Concatenated) else (a,)) if isinstance(t, Tensor)]
        before = [tensor.clone() for tensor in inputs]
        block(*args, **kwargs)
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_other_dtypes_are_not_fused(model: nn.Module) -> None:
    blocks = recorded(model, ("ResnetBlock2D",), lambda: evaluate(model, 3))
    block, (args, kwargs, found) = next(iter(blocks.items()))
    x, *more = args
    x = torch.cat(x, 1) if isinstance(x, Concatenated) else x
    half = block(x.bfloat16(), *(m.bfloat16() if isinstance(m, Tensor) else m for m in more), **kwargs)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - found).norm() / found.norm()) < 0.1
