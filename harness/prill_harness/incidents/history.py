"""The history of gates, one JSON line for each: how often a check fails, and for how long it has.

`out/history.jsonl`, or a folder of such files that is handed from one CI run to the next. Lines that are torn
or of something else are named and left out. A line counts once however often it is there, so that histories
of parallel runs can be thrown together.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from prill_harness.faults.opening import foreign
from prill_harness.numbers.compare import largest
from prill_harness.records.evidence import CellStarted, Evidence, Record, Status, badness
from prill_harness.records.verdict import IncidentResult, IncidentState, StandingResult
from prill_runtime.errors import OutputError
from prill_runtime.files import refuse_pipe

FILE = "history.jsonl"
RECENT = 30  # runs that a report draws
LETTERS = {Status.PASSED: "P", Status.FAILED: "F", Status.ERROR: "E", Status.INCONCLUSIVE: "I"}
WORST_FIRST = "".join(LETTERS[status] for status in sorted(LETTERS, key=badness))


class CellSeen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one cell showed.

    Attributes:
        digest: of all that its checks depend on; empty for an engine whose code nobody knows, so that no two
            runs of it are taken for the same.
        checks: check id -> a letter for each attempt, in order: (P)assed, (F)ailed, (E)rror, (I)nconclusive.
    """

    digest: str
    checks: dict[str, str]


class HistoryLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="gate"):
    """One line: a gate that ran.

    Attributes:
        at: when its last evidence was written, in seconds since 1970 UTC.
        incidents: severity -> how many were open.
    """

    gate: str
    at: float
    cells: dict[str, CellSeen]
    incidents: dict[str, int] = {}
    schema: int = 1

    @property
    def day(self) -> dt.date:
        """The day on which it ended, in UTC."""
        return dt.datetime.fromtimestamp(self.at, dt.UTC).date()

    def meaning(self) -> None:
        """Refuse letters and times that mean nothing.

        Raises:
            ValueError, OverflowError, OSError: there is one.
        """
        self.worst()
        _ = self.day

    def worst(self) -> dict[tuple[str, str], str]:
        """(cell id, check id) -> the letter of the worst attempt."""
        return {
            (cell, check): min(letters, key=WORST_FIRST.index)
            for cell, seen in self.cells.items()
            for check, letters in seen.checks.items()
        }


def gate_run(gate: str, records: Iterable[Record], incidents: Iterable[IncidentResult] = ()) -> HistoryLine:
    """The line of a gate that left these records."""
    records = list(records)
    seen = sorted(
        (r for r in records if isinstance(r, Evidence)), key=lambda e: (e.cell.id, e.check, e.attempt)
    )
    contents = {each.cell.id: each.content for each in reversed(seen)}  # of each cell's first check
    digests = {
        r.cell.id: _digest(r, contents.get(r.cell.id, ""))
        for r in records
        if isinstance(r, CellStarted) and r.attempt == 1
    }
    letters: dict[str, dict[str, str]] = defaultdict(dict)
    for each in seen:
        mine = letters[each.cell.id]
        mine[each.check] = mine.get(each.check, "") + LETTERS[each.status]
    cells = {cell: CellSeen(digests.get(cell, ""), checks) for cell, checks in letters.items()}
    unsolved = [i.severity.value for i in incidents if i.state is not IncidentState.CLOSED]
    counts = {severity: unsolved.count(severity) for severity in sorted(set(unsolved))}
    return HistoryLine(gate, largest(0.0, *(e.at for e in seen)), cells, counts)


def _digest(start: CellStarted, content: str) -> str:
    """Of prill's code, the suite's with the files beside it that it uses (`content`), the model and the
    libraries; a foreign engine's code is in none."""
    if foreign(start.cell.engine) or not start.versions.get("model_sha256"):
        return ""
    facts = {k: v for k, v in start.versions.items() if k != "selection"} | {"content": content}
    return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()[:16]


def read(place: Path) -> tuple[list[HistoryLine], list[str]]:
    """The runs of a file, or of every .jsonl file of a folder, in time; and a sentence for each line or file
    that is left out. What is not there is empty."""
    runs: dict[bytes, HistoryLine] = {}
    notes: list[str] = []
    for file in sorted(place.glob("*.jsonl")) if place.is_dir() else [place]:
        try:
            refuse_pipe(file)
            content = file.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            notes.append(f"{file} cannot be read: {error.strerror}")
            continue
        for number, line in enumerate(content.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                run = _decoder.decode(line)
                run.meaning()
                runs[_key(run)] = run
            except (msgspec.MsgspecError, ValueError, OverflowError, OSError, RecursionError) as error:
                notes.append(f"{file} line {number} is left out, for it is no gate's: {_short(error)}")
    return sorted(runs.values(), key=lambda run: (run.at, run.gate)), notes


def append(place: Path, run: HistoryLine) -> None:
    """Write a run behind the others, once; a line torn by a killed writer is ended first.

    Raises:
        OutputError: it cannot be written.
    """
    if _key(run) in map(_key, read(place)[0]):
        return
    folder = place.is_dir() or not (place.suffix or place.exists())
    file = place / FILE if folder else place
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+b") as out:
            torn = out.tell() and os.pread(out.fileno(), 1, out.tell() - 1) != b"\n"
            out.write(b"\n" * bool(torn) + msgspec.json.encode(run) + b"\n")
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise OutputError("cannot write the history", where=str(file), got=error.strerror) from None


def standings(runs: Sequence[HistoryLine], now: HistoryLine) -> Mapping[tuple[str, str], StandingResult]:
    """What the runs up to now say of each check that fails now, or does not do the same each time.

    Runs after `now` are left out, so that a verdict that is computed again is the same.
    """
    before = [run for run in runs if run.at <= now.at and _key(run) != _key(now)]
    worst = [(run.day, run.worst()) for run in (*before, now)]
    found = {}
    for cell, seen in now.cells.items():
        alike = [run.cells[cell].checks for run in before if _alike(run.cells.get(cell), seen)]
        for check, letters in seen.checks.items():
            told = "".join([*(checks.get(check, "") for checks in alike), letters])
            failed, passed = told.count("F"), told.count("P")
            row = _row(worst, (cell, check))
            if row or (failed and passed):
                since = row[-1].isoformat() if row else ""
                flaky = bool(failed and passed)
                recent = "".join(seen_then.get((cell, check), "") for _, seen_then in worst)[-RECENT:]
                found[cell, check] = StandingResult(failed + passed, failed, flaky, since, len(row), recent)
    return found


def _alike(one: CellSeen | None, other: CellSeen) -> bool:
    return one is not None and bool(one.digest) and one.digest == other.digest


def _row(
    worst: Sequence[tuple[dt.date, Mapping[tuple[str, str], str]]], key: tuple[str, str]
) -> list[dt.date]:
    """Days of the unbroken row of failed runs that ends now, latest first. Only a pass breaks it: a run that
    saw nothing says nothing."""
    row: list[dt.date] = []
    if worst[-1][1].get(key) == "F":
        for day, letters in reversed(worst):
            if letters.get(key) == "P":
                break
            row += [day] if letters.get(key) == "F" else []
    return row


def _key(run: HistoryLine) -> bytes:
    """The same for two lines of one run."""
    bare = msgspec.structs.replace(run, incidents={})
    return hashlib.sha256(msgspec.json.encode(bare, order="sorted")).digest()


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


_decoder: msgspec.json.Decoder[HistoryLine] = msgspec.json.Decoder(HistoryLine)
