"""`iec evaluate`: what it refuses before the work, what it leaves out of few images, and what it says beside the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from iec.cli.app import app
from iec.evaluate.images import save_each, to_pil
from iec.evaluate.statistics import Statistics

COUNT = 12


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """In a folder of its own, `plain`: images of the seeds 0 … 11."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")  # notes on one line
    made = torch.randint(0, 256, (COUNT, 1, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    save_each(made, "plain", range(COUNT))
    return made


def evaluate(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments), *(("--draws", "0"))])


def told(*arguments: object) -> dict[str, Any]:
    result = evaluate(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--save", "t.txt"), "--save t.txt: statistics are kept as .safetensors; give t.safetensors"),
        (("--save", "plain/000000.png"), "--save plain/000000.png: statistics are kept as .safetensors"),
        (("--save", "plain"), "--save plain: statistics are kept as .safetensors"),
        (("--save", "d.safetensors"), "--save d.safetensors: a folder, expected a file"),
        (("--save", "plain/000000.png/x.safetensors"), "plain/000000.png is a file, so there can be no folder"),
        (("--save", "/proc/x.safetensors"), "--save /proc/x.safetensors: nothing can be written in /proc"),
        (("--steps", "all"), "--steps: for a model that is sampled first; give --model"),
        (
            ("--steps", "none", "--seed", 0, "--num-inference-steps", 50),
            "--seed, --num-inference-steps, --steps: for a model",
        ),
        (("--relax", "paper", "--cache", "deepcache:2", "--quant", "q"), "--relax, --quant, --cache: for a model"),
        (("--crop", 20), "--crop scales the images of --against; give those, too"),
        (
            ("--prompts", "absent.txt"),
            "--prompts absent.txt: cannot be read (No such file or directory); expected a text",
        ),
    ],
)
def test_options_that_cannot_be_are_refused_before_the_work(
    options: tuple[object, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.safetensors").mkdir()
    before = (tmp_path / "plain" / "000000.png").read_bytes()
    monkeypatch.setattr("iec.evaluate.networks.open_network", lambda *_: pytest.fail("the work has begun"))
    result = evaluate("plain", *options)
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert (tmp_path / "plain" / "000000.png").read_bytes() == before


def test_a_clip_model_without_clip_is_refused() -> None:
    result = evaluate("plain", "--clip-model", "x/y")
    assert result.exit_code == 2 and "--clip-model is for the metric clip; add --prompts FILE" in result.stderr


def test_images_pair_by_the_numbers_in_their_names(images: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "counted").mkdir()
    for number, picture in enumerate(to_pil(images)):
        picture.save(tmp_path / "counted" / f"img{number}.png")
    assert told("counted", "--metrics", "rmse_p", "--target", "p=plain")["metrics"]["rmse_p"]["value"] == 0


def test_the_number_of_pairs_is_told(images: torch.Tensor, tmp_path: Path) -> None:
    np.savez("four.npz", images[:4].numpy())
    np.savez("twelve.npz", images.numpy())
    few = ("twelve.npz", "--target", "p=four.npz", "--target", "q=plain", "--metrics", "rmse_p,ssim_q")
    assert told(*few)["pairs"] == {"p": 4, "q": 12}
    shown = evaluate(*few).stdout
    assert "compared with p: 4 of 12 images" in shown and "compared with q" not in shown


def test_notes_belong_to_the_metrics() -> None:
    def shown(*given: str) -> str:
        return " ".join(evaluate("plain", "--metrics", *given).stdout.split())  # however wide the terminal is

    pairs = shown("rmse_p", "--target", "p=plain")
    assert "12 images of plain." in pairs
    assert "FID" not in pairs and "against" not in pairs and "features of" not in pairs
    score = shown("is")
    assert "features of fashion-mnist@" in score and "FID" not in score and "against" not in score
    distance = shown("kid")
    assert "against fashion-mnist:train." in distance and "FID" not in distance
    assert "FID is biased for few images: compare equal counts only." in shown("fid")


@pytest.mark.parametrize(
    ("count", "had", "out"),
    [(1, ["precision", "is"], ["fid", "kid", "recall"]), (2, ["fid", "kid", "precision", "is"], ["recall"])],
)
def test_of_few_images_what_can_be_had_is_shown(
    count: int, had: list[str], out: list[str], images: torch.Tensor
) -> None:
    np.savez("few.npz", images[:count].numpy())
    found = told("few.npz")
    assert list(found["metrics"]) == had and list(found["left_out"]) == out
    result = evaluate("few.npz", "--baseline", "few.npz")
    assert result.exit_code == 0
    noun = "1 image" if count == 1 else "2 images"
    assert f"{noun} of few.npz;" in result.stdout
    for name in out:
        assert f"Left out: {name} of {noun}: it takes at least {4 if name == 'recall' else 2}" in result.stdout
        named = evaluate("few.npz", "--metrics", name)
        assert named.exit_code == 2 and f"{name} of {noun}: it takes at least" in named.stderr
        assert "give more images" in named.stderr


def test_a_reference_of_too_few_images_is_blamed_itself(images: torch.Tensor) -> None:
    np.savez("one.npz", images[:1].numpy())
    result = evaluate("plain", "--against", "one.npz", "--metrics", "fid")
    assert result.exit_code == 2
    assert "fid: the reference 'one.npz' holds 1 image, expected at least 2; give a reference of more" in result.stderr
    assert list(told("plain", "--against", "one.npz")["left_out"]) == ["fid", "kid", "precision"]


def test_colour_on_a_grey_network_is_told_with_what_to_do(images: torch.Tensor) -> None:
    save_each(images.repeat(1, 3, 1, 1), "colour", range(COUNT))
    result = evaluate("colour")
    assert result.exit_code == 2 and "images are RGB" in result.stderr
    assert "convert them, or use Inception (--network inception)" in result.stderr


def test_statistics_are_those_of_the_images_beside_a_baseline(images: torch.Tensor) -> None:
    save_each(images // 2, "darker", range(COUNT))
    for name, more in (("alone", ()), ("beside", ("--baseline", "darker"))):
        assert evaluate("plain", "--metrics", "is", "--save", f"{name}.safetensors", *more).exit_code == 0
    alone, beside = (Statistics.load(f"{name}.safetensors") for name in ("alone", "beside"))
    assert torch.equal(alone.pool, beside.pool)


def test_files_that_hold_neither_images_nor_statistics(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("")
    against = evaluate("plain", "--against", "t.txt")
    assert against.exit_code == 2 and ".safetensors of `iec evaluate --save`" in against.stderr
    (tmp_path / "t.npz").write_text("text")
    for options in (("t.npz",), ("plain", "--against", "t.npz"), ("plain", "--target", "p=t.npz")):
        result = evaluate(*options)
        assert result.exit_code == 2 and "t.npz: cannot be read: it is no .npz archive" in result.stderr
    Image.new("L", (28, 28)).save("a.png")
    assert told("a.png", "--metrics", "is")["count"] == 1
