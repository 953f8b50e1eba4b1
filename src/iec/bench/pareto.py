"""Quality against cost: the arms that nothing beats at once in both, and a drawing as SVG text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from iec.bench.quantities import Quantity, quantity
from iec.bench.results import Estimate, Result

COLOURS = {"reference": "#5b6472", "plain": "#2b6cb0", "corrected": "#c05621", "control": "#2f855a"}
WIDTH, HEIGHT = 500, 330
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 12, 48
CROWDED = 14  # points beyond which controls that something beats have no number
WIDE = 12  # ratio of the largest to the smallest cost beyond which the axis is logarithmic


@dataclass(frozen=True)
class Point:
    """An arm in the drawing: its number in the table, its cost, its quality with interval, and whether nothing beats it."""

    number: int
    name: str
    kind: str
    cost: float
    quality: Estimate
    best: bool = False


@dataclass(frozen=True)
class Chart:
    """Points of one metric against one cost, with what the axes say."""

    metric: Quantity
    cost: str
    points: tuple[Point, ...]

    @property
    def title(self) -> str:
        return f"{self.metric.label} against {self.cost}"


def chart(shown: Sequence[Result], metric: str) -> Chart | None:
    """The chart of a table's results by `metric`: against seconds for an image where all are timed, else against passes.

    None where fewer than two can be drawn. Reuse passes count as passes, as results do not say what they cost.
    """
    found = [
        (index + 1, result, result.metrics[metric])
        for index, result in enumerate(shown)
        if metric in result.metrics and math.isfinite(result.metrics[metric].value)
    ]
    if len(found) < 2:
        return None
    timed = all(result.timing is not None for _, result, _ in found)
    points = [
        Point(number, result.name, result.kind, cost, estimate)
        for number, result, estimate in found
        if (cost := result.timing.median if timed and result.timing is not None else float(result.evaluations)) > 0
    ]
    best = {id(point) for point in front(points, quantity(metric).lower)}
    marked = tuple(Point(p.number, p.name, p.kind, p.cost, p.quality, id(p) in best) for p in points)
    reused = any(result.reused for _, result, _ in found)
    counted = "passes for an image" + (" (those that reuse count as whole)" if reused else "")
    return Chart(quantity(metric), "seconds for an image" if timed else counted, marked)


def front(points: Sequence[Point], lower: bool) -> list[Point]:
    """The points that no other equals or beats in cost and in quality at once (beating it in one), cheapest first."""
    kept: list[Point] = []
    sign = 1.0 if lower else -1.0
    for point in sorted(points, key=lambda p: (p.cost, sign * p.quality.value)):
        if not kept or sign * point.quality.value < sign * kept[-1].quality.value:
            kept.append(point)
    return kept


def svg(drawn: Chart) -> str:
    """The chart as an SVG element: intervals as whiskers, the front as steps, numbers as in the table."""
    x, xs = _horizontal([point.cost for point in drawn.points])
    y, ys = _vertical(drawn)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="system-ui, sans-serif" '
        f'font-size="13" fill="#1a202c" aria-label="{escape(drawn.title, {chr(34): "&quot;"})}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    base = HEIGHT - BOTTOM
    for place, text in ys:
        parts.append(f'<path d="M{LEFT} {place}H{WIDTH - RIGHT}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{place + 4}" text-anchor="end">{text}</text>')
    for place, text in xs:
        parts.append(f'<path d="M{place} {base}v5" stroke="#a0aec0"/>')
        parts.append(f'<text x="{place}" y="{base + 18}" text-anchor="middle">{text}</text>')
    parts.append(f'<path d="M{LEFT} {TOP}V{base}H{WIDTH - RIGHT}" fill="none" stroke="#a0aec0"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:g}" y="{HEIGHT - 6}" text-anchor="middle">{escape(drawn.cost)}</text>')
    label = f"{drawn.metric.head.rstrip(' ↓↑')}, {'lower' if drawn.metric.lower else 'higher'} is better"
    parts.append(
        f'<text x="14" y="{(TOP + base) / 2:g}" text-anchor="middle" transform="rotate(-90 14 {(TOP + base) / 2:g})">'
        f"{escape(label)}</text>"
    )
    placed = [(point, x(point.cost), y(point.quality.value)) for point in drawn.points]
    steps = sorted((px, py) for point, px, py in placed if point.best)
    if len(steps) > 1:
        path = f"M{steps[0][0]} {steps[0][1]}" + "".join(f"H{px}V{py}" for px, py in steps[1:])
        parts.append(f'<path d="{path}" fill="none" stroke="#1a202c" stroke-dasharray="2 4"/>')
    for point, px, py in placed:
        colour, low, high = COLOURS.get(point.kind, "#1a202c"), point.quality.low, point.quality.high
        parts.append(f"<g><title>{escape(f'{point.number}: {point.name}')}</title>")
        if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
            parts.append(
                f'<path d="M{px} {y(low)}V{y(high)}" stroke="{colour}" stroke-opacity=".45" stroke-width="2"/>'
            )
        inside = colour if point.best else "#ffffff"
        parts.append(f'<circle cx="{px}" cy="{py}" r="4.5" fill="{inside}" stroke="{colour}" stroke-width="2"/></g>')
    for (point, _, _), (tx, ty) in zip(placed, _labels([(px, py) for _, px, py in placed]), strict=True):
        if len(placed) > CROWDED and point.kind == "control" and not point.best:
            continue
        colour = COLOURS.get(point.kind, "#1a202c")
        parts.append(f'<text x="{tx}" y="{ty}" text-anchor="middle" fill="{colour}">{point.number}</text>')
    return "\n".join([*parts, "</svg>"])


def _labels(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where the numbers go: beside each point, on the side that is farthest from all other points and numbers."""
    put: list[tuple[float, float]] = []
    for index, (px, py) in enumerate(points):
        others = [point for other, point in enumerate(points) if other != index] + [(tx, ty - 4) for tx, ty in put]
        sides = [
            (px + 13, py + 4),
            (px - 13, py + 4),
            (px + 9, py - 8),
            (px - 9, py - 8),
            (px + 9, py + 17),
            (px - 9, py + 17),
        ]
        inside = [(tx, ty) for tx, ty in sides if LEFT < tx < WIDTH and TOP < ty < HEIGHT - BOTTOM] or sides[:1]

        def room(side: tuple[float, float], others: list[tuple[float, float]] = others) -> float:
            # Beyond a label's width more room does not matter, so that the first side that is free is taken.
            return min([18.0, *(math.hypot(side[0] - ox, side[1] - 4 - oy) for ox, oy in others)])

        chosen = max(inside, key=room)
        put.append((round(chosen[0], 1), round(chosen[1], 1)))
    return put


def _horizontal(costs: Sequence[float]) -> tuple[_Axis, list[tuple[float, str]]]:
    low, high = min(costs), max(costs)
    if high / low > WIDE:
        low, high = low / 1.3, high * 1.3
        axis = _Axis(math.log10(low), math.log10(high), LEFT, WIDTH - RIGHT, log=True)
        marks = [
            m * 10**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)
        ]
        return axis, [(axis(mark), f"{mark:g}") for mark in marks if low <= mark <= high]
    axis = _Axis(0.0, high * 1.07, LEFT, WIDTH - RIGHT)
    return axis, [(axis(mark), f"{mark:g}") for mark in _marks(0.0, high * 1.07, 6)]


def _vertical(drawn: Chart) -> tuple[_Axis, list[tuple[float, str]]]:
    values = [v for p in drawn.points for v in (p.quality.value, p.quality.low, p.quality.high) if v is not None]
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - margin, high + margin
    axis = _Axis(low, high, HEIGHT - BOTTOM, TOP)
    return axis, [(axis(mark), f"{mark:g}") for mark in _marks(low, high, 6)]


def _marks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between `low` and `high`, at most about `most`."""
    rough = (high - low) / most
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Axis:
    """Values `low` … `high` onto pixels `begin` … `end`."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return round(self.begin + (self.end - self.begin) * (value - self.low) / (self.high - self.low), 1)
