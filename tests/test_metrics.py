"""Metrics: same-seed differences, Fréchet distance, KID and IS, against closed forms and another implementation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from iec.evaluate.metrics import Moments, frechet_distance, inception_score, kernel_distance
from iec.evaluate.similarity import fidelity, psnr, rmse

# Activations, probabilities, and the FID and IS that the evaluator of guided-diffusion (run on CPU) gave for them.
ORACLE = Path(__file__).parent / "data" / "metrics_oracle.npz"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


def test_moments_are_mean_and_covariance() -> None:
    features = draw(50, 4) + 3
    moments = Moments.of(features.float())
    assert moments.count == 50 and moments.mean.dtype == torch.float64
    torch.testing.assert_close(moments.mean, features.float().double().mean(0))
    torch.testing.assert_close(moments.covariance(), features.float().double().T.cov())


def test_merged_moments_are_those_of_the_whole() -> None:
    features = draw(101, 5) * 3 + 1e6  # a raw second moment would lose ten digits here
    whole = Moments.of(features)
    merged = Moments.of(features[:1])
    for part in (features[1:40], features[40:41], features[41:]):
        merged = merged.merge(Moments.of(part))
    assert merged.count == whole.count
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.scatter, whole.scatter, rtol=1e-9, atol=1e-6)
    assert frechet_distance(merged, whole) < 1e-6


def test_moments_refuse_what_is_no_set_of_features() -> None:
    with pytest.raises(ValueError, match=r"expected \(N, F\)"):
        Moments.of(torch.zeros(3))
    with pytest.raises(ValueError, match="not finite"):
        Moments.of(torch.full((3, 2), math.inf))
    with pytest.raises(ValueError, match="at least 2"):
        Moments.of(torch.zeros(1, 2)).covariance()
    with pytest.raises(ValueError, match="2 and 3 dimensions cannot be merged"):
        Moments.of(torch.zeros(2, 2)).merge(Moments.of(torch.zeros(2, 3)))
    with pytest.raises(ValueError, match="2 and 3 dimensions cannot be compared"):
        frechet_distance(Moments.of(torch.zeros(2, 2)), Moments.of(torch.zeros(2, 3)))


def gaussian(mean: torch.Tensor, covariance: torch.Tensor) -> Moments:
    return Moments(11, mean.double(), covariance.double() * 10)


def test_frechet_distance_of_known_gaussians() -> None:
    zero, eye = torch.zeros(3), torch.eye(3)
    # Commuting covariances: |m1 - m2|² + Σ (σ1 - σ2)².
    scaled = gaussian(torch.tensor([1.0, 2.0, 2.0]), torch.diag(torch.tensor([4.0, 9.0, 1.0])))
    assert frechet_distance(gaussian(zero, eye), scaled) == pytest.approx(9 + 1 + 4 + 0)
    # In two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), here for covariances that do not commute.
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    b = torch.tensor([[1.0, -0.7], [-0.7, 3.0]])
    product = a @ b
    cross = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = float(a.trace() + b.trace()) - 2 * cross
    first, second = gaussian(torch.zeros(2), a), gaussian(torch.zeros(2), b)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_singular_covariances() -> None:
    a, b = draw(5, 20), draw(6, 20, seed=1)  # fewer vectors than dimensions
    distance = frechet_distance(Moments.of(a), Moments.of(b))
    assert distance > 0
    assert frechet_distance(Moments.of(a), Moments.of(a)) == pytest.approx(0, abs=1e-6)
    turned = torch.linalg.qr(draw(20, 20, seed=2)).Q
    assert frechet_distance(Moments.of(a @ turned), Moments.of(b @ turned)) == pytest.approx(distance, rel=1e-6)


@pytest.mark.parametrize("case", [0, 1, 2])
def test_frechet_distance_agrees_with_guided_diffusion(case: int) -> None:
    with np.load(ORACLE) as oracle:
        a, b = (Moments.of(torch.from_numpy(oracle[f"acts_{side}{case}"])) for side in "ab")
        assert frechet_distance(a, b) == pytest.approx(float(oracle[f"fid{case}"]), rel=1e-6)


@pytest.mark.parametrize("split", [5000, 400])
def test_inception_score_agrees_with_guided_diffusion(split: int) -> None:
    with np.load(ORACLE) as oracle:
        logits = torch.from_numpy(oracle["is_probs"]).double().log()
        expected = float(oracle[f"is_split{split}"])
    assert inception_score(logits, split=split).mean == pytest.approx(expected, rel=1e-6)


def test_inception_score_lies_between_one_and_the_number_of_classes() -> None:
    sure = torch.eye(10).repeat(5, 1) * 100
    assert inception_score(sure).mean == pytest.approx(10)
    assert inception_score(torch.zeros(30, 10)).mean == pytest.approx(1)
    assert inception_score(sure[:1].repeat(9, 1)).mean == pytest.approx(1)
    with pytest.raises(ValueError, match=r"expected \(N, classes\)"):
        inception_score(torch.zeros(0, 10))


def test_kernel_distance_is_the_unbiased_mmd() -> None:
    x, y = draw(7, 3), draw(7, 3, seed=1) + 0.5

    def k(u: torch.Tensor, v: torch.Tensor) -> float:
        return float((u @ v / 3 + 1) ** 3)

    n = range(7)
    expected = sum(k(x[i], x[j]) + k(y[i], y[j]) for i in n for j in n if i != j) / 42
    expected -= 2 * sum(k(x[i], y[j]) for i in n for j in n) / 49
    found = kernel_distance(x, y, subsets=3)
    assert found.mean == pytest.approx(expected)
    assert found.std == pytest.approx(0, abs=1e-12)  # each subset is the whole set


def test_kernel_distance_is_near_zero_for_equal_distributions_and_repeatable() -> None:
    x, y = draw(400, 8), draw(300, 8, seed=1)
    same = kernel_distance(x, y, subset_size=100)
    assert abs(same.mean) < 0.05 and same.std > 0
    assert kernel_distance(x, y, subset_size=100) == same
    assert kernel_distance(x, y, subset_size=100, seed=1) != same
    assert kernel_distance(x, y + 1, subset_size=100).mean > 1
    with pytest.raises(ValueError, match=r"expected \(N, F\) and \(M, F\)"):
        kernel_distance(x, y[:, :3])
    with pytest.raises(ValueError, match="at least one subset of 2"):
        kernel_distance(x[:1], y)
