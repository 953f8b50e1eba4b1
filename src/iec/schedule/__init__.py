"""A scheduler that repeats the corrected timesteps, so that any pipeline's own loop spends the extra evaluations."""

from iec.schedule.scheduler import IECScheduler

__all__ = ["IECScheduler"]
