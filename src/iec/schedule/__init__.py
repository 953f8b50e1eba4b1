"""A scheduler that repeats the corrected timesteps, so that any pipeline's own loop spends the extra evaluations.

Beside it DDIM at quadratically spaced timesteps, which diffusers does not have.
"""

from iec.schedule.quadratic import QuadraticDDIMScheduler
from iec.schedule.scheduler import IECScheduler

__all__ = ["IECScheduler", "QuadraticDDIMScheduler"]
