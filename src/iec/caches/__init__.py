"""Feature caches, which skip most of a denoiser at most steps; the function `iec.cache` puts one on a pipeline."""

from iec.caches.deepcache import DeepCache
from iec.caches.feature import FeatureCache, Site

__all__ = ["DeepCache", "FeatureCache", "Site"]
