"""Plain data: which step it is, and which steps are corrected."""

from iec.plan.clock import StepClock, Tick
from iec.plan.correction import PRESETS, CorrectionPlan, Relaxation, parse, resolve, resolve_relaxation

__all__ = ["PRESETS", "CorrectionPlan", "Relaxation", "StepClock", "Tick", "parse", "resolve", "resolve_relaxation"]
