"""The pip package cache-dit: during a forward it puts cached blocks in the place of a transformer's block lists.

Its cached blocks keep all their state in a context, and run every block when there is none. So during a correction its
manager finds no context.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from iec.pipeline.foreign.visit import ForeignCache, Visit

_BLOCKS = ("pattern_base", "pattern_3_4_5")  # the modules whose blocks complain in the log that there is no context


class ContextCache:
    """A transformer on which cache-dit is enabled."""

    outermost = True
    decides = "compares residuals with the last ones while it runs"

    def __init__(self, manager: Any, missing: type[Exception], loggers: list[logging.Logger]) -> None:
        self.manager, self.missing, self.loggers = manager, missing, loggers
        self.name = f"cache-dit {importlib.import_module('cache_dit').__version__}"

    @contextmanager
    def around(self, visit: Visit) -> Iterator[None]:
        """See `ForeignCache`."""
        if not visit.correction:
            yield
            return

        def set_context(*_: Any, **__: Any) -> Any:
            raise self.missing("IEC corrects without the cache")

        silent = _Silent()
        try:
            self.manager.set_context = set_context
            self.manager.is_pre_refreshed = lambda: False  # else it would now count the cached steps of the run
            for logger in self.loggers:
                logger.addFilter(silent)
            yield
        finally:
            for name in ("set_context", "is_pre_refreshed"):
                vars(self.manager).pop(name, None)
            for logger in self.loggers:
                logger.removeFilter(silent)

    def refresh(self, num_steps: int, begin: int) -> tuple[int, ...] | None:
        """See `ForeignCache`."""
        return None


class _Silent(logging.Filter):
    """Keeps one message, meant for users who forgot something, out of the log."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "IEC corrects without the cache" not in record.getMessage()


def collect(model: nn.Module) -> list[ForeignCache]:
    """The cache on `model`, if there is one. Raises TypeError for a release of the package that is built differently."""
    manager = getattr(model, "_context_manager", None)
    if not getattr(model, "_is_cached", False) or not type(manager).__module__.startswith("cache_dit."):
        return []
    try:
        blocks = [importlib.import_module(f"cache_dit.caching.cache_blocks.{name}") for name in _BLOCKS]
        missing = importlib.import_module("cache_dit.caching.cache_contexts").ContextNotExistError
        loggers = [block.logger for block in blocks if block.ContextNotExistError is missing]
        if len(loggers) != len(_BLOCKS) or not callable(manager.set_context):
            raise AttributeError("its blocks do not catch ContextNotExistError")
    except (ImportError, AttributeError) as error:
        raise TypeError(
            f"the cache-dit on this {type(model).__name__} is not built like that of release 1.5.3 ({error}), so IEC cannot "
            "keep it out of its corrections; take it off by cache_dit.disable_cache(pipe)"
        ) from error
    return [ContextCache(manager, missing, loggers)]
