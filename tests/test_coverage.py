"""Precision and recall: against the evaluator of guided-diffusion, brute force, and sets whose answer is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from iec.evaluate import coverage
from iec.evaluate.coverage import covered, nearest, precision, precision_recall, radii, recall, recalls_of_parts

ORACLE = Path(__file__).parent / "data" / "metrics_oracle.npz"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_force(samples: torch.Tensor, reference: torch.Tensor, k: int) -> float:
    """Precision, distance by distance."""
    a, b = samples.double().numpy(), reference.double().numpy()
    widths = [np.sort([np.linalg.norm(x - y) for j, y in enumerate(b) if j != i])[k - 1] for i, x in enumerate(b)]
    return float(np.mean([any(np.linalg.norm(x - y) <= w for y, w in zip(b, widths, strict=True)) for x in a]))


def test_precision_and_recall_agree_with_guided_diffusion() -> None:
    with np.load(ORACLE) as oracle:
        reference, samples = torch.from_numpy(oracle["pr_ref"]), torch.from_numpy(oracle["pr_sample"])
        found = precision_recall(samples, reference)
        assert found.precision == pytest.approx(float(oracle["pr_precision"]), abs=1e-12)
        assert found.recall == pytest.approx(float(oracle["pr_recall"]), abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_those_of_brute_force(k: int) -> None:
    samples, reference = draw(30, 3) + 0.5, draw(40, 3, seed=1)
    assert precision(samples, reference, k) == pytest.approx(by_force(samples, reference, k))
    assert recall(samples, reference, k) == pytest.approx(by_force(reference, samples, k))
    assert 0 < recall(samples, reference, k) < 1


def test_equal_sets_cover_one_another_and_distant_ones_do_not() -> None:
    features = draw(50, 8)
    assert precision_recall(features, features) == (1, 1)
    assert precision_recall(features[torch.randperm(50)], features + 0) == (1, 1)
    assert precision_recall(features + 100, features) == (0, 0)


def test_precision_and_recall_tell_a_narrow_set_from_a_wide_one() -> None:
    wide, narrow = draw(400, 2), draw(400, 2, seed=1) * 0.2
    assert precision(narrow, wide) > 0.95 and recall(narrow, wide) < 0.4
    assert precision(wide, narrow) < 0.4 and recall(wide, narrow) > 0.95


def test_the_surface_of_a_ball_counts() -> None:
    line = torch.tensor([[0.1], [1.1], [2.1], [3.1]])
    assert covered(torch.tensor([[4.1], [4.11], [-0.9]]), line, torch.ones(4)).tolist() == [True, False, True]
    far = torch.tensor([[7.0, 0.0], [7.3, 0.4]]) + 1000  # at a distance of a half
    assert precision(far + torch.tensor([[-0.3, -0.4]]), far, k=1) == 1


def test_a_neighbour_lies_on_the_surface_whatever_the_rounding() -> None:
    features = draw(60, 64) * 10 + 300
    squares, rows = nearest(features, 1)
    for centre, square, row in zip(features, squares[:, 0], rows[:, 0], strict=True):
        # The same distance, about another origin: in floating point, often a little more.
        neighbour = features[row].unsqueeze(0)
        assert covered(neighbour, centre.unsqueeze(0), square.unsqueeze(0)).item()
        assert not covered(neighbour, centre.unsqueeze(0), square.unsqueeze(0) * (1 - 1e-6)).item()


def test_repeated_images_are_at_no_distance() -> None:
    same = draw(1, 64).repeat(10, 1) * 1e3
    assert radii(same).tolist() == [0.0] * 10
    assert precision_recall(same, same) == (1, 1)
    assert precision(same + 1e-2, same) == 0
    twice = draw(40, 64, seed=1).repeat(2, 1) * 1e3
    assert radii(twice, 1).tolist() == [0.0] * 80 and radii(twice, 2).min() > 0


def test_nearest_are_other_rows_in_order() -> None:
    features = draw(20, 4)
    distances, rows = nearest(features, 5)
    full = torch.cdist(features.double(), features.double()).square().fill_diagonal_(math.inf)
    expected = full.sort(dim=1)
    torch.testing.assert_close(distances, expected.values[:, :5])
    assert torch.equal(rows, expected.indices[:, :5])


def test_blocks_do_not_change_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, reference = draw(33, 6) * 1.5, draw(41, 6, seed=1)
    parts = [torch.arange(0, 33, 2)]
    at_once = precision_recall(samples, reference), radii(samples), recalls_of_parts(samples, reference, parts)
    monkeypatch.setattr(coverage, "_ELEMENTS", 100)  # two or three rows at a time
    assert precision_recall(samples, reference) == at_once[0]
    torch.testing.assert_close(radii(samples), at_once[1], rtol=1e-12, atol=0)
    assert recalls_of_parts(samples, reference, parts) == at_once[2]


def test_recalls_of_parts_are_those_of_each_part_alone() -> None:
    samples, reference = draw(120, 4) * 1.2, draw(90, 4, seed=1)
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randperm(120, generator=generator)[:60] for _ in range(6)]
    # So few that a part's neighbours are not among the first of the whole.
    parts += [torch.randperm(120, generator=generator)[:size] for size in (4, 10)]
    expected = [recall(samples[part], reference) for part in parts]
    assert recalls_of_parts(samples, reference, parts) == expected
    assert len(set(expected)) > 3
    assert recalls_of_parts(samples, reference, []) == []


def test_what_is_no_set_of_features_is_refused() -> None:
    features = draw(10, 4)
    with pytest.raises(ValueError, match=r"expected \(N, F\) with N >= 4"):
        precision(features, features[:3])
    with pytest.raises(ValueError, match="not finite"):
        recall(torch.full((10, 4), math.nan), features)
    with pytest.raises(ValueError, match="not finite"):
        precision(torch.full((10, 4), math.inf), features)
    with pytest.raises(ValueError, match="at least the first neighbour"):
        radii(features, 0)
    with pytest.raises(ValueError, match=r"expected \(N, F\), \(M, F\) and M radii"):
        precision(features[:, :2], features)
