"""Caches of other libraries on a denoiser: found, named, and kept out of IEC's corrections.

A correction must evaluate the whole model, and must leave the cache's counters and history as it found them: then the
ordinary visits of a run are bit for bit those of the cached run without IEC. What is here stands around one evaluation and
is gone after it, whatever happens in between.
"""

from iec.pipeline.foreign.found import check_refresh, find, names, refresh_steps, refuse_beside
from iec.pipeline.foreign.visit import ForeignCache, Visit

__all__ = ["ForeignCache", "Visit", "check_refresh", "find", "names", "refresh_steps", "refuse_beside"]
