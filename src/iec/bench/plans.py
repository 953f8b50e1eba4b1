"""Cache plans side by side, as a drawing. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from iec.plan import CachePlan

WHOLE, REUSED = "#2b6cb0", "#e2e8f0"
INK = "#444444"


def plot_plans(plans: Mapping[str, CachePlan], path: str | Path) -> Path:
    """Draw a row for each plan, a cell for each step: dark where the pass is whole, light where it reuses; return `path`.

    The picture is a PNG. Plans may have different numbers of steps: all rows are equally wide, from the first (noisiest) step
    to the last. Raises ValueError for no plans, ImportError without matplotlib.
    """
    if not plans:
        raise ValueError("there are no plans to draw; expected a mapping from names to CachePlan")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing plans needs matplotlib: pip install 'iec-diffusion[plot]'") from error

    figure = Figure(figsize=(9, 0.75 + 0.42 * len(plans)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    steps = {plan.num_steps for plan in plans.values()}
    longest = max(steps)
    for row, plan in enumerate(plans.values()):
        width = longest / plan.num_steps
        axes.broken_barh([(0, longest)], (row - 0.36, 0.72), facecolors=REUSED)
        cells = [(step * width, width) for step in plan.refresh]
        axes.broken_barh(cells, (row - 0.36, 0.72), facecolors=WHOLE, edgecolors="white", linewidth=0.4)
        axes.text(longest * 1.01, row, f"{len(plan)} of {plan.num_steps}", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(plans)), list(plans), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, longest)
    if len(steps) > 1:
        axes.set_xticks([0, longest], ["first step", "last"])
    axes.set_xlabel("step: dark is a whole pass, light reuses the one before", fontsize=9, color=INK)
    axes.tick_params(length=0, labelsize=9, colors=INK)
    axes.spines[:].set_visible(False)
    path = Path(path)
    figure.savefig(path, format="png", metadata={"Software": None})
    return path
