"""IEC: better pictures from efficient diffusion models at test time, by Iterative Error Correction (ICLR 2026).

`import iec` is light: torch and diffusers are imported when a name below is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iec import plan
    from iec.artifact.calibration import Calibration
    from iec.caches.cachequant import CacheQuant
    from iec.caches.deepcache import DeepCache
    from iec.calibration.calibrate import calibrate
    from iec.core.correction import Trace, correct
    from iec.pipeline.caching import cache
    from iec.pipeline.installation import undo
    from iec.pipeline.models import load, models
    from iec.pipeline.quantizing import quantize
    from iec.pipeline.session import Session, disable, enable, summary
    from iec.plan import CorrectionPlan, StepClock
    from iec.quant.config import QuantConfig
    from iec.quant.reconstruct import Reconstruction
    from iec.schedule.scheduler import IECScheduler

__version__ = "0.1.0"

_HOMES = {
    "CacheQuant": "iec.caches.cachequant",
    "Calibration": "iec.artifact.calibration",
    "CorrectionPlan": "iec.plan",
    "DeepCache": "iec.caches.deepcache",
    "IECScheduler": "iec.schedule.scheduler",
    "Session": "iec.pipeline.session",
    "StepClock": "iec.plan",
    "Trace": "iec.core.correction",
    "QuantConfig": "iec.quant.config",
    "Reconstruction": "iec.quant.reconstruct",
    "cache": "iec.pipeline.caching",
    "calibrate": "iec.calibration.calibrate",
    "quantize": "iec.pipeline.quantizing",
    "correct": "iec.core.correction",
    "disable": "iec.pipeline.session",
    "enable": "iec.pipeline.session",
    "load": "iec.pipeline.models",
    "models": "iec.pipeline.models",
    "plan": "iec.plan",
    "summary": "iec.pipeline.session",
    "undo": "iec.pipeline.installation",
}

__all__ = [
    "CacheQuant",
    "Calibration",
    "CorrectionPlan",
    "DeepCache",
    "IECScheduler",
    "QuantConfig",
    "Reconstruction",
    "Session",
    "StepClock",
    "Trace",
    "cache",
    "calibrate",
    "correct",
    "disable",
    "enable",
    "load",
    "models",
    "plan",
    "quantize",
    "summary",
    "undo",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'iec' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    value = home if name == "plan" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
