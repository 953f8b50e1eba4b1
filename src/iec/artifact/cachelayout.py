"""The tables of a feature cache as a page of plain data and two tensors."""

from __future__ import annotations

from typing import Any

import torch

from iec.artifact.calibration import CacheTables
from iec.artifact.plain import Fields, plain

_TENSORS = ("cache_gain", "cache_offset")  # float32 (steps, channels)


def flatten(cache: CacheTables) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The plain data and the tensors (on the CPU) of `cache`."""
    page = {
        "component": cache.component,
        "config": cache.config,
        "branch": cache.branch,
        "refresh": cache.refresh,
        "channels": cache.gain.shape[1],
    }
    tables = [table.detach().cpu().clone(memory_format=torch.contiguous_format) for table in (cache.gain, cache.offset)]
    return plain(page, "cache"), dict(zip(_TENSORS, tables, strict=True))


class CachePage:
    """The plain data of a cache, read with checks: what tensors belong to it, and the tables made of them."""

    def __init__(self, value: Any, steps: int) -> None:
        """Read `value`, whose tables have `steps` rows. Raises ValueError naming the field."""
        fields = Fields(value, "cache")
        self._component: str = fields.take("component", "text")
        self._config: dict[str, Any] = fields.take("config", "an object")
        self._branch: int = fields.take("branch", "a whole number")
        self._refresh: tuple[int, ...] = tuple(fields.take("refresh", "a list of whole numbers"))
        self._shape = (steps, fields.take("channels", "a positive whole number"))
        fields.done()

    def shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Which tensors there must be, of which dtype and shape."""
        return dict.fromkeys(_TENSORS, (torch.float32, self._shape))

    def build(self, tensors: dict[str, torch.Tensor]) -> CacheTables:
        """The tables, out of `tensors` with the names, dtypes and shapes of `shapes`, and maybe others."""
        gain, offset = (tensors[name] for name in _TENSORS)
        return CacheTables(self._component, self._config, self._branch, self._refresh, gain, offset)
