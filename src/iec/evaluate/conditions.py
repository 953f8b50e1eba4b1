"""What a pipeline is called with beside the seed, as plain data, so that image i gets the same in every process and order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iec.artifact.plain import plain, short
from iec.pipeline.batches import PER_IMAGE

RULES = ("each", "cycle", "random", "list", "file")


@dataclass(frozen=True)
class Conditions:
    """Arguments of a pipeline by name.

    `class_labels`, `prompt`, `prompt_2`, `negative_prompt`, ... have one value per image: a single one for all, or a table of one
    rule, i being the number of the image from 0 on:

        {"each": 50}       i // 50, for class labels: 50 images of class 0, then 50 of class 1, ...
        {"cycle": 1000}    i % 1000: one image of each class in turn, so that any part of them holds all classes
        {"random": 1000}   a number in 0..999 that depends on `seed` and i alone
        {"list": [...]}    entry i
        {"file": PATH}     line i of a text file (UTF-8)

    `prompts` is another word for `prompt`. All else ("guidance_scale", "eta", ...) is the same for all images.

    Args:
        given: the arguments.
        seed: of the random ones.
        folder: what relative paths are relative to.

    Raises ValueError for a rule that is none, TypeError for what is no plain data.
    """

    given: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    folder: Path = Path()

    def __post_init__(self) -> None:
        held = plain(self.given, "conditions")
        if "prompts" in held:
            if "prompt" in held:
                raise ValueError("conditions: both prompt and prompts are given, which mean the same; leave one out")
            held = {"prompt" if key == "prompts" else key: value for key, value in held.items()}
        for name, value in held.items():
            if name in PER_IMAGE:
                held[name] = self._rule(name, value)
        object.__setattr__(self, "given", held)

    def _rule(self, name: str, value: Any) -> Any:
        """The value, a file of it read; checked."""
        if isinstance(value, list):
            value = {"list": value}
        if not isinstance(value, dict):
            return value
        if len(value) != 1 or next(iter(value)) not in RULES:
            raise ValueError(
                f"conditions: {name} is {short(value)}, expected one value, or a table of one of {', '.join(RULES)}"
            )
        rule, of = next(iter(value.items()))
        if rule in ("each", "cycle", "random") and not (isinstance(of, int) and not isinstance(of, bool) and of > 0):
            raise ValueError(f"conditions: {name}.{rule} is {short(of)}, expected a positive whole number")
        if rule == "list" and not (isinstance(of, list) and of):
            raise ValueError(f"conditions: {name}.list is {short(of)}, expected a list that is not empty")
        if rule == "file":
            return {"list": self._lines(name, of)}
        return value

    def _lines(self, name: str, file: Any) -> list[str]:
        if not isinstance(file, str):
            raise ValueError(f"conditions: {name}.file is {short(file)}, expected the path of a text file")
        path = self.folder / Path(file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"conditions: {name}: {path} cannot be read as text: {error}") from error
        if not lines:
            raise ValueError(f"conditions: {name}: {path} is empty, expected a line for each image")
        return lines

    def of(self, indices: Sequence[int]) -> dict[str, Any]:
        """The arguments of a call for the images of these numbers: lists where images differ. Plain data.

        Raises ValueError when there are fewer values than images.
        """
        return {name: self._values(name, value, indices) for name, value in self.given.items()}

    def _values(self, name: str, value: Any, indices: Sequence[int]) -> Any:
        if name not in PER_IMAGE or not isinstance(value, dict):
            return value
        rule, of = next(iter(value.items()))
        if rule == "each":
            return [index // of for index in indices]
        if rule == "cycle":
            return [index % of for index in indices]
        if rule == "random":
            return [_drawn(self.seed, name, index, of) for index in indices]
        if max(indices) >= len(of):
            raise ValueError(
                f"conditions: {name} has {len(of)} values, but image {max(indices)} is asked for; give as many as images"
            )
        return [of[index] for index in indices]

    def identity(self) -> dict[str, Any]:
        """What they are, as plain data: a list by its hash, wherever it came from, and the seed only where it matters."""
        held: dict[str, Any] = {}
        for name, value in self.given.items():
            if name in PER_IMAGE and isinstance(value, dict):
                rule, of = next(iter(value.items()))
                if rule == "random":
                    value = {**value, "seed": self.seed}
                elif rule == "list":
                    value = {"sha256": hashlib.sha256("\0".join(map(repr, of)).encode()).hexdigest(), "count": len(of)}
            held[name] = value
        return held


def _drawn(seed: int, name: str, index: int, count: int) -> int:
    """A number in 0..count − 1: a hash, the same by every release of every library."""
    digest = hashlib.sha256(f"iec {seed} {name} {index}".encode()).digest()
    return int.from_bytes(digest, "big") % count
