"""Images by seeds and their cost; the feature network and its statistics; pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import iec
from iec.evaluate import reference as references
from iec.evaluate.features import FeatureConfig, FeatureNetwork, extract, features_folder, load_features, save_features
from iec.evaluate.images import grid, save_each, save_grid, to_pil
from iec.evaluate.metrics import Moments, frechet_distance, inception_score
from iec.evaluate.reference import domain_metrics, load_reference, save_reference
from iec.evaluate.sampling import measure, sample, with_scheduler
from tiny import CASES, PIXELS

CONDITIONS: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "ddim": {},
    "ldm": {},
    "dit": {"class_labels": 3},
    "sd": {"prompt": "a cat", "height": PIXELS, "width": PIXELS},
    "sdxl": {"prompt": "a cat", "height": PIXELS, "width": PIXELS},
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_an_image_depends_on_its_seed_alone(name: str) -> None:
    pipe, conditions = CASES[name].build(), CONDITIONS[name]
    done: list[tuple[int, int]] = []
    images = sample(pipe, [5, 6, 7], 3, batch_size=2, progress=lambda *step: done.append(step), **conditions)
    assert images.dtype == torch.uint8 and images.shape[:2] == (3, 3) and images.is_contiguous()
    assert done == [(2, 3), (3, 3)]
    alone = sample(pipe, [7], 3, **conditions)
    # Kernels round differently with the size of a batch: at most one level of 255.
    assert (alone[0].int() - images[2].int()).abs().max() <= 1
    assert not torch.equal(images[0], images[1])


def test_samples_are_the_pipelines_own_rounded() -> None:
    pipe = CASES["ddim"].build()
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    own = pipe(batch_size=2, generator=generators, num_inference_steps=3, output_type="np").images
    expected = (torch.as_tensor(own) * 255 + 0.5).clamp(0, 255).to(torch.uint8).permute(0, 3, 1, 2)
    assert torch.equal(sample(pipe, range(5, 7), 3), expected)


def test_conditions_are_one_value_or_one_per_image() -> None:
    pipe = CASES["dit"].build()
    same = sample(pipe, [1, 2, 3], 2, batch_size=2, class_labels=4)
    assert torch.equal(sample(pipe, [1, 2, 3], 2, batch_size=2, class_labels=[4, 4, 4]), same)
    mixed = sample(pipe, [1, 2, 3], 2, batch_size=2, class_labels=[4, 4, 9])
    assert torch.equal(mixed[:2], same[:2]) and not torch.equal(mixed[2], same[2])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ddim", {"seeds": []}, "0 seeds in batches of 16 with 2 steps"),
        ("ddim", {"batch_size": 0}, "batches of 0"),
        ("ddim", {"num_inference_steps": 0}, "with 0 steps"),
        ("ddim", {"prompt": "a cat"}, "DDIMPipeline takes no prompt; it takes eta, "),
        ("ddim", {"output_type": "pil"}, "output_type: set by IEC"),
        ("dit", {}, "DiTPipeline needs class_labels="),
        ("sd", {}, "StableDiffusionPipeline needs prompt="),
        ("dit", {"class_labels": [1, 2, 3]}, "class_labels has 3 entries for 2 seeds"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(CASES[name].build(), **{"seeds": [0, 1], "num_inference_steps": 2, **arguments})


def test_images_that_are_not_finite_are_an_error() -> None:
    pipe = CASES["ddim"].build(fresh=True)
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"the images of seeds \[3, 4\] hold NaN"):
        sample(pipe, [3, 4], 2)


def test_cost_counts_the_forwards_of_the_denoiser() -> None:
    pipe = CASES["sd"].build()
    with measure(pipe) as cost:
        sample(pipe, [0, 1, 2], 3, batch_size=2, **CONDITIONS["sd"])
    assert cost.evaluations == 2 * 3
    assert cost.seconds > 0
    sample(pipe, [0], 2, **CONDITIONS["sd"])
    assert cost.evaluations == 6  # nothing is left on the pipeline


def test_cost_counts_corrections_but_not_what_convergence_spares() -> None:
    pipe = CASES["ddim"].build()
    with iec.enable(pipe, steps="all", relax=(0.5, 0.5)), measure(pipe) as every:
        sample(pipe, [0, 1, 2], 4, batch_size=2)
    assert every.evaluations == 2 * 4 * 3
    with iec.enable(pipe, steps="all", relax=(0.5, 0.5), tol=1e9), measure(pipe) as spared:
        sample(pipe, [0, 1, 2], 4, batch_size=2)
        assert iec.summary(pipe).spared == 4
    assert spared.evaluations == 2 * 4 * 2


def test_cost_stands_after_an_error_and_refuses_other_denoisers() -> None:
    pipe = CASES["ddim"].build()
    with pytest.raises(KeyError), measure(pipe) as cost:
        raise KeyError
    assert cost.seconds > 0 and not pipe.unet._forward_hooks
    pipe.unet = None
    with pytest.raises(TypeError, match="no component named unet"), measure(pipe):
        pass


def test_the_scheduler_is_replaced_by_name() -> None:
    pipe = CASES["ddim"].build()
    other = with_scheduler(pipe, "DPMSolverMultistepScheduler", solver_order=3)
    assert type(other.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert other.scheduler.config.solver_order == 3 and torch.equal(other.scheduler.betas, pipe.scheduler.betas)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler" and other.unet is pipe.unet
    assert sample(other, [0, 1], 3).shape == (2, 3, 8, 8)
    for name in ("NoSuchScheduler", "UNet2DModel"):
        with pytest.raises(ValueError, match=f"diffusers has no scheduler '{name}'; .* DDIMScheduler"):
            with_scheduler(pipe, name)


@pytest.fixture
def network() -> FeatureNetwork:
    torch.manual_seed(0)
    return FeatureNetwork(FeatureConfig(in_channels=3, channels=(4, 8), features=5, classes=10, dropout=0.5))


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 12, 12), generator=generator).to(torch.uint8)


def test_features_of_uint8_and_of_floats_in_any_batches(network: FeatureNetwork) -> None:
    images = pixels(7)
    features, logits = extract(network, images, batch_size=3)
    assert features.shape == (7, 5) and logits.shape == (7, 10) and features.dtype == torch.float32
    assert network.training  # as it was
    torch.testing.assert_close(extract(network, images.float() / 255)[0], features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.eval().logits(images), logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        network(images[:, :1])
    with pytest.raises(ValueError, match="no images"):
        extract(network, images[:0])


def test_feature_networks_are_saved_and_loaded(network: FeatureNetwork, tmp_path: Path) -> None:
    save_features(network, tmp_path, ("a", "b"))
    loaded = load_features(tmp_path)
    assert loaded.config == network.config and not loaded.training
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in loaded.state_dict().items())


def broken(folder: Path, what: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    if what == "missing":
        (folder / "model.safetensors").unlink()
    elif what == "truncated":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    elif what == "json":
        (folder / "config.json").write_text("{")
    else:
        changes = {
            "version": {"version": 99},
            "kind": {"format": "other"},
            "shape": {"features": 6},
            "size": {"classes": 0},
        }
        (folder / "config.json").write_text(json.dumps({**config, **changes[what]}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "no feature network, model.safetensors is missing"),
        ("truncated", "damaged feature network"),
        ("json", "damaged feature network"),
        ("version", "feature network of version 99, this release reads 1"),
        ("kind", "config.json is not that of an IEC feature network"),
        ("shape", r"the weights do not fit config\.json"),
        ("size", "every size must be at least 1"),
    ],
)
def test_broken_feature_networks_are_refused(network: FeatureNetwork, what: str, message: str, tmp_path: Path) -> None:
    save_features(network, tmp_path)
    broken(tmp_path, what)
    with pytest.raises(ValueError, match=message):
        load_features(tmp_path)


def test_unknown_feature_networks_name_the_bundled_ones() -> None:
    with pytest.raises(ValueError, match="no bundled feature network for 'imagenet'; bundled: "):
        load_features("imagenet")


def test_statistics_of_real_images(network: FeatureNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "KEPT", 30)
    real, test = pixels(60), pixels(40, seed=1)
    save_features(network, tmp_path)
    save_reference(tmp_path, network, real, test)
    loaded = load_reference(tmp_path, "test")
    features, _ = extract(network, test)
    assert loaded.moments.count == 40 and loaded.features.shape == (30, 5)
    torch.testing.assert_close(loaded.moments.scatter, Moments.of(features).scatter)
    torch.testing.assert_close(loaded.features, features[:30], rtol=1e-3, atol=1e-3)

    metrics = domain_metrics(real, str(tmp_path), "train")
    assert metrics.count == 60 and metrics.fid < 1e-6 and 1 <= metrics.inception_score <= 10
    assert domain_metrics(real // 4, str(tmp_path), "train").fid > 10 * domain_metrics(test, str(tmp_path), "train").fid
    with pytest.raises(ValueError, match="at least 2 images, found 1"):
        domain_metrics(real[:1], str(tmp_path))
    with pytest.raises(ValueError, match="split is 'all'"):
        load_reference(tmp_path, "all")  # pyright: ignore[reportArgumentType]


def test_statistics_of_another_network_are_refused(network: FeatureNetwork, tmp_path: Path) -> None:
    save_features(network, tmp_path)
    with pytest.raises(ValueError, match=r"no reference\.safetensors"):
        load_reference(tmp_path)
    save_reference(tmp_path, network, pixels(10), pixels(10))
    with torch.no_grad():
        network.embed.bias.add_(1)
    save_features(network, tmp_path)
    with pytest.raises(ValueError, match="made with another feature network"):
        load_reference(tmp_path)
    file = tmp_path / references.FILE
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged statistics"):
        load_reference(tmp_path)


def test_pictures_of_images(tmp_path: Path) -> None:
    images = pixels(5)
    save_grid(images, tmp_path / "deep" / "grid.png")
    with Image.open(tmp_path / "deep" / "grid.png") as picture:
        assert picture.size == (3 * 74 + 2, 2 * 74 + 2)  # 12 pixels enlarged six times, gaps of 2
    save_grid(images, tmp_path / "row.png", columns=99)
    with Image.open(tmp_path / "row.png") as picture:
        assert picture.size == (5 * 74 + 2, 76)
    save_each(images[:2], tmp_path / "each", [7, 8])
    assert sorted(p.name for p in (tmp_path / "each").iterdir()) == ["000007.png", "000008.png"]
    with Image.open(tmp_path / "each" / "000008.png") as picture:
        assert picture.getpixel((3, 4)) == tuple(images[1, :, 4, 3].tolist())
    assert to_pil(images[:1, :1])[0].mode == "L"
    with pytest.raises(ValueError, match="expected uint8"):
        to_pil(images.float())
    with pytest.raises(ValueError, match="images of one size"):
        grid([Image.new("L", (1, 1)), Image.new("L", (2, 2))], columns=2)
    with pytest.raises(ValueError, match="no images"):
        grid([], columns=2)


def test_the_bundled_feature_network() -> None:
    """What its README says of real images; the images themselves are not needed."""
    network = load_features("fashion-mnist")
    assert sum(file.stat().st_size for file in features_folder("fashion-mnist").iterdir()) < 1.5 * 2**20
    train, test = load_reference("fashion-mnist", "train"), load_reference("fashion-mnist", "test")
    assert (train.moments.count, test.moments.count) == (60_000, 10_000)
    assert frechet_distance(train.moments, test.moments) == pytest.approx(0.0444, abs=2e-3)
    assert test.features.shape == (2048, 64)
    # The logits of the test images whose features are bundled: classes in near equal shares, most of them certain.
    with torch.no_grad():
        logits = network.head(test.features)
    assert 8 < inception_score(logits).mean < 10
    noise = torch.randint(0, 256, (64, 1, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    metrics = domain_metrics(noise, "fashion-mnist")
    assert metrics.network == "fashion-mnist" and metrics.fid > 100 and metrics.kid > 1
