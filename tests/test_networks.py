"""Feature networks: Inception-2015 agrees with torch-fidelity's, weights are read by their published names."""

from __future__ import annotations

import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from iec.evaluate import inception, networks
from iec.evaluate.features import extract, features_folder, load_features
from iec.evaluate.inception import PUBLISHED, Inception, load_inception, published_weights, resize
from iec.evaluate.networks import InceptionExtractor, identity, open_network
from inception import fill, pictures

# What torch-fidelity 0.3.0's module gave for `fill`'s weights and `pictures` (2048, logits_unbiased, and Mixed_6d.branch1x1).
ORACLE = Path(__file__).parent / "data" / "inception_oracle.npz"


def shapes() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return Inception().state_dict()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    held = fill(shapes())
    # The published file is older than these counters.
    torch.save({name: value for name, value in held.items() if not name.endswith("num_batches_tracked")}, file)
    return file


@pytest.fixture(scope="module")
def network(weights: Path) -> networks.FeatureExtractor:
    return open_network(f"inception:{weights}")


def test_inception_agrees_with_torch_fidelity(network: networks.FeatureExtractor) -> None:
    found = network.features(pictures())
    assert found.logits is not None and found.spatial is not None
    with np.load(ORACLE) as oracle:
        for name, value in (("pool", found.pool), ("logits", found.logits), ("spatial", found.spatial)):
            expected = torch.from_numpy(oracle[name])
            assert value.shape == expected.shape and value.dtype == torch.float32
            # The two images differ by far more than the tolerance, so a resize of another kind would fail.
            assert (expected[0] - expected[1]).abs().max() > 0.01
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=2e-4)


def test_inception_has_the_published_names_and_size(weights: Path) -> None:
    held = torch.load(weights, weights_only=True)
    assert len(held) == 94 * 5 + 2
    assert held["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert held["Mixed_6c.branch7x7dbl_4.conv.weight"].shape == (160, 160, 7, 1)
    assert held["Mixed_7a.branch7x7x3_4.bn.running_var"].shape == (192,)
    assert held["fc.weight"].shape == (1008, 2048)
    assert sum(value.numel() for name, value in held.items() if "running" not in name) == 23_850_960


def test_grey_images_count_as_rgb_and_others_are_refused(network: networks.FeatureExtractor) -> None:
    grey = pictures()[:1, :1]
    torch.testing.assert_close(network.features(grey).pool, network.features(grey.repeat(1, 3, 1, 1)).pool)
    with pytest.raises(ValueError, match="found 2 channels"):
        network.features(pictures()[:, :2])
    with pytest.raises(TypeError, match="uint8 images, found"):
        network.features(pictures().float())
    with pytest.raises(ValueError, match="N >= 1"):
        network.features(pictures()[:0])


def test_resize_is_tensorflow_ones() -> None:
    row = torch.tensor([0.0, 10.0])
    # Read at 0, 0.5, 1, 1.5: no half-pixel shift, and beyond the last pixel its value.
    torch.testing.assert_close(resize(row.view(1, 1, 1, 2), 4)[0, 0, 0], torch.tensor([0.0, 5.0, 10.0, 10.0]))
    ramp = torch.arange(6.0).view(1, 1, 6, 1)
    torch.testing.assert_close(resize(ramp, 3)[0, 0, :, 0], torch.tensor([0.0, 2.0, 4.0]))  # shrinks without smoothing
    image = torch.rand(1, 3, 5, 5)
    assert torch.equal(resize(image, 5), image)


def test_weights_are_known_by_their_values_not_their_file(weights: Path, tmp_path: Path, network) -> None:
    counters = {name: torch.tensor(7) for name in shapes() if name.endswith("num_batches_tracked")}
    save_file({**torch.load(weights, weights_only=True), **counters}, tmp_path / "w.safetensors")
    again = load_inception(tmp_path / "w.safetensors")
    assert InceptionExtractor(again).identity == network.identity
    with torch.no_grad():
        again.fc.bias[3] += 1
    assert InceptionExtractor(again).identity != network.identity
    assert identity(network) == f"inception-2015@{network.identity}" and len(network.identity) == 16


def test_weights_that_are_none_are_refused(weights: Path, tmp_path: Path) -> None:
    held = torch.load(weights, weights_only=True)
    with pytest.raises(ValueError, match="no such file"):
        load_inception(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pth"):
        load_inception(tmp_path / "text.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_inception(tmp_path / "cut.safetensors")
    torch.save({"a": Path("no tensor")}, tmp_path / "object.pth")  # a pickle that would run code
    with pytest.raises(ValueError, match=r"object\.pth"):
        load_inception(tmp_path / "object.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no plain table of tensors"):
        load_inception(tmp_path / "list.pth")
    few = {"fc.weight": held["fc.weight"], "other": torch.zeros(1)}
    torch.save(few, tmp_path / "few.pth")
    with pytest.raises(ValueError, match=r"472 entries are missing, unknown.*Conv2d_1a_3x3\.bn\.bias"):
        load_inception(tmp_path / "few.pth")
    small = {name: torch.zeros(1) if name != "fc.weight" else torch.zeros(1000, 2048) for name in held}
    torch.save(small, tmp_path / "small.pth")
    with pytest.raises(ValueError, match="another shape"):
        load_inception(tmp_path / "small.pth")


def test_published_weights_are_looked_for_then_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception.torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"pip install 'iec-diffusion\[fid\]', or give the file: inception:"):
        open_network("inception")

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.URL_INCEPTION_V3 = "somewhere"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def fetch(address: str, target: str, hash_prefix: str, progress: bool) -> None:
        assert (address, hash_prefix) == ("somewhere", "6726825d")
        Path(target).write_text("weights")

    def fail(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(inception.torch.hub, "download_url_to_file", fail)
    with pytest.raises(RuntimeError, match=r"no network; fetch .* elsewhere"):
        published_weights()
    monkeypatch.setattr(inception.torch.hub, "download_url_to_file", fetch)
    assert published_weights().read_text() == "weights"
    monkeypatch.setattr(inception.torch.hub, "download_url_to_file", fail)
    assert published_weights() == tmp_path / "checkpoints" / PUBLISHED[0]  # found, not fetched again


def test_domain_networks_by_name_and_by_folder(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (3, 1, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    bundled = open_network("fashion-mnist")
    found = bundled.features(images, batch_size=3)
    pool, logits = extract(load_features("fashion-mnist"), images)
    assert torch.equal(found.pool, pool) and found.spatial is None
    assert found.logits is not None and torch.equal(found.logits, logits)

    with pytest.raises(
        ValueError, match=r"are RGB, and the feature network fashion-mnist takes grey ones; .*inception"
    ):
        bundled.features(images.repeat(1, 3, 1, 1))

    shutil.copytree(features_folder("fashion-mnist"), tmp_path / "run" / "model")
    own = open_network(str(tmp_path / "run"))  # as `iec train` leaves it
    assert own.name == "run" and own.identity == bundled.identity
    assert open_network(str(tmp_path / "run" / "model")).identity == bundled.identity
    with pytest.raises(ValueError, match="unknown feature network 'vgg'; expected fashion-mnist, inception"):
        open_network("vgg")
    with pytest.raises(ValueError, match="no feature network"):
        open_network(str(tmp_path))
