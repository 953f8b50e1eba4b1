"""What a running bench shows: for each cell how far it is, and messages; the command line draws it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

State = Literal["waits", "calibrates", "samples", "measures", "done", "failed"]


@dataclass
class Standing:
    """How far a cell is: `images` of `num` are there; denoiser `evaluations` per image and `seconds` per image, once known."""

    name: str
    kind: str
    group: str
    num: int
    state: State = "waits"
    images: int = 0
    evaluations: float | None = None
    seconds: float | None = None
    error: str = ""


@dataclass
class Board:
    """The cells of a bench by hash, in the order in which they are run.

    changed(): something is to be drawn anew. told(text): a message for people, which is not on the board.
    """

    standings: dict[str, Standing] = field(default_factory=dict)
    changed: Callable[[], None] = lambda: None
    told: Callable[[str], None] = lambda _: None

    def set(self, cell: str, state: State, error: str = "") -> None:
        """A cell is at another point; one that has failed stays so."""
        standing = self.standings.get(cell)
        if standing is None or standing.state == "failed" or standing.state == state:
            return
        standing.state, standing.error = state, error
        self.changed()

    def add(self, cell: str, images: int, seconds: float | None, evaluations: float | None) -> None:
        """So many more images of a cell are there; `seconds` is what they took each."""
        standing = self.standings[cell]
        standing.images += images
        if seconds is not None:
            standing.seconds = seconds
        if evaluations is not None:
            standing.evaluations = evaluations
        self.changed()

    @property
    def done(self) -> int:
        """Number of cells whose results are there."""
        return sum(standing.state == "done" for standing in self.standings.values())
