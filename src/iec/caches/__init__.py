"""Feature caches, which skip most of a denoiser at most steps; the function `iec.cache` puts one on a pipeline."""

from iec.caches.cachequant import CacheQuant
from iec.caches.cut import Cut, Site
from iec.caches.deepcache import DeepCache
from iec.caches.feature import FeatureCache

__all__ = ["CacheQuant", "Cut", "DeepCache", "FeatureCache", "Site"]
