"""How a comparison is shown: a labelled grid of images, and one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Sequence
from importlib import resources
from typing import Any

from PIL import Image

from iec.bench.arms import Outcome
from iec.bench.pareto import COLOURS
from iec.bench.pictures import Strip, sheet
from iec.bench.reading import reading


def comparison_grid(outcomes: Sequence[Outcome], columns: int = 10) -> Image.Image:
    """Rows are arms, columns the same seeds; the label gives evaluations and the PSNR to the first row."""
    return sheet([Strip(one.arm.name, one.arm.kind, _facts(one), one.images[:columns]) for one in outcomes])


def _facts(outcome: Outcome) -> str:
    close = "" if outcome.psnr is None else f", PSNR {outcome.psnr:.1f} dB"
    return f"{spent(outcome)} evaluations, {outcome.seconds:.1f} s, {mib(outcome)} MiB{close}"


def mib(outcome: Outcome) -> str:
    """The weights of the denoiser, as a reader wants them."""
    size = outcome.weights / 2**20
    return f"{size:.1f}" if size < 100 else f"{size:.0f}"


def kernels(outcomes: Sequence[Outcome]) -> str:
    """What computed the quantized denoisers; empty if there are none."""
    return ", ".join(sorted({outcome.kernel for outcome in outcomes if outcome.kernel}))


def spent(outcome: Outcome) -> str:
    """Evaluations as a reader wants them: whole forwards, and those that reused the cache."""
    return f"{outcome.evaluations - outcome.reused}+{outcome.reused}r" if outcome.reused else f"{outcome.evaluations}"


def page(outcomes: Sequence[Outcome], picture: Image.Image, *, model: str, num: int, seed: int) -> str:
    """One HTML file with everything in it: the grid, the table, quality against cost, and what the numbers say."""
    import torch
    from jinja2 import Environment

    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    template = (resources.files("iec") / "bench" / "templates" / "demo.html").read_text(encoding="utf-8")
    return (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            outcomes=outcomes,
            spent=spent,
            mib=mib,
            kernel=kernels(outcomes),
            colours=COLOURS,
            grid=base64.b64encode(buffer.getvalue()).decode(),
            chart=_chart(outcomes),
            reading=reading(outcomes),
            fid=outcomes[0].fid is not None,
            model=model,
            num=num,
            last=seed + num - 1,
            seed=seed,
            machine=f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        )
    )


def _chart(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Points of PSNR against seconds in a 640 × 300 drawing, with axis ticks."""
    compared = [o for o in outcomes if o.psnr is not None]
    width, height, left, bottom = 640, 300, 50, 40
    longest = max(o.seconds for o in compared) * 1.08
    low = min(o.psnr or 0.0 for o in compared) - 1.0
    high = max(o.psnr or 0.0 for o in compared) + 1.0

    def x(seconds: float) -> float:
        return round(left + (width - left - 10) * seconds / longest, 1)

    def y(psnr: float) -> float:
        return round(10 + (height - bottom - 10) * (high - psnr) / (high - low), 1)

    spacing = max(1, round((high - low) / 5))
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000, longest) if s >= longest / 8)
    return {
        "width": width,
        "height": height,
        "left": left,
        "base": height - bottom,
        "points": [
            {
                "x": x(o.seconds),
                "y": y(o.psnr or 0.0),
                "colour": COLOURS[o.arm.kind],
                "name": o.arm.name,
                "number": index + 1,
            }
            for index, o in enumerate(compared)
        ],
        "xs": [{"x": x(step * i), "text": f"{step * i:g}"} for i in range(int(longest * 0.97 / step) + 1)],
        "ys": [
            {"y": y(level), "text": f"{level}"} for level in range(int(low) + 1, int(high) + 1) if level % spacing == 0
        ],
    }
