"""What diffusers asks of its own schedulers in tests/schedulers, asked of wrapped ones.

Every test runs without corrections and with all steps corrected by λ = 0; in both ways the plain scheduler's answers are
expected, bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, SchedulerMixin
from torch import Tensor

from iec import IECScheduler
from sampling import SPECS, Spec, Toy, missing, sample, start

MODES: dict[str, dict[str, Any]] = {"none": {"steps": "none"}, "zero": {"steps": "all", "relax": (0.0,)}}


@pytest.fixture(params=SPECS, ids=lambda spec: spec.name)
def spec(request: pytest.FixtureRequest) -> Spec:
    if package := missing(request.param):
        pytest.skip(f"needs {package}")
    return request.param


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> dict[str, Any]:
    return MODES[request.param]


def whole(scheduler: Any, spec: Spec) -> Tensor:
    """The end of a whole sampling loop."""
    torch.manual_seed(3)
    return sample(scheduler, spec, Toy(), start(torch.float32), spec.draws())


def first(scheduler: Any, spec: Spec, **other: Any) -> Any:
    """What the first step returns."""
    torch.manual_seed(3)
    scheduler.set_timesteps(spec.steps)
    x = start(torch.float32)
    scale = getattr(scheduler, "scale_model_input", lambda value, _: value)
    t = scheduler.timesteps[0]
    return scheduler.step(Toy()(scale(x, t), t), t, x, **spec.arguments(spec.draws()), **other)


def plain_config(scheduler: Any) -> dict[str, Any]:
    return {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}


# --- configurations ---------------------------------------------------------------------------------------------------


def test_saved_config_makes_an_equal_scheduler(spec: Spec, mode: dict[str, Any], tmp_path: Path) -> None:
    """save_config and from_pretrained: same configuration, same samples."""
    wrapped = IECScheduler(spec.make(), **mode)
    wrapped.save_config(tmp_path)
    kind = spec.type
    loaded = kind.from_pretrained(tmp_path)
    assert type(loaded) is kind and plain_config(loaded) == plain_config(spec.make())
    assert torch.equal(whole(IECScheduler(loaded, **mode), spec), whole(wrapped, spec))


def test_saves_as_the_inner_scheduler(spec: Spec, mode: dict[str, Any], tmp_path: Path) -> None:
    """save_pretrained writes what the plain scheduler writes, byte for byte."""
    IECScheduler(spec.make(), **mode).save_pretrained(tmp_path / "wrapped")
    spec.make().save_pretrained(tmp_path / "plain")
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("wrapped", "plain")]
    assert files[0] == files[1] == ["scheduler_config.json"]
    texts = [(tmp_path / name / "scheduler_config.json").read_text() for name in ("wrapped", "plain")]
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["_class_name"] == spec.kind


def test_config_is_forwarded(spec: Spec, mode: dict[str, Any]) -> None:
    inner = spec.make()
    wrapped = IECScheduler(inner, **mode)
    assert wrapped.config is inner.config or dict(wrapped.config) == dict(inner.config)
    assert wrapped.config.num_train_timesteps == inner.config.num_train_timesteps
    assert wrapped.config_name == inner.config_name
    assert wrapped.to_json_string() == inner.to_json_string()
    assert repr(inner.config) == repr(wrapped.config)
    wrapped.register_to_config(num_train_timesteps=77)
    assert inner.config.num_train_timesteps == 77


def test_loading_with_changes(spec: Spec, mode: dict[str, Any]) -> None:
    """from_config of the wrapped scheduler's config, with changes and unused arguments."""
    wrapped = IECScheduler(spec.make(), **mode)
    kind = spec.type
    loaded, unused = kind.from_config(wrapped.config, num_train_timesteps=500, no_such=1, return_unused_kwargs=True)
    assert type(loaded) is kind and loaded.config.num_train_timesteps == 500
    assert "no_such" in unused or "no_such" not in loaded.config
    assert wrapped.config.num_train_timesteps == spec.make().config.num_train_timesteps


def test_compatible_schedulers(spec: Spec, mode: dict[str, Any]) -> None:
    """`compatibles` is the inner one's, and each can be made from the wrapped scheduler's config."""
    inner = spec.make()
    wrapped = IECScheduler(inner, **mode)
    assert wrapped.has_compatibles == inner.has_compatibles
    assert wrapped.compatibles == inner.compatibles
    made = spec.type.from_config(wrapped.config)
    assert plain_config(made) == plain_config(inner)


def test_changing_the_scheduler_and_back() -> None:
    """DDIM → Euler → DDIM by configurations, wrapped every time, loses nothing."""
    wrapped = IECScheduler(diffusers.DDIMScheduler(beta_end=0.013, clip_sample=False), steps="all")
    euler = IECScheduler(diffusers.EulerDiscreteScheduler.from_config(wrapped.config), steps="all")
    again = IECScheduler(diffusers.DDIMScheduler.from_config(euler.config), steps="all")
    assert again.config.beta_end == 0.013 and again.config.clip_sample is False
    spec = Spec("", "DDIMScheduler")
    assert torch.equal(whole(again, spec), whole(wrapped, spec))


# --- attributes -------------------------------------------------------------------------------------------------------


def test_presents_itself_as_the_inner_class(spec: Spec, mode: dict[str, Any]) -> None:
    wrapped = IECScheduler(spec.make(), **mode)
    assert isinstance(wrapped, spec.type)
    assert isinstance(wrapped, SchedulerMixin) and isinstance(wrapped, ConfigMixin)
    assert wrapped.__class__.__name__ == spec.kind
    assert wrapped.__module__ == spec.type.__module__


def test_public_attributes(spec: Spec, mode: dict[str, Any]) -> None:
    inner = spec.make()
    wrapped = IECScheduler(inner, **mode)
    for name in ("order", "init_noise_sigma", "num_inference_steps"):
        assert hasattr(wrapped, name) == hasattr(inner, name)
        if hasattr(inner, name):
            assert getattr(wrapped, name) == getattr(inner, name)
    for name in ("alphas_cumprod", "betas", "sigmas"):
        if isinstance(getattr(inner, name, None), Tensor):
            assert torch.equal(getattr(wrapped, name), getattr(inner, name))
    for name in ("step", "set_timesteps", "scale_model_input", "add_noise", "scale_noise", "set_begin_index"):
        assert hasattr(wrapped, name) == hasattr(inner, name)


def test_attributes_are_not_shadowed(spec: Spec, mode: dict[str, Any]) -> None:
    """Own attributes can be set and read; configuration read as an attribute is deprecated; what is missing says so."""
    wrapped = IECScheduler(spec.make(), **mode)
    wrapped.dummy_attribute = 5
    assert wrapped.dummy_attribute == 5
    assert wrapped.iec.inner.dummy_attribute == 5
    with pytest.warns(FutureWarning, match="num_train_timesteps"):
        assert wrapped.num_train_timesteps == wrapped.config.num_train_timesteps
    with pytest.raises(AttributeError, match="does_not_exist"):
        wrapped.does_not_exist  # noqa: B018


def test_length_is_the_training_length(spec: Spec, mode: dict[str, Any]) -> None:
    inner = spec.make()
    wrapped = IECScheduler(inner, **mode)
    if hasattr(type(inner), "__len__"):
        assert len(wrapped) == len(inner) == inner.config.num_train_timesteps


# --- stepping ---------------------------------------------------------------------------------------------------------


def test_step_keeps_the_shape(spec: Spec, mode: dict[str, Any]) -> None:
    shapes = []
    wrapped = IECScheduler(spec.make(), **mode)
    sample(wrapped, spec, Toy(), start(), spec.draws(), on_step=lambda _, x: shapes.append(x.shape))
    assert set(shapes) == {start().shape}


def test_first_step_is_the_plain_one(spec: Spec, mode: dict[str, Any]) -> None:
    """All outputs of a step, under the same names, in the same type."""
    found, plain = first(IECScheduler(spec.make(), **mode), spec), first(spec.make(), spec)
    assert type(found) is type(plain) and list(found) == list(plain)
    for key in plain:
        same = torch.equal(found[key], plain[key]) if isinstance(plain[key], Tensor) else found[key] == plain[key]
        assert same, key


def test_tuple_and_dataclass_are_equivalent(spec: Spec, mode: dict[str, Any]) -> None:
    as_tuple = first(IECScheduler(spec.make(), **mode), spec, return_dict=False)
    as_class = first(IECScheduler(spec.make(), **mode), spec, return_dict=True)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], as_class.prev_sample)


@pytest.mark.parametrize("steps", [2, 5, 10, 50])
def test_any_number_of_steps(spec: Spec, mode: dict[str, Any], steps: int) -> None:
    """The logical list is the plain one for every length."""
    plain, wrapped = spec.make(), IECScheduler(spec.make(), **mode)
    if spec.name == "pndm-prk" and steps < 5:
        return  # needs four steps of Runge-Kutta
    plain.set_timesteps(steps)
    wrapped.set_timesteps(steps)
    assert torch.equal(wrapped.iec.inner.timesteps, plain.timesteps)
    assert wrapped.num_inference_steps == plain.num_inference_steps
    visits = 1 + len(mode.get("relax", ()))
    assert torch.equal(wrapped.timesteps, plain.timesteps.repeat_interleave(visits))


def test_steps_in_any_order(mode: dict[str, Any]) -> None:
    """Schedulers without memory may be asked for any step; each is then the plain one."""
    plain, wrapped = diffusers.DDIMScheduler(), IECScheduler(diffusers.DDIMScheduler(), **mode)
    for scheduler in (plain, wrapped):
        scheduler.set_timesteps(10)
    x, m = start(), Toy()(start(), 5)
    for index in (5, 6, 2, 9, 0):
        t = plain.timesteps[index]
        if mode["steps"] == "none":
            found = wrapped.step(m, t, x).prev_sample
        else:
            wrapped.set_timesteps(10)
            if index:
                with pytest.warns(UserWarning, match="out of order"):
                    found = wrapped.step(m, t, x).prev_sample
            else:
                found = wrapped.step(m, t, x).prev_sample
        assert torch.equal(found, plain.step(m, t, x).prev_sample)


@pytest.mark.parametrize("timestep", ["tensor", "item", "one"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "pndm-plms", "dpm++2m", "unipc", "deis"])
def test_timesteps_as_tensors_and_numbers(name: str, timestep: str, mode: dict[str, Any]) -> None:
    """Loops pass the entry of the list, its number, or a batch of equal ones."""
    spec = next(s for s in SPECS if s.name == name)
    if timestep == "one" and name == "pndm-plms":
        return  # it indexes with the timestep

    def loop(scheduler: Any) -> Tensor:
        scheduler.set_timesteps(spec.steps)
        x, toy, draws = start(), Toy(), spec.draws()
        for t in scheduler.timesteps:
            given = {"tensor": t, "item": t.item(), "one": t[None]}[timestep]
            x = scheduler.step(toy(x, t), given, x, **spec.arguments(draws), return_dict=False)[0]
        return x

    assert torch.equal(loop(IECScheduler(spec.make(), **mode)), loop(spec.make()))


# --- training and noising ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_trained_betas(kind: str, mode: dict[str, Any]) -> None:
    betas = np.linspace(1e-4, 0.05, 100)
    make = getattr(diffusers, kind)
    plain, wrapped = make(trained_betas=betas), IECScheduler(make(trained_betas=betas), **mode)
    assert torch.equal(wrapped.betas, plain.betas)
    np.testing.assert_allclose(wrapped.betas.numpy(), betas, rtol=1e-6)


def test_noising(spec: Spec, mode: dict[str, Any]) -> None:
    """add_noise and scale_noise at entries of the list, before a run and after set_timesteps."""
    clean, drawn = start(torch.float32), start(torch.float32).flip(0)
    plain, wrapped = spec.make(), IECScheduler(spec.make(), **mode)
    for scheduler in (plain, wrapped):
        scheduler.set_timesteps(spec.steps)
    t = plain.timesteps[1:2]
    if hasattr(plain, "add_noise") and not spec.kind.startswith(("IPNDM", "EDMDPM")):
        expected = plain.add_noise(clean, drawn, t.expand(len(clean)))
        assert torch.equal(wrapped.add_noise(clean, drawn, t.expand(len(clean))), expected)
        assert expected.shape == clean.shape and expected.device == clean.device
    if hasattr(plain, "scale_noise"):
        assert torch.equal(wrapped.scale_noise(clean, t, drawn), plain.scale_noise(clean, t, drawn))


def test_input_scale(spec: Spec, mode: dict[str, Any]) -> None:
    plain, wrapped = spec.make(), IECScheduler(spec.make(), **mode)
    if not hasattr(plain, "scale_model_input"):
        assert not hasattr(wrapped, "scale_model_input")
        return
    for scheduler in (plain, wrapped):
        scheduler.set_timesteps(spec.steps)
    x, t = start(), plain.timesteps[0]
    kept = x.clone()
    assert torch.equal(wrapped.scale_model_input(x, t), plain.scale_model_input(x.clone(), t))
    assert torch.equal(x, kept)


def test_custom_lists(mode: dict[str, Any]) -> None:
    """`timesteps=` and `sigmas=` of set_timesteps, where the scheduler takes them."""
    for kind, given in (
        ("DDPMScheduler", {"timesteps": [900, 500, 20]}),
        ("EulerDiscreteScheduler", {"timesteps": [900, 500, 20]}),
        ("EulerDiscreteScheduler", {"sigmas": [10.0, 2.0, 0.5, 0.0]}),
        ("FlowMatchEulerDiscreteScheduler", {"sigmas": [1.0, 0.6, 0.3]}),
        ("FlowMatchEulerDiscreteScheduler", {"sigmas": [1.0, 0.6, 0.3], "mu": 0.7, "dynamic": True}),
    ):
        given = dict(given)
        config = {"use_dynamic_shifting": True} if given.pop("dynamic", False) else {}
        plain, wrapped = getattr(diffusers, kind)(**config), IECScheduler(getattr(diffusers, kind)(**config), **mode)
        rows = []
        for scheduler in (plain, wrapped):
            scheduler.set_timesteps(device="cpu", **given)
            x, toy, generator = start(), Toy(), torch.Generator().manual_seed(1)
            for t in scheduler.timesteps:
                scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                x = scheduler.step(toy(scaled, t), t, x, generator=generator).prev_sample
            rows.append(x)
        assert torch.equal(*rows), kind


def test_refusals_are_the_inner_ones(mode: dict[str, Any]) -> None:
    """Errors of the inner scheduler come through, and the next run is not harmed."""
    wrapped = IECScheduler(diffusers.DDPMScheduler(), **mode)
    spec = next(s for s in SPECS if s.name == "ddpm")
    expected = whole(wrapped, spec)
    with pytest.raises(ValueError, match="descending"):
        wrapped.set_timesteps(timesteps=[100, 87, 50, 51, 0])
    with pytest.raises(ValueError, match="one of"):
        wrapped.set_timesteps(num_inference_steps=2, timesteps=[100, 87])
    assert torch.equal(whole(wrapped, spec), expected)
