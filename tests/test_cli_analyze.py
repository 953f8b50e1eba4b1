"""`iec analyze`, run in this process on a tiny model, and the sentences it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from iec.analysis.reading import reading
from iec.cli.app import app
from tiny import CASES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    CASES["ddim"].build().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def iec(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["analyze", *(str(argument) for argument in arguments)])


def test_help_fits_eighty_columns() -> None:
    result = iec("--help")
    assert result.exit_code == 0 and max(map(len, result.output.splitlines())) <= 80
    assert "…" not in result.output and "residuals" in result.output  # nothing is cut off


def test_a_cached_model_is_analysed_and_goes_on(model: Path, tmp_path: Path) -> None:
    call = [model, "--cache", "deepcache:2", "--num", 2, "--num-inference-steps", 4]
    result = iec(*call, "--what", "error,residuals", "--relax", "0.5,0.5")
    assert result.exit_code == 0, result.output
    assert "• After the last step the efficient model is off by" in result.stdout
    assert "• full: residuals of the first correction from" in result.stdout
    assert {path.suffix for path in (tmp_path / "out" / "analysis").iterdir()} == {".json", ".csv", ".png"}
    again = iec(*call, "--what", "error,residuals", "--relax", "0.5,0.5", "--json")
    found = json.loads(again.stdout)
    assert list(found) == ["error", "residuals"] and "DeepCache(interval=2" in str(found["error"]["about"])
    residuals = found["residuals"]["rows"]
    assert {(row["model"], row["step"]) for row in residuals} == {(m, s) for m in ("full", "efficient") for s in (0, 2)}
    assert residuals[1]["correction"] == 2
    other = iec(*call, "--what", "error")
    assert other.exit_code == 2 and "is of another study: correction" in other.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--what", "error"], "compares an efficient model with full precision"),
        (["--what", "speed"], "expected some of spectral, error"),
        (["--steps", "none"], "--steps none corrects nothing"),
        (["--after", "x"], "expected for example --after 0,10"),
        (["--lambdas", "half"], "expected for example --lambdas 0.1,0.5"),
        (["--quant", "nowhere"], "nowhere"),
    ],
)
def test_options_that_cannot_be_are_refused(model: Path, options: list[str], message: str) -> None:
    result = iec(model, "--num", 1, "--num-inference-steps", 2, *options)
    assert result.exit_code == 2 and message in result.stderr


def test_sentences_say_what_the_numbers_say() -> None:
    def error(
        kind: str, corrected: bool, step: int, median: float, ratio: float | None, model: str = "efficient"
    ) -> Any:
        about = {"error": kind, "corrected": corrected, "model": model, "against": "full", "step": step, "num": 9}
        interval = {"ratio_low": ratio and ratio - 0.01, "ratio_high": ratio and ratio + 0.01}
        return {**about, "median": median, "ratio": ratio, **interval}

    rows = [
        error("accumulated", False, 1, 0.5, None),
        error("accumulated", True, 1, 0.4, 0.8),
        error("accumulated", True, 1, 0.1, 0.2, "full"),
        error("local", True, 0, 0.1, 0.7),
        error("local", True, 1, 0.1, 1.3),
    ]
    said = " ".join(reading({"error": rows}))
    assert "off by 0.5 RMS (median of 9)" in said
    assert "off by 0.4, 0.8 times that (0.79 … 0.81): nearer to full precision" in said and "itself by 0.1" in said
    assert (
        "nearer to full precision's at 1 of 2 steps and farther at 1 (nearer until step 0, farther from step 1 on)"
        in said
    )
    silent = error("local", False, 2, 0.0, None), error("local", True, 2, 0.1, None)  # the whole pass of a cache
    ends = [row | {"step": 2} if row["error"] == "accumulated" else row for row in rows]
    said = reading({"error": [*ends, *silent]})[-1]
    assert "nearer to full precision's at 1 of 3 steps and farther at 2" in said
    assert "1 of them where the model alone makes no error" in said
    rows[1] |= {"ratio": 1.2, "ratio_low": 1.1, "ratio_high": 1.3}
    assert "(1.1 … 1.3): farther from full precision" in reading({"error": rows})[1]
    rows[1] |= {"ratio_low": 0.9}
    assert "(0.9 … 1.3): no sure difference" in reading({"error": rows})[1]

    def norm(quantity: str, step: int, lam: float | None, value: float) -> Any:
        return {"quantity": quantity, "step": step, "lam": lam, "norm": value}

    norms = [norm("growth", 0, None, 1.5), norm("growth", 1, None, 0.5), norm("contraction", 0, 0.5, 0.9)]
    norms += [norm("contraction", 0, 0.9, 1.2)]
    first, second = reading({"spectral": norms})
    assert "above 1 at 1 of 2 steps, largest at step 0 (1.5)" in first and "is 0.75." in first
    assert "for λ = 0.5 (of 0.5, 0.9)" in second and "1.2, at step 0 with λ = 0.9" in second
    assert "lower bound" not in first + second
    bounded = reading({"spectral": [row | {"lower_bound": row["step"] == 0} for row in norms]})
    assert bounded[-1].startswith("At 1 of 2 steps the norms are lower bounds")
