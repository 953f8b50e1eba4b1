"""Reconstruction under a cache: which units see which tuples, what they get and are to give, resumed as uninterrupted."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import iec
from cached import executed, unet
from iec.artifact.calibration import CacheTables, Quantization
from iec.calibration import calibrate as calibration
from iec.calibration.reconstructed import ReusePasses
from iec.calibration.tuples import Capture, Tuples
from iec.quant.reconstruct import Reconstruction, reconstruct
from iec.quant.simulate import Simulation
from quantized import QUICK, arguments, same
from tiny import CASES, noise

CPU = torch.device("cpu")
W4: dict[str, Any] = {**QUICK, "weight_bits": 4, "weight_method": "mse"}
QUICKLY = Reconstruction(iters=6, batch_size=8, num_tuples=12, lr_weight=0.1)
CACHE = iec.CacheQuant(2, schedule="uniform")  # of 4 steps: 0 and 2 are whole
SETTINGS: dict[str, Any] = {"num_inference_steps": 4, "num_samples": 4, "batch_size": 2, "seed": 5}
CONSUMER = "up_blocks.0.resnets.1"  # of CACHE's feature; conv_in is before the cached region, mid_block in it
SOME = iec.QuantConfig(
    **W4, layers=("conv_in", "mid_block.resnets.0.*", f"{CONSUMER}.*", "up_blocks.1.resnets.1.*", "conv_out")
)


def calibrated(
    name: str = "ddim",
    options: Reconstruction | None = QUICKLY,
    cache: iec.CacheQuant | None = CACHE,
    config: iec.QuantConfig = SOME,
    **changes: Any,
) -> iec.Calibration:
    case = CASES[name]
    per_image = {key: list(value) * 2 if isinstance(value, list) else value for key, value in arguments(case).items()}
    return iec.calibrate(case.build(), config, cache, reconstruct=options, **{**SETTINGS, **changes, **per_image})


@dataclasses.dataclass
class Ready:
    """What a calibration has when reconstruction begins."""

    model: nn.Module
    quant: Quantization
    tuples: Tuples
    tables: CacheTables

    @property
    def config(self) -> iec.CacheQuant:
        return iec.CacheQuant.from_dict(self.tables.config)

    def simulation(self) -> Simulation:
        """Of the layers as they are, under the cache."""
        return Simulation(copy.deepcopy(self.model), *self.of(), functools.partial(ReusePasses, cache=self.config))

    def of(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Layers and products by their names in the model."""
        layers, products = self.quant.layers, self.quant.products
        return tuple({key.removeprefix("unet."): v for key, v in given.items()} for given in (layers, products))  # type: ignore[return-value]


def ready(name: str = "ddim", options: Reconstruction = QUICKLY, **changes: Any) -> Ready:
    """Calibrate up to the reconstruction."""
    found: list[Any] = []

    def instead(models: dict[str, nn.Module], quant: Quantization, tuples: dict[str, Tuples], *_: Any) -> Quantization:
        found.extend((models["unet"], quant, tuples["unet"]))
        return quant

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "reconstructed", instead)
        made = calibrated(name, options, **changes)
    assert made.cache is not None
    return Ready(*found, made.cache)


# Tuples


@pytest.mark.parametrize("name", ["ddim", "sd"])
def test_tuples_keep_the_feature_of_the_last_whole_pass_compensated(name: str) -> None:
    """Against plain runs, in which the feature is looked at where it is taken; with guidance, row by row."""
    made = ready(name, dataclasses.replace(QUICKLY, num_tuples=16))
    tables, tuples = made.tables, made.tuples
    assert tables.refresh == (0, 2) and len(tuples) == 16
    assert tuples.reused.tolist() == [step in (1, 3) for step in tuples.steps.tolist()]
    assert float((tables.gain[[1, 3]] - 1).abs().min(1).values.max()) > 0  # there is something to compensate
    case, calls = CASES[name], []
    pipe = case.build()
    consumer, channels = made.config.locate(pipe.unet).consumer, tables.gain.shape[1]
    features: list[Tensor] = []
    hooks = [
        consumer.register_forward_pre_hook(lambda _, args: features.append(args[0][:, :channels])),
        pipe.unet.register_forward_hook(
            lambda _, args, kwargs, out: calls.append((args, kwargs, out[0])), with_kwargs=True
        ),
    ]
    for first in (5, 7):
        seeds = [torch.Generator().manual_seed(seed) for seed in (first, first + 1)]
        pipe(**case.kwargs(num_inference_steps=4, generator=seeds))
    for hook in hooks:
        hook.remove()
    for place, step in enumerate(tuples.steps.tolist()):
        given = tuples.batch(torch.tensor([place]), CPU)
        matches = []
        for batch in (0, 4):
            args, kwargs, out = calls[batch + step]
            call = {"sample": args[0], **kwargs}
            names = [key for key in ("sample", "encoder_hidden_states") if isinstance(call.get(key), Tensor)]
            matches += [
                (batch, row)
                for row in range(len(out))
                if all(torch.equal(call[key][row], given[key][0]) for key in names)
            ]
        ((batch, row),) = matches
        if tuples.reused[place]:
            exact = features[batch + step - 1][row]
            expected = exact * tables.gain[step][:, None, None] + tables.offset[step][:, None, None]
            found = tuples.feature(torch.tensor([place]), CPU)[0]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_features_stay_with_their_tuples_whatever_is_taken() -> None:
    capture = Capture(CASES["ddim"].build().unet, 6, 5, 30, 0, reuse_steps=(1, 2, 4))
    for step in (4, 0, 1, 3):  # step 2 never comes; in any order
        for first in (3, 0):
            numbers = torch.arange(first, first + 3.0).view(3, 1, 1, 1) + 100 * step
            feature = numbers.expand(3, 2, 4, 4) if step in (1, 4) else None
            capture.take(step, first, 3, (numbers.expand(3, 3, 8, 8), step), {}, feature)
    again = Capture(CASES["ddim"].build().unet, 6, 5, 30, 0, reuse_steps=(1, 2, 4))
    again.load_state(*capture.state())
    for tuples in (capture.result(), again.result()):
        assert sorted(tuples.steps.tolist()) == [0] * 6 + [1] * 6 + [3] * 6 + [4] * 6
        places = tuples.reused.nonzero()[:, 0].flip(0)
        assert set(tuples.steps[places].tolist()) == {1, 4}
        sample = tuples.batch(places, CPU)["sample"]
        assert torch.equal(tuples.feature(places, CPU)[:, :, 0, 0], sample[:, :2, 0, 0])
        with pytest.raises(AssertionError):
            tuples.feature(torch.arange(len(tuples)), CPU)


# Which units see which tuples


def large(branch: int, unit: str) -> tuple[Any, Simulation, dict[str, list[str]], Tuples]:
    """A UNet of three levels without quantized layers, cut at `branch`, its units, and a tuple at a reuse step."""
    model = unet()
    names = [name for name, part in model.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    shallow = functools.partial(ReusePasses, cache=iec.CacheQuant(2, branch=branch))
    simulation = Simulation(model, {}, {}, shallow)
    tree: list[Any] = ["dict", {"sample": ["tensor", "sample"], "timestep": ["plain", 300]}]
    steps, reused = torch.tensor([1]), torch.tensor([True])
    held: dict[str, Tensor] = {"sample": noise(1, 3, 8, 8)}
    found: list[Tensor] = []
    assert isinstance(simulation.shallow, ReusePasses)
    cut = simulation.shallow.cut
    cut.whole(found.append)  # type: ignore[arg-type]
    with torch.no_grad():
        model(held["sample"], 300)
    kind: Any = unit
    tuples = Tuples(steps, tree, held, {}, reused, found[0])
    return model, simulation, simulation.units(kind, names, tuples), tuples


@pytest.mark.parametrize("unit", ["block", "layer"])
@pytest.mark.parametrize("branch", [-1, 0, 1, 2, 4, 5, 7])
@torch.no_grad()
def test_sides_are_what_a_reuse_pass_skips_and_what_depends_on_the_feature(branch: int, unit: str) -> None:
    model, simulation, units, tuples = large(branch, unit)
    assert simulation.shallow is not None
    arguments, feature = tuples.batch(torch.tensor([0]), CPU), tuples.feature(torch.tensor([0]), CPU)
    outputs: list[dict[str, Tensor]] = []
    for given in (feature, feature + 1):
        seen: dict[str, Tensor] = {}
        hooks = [
            model.get_submodule(name).register_forward_hook(
                lambda _, __, out, name=name, seen=seen: seen.update({name: out})
            )
            for name in units
        ]
        ran = executed(model, lambda given=given: simulation.shallow.evaluate(arguments, given))  # type: ignore[union-attr]
        for hook in hooks:
            hook.remove()
        outputs.append(seen)
    for name, layers in units.items():
        inside = [layer not in ran for layer in layers]
        assert all(inside) or not any(inside)
        behind = name.startswith("up_blocks")  # the time embedding's projections too: they count by their place
        depends = not inside[0] and not torch.equal(outputs[0][name], outputs[1][name])
        assert depends or inside[0] or not behind or name.endswith("time_emb_proj")
        expected = "inside" if inside[0] else "after" if depends or behind else "before"
        assert simulation.sides[name] == expected, name
    assert set(simulation.sides.values()) == {"before", "inside", "after"}
    assert simulation.sides["conv_in"] == "before" and simulation.sides["conv_out"] == "after"


def test_without_a_cache_there_is_one_side() -> None:
    made = ready()
    layers, products = made.of()
    simulation = Simulation(copy.deepcopy(made.model), layers, products)
    simulation.units("block", list(layers), made.tuples)
    assert set(simulation.sides.values()) == {"before"}


@torch.no_grad()
def test_units_get_what_they_get_in_a_run_and_are_to_give_what_whole_passes_give() -> None:
    made = ready()
    tuples, everything = made.tuples, torch.arange(len(made.tuples))
    whole = (~tuples.reused).nonzero()[:, 0]
    assert 0 < len(whole) < len(tuples)
    simulation = made.simulation()
    simulation.units("block", list(simulation.layers), tuples)
    names = {"conv_in": "before", "mid_block.resnets.0": "inside", CONSUMER: "after"}
    assert {name: simulation.sides[name] for name in names} == names
    seen: dict[tuple[str, bool], tuple[Tensor, Tensor]] = {}  # in whole passes over all tuples, without a cache
    layers, products = made.of()
    uncached = Simulation(copy.deepcopy(made.model), layers, products)
    for quantized in (False, True):
        hooks = [
            uncached.model.get_submodule(name).register_forward_hook(
                lambda _, args, out, name=name, quantized=quantized: seen.update({(name, quantized): (args[0], out)})
            )
            for name in names
        ]
        uncached.at(tuples.steps, quantized)
        uncached.model(**tuples.batch(everything, CPU))
        for hook in hooks:
            hook.remove()
    for name, side in names.items():
        record = simulation.record(name, tuples, 3, True)
        chosen = whole if side == "inside" else everything
        assert torch.equal(record.steps, tuples.steps[chosen])
        rows = torch.arange(len(chosen))
        (target,) = record.targets.values()
        torch.testing.assert_close(target.get(rows, CPU), seen[name, False][1][chosen], atol=1e-5, rtol=1e-4)
        if side == "after":
            assert not record.exact  # those of full precision would be of another pass
        else:
            torch.testing.assert_close(
                record.exact["0/0"].get(rows, CPU), seen[name, False][0][chosen], atol=1e-5, rtol=1e-4
            )
        given, expected = record.inputs["0/0"].get(rows, CPU), seen[name, True][0][chosen].clone()
        if side == "after":  # at reuse steps the feature; the rest comes from the down path in either case
            reused = tuples.reused.nonzero()[:, 0]
            feature = tuples.feature(reused, CPU)
            channels = feature.shape[1]
            assert torch.equal(given[reused, :channels], feature)
            assert float((expected[reused, :channels] - feature).norm() / feature.norm()) > 0.01
            expected[reused, :channels] = feature
        # rounded activations may fall on the other side where sums are ordered otherwise
        assert float((given - expected).norm() / expected.norm()) < 0.02
    assert bool((simulation.record("conv_out", tuples, 4, False).steps == tuples.steps).all())


def test_a_part_that_no_tuple_reaches_is_told() -> None:
    made = ready()
    only = made.tuples.reused.nonzero()[:, 0]
    tree: list[Any] = ["dict", {"sample": ["tensor", "sample"], "timestep": ["tensor", "timestep"]}]
    held = made.tuples.batch(only, CPU)
    stale = Tuples(
        made.tuples.steps[only], tree, held, {}, torch.ones(len(only), dtype=torch.bool), made.tuples._features
    )
    layers, products = made.of()
    shallow = functools.partial(ReusePasses, cache=made.config)
    with pytest.raises(ValueError, match=f"none of the {len(only)} tuples is at a refresh step"):
        next(reconstruct(made.model, layers, products, stale, QUICKLY, shallow=shallow))
    outside = {name: layer for name, layer in layers.items() if not name.startswith("mid_block")}
    quickly = dataclasses.replace(QUICKLY, iters=1, all_bits=True)
    units = [o.unit for o in reconstruct(made.model, outside, products, stale, quickly, shallow=shallow)]
    assert units[0] == "conv_in" and units[-1] == "conv_out"


# In a calibration


def test_a_cache_that_never_reuses_changes_nothing() -> None:
    options = dataclasses.replace(QUICKLY, drop=0.5)
    plain = calibrated(options=options, cache=None)
    never = calibrated(options=options, cache=iec.CacheQuant(1, schedule="uniform"))
    assert same(plain.quant, never.quant)
    assert plain.quant is not None and never.quant is not None
    assert plain.quant.reconstruction == never.quant.reconstruction
    assert not same(plain.quant, calibrated(options=options).quant)


def test_the_error_of_reuse_passes_falls_on_tuples_not_seen() -> None:
    """Below that of rounding to nearest, and of what is learned without regard to the cache."""
    settings: dict[str, Any] = {"num_samples": 16, "batch_size": 16}
    settings["cache"] = iec.CacheQuant(2, schedule="uniform", compensate="none")
    settings["config"] = iec.QuantConfig(**W4, layers=("mid_block.resnets.0.*", f"{CONSUMER}.*", "up_blocks.1.*"))
    options = Reconstruction(iters=40, num_tuples=48, batch_size=16, lr_weight=0.1)
    made, unseen = ready(options=options, **settings), ready(seed=500, **settings).tuples
    layers, products = made.of()
    blind = Tuples(made.tuples.steps, made.tuples._template, made.tuples._held, made.tuples._kept)
    shallow = functools.partial(ReusePasses, cache=made.config)
    places = unseen.reused.nonzero()[:, 0]
    batch, feature = unseen.batch(places, CPU), unseen.feature(places, CPU)
    errors = []
    for learn in (
        None,
        lambda: reconstruct(made.model, layers, products, blind, options),
        lambda: reconstruct(made.model, layers, products, made.tuples, options, shallow=shallow),
    ):
        learned = {} if learn is None else {k: v for outcome in learn() for k, v in outcome.layers.items()}
        simulation = Simulation(copy.deepcopy(made.model), {**layers, **learned}, products, shallow)
        simulation.at(unseen.steps[places], True)
        assert simulation.shallow is not None
        with torch.no_grad():
            difference = simulation.shallow.evaluate(batch, feature)[0] - made.model(**batch)[0]
        errors.append(float(difference.square().mean()))
    nearest, blindly, aware = errors
    assert aware < 0.9 * nearest and aware < 0.9 * blindly, errors


def test_a_killed_run_goes_on_under_a_cache_with_the_same_result(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    options = dataclasses.replace(QUICKLY, input_prob=0.5, drop=0.5)
    cache = iec.CacheQuant(2)
    whole = calibrated(options=options, cache=cache)
    assert whole.quant is not None and whole.quant.reconstruction is not None
    units = whole.quant.reconstruction["units"]
    assert "unet.mid_block.resnets.0" in units and f"unet.{CONSUMER}" in units
    assert any(unit["kept"] == "learned" for unit in units.values())
    for stage, after in (("samples", 2), ("reconstruction", 2)):
        path = tmp_path / f"{stage}{after}"

        def progress(what: str, done: int, total: int, stage: str = stage, after: int = after) -> None:
            if what == stage and done >= after:
                raise Stop

        with pytest.raises(Stop):
            calibrated(options=options, cache=cache, checkpoint_path=path, progress=progress)
        resumed = calibrated(options=options, cache=cache, checkpoint_path=path)
        assert same(whole.quant, resumed.quant) and resumed.quant is not None
        assert resumed.quant.reconstruction == whole.quant.reconstruction


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_conditional_pipelines_are_reconstructed_and_sample(name: str) -> None:
    options = dataclasses.replace(QUICKLY, iters=2)
    config = iec.QuantConfig(**W4, layers=("conv_in", "mid_block.*", "up_blocks.1.*"))
    made = calibrated(name, options, iec.CacheQuant(2), config)
    assert made.quant is not None and made.quant.reconstruction is not None and made.cache is not None
    units = made.quant.reconstruction["units"]
    assert any("transformer_blocks" in unit for unit in units) and any(u["kept"] == "learned" for u in units.values())
    pipe = CASES[name].build()
    iec.cache(pipe, iec.CacheQuant(2), made)
    iec.quantize(pipe, made, kernel="reference")
    assert isinstance(pipe, diffusers.DiffusionPipeline)
    assert bool(torch.isfinite(pipe(**CASES[name].kwargs(), return_dict=False)[0]).all())
