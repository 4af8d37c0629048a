"""ci/openings.py on the emulator: random sound models open and are right, and what goes wrong is named."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

CI = Path(__file__).resolve().parents[2] / "ci"
sys.path.insert(0, str(CI))
script: Any = importlib.import_module("openings")


def run(
    capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    """Exit code, the lines of the openings, the summary."""
    code = script.main(["--models", "2", *options])
    *lines, figures = map(json.loads, capsys.readouterr().out.splitlines())
    return code, lines, figures


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of the batch's shapes, the smallest."""
    real = script.recipe
    monkeypatch.setattr(script, "recipe", lambda random, kind, small: real(random, "batch", True))


def test_two_models_open_and_are_right(
    quick: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Every line has its figures and what was made; the file holds the same lines and the summary."""
    out = tmp_path / "out.jsonl"
    code, lines, figures = run(capsys, "--engine", "emu", "--seed", "1", "--out", str(out))
    assert code == 0, lines
    assert [one["status"] for one in lines] == ["right", "right"]
    assert all(0 < one["nmse"] <= one["bound"] == 1e-10 and one["recipe"]["layers"] for one in lines)
    assert (figures["openings"], figures["right"], figures["out_of_memory"]) == (2, 2, 0)
    assert figures["largest"] == max(one["largest"] for one in lines) < 8.7e-5
    assert [json.loads(line) for line in out.read_text().splitlines()] == [*lines, figures]


@pytest.mark.parametrize(
    ("engine", "status", "counted"),
    [
        ("emu:budget=1KiB", "out of memory", "out_of_memory"),
        ("emu+fault:device_position_not_told", "wrong", "wrong"),
        ("emu:nonsense=1", "error", "errors"),
    ],
)
def test_what_goes_wrong_is_counted_and_named(
    quick: None, capsys: pytest.CaptureFixture[str], engine: str, status: str, counted: str
) -> None:
    """No memory, wrong logits, any other error: exit 1, and the next model has its turn."""
    code, lines, figures = run(capsys, "--engine", engine)
    assert code == 1
    assert [one["status"] for one in lines] == [status, status]
    assert figures[counted] == 2
    assert figures["right"] == 0
    assert all(one.get("error") or one["nmse"] > one["bound"] for one in lines)
    assert all(one["stage"].startswith(("after opening", "chunks of")) for one in lines)


def test_no_model_is_begun_when_time_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing was shown then: exit 2."""
    code, lines, figures = run(capsys, "--engine", "emu", "--seconds", "-1")
    assert (code, lines, figures["openings"], figures["worst"]) == (2, [], 0, None)


def test_a_difference_is_seen() -> None:
    """One wrong value, another shape or a value that is no number is no small difference."""
    rows = np.random.default_rng(0).standard_normal((4, 50))
    wrong = rows.copy()
    wrong[3, 49] += 1e-3
    assert script.difference(rows, rows) == (0.0, 0.0)
    assert script.difference(wrong, rows)[0] > 1e-10
    assert script.difference(wrong, rows)[1] == pytest.approx(1e-3)
    wrong[0, 0] = np.nan
    assert script.difference(wrong, rows)[0] == script.difference(rows[:3], rows)[0] == np.inf


def test_every_kind_of_shape_is_drawn() -> None:
    """Vocabularies beyond 100 times the width, contexts of thousands, both families, many types."""
    made = [script.recipe(Random(n), kind, False) for n in range(60) for kind in script.KINDS]
    assert max(one.vocabulary.size / one.width for one in made) > 100
    assert max(one.context for one in made) == 4096
    assert {one.family for one in made} == {"llama", "gpt2"}
    assert len({one.type for one in made}) > 6


def test_rows_of_zeros_are_right_where_they_are_zeros() -> None:
    """Logits that are zeros throughout have no scale: equal ones are no difference, any other is infinite."""
    zeros = np.zeros((3, 7), np.float32)
    assert script.difference(zeros, zeros.astype(np.float64)) == (0.0, 0.0)
    assert script.difference(zeros + 1e-9, zeros.astype(np.float64))[0] == float("inf")
    assert script.difference(zeros + np.nan, zeros.astype(np.float64))[0] == float("inf")
