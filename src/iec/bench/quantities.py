"""What a metric is called, which way is better, and with how many digits it is written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from iec.bench.results import Estimate

_SAME_SEED = re.compile(r"(rmse|psnr|ssim|lpips)_(\w+)")
_TARGETS = {"fine": "the fine solution", "full": "full precision"}


@dataclass(frozen=True)
class Quantity:
    """A metric as a reader wants it: its `label`, whether `lower` is better, and its `unit`.

    `scale` is the last digit of a value without an interval.
    """

    label: str
    lower: bool
    unit: str = ""
    scale: float = 0.01

    @property
    def head(self) -> str:
        """The label with its unit and an arrow that says which way is better."""
        unit = f" ({self.unit})" if self.unit else ""
        return f"{self.label}{unit} {'↓' if self.lower else '↑'}"

    def better(self, difference: Estimate) -> int:
        """1: the difference is an improvement, −1: the opposite, 0: cannot be told."""
        return -difference.sign if self.lower else difference.sign

    def digits(self, estimates: Iterable[Estimate]) -> int:
        """Decimals with which a column of estimates is written: as many as half of their middle interval fills, and no more."""
        widths = sorted(
            (e.high - e.low) / 2
            for e in estimates
            if e.low is not None and e.high is not None and math.isfinite(e.high - e.low) and e.high > e.low
        )
        if not widths:
            return max(0, round(-math.log10(self.scale)))
        return min(5, max(0, math.ceil(math.log10(3 / widths[len(widths) // 2]))))

    def telling(self, difference: Estimate) -> int:
        """`digits` of one difference, and more where an interval that leaves out zero would read as if it began there."""
        digits, ends = self.digits([difference]), (difference.low, difference.high)
        while difference.sign and digits < 5 and any(end is not None and not round(end, digits) for end in ends):
            digits += 1
        return digits

    def number(self, value: float, digits: int) -> str:
        return _number(value, digits)

    def written(self, estimate: Estimate | None, digits: int) -> str:
        """Value and interval: "21.2 [19.1, 23.4]"; "–" for none."""
        if estimate is None:
            return "–"
        value = self.number(estimate.value, digits)
        if estimate.low is None or estimate.high is None:
            return value
        return f"{value} [{self.number(estimate.low, digits)}, {self.number(estimate.high, digits)}]"

    def signed(self, estimate: Estimate | None, digits: int) -> str:
        """As `written`, with a plus before a difference that is positive."""
        text = self.written(estimate, digits)
        return f"+{text}" if estimate is not None and estimate.value > 0 and float(_plain(text)) > 0 else text


_KNOWN = {
    "fid": Quantity("FID", lower=True),
    "sfid": Quantity("sFID", lower=True),
    "kid": Quantity("KID", lower=True, scale=1e-4),
    "is": Quantity("IS", lower=False),
    "precision": Quantity("precision", lower=False, scale=1e-3),
    "recall": Quantity("recall", lower=False, scale=1e-3),
    "clip": Quantity("CLIP score", lower=False),
}
_PAIRED = {
    "rmse": ("RMSE", True, "", 1e-4),
    "psnr": ("PSNR", False, "dB", 0.01),
    "ssim": ("SSIM", False, "", 1e-4),
    "lpips": ("LPIPS", True, "", 1e-4),
}


def quantity(name: str) -> Quantity:
    """The quantity of a metric's name in results.jsonl; one of an unknown name is shown as it is, higher being better."""
    if name in _KNOWN:
        return _KNOWN[name]
    matched = _SAME_SEED.fullmatch(name)
    if matched is None:
        return Quantity(name, lower=False)
    label, lower, unit, scale = _PAIRED[matched[1]]
    return Quantity(f"{label} to {_TARGETS.get(matched[2], matched[2])}", lower, unit=unit, scale=scale)


def passes(whole: float, reused: float) -> str:
    """Denoiser passes for each image: whole ones, and those that reuse cached features."""
    return f"{whole:g} + {reused:g}r" if reused else f"{whole:g}"


def seconds(value: float) -> str:
    """Seconds for an image with three digits."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.{2 - math.floor(math.log10(value))}f}" if value > 0 else "0"


def size(number: int | None) -> str:
    """Bytes in MiB."""
    if not number:
        return "–"
    mib = number / 2**20
    return f"{mib:.1f}" if mib < 100 else f"{mib:.0f}"


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    text = text.removeprefix("-") if float(text) == 0 else text
    return text.replace("-", "−")


def _plain(text: str) -> str:
    return text.split(" ")[0].replace("−", "-")
