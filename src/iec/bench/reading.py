"""What the numbers of a comparison say, in sentences made from the numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from iec.bench.arms import Outcome

SAME = 0.1  # dB; below that two PSNRs are called equal


def reading(outcomes: Sequence[Outcome]) -> list[str]:
    """What the numbers say of every quantized and every corrected arm, in their order.

    A quantized arm is compared with the same arm in full precision (without its cache, if there is none with it): speed,
    weights, distance. A corrected arm is compared with the same arm without correction, and with the control of as many
    evaluations: the one of the same cache and quantization that has the fewest evaluations not below the arm's own, else
    that in full precision.
    """
    lines = []
    for outcome in outcomes:
        arm = outcome.arm
        if outcome.psnr is None:
            continue
        if arm.kind == "plain" and arm.quant is not None:
            lines += [_beside(outcome, whole) for whole in _in_full(outcomes, outcome)]
        if arm.kind != "corrected":
            continue
        parts = [
            _against(outcome, other, "than without the correction") for other in _plain(outcomes, outcome, arm.quant)
        ]
        control = _control(outcomes, outcome)
        if control is not None:
            parts.append(_against(outcome, control, f"than {control.arm.name} ({control.evaluations} evaluations)"))
        if parts:
            lines.append(f"{arm.name} ({outcome.evaluations} evaluations): {', and '.join(parts)}.")
    return lines


def _plain(outcomes: Sequence[Outcome], outcome: Outcome, quant: str | None) -> list[Outcome]:
    """The outcome (none or one) of the arm without correction, with the quantization `quant`."""
    arm = outcome.arm
    found = [o for o in outcomes if o.arm.kind == "plain" and o.arm.cache == arm.cache and o.arm.quant == quant]
    return [o for o in found if o.arm.num_inference_steps == arm.num_inference_steps and o.psnr is not None][:1]


def _in_full(outcomes: Sequence[Outcome], outcome: Outcome) -> list[Outcome]:
    """The outcome (none or one) of the arm in full precision, with its cache or without one."""
    bare = replace(outcome, arm=replace(outcome.arm, cache=None))
    return _plain(outcomes, outcome, quant=None) or _plain(outcomes, bare, quant=None)


def _control(outcomes: Sequence[Outcome], outcome: Outcome) -> Outcome | None:
    controls = [
        o for o in outcomes if o.arm.kind == "control" and o.arm.cache == outcome.arm.cache and o.psnr is not None
    ]
    enough = [o for o in controls if o.evaluations >= outcome.evaluations]
    alike = [o for o in enough if o.arm.quant == outcome.arm.quant] or [o for o in enough if o.arm.quant is None]
    return min(alike, key=lambda o: o.evaluations, default=None)


def _beside(outcome: Outcome, whole: Outcome) -> str:
    assert outcome.psnr is not None and whole.psnr is not None
    speed, gain = whole.seconds / outcome.seconds, outcome.psnr - whole.psnr
    fast = f"{speed:.1f} times as fast as" if speed >= 1 else f"{1 / speed:.1f} times as slow as"
    weights = f"with {outcome.weights / whole.weights:.2f} times its weights"
    close = f"{abs(gain):.1f} dB {'closer to' if gain > 0 else 'farther from'}" if abs(gain) >= SAME else "as close to"
    return f"{outcome.arm.name}: {fast} {whole.arm.name}, {weights}, and {close} the fine solution."


def _against(outcome: Outcome, other: Outcome, than: str) -> str:
    assert outcome.psnr is not None and other.psnr is not None
    gain = outcome.psnr - other.psnr
    if abs(gain) < SAME:
        return f"no closer and no farther {than}"
    return f"{abs(gain):.1f} dB {'closer' if gain > 0 else 'farther'} {than}"
