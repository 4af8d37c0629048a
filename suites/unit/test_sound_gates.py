"""ci/sound_gates.py: what a gate says of a sound model is counted by what it means."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from prill_harness.decide.rules import RULES

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "ci"))
script: Any = importlib.import_module("sound_gates")
gated: Any = importlib.import_module("gated")


@pytest.mark.parametrize(
    ("exit_code", "broken", "word"),
    [
        (0, set(), "green"),
        (10, {"kills"}, "stale"),
        (10, {"kills", "critical"}, "alarm"),
        (10, {"critical"}, "alarm"),
        (1, {"failed", "kills"}, "alarm"),
        (1, {"failed"}, "alarm"),
    ],
)
def test_stale_kills_are_told_from_a_false_alarm(exit_code: int, broken: set[str], word: str) -> None:
    """A verdict whose one broken rule is that of kills says nothing of the model; any other is an alarm."""
    rules = [{"id": n, "status": "inconclusive" if n in broken else "passed"} for n in {"kills", *broken}]
    assert script.said({"exit_code": exit_code, "rules": rules}) == word


def test_the_rule_is_one_that_verdicts_have() -> None:
    """The name under which kills are told apart is a rule's."""
    assert script.STALE in RULES


def test_a_gate_without_a_verdict_says_why(tmp_path: Path) -> None:
    """Exit code and last words of one that cannot begin."""
    ran = gated.gate(tmp_path, "--policy", "nowhere.toml")
    assert (ran.exit_code, ran.verdict) == (4, None)
    assert "nowhere.toml" in ran.sentence
