"""Plain data: which step it is, which steps are corrected, and at which a cache runs the whole model."""

from iec.plan.cache import CachePlan, check_interval
from iec.plan.clock import StepClock, Tick
from iec.plan.correction import PRESETS, CorrectionPlan, Relaxation, parse, resolve, resolve_relaxation, spell
from iec.plan.probe import Probe, parse_probe
from iec.plan.schedules import (
    Bounds,
    Schedule,
    Window,
    bounds,
    centred,
    check_window,
    dps,
    make_plan,
    parse_schedule,
    quadratic,
    resolve_window,
    uniform,
)

__all__ = [
    "PRESETS",
    "Bounds",
    "CachePlan",
    "CorrectionPlan",
    "Probe",
    "Relaxation",
    "Schedule",
    "StepClock",
    "Tick",
    "Window",
    "bounds",
    "centred",
    "check_interval",
    "check_window",
    "dps",
    "make_plan",
    "parse",
    "parse_probe",
    "parse_schedule",
    "quadratic",
    "resolve",
    "resolve_relaxation",
    "resolve_window",
    "spell",
    "uniform",
]
