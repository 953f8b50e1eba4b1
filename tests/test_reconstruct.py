"""Reconstruction: learned rounding, units, calibration tuples, never worse than to nearest, and resumed as uninterrupted."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import iec
from iec.artifact.calibration import LayerPart, Quantization, QuantizedLayer, StepTable, WeightCodes
from iec.calibration import reconstructed
from iec.calibration.tuples import Capture, Tuples
from iec.core.affine import fake_quantize, quantize, search
from iec.quant import rows
from iec.quant.kernels import KERNELS
from iec.quant.observe import dequantized
from iec.quant.reconstruct import Outcome, Reconstruction, reconstruct
from iec.quant.rounding import (
    Rounding,
    SimulatedLayer,
    cosine,
    inverse,
    rectified,
    row_quantize,
    temperature,
    undecided,
)
from iec.quant.simulate import Simulation
from quantized import QUICK, arguments, same
from tiny import CASES, noise

ORACLE = (
    Path(__file__).parent / "data" / "layer_recon.npz"
)  # two layers reconstructed by the released code, 300 iterations
W4: dict[str, Any] = {**QUICK, "weight_bits": 4, "weight_method": "mse"}
QUICKLY = Reconstruction(iters=12, batch_size=8, num_tuples=12, lr_weight=0.1)
MIDDLE = iec.QuantConfig(**W4, layers=("mid_block.*", "conv_out"))  # three units, and the mean of the output
SETTINGS: dict[str, Any] = {"num_inference_steps": 4, "num_samples": 4, "batch_size": 2, "seed": 5}


class Alone(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> Tensor:
        return self.layer(input)


def inputs(sample: Tensor, steps: Tensor) -> Tuples:
    return Tuples(steps, ["dict", {"input": ["tensor", "input"]}], {"input": sample}, {})


def nearest(weight: Tensor, bits: int, method: str = "mse") -> WeightCodes:
    found = search(weight.flatten(1), bits, method)
    shape = (-1, *[1] * (weight.dim() - 1))
    codes = quantize(weight, found.scale.view(shape), found.zero.view(shape), bits).to(torch.uint8)
    return WeightCodes(codes, found.scale, found.zero.to(torch.int16), bits)


def one_linear(bits: int = 3, seed: int = 0) -> tuple[nn.Module, dict[str, QuantizedLayer], Tuples]:
    """A linear layer whose inputs are strongly correlated, so that rounding errors add up unless they are balanced."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(32, 16)
    layer.bias.data.zero_()
    layer.weight.data = torch.randn(16, 32, generator=generator)
    x = torch.randn(256, 4, generator=generator) @ torch.randn(4, 32, generator=generator)
    act = search(x.reshape(1, -1), 8)
    table = StepTable(act.scale.expand(3).clone(), act.zero.to(torch.int16).expand(3).clone(), 8)
    made = QuantizedLayer("linear", (LayerPart(0, 32, nearest(layer.weight.data, bits, "max"), table),))
    return Alone(layer).eval(), {"layer": made}, inputs(x, torch.arange(256) % 3)


def calibrated(name: str = "ddim", options: Reconstruction | None = QUICKLY, **changes: Any) -> iec.Calibration:
    case = CASES[name]
    pipe = case.build()
    settings = {**SETTINGS, **changes}
    config = settings.pop("config", iec.QuantConfig(**W4))
    per_image = {key: list(value) * 2 if isinstance(value, list) else value for key, value in arguments(case).items()}
    return iec.calibrate(pipe, config, reconstruct=options, **settings, **per_image)


def quant(made: iec.Calibration) -> Quantization:
    assert made.quant is not None
    return made.quant


# Learned rounding


def test_h_is_zero_and_one_at_the_ends_and_inverse_inverts_it() -> None:
    alpha = torch.tensor([-100.0, -2.5, 2.5, 100.0])
    assert rectified(alpha).tolist() == [0.0, 0.0, 1.0, 1.0]
    fraction = torch.linspace(0, 0.999, 50)
    torch.testing.assert_close(rectified(inverse(fraction)), fraction, atol=1e-6, rtol=0)
    assert float(inverse(torch.tensor(0.5))) == pytest.approx(0, abs=1e-6)  # hard rounding, α ≥ 0, is to the nearest


@pytest.mark.parametrize("beta", [2.0, 7.0, 20.0])
def test_the_regulariser_vanishes_only_where_all_is_decided(beta: float) -> None:
    assert float(undecided(torch.tensor([0.0, 1.0, 1.0]), beta)) == 0.0
    assert float(undecided(torch.tensor([0.5, 0.5]), beta)) == 2.0
    h = torch.tensor([0.3], requires_grad=True)
    undecided(h, beta).backward()
    assert h.grad is not None and float(h.grad) > 0  # downwards is the way to 0


def test_temperature_and_learning_rate_fall() -> None:
    assert temperature(0.0, 0.2) == temperature(0.2, 0.2) == 20.0
    assert temperature(1.0, 0.2) == 2.0 and temperature(0.6, 0.2) == pytest.approx(11.0)
    assert cosine(0.0) == 1.0 and cosine(0.5) == pytest.approx(0.5) and cosine(1.0) == pytest.approx(0.0)


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 3, 3)])
def test_rounding_starts_at_the_weight_and_ends_in_codes(shape: tuple[int, ...]) -> None:
    weight = noise(*shape, seed=1)
    found = search(weight.flatten(1), 4, "max")  # nothing is cut off
    view = (-1, *[1] * (weight.dim() - 1))
    codes = quantize(weight, found.scale.view(view), found.zero.view(view), 4).to(torch.uint8)
    rounding = Rounding(weight, WeightCodes(codes, found.scale, found.zero.to(torch.int16), 4))
    soft, h = rounding.soft()
    inside = (weight / found.scale.view(view) + found.zero.view(view)).clamp(0, 15) - found.zero.view(view)
    torch.testing.assert_close(soft, inside * found.scale.view(view), atol=1e-5, rtol=1e-5)
    assert h.min() >= 0 and h.max() <= 1
    assert torch.equal(rounding.hard().codes, codes)  # from the start it is rounded to the nearest
    rounding.alpha.data.fill_(9.0)
    torch.testing.assert_close(rounding.soft()[0], dequantized(rounding.hard()))
    assert int(rounding.hard().codes.max()) <= 15


def test_row_quantize_is_fake_quantize_row_by_row_with_the_same_gradients() -> None:
    x = noise(6, 3, 4, 4, seed=2) * 3
    scale, zero = torch.tensor([0.1, 0.02, 0.3]), torch.tensor([3.0, 8.0, -1.0])
    grad = noise(6, 3, 4, 4, seed=3)
    results = []
    for rounded in (
        lambda x, s, z: row_quantize(x, s, z, 4),
        lambda x, s, z: torch.cat(
            [fake_quantize(x[2 * i : 2 * i + 2], s[i], z[i], 4) for i in range(3)]  # two rows to each tuple
        ),
    ):
        leaves = [value.clone().requires_grad_() for value in (x, scale, zero)]
        out = rounded(*leaves)
        out.backward(grad)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    with pytest.raises(RuntimeError, match="5 rows in a batch of 3 tuples"):
        row_quantize(x[:5], scale, zero, 4)


def test_learned_rounding_beats_the_nearest_where_inputs_are_correlated() -> None:
    model, layers, data = one_linear()
    options = Reconstruction(unit="layer", iters=300, batch_size=32, lr_scale=0.0, regularizer=500.0)
    (outcome,) = reconstruct(model, layers, {}, data, options)
    assert outcome.kept == "learned" and outcome.learned < 0.6 * outcome.nearest
    before, after = layers["layer"].parts[0], outcome.layers["layer"].parts[0]
    steps = (after.weight.codes.int() - before.weight.codes.int()).abs()
    assert int((steps > 0).sum()) > 0 and int(steps.max()) == 1  # down or up, never further
    assert torch.equal(after.act.scale, before.act.scale) and torch.equal(after.weight.scale, before.weight.scale)


def test_a_unit_is_never_worse_than_to_nearest() -> None:
    model, layers, data = one_linear()
    wild = Reconstruction(unit="layer", iters=3, lr_weight=50.0, lr_scale=10.0, lr_zero=100.0)
    (outcome,) = reconstruct(model, layers, {}, data, wild)
    assert outcome.learned > outcome.nearest and outcome.kept == "nearest"
    assert outcome.layers["layer"] is layers["layer"]
    assert Outcome("u", 1.0, float("nan"), {}).kept == "nearest"


def test_scales_zero_points_biases_and_weights_are_learned_only_if_asked() -> None:
    model, layers, data = one_linear()
    plain = Reconstruction(iters=100, batch_size=32, lr_scale=0.0)
    for asked in ({"lr_scale": 1e-2}, {"lr_zero": 0.5}, {"lr_bias": 1e-2}, {"lr_float": 1e-2}):
        options = dataclasses.replace(plain, **asked)
        (outcome,) = reconstruct(model, layers, {}, data, options)
        part, before = outcome.layers["layer"].parts[0], layers["layer"].parts[0]
        assert outcome.kept == "learned"
        assert torch.equal(part.act.scale, before.act.scale) == ("lr_scale" not in asked)
        assert (outcome.layers["layer"].bias is None) == ("lr_bias" not in asked)
        if "lr_zero" not in asked:
            assert torch.equal(part.act.zero, before.act.zero)
        assert part.act.zero.dtype == torch.int16 and bool((part.act.scale > 0).all())
    (elsewhere,) = reconstruct(model, layers, {}, data, dataclasses.replace(options, lr_bias=1e-2, region=("other*",)))
    assert elsewhere.layers["layer"].bias is None


@pytest.mark.parametrize("name", ["mid", "up"])
def test_the_released_code_is_met_or_beaten_on_its_own_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start is its start; after as many iterations the error is at or below its own. `up` is split between two inputs."""
    data = {key.removeprefix(f"{name}_"): value for key, value in np.load(ORACLE).items() if key.startswith(name)}
    weight, bias = torch.from_numpy(data["w"]).float(), torch.from_numpy(data["b"])
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
    conv.weight.data, conv.bias.data = weight, bias
    parts = []
    width = 32
    for begin, skip in ((0, ""), (32, "_skip")):
        if f"weight{skip}_delta" not in data:
            continue
        codes = nearest(weight[:, begin : begin + width], 4)
        assert codes.scale.tolist() == data[f"weight{skip}_delta"].tolist()
        assert codes.zero.tolist() == data[f"weight{skip}_zp"].round().tolist()
        zero = torch.from_numpy(data[f"act{skip}_zp"]).round().to(torch.int16)
        table = StepTable(torch.from_numpy(data[f"act{skip}_delta"]), zero, 8)
        parts.append(LayerPart(begin, begin + width, codes, table))
    layers = {"layer": QuantizedLayer("conv2d", tuple(parts))}
    target = torch.from_numpy(data["fp_out"]).float()
    record = Simulation.record

    def with_its_targets(self: Any, *args: Any) -> Any:
        made = record(self, *args)
        made.targets[""].put(torch.arange(len(target)), target)  # of inputs in full precision, which we do not have
        return made

    monkeypatch.setattr(Simulation, "record", with_its_targets)
    tuples = inputs(torch.from_numpy(data["inp"]).float(), torch.from_numpy(data["t"]).long())
    options = Reconstruction(unit="layer", iters=300, batch_size=32)
    (outcome,) = reconstruct(Alone(conv), layers, {}, tuples, options)
    assert outcome.nearest == pytest.approx(float(data["mse_nearest"]), rel=5e-3)
    assert outcome.learned <= float(data["mse_recon_hard"])


# Units and tuples


def test_rows_are_taken_apart_and_put_together_again() -> None:
    tree = {"x": noise(3, 2), "more": [noise(3, 2, 4, 4), (None, 2.5)], "flag": True}
    held = dict(rows.leaves(tree))
    assert list(held) == ["x", "more/0"]
    again = rows.fill(rows.template(tree), held.__getitem__)
    assert again["x"] is tree["x"] and again["more"][0] is tree["more"][0] and again["more"][1] == (None, 2.5)
    for value in (noise(4, 3), noise(4, 2, 5, 5), noise(8, 3)):  # the last: two entries to a row
        factor = len(value) // 4
        store = rows.RowStore(4, factor, value)
        store.put(torch.tensor([2, 3]), value[2 * factor :])
        store.put(torch.tensor([0, 1]), value[: 2 * factor])
        torch.testing.assert_close(store.get(torch.tensor([3, 1]), torch.device("cpu"))[:factor], value[3 * factor :])


def captured(name: str, count: int = 6, seed: int = 0) -> tuple[Any, Tuples, list[Any]]:
    """A pipeline, tuples of a plain run of it for the samples of its case, and all calls that were made."""
    case = CASES[name]
    pipe = case.build()
    model = getattr(pipe, case.denoiser)
    capture, calls = Capture(model, 2, 4, count, seed), []

    def called(_: Any, args: Any, kwargs: Any, out: Any) -> None:
        capture.take(len(calls), 0, 2, args, kwargs)
        calls.append((args, kwargs, out))

    handle = model.register_forward_hook(called, with_kwargs=True)
    pipe(**case.kwargs(num_inference_steps=4))
    handle.remove()
    return model, capture.result(), calls


@pytest.mark.parametrize("name", ["ddim", "sd", "sdxl", "dit", "flux"])
def test_tuples_give_the_calls_back_row_by_row(name: str) -> None:
    model, tuples, calls = captured(name)
    assert len(tuples) == 6
    with torch.no_grad():
        mixed = model(**tuples.batch(torch.arange(6), torch.device("cpu")))[0]
    for row, step in enumerate(tuples.steps.tolist()):
        options = calls[step][2][0]  # the rows of that call: samples, with guidance twice
        assert min(float((row_ - mixed[row]).abs().max()) for row_ in options) < 1e-5


def test_tuples_are_drawn_without_replacement_and_cover_the_copies_of_guidance() -> None:
    model = CASES["ddim"].build().unet
    capture = Capture(model, 8, 10, 1000, seed=0)
    assert len(capture.steps) == 80  # all there are
    half = Capture(model, 8, 10, 40, seed=0)
    assert len(set(zip(half.samples.tolist(), half.steps.tolist(), strict=True))) == 40
    assert not torch.equal(half.steps, Capture(model, 8, 10, 40, seed=1).steps)
    for step in range(10):
        for first in (0, 4):
            sample = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 8, 8)  # 4 samples, without and with the prompt
            capture.take(step, first, 4, (sample, step), {})
    taken = capture.result()
    place = taken.batch(torch.arange(80), torch.device("cpu"))
    assert (place["sample"][:, 0, 0, 0] % 4).tolist() == (capture.samples % 4).tolist()
    assert 20 < int((place["sample"][:, 0, 0, 0] >= 4).sum()) < 60
    assert place["timestep"].tolist() == taken.steps.tolist()


def test_arguments_that_are_no_plain_data_are_refused() -> None:
    capture = Capture(CASES["ddim"].build().unet, 1, 1, 1, seed=0)
    with pytest.raises(TypeError, match="argument class_labels is a object"):
        capture.take(0, 0, 1, (noise(1, 3, 8, 8), 0), {"class_labels": object()})


@pytest.mark.parametrize("name", ["ddim", "sd", "dit"])
def test_the_simulation_is_the_quantized_model_with_a_step_per_row(name: str) -> None:
    made = quant(calibrated(name, None))
    model, tuples, _ = captured(name)
    prefix = f"{CASES[name].denoiser}."
    layers = {key.removeprefix(prefix): value for key, value in made.layers.items()}
    products = {key.removeprefix(prefix): value for key, value in made.products.items()}
    assert "transformer_blocks" in str(list(products)) or "attentions" in str(list(products))

    def simulated() -> Simulation:
        return Simulation(copy.deepcopy(model), layers, products)

    places = torch.arange(len(tuples))
    mixed, single = simulated(), simulated()
    mixed.at(tuples.steps, True)
    with torch.no_grad():
        whole = mixed.model(**tuples.batch(places, torch.device("cpu")))[0]
        exact = model(**tuples.batch(places, torch.device("cpu")))[0]
        for place in places:
            single.at(tuples.steps[place][None], True)
            alone = single.model(**tuples.batch(place[None], torch.device("cpu")))[0]
            assert float((alone[0] - whole[place]).norm() / (exact[place] - whole[place]).norm()) < 0.1
        mixed.at(tuples.steps, False)
        torch.testing.assert_close(
            mixed.model(**tuples.batch(places, torch.device("cpu")))[0], exact, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("name", ["ddim", "sd", "dit"])
def test_units_are_blocks_in_the_order_of_the_forward_pass(name: str) -> None:
    made = quant(calibrated(name, None))
    model, tuples, _ = captured(name)
    prefix = f"{CASES[name].denoiser}."
    layers = {key.removeprefix(prefix): value for key, value in made.layers.items()}
    simulation = Simulation(copy.deepcopy(model), layers, {})
    for kind in ("block", "layer"):
        units = simulation.units(kind, list(layers), tuples)
        found = [layer for names in units.values() for layer in names]
        assert sorted(found) == sorted(set(found))
        if kind == "layer":
            assert all(names == [unit] for unit, names in units.items())
        elif name == "dit":
            assert "transformer_blocks.0" in units and len(units["transformer_blocks.0"]) > 5
            assert list(units)[-1] == "proj_out_2"
        else:
            assert list(units)[-1] == "conv_out" and sorted(found) == sorted(layers)
            assert "conv1" in str(units["mid_block.resnets.0"]) and "to_q" in str(units)
            assert list(units).index("mid_block.resnets.0") < list(units).index("up_blocks.0.resnets.0")


def gained(layer: QuantizedLayer, seed: int, bias: int = 2) -> QuantizedLayer:
    """With gains in the first part; bias: its dimensions, 0 for the module's."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(layer.parts[0].act.scale), len(layer.parts[0].weight.scale))
    first = dataclasses.replace(layer.parts[0], gain=torch.randn(shape, generator=generator))
    own = torch.randn(shape[2 - bias :], generator=generator) if bias else None
    return dataclasses.replace(layer, parts=(first, *layer.parts[1:]), bias=own)


@pytest.mark.parametrize("bias", [0, 1, 2])
@pytest.mark.parametrize(
    ("module", "shape", "cuts"),
    [
        (nn.Conv2d(6, 4, 3, padding=1), (6, 5, 5), (4,)),
        (nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), (6, 5, 5), (2, 3)),
        (nn.Conv2d(6, 4, 3, stride=2, groups=2, bias=False), (6, 5, 5), ()),
        (nn.Conv1d(6, 4, 3), (6, 5), (4,)),
        (nn.Linear(6, 4), (6,), (5,)),
        (nn.Linear(6, 4), (2, 3, 6), ()),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_simulated_row_has_the_gain_and_bias_of_its_step(
    module: Any, shape: tuple[int, ...], cuts: tuple[int, ...], bias: int
) -> None:
    """Against the reference kernel, row by row; also with two rows to a tuple."""
    table = StepTable(torch.tensor([0.02, 0.03, 0.05]), torch.tensor([128, 3, 100], dtype=torch.int16), 8)
    parts = []
    for begin, end in zip((0, *cuts), (*cuts, 6), strict=True):
        weight = module.weight.detach() if not cuts else module.weight.detach()[:, begin:end]
        parts.append(LayerPart(begin, end, nearest(weight, 4, "max"), table))
    kind: Any = {nn.Conv2d: "conv2d", nn.Conv1d: "conv1d", nn.Linear: "linear"}[type(module)]
    layer = gained(QuantizedLayer(kind, tuple(parts)), 5, bias)
    simulated, reference = SimulatedLayer(module, layer), KERNELS["reference"].build(module, layer)
    x, steps = noise(6, *shape, seed=1), torch.tensor([2, 0, 1, 1, 0, 2])
    for k, of in ((1, steps), (2, steps[::2])):
        found = simulated(x, of)
        for row in range(len(x)):
            expected = reference(x[row : row + 1], int(of[row // k]))
            torch.testing.assert_close(found[row : row + 1], expected, atol=1e-5, rtol=1e-5)
    if kind != "linear":
        with pytest.raises(RuntimeError, match="6 rows in a batch of 4"):
            simulated(x, steps[:4])


@pytest.mark.parametrize("lr_bias", [0.0, 0.01])
def test_gains_and_biases_per_step_outlive_reconstruction(lr_bias: float) -> None:
    model, layers, data = one_linear()
    layers = {"layer": gained(layers["layer"], 7)}
    gain, bias = layers["layer"].parts[0].gain, layers["layer"].bias
    assert gain is not None and bias is not None
    with torch.no_grad():  # what the compensated layer is to give, so that there is something to learn
        gain.copy_(1 + 0.1 * gain)
        bias.mul_(0.1)
    options = Reconstruction(unit="layer", iters=60, batch_size=64, lr_bias=lr_bias)
    (outcome,) = reconstruct(model, layers, {}, data, options)
    learned = outcome.layers["layer"]
    assert outcome.learned < outcome.nearest
    assert learned.parts[0].gain is not None and torch.equal(learned.parts[0].gain, gain)
    assert learned.bias is not None and learned.bias.shape == (3, 16)
    assert torch.equal(learned.bias, bias) == (lr_bias == 0.0)
    assert not torch.equal(learned.parts[0].weight.codes, layers["layer"].parts[0].weight.codes)
    kept = {f"0/layer/{key}": value for key, value in reconstructed._tensors(learned)}  # in a checkpoint
    again = reconstructed._layer(layers["layer"], kept, "0/layer")
    assert same(Quantization({}, {"layer": again}), Quantization({}, {"layer": learned}))


def test_the_mean_of_the_output_is_taken_off_every_step_of_a_bias() -> None:
    model, layers, data = one_linear()
    layers = {"layer": gained(layers["layer"], 7)}
    bias = layers["layer"].bias
    assert bias is not None
    _, outcome = reconstruct(model, layers, {}, data, Reconstruction(iters=1), output="layer")
    assert outcome.unit == "layer (mean)" and outcome.kept == "learned"
    changed = outcome.layers["layer"].bias
    assert changed is not None and changed.shape == (3, 16)
    moved = changed - bias
    torch.testing.assert_close(moved, moved[:1].expand(3, 16))
    assert float(moved.abs().max()) > 0.1


def test_the_mean_of_the_output_is_that_of_full_precision() -> None:
    """The bias of the last layer takes up what the layers before it have left of a mean error."""
    first, last = nn.Linear(32, 8), nn.Linear(8, 2, bias=False)
    first.weight.data, last.weight.data = noise(8, 32, seed=3), noise(2, 8, seed=4)
    model, data = nn.Sequential(first, last).eval(), inputs(noise(64, 32, seed=2) + 1.0, torch.arange(64) % 3)
    table = StepTable(torch.full((3,), 0.15), torch.full((3,), 128, dtype=torch.int16), 8)
    layers = {
        name: QuantizedLayer("linear", (LayerPart(0, width, nearest(layer.weight.data, bits), table),))
        for name, layer, width, bits in (("0", first, 32, 3), ("1", last, 8, 8))
    }
    outcomes = list(reconstruct(model, layers, {}, data, Reconstruction(iters=1), output="1"))
    assert [outcome.unit for outcome in outcomes] == ["0", "1 (mean)"]
    assert outcomes[1].learned < outcomes[1].nearest
    changed = outcomes[1].layers["1"]
    assert changed.bias is not None and torch.equal(changed.parts[0].weight.codes, layers["1"].parts[0].weight.codes)
    simulation = Simulation(copy.deepcopy(model), {**layers, **outcomes[0].layers, "1": changed}, {})
    simulation.units("layer", [], data, "1")
    shift = simulation.shift("1", simulation.record("1", data, 64, False), 64)
    torch.testing.assert_close(shift, torch.zeros(2), atol=1e-5, rtol=0)


# In a calibration


@pytest.mark.parametrize("name", ["ddim", "sd", "dit"])
def test_reconstructed_pipelines_sample_and_come_back_from_disk(name: str, tmp_path: Path) -> None:
    options = dataclasses.replace(QUICKLY, iters=2)
    made = calibrated(name, options)
    report = quant(made).reconstruction
    assert report is not None and report["options"] == options.as_dict()
    assert report["tuples"] == {CASES[name].denoiser: 12}
    assert any(unit["kept"] == "learned" for unit in report["units"].values())
    made.save(tmp_path / "calibration")
    again = iec.Calibration.load(tmp_path / "calibration")
    assert same(made, again) and quant(again).reconstruction == report
    case = CASES[name]
    pipe = case.build()
    with iec.quantize(pipe, again, kernel="reference"):
        assert np.isfinite(np.asarray(pipe(**case.kwargs(), return_dict=False)[0])).all()


def test_layers_of_eight_bits_are_left_alone_by_default() -> None:
    plain, learned = quant(calibrated(options=None)), quant(calibrated())
    for name, before in plain.layers.items():
        after = learned.layers[name]
        eight = all(part.weight.bits == 8 for part in before.parts)
        unchanged = all(
            torch.equal(a.weight.codes, b.weight.codes) and torch.equal(a.act.scale, b.act.scale)
            for a, b in zip(after.parts, before.parts, strict=True)
        )
        assert not eight or unchanged, name
    assert learned.reconstruction is not None
    reached = {layer for unit in learned.reconstruction["units"].values() for layer in unit["layers"]}
    assert "conv_in" not in reached and len(reached) == len(plain.layers) - 1
    assert learned.reconstruction["units"]["unet.conv_out (mean)"]["layers"] == ["conv_out"]  # its bias alone
    eight_bits = quant(calibrated(config=dataclasses.replace(MIDDLE, weight_bits=8))).reconstruction
    assert eight_bits is not None and not eight_bits["units"]
    asked = quant(
        calibrated(config=MIDDLE, options=dataclasses.replace(QUICKLY, iters=1, all_bits=True))
    ).reconstruction
    assert asked is not None and "unet.conv_out" in asked["units"]


def test_the_error_of_the_whole_model_falls_on_tuples_not_seen() -> None:
    options = Reconstruction(iters=50, num_tuples=32, batch_size=16, lr_weight=0.1)
    settings: dict[str, Any] = {"num_samples": 16, "batch_size": 16, "num_inference_steps": 4}
    plain, learned = quant(calibrated(options=None, **settings)), quant(calibrated(options=options, **settings))
    model, tuples, _ = captured("ddim", 8)
    batch = tuples.batch(torch.arange(8), torch.device("cpu"))
    with torch.no_grad():
        exact = model(**batch)[0]
        errors = []
        for made in (plain, learned):
            layers = {key.removeprefix("unet."): value for key, value in made.layers.items()}
            products = {key.removeprefix("unet."): value for key, value in made.products.items()}
            simulation = Simulation(copy.deepcopy(model), layers, products)
            simulation.at(tuples.steps, True)
            errors.append(float((simulation.model(**batch)[0] - exact).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_a_killed_run_goes_on_after_its_last_unit_with_the_same_result(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    whole = calibrated(config=MIDDLE)
    assert quant(whole).reconstruction is not None
    for stage, after in (("samples", 2), ("reconstruction", 1), ("reconstruction", 3)):
        path, told = tmp_path / f"{stage}{after}", []

        def progress(what: str, done: int, total: int, stage: str = stage, after: int = after) -> None:
            if what == stage and done >= after:
                raise Stop

        with pytest.raises(Stop):
            calibrated(config=MIDDLE, checkpoint_path=path, progress=progress)
        resumed = calibrated(config=MIDDLE, checkpoint_path=path, progress=lambda *step, told=told: told.append(step))
        assert same(whole, resumed) and quant(resumed).reconstruction == quant(whole).reconstruction
        assert path.exists()  # until the caller has saved the calibration
        if stage == "reconstruction":
            assert told[0][:2] == ("reconstruction", after + 1)
            assert told[-1][1] == told[-1][2] == len(quant(whole).reconstruction["units"])  # type: ignore[index]
    with pytest.raises(ValueError, match="another run"):
        calibrated(config=MIDDLE, options=dataclasses.replace(QUICKLY, iters=13), checkpoint_path=path)


def test_inputs_may_be_mixed_and_dropped_deterministically() -> None:
    options = dataclasses.replace(QUICKLY, input_prob=0.5, drop=0.5, unit="layer", iters=2, seed=3)
    first, second = (calibrated(config=MIDDLE, options=options) for _ in range(2))
    assert same(first, second)
    assert not same(first, calibrated(config=MIDDLE, options=dataclasses.replace(options, seed=4)))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"unit": "network"}, "unit is 'network'"),
        ({"iters": 0}, "iters is 0"),
        ({"batch_size": 2.0}, "batch_size is 2.0"),
        ({"lr_weight": -1.0}, "lr_weight is -1.0"),
        ({"lr_scale": float("nan")}, "lr_scale is nan"),
        ({"drop": 1.5}, "drop is 1.5"),
        ({"regularizer": -0.1}, "regularizer is -0.1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Reconstruction(**options)


def test_reconstruct_must_be_options() -> None:
    with pytest.raises(TypeError, match=r"expected an iec\.Reconstruction"):
        calibrated(options=True)  # type: ignore[arg-type]
    assert iec.Reconstruction(unit="layer").penalty == 0.0 and iec.Reconstruction().penalty == 500.0
    assert iec.Reconstruction(region="up*").region == ("up*",)
