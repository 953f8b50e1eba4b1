"""Plain data: which step it is, which steps are corrected, and at which a cache runs the whole model."""

from iec.plan.cache import CachePlan, uniform
from iec.plan.clock import StepClock, Tick
from iec.plan.correction import PRESETS, CorrectionPlan, Relaxation, parse, resolve, resolve_relaxation, spell

__all__ = [
    "PRESETS",
    "CachePlan",
    "CorrectionPlan",
    "Relaxation",
    "StepClock",
    "Tick",
    "parse",
    "resolve",
    "resolve_relaxation",
    "spell",
    "uniform",
]
