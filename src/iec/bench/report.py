"""The report of a bench: report.md, and report.html with everything in it, from what the run has left in its folder so far."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from iec.artifact.files import replacing, write_text
from iec.bench.cells import REFERENCES
from iec.bench.document import Facts, facts, remarks
from iec.bench.findings import findings, headlines
from iec.bench.gallery import Picture, figures, rows_of_images, strips, unread
from iec.bench.pareto import COLOURS, Chart, chart, svg
from iec.bench.pictures import Strip, sheet, strip
from iec.bench.results import Result, Run, load_run
from iec.bench.store import room
from iec.bench.tables import Table, further, members, quality

MANY = 6  # controls beyond which they have a table of their own
FILES = "report-files"  # beside report.md: the drawings that it shows


@dataclass(frozen=True)
class Section:
    """What the report says of one group of arms."""

    title: str
    table: Table
    controls: Table | None
    further: Table | None
    charts: tuple[Chart, ...]
    findings: tuple[str, ...]
    strips: tuple[Strip, ...]


@dataclass(frozen=True)
class Report:
    """Where the report is and what it says: `run` as it was read, sentences on all arms, a section for each group, and the titled
    `rows` of images that the recipe asks for."""

    markdown: Path
    html: Path
    run: Run
    headlines: tuple[str, ...]
    sections: tuple[Section, ...]
    rows: tuple[tuple[str, list[Strip]], ...] = ()

    def plain(self) -> dict[str, Any]:
        """Plain data: what is there, what is missing, the sentences and the paths."""
        return {
            "markdown": str(self.markdown),
            "html": str(self.html),
            "finished": len(self.run.entries),
            "missing": list(self.run.missing),
            "notes": list(self.run.notes),
            "headlines": list(self.headlines),
            "groups": {section.title: list(section.findings) for section in self.sections},
        }


def report(folder: str | Path) -> Report:
    """Write report.md and report.html into the folder of a bench, finished or not, and return what they say.

    Raises ValueError as `iec.bench.results.load_run` does, RuntimeError for a full disk.
    """
    run = load_run(folder)
    run = replace(run, notes=(*run.notes, *unread(run)))
    listed = run.metrics
    groups = sorted(run.groups().items(), key=lambda pair: pair[0] == REFERENCES)  # stable: else as in the recipe
    sections = tuple(_section(run, title, group, listed) for title, group in groups)
    made = Report(
        run.folder / "report.md",
        run.folder / "report.html",
        run,
        tuple(headlines(run, listed)),
        sections,
        tuple(rows_of_images(run)),
    )
    pictures, about = figures(run), facts(run)
    with room(made.markdown):
        write_text(made.markdown, _markdown(made, about, pictures))
    with room(made.html):
        write_text(made.html, _html(made, about, pictures))
    return made


def _section(run: Run, title: str, group: Sequence[Result], listed: Sequence[str]) -> Section:
    shown = members(run, group)
    aside = _aside(shown)
    own = [name for name in listed if any(name in entry.metrics for entry in shown)]
    first, others = (own[0] if own else None), own[1:]
    # A second drawing: how near the images come to those of full precision, beside what a distribution distance says.
    near = [name for name in own if name.startswith(("rmse_", "psnr_"))]
    drawn = [chart(shown, name) for name in dict.fromkeys([*own[:1], *near[:1]])]
    return Section(
        _titled(title, run),
        quality(run, shown, first, lambda entry: entry.cell not in aside),
        quality(run, shown, first, lambda entry: entry.cell in aside) if aside else None,
        further(run, shown, others),
        tuple(one for one in drawn if one is not None),
        tuple(findings(run, group, list(dict.fromkeys([*own[:1], *near[:2]])))),
        () if _has_pictures(run) else tuple(strips(run, [entry for entry in shown if entry.cell not in aside])),
    )


def _aside(shown: Sequence[Result]) -> set[str]:
    """The cells of many controls, and of what only they are compared with: they get a table of their own."""
    controls = {entry.cell for entry in shown if entry.kind == "control"}
    others = {entry.baseline for entry in shown if entry.kind == "corrected"}
    theirs = {entry.baseline for entry in shown if entry.kind == "control"} - others
    beside = {entry.cell for entry in shown if entry.kind == "plain" and entry.cell in theirs}
    return controls | beside if len(controls) > MANY else set()


def _titled(title: str, run: Run) -> str:
    if title == REFERENCES:
        return "References"
    return title or run.about.get("title", "") or "Arms"


def _has_pictures(run: Run) -> bool:
    """Whether the recipe says itself which images are to be shown."""
    return any(one.get("kind") == "images" for one in run.about.get("recipe", {}).get("figure", []))


def _markdown(made: Report, about: Facts, pictures: Sequence[Picture]) -> str:
    """The report as text, its drawings in files beside it."""
    run = made.run
    lines = [f"# {about.title}", "", about.summary, ""]
    if about.text:
        lines += [about.text, ""]
    if about.caution:
        lines += [f"**{about.caution}**", ""]
    if run.missing:
        lines += [f"**Not finished.** {_missing(run)}", ""]
    lines += [f"- {line}" for line in made.headlines] + [""] * bool(made.headlines)
    for number, section in enumerate(made.sections, start=1):
        lines += [f"## {section.title}", "", section.table.markdown(), ""]
        for index, one in enumerate(section.charts, start=1):
            name = f"{FILES}/group{number}-{index}.svg"
            write_text(run.folder / name, svg(one) + "\n")
            lines += [f"![{one.title}]({name})", ""]
        if section.controls is not None:
            lines += ["As many evaluations, otherwise spent:", "", section.controls.markdown(), ""]
        lines += [f"- {line}" for line in section.findings] + [""] * bool(section.findings)
        if section.further is not None:
            lines += [section.further.markdown(), ""]
        if section.strips:
            lines += [_sheet(run, section.strips, f"group{number}-images", "The same seeds in every row"), ""]
    if pictures or made.rows:
        lines += ["## Figures", ""]
        for number, (title, found) in enumerate(made.rows, start=1):
            lines += [_sheet(run, found, f"images{number}", title), "", f"{title}; the same seeds in every row.", ""]
        for picture in pictures:
            path = quote(picture.path.relative_to(run.folder).as_posix())
            lines += [f"![{picture.title}]({path})", "", f"{picture.title}.", ""]
    told = [f"- {line}" for line in remarks(run)]
    lines += ["## How to read it", "", *told, ""] if told else []
    lines += ["## How it was made", "", *(f"- {name}: {value}" for name, value in about.rows), ""]
    return "\n".join(lines)


def _sheet(run: Run, found: Sequence[Strip], name: str, title: str) -> str:
    """Draw rows of images into a file, and the Markdown that shows it."""
    path = f"{FILES}/{name}.png"
    with replacing(run.folder / path) as file:
        sheet(found).save(file, format="PNG", optimize=True)
    return f"![{title}]({path})"


def _html(made: Report, about: Facts, pictures: Sequence[Picture]) -> str:
    """The report as one page that needs no other file."""
    from jinja2 import Environment
    from markupsafe import Markup

    template = (resources.files("iec") / "bench" / "templates" / "report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        about=about,
        report=made,
        missing=_missing(made.run) if made.run.missing else "",
        colours=COLOURS,
        drawing=lambda one: Markup(svg(one)),  # made by us, its texts escaped
        picture=lambda images: _embedded(strip(images)),
        figures=[(one.title, base64.b64encode(one.path.read_bytes()).decode()) for one in pictures],
        remarks=remarks(made.run),
    )


def _missing(run: Run) -> str:
    """Which arms are not there, and why, where the run knew."""
    count, failed = len(run.missing), run.about.get("failed", {})
    told = [f'"{name}"' + (f" ({failed[name]})" if name in failed else "") for name in run.missing[:12]]
    named = ", ".join(told) + (f" and {count - 12} more" if count > 12 else "")
    return (
        f"{count} {'arm is' if count == 1 else 'arms are'} missing: {named}. The same command goes on where it stopped."
    )


def _embedded(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
