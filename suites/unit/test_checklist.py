"""Checklists: strict files, and items proven only by evidence from every cell that owes it."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from prill_harness.decide.checklist import Observed, evaluate, load_checklists
from prill_harness.records.catalog import check_ids, suite_file, suites
from prill_harness.records.evidence import Cell, Evidence, Status
from prill_harness.records.verdict import ItemResult, ItemStatus
from prill_runtime.errors import PolicyError, UsageError

SOUND = """id = "demo"
title = "Demo"

[[items]]
id = "demo.tokens"
title = "Tokens"
why = "so"
severity = "critical"
checks = ["tokens.exact", "cache.reuse"]
docs = "docs/x.md"

[[items]]
id = "demo.read"
title = "Read"
why = "no check can"
severity = "low"
[items.manual]
signer = "Ada"
date = 2026-01-01
evidence_sha256 = "HEX"
verify_again = 2026-07-01
""".replace("HEX", "ab" * 32)
KNOWN = ("tokens.exact", "cache.reuse")
CELLS = (Cell("m", "numpy", "tokens"), Cell("m", "numpy", "cache"))
TODAY = dt.date(2026, 6, 1)


def load(folder: Path, text: str = SOUND) -> tuple[ItemResult, ...]:
    return judge(folder, text, {})


def judge(
    folder: Path,
    text: str,
    statuses: dict[str, Status],
    cells: tuple[Cell, ...] = CELLS,
    as_of: dt.date = TODAY,
) -> tuple[ItemResult, ...]:
    """Items of `text` against one record per (full check id, status), in the cell of its suite."""
    (folder / "demo.toml").write_text(text)
    lists = load_checklists(["demo"], folder=folder, known=KNOWN)
    evidence: dict[str, dict[str, Evidence]] = {}
    for check, status in statuses.items():
        cell = next(c for c in CELLS if c.suite == check.partition(".")[0])
        evidence.setdefault(cell.id, {})[check] = Evidence(
            check, "c", cell, status, 1, f"{check} was {status}", "oracle", ("fault",), "prill run"
        )
    return evaluate(lists, cells, Observed(evidence, {}, {}), as_of)


PASSED, FAILED, ERROR, DOUBT = Status.PASSED, Status.FAILED, Status.ERROR, Status.INCONCLUSIVE


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ({"tokens.exact": PASSED, "cache.reuse": PASSED}, "proven"),
        ({"tokens.exact[1]": PASSED, "tokens.exact[2]": PASSED, "cache.reuse": PASSED}, "proven"),
        ({"tokens.exact[1]": PASSED, "tokens.exact[2]": FAILED, "cache.reuse": PASSED}, "failed"),
        ({"tokens.exact": PASSED, "cache.reuse": FAILED}, "failed"),
        ({"tokens.exact": PASSED}, "unproven"),
        ({"tokens.exact": PASSED, "cache.reuse": ERROR}, "unproven"),
        ({"tokens.exact": PASSED, "cache.reuse": DOUBT}, "unproven"),
        ({"tokens.exact": FAILED, "cache.reuse": ERROR}, "failed"),
        ({}, "unproven"),
        ({"tokens.exactly": PASSED, "cache.reuse": PASSED}, "unproven"),
    ],
)
def test_an_item_is_proven_by_all_of_its_checks(
    tmp_path: Path, statuses: dict[str, Status], expected: str
) -> None:
    """Every check, every parameter, in its cell: anything less is unproven, any failure is failed."""
    found = judge(tmp_path, SOUND, statuses)[0]
    assert found.status.value == expected, found.sentence


def test_a_check_that_no_cell_carries_leaves_the_item_unproven(tmp_path: Path) -> None:
    """One check proven and the other's suite not in the plan: unproven, and the sentence names it."""
    found = judge(tmp_path, SOUND, {"tokens.exact": PASSED}, CELLS[:1])[0]
    assert (found.status, found.sentence) == (ItemStatus.UNPROVEN, "no planned cell carries cache.reuse")


def test_every_cell_that_carries_a_check_must_prove_it(tmp_path: Path) -> None:
    """A second engine in the plan without evidence leaves the item unproven there."""
    cells = (*CELLS, Cell("m", "other", "tokens"))
    found = judge(tmp_path, SOUND, {"tokens.exact": PASSED, "cache.reuse": PASSED}, cells)[0]
    assert found.status is ItemStatus.UNPROVEN
    assert found.cells["m/other/tokens/cpu"] == "missing"
    assert found.cells["m/numpy/tokens/cpu"] == "passed"


@pytest.mark.parametrize(
    ("day", "expected"),
    [
        ("2025-12-31", "unproven"),
        ("2026-01-01", "proven"),
        ("2026-06-30", "proven"),
        ("2026-07-01", "unproven"),
    ],
)
def test_a_signature_holds_for_its_time(tmp_path: Path, day: str, expected: str) -> None:
    """A manual item is proven from its date until the day it must be verified again."""
    found = judge(tmp_path, SOUND, {}, as_of=dt.date.fromisoformat(day))[1]
    assert found.status.value == expected


def test_items_know_their_lines(tmp_path: Path) -> None:
    """Reports point to the file and line on which the item starts."""
    assert [(Path(i.file).name, i.line) for i in load(tmp_path)] == [("demo.toml", 4), ("demo.toml", 12)]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('docs = "docs/x.md"', 'doc = "docs/x.md"', r"unknown field `doc`.*items\[0\]"),
        ('severity = "critical"', 'severity = "fatal"', r"'fatal'.*severity"),
        ('why = "so"', 'why = " "', "why is empty"),
        ('why = "so"', "", "missing required field `why`"),
        (
            '"tokens.exact"',
            '"tokens.exakt"',
            r"no suite declares: .*got 'tokens.exakt'; did you mean 'tokens.exact'",
        ),
        ('checks = ["tokens.exact", "cache.reuse"]', "", "by one of them"),
        ('id = "demo.read"', 'id = "demo.tokens"', "used twice"),
        ("verify_again = 2026-07-01", "", "missing required field `verify_again`"),
        ("verify_again = 2026-07-01", "verify_again = 2026-01-01", "must lie after"),
        ("ab" * 32, "ab", "64 hex digits"),
        ('id = "demo"', 'id = "other"', "id and file name differ"),
        ('docs = "docs/x.md"', 'needs = ["rope"]', "features choose items of a template alone"),
        ('docs = "docs/x.md"', 'needs = ["ropes"]', "that no model has: .*got 'ropes'; did you mean 'rope'"),
        ('docs = "docs/x.md"', 'architecture = "llama"', "no item names its architecture"),
        ('title = "Demo"', 'title = "Demo"\neach = "model"', "Invalid enum value 'model'"),
    ],
)
def test_an_invalid_checklist_is_one_sentence(tmp_path: Path, old: str, new: str, told: str) -> None:
    """Unknown keys, unknown checks and items without proof name the file and the path; exit 4."""
    assert old in SOUND
    with pytest.raises(PolicyError, match=told) as caught:
        load(tmp_path, SOUND.replace(old, new, 1))
    assert "demo.toml" in str(caught.value)
    assert caught.value.exit_code == 4


def test_check_ids_are_read_without_importing(tmp_path: Path) -> None:
    """Literal ids are found wherever `check` is called; the suite itself is not executed."""
    (tmp_path / "one.py").write_text(
        'raise SystemExit("imported")\n@check("one.a", kills=("x",))\ndef test_a(): ...\n'
        '@checks.check(name="one.b", kills=("x",))\ndef test_b(): ...\n'
    )
    (tmp_path / "helpers.py").write_text("def check_shape(): ...\n")
    assert {name: line for name, (_, line) in check_ids(tmp_path).items()} == {"one.a": 2, "one.b": 4}
    assert suites(tmp_path) == ("one",)
    assert suite_file("one", tmp_path) == tmp_path / "one.py"
    with pytest.raises(UsageError, match="no such suite"):
        suite_file("../one", tmp_path)
