"""The optimum of a split into contiguous groups, against every split there is."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from iec.core.segmentation import group_costs, segment


def splits(length: int, groups: int, shortest: int, longest: int) -> list[tuple[int, ...]]:
    """Every permitted tuple of starts."""
    found = []
    for cuts in itertools.combinations(range(1, length), groups - 1):
        starts = (0, *cuts)
        sizes = [end - start for start, end in itertools.pairwise((*starts, length))]
        if all(shortest <= size <= longest for size in sizes):
            found.append(starts)
    return found


def cost_of(costs: Tensor, starts: tuple[int, ...]) -> float:
    return sum(float(costs[start, end - start - 1]) for start, end in itertools.pairwise((*starts, len(costs))))


def brute_force(costs: Tensor, groups: int, shortest: int, longest: int) -> tuple[int, ...] | None:
    """The cheapest; among equals the earliest last start, then the earliest last but one, …; None if there is none."""
    possible = splits(len(costs), groups, shortest, longest)
    best = min(possible, key=lambda starts: (cost_of(costs, starts), starts[::-1]), default=None)
    return best if best is not None and math.isfinite(cost_of(costs, best)) else None


CASES = [
    (length, groups, shortest, longest)
    for length in range(1, 8)
    for groups in range(1, length + 2)
    for shortest in range(1, length + 1)
    for longest in range(shortest, length + 2)
]


@pytest.mark.parametrize("kind", ["floats", "ties", "all equal", "forbidden"])
def test_equals_brute_force(kind: str) -> None:
    """All lengths up to 7, numbers of groups and bounds; costs of few different integers make many ties."""
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for length, groups, shortest, longest in CASES:
        if kind == "floats":
            costs = torch.randn(length, longest, generator=generator, dtype=torch.float64)
        else:
            top = 1 if kind == "all equal" else 3
            costs = torch.randint(0, top, (length, longest), generator=generator).double()
        if kind == "forbidden":
            costs[torch.rand(costs.shape, generator=generator) < 0.3] = math.inf
        expected = brute_force(costs, groups, shortest, longest)
        if expected is None:
            refused += 1
            with pytest.raises(ValueError, match=r"cover|infinite"):
                segment(costs, groups, shortest, longest)
        else:
            assert segment(costs, groups, shortest, longest) == expected, (length, groups, shortest, longest)
    assert 0 < refused < len(CASES)


@pytest.mark.parametrize("seed", range(5))
def test_longer_sequences_equal_brute_force(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randint(0, 4, (14, 8), generator=generator)  # integers are taken as they are
    assert segment(costs, 4, 2, 8) == brute_force(costs, 4, 2, 8)
    assert segment(costs.float(), 5, 1, 6) == brute_force(costs, 5, 1, 6)


def test_what_reaches_beyond_the_end_is_not_read() -> None:
    costs = torch.rand(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = segment(costs, 3, 1, 5)
    for garbage in (math.nan, math.inf, -math.inf, -1e9):
        spoiled = costs.clone()
        for start in range(9):
            spoiled[start, 9 - start :] = garbage
        assert segment(spoiled, 3, 1, 5) == expected
    assert segment(torch.cat([costs, torch.full((9, 3), math.nan)], 1), 3, 1, 5) == expected  # nor longer groups


def test_sums_are_float64() -> None:
    """A difference that float32 does not resolve outweighs the rule for ties."""
    costs = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    assert segment(costs, 2, 1, 2) == (0, 1)  # 1 + 2 and 2 + 1: the last group starts as early as it may
    costs[1, 1] += 1e-12
    assert segment(costs, 2, 1, 2) == (0, 2)


def test_the_largest_plan_in_the_field_takes_no_time() -> None:
    """T = 250, N = 20: 13 groups of 10 to 40."""
    costs = group_costs(torch.rand(250, 40, generator=torch.Generator().manual_seed(0)))
    began = time.perf_counter()
    starts = segment(costs, 13, 10, 40)
    seconds = time.perf_counter() - began
    sizes = [end - start for start, end in itertools.pairwise((*starts, 250))]
    assert len(starts) == 13 and min(sizes) >= 10 and max(sizes) <= 40
    assert seconds < 1.0


def test_group_costs() -> None:
    """The sum of the distances of a group's items to its first, and nothing beyond the end."""
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    distances = torch.full((6, 4), math.nan)
    for start in range(6):
        for ahead in range(min(4, 6 - start)):
            distances[start, ahead] = (features[start + ahead] - features[start]).abs().sum()
    costs = group_costs(distances)
    assert costs.dtype == torch.float64
    for start in range(6):
        for size in range(1, 5):
            if start + size > 6:
                assert costs[start, size - 1] == math.inf
            else:
                expected = (features[start : start + size] - features[start]).abs().double().sum()
                assert float(costs[start, size - 1]) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("costs", "bounds", "words"),
    [
        (torch.zeros(6), (2, 1, 3), "shape"),
        (torch.zeros(0, 3), (2, 1, 3), "shape"),
        (torch.zeros(6, 3), (0, 1, 3), "groups is 0"),
        (torch.zeros(6, 3), (2, 0, 3), "shortest is 0"),
        (torch.zeros(6, 3), (2, 3, 2), "shortest is 3, longest 2"),
        (torch.zeros(7, 3), (2, 1, 3), "2 groups of 1 to 3 cover 2 to 6 items; there are 7"),
        (torch.zeros(6, 9), (7, 1, 9), "cover 7 to 63"),
        (torch.zeros(6, 9), (2, 4, 9), "cover 8 to 18"),
        (torch.zeros(6, 2), (2, 1, 3), "2 columns; expected 3"),
        (torch.zeros(6, 5), (1, 1, 9), "5 columns; expected 6"),
        (torch.full((6, 3), math.nan), (2, 1, 3), r"group 0\.\.0 is nan"),
        (torch.full((6, 3), -math.inf), (2, 1, 3), r"is -inf"),
        (torch.full((6, 3), math.inf), (2, 1, 3), "infinite cost"),
    ],
)
def test_refuses(costs: Any, bounds: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        segment(costs, *bounds)


@pytest.mark.parametrize("shape", [(3,), (0, 2), (2, 0)])
def test_group_costs_refuses(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        group_costs(torch.zeros(shape))
