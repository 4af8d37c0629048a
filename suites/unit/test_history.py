"""The history of gates: how often a check fails, since when, and that a damaged line costs nothing else."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from prill_harness.commands.shared.past import Past
from prill_harness.console import Console
from prill_harness.incidents import history
from prill_harness.incidents.history import CellSeen, HistoryLine
from prill_harness.records.evidence import Cell, CellStarted, Evidence, Record, Status
from prill_harness.records.verdict import StandingResult
from prill_runtime.errors import OutputError

from .test_rules import incident

CELL = Cell("fixture:llama-tiny", "numpy", "tokens")
KEY = (CELL.id, "tokens.greedy")
DAY_S = 86400.0


def run(letters: str, day: float, digest: str = "d", check: str = "tokens.greedy") -> HistoryLine:
    return HistoryLine("small", day * DAY_S, {CELL.id: CellSeen(digest, {check: letters})})


def standing(*runs: HistoryLine) -> StandingResult | None:
    return history.standings(runs, runs[-1]).get(KEY)


@pytest.mark.parametrize(
    ("letters", "owed"),
    [
        ("P", None),
        ("PPP", None),
        ("F", StandingResult(1, 1, False, "1970-01-02", 1, "F")),
        ("PFF", StandingResult(3, 2, True, "1970-01-03", 2, "PFF")),
        ("FFPF", StandingResult(4, 3, True, "1970-01-05", 1, "FFPF")),
        ("FEIF", StandingResult(2, 2, False, "1970-01-02", 2, "FEIF")),
        ("FFP", StandingResult(3, 2, True, recent="FFP")),
        ("PE", None),
    ],
)
def test_how_often_and_since_when(letters: str, owed: StandingResult | None) -> None:
    """One run a day on the same digests: only a pass ends a row; errors and doubts say nothing. The last runs
    are kept, a letter each, thirty at most."""
    assert standing(*(run(letter, day) for day, letter in enumerate(letters, 1))) == owed


def test_only_the_last_runs_are_kept() -> None:
    """A history of years draws thirty runs, the latest last."""
    found = standing(*(run("P", day) for day in range(1, 60)), run("F", 60))
    assert found is not None
    assert found.recent == "P" * 29 + "F"


def test_another_digest_is_another_check_and_the_same_row() -> None:
    """What failed before the code changed makes nothing flaky, and has failed since then all the same."""
    assert standing(run("F", 1, "old"), run("P", 2, "new")) is None
    assert standing(run("P", 1, "old"), run("F", 2, "old"), run("F", 3, "new")) == StandingResult(
        1, 1, False, "1970-01-03", 2, "PFF"
    )
    assert standing(run("P", 1, ""), run("F", 2, "")) == StandingResult(1, 1, False, "1970-01-03", 1, "PF")


def test_attempts_of_one_run_count_each() -> None:
    """Failed, failed and passed in one gate: three attempts, two of which failed."""
    found = standing(run("FFP", 1, ""))
    assert found == StandingResult(3, 2, True, "1970-01-02", 1, "F")
    assert found.flake_rate == pytest.approx(2 / 3)


def test_a_verdict_that_is_computed_again_is_the_same() -> None:
    """Runs that came later, and the run's own line, change nothing of what was said then."""
    first, second, third = run("P", 1), run("F", 2), run("P", 3)
    assert history.standings([first], second) == history.standings([first, second, third], second)


def records(status: Status, engine: str = "numpy", model: str = "abc") -> list[Record]:
    cell = msgspec.structs.replace(CELL, engine=engine)
    versions = {"prill": "1", "code_sha256": "c", "model_sha256": model, "selection": ""}
    seen = Evidence("tokens.greedy", "c", cell, status, 1, "seen", "oracle", ("fault",), "", at=DAY_S)
    again = CellStarted(cell, ("tokens.greedy",), 1.0, versions | {"selection": "tokens.greedy"}, attempt=2)
    rest = [again, msgspec.structs.replace(seen, status=Status.PASSED, attempt=2, at=DAY_S + 1)]
    return [CellStarted(cell, ("tokens.greedy",), 0.0, versions), seen, *rest]


def test_a_line_is_made_of_the_records() -> None:
    """A letter for each attempt in order, the time of the last, the open incidents, and a digest of code and
    model; none for an engine whose code nobody knows, or a model that nobody could read."""
    log = (incident("critical"), incident("low", "fixed"), incident("high", "closed"))
    made = history.gate_run("small", records(Status.FAILED)[::-1], log)
    assert {cell: seen.checks for cell, seen in made.cells.items()} == {CELL.id: {"tokens.greedy": "FP"}}
    assert (made.at, made.day.isoformat(), made.incidents) == (
        DAY_S + 1,
        "1970-01-02",
        {"critical": 1, "low": 1},
    )
    digests = [
        next(iter(history.gate_run("small", each).cells.values())).digest
        for each in (
            records(Status.FAILED), records(Status.PASSED), records(Status.PASSED, model="def"),
            records(Status.PASSED, "py:mine.py:Engine"), records(Status.PASSED, model=""),
        )
    ]  # fmt: skip
    passed = records(Status.PASSED)
    other = [msgspec.structs.replace(r, content="d") if isinstance(r, Evidence) else r for r in passed]
    (beside,) = history.gate_run("small", other).cells.values()
    assert digests[0] == digests[1]
    assert len({digests[0], digests[2], beside.digest}) == 3
    assert len(digests[0]) == 16
    assert digests[3:] == ["", ""]


# --- the file ---------------------------------------------------------------------------------------------


def test_what_is_appended_is_read_once_and_in_time(tmp_path: Path) -> None:
    """A file, or a folder of them; a run that is written again, or lies in two files, counts once."""
    place = tmp_path / "deep" / "history.jsonl"
    for one in (run("F", 2), run("P", 1), run("F", 2)):
        history.append(place, one)
    assert history.read(place) == ([run("P", 1), run("F", 2)], [])
    assert place.read_bytes().count(b"\n") == 2
    (place.parent / "another.jsonl").write_bytes(place.read_bytes())
    history.append(place.parent, run("P", 3))
    assert history.read(place.parent) == ([run("P", 1), run("F", 2), run("P", 3)], [])
    assert history.read(tmp_path / "absent.jsonl") == ([], [])
    history.append(tmp_path / "new", run("P", 1))
    assert history.read(tmp_path / "new/history.jsonl") == ([run("P", 1)], [])


@pytest.mark.parametrize(
    "line",
    [
        msgspec.json.encode(run("F", 2))[:40],
        b"\xff\xfe",
        b"[" * 5000,
        b'{"kind":"check"}',
        msgspec.json.encode(run("F", 2)).replace(b'"F"', b'"X"'),
        msgspec.json.encode(run("F", 2)).replace(b'"F"', b'""'),
        msgspec.json.encode(run("F", 2)).replace(b'"at":172800.0', b'"at":1e300'),
        msgspec.json.encode(run("F", 2)).replace(b'"schema":1', b'"schema":1,"more":2'),
    ],
)
def test_a_torn_or_foreign_line_is_named_and_the_others_count(tmp_path: Path, line: bytes) -> None:
    """Wherever it stands; and what is written behind a torn line has a line of its own."""
    place = tmp_path / "history.jsonl"
    place.write_bytes(line + b"\n" + msgspec.json.encode(run("P", 1)) + b"\n" + line)
    history.append(place, run("F", 3))
    runs, notes = history.read(place)
    assert runs == [run("P", 1), run("F", 3)]
    assert [note.split(" is left out")[0] for note in notes] == [f"{place} line 1", f"{place} line 3"]


def test_a_history_that_cannot_be_used_costs_no_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be read or written is said, and the gate goes on with what it saw itself."""
    blocked = tmp_path / "file" / "history.jsonl"
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the history"):
        history.append(blocked, run("P", 1))
    earlier = Past(Console(), blocked, "small", records(Status.FAILED), ())
    earlier.keep()
    assert "cannot write the history" in capsys.readouterr().err
    assert earlier.standings[KEY] == StandingResult(2, 1, True, "1970-01-02", 1, "F")


def test_notes_are_said_and_the_run_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A gate reads what others left, says what it could not, and leaves its own line for the next."""
    place = tmp_path / "history.jsonl"
    place.write_bytes(b"torn")
    Past(Console(), place, "small", records(Status.FAILED), ()).keep()
    assert f"history: {place} line 1 is left out" in capsys.readouterr().err
    then = [msgspec.structs.replace(r, at=r.at + DAY_S) for r in records(Status.FAILED)]  # type: ignore[union-attr]
    found = Past(Console(), place, "small", then, ()).standings[KEY]
    assert (found.runs, found.failed, found.failing_since, found.failing_runs) == (4, 2, "1970-01-02", 2)
