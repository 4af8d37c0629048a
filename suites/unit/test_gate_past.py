"""A gate by its command: attempts, the history beside it and the incident log, in one folder of a user's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from prill_harness.incidents import history

from .commandline import child, emitted
from .test_incidents import SOUND

MODEL = "fixture:llama-tiny"
SUITE = '''
from pathlib import Path

from prill_harness.run.checks import check

@check("mine.steady", kills=("rope_pairing",))
def test_steady(observe):
    observe.saw(1, oracle="by hand")

@check("mine.unsteady", kills=("rope_pairing",))
def test_unsteady(observe):
    """Fails in the first process that asks it, and never again."""
    mark = Path(__file__).with_name("mark")
    first = not mark.exists()
    mark.write_text("")
    observe.saw(1, oracle="by hand")
    observe.expect(not first, "wrong on the first day")
'''
POLICY = f"""
default = "own"
suites = "../checks"
[gates.own]
checklists = ["mine"]
[[gates.own.plan]]
models = ["{MODEL}"]
engines = ["numpy"]
suites = ["mine"]
"""
CHECKLIST = """
id = "mine"
title = "Mine"
[[items]]
id = "mine.all"
title = "All of it"
why = "so"
severity = "high"
checks = ["mine.steady", "mine.unsteady"]
"""
UNSTEADY = f"mine.unsteady in {MODEL}/numpy/mine/cpu"


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[subprocess.CompletedProcess[str]]]:
    """A folder, and what three gates said in it: one with attempts, two without."""
    folder = tmp_path_factory.mktemp("own")
    files = {"checks/mine.py": SUITE, "checks/checklists/mine.toml": CHECKLIST, "ci/gates.toml": POLICY,
             "ci/incidents/0001.toml": SOUND.replace("high", "critical")}  # fmt: skip
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    first = child("gate", "--json", "--rerun", "2", "-j", "1", cwd=folder)
    again = child("gate", "--json", "--from", "out/ledger.jsonl", cwd=folder)
    (folder / "ci/incidents/0001.toml").unlink()
    other = child("gate", "--json", "-j", "1", "--out", "other", "--history", "out", cwd=folder)
    return folder, [first, again, other]


def rule(verdict: dict[str, list[dict[str, str]]], name: str) -> str:
    return next(r["status"] for r in verdict["rules"] if r["id"] == name)


def test_a_gate_runs_again_what_failed_and_says_so(
    gated: tuple[Path, list[subprocess.CompletedProcess[str]]],
) -> None:
    """Two attempts at one check, one at the other; the gate is red, names the flaky one, and waits for the
    incident."""
    _, (first, *_) = gated
    assert first.returncode == 1, first.stderr
    assert "(attempt 2)" in first.stderr
    verdict = emitted(first.stdout)
    tried = {c["check"]: [(a["attempt"], a["status"]) for a in c["attempts"]] for c in verdict["checks"]}
    assert tried == {"mine.steady": [], "mine.unsteady": [(1, "failed"), (2, "passed")]}
    assert verdict["flaky"] == [UNSTEADY]
    assert (rule(verdict, "flaky"), rule(verdict, "incidents")) == ("inconclusive", "failed")
    assert [(i["id"], i["state"]) for i in verdict["incidents"]] == [("0001", "open")]
    assert verdict["checks"][-1]["standing"]["failing_runs"] == 1


def test_deciding_again_adds_nothing_and_changes_nothing(
    gated: tuple[Path, list[subprocess.CompletedProcess[str]]],
) -> None:
    """The same ledger gives the same verdict, byte for byte, and one line of history."""
    folder, (first, again, _) = gated
    assert again.stdout == first.stdout
    runs, notes = history.read(folder / "out/history.jsonl")
    assert notes == []
    assert [run.incidents for run in runs] == [{"critical": 1}, {}]


def test_the_next_gate_remembers(gated: tuple[Path, list[subprocess.CompletedProcess[str]]]) -> None:
    """Every check passes now, and the one that failed before on the same digests is flaky all the same; no
    incident is open any more."""
    folder, (*_, other) = gated
    verdict = emitted(other.stdout)
    assert verdict["counts"]["passed"] == 2
    assert verdict["flaky"] == [UNSTEADY]
    assert (rule(verdict, "flaky"), rule(verdict, "incidents")) == ("inconclusive", "passed")
    standings = {c["check"]: c["standing"] for c in verdict["checks"]}
    told = {"runs": 3, "failed": 1, "flaky": True, "failing_since": "", "failing_runs": 0, "recent": "FP"}
    assert standings == {"mine.steady": None, "mine.unsteady": told}
    assert not (folder / "other/history.jsonl").exists()


def test_a_malformed_log_stops_a_gate_before_it_runs(
    gated: tuple[Path, list[subprocess.CompletedProcess[str]]], tmp_path: Path
) -> None:
    """Exit 4, one sentence, and no file."""
    folder, _ = gated
    log = tmp_path / "incidents"
    log.mkdir()
    (log / "0001.toml").write_text(SOUND.replace("high", "fatal"))
    done = child("gate", "--incidents", str(log), "--out", "third", cwd=folder)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1)
    assert "invalid incident" in done.stderr
    assert not (folder / "third").exists()
