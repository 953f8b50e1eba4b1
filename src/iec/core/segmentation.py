"""Splitting a sequence into contiguous groups at least cost, exactly (the dynamic programming of CacheQuant, METHOD 4.1).

C[g, n] = min over the last group's start j of C[g − 1, j] + cost of j … n − 1. Only groups of permitted lengths are ever looked
at, so a banded table of their costs is all that is needed, and a layer g is one gather and one minimum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def segment(costs: Tensor, groups: int, shortest: int, longest: int) -> tuple[int, ...]:
    """The starts of the `groups` contiguous groups that cover 0 … T − 1 at the least total cost: ascending, from 0.

    Args:
        costs: (T, L), T ≥ 1, L ≥ min(longest, T): costs[s, l − 1] is the cost of the group s … s + l − 1. Infinite forbids a
            group; entries that reach beyond T are not read. Summed in float64.
        groups: how many groups, at least 1.
        shortest, longest: permitted lengths of a group, 1 ≤ shortest ≤ longest; the last group is no exception.

    The optimum is exact. Among equals the one whose last group starts earliest is taken, then the one whose last but one does,
    and so on.

    Raises ValueError for bounds that no split keeps, a table of another shape, NaN or −∞ among the costs that are read, and when
    every split holds a forbidden group.
    """
    table = _checked(costs, groups, shortest, longest)
    length, widest = table.shape
    # Column c of the gathered table is the group of `widest − c` steps that ends before n: the earliest start comes first.
    ends = torch.arange(length + 1)[:, None]
    starts = ends - torch.arange(widest, 0, -1)
    allowed = (starts >= 0) & (ends - starts >= shortest)
    starts = starts.clamp_(min=0)
    last = torch.where(allowed, table[starts, (ends - starts - 1).clamp(0, widest - 1)], math.inf)

    best = torch.full((length + 1,), math.inf, dtype=torch.float64)
    best[0] = 0.0
    choices = []
    for _ in range(groups):
        total = best[starts] + last
        choice = total.argmin(1, keepdim=True)  # the first of equals
        best = total.gather(1, choice)[:, 0]
        choices.append(starts.gather(1, choice)[:, 0])
    if not math.isfinite(float(best[length])):
        raise ValueError(
            f"every split of {length} into {groups} groups of {shortest} to {longest} holds a group of infinite cost; "
            "allow fewer, more or longer groups, or look for what made the costs infinite"
        )
    found, end = [], length
    for choice in reversed(choices):
        end = int(choice[end])
        found.append(end)
    return tuple(reversed(found))


def group_costs(distances: Tensor) -> Tensor:
    """Costs for `segment`, float64 (T, L), from distances (T, L): distances[s, j] is that of item s + j to item s.

    The cost of a group is the sum of its items' distances to its first (METHOD 4.1). Entries with s + j ≥ T are ignored, and
    infinite in the result. Raises ValueError for another shape.
    """
    if distances.dim() != 2 or distances.numel() == 0:
        raise ValueError(f"distances have shape {tuple(distances.shape)}; expected (T, L), T and L at least 1")
    inside = _inside(*distances.shape)
    summed = torch.where(inside, distances.detach().to("cpu", torch.float64), 0.0).cumsum(1)
    return torch.where(inside, summed, math.inf)


def _inside(length: int, widest: int) -> Tensor:
    """Which groups [start, size − 1] end within the sequence."""
    return torch.arange(length)[:, None] + torch.arange(widest) < length


def _checked(costs: Tensor, groups: int, shortest: int, longest: int) -> Tensor:
    """The part of the table that is read, in float64."""
    if costs.dim() != 2 or len(costs) == 0:
        raise ValueError(f"costs have shape {tuple(costs.shape)}; expected (T, longest), T at least 1")
    length = len(costs)
    if groups < 1:
        raise ValueError(f"groups is {groups}, expected at least 1")
    if not 1 <= shortest <= longest:
        raise ValueError(f"shortest is {shortest}, longest {longest}; expected 1 ≤ shortest ≤ longest")
    if not groups * shortest <= length <= groups * longest:
        raise ValueError(
            f"{groups} groups of {shortest} to {longest} cover {groups * shortest} to {groups * longest} items; there are "
            f"{length}"
        )
    widest = min(longest, length)
    if costs.shape[1] < widest:
        raise ValueError(
            f"costs have {costs.shape[1]} columns; expected {widest}, one for each length up to the longest"
        )
    table = costs[:, :widest].detach().to("cpu", torch.float64)
    bad = (table.isnan() | (table == -math.inf)) & _inside(length, widest)
    if bool(bad.any()):
        start, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"the cost of the group {start}..{start + column} is {float(table[start, column])}; expected finite costs, or "
            "inf for a forbidden group (features that hold NaN or infinity give such costs)"
        )
    return table
