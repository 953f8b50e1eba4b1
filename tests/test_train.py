"""Training: resumption bit for bit, the order of batches, recipes, the average, the two tasks."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from iec.evaluate.features import extract, load_features
from iec.evaluate.reference import load_reference
from iec.train.data import load_images
from iec.train.loop import _update_average, augment, batch_indices, train
from iec.train.recipe import TrainRecipe, load_recipe
from iec.train.start import make_task, run
from synthetic import TINY_DENOISER, TINY_FEATURES, write_dataset, write_idx


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def recipe_of(folder: Path, text: str, **changes: Any) -> TrainRecipe:
    file = folder / "recipe.toml"
    file.write_text(text)
    return dataclasses.replace(load_recipe(file), **changes)


def quiet(_: str) -> None:
    pass


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint.safetensors")


@pytest.mark.parametrize("text", [TINY_FEATURES, TINY_DENOISER], ids=["features", "denoiser"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(text: str, data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, text)
    images = load_images("fashion-mnist", "train", data)
    stop, end = recipe.steps // 2, recipe.steps - 1  # before the end, where samples would be drawn

    train(recipe, make_task(recipe, data), images, tmp_path / "whole", log=quiet, stop_after=end)
    train(recipe, make_task(recipe, data), images, tmp_path / "parts", log=quiet, stop_after=stop)
    said: list[str] = []
    train(recipe, make_task(recipe, data), images, tmp_path / "parts", log=said.append, stop_after=end)

    assert said == [f"resumed {recipe.name} at step {stop} of {recipe.steps}"]
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


class Kill(BaseException):
    """Stands for a signal: not an Exception that anything could catch by accident."""


def test_a_killed_run_resumes_from_its_last_checkpoint(data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, TINY_FEATURES)
    images = load_images("fashion-mnist", "train", data)

    def die(step: int, _: int, __: float) -> None:
        if step == 6:
            raise Kill

    with pytest.raises(Kill):
        train(recipe, make_task(recipe, data), images, tmp_path / "killed", log=quiet, progress=die)
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["checkpoint.safetensors"]
    seen: list[int] = []
    train(
        recipe,
        make_task(recipe, data),
        images,
        tmp_path / "killed",
        log=quiet,
        progress=lambda step, _, __: seen.append(step),
    )
    assert seen == [5, 6, 7, 8]
    train(recipe, make_task(recipe, data), images, tmp_path / "whole", log=quiet)
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


def test_a_finished_run_can_be_prolonged_but_not_become_another(data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, TINY_FEATURES)
    run(recipe, data=data, out=tmp_path / "run", device="cpu", log=quiet)
    seen: list[int] = []
    longer = dataclasses.replace(recipe, steps=10)
    run(
        longer,
        data=data,
        out=tmp_path / "run",
        device="cpu",
        log=quiet,
        progress=lambda step, _, __: seen.append(step),
    )
    assert seen == [9, 10]
    other = dataclasses.replace(recipe, learning_rate=1e-3)
    with pytest.raises(ValueError, match="belongs to another run"):
        run(other, data=data, out=tmp_path / "run", device="cpu", log=quiet)


def test_a_truncated_checkpoint_is_refused(data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, TINY_FEATURES)
    images = load_images("fashion-mnist", "train", data)
    train(recipe, make_task(recipe, data), images, tmp_path / "run", log=quiet, stop_after=2)
    file = tmp_path / "run" / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or damaged checkpoint"):
        train(recipe, make_task(recipe, data), images, tmp_path / "run", log=quiet)


def test_a_loss_that_is_not_finite_ends_the_run(data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, TINY_FEATURES)
    task = make_task(recipe, data)
    with torch.no_grad():
        next(task.model.parameters()).fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the loss is nan at step 0; lower the learning rate"):
        train(recipe, task, load_images("fashion-mnist", "train", data), tmp_path / "run", log=quiet)


@pytest.mark.parametrize(("count", "size"), [(10, 5), (10, 3), (7, 7), (5, 12)])
def test_batches_cover_each_epoch_exactly_once(count: int, size: int) -> None:
    steps = 3 * count // size + 1
    stream = torch.cat([batch_indices(count, size, step, seed=3) for step in range(steps)]).tolist()
    assert len(stream) == steps * size
    epochs = [stream[start : start + count] for start in range(0, len(stream) - count + 1, count)]
    assert len(epochs) >= 2
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert any(a != b for a, b in itertools.pairwise(epochs))


def test_batches_depend_on_the_seed() -> None:
    assert not torch.equal(batch_indices(100, 10, 0, seed=0), batch_indices(100, 10, 0, seed=1))


def test_augmentation_mirrors_and_translates() -> None:
    recipe = TrainRecipe(name="x", kind="features", data="x", model={}, flip=True, shift=2)
    pixels = torch.full((64, 1, 8, 8), -1.0)
    pixels[:, :, 3, 4] = 1.0
    moved = augment(pixels, recipe, torch.Generator().manual_seed(0))
    assert moved.shape == pixels.shape
    rows, columns = (moved[:, 0] == 1).nonzero()[:, 1:].T
    assert len(rows) == 64  # each image keeps its one bright pixel
    assert set(rows.tolist()) == {1, 2, 3, 4, 5}
    assert set(columns.tolist()) == {1, 2, 3, 4, 5, 6}  # columns 4 and, mirrored, 3, each moved by up to 2
    plain = TrainRecipe(name="x", kind="features", data="x", model={})
    assert augment(pixels, plain, torch.Generator()) is pixels


def test_the_average_follows_the_parameters_and_takes_over_the_statistics() -> None:
    model, average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([3.0, 5.0]))
        model.running_mean.fill_(7.0)
    _update_average(average, model, decay=0.75)
    torch.testing.assert_close(average.weight.detach(), torch.tensor([1.5, 2.0]))
    assert average.running_mean.tolist() == [7.0, 7.0]


def test_the_learning_rate_rises_stays_and_falls_to_zero() -> None:
    recipe = TrainRecipe(
        name="x", kind="features", data="x", model={}, steps=100, warmup=10, decay=0.5, learning_rate=1.0
    )
    rates = [recipe.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:51] == [1.0] * 42
    assert rates[75] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.02)


def test_features_learn_and_are_exported(data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path, TINY_FEATURES, steps=120, sample_every=120, shift=0, dropout=0.0, learning_rate=0.02, ema=0.9
    )
    said: list[str] = []
    folder = run(recipe, data=data, out=tmp_path / "run", device="cpu", log=said.append)
    network = load_features(folder)
    test = load_images("fashion-mnist", "test", data)
    features, logits = extract(network, test.pixels)
    assert features.shape == (50, 6)
    accuracy = (logits.argmax(1) == test.labels).double().mean().item()
    assert accuracy > 0.5  # 0.1 by chance
    assert said == [f"step 120: test accuracy {100 * accuracy:.2f} %"]
    assert load_reference(folder, "test").moments.count == load_reference(folder, "train").moments.count == 50
    assert "trouser" in (folder / "config.json").read_text()


def test_the_exported_denoiser_is_a_diffusers_pipeline(data: Path, tmp_path: Path) -> None:
    from diffusers import DDIMPipeline

    folder = run(recipe_of(tmp_path, TINY_DENOISER), data=data, out=tmp_path / "run", device="cpu", log=quiet)
    assert (tmp_path / "run" / "samples-000004.png").is_file()
    pipe = DDIMPipeline.from_pretrained(folder, use_safetensors=True)
    average = {k.removeprefix("average."): v for k, v in weights(tmp_path / "run").items() if k.startswith("average.")}
    assert all(torch.equal(value, average[key]) for key, value in pipe.unet.state_dict().items())


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "fashion-mnist-features"])
def test_bundled_recipes_load_and_build(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert 2e5 < sum(p.numel() for p in make_task(recipe).model.parameters()) < 8e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('kind = "features"', 'kind = "gan"'), "kind is 'gan', expected 'denoiser' or 'features'"),
        (("steps = 8", "steps = 0"), "steps is 0, expected at least 1"),
        (("steps = 8", 'steps = "many"'), "steps is 'many', expected int"),
        (("flip = true", "flip = 1"), "flip is 1, expected bool"),
        (("warmup = 2", "warmup = true"), "warmup is True, expected int"),
        (("steps = 8", "ema = 1.5"), r"ema is 1.5, expected 0..1"),
        (("steps = 8", "stepps = 8"), r"unknown keys \['stepps'\]; known: name"),
        (('name = "tiny-features"', ""), r"missing keys \['name'\]"),
        (("steps = 8", "steps = = 8"), "not valid TOML"),
    ],
)
def test_recipe_errors_say_what_was_found(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(TINY_FEATURES.replace(*change))
    with pytest.raises(ValueError, match=message):
        load_recipe(file)


def test_unknown_recipes_name_the_bundled_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown training recipe 'nothing'; bundled: cifar10, fashion-mnist, "):
        load_recipe("nothing")
    with pytest.raises(ValueError, match="not found"):
        load_recipe(tmp_path / "absent.toml")


def test_a_model_table_with_unknown_keys_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, TINY_FEATURES.replace("features = 6", "feature = 6"))
    with pytest.raises(ValueError, match=r"table \[model\]: .*'feature'"):
        make_task(recipe)


def test_datasets_that_are_nowhere_say_where_was_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no train-images-idx3-ubyte\.gz in .*, or point --data"):
        load_images("fashion-mnist", "train", tmp_path)
    with pytest.raises(ValueError, match="unknown dataset 'imagenet'; known: fashion-mnist, cifar10"):
        load_images("imagenet")
    write_dataset(tmp_path / "fashion-mnist", 10)
    monkeypatch.setenv("IEC_DATA", str(tmp_path))
    images = load_images("fashion-mnist", "test")
    assert images.pixels.shape == (10, 1, 28, 28) and images.pixels.dtype == torch.uint8
    assert images.labels.tolist() == list(range(10))


def test_a_truncated_dataset_is_refused(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, 10)
    write_idx(folder / "train-labels-idx1-ubyte.gz", np.zeros((3, 0), np.uint8))
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-5]))
    with pytest.raises(ValueError, match="not an idx file of unsigned bytes, or a truncated one"):
        load_images("fashion-mnist", "train", folder)


def test_a_device_that_is_not_there_is_refused() -> None:
    from iec.evaluate.machine import choose_device

    assert choose_device("cpu") == "cpu"
    assert choose_device() in ("cpu", "cuda")
    with pytest.raises(ValueError, match=r"device 'cuda:99' cannot be used: .*; try --device cpu"):
        choose_device("cuda:99")
