"""Intervals: centred, paired, as wide as theory says; the fast resampled metrics equal the slow ones row by row."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from iec.evaluate import bootstrap, intervals, metrics
from iec.evaluate.bootstrap import (
    FEWEST,
    Interval,
    Resampled,
    Scheme,
    difference,
    halves,
    interval,
    of_mean,
    of_rows,
    resamples,
)
from iec.evaluate.coverage import covered, radii, recall
from iec.evaluate.influence import frechet_influence, kernel_influence
from iec.evaluate.metrics import Moments, frechet_distance, inception_score, kernel_distance_exact, kernel_means


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_resamples_are_the_same_for_every_arm() -> None:
    first, second = list(resamples(30, 5, seed=2)), list(resamples(30, 8, seed=2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=False))  # more draws begin with the same
    assert all(rows.shape == (30,) and rows.dtype == np.int64 and 0 <= rows.min() <= rows.max() < 30 for rows in first)
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(second, 2))
    assert not np.array_equal(first[0], next(resamples(30, 1, seed=3)))
    counts = bootstrap.weights(30, 5, seed=2)
    assert (counts.sum(1) == 30).all() and counts[1, 4] == (first[1] == 4).sum()


def test_halves_hold_different_rows() -> None:
    for rows in halves(31, 5):
        assert len(rows) == len(set(rows.tolist())) == 15 and (np.diff(rows) > 0).all() and rows.max() < 31
    assert np.array_equal(next(halves(31, 1, seed=4)), next(halves(31, 3, seed=4)))


@pytest.mark.parametrize("arguments", [(0, 5, 0), (5, 0, 0), (5, 5, -1)])
def test_resamples_of_nothing_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected at least 1 rows, 1 draw and a seed >= 0"):
        resamples(*arguments)


def test_an_interval_is_centred() -> None:
    draws = np.linspace(110, 130, 201)  # as a Fréchet distance of 100 that grows by 20
    assert interval(100, draws, level=0.9) == pytest.approx((100, 91, 109))
    assert interval(100, draws).holds(100) and not interval(100, draws).holds(110)


def test_infinite_draws_have_plain_quantiles() -> None:
    inf = math.inf
    assert interval(inf, np.full(20, inf)) == (inf, inf, inf)
    found = interval(30.0, np.array([*np.linspace(20, 40, 95), *[inf] * 5]))
    assert found.value == 30 and 20 < found.low < 22 and found.high == inf


@pytest.mark.parametrize(
    ("value", "draws", "level", "message"),
    [
        (1.0, np.ones(1), 0.95, "at least 2 resampled values"),
        (1.0, np.array([1.0, math.nan]), 0.95, "1 are NaN"),
        (math.nan, np.ones(3), 0.95, "an interval about nan"),
        (1.0, np.ones(3), 95, "expected 0 < level < 1"),
    ],
)
def test_what_gives_no_interval_is_refused(value: float, draws: np.ndarray, level: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interval(value, draws, level)


def test_the_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    values = draw(400).double()
    found = of_mean(values, 2000, 0).interval()
    expected = 1.96 * values.std(correction=0).item() / 20
    assert found.value == pytest.approx(values.mean().item())
    assert found.high - found.value == pytest.approx(expected, rel=0.1)
    assert found.value - found.low == pytest.approx(expected, rel=0.1)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    held = [of_mean(draw(40, seed=s).double(), 80, 0).interval().holds(0) for s in range(300)]
    assert 0.88 < np.mean(held) < 0.99  # 0.95 less what 40 values and 80 draws cost


def test_halves_spread_as_far_as_resamples() -> None:
    values = draw(200).double().numpy()
    half = np.array([values[rows].mean() for rows in halves(200, 2000)])
    assert half.std() == pytest.approx(values.std() / math.sqrt(200), rel=0.1)


def test_a_paired_difference_leaves_out_what_the_arms_share() -> None:
    shared = draw(300).double() * 3
    a, b = shared + 0.1 * draw(300, seed=1), shared + 0.1 * draw(300, seed=2) + 0.1
    of_a, of_b = (of_mean(x, 400, 0) for x in (a, b))
    one, other, between = of_a.interval(), of_b.interval(), difference(of_a, of_b)
    assert one.low < other.value < one.high  # the arms' own intervals cannot tell them apart
    assert not between.holds(0) and between.value == pytest.approx((a - b).mean().item())
    direct = of_mean(a - b, 400, 0).interval()
    assert between == pytest.approx(direct)
    assert difference(of_b, of_a).value == -between.value


def test_a_difference_needs_the_same_resamples() -> None:
    a = of_mean(torch.rand(20), 10, 0)
    for other in (of_mean(torch.rand(21), 10, 0), of_mean(torch.rand(20), 11, 0), of_mean(torch.rand(20), 10, 1)):
        with pytest.raises(ValueError, match="a difference needs the same resamples on both sides"):
            a.minus(other)
    with pytest.raises(ValueError, match=r"kind='bootstrap'.*kind='halves'"):
        a.minus(Resampled(1.0, np.ones(10), Scheme("halves", 20, 0)))


def test_equal_images_do_not_differ_in_psnr() -> None:
    none, some = torch.zeros(8).double(), torch.tensor([0.1, *[0] * 7]).double()
    equal, near = intervals.psnr_of(none, 200, 0), intervals.psnr_of(some, 200, 0)
    assert equal.interval() == (math.inf,) * 3
    assert difference(equal, equal) == (0, 0, 0)
    assert near.interval().value == pytest.approx(-10 * math.log10(0.1 / 8))
    assert near.interval().high == math.inf  # a third of the resamples lack the only image that differs
    assert difference(equal, near).value == math.inf


@pytest.mark.parametrize("count", [1, 2, FEWEST - 1, FEWEST])
def test_few_images_have_no_interval_and_tell_no_difference(count: int) -> None:
    values = torch.arange(1, count + 1).double()
    one, other = of_mean(values, 200, 0), of_mean(values + 1, 200, 0)
    lacks = count < FEWEST
    assert math.isnan(one.interval().low) == math.isnan(one.interval().high) == lacks
    assert difference(other, one).value == pytest.approx(1) and difference(other, one).holds(0) == lacks


def test_intervals_stay_within_bounds() -> None:
    hits = torch.ones(12).double()
    all_hit = of_mean(hits, 200, 0, bounds=(0, 1)).interval()
    assert all_hit.value == 1 and math.isnan(all_hit.low), "that all of 12 are inside does not say that all ever are"
    hits[0] = 0
    free = of_mean(hits, 200, 0, bounds=(0, 1)).interval()
    assert 0 < free.low < 0.85 and 0.95 < free.high <= 1
    assert of_mean(hits, 200, 0, bounds=(0.85, 0.95)).interval() == (free.value, 0.85, 0.95)
    recalled = intervals.recall_of(torch.randn(16, 4), torch.randn(16, 4) + 1.5, k=3).interval()
    assert 0 <= recalled.low <= recalled.high <= 1
    close_by = intervals.rmse_of(torch.tensor([1e-6] * 9 + [1.0]), 200, 0).interval()
    assert 0 <= close_by.low < close_by.value


def test_values_that_are_no_numbers_are_refused() -> None:
    for values in (torch.tensor([1.0, math.nan]), torch.zeros(0), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match=r"expected \(N,\), N >= 1, all finite"):
            of_mean(values, 5, 0)


def close(found: Resampled, expected: Resampled, rel: float = 1e-9) -> None:
    assert found.scheme == expected.scheme and found.value == pytest.approx(expected.value, rel=rel)
    np.testing.assert_allclose(found.draws, expected.draws, rtol=rel)
    assert found.draws.std() > 0


# More images than features, fewer, and so few that their covariance, or that of the reference, is singular.
SHAPES = [(90, 6, 70), (20, 30, 70), (90, 40, 15), (7, 20, 9)]


@pytest.mark.parametrize(("count", "width", "real"), SHAPES)
def test_fid_of_resamples_is_that_of_the_resampled_rows(count: int, width: int, real: int) -> None:
    features = draw(count, width) * 2 + 50
    reference = Moments.of(draw(real, width, seed=1) + 49)
    slow = of_rows(lambda rows: frechet_distance(Moments.of(rows), reference), features, 6, 3)
    found = intervals.fid_of_resamples(features, reference, 6, 3)
    # Of singular covariances an eigenvalue of zero comes out as 1e-16, of which the root is taken.
    close(found, slow, rel=1e-9 if (count, width) == (90, 6) else 1e-6)
    assert found.value == frechet_distance(Moments.of(features), reference)


@pytest.mark.parametrize(("count", "width", "real"), SHAPES)
def test_influences_are_the_derivatives_by_the_weights(count: int, width: int, real: int) -> None:
    features, reference = draw(count, width).double() * 2 + 1, Moments.of(draw(real, width, seed=1))
    found = frechet_influence(features, reference)
    assert abs(found.sum()) < 1e-10

    def distance(weights: torch.Tensor) -> float:
        mean = weights @ features / count
        centred = features - mean
        return frechet_distance(Moments(count, mean, centred.T @ (centred * weights.unsqueeze(1))), reference)

    for image in range(3):
        step = torch.full((count,), -1 / count, dtype=torch.float64)
        step[image] += 1
        slope = (distance(1 + 1e-2 * step) - distance(1 - 1e-2 * step)) / 2e-2
        assert found[image].item() == pytest.approx(slope, rel=1e-3, abs=5e-5)  # roots of rounding, as above


def test_influences_are_those_of_kid() -> None:
    x, y = draw(20, 3).double() + 0.2, draw(9, 3, seed=1).double()
    found = kernel_influence(kernel_means(x, y))
    assert abs(found.sum()) < 1e-12
    within, across = (x @ x.T / 3 + 1) ** 3, (x @ y.T / 3 + 1) ** 3
    within.fill_diagonal_(0)

    def distance(weights: torch.Tensor) -> float:
        return float(weights @ within @ weights / (20 * 19) - 2 * weights @ across.mean(1) / 20)

    for image in range(3):
        step = torch.full((20,), -1 / 20, dtype=torch.float64)
        step[image] += 1
        slope = (distance(1 + 1e-3 * step) - distance(1 - 1e-3 * step)) / 2e-3
        assert found[image].item() == pytest.approx(slope, rel=1e-9)


def test_influences_in_blocks_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(30, 3) + 0.2, draw(41, 3, seed=1)
    at_once = frechet_influence(x, Moments.of(y)), kernel_influence(kernel_means(x, y))
    monkeypatch.setattr(metrics, "BLOCK", 4 * 41)
    torch.testing.assert_close(kernel_influence(kernel_means(x, y)), at_once[1], rtol=1e-9, atol=1e-15)
    monkeypatch.setattr(metrics, "BLOCK", 7 * 3)
    torch.testing.assert_close(frechet_influence(x, Moments.of(y)), at_once[0], rtol=1e-9, atol=1e-15)


def test_far_from_the_reference_influences_and_resamples_agree() -> None:
    features, reference = draw(2000, 6) * 2 + 1, Moments.of(draw(3000, 6, seed=1))
    fast, full = intervals.fid(features, reference, 60, 0), intervals.fid_of_resamples(features, reference, 60, 0)
    assert fast.value == full.value and fast.scheme == Scheme("linear", 2000, 0)
    assert np.corrcoef(fast.draws, full.draws)[0, 1] > 0.999
    assert fast.draws.std() == pytest.approx(full.draws.std(), rel=0.02)


def test_a_fid_lies_in_its_interval_although_resamples_have_a_higher_one() -> None:
    reference = Moments.of(draw(3000, 20, seed=1))
    full = intervals.fid_of_resamples(draw(150, 20), reference, 60, 0)
    assert full.draws.mean() > 1.5 * full.value
    assert full.interval().holds(full.value) and not full.interval().holds(float(full.draws.mean()))


# 500 images near the reference, then fewer than dimensions: there a bootstrap is 2.2 and 6 times too wide.
@pytest.mark.parametrize(("count", "width", "most"), [(200, 3, 1.25), (500, 64, 1.5), (40, 80, 1.8)])
def test_the_interval_of_a_fid_is_about_as_wide_as_it_spreads_over_seeds(count: int, width: int, most: float) -> None:
    reference = Moments.of(draw(3000, width, seed=1))
    arms = [draw(count, width, seed=s) * 1.02 + 0.02 for s in range(100, 160)]
    spread = np.std([frechet_distance(Moments.of(arm), reference) for arm in arms])
    found = np.mean([intervals.fid(arm, reference, 100, 0).draws.std() for arm in arms[:5]])
    assert 0.85 * spread < found < most * spread
    if width > 3:
        slow = np.mean([intervals.fid_of_resamples(arm, reference, 20, 0).draws.std() for arm in arms[:3]])
        assert slow > 1.4 * found


def test_kid_is_resampled_about_its_value() -> None:
    x, y = draw(150, 3) + 0.3, draw(300, 3, seed=1)
    found = intervals.kid(x, y, 400, 0)
    assert found.value == kernel_distance_exact(x, y) and found.scheme == Scheme("linear", 150, 0)
    assert found.draws.mean() == pytest.approx(found.value, abs=0.2 * found.draws.std())
    assert found.draws[0] == pytest.approx(
        found.value + kernel_influence(kernel_means(x, y))[next(resamples(150, 1, 0))].sum().item()
    )


def test_the_interval_of_a_kid_is_as_wide_as_it_spreads_over_seeds() -> None:
    reference = draw(300, 3, seed=1)
    spread = np.std([kernel_distance_exact(draw(150, 3, seed=s) + 0.3, reference) for s in range(100, 250)])
    found = np.mean([intervals.kid(draw(150, 3, seed=s) + 0.3, reference, 100, 0).draws.std() for s in range(10)])
    assert found == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize("split", [5000, 20, 7])
def test_resampled_inception_score_is_that_of_the_resampled_rows(split: int) -> None:
    logits = draw(50, 4) * 3
    slow = of_rows(lambda rows: inception_score(rows, split=split).mean, logits, 5, 2)
    close(intervals.inception(logits, 5, 2, split=split), slow)


def test_resampled_inception_score_of_classes_that_never_occur() -> None:
    logits = torch.eye(3).repeat(8, 1)[:, [0, 1, 2]] * 2000  # probabilities of exactly 0 and 1
    found = intervals.inception(logits, 5, 0)
    assert found.value == pytest.approx(3) and np.isfinite(found.draws).all() and (found.draws <= 3 + 1e-9).all()


def test_resampled_precision_is_that_of_the_resampled_rows() -> None:
    features, reference = draw(60, 3) * 1.5, draw(50, 3, seed=1)
    slow = of_rows(lambda rows: covered(rows, reference, radii(reference)).double().mean().item(), features, 6, 0)
    close(intervals.precision_of(features, reference, 6, 0), slow)


def test_resampled_recall_is_that_of_halves_without_repeats() -> None:
    features, reference = draw(60, 3) * 1.5, draw(50, 3, seed=1)
    found = intervals.recall_of(features, reference, 6, 0)
    assert found.value == recall(features, reference) and found.scheme == Scheme("halves", 60, 0)
    assert found.draws == pytest.approx([recall(features[rows], reference) for rows in halves(60, 6, 0)])
    odd = intervals.recall_of(features[:59], reference, 6, 0)
    alone = np.array([recall(features[:59][rows], reference) for rows in halves(59, 6, 0)])
    assert odd.draws.std() == pytest.approx(alone.std() * math.sqrt(29 / 30))
    with pytest.raises(ValueError, match="halves of more than k = 3 images, found 7 images"):
        intervals.recall_of(features[:7], reference, 6, 0)


def test_the_interval_of_a_recall_is_about_as_wide_as_it_spreads_over_seeds() -> None:
    reference = draw(200, 3, seed=1)
    spread = np.std([recall(draw(100, 3, seed=s) * 0.6, reference) for s in range(100, 220)])
    found = np.mean([intervals.recall_of(draw(100, 3, seed=s) * 0.6, reference, 60, 0).draws.std() for s in range(8)])
    assert found == pytest.approx(spread, rel=0.35)


def test_rmse_is_the_root_of_the_mean_square() -> None:
    squares = torch.tensor([0.01, 0.04, 0.09], dtype=torch.float64)
    found = intervals.rmse_of(squares, 10, 0)
    assert found.value == pytest.approx(math.sqrt(0.14 / 3))
    expected = [math.sqrt(squares.numpy()[rows].mean()) for rows in resamples(3, 10, 0)]
    assert found.draws == pytest.approx(expected)
    assert isinstance(found.interval(), Interval)
