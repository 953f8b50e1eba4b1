"""What a session did in its last run, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Summary:
    """The state of IEC on a pipeline, and its last run.

    `num_steps`, `steps` and all that follows are None or empty before the first run; where IEC has been switched off since,
    they tell its last run, and `enabled` is False. `evaluations` counts denoiser forwards;
    `spared` those that convergence saved. `residuals` maps a step to the relative residual of each of its corrections,
    averaged over the batch. `cache` describes the cache on the pipeline, of whose evaluations `refreshed` were whole passes
    (corrections among them) and `reused` were not; all three are None without one, the last two also for a cache of another
    library. `quant` describes the quantization on
    the pipeline, None without one. `probe` is where corrections evaluate the denoiser, `scale` what its output is multiplied by.
    Seconds are wall time from the first to the last step.
    """

    pipeline: str
    scheduler: str
    spec: str
    relax: tuple[float, ...]
    tol: float | None
    enabled: bool
    num_steps: int | None = None
    steps: tuple[int, ...] = ()
    evaluations: int | None = None
    corrections: int = 0
    spared: int = 0
    seconds: float | None = None
    correction_seconds: float | None = None
    residuals: dict[int, tuple[float, ...]] | None = None
    cache: str | None = None
    refreshed: int | None = None
    reused: int | None = None
    quant: str | None = None
    probe: str = "estimate"
    scale: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.enabled and self.num_steps is None:
            return "\n".join([f"IEC is not enabled on this {self.pipeline}.", *self._beside()])
        relax = ", ".join(f"{factor:g}" for factor in self.relax)
        tol = "none" if self.tol is None else f"{self.tol:g}"
        lines = [
            f"IEC on {self.pipeline} ({self.scheduler}){'' if self.enabled else ', switched off since'}",
            f"  plan         steps={self.spec}  relax=({relax})  tol={tol}"
            + ("" if self.probe == "estimate" else f"  probe={self.probe}"),
            *self._beside(),
        ]
        if self.num_steps is None or self.seconds is None or self.correction_seconds is None:
            return "\n".join([*lines, "  last run     none yet"])
        lines.append(f"  corrected    {len(self.steps)} of {self.num_steps} steps: {_ranges(self.steps)}")
        spared = f", {self.spared} spared by convergence" if self.spared else ""
        counted = (
            "not counted, as another denoiser was assigned;" if self.evaluations is None else f"{self.evaluations}"
        )
        lines.append(f"  evaluations  {counted} ({self.corrections} corrections{spared})")
        lines.append(f"  time         {self.seconds:.2f} s, of which corrections {self.correction_seconds:.2f} s")
        if self.residuals:
            first, last = min(self.residuals), max(self.residuals)
            values = [value for step in self.residuals.values() for value in step]
            if values:
                ends = [f"{_numbers(self.residuals[step])} at step {step}" for step in sorted({first, last})]
                lines.append(f"  residuals    {', '.join(ends)}, largest {max(values):.1e}")
        return "\n".join(lines)

    def _beside(self) -> list[str]:
        """What else is on the pipeline: a quantization, a scaling of its output, a cache."""
        lines = [] if self.quant is None else [f"  quant        {self.quant}"]
        lines += [] if self.scale == 1 else [f"  output       times {self.scale:g}"]
        if self.cache is not None:
            counts = "" if self.refreshed is None else f": {self.refreshed} whole passes, {self.reused} reused"
            lines.append(f"  cache        {self.cache}{counts}")
        return lines


def _numbers(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.1e}" for value in values) or "none"


def _ranges(steps: tuple[int, ...]) -> str:
    """(0, 1, 2, 7) → "0-2, 7"; cut after eight ranges."""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    shown = [f"{first}" if first == last else f"{first}-{last}" for first, last in ranges]
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "") if shown else "none"
