"""Gate files: inheritance, defaults, and every way to be invalid in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from prill_harness.plan.policy import load_policy
from prill_harness.records.verdict import Severity
from prill_runtime.errors import PolicyError

SOUND = """
default = "child"
[gates.parent]
checklists = ["foundation"]
blocks_at = "high"
minimum_executed = 3
max_flaky = 2
never_waive = ["leak"]
[[gates.parent.plan]]
models = ["m1"]
engines = ["numpy"]
suites = ["file"]
[gates.child]
extends = "parent"
checklists = ["model", "foundation"]
blocks_at = "low"
max_inconclusive = 1
never_waive = ["data"]
[[gates.child.plan]]
models = ["m1"]
engines = ["numpy"]
suites = ["tokens"]
devices = ["cpu", "cuda"]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "gates.toml"
    path.write_text(text)
    return path


def test_incidents_are_waited_for_from_critical_up_unless_a_gate_says_more(tmp_path: Path) -> None:
    """The key is inherited like any other; where nobody gives it, critical ones alone hold a gate shut."""
    text = SOUND.replace("max_flaky = 2", 'max_flaky = 2\nincidents_block_at = "high"')
    assert load_policy(write(tmp_path, text)).gate("child").incidents_block_at is Severity.HIGH
    assert load_policy(write(tmp_path, SOUND)).gate("child").incidents_block_at is Severity.CRITICAL


def test_a_gate_adds_to_its_parent(tmp_path: Path) -> None:
    """Checklists, plan and the never-list are added to the parent's; single values replace them."""
    policy = load_policy(write(tmp_path, SOUND))
    gate = policy.gate()
    assert (gate.name, gate.chain) == ("child", ("child", "parent"))
    assert gate.checklists == ("foundation", "model")
    assert gate.never_waive == {"leak", "data"}
    assert [e.suites for e in gate.plan] == [("file",), ("tokens",)]
    assert (gate.blocks_at, gate.minimum_executed, gate.max_inconclusive, gate.max_flaky) == (
        Severity.LOW, 3, 1, 2,
    )  # fmt: skip
    parent = policy.gate("parent")
    assert (parent.checklists, parent.max_inconclusive) == (("foundation",), 0)
    assert len(policy.sha256) == 64


def test_severities_block_down_to_the_bar(tmp_path: Path) -> None:
    """A gate that blocks at high blocks critical and high, not medium and low."""
    gate = load_policy(write(tmp_path, SOUND)).gate("parent")
    assert [gate.blocks(s) for s in Severity] == [True, True, False, False]


def test_the_current_folders_policy_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ci/gates.toml of the current folder is read when no path is given."""
    (tmp_path / "ci").mkdir()
    (tmp_path / "ci/gates.toml").write_text(SOUND)
    monkeypatch.chdir(tmp_path)
    assert load_policy().default == "child"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("max_flaky = 2", "max_flacky = 2", "unknown field `max_flacky`.*gates"),
        ('devices = ["cpu", "cuda"]', "gpus = 1", r"unknown field `gpus`.*plan\[0\]"),
        ('default = "child"', 'default = "child"\nextra = 1', "unknown field `extra`"),
        ('default = "child"', "", "missing required field `default`"),
        ('default = "child"', 'default = "absent"', "no such gate.*got 'absent'"),
        ('extends = "parent"', 'extends = "absent"', r"does not exist.*got 'absent'"),
        ('extends = "parent"', 'extends = "child"', "circle"),
        ('blocks_at = "high"', 'blocks_at = "fatal"', "Invalid enum value 'fatal'.*blocks_at"),
        ("minimum_executed = 3", "minimum_executed = 0", "minimum_executed`: out of range"),
        ("minimum_executed = 3", 'minimum_executed = "3"', "Expected `int.*minimum_executed"),
        ("max_flaky = 2", "max_flaky = -1", "max_flaky`: out of range"),
        ("max_flaky = 2", 'incidents_block_at = "all"', "Invalid enum value 'all'.*incidents_block_at"),
        ('suites = ["file"]', "suites = []", r"plan with at least one cell"),
        ('checklists = ["foundation"]', "", "at least one checklist"),
        ("[gates.parent]", "[gates.parent", "not a TOML file"),
    ],
)
def test_an_invalid_policy_is_one_sentence(tmp_path: Path, old: str, new: str, told: str) -> None:
    """Unknown keys, wrong types, broken inheritance and empty gates name the file and the path; exit 4."""
    assert old in SOUND
    path = write(tmp_path, SOUND.replace(old, new, 1))
    with pytest.raises(PolicyError, match=f"(?s)gates.toml.*{told}|{told}") as caught:
        load_policy(path)
    assert "gates.toml" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("old", "new", "line", "told"),
    [
        ("max_flaky = 2", "max_flacky = 2", 7, "did you mean 'max_flaky'?"),
        ('engines = ["numpy"]\nsuites = ["tokens"]', 'engine = ["numpy"]\nsuites = ["tokens"]', 21,
         "did you mean 'engines'?"),
        ('blocks_at = "high"', 'blocks_at = "hihg"', 5, "did you mean 'high'?"),
        ('blocks_at = "low"', 'blocks_at = "lw"', 16, "did you mean 'low'?"),
        ("max_inconclusive = 1", "max_inconclusive = -1", 17, "expected at least 0, got -1"),
        ("minimum_executed = 3", "minimum_executed = 0", 6, "expected at least 1, got 0"),
        ("max_flaky = 2", "cells_per_gpu = 0", 7, "expected at least 1, got 0"),
        ("max_flaky = 2", "performance_budget = nan", 7, "got nan"),
        ("max_flaky = 2", "leak_budget = -1", 7, "expected at least 0, got -1"),
        ('extends = "parent"', 'extends = "parnt"', 14, "did you mean 'parent'?"),
        ('suites = ["file"]', "suites = []", 3, "at least one cell"),
    ],
)  # fmt: skip
def test_an_error_names_line_and_nearest_word(
    tmp_path: Path, old: str, new: str, line: int, told: str
) -> None:
    """File, line, key, and the word that was meant, of two gates that have the same keys."""
    assert old in SOUND
    with pytest.raises(PolicyError) as caught:
        load_policy(write(tmp_path, SOUND.replace(old, new, 1)))
    assert f"gates.toml, line {line}" in str(caught.value)
    assert told in str(caught.value)


def test_budgets_and_documents_pass_to_the_child(tmp_path: Path) -> None:
    """Documents are added to the parent's, budgets are replaced; without any nothing is asked."""
    parent = 'leak_budget = 64\nperformance_budget = 10\ndocuments = ["README.md"]\nmax_flaky = 2'
    child = 'leak_budget = 0\ndocuments = ["NEWS.md", "README.md"]\nmax_inconclusive = 1'
    text = SOUND.replace("max_flaky = 2", parent).replace("max_inconclusive = 1", child)
    gate = load_policy(write(tmp_path, text)).gate()
    assert (gate.leak_budget, gate.performance_budget) == (0, 10.0)
    assert gate.documents == ("README.md", "NEWS.md")
    plain = load_policy(write(tmp_path, SOUND)).gate()
    assert (plain.leak_budget, plain.performance_budget, plain.documents) == (None, None, ())


def test_a_policy_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    """A missing file is an invalid policy, not a traceback."""
    with pytest.raises(PolicyError, match="cannot be read"):
        load_policy(tmp_path / "absent.toml")
