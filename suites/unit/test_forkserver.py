"""Cells that are forked: their exit codes, their output, their groups, and their end with the server's."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prill_harness.plan.plan import Plan
from prill_harness.records import ledger as ledgers
from prill_harness.records.evidence import Cell, Evidence, Status
from prill_harness.run import cells, executor
from prill_harness.run.forkserver import ForkServer

SUITE = """
import os, signal
from prill_harness.run.checks import check

@check("demo.one", kills=("rope_pairing",))
def test_one(observe):
    {body}
    observe.saw(1, oracle="numpy64")
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer(cells.environment(2)) as running:
        yield running


def suite(folder: Path, body: str = "pass") -> tuple[list[str], Path, Path]:
    """What a cell with that check gets, its ledger and its log."""
    (folder / "demo.py").write_text(SUITE.format(body=body))
    ledger = folder / "ledger.jsonl"
    return cells.arguments(Cell("a.gguf", "numpy", "demo"), ledger, folder), ledger, folder / "cell.log"


def test_a_forked_cell_writes_its_ledger_and_its_log(server: ForkServer, tmp_path: Path) -> None:
    """Exit code 0 and a passed check; what is printed is in the log, from a process that leads its group."""
    words, ledger, log = suite(tmp_path, "assert os.getpgid(0) == os.getpid()")
    process = server.start(words, log)
    assert process.wait() == process.poll() == 0
    (found,) = [record for record in ledgers.read(ledger) if isinstance(record, Evidence)]
    assert found.status.value == "passed"
    assert "1 passed" in log.read_text()


def test_exit_codes_and_signals_are_told_apart(server: ForkServer, tmp_path: Path) -> None:
    """A check that fails, a process that leaves and one that is killed each end with a code of their own."""
    ends = {"assert False": 1, "os._exit(7)": 7, "os.kill(os.getpid(), signal.SIGSEGV)": -signal.SIGSEGV}
    started = {}
    for number, body in enumerate(ends):
        folder = tmp_path / str(number)
        folder.mkdir()
        words, _, log = suite(folder, body)
        started[body] = server.start(words, log)
    assert {body: process.wait() for body, process in started.items()} == ends


def test_a_cell_leaves_nothing_undone(server: ForkServer, tmp_path: Path) -> None:
    """A thread that nobody joined ends first, then what was registered for the end is done, and what both
    print last is in the log."""
    os.mkfifo(gate := tmp_path / "gate")
    thread = f"threading.Thread(target=lambda: print(open({str(gate)!r}).read(), end='')).start()"
    words, _, log = suite(
        tmp_path, f"import atexit, threading; {thread}; atexit.register(print, 'end', end='')"
    )
    log.touch()
    process = server.start(words, log)
    while "1 passed" not in log.read_text():
        assert process.poll() is None
    gate.write_text("thread, ")
    assert process.wait() == 0
    assert log.read_text().endswith("thread, end")


def test_cells_end_with_their_server(tmp_path: Path) -> None:
    """When whoever asked is gone, so is the server, and with it a cell that would have waited for ever."""
    with ForkServer(cells.environment(2)) as server:
        started = tmp_path / "started"
        words, _, log = suite(tmp_path, f"open({str(started)!r}, 'w').close(); signal.pause()")
        process = server.start(words, log)
        while not started.exists():
            assert process.poll() is None
        handle = os.pidfd_open(process.pid)
    try:
        assert select.select([handle], [], [], 30)[0], "the cell still runs"
    finally:
        os.close(handle)


def test_a_server_that_died_is_said_so(tmp_path: Path) -> None:
    """Starting a cell then is an error with the exit code, and a cell that ran counts as killed."""
    with ForkServer(cells.environment(2)) as server:
        words, _, log = suite(tmp_path, "signal.pause()")
        process = server.start(words, log)
        os.killpg(server.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with pytest.raises(ChildProcessError, match="ended with exit code -9"):
            server.start(words, log)


def test_what_is_imported_before_the_fork_leaves_suites_and_plugin_alone() -> None:
    """pytest rewrites the asserts of what it imports itself: none of that may be there before."""
    program = "from prill_harness.recording import forked; import sys; forked.share(); print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = said.stdout.split()
    assert {"pytest", "prill_harness.recording.recorder"} <= set(loaded)
    assert not [name for name in loaded if name.startswith(("prill_suites", "prill_harness.plugin"))]


def test_threads_are_limited_whatever_runs_beside_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cell has one BLAS thread, also alone; alone it may have as many as its caller says."""
    names, environment = cells.THREADS, cells.environment
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert {environment(jobs)[name] for jobs in (1, 2) for name in names} == {"1"}
    monkeypatch.setenv(names[0], "8")
    assert (environment(1)[names[0]], environment(2)[names[0]]) == ("8", "1")
    assert environment(1)[names[1]] == "1"


@pytest.mark.parametrize(("threads", "forked"), [("1", True), ("2", False)])
def test_cells_are_forked_where_they_have_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: str, forked: bool
) -> None:
    """One cell at a time, too; of a caller who wants more threads each cell is executed from the start."""
    monkeypatch.setenv(cells.THREADS[0], threads)
    suite(tmp_path, "observe.note(parent=os.getppid(), threads=os.environ['OMP_NUM_THREADS'])")
    plan = Plan("run", tuple(Cell(model, "numpy", "demo") for model in ("a.gguf", "b.gguf")), folder=tmp_path)
    found = [r for r in executor.run(plan, tmp_path / "out", 1) if isinstance(r, Evidence)]
    assert [(each.status, each.detail["threads"]) for each in found] == [(Status.PASSED, threads)] * 2
    parents = {each.detail["parent"] for each in found}
    assert len(parents) == 1
    assert (parents != {os.getpid()}) is forked
