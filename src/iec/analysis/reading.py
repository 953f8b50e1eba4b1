"""What the rows of a study say, in sentences made from the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from iec.analysis.split import totals

Row = Mapping[str, Any]


def reading(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """A few sentences for each kind of `rows` (see `study.KINDS`), in that order; none for a kind without rows."""
    return [sentence for kind, read in _READ.items() if rows.get(kind) for sentence in read(rows[kind])]


def _where(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _number(value: float) -> str:
    return f"{value:.3g}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ({_number(low)} … {_number(high)})"


def _spectral(rows: Sequence[Row]) -> list[str]:
    said = []
    growths = _where(rows, quantity="growth")
    if growths:
        top = max(growths, key=lambda row: row["norm"])
        above = sum(row["norm"] > 1 for row in growths)
        text = f"‖A + BJ‖ is above 1 at {above} of {len(growths)} steps, largest at step {top['step']} ({_number(top['norm'])})"
        if sorted(row["step"] for row in growths) == list(range(len(growths))):
            product = math.prod(row["norm"] for row in growths)
            text += f"; the product over the steps, which bounds the growth of an error, is {_number(product)}"
        said.append(f"{text}.")
    factors = sorted({row["lam"] for row in rows if row["quantity"] == "contraction"})
    good = [lam for lam in factors if all(row["norm"] < 1 for row in _where(rows, quantity="contraction", lam=lam))]
    if factors:
        shown = ", ".join(f"{lam:g}" for lam in good) or "none"
        worst = max(_where(rows, quantity="contraction"), key=lambda row: row["norm"])
        said.append(
            f"‖(1−λ)I + λBJ‖ is below 1 at every step for λ = {shown} (of {', '.join(f'{lam:g}' for lam in factors)}); the "
            f"largest is {_number(worst['norm'])}, at step {worst['step']} with λ = {worst['lam']:g}."
        )
    steps = {row["step"] for row in rows}
    least = {row["step"] for row in rows if row.get("lower_bound")}
    if least:
        said.append(
            f"At {len(least)} of {len(steps)} steps the norms are lower bounds, from finite differences, so that the true ones "
            "may be larger: the model has no exact derivative there."
        )
    return said


def _error(rows: Sequence[Row]) -> list[str]:
    last = max(row["step"] for row in rows)
    plain = _where(rows, error="accumulated", corrected=False, step=last)[0]
    said = [
        f"After the last step the efficient model is off by {_number(plain['median'])} RMS (median of {plain['num']})."
    ]
    corrected = _where(rows, error="accumulated", corrected=True, against="full", model="efficient", step=last)
    if not corrected:
        return said
    with_iec, moved = corrected[0], _where(rows, error="accumulated", model="full", step=last)[0]
    ratio, low, high = with_iec["ratio"], with_iec["ratio_low"], with_iec["ratio_high"]
    sure = low is not None and not low <= 1 <= high
    verdict = (
        "no sure difference" if not sure else "nearer to full precision" if ratio < 1 else "farther from full precision"
    )
    compared = "" if ratio is None else f", {_number(ratio)} times that{_interval(low, high)}: {verdict}"
    ideal = _where(rows, error="accumulated", against="full + IEC", step=last)
    beside = f"; from full precision with IEC it is off by {_number(ideal[0]['median'])}" if ideal else ""
    said.append(
        f"With IEC it is off by {_number(with_iec['median'])}{compared}. IEC moves full precision itself by "
        f"{_number(moved['median'])}{beside}."
    )
    local = _where(rows, error="local", corrected=True, against="full", model="efficient")
    if local:
        better = [row["step"] for row in local if row["ratio_high"] is not None and row["ratio_high"] < 1]
        # Where nothing is wrong (whole passes of a cache) there is no ratio, but whatever a correction does leads away.
        exact = {row["step"] for row in _where(rows, error="local", corrected=False) if row["median"] == 0}
        spoilt = [row["step"] for row in local if row["step"] in exact and row["median"] > 0]
        worse = [row["step"] for row in local if row["ratio_low"] is not None and row["ratio_low"] > 1]
        worse = sorted({*worse, *spoilt})
        alone = f", {len(spoilt)} of them where the model alone makes no error" if spoilt else ""
        said.append(
            f"Begun at the full-precision sample, the corrected step lies nearer to full precision's at {len(better)} of "
            f"{len(local)} steps and farther at {len(worse)}{alone}{_first(better, worse)}."
        )
    return said


def _first(better: Sequence[int], worse: Sequence[int]) -> str:
    """Where the two kinds of steps lie, where each has a side of its own."""
    if better and worse and max(better) < min(worse):
        return f" (nearer until step {max(better)}, farther from step {min(worse)} on)"
    if better and worse and max(worse) < min(better):
        return f" (farther until step {max(worse)}, nearer from step {min(better)} on)"
    return ""


def _growth(rows: Sequence[Row]) -> list[str]:
    last = max(row["step"] for row in rows)
    said = []
    for direction in dict.fromkeys(row["direction"] for row in rows):
        parts = []
        for after in sorted({row["after"] for row in rows if row["after"] < last}):
            ends = _where(rows, direction=direction, after=after, step=last)
            text = f"after step {after} it ends {_number(ends[0]['growth'])} times as large"
            text += "" if len(ends) < 2 else f" ({_number(ends[1]['growth'])} with IEC)"
            bound = ends[0].get("bound")
            parts.append(text + ("" if bound is None else f", where the norms allow {_number(bound)}"))
        what = "random" if direction == "random" else "along the model's own error"
        if parts:
            said.append(f"An error injected ({what}): {'; '.join(parts)}.")
    return said


def _split(rows: Sequence[Row]) -> list[str]:
    found = totals(rows)
    own, near = found[("estimate", None)], found.get(("random", None))
    said = [
        f"The model's error is {_number(100 * own['error'])} % of its output. At x and at IEC's estimate the errors correlate by "
        f"{own['correlation_median']:.2f} (median sample, mean over steps), so that averaging the two leaves "
        f"{own['kept_median']:.2f} of the square error; 0.5 would be left if they had nothing in common, 1 if all."
    ]
    if near is not None:
        said.append(
            f"A random point as far away gives {near['correlation_median']:.2f} and leaves {near['kept_median']:.2f}."
        )
    return said


def _residuals(rows: Sequence[Row]) -> list[str]:
    said = []
    for model in dict.fromkeys(row["model"] for row in rows):
        first = _where(rows, model=model, correction=1)
        low, high = (pick(first, key=lambda row: row["residual_median"]) for pick in (min, max))
        text = (
            f"{model}: residuals of the first correction from {_number(low['residual_median'])} (step {low['step']}) to "
            f"{_number(high['residual_median'])} (step {high['step']}; medians)"
        )
        factors = [row for row in _where(rows, model=model) if row["contraction"] is not None]
        if factors:
            worst = max(factors, key=lambda row: row["contraction"])
            text += f"; the next correction's is {_number(worst['contraction'])} of the one before at most (step {worst['step']})"
        said.append(text + ".")
    return said


_READ: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "spectral": _spectral,
    "error": _error,
    "growth": _growth,
    "split": _split,
    "residuals": _residuals,
}
