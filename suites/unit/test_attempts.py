"""What failed is run again: every attempt is kept, the worst counts, and a check that disagrees is flaky."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from prill_harness.decide.waivers import Conditions
from prill_harness.records import ledger as ledgers
from prill_harness.records.evidence import CellEnded, CellStarted, Evidence, Record, Status, checks
from prill_harness.records.verdict import Severity, StandingResult, Verdict
from prill_harness.run import executor
from prill_harness.run.pool import Event
from prill_runtime.errors import LedgerError

from .test_gate import (
    CELLS,
    EXCUSABLE,
    FAILURE,
    checklist,
    decide,
    item,
    record,
    rules,
    started,
    waiver,
    whole,
)
from .test_plan import project, verdict

# Each process adds a line; the check fails in the first so many.
FAILS = (
    "ran = Path(__file__).with_name('BETA.txt'); ran.open('a').write('x'); assert len(ran.read_text()) > {}, "
    "'it fails in the beginning'"
)
FIRST, SECOND = "tokens.exact", "tokens.greedy"


def again(status: Status, sentence: str = "seen", attempt: int = 2) -> list[Record]:
    """A further attempt at the first check of the first cell."""
    records = [
        started(CELLS[0], (FIRST,)),
        record(CELLS[0], FIRST, status, sentence),
        CellEnded(CELLS[0], 0 if status is Status.PASSED else 1, 0.1, 2.0),
    ]
    return [msgspec.structs.replace(each, attempt=attempt) for each in records]


def attempts_of(found: Verdict, check: str = FIRST) -> list[tuple[int, str]]:
    (result,) = (c for c in found.checks if (c.check, c.cell) == (check, CELLS[0]))
    return [(a.attempt, a.status.value) for a in result.attempts]


def test_a_lucky_attempt_hides_nothing() -> None:
    """A check that failed and then passed has failed, is flaky by name, and the verdict has both; one
    that failed twice is not flaky."""
    found = decide([*whole(FAILURE), *again(Status.PASSED)])
    assert found.exit_code == 1
    assert set(rules(found)) == {"items", "flaky"}
    assert found.flaky == (f"{FIRST} in {CELLS[0].id}",)
    assert attempts_of(found) == [(1, "failed"), (2, "passed")]
    assert attempts_of(found, SECOND) == []
    twice = decide([*whole(FAILURE), *again(Status.FAILED, "KL is above 1 at blk.0")])
    assert (set(rules(twice)), twice.flaky) == ({"items"}, ())
    assert attempts_of(twice) == [(1, "failed"), (2, "failed")]


def test_a_flaky_check_that_is_waived_still_counts_as_flaky() -> None:
    """A waiver excuses the failure, and the policy says how many such checks there may be."""
    records = [*whole(FAILURE), *again(Status.PASSED)]
    excused = {"lists": EXCUSABLE, "waivers": (waiver(),)}
    assert rules(decide(records, **excused)) == {"flaky": Status.INCONCLUSIVE}  # type: ignore[arg-type]
    assert decide(records, max_flaky=1, **excused).exit_code == 0  # type: ignore[arg-type]


def test_an_attempt_is_held_to_the_provenance_of_the_first() -> None:
    """A further attempt on another file of the same name proves nothing about this one."""
    records = [
        msgspec.structs.replace(each, versions=each.versions | {"model_sha256": "another"})
        if isinstance(each, CellStarted)
        else each
        for each in again(Status.FAILED, "KL is above 1 at blk.0")
    ]
    assert rules(decide([*whole(FAILURE), *records]))["provenance"] is Status.INCONCLUSIVE


def test_the_cell_is_judged_by_its_first_attempt() -> None:
    """What a further attempt planned and how long it took is not what the cell did."""
    found = decide([*again(Status.PASSED), *whole(FAILURE)])
    assert [(c.planned, c.status, c.duration_s) for c in found.cells] == [(2, "complete", 0.1)] * 2


def test_a_ledger_with_attempts_agrees_with_itself(tmp_path: Path) -> None:
    """The exit code of each attempt is held against its own evidence, and the worst evidence counts."""
    first = [
        started(CELLS[0], (FIRST,)),
        record(CELLS[0], FIRST, Status.FAILED),
        CellEnded(CELLS[0], 1, 0.1, 1.0),
    ]
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(ledgers.lines([*first, *again(Status.PASSED)]))
    records = ledgers.audited(path)
    assert [r.attempt for r in records] == [1, 1, 1, 2, 2, 2]
    assert checks(records)[CELLS[0].id, FIRST].status is Status.FAILED
    lying = [msgspec.structs.replace(r, exit_code=0) if isinstance(r, CellEnded) else r for r in first]
    path.write_bytes(ledgers.lines([*lying, *again(Status.PASSED)]))
    with pytest.raises(LedgerError, match="contradicts itself"):
        ledgers.audited(path)


def test_only_what_failed_runs_again_and_every_attempt_stays(tmp_path: Path) -> None:
    """A check that fails twice and then passes has three records; the checks that passed have one each; a
    resumed run keeps them all, and runs nothing again that has passed since."""
    work, out = project(tmp_path, beta=FAILS.format(2)), tmp_path / "out"
    events: list[Event] = []
    records = executor.run(work, out, jobs=1, rerun=5, progress=events.append)
    seen = [(r.check, r.attempt, r.status.value) for r in records if isinstance(r, Evidence)]
    mine = [("beta.second", 1, "failed"), ("beta.second", 2, "failed"), ("beta.second", 3, "passed")]
    assert sorted(seen) == sorted([*((f"{s}.{c}", 1, "passed") for s, c in OTHERS), *mine])
    assert [e.attempt for e in events if e.kind == "ended"] == [1, 1, 2, 3]
    assert {e.done for e in events if e.attempt > 1} == {2}
    assert ledgers.audited(out / "ledger.jsonl") == records
    found = verdict(tmp_path, work, records)
    assert found.flaky == ("beta.second in a.gguf/numpy/beta/cpu",)
    assert found.exit_code == 1
    assert executor.run(work, out, jobs=1, resume=True, rerun=5) == records
    fresh = executor.run(work, out, jobs=1)
    assert {r.attempt for r in fresh} == {1}


OTHERS = (("alpha", "first"), ("alpha", "second"), ("beta", "first"))


# --- what the history adds --------------------------------------------------------------------------------

LONG = StandingResult(runs=9, failed=9, flaky=False, failing_since="2026-05-01", failing_runs=9)
UNSTEADY = StandingResult(runs=8, failed=2, flaky=True, failing_since="2026-05-30", failing_runs=1)


def test_a_check_that_contradicts_an_earlier_run_is_flaky() -> None:
    """It passed today and failed before on the same digests: named, and counted."""
    standing = msgspec.structs.replace(UNSTEADY, failing_since="", failing_runs=0)
    found = decide(whole(), standings={(CELLS[0].id, FIRST): standing})
    assert rules(found) == {"flaky": Status.INCONCLUSIVE}
    assert f"{FIRST} in {CELLS[0].id}" in found.sentence
    assert decide(whole(), standings={(CELLS[0].id, FIRST): standing}, max_flaky=1).exit_code == 0
    assert standing.flake_rate == 0.25
    assert LONG.flake_rate == 0.0


def test_a_waiver_shows_how_long_and_how_often() -> None:
    """Of the failures that it covers the one that has failed for longest; an unused waiver shows nothing."""
    failures = FAILURE | {("gpt", FIRST): FAILURE["llama", FIRST]}
    standings = {(CELLS[0].id, FIRST): UNSTEADY, (CELLS[1].id, FIRST): LONG}
    unused = waiver(id="W-2", conditions=Conditions("cuda", "cpu"))
    lists = checklist(*EXCUSABLE.items, item("demo.more", SECOND, severity=Severity.LOW))
    found = decide(whole(failures), lists=lists, waivers=(waiver(), unused), standings=standings, max_flaky=1)
    assert [(w.id, w.standing) for w in found.waivers] == [("W-1", LONG), ("W-2", None)]
    assert {c.standing for c in found.checks if c.check == FIRST} == {LONG, UNSTEADY}
