"""What the numbers of a bench say, in sentences made from the numbers alone."""

from __future__ import annotations

from collections.abc import Sequence

from iec.bench.quantities import Quantity, passes, quantity
from iec.bench.results import Estimate, Result, Run
from iec.bench.tables import members

TIMES_EQUAL = 1.05  # measured seconds that differ by less are called as many


def headlines(run: Run, metrics: Sequence[str]) -> list[str]:
    """For each metric one sentence on all corrected arms: how many became better, worse, or cannot be told; and the paper's."""
    corrected = _corrected(run)
    lines = []
    for metric in metrics:
        known, found = quantity(metric), []
        for entry in corrected.values():
            difference = _to_baseline(run, entry, metric)
            if difference is not None and difference.low is not None:
                found.append(known.better(difference))
        if not found:
            continue
        words = ((1, "better"), (-1, "worse"), (0, "not to be told apart"))
        told = ", ".join(f"{word} in {found.count(sign)}" for sign, word in words if sign in found)
        arms = f"of {len(found)} {'arm' if len(found) == 1 else 'arms'}"
        text = f"With IEC, against the same arm without it, {known.label} is {told} {arms}"
        lines.append(text + _papers_count(run, list(corrected.values()), metric) + ".")
    return lines


def _corrected(run: Run) -> dict[str, Result]:
    """Corrected entries by cell: one that is shown in two groups is counted once, with the paper's values if it has any."""
    found: dict[str, Result] = {}
    for entry in run.entries:
        if entry.kind == "corrected" and (entry.cell not in found or entry.paper):
            found[entry.cell] = entry
    return found


def _papers_count(run: Run, corrected: Sequence[Result], metric: str) -> str:
    known = quantity(metric)
    changes = [change for entry in corrected if (change := _papers_change(run, entry, metric)) is not None]
    if not changes:
        return ""
    better = sum(change < 0 if known.lower else change > 0 for change in changes)
    return f"; in the paper it is better in {better} of the {len(changes)} that it reports"


def findings(run: Run, group: Sequence[Result], metrics: Sequence[str]) -> list[str]:
    """Sentences on the corrected arms of a group, in their order.

    Each is compared by every metric of `metrics` with the same arm without correction, by the first also with the paper's
    change and with the best way that costs no more: as few passes, whole and in all, with the same quantization; measured
    seconds decide between different ones.
    """
    lines = []
    shown = members(run, group)
    for entry in (entry for entry in group if entry.kind == "corrected"):
        parts = []
        baseline = run.baseline(entry)
        if baseline is not None:
            compared = [text for metric in metrics if (text := _change(run, entry, metric))]
            if compared:
                parts.append(f"against the same arm without IEC, for {_price(entry, baseline)}: {'; '.join(compared)}")
        rival = _rival(entry, shown, metrics[0]) if metrics else None
        if rival is not None and rival is not baseline:
            parts.append(_beside(entry, rival, quantity(metrics[0]), metrics[0]))
        if parts:
            lines.append(f"{entry.name}: {'. '.join(part[0].upper() + part[1:] for part in parts)}.")
    return lines


def _to_baseline(run: Run, entry: Result, metric: str) -> Estimate | None:
    baseline = run.baseline(entry)
    return None if baseline is None else entry.differences.get(baseline.cell, {}).get(metric)


def _papers_change(run: Run, entry: Result, metric: str) -> float | None:
    """What the paper reports for this arm less what it reports for the same without IEC."""
    known = [other.paper for other in run.entries if other.cell == entry.baseline and metric in other.paper]
    same = [paper for paper in known if metric in entry.paper]
    return entry.paper[metric] - same[0][metric] if same else None


def _change(run: Run, entry: Result, metric: str) -> str:
    known, difference = quantity(metric), _to_baseline(run, entry, metric)
    if difference is None:
        return ""
    paper = _papers_change(run, entry, metric)
    said = f" (the paper: {'+' if paper > 0 else ''}{known.number(paper, 2)})" if paper is not None else ""
    return f"{known.label} {_told(known, difference)}{said}"


def _told(known: Quantity, difference: Estimate) -> str:
    """ "2.2 [1.9, 2.6] higher, which is worse", or that it cannot be told."""
    digits = known.telling(difference)
    if difference.low is None or difference.high is None:
        way = "higher" if difference.value > 0 else "lower"
        return f"{known.number(abs(difference.value), digits)} {way} (no interval)"
    if difference.sign == 0:
        return f"not to be told apart ({known.signed(difference, digits)})"
    low, high = sorted((abs(difference.low), abs(difference.high)))
    size = Estimate(abs(difference.value), low, high)
    way = "higher" if difference.sign > 0 else "lower"
    verdict = "better" if known.better(difference) > 0 else "worse"
    return f"{known.written(size, digits)} {way}, which is {verdict}"


def _price(entry: Result, baseline: Result) -> str:
    """What the correction costs: passes, and seconds where both are measured."""
    whole, reused = entry.whole - baseline.whole, entry.reused - baseline.reused
    more = (
        f"{passes(whole, reused)} more passes"
        if whole >= 0 and reused >= 0
        else f"{passes(entry.whole, entry.reused)} passes"
    )
    if entry.timing is None or baseline.timing is None:
        return more
    share = entry.timing.median / baseline.timing.median - 1
    return f"{more} and {abs(share):.0%} {'more' if share >= 0 else 'less'} time"


def _rival(entry: Result, shown: Sequence[Result], metric: str) -> Result | None:
    """The best by `metric` of the uncorrected arms that cost no more than `entry`."""
    rivals = [
        other for other in shown if other.kind != "corrected" and metric in other.metrics and no_dearer(other, entry)
    ]
    best = min if quantity(metric).lower else max
    return best(rivals, key=lambda other: other.metrics[metric].value) if rivals and metric in entry.metrics else None


def no_dearer(other: Result, entry: Result) -> bool:
    """Whether `other` costs no more than `entry`, as far as that can be said.

    With the same layers quantized alike passes are counted: as few whole ones and as few in all, whatever a reuse pass costs.
    Between different ones, whose passes do not compare, measured seconds decide.
    """
    if all(other.arm.get(key) == entry.arm.get(key) for key in ("quant", "layers")):
        return other.whole <= entry.whole and other.evaluations <= entry.evaluations
    if other.timing is None or entry.timing is None:
        return False
    return other.timing.median <= TIMES_EQUAL * entry.timing.median


def _beside(entry: Result, rival: Result, known: Quantity, metric: str) -> str:
    """How the best of the ways that cost no more compares."""
    difference, flip = entry.differences.get(rival.cell, {}).get(metric), 1
    if difference is None:
        difference, flip = rival.differences.get(entry.cell, {}).get(metric), -1
    head = f"of the ways without IEC that cost no more, {rival.name} ({passes(rival.whole, rival.reused)} passes) is best: "
    if difference is not None:
        if flip < 0:
            low, high = difference.low, difference.high
            difference = Estimate(-difference.value, None if high is None else -high, None if low is None else -low)
        return head + f"with IEC {known.label} is {_told(known, difference)}"
    ours, theirs = entry.metrics[metric], rival.metrics[metric]
    digits = known.digits([ours, theirs])
    gain = ours.value - theirs.value
    way = "higher" if gain > 0 else "lower"
    said = "their intervals overlap"
    if _apart(ours, theirs):
        said = f"which is {'better' if (gain < 0) == known.lower else 'worse'}"
    return head + f"with IEC {known.label} is {known.number(abs(gain), digits)} {way}, {said} (not paired)"


def _apart(one: Estimate, other: Estimate) -> bool:
    """Whether two intervals have nothing in common; without both it cannot be said."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return False
    return one.low > other.high or other.low > one.high
