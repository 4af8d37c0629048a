"""What is said before long work begins: how many cells, for how long, and which golden is recorded first."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prill_harness.commands.gates import run
from prill_harness.commands.shared import runs
from prill_harness.console import Console
from prill_harness.plan.estimate import TYPICAL, Ahead, estimate, recorded
from prill_harness.records import catalog
from prill_harness.records.catalog import suites
from prill_harness.records.evidence import Cell, CellEnded, CellStarted
from prill_harness.records.ledger import Ledger
from prill_harness.run.pool import Event

from .commandline import child, invoke
from .tiny_gguf import tiny

SECONDS = st.floats(0.5, 1000)


def write(path: Path, times: dict[Cell, float]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with Ledger(path) as ledger:
        for cell, seconds in times.items():
            ledger.append(CellStarted(cell, (), 0.0))
            ledger.append(CellEnded(cell, 0, seconds, 0.0))
    return path


def cells(count: int, suite: str = "tokens", engine: str = "numpy") -> list[Cell]:
    return [Cell(f"m{n}", engine, suite) for n in range(count)]


@given(st.lists(SECONDS, min_size=1, max_size=9), st.integers(1, 4))
def test_cells_take_what_they_took(took: list[float], jobs: int) -> None:
    """Between the longest cell and all of them one after another, and no less than the jobs can share."""
    plan = cells(len(took))
    found = estimate(plan, dict(zip(plan, took, strict=True)), jobs)
    assert found.unknown == 0
    assert max(max(took), sum(took) / jobs) <= found.seconds * 1.000001
    assert found.seconds <= sum(took) * 1.000001


def test_a_cell_that_never_ran_is_like_its_suite_with_other_models() -> None:
    """Another suite takes what is typical of it on a packaged model; another engine is counted as unknown."""
    known = {Cell("m0", "numpy", "tokens"): 4.0, Cell("m1", "numpy", "tokens"): 6.0}
    plan = [*cells(3), *cells(1, "stages"), *cells(1, engine="emu")]
    found = estimate(plan, known, 1)
    assert (found.seconds, found.unknown, found.typical) == (4.0 + 6.0 + 5.0 + TYPICAL["stages"], 1, 1)
    assert str(found) == (
        "about 15 s by what 1 of the cells take on a packaged model, and 1 cells of which nothing is recorded"
    )
    assert str(estimate(plan[:3], known, 1)) == "about 15 s by what earlier runs took"
    assert str(estimate(plan[-1:], {}, 1)) == "how long that takes was never recorded here"


def test_every_packaged_suite_has_a_typical_time() -> None:
    """So that the very first run says how long it will take."""
    assert set(TYPICAL) == set(suites())


def test_ledgers_give_the_times_of_cells_that_ended(tmp_path: Path) -> None:
    """The first ledger that has a cell counts; one that is damaged or absent is left out."""
    one, two = cells(2)
    first = write(tmp_path / "a.jsonl", {one: 1.0})
    second = write(tmp_path / "b.jsonl", {one: 9.0, two: 2.0})
    (tmp_path / "c.jsonl").write_text("no ledger")
    found = recorded((first, tmp_path / "c.jsonl", tmp_path / "absent.jsonl", second))
    assert found == {one: 1.0, two: 2.0}


def test_a_bare_run_says_what_it_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first cell starts: how many there are, of what, and how long by the gate's ledger."""
    monkeypatch.chdir(tmp_path)

    def stop(plan: object, *rest: object, **more: object) -> Sequence[object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_plan", stop)
    suites = catalog.suites()
    write(Path("out/ledger.jsonl"), {Cell("fixture:llama-tiny", "numpy", s): 10.0 for s in suites})
    result = invoke("run", "-j", "2")
    assert result.exit_code == 2
    told = re.fullmatch(
        r"(\d+) cells: (\d+) models x (\d+) suites with numpy, 2 at a time, into out/run; about (\d+) min by "
        r"what earlier runs took; name suites or checks to run fewer",
        result.stderr.splitlines()[0],
    )
    assert told
    count, models, of, minutes = map(int, told.groups())
    assert (count, of) == (models * len(suites), len(suites))
    assert abs(minutes - count * 10 / 2 / 60) <= 1
    assert "cells:" not in invoke("run", "tokens.greedy").stderr


def test_a_golden_is_recorded_in_sight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run on a user's file says that it records a golden and where, and shows how far it is; the
    next finds it there."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path / "cache"))
    tiny(tmp_path / "own.gguf")
    words = ("run", "--model", "own.gguf", "-j", "1", "tokens.prompt_ids")
    first = child(*words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (kept,) = (tmp_path / "cache" / "goldens").glob("*.json")
    said, *steps = first.stderr.splitlines()
    assert said == f"recording the golden of own.gguf, once for this file: {kept}"
    done = [match for step in steps if (match := re.match(r"\[ *(\d+)/(\d+)\].* recording", step))]
    assert len(done) > 5
    assert done[-1][1] == done[-1][2]
    assert "recording" not in child(*words, cwd=tmp_path).stderr


@pytest.mark.parametrize(
    "words", [("fixture:llama-tiny",), ("own.gguf", "-o", "x.json"), ("own.gguf", "--tokens", "3")]
)
def test_what_is_kept_is_made_in_one_way(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The golden that commands look for takes no other prompts, tokens or place: exit 4, nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path / "cache"))
    tiny(Path("own.gguf"))
    result = invoke("golden", "record", "--keep", *words)
    assert (result.exit_code, result.stderr.count("\n")) == (4, 1), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["own.gguf"]


# --- while it runs --------------------------------------------------------------------------------------


@given(st.lists(SECONDS, min_size=1, max_size=9), st.integers(1, 4), st.randoms())
def test_what_is_left_falls_to_nothing(took: list[float], jobs: int, shuffle: random.Random) -> None:
    """Whatever the order in which cells end: never more than before, nothing at the end; again, no less."""
    plan = cells(len(took))
    ahead = Ahead(plan, dict(zip(plan, took, strict=True)), jobs)
    assert ahead.left == pytest.approx(sum(took) / min(jobs, len(plan)))
    shuffle.shuffle(plan)
    for cell in plan:
        before = ahead.left
        ahead.over(cell)
        ahead.over(cell)
        assert before is not None
        assert ahead.left is not None
        assert ahead.left <= before
    assert ahead.left == pytest.approx(0.0, abs=1e-6)


def test_what_nobody_knows_is_not_foretold() -> None:
    """One cell of which nothing is recorded: no time is told until it is over."""
    plan = [*cells(2), *cells(1, engine="emu")]
    ahead = Ahead(plan, {plan[0]: 4.0, plan[1]: 6.0}, 1)
    assert (ahead.left, ahead.lasts(plan[0]), ahead.lasts(plan[2])) == (None, 4.0, None)
    ahead.over(plan[2])
    assert ahead.left == 10.0


def told(capsys: pytest.CaptureFixture[str], *, quiet: bool) -> list[str]:
    """What a run of four cells says on stderr, its clock aside."""
    plan = [*cells(3), *cells(1, engine="emu")]
    ahead = Ahead(plan, {plan[0]: 2.0, plan[1]: 40.0, plan[2]: 6.0}, 1)
    counts = [{"passed": 3}, {"passed": 1, "failed": 2}, {"error": 1}, {}]
    with Console(quiet=quiet).progress(4, "cells") as bar:
        tell = runs.teller(bar, ahead)
        for number, cell in enumerate(plan):
            tell(Event("started", cell, number, 4))
            tell(Event("ended", cell, number + 1, 4, counts[number]))
    out, err = capsys.readouterr()
    assert out == ""
    return [re.sub(r"\d+\.\d s", "T", line) for line in err.splitlines()]


def test_long_work_shows_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """Plain lines without a terminal: how much is done and in what time, what is left, which long cell began,
    what was found, and what failed so far."""
    assert told(capsys, quiet=False) == [
        "[1/4]    T  m0/numpy/tokens/cpu: 3 passed",
        "[1/4]    T  m1/numpy/tokens/cpu has begun, about 40 s",
        "[2/4]    T  m1/numpy/tokens/cpu: 2 failed, 1 passed; so far 2 failed",
        "[3/4]    T  m2/numpy/tokens/cpu: 1 error; so far 2 failed, 1 error",
        "[3/4]    T  m0/emu/tokens/cpu has begun",
        "[4/4]    T, about 0 s left  m0/emu/tokens/cpu: no evidence; so far 2 failed, 1 error",
    ]


def test_quiet_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """--quiet leaves stderr to what went wrong."""
    assert told(capsys, quiet=True) == []


def test_a_run_foretells_and_is_quiet_when_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says, from the run before, for how long; --quiet drops every line, and the result is the same."""
    monkeypatch.chdir(tmp_path)
    cell = Cell("fixture:llama-tiny", "numpy", "errors")
    write(tmp_path / "out/run/ledger.jsonl", {cell: 120.0})
    words = ("run", "errors", "--model", cell.model, "-j", "1")
    first = invoke(*words)
    assert first.exit_code == 0
    assert f"{cell.id} has begun, about 2 min" in first.stderr
    assert re.search(rf", about 0 s left  {cell.id}: \d+ passed", first.stderr)
    silent = invoke(*words, "--quiet")
    assert (silent.exit_code, silent.stderr) == (0, "")
    table = [[line.split()[:2] for line in said.stdout.splitlines()] for said in (first, silent)]
    assert table[0] == table[1]
