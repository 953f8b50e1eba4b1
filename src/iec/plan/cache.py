"""At which steps a cache runs the whole model."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

SHOWN = 12  # steps and ranges that str() spells out


@dataclass(frozen=True)
class CachePlan:
    """The refresh steps of a run of `num_steps`: ascending, each in 0 … num_steps − 1, beginning with step 0.

    At every other step the model reuses what the last whole pass left. `str()` says it in one line, `bar()` draws it,
    `iec.bench.plans.plot_plans` compares several. Raises TypeError for what is no integer, ValueError for a plan that breaks
    a rule above.
    """

    refresh: tuple[int, ...]
    num_steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "refresh", tuple(self.refresh))
        for value in (self.num_steps, *self.refresh):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"a cache plan is made of integers, found {value!r}")
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}, expected at least 1")
        if not self.refresh or self.refresh[0] != 0:
            raise ValueError(f"refresh is {self.refresh}; it must begin with step 0, which has nothing to reuse")
        if list(self.refresh) != sorted(set(self.refresh)):
            raise ValueError(f"refresh is {self.refresh}; expected ascending steps without repeats")
        if self.refresh[-1] >= self.num_steps:
            raise ValueError(f"refresh step {self.refresh[-1]} not in 0..{self.num_steps - 1}, the steps of this run")

    def __contains__(self, step: object) -> bool:
        return step in self.refresh

    def __len__(self) -> int:
        return len(self.refresh)

    def reference(self, step: int) -> int:
        """The step whose feature `step` uses: the last refresh step up to it. Raises ValueError for a step outside the run."""
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step {step} not in 0..{self.num_steps - 1}, the steps of this run")
        return self.refresh[bisect_right(self.refresh, step) - 1]

    def bar(self) -> str:
        """One character per step: | for a whole pass, . for reuse."""
        return "".join("|" if step in self.refresh else "." for step in range(self.num_steps))

    def __str__(self) -> str:
        listed = [part for first, last in self._spans() for part in _spelled(first, last)]
        if len(listed) > SHOWN:
            listed = [*listed[: SHOWN - 2], "…", listed[-1]]
        return f"{self.num_steps} steps, {len(self)} whole: {', '.join(listed)}"

    def _spans(self) -> list[tuple[int, int]]:
        """Neighbouring refresh steps, as first and last."""
        spans: list[tuple[int, int]] = []
        for step in self.refresh:
            follows = spans and spans[-1][1] == step - 1
            spans.append((spans.pop()[0], step) if follows else (step, step))
        return spans


def _spelled(first: int, last: int) -> list[str]:
    """Three neighbours or more as a range."""
    return [f"{first}-{last}"] if last - first > 1 else [str(step) for step in range(first, last + 1)]


def check_interval(interval: int) -> int:
    """`interval`, if it is an integer of at least 1. Raises TypeError or ValueError otherwise."""
    if not isinstance(interval, int) or isinstance(interval, bool):
        raise TypeError(f"interval is {interval!r}, expected an integer")
    if interval < 1:
        raise ValueError(f"interval is {interval}, expected at least 1 (1: every step is a whole pass)")
    return interval
