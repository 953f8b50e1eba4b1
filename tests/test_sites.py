"""Which layers of a denoiser are quantized, where they are split, and with how many bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cached
import iec
from iec.quant.sites import Sites, find, splits
from tiny import CASES, noise, unet_text

KINDS = (nn.Conv2d, nn.Linear)


def denoiser(name: str) -> Any:
    return getattr(CASES[name].build(), CASES[name].denoiser)


def sites(model: Any, **options: Any) -> Sites:
    return find(model, iec.QuantConfig(**options))


def names(found: Sites) -> set[str]:
    return {site.name.removeprefix("unet.") for site in found.layers}


@pytest.mark.parametrize("name", ["ddim", "sd", "sd-inpaint9", "sdxl", "dit", "flux", "sd3"])
def test_every_convolution_and_linear_layer_is_found(name: str) -> None:
    model = denoiser(name)
    found = sites(model)
    assert names(found) == {key for key, module in model.named_modules() if isinstance(module, KINDS)}
    assert all(model.get_submodule(site.name.removeprefix("unet.")) is site.module for site in found.layers)
    kinds = {site.kind: type(site.module) for site in found.layers}
    assert kinds.items() <= {"conv2d": nn.Conv2d, "linear": nn.Linear}.items()
    for site in found.layers:
        width = site.module.in_features if site.kind == "linear" else site.module.in_channels
        assert site.parts[0][0] == 0 and site.parts[-1][1] == width
        assert all(one[1] == two[0] for one, two in zip(site.parts, site.parts[1:], strict=False))


UNETS: dict[str, Callable[[], Any]] = {
    "two levels": lambda: denoiser("ddim"),
    "three levels": cached.unet,
    "one layer": lambda: cached.unet(layers=1, levels=2),
    "resnet up and down": lambda: cached.unet(
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    ),
    "one width": lambda: cached.unet(block_out_channels=(8, 8, 8)),
    "text": lambda: denoiser("sd"),
    "sdxl": lambda: denoiser("sdxl"),
    "no middle": lambda: unet_text(mid_block_type=None),
    "bundled": lambda: iec.load("fashion-mnist").unet,
}


def calls(model: Any) -> dict[str, Any]:
    side = model.config.sample_size
    given: dict[str, Any] = {"sample": noise(1, model.config.in_channels, side, side), "timestep": 10}
    if hasattr(model.config, "cross_attention_dim"):
        given["encoder_hidden_states"] = noise(1, 5, model.config.cross_attention_dim)
        if model.config.addition_embed_type == "text_time":
            given["added_cond_kwargs"] = {"text_embeds": noise(1, 16), "time_ids": noise(1, 6)}
    return given


@pytest.mark.parametrize("kind", UNETS)
def test_splits_are_where_the_model_concatenates(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the concatenations that a forward really makes."""
    model = UNETS[kind]()
    made: list[tuple[Tensor, int]] = []
    seen: dict[str, int] = {}
    plain = torch.cat

    def cat(tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
        joined = plain(tensors, *args, **kwargs)
        made.append((joined, tensors[0].shape[1]))
        return joined

    hooks = []
    for name, module in model.named_modules():
        if hasattr(module, "conv1") and hasattr(module, "conv_shortcut"):

            def called(module: Any, args: tuple[Tensor, ...], name: str = name) -> None:
                for joined, width in made:
                    if joined is args[0]:
                        seen[f"{name}.conv1"] = width
                        if module.conv_shortcut is not None:
                            seen[f"{name}.conv_shortcut"] = width

            hooks.append(module.register_forward_pre_hook(called))
    monkeypatch.setattr(torch, "cat", cat)
    with torch.no_grad():
        model(**calls(model))
    monkeypatch.undo()
    for hook in hooks:
        hook.remove()
    assert seen and splits(model) == seen
    found = {site.name.removeprefix("unet."): site for site in sites(model).layers}
    for name, site in found.items():
        width = site.parts[-1][1]
        assert site.parts == (((0, seen[name]), (seen[name], width)) if name in seen else ((0, width),))
    assert all(len(site.parts) == 1 for site in sites(model, split=False).layers)


def test_transformers_have_no_splits() -> None:
    for name in ("dit", "flux", "sd3"):
        assert splits(denoiser(name)) == {}


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("ddim", "conv_in", "conv_out"),
        ("sd", "conv_in", "conv_out"),
        ("sdxl", "conv_in", "conv_out"),
        ("dit", "pos_embed.proj", "proj_out_2"),
        ("flux", "x_embedder", "proj_out"),
        ("sd3", "pos_embed.proj", "proj_out"),
    ],
)
def test_the_first_and_the_last_layer_keep_their_bits(name: str, first: str, last: str) -> None:
    found = sites(denoiser(name), weight_bits=4, act_bits=6, edge_bits=7)
    for site in found.layers:
        edge = site.name in (f"unet.{first}", f"unet.{last}")
        assert (site.weight_bits, site.act_bits) == ((7, 7) if edge else (4, 6)), site.name


def test_an_unknown_architecture_has_its_first_and_last_layer_by_order() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.Linear(2, 1))
    bits = [site.weight_bits for site in sites(model, weight_bits=4).layers]
    assert bits == [8, 4, 8]


def test_filters() -> None:
    model = denoiser("ddim")
    every = names(sites(model))
    down = {name for name in every if name.startswith("down_blocks.")}
    assert names(sites(model, layers="down_blocks.*")) == down
    assert names(sites(model, layers=["down_blocks.*", "conv_in"])) == down | {"conv_in"}
    assert names(sites(model, layers=("!down_blocks.*",))) == every - down
    assert names(sites(model, layers=["*", "!down_blocks.*"])) == every - down
    kept = names(sites(model, layers=["!down_blocks.*", "down_blocks.0.*"]))
    assert kept == every - down | {name for name in every if name.startswith("down_blocks.0.")}
    convolutions = sites(model, layers=lambda name, module: isinstance(module, nn.Conv2d))
    assert {site.kind for site in convolutions.layers} == {"conv2d"}
    assert set(sites(model, layers="down_blocks.*").skipped.values()) >= {"excluded by the filter"}
    assert f"unet.{min(every - down)}" in sites(model, layers="down_blocks.*").skipped
    with pytest.raises(TypeError, match=r"nothing to quantize in this UNet2DModel.*none of them.*'nowhere\.\*'"):
        sites(model, layers="nowhere.*")


def test_options_are_checked() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"weight_bits": 9}, "9"),
        ({"act_bits": 1}, "1"),
        ({"edge_bits": 8.0}, "8.0"),
        ({"weight_method": "median"}, "median"),
        ({"weight_scheme": "other"}, "weight_scheme"),
        ({"act_scheme": "auto"}, "act_scheme"),
        ({"momentum": 1.0}, "momentum"),
        ({"layers": ()}, "layers"),
        ({"layers": (3,)}, "layers"),
    ]
    for options, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            iec.QuantConfig(**options)
    config = iec.QuantConfig(weight_bits=4, layers=["a", "!b"])
    assert iec.QuantConfig.from_dict(config.as_dict()) == config and config.label == "W4A8"
    with pytest.raises(ValueError, match="unknown quantization options wrong"):
        iec.QuantConfig.from_dict({"wrong": 1})

    def chosen(name: str, module: nn.Module) -> bool:
        return True

    plain = iec.QuantConfig(layers=chosen).as_dict()  # the function is named, for the record
    assert plain["layers"] == "function chosen" and iec.QuantConfig.from_dict(plain).layers == ("*",)


def test_schemes() -> None:
    """auto: symmetric at 8 bits, because oneDNN's int8 weights have no zero point; asymmetric below."""
    auto = iec.QuantConfig()
    assert [auto.symmetric(bits) for bits in (8, 7, 4)] == [True, False, False]
    assert all(iec.QuantConfig(weight_scheme="symmetric").symmetric(bits) for bits in (8, 4))
    assert not any(iec.QuantConfig(weight_scheme="asymmetric").symmetric(bits) for bits in (8, 4))


@pytest.mark.parametrize(("name", "count"), [("ddim", 4), ("sd", 8), ("sdxl", 8), ("dit", 1), ("flux", 0), ("sd3", 0)])
def test_products(name: str, count: int) -> None:
    model = denoiser(name)
    found = sites(model)
    attentions = [key for key, module in model.named_modules() if hasattr(module, "to_q")]
    assert len(found.attentions) == count
    skipped = {key: reason for key, reason in found.skipped.items() if key.endswith("(products)")}
    assert len(skipped) + count == len(attentions)
    assert all("floating point" in reason for reason in skipped.values())
    none = sites(model, products=False)
    assert not none.attentions and not none.skipped


def test_what_cannot_be_quantized_is_named() -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = nn.Sequential(nn.Conv2d(1, 1, 1), Own(2, 2), nn.Linear(2, 2))
    found = sites(model)
    assert names(found) == {"0", "2"}
    assert "Own, of which nothing is known but its base class" in found.skipped["unet.1"]


def test_compiled_models_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.compile(backend="eager")
    with pytest.raises(TypeError, match="was compiled"):
        sites(model)
    with pytest.raises(TypeError, match="was compiled"):
        sites(torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager"))
