"""The report of a bench, made from files written by hand: what it says, what it refuses, and runs that are not finished."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import benchfolder
from iec.bench.findings import findings, headlines, no_dearer
from iec.bench.pareto import Point, chart, front, svg
from iec.bench.quantities import quantity, seconds
from iec.bench.report import report
from iec.bench.results import Estimate, Result, load_run
from iec.bench.tables import members, quality
from iec.cli.app import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchfolder.write(tmp_path_factory.mktemp("bench"), images=12)


def cells(markdown: str, name: str) -> list[str]:
    """The cells of the first row of a Markdown table whose arm is `name`."""
    line = next(line for line in markdown.splitlines() if line.startswith("|") and f"| {name} |" in line)
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_the_report_shows_every_number(folder: Path) -> None:
    made = report(folder)
    text = made.markdown.read_text()
    assert cells(text, "W8A8 + IEC all") == [
        "3", "W8A8 + IEC all", "200", "3.76", "27.9 [25.1, 30.7]", "**+5.5 [4.8, 6.3]** worse", "**+6.7 [5.7, 7.7]** worse",
        "0.240 (0.216–0.288)", "1024", "1.6",
    ]  # fmt: skip
    assert cells(text, "*W8A8, 200 steps (Euler)*")[3:7] == ["–", "22.1 [19.9, 24.3]", "–", "+0.9 [−0.1, 1.9]"]
    assert "−0.0080 [−0.0090, −0.0060]** better" in text
    assert cells(text, r"DeepCache 1:5 \| branch 0")[2] == "20 + 80r", "a | in a name must not end its cell"
    assert "`iec bench table1-bundled --controls`" in text and "seeds: 0 to 1999" in text
    assert "A Processor, 2 cores, AVX512, avx512_vnni" in text and "torch 2.13.0" in text
    drawings = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(drawings) == 6 and all((folder / name).is_file() for name in drawings)
    for name in drawings:
        if name.endswith(".svg"):
            ElementTree.fromstring((folder / name).read_text())
    with Image.open(folder / "report-files" / "group1-images.png") as picture:
        # Row r holds shades 9 * seed + r: those of the sixth seed stand in the sixth place.
        assert picture.getpixel((350 + 5 * 60 + 20, 4 + 3 * 60 + 20)) == (48, 48, 48)


def test_the_page_needs_no_other_file(folder: Path) -> None:
    page = report(folder).html.read_text()
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert page.count("<svg") == 4 and page.count("data:image/png;base64,") == 8
    assert "✗ +5.5 [4.8, 6.3]" in page and "✓ −0.0080" in page
    for line in benchfolder.lines():
        assert line["name"].replace("&", "&amp;") in page


def test_texts_of_a_recipe_cannot_become_markup(tmp_path: Path) -> None:
    found = benchfolder.lines()[:3]
    found[1]["name"] = 'W8A8 <script>"x"</script>'
    recipe = {**benchfolder.RUN["recipe"], "title": "<b>T</b>", "about": "a <i>b</i>"}
    benchfolder.write(tmp_path, found, images=2, cells=benchfolder.planned(found), recipe=recipe)
    page = report(tmp_path).html.read_text()
    assert "<script>" not in page and "<b>T</b>" not in page and "<i>b</i>" not in page
    assert "&lt;script&gt;" in page


def test_sentences_come_from_the_numbers(folder: Path) -> None:
    run = load_run(folder)
    first, second = headlines(run, ["fid", "rmse_full"])
    assert first.endswith("FID is worse in 2 of 2 arms; in the paper it is better in 2 of the 2 that it reports.")
    assert second.endswith("RMSE to full precision is better in 1, worse in 1 of 2 arms.")
    (line,) = findings(run, run.groups()["cached"], ["fid", "rmse_full"])
    assert "20 more passes and 50% more time: FID 2.2 [1.9, 2.6] higher, which is worse (the paper: −0.90)" in line
    assert "RMSE to full precision 0.0080 [0.0060, 0.0090] lower, which is better" in line
    assert "DeepCache 1:5, 120 steps (Euler) (24 + 96r passes) is best: with IEC FID is 3.1 higher" in line
    assert "not paired" in line


def test_a_paired_difference_to_the_control_is_used(tmp_path: Path) -> None:
    found = benchfolder.lines()
    found[6]["differences"]["e" * 16] = benchfolder.difference((-3.1, -3.6, -2.5))
    run = load_run(benchfolder.write(tmp_path, found))
    (line,) = findings(run, run.groups()["cached"], ["fid"])
    assert line.endswith("with IEC FID is 3.1 [2.5, 3.6] higher, which is worse.")
    table = quality(run, members(run, run.groups()["cached"]), "fid")
    place = table.heads.index("− with IEC")
    assert [row.cells[place].text for row in table.rows if row.kind == "control"] == ["−3.1 [−3.6, −2.5]"]
    assert "− with IEC" not in quality(run, members(run, run.groups()["quantized"]), "fid").heads


def test_without_a_paired_difference_only_intervals_that_lie_apart_tell(tmp_path: Path) -> None:
    found = benchfolder.lines()

    def told(width: float) -> str:
        for line in found:
            value = line["metrics"]["fid"]["value"]
            line["metrics"]["fid"] |= {"low": value - width, "high": value + width}
        run = load_run(benchfolder.write(tmp_path / f"{width}", found))
        (line,) = findings(run, run.groups()["cached"], ["fid"])
        return line

    assert told(1.5).endswith("with IEC FID is 3.1 higher, which is worse (not paired).")
    assert told(1.6).endswith("with IEC FID is 3.1 higher, their intervals overlap (not paired).")


def test_a_difference_whose_interval_holds_zero_is_not_told(tmp_path: Path) -> None:
    found = benchfolder.lines()
    found[5]["differences"]["d" * 16] = benchfolder.difference((-0.4, -1.2, 0.3))
    run = load_run(benchfolder.write(tmp_path, found))
    (line,) = findings(run, run.groups()["cached"], ["fid"])
    assert "FID not to be told apart (−0.4 [−1.2, 0.3])" in line
    assert "worse in 1, not to be told apart in 1 of 2 arms" in headlines(run, ["fid"])[0]
    table = quality(run, members(run, run.groups()["cached"]), "fid")
    row = next(row for row in table.rows if row.kind == "corrected")
    assert [cell.tone for cell in row.cells[5:7]] == ["", "worse"]


def test_what_costs_no_more() -> None:
    cheap = Result("a", "a", "plain", "", {"quant": "w8a8"}, None, 10, 20, 80, 1, None, {}, {})
    assert no_dearer(cheap, replace(cheap, whole=40)) and not no_dearer(replace(cheap, whole=40), cheap)
    # More whole passes are dearer, though all together are fewer: what a reuse pass costs is not known.
    assert not no_dearer(replace(cheap, whole=30, reused=0), cheap)
    assert not no_dearer(replace(cheap, arm={}), cheap), "passes in full precision do not compare without seconds"


def test_higher_is_better_for_some() -> None:
    assert quantity("is").better(Estimate(1.0, 0.5, 1.5)) == 1
    assert quantity("fid").better(Estimate(1.0, 0.5, 1.5)) == -1
    assert quantity("psnr_fine").better(Estimate(-1.0, -1.5, -0.5)) == -1
    assert quantity("clip").better(Estimate(1.0, -0.5, 1.5)) == 0 and quantity("kid").better(Estimate(1.0)) == 0


@pytest.mark.parametrize(
    ("name", "estimate", "text"),
    [
        ("fid", Estimate(21.23, 19.1, 23.4), "21.2 [19.1, 23.4]"),
        ("fid", Estimate(4.1876), "4.19"),
        ("kid", Estimate(0.00728, 0.0062, 0.0083), "0.0073 [0.0062, 0.0083]"),
        ("kid", Estimate(7.28, 6.2, 8.3), "7.3 [6.2, 8.3]"),
        ("rmse_full", Estimate(0.056, 0.052, 0.06), "0.056 [0.052, 0.060]"),
        ("fid", Estimate(-0.0004), "0.00"),
        ("fid", Estimate(math.nan, math.nan, math.nan), "nan [nan, nan]"),
    ],
)
def test_digits_follow_the_interval(name: str, estimate: Estimate, text: str) -> None:
    known = quantity(name)
    assert known.written(estimate, known.digits([estimate])) == text


@pytest.mark.parametrize(
    ("bounds", "text"),
    [((4.0, 0.3, 8.0), "+4.0 [0.3, 8.0]"), ((4.0, -0.3, 8.0), "+4 [0, 8]"), ((-4.0, -8, -1), "−4 [−8, −1]")],
)
def test_an_interval_without_zero_does_not_read_as_if_it_had_it(bounds: tuple[float, ...], text: str) -> None:
    known, found = quantity("fid"), Estimate(*bounds)
    assert known.signed(found, known.telling(found)) == text


def test_seconds_have_three_digits() -> None:
    assert [seconds(value) for value in (0.01234, 0.5, 1.234, 12.34, 123.4)] == [
        "0.0123",
        "0.500",
        "1.23",
        "12.3",
        "123",
    ]


def test_nothing_is_both_cheaper_and_better_than_the_front() -> None:
    points = [
        Point(index, str(index), "plain", cost, Estimate(value))
        for index, (cost, value) in enumerate([(1, 9), (2, 5), (2, 4), (3, 6), (4, 4), (5, 1)])
    ]
    assert [point.number for point in front(points, lower=True)] == [0, 2, 5]
    assert [point.number for point in front(points, lower=False)] == [0], "the cheapest is also the highest"


def test_the_drawing_holds_what_it_should(folder: Path) -> None:
    run = load_run(folder)
    shown = members(run, run.groups()["cached"])
    drawn = chart(shown, "fid")
    assert drawn is not None and drawn.cost == "seconds for an image"
    assert [point.number for point in drawn.points if point.best] == [1, 2, 4]
    root = ElementTree.fromstring(svg(drawn))
    space = "{http://www.w3.org/2000/svg}"
    places = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in root.iter(f"{space}circle")]
    # Dearer is farther right, a higher (worse) FID farther up; all inside.
    assert [index for index, _ in sorted(enumerate(places), key=lambda pair: pair[1])] == [1, 3, 2, 0]
    assert min(places, key=lambda place: place[1]) == places[2]
    _, _, width, height = map(float, root.get("viewBox", "").split())
    assert all(0 < x < width and 0 < y < height for x, y in places)
    untimed = [replace(entry, timing=None) for entry in shown]
    drawn = chart(untimed, "fid")
    assert drawn is not None and "passes" in drawn.cost and [p.cost for p in drawn.points] == [100, 100, 120, 120]
    assert chart(shown[:1], "fid") is None and chart(shown, "is") is None


def test_a_run_that_is_not_finished_says_so(tmp_path: Path) -> None:
    benchfolder.write(tmp_path, benchfolder.lines()[:2])
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"version": 1, "cell": "bbb')
    made = report(tmp_path)
    assert len(made.run.entries) == 2 and len(made.run.missing) == 5
    text = made.markdown.read_text()
    assert '**Not finished.** 5 arms are missing: "W8A8 + IEC all", ' in text
    assert "The last line of results.jsonl is torn" in text
    assert "5 arms are missing" in made.html.read_text()


def test_a_run_without_results_has_a_report(tmp_path: Path) -> None:
    benchfolder.write(tmp_path, [])
    made = report(tmp_path)
    assert len(made.run.missing) == 7 and "7 arms are missing" in made.html.read_text()
    for name in ("results.jsonl", "timings.jsonl"):
        (tmp_path / name).unlink()
    bare = report(tmp_path)
    text = bare.markdown.read_text()
    assert bare.sections == () and "nothing is measured yet" in text and "How to read it" not in text


def test_one_cell_may_stand_in_two_groups(tmp_path: Path) -> None:
    found = benchfolder.lines()[:2]
    again = {**benchfolder.planned(found)[1], "name": "the same again", "group": "sweep", "paper": {"fid": 9.0}}
    run = load_run(benchfolder.write(tmp_path, found, cells=[*benchfolder.planned(found), again]))
    assert [entry.name for entry in run.entries] == ["DDIM, 100 steps", "W8A8", "the same again"]
    (first, second) = members(run, run.groups()["sweep"])
    bare = load_run(
        benchfolder.write(tmp_path / "bare", found, cells=[*benchfolder.planned(found), {**again, "paper": None}])
    )
    assert [entry.paper.get("fid") for entry in bare.entries] == [4.19, 4.32, None], (
        "the paper's value of another table"
    )
    assert first.name == "DDIM, 100 steps" and (second.name, second.paper) == ("the same again", {"fid": 9.0})


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("run.json", "{", "run.json is damaged"),
        ("results.jsonl", '{"version": 2}\n', "version is 2, expected 1"),
        ("results.jsonl", '{"version": 1, "cell": "a"}\n', "line 1: no key 'name'"),
        ("timings.jsonl", '{"cell": "a", "seconds": 1}\n', "timings.jsonl, line 1: expected the keys"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, file: str, text: str, message: str) -> None:
    benchfolder.write(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        report(tmp_path)


def test_a_damaged_line_is_left_out_and_noted(tmp_path: Path) -> None:
    benchfolder.write(tmp_path)
    for file in ("results.jsonl", "timings.jsonl"):
        first, *others = (tmp_path / file).read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / file).write_text("".join([first, '{"version": 1\n', *others]), encoding="utf-8")
    whole, run = load_run(benchfolder.write(tmp_path / "whole")), load_run(tmp_path)
    assert run.entries == whole.entries
    assert run.notes == tuple(
        f"Line 2 of {file} is damaged and was left out; the same iec bench command mends it."
        for file in ("timings.jsonl", "results.jsonl")
    )


def test_a_damaged_shard_leaves_its_row_out(tmp_path: Path) -> None:
    benchfolder.write(tmp_path, images=3)
    (tmp_path / "cells" / ("a" * 16) / "000000.npz").write_bytes(b"PK\x03\x04 torn")
    shown = report(tmp_path).sections[0].strips
    assert [strip.name for strip in shown] == ["DDIM, 100 steps", "W8A8 + IEC all", "W8A8, 200 steps (Euler)"]
    assert all(len(strip.images) == 3 for strip in shown)
    told = 'Images of "W8A8" are damaged and not shown; the same iec bench command makes them again.'
    assert told in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_the_command(folder: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(folder), "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told["finished"] == 7 and told["missing"] == [] and set(told["groups"]) == {"quantized", "cached"}
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert done.exit_code == 0 and "report.html" in done.stdout and "FID is worse in 2 of 2" in done.stdout
    done = CliRunner().invoke(app, ["report", str(folder / "cells")])
    assert done.exit_code == 2 and "is no folder of a bench" in done.stderr


def test_many_controls_have_a_table_of_their_own(tmp_path: Path) -> None:
    found = benchfolder.lines()
    many = [{**found[6], "cell": f"{index:016x}", "name": f"control {index}"} for index in range(9)]
    for line in many:
        line["cell"] = "9" + line["cell"][1:]
    many[0]["baseline"] = "8" * 16  # of a control that corrects, in another way
    bare = {
        **found[3],
        "cell": "8" * 16,
        "name": "9 steps (DDIM, clip_sample=False)",
        "kind": "plain",
        "group": "cached",
    }
    found = [*found[:6], bare, *many]
    run = {**benchfolder.RUN["recipe"]["run"], "scheduler_options": {"clip_sample": False}}
    recipe = {**benchfolder.RUN["recipe"], "run": run}
    benchfolder.write(tmp_path, found, images=2, cells=benchfolder.planned(found), recipe=recipe)
    section = report(tmp_path).sections[1]
    assert section.controls is not None
    kinds = [[row.kind for row in table.rows] for table in (section.table, section.controls)]
    assert kinds == [["reference", "plain", "corrected"], ["plain", *["control"] * 9]]
    assert section.controls.rows[0].cells[1].text == "9 steps (DDIM)", "options of all arms are no part of a name"
    assert section.controls.rows[0].cells[0].text == "4", "rows are numbered as in the drawing"
    assert len(section.strips) == 3
    assert "As many evaluations, otherwise spent" in (tmp_path / "report.md").read_text()


def test_images_and_figures_of_the_recipe(tmp_path: Path) -> None:
    wanted = [
        {"kind": "images", "title": "Two ways", "arms": ["W8A8 + IEC all", "W8A8", "not there"]},
        {"kind": "error", "title": "Error along the trajectory"},
    ]
    recipe = {**benchfolder.RUN["recipe"], "figure": wanted}
    benchfolder.write(tmp_path, images=3, recipe=recipe, stand_in="ddpm-cifar10")
    drawn = tmp_path / "figures" / "Error along the trajectory"
    drawn.mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(drawn / "error.png")
    made = report(tmp_path)
    ((title, rows),) = made.rows
    assert title == "Two ways" and [row.name for row in rows] == ["W8A8 + IEC all", "W8A8"]
    assert not any(section.strips for section in made.sections), "the recipe says what is to be shown"
    text, page = made.markdown.read_text(), made.html.read_text()
    assert "](figures/Error%20along%20the%20trajectory/error.png)" in text and "](report-files/images1.png)" in text
    assert page.count("data:image/png;base64,") == 3
    assert "a random stand-in" in text and "a random stand-in" in page


def test_rows_of_fewer_images_say_so(tmp_path: Path) -> None:
    found = benchfolder.lines()
    found[0] = {**found[0], "num": 150, "group": "references"}
    benchfolder.write(tmp_path, found, cells=benchfolder.planned(found))
    made = report(tmp_path)
    assert "DDIM, 100 steps (150 images)" in made.markdown.read_text()
    assert "6 arms, 2,000 images each" in made.markdown.read_text(), "a reference is no arm"
    assert [section.title for section in made.sections] == ["quantized", "cached", "References"]


def test_a_group_without_metrics_shows_what_it_cost(tmp_path: Path) -> None:
    found = benchfolder.lines()
    found[0] |= {"metrics": {}, "group": "references", "paper": None}
    benchfolder.write(tmp_path, found[:1], cells=benchfolder.planned(found[:1]))
    (section,) = report(tmp_path).sections
    assert section.table.heads == ("", "arm", "passes", "s / image", "peak MiB", "weights MiB")
    assert section.charts == () and section.findings == () and section.further is None


def test_images_come_from_as_many_shards_as_it_takes(tmp_path: Path) -> None:
    benchfolder.write(tmp_path, images=3)
    for line in benchfolder.lines():
        shades = np.arange(3, 9, dtype=np.uint8)[:, None, None, None]
        np.savez(tmp_path / "cells" / line["cell"] / "000003.npz", images=np.broadcast_to(shades, (6, 1, 28, 28)))
    (first, *_) = report(tmp_path).sections[0].strips
    assert first.images[:, 0, 0, 0].tolist() == [0, 9, 18, 3, 4, 5, 6, 7, 8]


def test_a_full_disk_is_told_and_the_report_before_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = report(benchfolder.write(tmp_path)).html.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(RuntimeError, match=r"the disk is full, .*report\.md was not written"):
            report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
