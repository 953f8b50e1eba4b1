"""At which steps a cache runs the whole model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CachePlan:
    """The refresh steps of a run of `num_steps`: ascending, each in 0 … num_steps − 1, beginning with step 0.

    At every other step the model reuses what the last whole pass left. Raises TypeError for what is no integer,
    ValueError for a plan that breaks a rule above.
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


def uniform(interval: int, num_steps: int) -> CachePlan:
    """Refresh at 0, N, 2N, … (METHOD 3.1). Raises ValueError unless `interval` N and `num_steps` are at least 1."""
    return CachePlan(tuple(range(0, num_steps, check_interval(interval))), num_steps)


def check_interval(interval: int) -> int:
    """`interval`, if it is an integer of at least 1. Raises TypeError or ValueError otherwise."""
    if not isinstance(interval, int) or isinstance(interval, bool):
        raise TypeError(f"interval is {interval!r}, expected an integer")
    if interval < 1:
        raise ValueError(f"interval is {interval}, expected at least 1 (1: every step is a whole pass)")
    return interval
