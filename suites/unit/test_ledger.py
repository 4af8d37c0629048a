"""A ledger that somebody altered is not believed: no record edited, dropped, repeated or moved passes."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prill_harness.records.evidence import (
    Cell,
    CellEnded,
    CellStarted,
    CheckStarted,
    Evidence,
    Record,
    Status,
)
from prill_harness.records.ledger import Ledger, audited, lines, read
from prill_harness.run.gather import merge
from prill_runtime.errors import LedgerError

from .commandline import child

ONE, TWO = Cell("m", "numpy", "s"), Cell("m", "numpy", "t")


def evidence(cell: Cell, name: str, status: Status = Status.PASSED) -> Evidence:
    return Evidence(
        f"{cell.suite}.{name}", "", cell, status, 3, "seen", "an oracle", ("a_fault",), "prill run"
    )


def of_cell(cell: Cell) -> list[Record]:
    """What a cell of two checks, one of which failed, leaves."""
    return [
        CellStarted(cell, (f"{cell.suite}.a", f"{cell.suite}.b"), 1.0, {"prill": "0.1.0"}),
        CheckStarted(cell, f"{cell.suite}.a", 2.0),
        evidence(cell, "a"),
        CheckStarted(cell, f"{cell.suite}.b", 3.0),
        evidence(cell, "b", Status.FAILED),
        CellEnded(cell, 1, 1.0, 4.0),
    ]


RECORDS = [r for pair in zip(of_cell(ONE), of_cell(TWO), strict=True) for r in pair]
WHOLE = lines(RECORDS)
TEMPORARY = tempfile.TemporaryDirectory(prefix="prill-ledgers-")


def written(folder: Path, content: bytes) -> Path:
    (folder / "ledger.jsonl").write_bytes(content)
    return folder / "ledger.jsonl"


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """Record by record with reopening in between, and as a whole: the same bytes, the same records."""
    for record in RECORDS:
        with Ledger(tmp_path / "one.jsonl") as ledger:
            ledger.append(record)
    assert (tmp_path / "one.jsonl").read_bytes() == WHOLE
    assert read(tmp_path / "one.jsonl") == tuple(RECORDS)


@settings(deadline=None)
@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_no_byte_can_be_changed(place: int, by: int) -> None:
    """Whatever byte becomes whatever other: refused, or it was the end of the last line."""
    content = bytearray(WHOLE)
    content[place] ^= by
    folder = Path(TEMPORARY.name)
    try:
        found = read(written(folder, bytes(content)))
    except LedgerError:
        return
    assert found == tuple(RECORDS[: len(found)])
    assert place >= len(WHOLE) - 1 or bytes(content).split() == WHOLE.split()


@settings(deadline=None)
@given(st.data())
def test_no_line_can_be_dropped_repeated_or_moved(data: st.DataObject) -> None:
    """Unless it is the end of a cell that is gone, and then the cell is unfinished."""
    each = WHOLE.splitlines(keepends=True)
    at = data.draw(st.integers(0, len(each) - 1))
    way = data.draw(st.sampled_from(["drop", "repeat", "move"]))
    changed = each[:at] + each[at + 1 :]
    if way == "repeat":
        changed = [*each[: at + 1], *each[at:]]
    elif way == "move":
        changed.insert(data.draw(st.integers(0, len(changed))), each[at])
    file = written(Path(TEMPORARY.name), b"".join(changed))
    by_cell = [[r for r in RECORDS if r.cell == cell] for cell in (ONE, TWO)]
    try:
        found = read(file)
    except LedgerError:
        return
    for cell, whole in zip((ONE, TWO), by_cell, strict=True):
        mine = [r for r in found if r.cell == cell]
        assert mine == whole[: len(mine)]
        assert len(mine) >= len(whole) - (way == "drop")


def test_a_torn_line_is_left_out_and_the_chain_goes_on(tmp_path: Path) -> None:
    """A writer that was killed in the middle of a record: the next one continues after the last whole one."""
    first, second, *rest = RECORDS
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.append(first)
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(lines([second])[:40])
    for record in (second, *rest):
        with Ledger(tmp_path / "ledger.jsonl") as ledger:
            ledger.append(record)
    assert read(tmp_path / "ledger.jsonl") == tuple(RECORDS)


CONTRADICTIONS: dict[str, Callable[[list[Any]], None]] = {
    "exit code 1, got 0": lambda r: r.__setitem__(-1, CellEnded(ONE, 0, 1.0, 4.0)),
    "schema 3, got 1": lambda r: r.__setitem__(0, CellStarted(ONE, ("s.a", "s.b"), 1.0, {}, 1)),
}


@pytest.mark.parametrize("said", CONTRADICTIONS)
def test_a_ledger_that_contradicts_itself_is_refused(tmp_path: Path, said: str) -> None:
    """With digests computed anew: exit code and schema have to fit the evidence."""
    records = of_cell(ONE)
    CONTRADICTIONS[said](records)
    with pytest.raises(LedgerError, match=f"the ledger contradicts itself.*expected {said}"):
        audited(written(tmp_path, lines(records)))


def test_ledgers_of_two_versions_are_not_put_together(tmp_path: Path) -> None:
    """Shards run by two versions of prill, or on another file under a fixture's name."""
    one, two = of_cell(ONE), of_cell(TWO)
    two[0] = msgspec.structs.replace(two[0], versions={"prill": "0.2.0"})
    for name, records in (("one", one), ("two", two)):
        (tmp_path / name).write_bytes(lines(records))
    with pytest.raises(LedgerError, match=r"two versions of prill.*expected 0\.1\.0, got 0\.2\.0"):
        merge([tmp_path / "one", tmp_path / "two"])
    cell = Cell("fixture:llama-tiny", "numpy", "s")
    other = [msgspec.structs.replace(r, cell=cell) for r in of_cell(ONE)]
    other[0] = msgspec.structs.replace(other[0], versions={"prill": "0.1.0", "model_sha256": "0" * 64})
    (tmp_path / "three").write_bytes(lines(other))
    with pytest.raises(LedgerError, match="another file than the packaged fixture"):
        merge([tmp_path / "three"])


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small gate that ran."""
    folder = tmp_path_factory.mktemp("gated")
    (folder / "gates.toml").write_text(
        'default = "g"\n[gates.g]\nchecklists = ["foundation"]\nblocks_at = "low"\nminimum_executed = 1\n'
        "max_inconclusive = 9\nmax_flaky = 0\n"
        '[[gates.g.plan]]\nmodels = ["fixture:llama-tiny"]\nengines = ["numpy"]\nsuites = ["blocks"]\n',
        encoding="utf-8",
    )
    done = child("gate", "--policy", "gates.toml", "-j", "1", cwd=folder)
    assert (folder / "out" / "verdict.json").is_file(), done.stderr
    return folder


def edited(text: str, *path: str | int, to: object) -> str:
    """JSON text with one value replaced."""
    whole = json.loads(text)
    place = whole
    for step in path[:-1]:
        place = place[step]
    assert place[path[-1]] != to
    place[path[-1]] = to
    return json.dumps(whole)


VERDICTS: dict[str, Callable[[str], str]] = {
    "status": lambda t: edited(t, "status", to="waived"),
    "exit code": lambda t: edited(t, "exit_code", to=7),
    "sentence": lambda t: edited(t, "sentence", to="all is well"),
    "a check's sentence": lambda t: edited(t, "checks", 0, "sentence", to="fine"),
    "a rule": lambda t: edited(t, "rules", 0, "sentence", to="fine"),
    "the digest": lambda t: edited(t, "digest", to="0" * 64),
    "no digest": lambda t: edited(t, "digest", to=""),
    "a check dropped": lambda t: edited(t, "checks", to=[]),
}


@pytest.mark.parametrize("what", VERDICTS)
def test_an_edited_verdict_is_not_reported(gated: Path, tmp_path: Path, what: str) -> None:
    """Whatever is changed in verdict.json: one sentence, exit 4."""
    out = shutil.copytree(gated / "out", tmp_path / "out")
    file = out / "verdict.json"
    file.write_text(VERDICTS[what](file.read_text(encoding="utf-8")), encoding="utf-8")
    done = child("report", "--ledger", str(out / "ledger.jsonl"))
    assert (done.returncode, done.stdout) == (4, "")
    assert "the verdict was altered after the gate wrote it" in done.stderr


def test_a_verdict_of_another_ledger_is_not_reported(gated: Path, tmp_path: Path) -> None:
    """The same run's ledger without one cell's last record reads well, and is not the verdict's."""
    out = shutil.copytree(gated / "out", tmp_path / "out")
    ledger = out / "ledger.jsonl"
    assert child("report", "--ledger", str(ledger)).returncode == 0
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    done = child("report", "--ledger", str(ledger))
    assert done.returncode == 4
    assert "the verdict is of another ledger" in done.stderr


def test_a_folder_belongs_to_one_run(gated: Path) -> None:
    """While its lock is held a second run is refused in one sentence, and leaves what is there alone."""
    from filelock import FileLock

    before = (gated / "out" / "verdict.json").read_bytes()
    with FileLock(gated / "out" / ".lock"):
        done = child("gate", "--policy", "gates.toml", "-j", "1", cwd=gated)
    assert done.returncode == 4
    assert "another run writes into this folder" in done.stderr
    assert (gated / "out" / "verdict.json").read_bytes() == before
