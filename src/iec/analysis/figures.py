"""The figures of a study, one picture (PNG) per kind. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
INK, FAINT = "#444444", "#d9dde3"
PLAIN, CORRECTED, FULL, OTHER = "#2b6cb0", "#c05621", "#718096", "#2f855a"
SERIES = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b7791f", "#c53030", "#2c7a7b", "#4a5568", "#97266d")


def draw(kind: str, rows: Sequence[Row], path: str | os.PathLike[str], title: str | None = None) -> None:
    """Draw the rows of a kind (see `study.KINDS`) as a PNG file.

    Raises ValueError for an unknown kind or no rows, ImportError without matplotlib.
    """
    if kind not in _DRAW:
        raise ValueError(f"there is no figure of kind {kind!r}; known: {', '.join(_DRAW)}")
    if not rows:
        raise ValueError(f"there are no rows of kind {kind!r} to draw")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'iec-diffusion[plot]'") from error
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    _DRAW[kind](figure, rows)
    if title:
        figure.suptitle(title, fontsize=11, color=INK)
    figure.savefig(path, format="png", metadata={"Software": None})


def _panel(
    figure: Any, place: tuple[int, int, int], title: str, ylabel: str, xlabel: str = "step (0 is the noisiest)"
) -> Any:
    axes = figure.add_subplot(*place)
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(xlabel, fontsize=9, color=INK)
    axes.set_ylabel(ylabel, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    return axes


def _line(
    axes: Any, rows: Sequence[Row], value: str, label: str, colour: str, *, sem: bool = True, **style: Any
) -> None:
    """A value against the steps, with a band of two standard errors (`…_sem`) or its interval (`…_low`, `…_high`)."""
    rows = [row for row in rows if row.get(value) is not None]
    if not rows:
        return
    steps, values = [row["step"] for row in rows], [row[value] for row in rows]
    marker = {"marker": "o", "markersize": 3} if len(rows) < 12 else {}
    axes.plot(steps, values, label=label, color=colour, **{"linewidth": 1.6, **marker, **style})
    if not sem:
        return
    if f"{value}_low" in rows[0]:
        band = [(row[f"{value}_low"], row[f"{value}_high"]) for row in rows]
    else:
        errors = [row.get(f"{value}_sem") for row in rows]
        band = [(v - 2 * e, v + 2 * e) if e is not None else (None, None) for v, e in zip(values, errors, strict=True)]
    known = [(step, *pair) for step, pair in zip(steps, band, strict=True) if None not in pair]
    if known:
        axes.fill_between(*zip(*known, strict=True), color=colour, alpha=0.15, linewidth=0)


def _legend(axes: Any, **where: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK, **where)


def _where(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _logarithmic(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis, with plain numbers, where the values are positive and differ by more than fourfold."""
    positive = [value for value in values if value]
    if not positive or min(positive) <= 0 or max(positive) <= 4 * min(positive):
        return
    axes.set_yscale("log")
    if max(positive) < 1000 * min(positive):
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _error(figure: Any, rows: Sequence[Row]) -> None:
    kinds = [kind for kind in ("accumulated", "local") if _where(rows, error=kind)]
    titles = {"accumulated": "Distance from full precision", "local": "Error of the step alone"}
    for place, kind in enumerate(kinds):
        # A logarithm has no zero; steps without any error, as the whole passes of a cache, are passed over.
        of = [row for row in _where(rows, error=kind) if row["median"] > 0]
        axes = _panel(figure, (1, len(kinds) + 1, place + 1), titles[kind], "RMS per element: median, quartiles")
        _line(axes, _where(of, model="efficient", corrected=False), "median", "efficient", PLAIN)
        _line(
            axes, _where(of, model="efficient", corrected=True, against="full"), "median", "efficient + IEC", CORRECTED
        )
        _line(axes, _where(of, model="full", corrected=True), "median", "full + IEC", FULL, linestyle="--")
        against = _where(of, model="efficient", corrected=True, against="full + IEC")
        _line(axes, against, "median", "efficient + IEC,\nfrom full + IEC", OTHER, linestyle=":")
        _logarithmic(axes, [row["median"] for row in of])
        _legend(axes)
    axes = _panel(
        figure, (1, len(kinds) + 1, len(kinds) + 1), "Error with IEC over that without", "ratio, below 1 is better"
    )
    styles = {"accumulated": (CORRECTED, "-"), "local": (PLAIN, "--")}
    for kind in kinds:
        colour, style = styles[kind]
        ratio = _where(rows, error=kind, model="efficient", corrected=True, against="full")
        _line(
            axes,
            ratio,
            "ratio",
            {"accumulated": "accumulated", "local": "of the step alone"}[kind],
            colour,
            linestyle=style,
        )
    axes.axhline(1, color=INK, linewidth=0.8)
    _logarithmic(axes, [row["ratio"] for row in rows if row["ratio"]])
    _legend(axes)


def _growth(figure: Any, rows: Sequence[Row]) -> None:
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    titles = {
        "random": "Full precision, hit in a random direction",
        "error": "Full precision, hit along the efficient model's error",
    }
    for place, direction in enumerate(directions):
        axes = _panel(figure, (1, len(directions), place + 1), titles[direction], "growth since the injection")
        of = _where(rows, direction=direction)
        for number, after in enumerate(sorted({row["after"] for row in of})):
            colour = SERIES[number % len(SERIES)]
            _line(axes, _where(of, after=after, corrected=False), "growth", f"after step {after}", colour)
            _line(axes, _where(of, after=after, corrected=True), "growth", "", colour, linestyle="--")
            bound = [row for row in _where(of, after=after, corrected=False) if row.get("bound") is not None]
            _line(axes, bound, "bound", "", colour, linestyle=":", linewidth=1.0, marker="")
        ends = [row[key] for row in of for key in ("growth", "growth_low", "growth_high", "bound") if row.get(key)]
        _logarithmic(axes, ends)
        axes.axhline(1, color=INK, linewidth=0.8)
        axes.plot([], [], color=INK, linestyle="--", label="with IEC")
        if any(row.get("bound") is not None for row in of):
            axes.plot([], [], color=INK, linestyle=":", linewidth=1.0, label="product of the norms")
        _legend(axes)


def _split(figure: Any, rows: Sequence[Row]) -> None:
    values = {
        "correlation_median": "correlation c: median, quartiles",
        "kept_median": "share of ‖e(x)‖²: median, quartiles",
    }
    titles = ("Errors at x and x′: how far they agree", "Square error that averaging e(x), e(x′) leaves")
    for place, (value, label) in enumerate(values.items()):
        axes = _panel(figure, (1, 2, place + 1), titles[place], label)
        _line(axes, _where(rows, point="estimate"), value, "x′ = x⁰, IEC's estimate", CORRECTED)
        own = _where(rows, point="random", nominal=None)
        _line(axes, own, value, "as far as x⁰, in a random direction", PLAIN)
        for number, nominal in enumerate(sorted({row["nominal"] for row in rows if row["nominal"] is not None})):
            colour, thin = SERIES[(number + 2) % len(SERIES)], {"linewidth": 1.0, "linestyle": "--", "marker": ""}
            _line(
                axes, _where(rows, nominal=nominal), value, f"random, {nominal:g} ‖x‖ away", colour, sem=False, **thin
            )
        axes.axhline(1, color=INK, linewidth=0.8)
        axes.axhline(0.5 * place, color=INK, linewidth=0.8, linestyle=":")  # nothing in common
        axes.set_ylim(min(-0.05, *(row[value] for row in rows)), 1.1 if place == 0 else None)
        _legend(axes)


def _residuals(figure: Any, rows: Sequence[Row]) -> None:
    contracting = any(row["contraction"] is not None for row in rows)
    axes = _panel(figure, (1, 1 + contracting, 1), "Residuals of the corrections", "‖y′ − y‖ / ‖y‖: median, quartiles")
    second = _panel(figure, (1, 2, 2), "Residual over the one before", "ratio: geometric mean") if contracting else None
    for model, correction in dict.fromkeys((row["model"], row["correction"]) for row in rows):
        of, style = _where(rows, model=model, correction=correction), {"linestyle": "--" if model == "full" else "-"}
        colour = SERIES[(correction - 1) % len(SERIES)]
        _line(axes, of, "residual_median", f"{model}, correction {correction}", colour, **style)
        if second is not None and correction > 1:
            _line(second, of, "contraction", f"{model}, correction {correction}", colour, **style)
    _logarithmic(axes, [row["residual_median"] for row in rows])
    _legend(axes)
    if second is not None:
        second.axhline(1, color=INK, linewidth=0.8)
        _legend(second)


def _spectral(figure: Any, rows: Sequence[Row]) -> None:
    rows = [{**row, "norm_low": row["least"], "norm_high": row["most"]} for row in rows]
    growths, contractions = _where(rows, quantity="growth"), _where(rows, quantity="contraction")
    panels = bool(growths) + bool(contractions)
    least = " (lower bounds)" if any(row.get("lower_bound") for row in rows) else ""
    if growths:
        axes = _panel(
            figure,
            (1, panels, 1),
            "Full precision: growth of an error in a step",
            f"‖A + B J‖{least}: mean, least, most",
        )
        _line(axes, growths, "norm", "", PLAIN)
        axes.axhline(1, color=INK, linewidth=0.8)
        _logarithmic(axes, [row["norm"] for row in growths])
    if contractions:
        axes = _panel(
            figure, (1, panels, panels), "Full precision: contraction of a correction", f"‖(1−λ) I + λ B J‖{least}"
        )
        for number, lam in enumerate(sorted({row["lam"] for row in contractions})):
            _line(axes, _where(contractions, lam=lam), "norm", f"λ = {lam:g}", SERIES[number % len(SERIES)])
        axes.axhline(1, color=INK, linewidth=0.8)
        _logarithmic(axes, [row["norm"] for row in contractions])
        _legend(axes, ncols=2)


_DRAW: dict[str, Callable[[Any, Sequence[Row]], None]] = {
    "spectral": _spectral,
    "error": _error,
    "growth": _growth,
    "split": _split,
    "residuals": _residuals,
}
