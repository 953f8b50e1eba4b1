"""What the numbers of a comparison say, in sentences made from the numbers alone."""

from __future__ import annotations

from collections.abc import Sequence

from iec.bench.arms import Outcome

SAME = 0.1  # dB; below that two PSNRs are called equal


def reading(outcomes: Sequence[Outcome]) -> list[str]:
    """For every corrected arm: against the same arm without correction, and against the control of as many evaluations.

    A control of an arm has the same cache and the fewest evaluations that are not below the arm's own.
    """
    lines = []
    for outcome in outcomes:
        if outcome.arm.kind != "corrected" or outcome.psnr is None:
            continue
        alike = [o for o in outcomes if o.arm.cache == outcome.arm.cache and o.psnr is not None]
        plain = [
            o for o in alike if o.arm.kind == "plain" and o.arm.num_inference_steps == outcome.arm.num_inference_steps
        ]
        controls = [o for o in alike if o.arm.kind == "control" and o.evaluations >= outcome.evaluations]
        parts = [_against(outcome, other, "than without the correction") for other in plain[:1]]
        if controls:
            nearest = min(controls, key=lambda o: o.evaluations)
            parts.append(_against(outcome, nearest, f"than {nearest.arm.name} ({nearest.evaluations} evaluations)"))
        if parts:
            lines.append(f"{outcome.arm.name} ({outcome.evaluations} evaluations): {', and '.join(parts)}.")
    return lines


def _against(outcome: Outcome, other: Outcome, than: str) -> str:
    assert outcome.psnr is not None and other.psnr is not None
    gain = outcome.psnr - other.psnr
    if abs(gain) < SAME:
        return f"no closer and no farther {than}"
    return f"{abs(gain):.1f} dB {'closer' if gain > 0 else 'farther'} {than}"
