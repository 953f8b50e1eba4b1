"""Same-seed differences of images: RMSE, PSNR, SSIM against loops and another implementation, LPIPS' contract."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from iec.evaluate import similarity
from iec.evaluate.similarity import fidelity, lpips, mean_squares, psnr, rmse, ssim, ssim_window


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 5, 4), generator=generator).to(torch.uint8)


def test_rmse_and_psnr_of_a_constant_difference() -> None:
    dark, light = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    light[0] = 0.1
    light[1] = 1.0
    torch.testing.assert_close(rmse(dark, light), torch.tensor([0.1, 1.0]).double())
    torch.testing.assert_close(psnr(dark, light), torch.tensor([20.0, 0.0]).double(), atol=1e-6, rtol=0)
    both = fidelity(dark, light)
    assert both.rmse == pytest.approx(0.55)
    assert both.psnr == pytest.approx(-10 * math.log10((0.01 + 1) / 2), abs=1e-6)


def test_uint8_and_floats_are_the_same_images() -> None:
    a, b = pixels(3), pixels(3, seed=1)
    expected = ((a.double() - b.double()) / 255).square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(rmse(a, b), expected)
    torch.testing.assert_close(rmse(a.double() / 255, b), expected)
    torch.testing.assert_close(rmse(a.float() / 255, b), expected, rtol=1e-6, atol=0)


def test_equal_images_have_no_difference_and_do_not_spoil_the_mean() -> None:
    a = pixels(2)
    b = a.clone()
    b[1] = 255 - b[1]
    assert rmse(a, b)[0] == 0 and psnr(a, b)[0] == math.inf
    assert math.isfinite(fidelity(a, b).psnr)
    assert fidelity(a, a) == (0.0, math.inf)


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 3), ValueError, "two equal, non-empty shapes"),
        (torch.zeros(0, 1, 2, 2), torch.zeros(0, 1, 2, 2), ValueError, "two equal, non-empty shapes"),
        (torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), ValueError, r"expected \(N, C, H, W\)"),
        (torch.zeros(1, 1, 2, 2) - 1, torch.zeros(1, 1, 2, 2), ValueError, r"values outside 0\.\.1"),
        (torch.full((1, 1, 2, 2), math.nan), torch.zeros(1, 1, 2, 2), ValueError, "or NaN"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.int64), torch.zeros(1, 1, 2, 2), TypeError, "expected uint8 or floats"),
    ],
)
def test_images_that_are_none_are_refused(
    a: torch.Tensor, b: torch.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        rmse(a, b)


def test_batches_do_not_change_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pixels(7), pixels(7, seed=1)
    at_once = mean_squares(a, b), ssim(a, b)
    monkeypatch.setattr(similarity, "_PIXELS", 2 * a[0].numel())
    assert torch.equal(mean_squares(a, b), at_once[0])
    torch.testing.assert_close(ssim(a, b), at_once[1], rtol=1e-14, atol=1e-15)


def noisy(height: int, width: int, channels: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images, and the same ones with noise, of float64 in 0..1."""
    generator = torch.Generator().manual_seed(1)
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 5, width), indexing="ij")
    clean = torch.stack([torch.stack([torch.sin(x * (i + 1) + y + c) for c in range(channels)]) for i in range(3)])
    clean = (clean.double() + 1) / 2
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    return clean, (clean + torch.tensor([0.02, 0.1, 0.5]).view(3, 1, 1, 1) * noise).clamp(0, 1)


def ssim_by_loops(a: np.ndarray, b: np.ndarray, side: int) -> float:
    """Of one image pair (C, H, W), window by window, as Wang et al. 2004 write it."""
    offset = np.arange(side) - side // 2
    weights = np.exp(-(offset[:, None] ** 2 + offset[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for x, y in zip(a, b, strict=True):
        for i in range(x.shape[0] - side + 1):
            for j in range(x.shape[1] - side + 1):
                p, q = x[i : i + side, j : j + side], y[i : i + side, j : j + side]
                mp, mq = (weights * p).sum(), (weights * q).sum()
                vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
                cov = (weights * (p - mp) * (q - mq)).sum()
                light = (2 * mp * mq + 0.01**2) / (mp**2 + mq**2 + 0.01**2)
                values.append(light * (2 * cov + 0.03**2) / (vp + vq + 0.03**2))
    return float(np.mean(values))


@pytest.mark.parametrize(("size", "side"), [((13, 16), 11), ((11, 11), 11), ((8, 12), 7), ((5, 4), 3), ((1, 6), 1)])
def test_ssim_is_that_of_wang(size: tuple[int, int], side: int) -> None:
    a, b = noisy(*size)
    assert ssim_window(*size) == side
    expected = [ssim_by_loops(x, y, side) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(ssim(a, b).numpy(), expected, rtol=1e-10, atol=1e-12)


def test_ssim_agrees_with_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.image", exc_type=ImportError)
    a, b = noisy(28, 32, channels=3)
    _, values = functional.structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    # It mirrors the images beyond their border, and counts the windows there, which Wang's does not.
    torch.testing.assert_close(ssim(a, b), values[..., 5:-5, 5:-5].mean(dim=(1, 2, 3)), rtol=1e-9, atol=1e-12)


def test_ssim_of_equal_images_is_one_and_falls_with_noise() -> None:
    a, b = noisy(16, 16)
    assert torch.equal(ssim(a, a), torch.ones(3).double())
    values = ssim(a, b).tolist()
    assert 1 > values[0] > values[1] > values[2] > 0
    assert ssim(a, 1 - a).max() < 0
    torch.testing.assert_close(ssim(a, b), ssim(b, a))
    grey = pixels(2, seed=4)
    torch.testing.assert_close(ssim(grey, pixels(2)), ssim(grey.double() / 255, pixels(2).double() / 255))


def test_ssim_refuses_what_is_no_pair_of_images() -> None:
    with pytest.raises(ValueError, match="two equal, non-empty shapes"):
        ssim(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5))
    with pytest.raises(ValueError, match="two equal, non-empty shapes"):
        ssim(torch.zeros(1, 1, 0, 4), torch.zeros(1, 1, 0, 4))
    with pytest.raises(ValueError, match=r"expected \(N, C, H, W\)"):
        ssim(torch.zeros(4, 4), torch.zeros(4, 4))


def test_lpips_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"install iec-diffusion\[lpips\]"):
        lpips(pixels(1), pixels(1))


class Package(types.ModuleType):
    """Stands in for lpips: the distance is the mean absolute difference of what it is given."""

    def __init__(self) -> None:
        super().__init__("lpips")
        self.batches: list[int] = []
        outer = self

        class LPIPS(torch.nn.Module):
            def __init__(self, net: str, verbose: bool) -> None:
                super().__init__()
                print("Loading model from somewhere")

            def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                if x.shape[-1] < 4:
                    raise RuntimeError("Output size is too small\nand more")
                assert x.dtype == y.dtype == torch.float32 and x.shape[1] == 3
                assert not self.training and not torch.is_grad_enabled()
                outer.batches.append(len(x))
                return (x - y).abs().mean(dim=(1, 2, 3), keepdim=True)

        self.LPIPS = LPIPS


def test_lpips_is_given_rgb_between_minus_one_and_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = Package()
    monkeypatch.setitem(sys.modules, "lpips", package)
    a, b = pixels(5), pixels(5, seed=1)
    expected = 2 * (a.double() - b.double()).abs().mean(dim=(1, 2, 3)) / 255
    found = lpips(a, b, batch_size=2)
    assert found.dtype == torch.float64 and package.batches == [2, 2, 1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(lpips(a[:, :1], b[:, :1]), lpips(a[:, [0, 0, 0]], b[:, [0, 0, 0]]))
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="grey or RGB images, found 2 channels"):
        lpips(a[:, :2], b[:, :2])
    with pytest.raises(ValueError, match=r"cannot take images of 5 x 3 pixels \(Output size is too small\)"):
        lpips(a[..., :3], b[..., :3])
    with pytest.raises(ValueError, match="no network 'resnet'; known are alex, vgg and squeeze"):
        lpips(a, b, "resnet")


def test_lpips_without_its_weights_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package()

    def unreachable(**_: Any) -> None:
        raise OSError("name resolution failed")

    monkeypatch.setattr(package, "LPIPS", unreachable)
    monkeypatch.setitem(sys.modules, "lpips", package)
    with pytest.raises(RuntimeError, match=r"'alex' could not be loaded \(name resolution failed\).*TORCH_HOME"):
        lpips(pixels(1), pixels(1))
