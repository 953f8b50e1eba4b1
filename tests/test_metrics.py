"""Distances of feature sets: Fréchet distance, KID and IS, against closed forms and another implementation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg

from iec.evaluate import metrics
from iec.evaluate.metrics import (
    Moments,
    frechet_distance,
    inception_score,
    inception_splits,
    kernel_distance,
    kernel_distance_exact,
)

# Activations, probabilities, and the FID and IS that the evaluator of guided-diffusion (run on CPU) gave for them.
ORACLE = Path(__file__).parent / "data" / "metrics_oracle.npz"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


def test_frechet_distance_agrees_with_the_formula_of_heusel() -> None:
    a, b = draw(90, 12), draw(70, 12, seed=1) * 2 + 0.3
    (m1, s1), (m2, s2) = ((x.mean(0).numpy(), np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    cross = np.trace(linalg.sqrtm(s1 @ s2).real)
    expected = np.square(m1 - m2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_drawn_gaussians_tends_to_that_of_the_gaussians() -> None:
    def distance(count: int) -> float:
        a = draw(count, 4, seed=2)
        b = draw(count, 4, seed=3) * torch.tensor([1.0, 2.0, 0.5, 1.0]) + torch.tensor([1.0, 0, 0, 0])
        return frechet_distance(Moments.of(a), Moments.of(b))

    expected = 1 + 1 + 0.25
    assert distance(100_000) == pytest.approx(expected, abs=0.03)


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
    with pytest.raises(ValueError, match="not finite"):
        inception_score(torch.full((3, 2), math.nan))


def test_inception_score_counts_a_short_last_split_as_a_whole_one() -> None:
    logits = draw(25, 4) * 2
    parts = [inception_score(logits[start : start + 10]).mean for start in (0, 10, 20)]
    found = inception_score(logits, split=10)
    assert found.mean == pytest.approx(np.mean(parts)) and found.std == pytest.approx(np.std(parts))
    assert inception_splits(25, 10) == [(0, 10), (10, 20), (20, 25)]


def test_inception_score_in_a_number_of_splits_as_salimans_does() -> None:
    assert inception_splits(23, splits=4) == [(0, 5), (5, 11), (11, 17), (17, 23)]
    logits = draw(23, 4) * 2
    parts = [inception_score(logits[a:b]).mean for a, b in inception_splits(23, splits=4)]
    assert inception_score(logits, splits=4).mean == pytest.approx(np.mean(parts))
    with pytest.raises(ValueError, match="23 images cannot be cut into 24 splits"):
        inception_score(logits, splits=24)
    with pytest.raises(ValueError, match="a split of at least 1"):
        inception_score(logits, split=0)


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
        kernel_distance(x, y, subset_size=1)
    with pytest.raises(ValueError, match="not finite"):
        kernel_distance(x, torch.full((3, 8), math.nan))


def test_kernel_distance_without_subsets_is_what_many_subsets_tend_to() -> None:
    x, y = draw(40, 3), draw(55, 3, seed=1) + 0.3
    exact = kernel_distance_exact(x, y)
    many = kernel_distance(x, y, subsets=4000, subset_size=20)
    assert exact == pytest.approx(many.mean, abs=4 * many.std / math.sqrt(4000))
    whole = kernel_distance(x, y[:40], subsets=1, subset_size=40)
    assert kernel_distance_exact(x, y[:40]) == pytest.approx(whole.mean, rel=1e-12)
    with pytest.raises(ValueError, match="at least 2 features on each side, found 40 and 1"):
        kernel_distance_exact(x, y[:1])


def test_kernel_distance_in_blocks_is_that_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(40, 3), draw(55, 3, seed=1) + 0.3
    at_once = kernel_distance_exact(x, y)
    monkeypatch.setattr(metrics, "BLOCK", 7 * 55)  # seven rows at a time
    assert kernel_distance_exact(x, y) == pytest.approx(at_once, rel=1e-12)


def test_kernel_distance_is_unbiased_for_equal_distributions() -> None:
    found = np.array([kernel_distance_exact(draw(12, 3, seed=2 * i), draw(12, 3, seed=2 * i + 1)) for i in range(400)])
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean()) < 4 * error
    # What counting each image as a pair with itself would add, (E k(x, x) - E k(x, y)) / N from each side, would be seen.
    assert 2 * ((draw(1000, 3).square().sum(1) / 3 + 1) ** 3).mean() / 12 > 10 * error
