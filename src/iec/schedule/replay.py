"""Taking a scheduler's step again, exactly: its state and its noise are put back as they were.

A correction never patches a scheduler's state; it restores the state before the step and steps again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PLAIN = (int, float, bool, str, tuple, list, dict, Tensor)


def _copied(value: Any, shape: torch.Size) -> Any:
    """A copy that survives a step: lists are copied, tensors of the sample's shape (history, added to in place) cloned."""
    if isinstance(value, Tensor):
        return value.clone() if value.shape == shape else value
    if isinstance(value, list):
        return [_copied(item, shape) for item in value]
    return value


class Snapshot:
    """The state of `scheduler` before a step on samples of `shape`."""

    def __init__(self, scheduler: Any, shape: torch.Size) -> None:
        self.shape = shape
        self.state = {name: _copied(value, shape) for name, value in vars(scheduler).items()}

    def restore(self, scheduler: Any) -> None:
        """Put the state back; can be called again and again.

        Objects that the step made on first use (the noise sampler of DPM-Solver SDE) are kept: they are the noise.
        """
        live = vars(scheduler)
        for name, value in self.state.items():
            created = value is None and live.get(name) is not None and not isinstance(live[name], _PLAIN)
            if not created:
                live[name] = _copied(value, self.shape)

    def has_history(self, scheduler: Any) -> bool:
        """Whether the step kept something computed from the sample or the model output, as multistep solvers do."""

        def held(value: Any) -> bool:
            if isinstance(value, Tensor):
                return value.shape == self.shape
            return isinstance(value, list) and any(held(item) for item in value)

        return any(held(value) for value in vars(scheduler).values())


class NoiseState:
    """The state of the random generators a step may draw from: the given ones, or torch's own of the CPU and the device."""

    def __init__(self, generator: torch.Generator | list[torch.Generator] | None, device: torch.device) -> None:
        if generator is None:
            self.generators: list[Any] = [torch.default_generator]
            if device.type != "cpu":
                self.generators.append(_DeviceGenerator(device))
        else:
            self.generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
        self.states = [held.get_state() for held in self.generators]

    def replay(self) -> _Replay:
        """Context in which the generators give once more what they gave after this state was taken."""
        return _Replay(self)


class _Replay:
    def __init__(self, noise: NoiseState) -> None:
        self.noise = noise

    def __enter__(self) -> None:
        self.live = [held.get_state() for held in self.noise.generators]
        self._set(self.noise.states)

    def __exit__(self, *exception: object) -> None:
        self._set(self.live)

    def _set(self, states: list[Tensor]) -> None:
        for held, state in zip(self.noise.generators, states, strict=True):
            held.set_state(state)


class _DeviceGenerator:
    """torch's own generator of an accelerator, with the two methods that are needed."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.module = device, torch.get_device_module(device)

    def get_state(self) -> Tensor:
        return self.module.get_rng_state(self.device) if self.device.type != "mps" else self.module.get_rng_state()

    def set_state(self, state: Tensor) -> None:
        if self.device.type == "mps":
            self.module.set_rng_state(state)
        else:
            self.module.set_rng_state(state, self.device)
