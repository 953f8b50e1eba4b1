"""The numbers of single samples, written line by line while they are computed, so that a killed study goes on from them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iec.artifact.files import write_text

Row = dict[str, Any]


class Samples:
    """Rows in the JSON lines file `path`, whose first line says what they are about.

    A last line that a kill has torn is dropped. Raises ValueError for a file of another study, or a damaged one.
    """

    def __init__(self, path: str | os.PathLike[str], about: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.rows: list[Row] = []
        if not self.path.is_file():
            write_text(self.path, _line({"about": about}))
            return
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        try:
            first, *rest = [json.loads(line) for line in whole.splitlines()]
            found = first["about"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: damaged: {error}; delete it to compute it anew") from error
        if found != about:
            raise ValueError(f"{self.path} is of another study; choose another folder, or delete that file")
        self.rows = rest
        if whole != text:
            write_text(self.path, whole)

    def keep(self, rows: Sequence[Row]) -> None:
        """Append rows; they are on the disk when this returns."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(_line(row) for row in rows))
            file.flush()
            os.fsync(file.fileno())


def _line(value: Any) -> str:
    return json.dumps(value) + "\n"
