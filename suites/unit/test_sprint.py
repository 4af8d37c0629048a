"""The summary of a sprint: each metric from what was observed, and nothing met that nobody looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from prill_harness.incidents import history, lint, sprint
from prill_harness.incidents.lint import LintFindings
from prill_harness.plan.provenance import file_digest
from prill_harness.records.evidence import Cell, Status
from prill_harness.records.ledger import lines
from prill_harness.records.verdict import CheckResult, IncidentResult, IncidentState, Severity, Verdict
from prill_reports.formats.sprint import render
from prill_runtime.errors import UsageError

from .commandline import invoke
from .test_gate import CELLS, FAILURE, decide, whole
from .test_history import DAY_S, run

CLEAN = LintFindings(("ruff",), 0)


def entry(id: str, severity: str, state: str, regression: str = "tokens.exact") -> IncidentResult:
    closed = "1970-01-03" if state == "closed" else ""
    return IncidentResult(
        id,
        Severity(severity),
        "cache",
        f"symptom | {id}",
        IncidentState(state),
        "1970-01-02",
        closed,
        regression,
    )


def leaking(status: Status) -> CheckResult:
    cell = Cell("llama", "numpy", "memory")
    return CheckResult("memory.error", cell, status, "told", 1, 0.1, "")


def verdict(
    *incidents: IncidentResult, memory: Status | None = Status.PASSED, failing: bool = False
) -> Verdict:
    found = decide(whole(FAILURE if failing else None), incidents=incidents)
    more = (leaking(memory),) if memory is not None else ()
    cells = tuple(
        msgspec.structs.replace(c, planned=c.planned + (n == 0) * len(more))
        for n, c in enumerate(found.cells)
    )
    return msgspec.structs.replace(found, checks=(*found.checks, *more), cells=cells)


def met(found: Verdict, findings: LintFindings | None = CLEAN) -> dict[str, bool | None]:
    return {m.name: m.met for m in sprint.measures(found, findings) if m.goal}


GOALS = ("open incidents, critical", "open incidents, high", "incidents fixed and closed",
         "regression checks of closed incidents", "checks passed", "flaky checks", "memory leaks",
         "lint findings")  # fmt: skip


def test_every_goal_is_met_by_a_sprint_that_is_done() -> None:
    """One incident, closed, whose regression check passed; every check passed; no leak, no finding."""
    assert met(verdict(entry("1", "critical", "closed"))) == dict.fromkeys(GOALS, True)


DONE = entry("1", "critical", "closed")


@pytest.mark.parametrize(
    ("found", "findings", "changed"),
    [
        (verdict(DONE, entry("2", "critical", "open")), CLEAN, {GOALS[0]: False, GOALS[2]: False}),
        (verdict(DONE, entry("2", "high", "fixed")), CLEAN, {GOALS[1]: False, GOALS[2]: False}),
        (verdict(DONE, entry("2", "low", "open")), CLEAN, {GOALS[2]: False}),
        (verdict(), CLEAN, {GOALS[2]: None, GOALS[3]: None}),
        (verdict(msgspec.structs.replace(DONE, regression="tests/t.py")), CLEAN, {GOALS[3]: None}),
        (verdict(DONE, failing=True), CLEAN, {GOALS[3]: False, GOALS[4]: False}),
        (verdict(DONE, memory=Status.FAILED), CLEAN, {GOALS[4]: False, GOALS[6]: False}),
        (verdict(DONE, memory=Status.WAIVED), CLEAN, {GOALS[4]: False, GOALS[6]: False}),
        (verdict(DONE, memory=Status.INCONCLUSIVE), CLEAN, {GOALS[4]: False, GOALS[6]: None}),
        (verdict(DONE, memory=None), CLEAN, {GOALS[6]: None}),
        (msgspec.structs.replace(verdict(DONE), flaky=("x",)), CLEAN, {GOALS[5]: False}),
        (verdict(DONE), None, {GOALS[7]: None}),
        (verdict(DONE), LintFindings(("ruff",), 1), {GOALS[7]: False}),
    ],
)
def test_each_metric_sees_its_own(
    found: Verdict, findings: LintFindings | None, changed: dict[str, bool | None]
) -> None:
    """One thing wrong, or not observed, changes its metric and those that count it too, and no other."""
    assert met(found, findings) == dict.fromkeys(GOALS, True) | changed


def test_a_cell_that_is_lost_is_no_pass() -> None:
    """Its checks are not known, and yet 100 % is not reached."""
    found = decide([r for r in whole() if r.cell == CELLS[0]])
    (rate,) = (m for m in sprint.measures(found, None) if m.name == "checks passed")
    assert (rate.met, rate.measured) == (False, "2 of 2, 100.0 %; 1 cells are missing")


def test_the_days_come_from_the_history(tmp_path: Path) -> None:
    """A row for each day on which a gate ran or an incident came or went; of several gates, the last."""
    later = msgspec.structs.replace(run("FP", 1.5), incidents={"critical": 1, "low": 2})
    found = sprint.days(verdict(DONE), [run("P", 1), later, run("E", 4)])
    told = [(str(d.day), d.gates, d.passed, d.failed, d.other, d.opened, d.closed, d.unsolved) for d in found]
    assert told == [
        ("1970-01-05", 1, 0, 0, 1, 0, 0, "none"),
        ("1970-01-03", 0, 0, 0, 0, 0, 1, ""),
        ("1970-01-02", 2, 0, 1, 0, 1, 0, "1 critical, 2 low"),
    ]
    assert DAY_S == 86400


def test_the_summary_shows_metrics_open_incidents_and_days(tmp_path: Path) -> None:
    """As Markdown; text of people stays text, and a line of the history that is none is named."""
    place = tmp_path / "history.jsonl"
    history.append(place, run("P", 4))
    place.write_bytes(place.read_bytes() + b"torn")
    (tmp_path / "lint.sarif").write_text(sarif(0))
    options = {"history": str(place), "lint": str(tmp_path / "lint.sarif")}
    text = render(verdict(DONE, entry("2", "high", "open")), options=options)
    assert text.startswith("# Sprint: 6 of 8 goals met\n")
    assert "| open incidents, high | 0 | 1 | **no** |" in text
    assert "| lint findings | 0 | 0 by ruff | yes |" in text
    assert "| 2 | high | open | cache | 1970-01-02 | symptom \\| 2 |" in text
    assert "| 1970-01-05 | 1 | 1 | 0 | 0 | 0 | 0 | none |" in text
    assert "line 2 is left out" in text
    assert "not observed; name a SARIF file" in render(verdict(DONE), options={})


def test_the_command_finds_the_history_beside_the_ledger(tmp_path: Path) -> None:
    """`prill report sprint`, with what a gate leaves in its folder; exit 4 for no SARIF."""
    (tmp_path / "ledger.jsonl").write_bytes(lines(whole()))
    sealed = decide(whole(), incidents=(DONE,)).sealed(file_digest(tmp_path / "ledger.jsonl"))
    (tmp_path / "verdict.json").write_bytes(msgspec.json.encode(sealed))
    history.append(tmp_path / "history.jsonl", run("P", 4))
    words = ("report", "sprint", "--ledger", str(tmp_path / "ledger.jsonl"))
    done = invoke(*words)
    assert done.exit_code == 0, done.stderr
    assert "| 1970-01-05 | 1 | 1 | 0 |" in done.stdout
    assert "not observed" in done.stdout
    assert invoke(*words, "--lint", str(tmp_path / "verdict.json")).exit_code == 4
    assert "two formats" in invoke(*words, "--format", "junit").stderr


# --- lint -------------------------------------------------------------------------------------------------


def sarif(count: int, **result: object) -> str:
    results = [{"ruleId": "F401", "message": {"text": "unused"}, **result}] * count
    return json.dumps(
        {"version": "2.1.0", "runs": [{"tool": {"driver": {"name": "ruff"}}, "results": results}]}
    )


def test_what_ruff_writes_is_counted(tmp_path: Path) -> None:
    """A real file of a real linter: one unused import, and none once it is gone."""
    for text, count in (("import os\n", 1), ("x = 1\n", 0)):
        (tmp_path / "a.py").write_text(text)
        words = [
            "ruff",
            "check",
            "--isolated",
            "--no-cache",
            "--output-format",
            "sarif",
            "-o",
            "out.sarif",
            "a.py",
        ]
        subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, check=False, capture_output=True)
        assert lint.read_sarif(tmp_path / "out.sarif") == LintFindings(("ruff",), count)


@pytest.mark.parametrize(
    ("result", "count"),
    [({}, 2), ({"level": "error"}, 2), ({"level": "note"}, 0), ({"suppressions": [{"kind": "inSource"}]}, 0)],
)
def test_errors_and_warnings_count(tmp_path: Path, result: dict[str, object], count: int) -> None:
    """Notes and what is suppressed do not; a result without a level is a warning, as SARIF has it."""
    (tmp_path / "l").write_text(sarif(2, **result))
    assert lint.read_sarif(tmp_path / "l").count == count


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not a SARIF file"),
        ("[]", "not a SARIF file"),
        ('{"version": "2.1.0", "runs": []}', "no run of a tool"),
        ('{"version": "2.1.0", "runs": [{"tool": {"driver": {"name": "ruff"}}}]}', "none of ruff"),
    ],
)
def test_a_linter_that_did_not_look_found_nothing(tmp_path: Path, text: str, told: str) -> None:
    """A file without results is no clean one."""
    (tmp_path / "l").write_text(text)
    with pytest.raises(UsageError, match=told):
        lint.read_sarif(tmp_path / "l")
    with pytest.raises(UsageError, match="cannot read the lint findings"):
        lint.read_sarif(tmp_path / "absent")
