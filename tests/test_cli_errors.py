"""How the command line shows errors, warnings and interruptions; files that cannot be written are told before the work."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from iec.cli.app import app
from iec.cli.outputs import check_file, check_folder
from iec.evaluate.images import save_each
from iec.evaluate.workers import TaskErrors, TaskFailed


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def iec(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def meeting(event: BaseException | Warning, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`iec info` in which `event` is raised, or warned of."""

    def happens(*_: object) -> dict[str, Any]:
        if isinstance(event, Warning):
            warnings.warn(event, stacklevel=1)
            return {}
        raise event

    monkeypatch.setattr("iec.cli.info._everything", happens)
    return iec("info")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOENT, "no such file or folder"),
        (errno.EISDIR, "a folder, where a file is needed"),
        (errno.ENOTDIR, "a file stands where a folder is needed"),
        (errno.EEXIST, "a file stands where a folder is needed"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "can only be read"),
        (errno.ENOSPC, "the disk is full; make room"),
        (errno.EDQUOT, "the disk is full; make room"),
    ],
)
def test_errors_of_the_system_say_what_to_do(number: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for files, named in (((), ""), (("a.png",), "a.png: "), ((".a.png.x1", None, "a.png"), "a.png: ")):
        result = meeting(OSError(number, os.strerror(number), *files), monkeypatch)
        assert result.exit_code == 2 and result.stderr.startswith(f"error: {named}{message}"), result.stderr
        assert "Errno" not in result.stderr and len(result.stderr.splitlines()) == 1


class Odd(RuntimeError):
    """An error of another library."""


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (RuntimeError("the disk is full"), "the disk is full"),
        (ImportError("needs pyarrow"), "needs pyarrow"),
        (TypeError("images are float32"), "images are float32"),
        (FileNotFoundError("no page"), "no page"),
        (TaskErrors({"0": TaskFailed("0", "ValueError", "bad")}, {}, 2), "1 of 2 tasks failed; what"),
        (Odd("cuda is out of memory"), "Odd: cuda is out of memory"),
        (OSError(errno.EIO, "Input/output error"), "[Errno 5] Input/output error"),
    ],
)
def test_classes_are_named_where_they_tell_something(
    error: Exception, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = meeting(error, monkeypatch)
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {shown}")


def test_faults_of_ours_and_closed_pipes_are_not_told_as_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(meeting(KeyError("fault"), monkeypatch).exception, KeyError)
    closed = meeting(BrokenPipeError(errno.EPIPE, "Broken pipe"), monkeypatch)
    assert closed.exit_code == 1 and "error" not in closed.stderr


@pytest.mark.filterwarnings("default")
def test_warnings_are_shown_without_the_line_that_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    shows = warnings.showwarning
    result = meeting(RuntimeWarning("shard-00000005.npz: damaged"), monkeypatch)
    assert result.exit_code == 0 and result.stderr == "warning: shard-00000005.npz: damaged\n"
    assert warnings.showwarning is shows


def test_an_interruption_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    result = meeting(KeyboardInterrupt(), monkeypatch)
    assert result.exit_code == 130 and result.stderr == "Stopped.\n"


def test_interrupted_sampling_and_analysis_say_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("iec.evaluate.sampling.sample", interrupted)
    monkeypatch.setattr("iec.analysis.study.analyse", interrupted)
    sampled = iec("sample", "fashion-mnist", "--num", 1)
    assert sampled.exit_code == 130 and "nothing is kept. With --shards DIR" in " ".join(sampled.stderr.split())
    analysed = iec("analyze", "fashion-mnist", "--out", "kept [here]")
    assert analysed.exit_code == 130 and "is in kept [here]. The same command goes on from there." in analysed.stderr


def test_checks_of_files_make_nothing_and_let_pass_what_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    before = sorted(tmp_path.rglob("*"))
    for file in ("file", "new", "far/away/new", str(tmp_path / "far" / "new")):
        check_file("--out", Path(file))
    for folder in (".", "far/away", str(tmp_path)):
        check_folder("--out", Path(folder))
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "old"


NEEDED = {  # options for which there is nothing to be written, and what is said of each
    "folder": "a folder, expected a file",
    "file/x.png": "file is a file, so there can be no folder of that name",
    "/dev/null": "no ordinary file",
    "/proc/x.png": "nothing can be written in /proc",
}


@pytest.mark.parametrize("file", NEEDED)
@pytest.mark.parametrize("shards", [(), ("--shards", "shards")])
def test_what_cannot_be_written_is_told_before_a_model_is_loaded(
    file: str, shards: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("iec.load", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr("iec.cli.sample.into_shards", lambda *_, **__: pytest.fail("shards were made"))
    for options in (("--out", file), *([("--save-images", file)] if file not in ("folder", "/dev/null") else [])):
        result = iec("sample", "fashion-mnist", *options, *shards)
        assert result.exit_code == 2 and f"{' '.join(options)}: " in result.stderr, result.output
        assert NEEDED[file] in result.stderr
    assert sorted(tmp_path.rglob("*")) == before
    if file not in ("folder", "/dev/null"):
        analysed = iec("analyze", "fashion-mnist", "--out", file)
        assert analysed.exit_code == 2 and NEEDED[file] in analysed.stderr


def test_a_full_disk_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save_each(torch.zeros(8, 1, 28, 28, dtype=torch.uint8), tmp_path / "images", range(8))
    monkeypatch.setattr(os, "fsync", full)
    drawn = iec("sample", "fashion-mnist", "--num", 1, "--num-inference-steps", 1, "--out", "grid.png")
    assert drawn.exit_code == 2 and "grid.png: the disk is full; make room" in drawn.stderr
    for form in ((), ("--json",)):
        shown = iec("evaluate", "images", "--metrics", "is", "--draws", 0, "--save", "kept.safetensors", *form)
        assert shown.exit_code == 2 and "kept.safetensors: the disk is full" in shown.stderr
        assert "is" in shown.stdout and "8" in shown.stdout  # the numbers are not lost
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_an_unknown_kind_of_analysis_is_named() -> None:
    for what, named in (("eror", "eror"), ("error,eror,x", "eror, x"), (",", "nothing")):
        result = iec("analyze", "fashion-mnist", "--what", what)
        assert result.exit_code == 2
        assert f"--what: {named} is no kind of analysis; expected some of spectral, error, growth" in result.stderr


def test_an_unknown_model_is_told_with_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "folder").mkdir()
    for command in (("sample", "nomodel"), ("evaluate", "--model", "nomodel"), ("analyze", "nomodel")):
        result = iec(*command)
        assert result.exit_code == 2 and "stacktrace" not in result.stderr
        assert "no model 'nomodel': neither bundled (fashion-mnist), nor a folder, nor to be had from" in result.stderr
    assert "error: folder: a folder that holds no pipeline" in iec("sample", "folder").stderr
