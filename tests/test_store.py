"""Files that grow line by line: torn by kills, damaged, on a full disk; and folders that one run holds."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from iec.bench.store import Lines, held


def test_lines_are_there_again(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "new" / "a.jsonl")
    assert lines.values == []
    lines.append({"b": 1, "a": "λ"})
    lines.append({"c": [1.5, None]})
    assert Lines(lines.path).values == lines.values == [{"b": 1, "a": "λ"}, {"c": [1.5, None]}]
    assert lines.path.read_text(encoding="utf-8").splitlines()[0] == '{"a": "λ", "b": 1}'


@pytest.mark.parametrize("kept", range(0, 12))
def test_a_torn_last_line_is_dropped(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.jsonl"
    whole, torn = b'{"a": 1}\n', '{"b": "λλ"}\n'.encode()
    path.write_bytes(whole + torn[:kept])
    lines = Lines(path)
    assert lines.values == [{"a": 1}] and path.read_bytes() == whole
    lines.append({"c": 2})
    assert Lines(path).values == [{"a": 1}, {"c": 2}]


@pytest.mark.parametrize("damaged", [b'{"a": 1', b"[1]", b"\x00\x00", b'{"a": "\xff"}'])
def test_damaged_lines_are_left_out_and_kept_beside(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "a.jsonl"
    before = b'{"b": 1}\n' + damaged + b'\n{"b": 2}\n'
    path.write_bytes(before)
    lines = Lines(path)
    assert lines.damaged == [2] and lines.values == [{"b": 1}, {"b": 2}]
    assert path.with_name("a.jsonl.damaged").read_bytes() == before
    assert path.read_bytes() == b'{"b": 1}\n{"b": 2}\n' and Lines(path).damaged == []


def test_a_full_disk_leaves_a_damaged_file_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'no\n{"b": 2}\n')

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RuntimeError, match=r"the disk is full"):
        Lines(path)
    assert path.read_bytes() == b'no\n{"b": 2}\n'


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Lines(tmp_path / "a.jsonl")
    lines.append({"a": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(RuntimeError, match=r"the disk is full, .*a\.jsonl was not written"):
            lines.append({"b": 2})
    assert lines.path.read_bytes() == b'{"a": 1}\n' and lines.values == [{"a": 1}]
    lines.append({"b": 2})
    assert Lines(lines.path).values == [{"a": 1}, {"b": 2}]


def test_no_number_that_json_lacks(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="Out of range float"):
        lines.append({"a": float("nan")})
    assert not lines.path.exists() and lines.values == []


def test_what_is_not_wanted_goes_aside(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "a.jsonl")
    for number in range(4):
        lines.append({"n": number})
    aside = Lines(tmp_path / "b.jsonl")
    aside.append({"n": 1})  # a kill came between
    assert lines.keep(lambda line: line["n"] % 2 == 0, aside) == 2
    assert lines.keep(lambda line: True) == 0
    assert Lines(lines.path).values == lines.values == [{"n": 0}, {"n": 2}]
    assert Lines(tmp_path / "b.jsonl").values == [{"n": 1}, {"n": 3}]


def test_one_run_at_a_time(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from iec.bench.store import held\nwith held(Path({str(tmp_path)!r})): pass"
    with held(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.returncode == 1
        assert f"another run (process {os.getpid()}) is at work in {tmp_path}" in other.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_full_disk_keeps_the_lines_that_were_to_be_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Lines(tmp_path / "a.jsonl")
    for number in range(2):
        lines.append({"a": number})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RuntimeError, match=r"the disk is full, .*a\.jsonl was not written"):
        lines.keep(lambda value: value["a"] == 1)
    monkeypatch.undo()
    assert Lines(lines.path).values == [{"a": 0}, {"a": 1}]
