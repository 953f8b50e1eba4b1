"""Every Python example of README.md and docs/ runs. The blocks of one page share their names, in order.

`<!-- no-run: reason -->` on the line above a block leaves it out.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(?P<note><!-- no-run: \S.*-->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def examples(page: Path) -> list[tuple[int, str]]:
    """The blocks of a page that are run: the line on which each begins, and its code."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start("code")), m["code"]) for m in BLOCK.finditer(text) if m["note"] is None]


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.stem)
def test_examples(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for line, code in examples(page):
        exec(compile("\n" * line + code, str(page), "exec"), names)


def test_finds_examples() -> None:
    assert examples(ROOT / "README.md")
    assert examples(ROOT / "docs" / "quickstart.md")
