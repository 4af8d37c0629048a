"""Plans, shards, merging, and cells run in fresh processes: killed, timed out, interrupted, resumed."""

from __future__ import annotations

import datetime as dt
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prill_harness.decide import gate
from prill_harness.decide.checklist import load_checklists
from prill_harness.faults.trial.kills import FaultTrial, Kills
from prill_harness.plan import plan, policy
from prill_harness.plan.plan import Plan
from prill_harness.plan.policy import Gate, PlanEntry
from prill_harness.records import ledger as ledgers
from prill_harness.records.evidence import Cell, CellEnded, CellStarted, Evidence, Record, Status
from prill_harness.records.ledger import Ledger
from prill_harness.records.verdict import Severity, Verdict
from prill_harness.run import executor
from prill_harness.run.gather import merge
from prill_harness.run.pool import Event
from prill_runtime.errors import NothingSelected, PolicyError, UsageError

from .commandline import interruptible

SUITE = """
import os, signal, sys, time
from pathlib import Path
from prill_harness.run.checks import check

@check("SUITE.first", kills=("rope_pairing",))
def test_first(observe):
    Path(__file__).with_name("runs.txt").open("a").write("SUITE.first " + str(os.getpid()) + "\\n")
    observe.saw(1, oracle="numpy64")

@check("SUITE.second", kills=("rope_pairing",))
def test_second(observe):
    {body}
    observe.saw(os.environ.get("OMP_NUM_THREADS") != "weird", oracle="numpy64")
"""
POLICY = """
default = "demo"
[gates.demo]
checklists = ["demo"]
minimum_executed = 4
[[gates.demo.plan]]
models = ["a.gguf"]
engines = ["numpy"]
suites = ["alpha", "beta"]
"""
CHECKLIST = """
id = "demo"
title = "Demo"
[[items]]
id = "demo.all"
title = "All"
why = "so"
severity = "critical"
checks = ["alpha.first", "alpha.second", "beta.first", "beta.second"]
"""
WAIT = "while not Path(__file__).with_name('go').exists(): time.sleep(0.01)"
TODAY = dt.date(2026, 1, 1)


def gate_of(suites: tuple[str, ...] = ("alpha", "beta"), models: tuple[str, ...] = ("a.gguf",)) -> Gate:
    entry = PlanEntry(models, ("numpy",), suites)
    return Gate("demo", ("demo",), ("demo",), frozenset(), (entry,), Severity.LOW, 1, 0, 0)


def project(folder: Path, *, alpha: str = "pass", beta: str = "pass") -> Plan:
    """Two tiny suites, a policy and a checklist in `folder`; the plan that runs them."""
    suites = folder / "suites"
    suites.mkdir(exist_ok=True)
    for name, body in (("alpha", alpha), ("beta", beta)):
        (suites / f"{name}.py").write_text(SUITE.replace("SUITE", name).format(body=body))
    (folder / "gates.toml").write_text(POLICY)
    (folder / "demo.toml").write_text(CHECKLIST)
    return plan.build(policy.load_policy(folder / "gates.toml").gate(), folder=suites)


def verdict(folder: Path, work: Plan, records: tuple[Record, ...]) -> Verdict:
    lists = load_checklists(
        folder=folder,
        names=["demo"],
        known={"alpha.first", "alpha.second", "beta.first", "beta.second"},
    )
    loaded = policy.load_policy(folder / "gates.toml")
    checks = {r.base: r.content for r in records if isinstance(r, Evidence)}
    planted = FaultTrial("", "head", "", ("logits",), "a.gguf", ("logits",), tuple(checks))
    kills = Kills({"rope_pairing": planted}, checks)
    return gate.decide(loaded, work, records, checklists=lists, kills=kills, as_of=TODAY)


def timeless(found: Verdict) -> bytes:
    """The verdict without what a clock wrote and without the folder of its checklist and policy."""
    items = tuple(msgspec.structs.replace(i, file=Path(i.file).name) for i in found.items)
    checks = tuple(msgspec.structs.replace(c, duration_s=0.0) for c in found.checks)
    cells = tuple(msgspec.structs.replace(c, duration_s=0.0, at=0.0) for c in found.cells)
    return msgspec.json.encode(
        msgspec.structs.replace(found, items=items, checks=checks, cells=cells, duration_s=0.0, policy=""),
        order="deterministic",
    )


def by_check(records: tuple[Record, ...]) -> dict[str, Evidence]:
    return {r.check: r for r in records if isinstance(r, Evidence)}


# --- building -------------------------------------------------------------------------------------------


def test_a_plan_is_every_combination_once_in_order(tmp_path: Path) -> None:
    """Entries multiply out in order, repetitions fall away, overrides replace engines and models."""
    project(tmp_path)
    folder = tmp_path / "suites"
    gate_ = gate_of(models=("a", "b", "a"))
    ids = [cell.id for cell in plan.build(gate_, folder=folder).cells]
    assert ids == ["a/numpy/alpha/cpu", "a/numpy/beta/cpu", "b/numpy/alpha/cpu", "b/numpy/beta/cpu"]
    other = plan.build(gate_, engines=["x"], models=["m"], suites=["beta"], folder=folder)
    assert [cell.id for cell in other.cells] == ["m/x/beta/cpu"]


def test_a_plan_refuses_what_it_cannot_run(tmp_path: Path) -> None:
    """A suite outside the gate, a suite without a file and an empty shard are errors with a sentence."""
    work = project(tmp_path)
    with pytest.raises(UsageError, match="no such suite: expected alpha or beta, got 'gamma'"):
        plan.build(gate_of(), suites=["gamma"], folder=tmp_path / "suites")
    with pytest.raises(UsageError, match="no such suite"):
        plan.build(gate_of(suites=("gamma",)), folder=tmp_path / "suites")
    with pytest.raises(NothingSelected):
        plan.shard(work, 3, 3)
    with pytest.raises(UsageError):
        plan.shard(work, 0, 2)


@given(st.integers(1, 30), st.integers(1, 12), st.randoms())
def test_shards_part_the_plan(cells: int, count: int, shuffle: object) -> None:
    """Every cell is in exactly one shard, and the split does not depend on the plan's order."""
    all_cells = [Cell(f"m{n}", "e", "s") for n in range(cells)]
    count = min(count, cells)
    forward = Plan("g", tuple(all_cells))
    backward = Plan("g", tuple(reversed(all_cells)))
    parts = [plan.shard(forward, i, count).cells for i in range(1, count + 1)]
    assert sorted(c for part in parts for c in part) == sorted(all_cells)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    again = [set(plan.shard(backward, i, count).cells) for i in range(1, count + 1)]
    assert again == [set(part) for part in parts]


def test_no_two_cells_share_a_ledger() -> None:
    """Ids that look alike as file names keep ledgers of their own."""
    cells = [Cell("a/b", "e", "s"), Cell("a-b", "e", "s"), Cell("a b", "e", "s"), Cell("x" * 300, "e", "s")]
    paths = {executor.ledger_path(Path("out"), cell) for cell in cells}
    assert len(paths) == 4
    assert all(len(p.name) < 120 and p.parent == Path("out/cells") for p in paths)


# --- merging --------------------------------------------------------------------------------------------


def ledger(path: Path, *cells: str, at: float = 1.0) -> Path:
    with Ledger(path) as file:
        for name in cells:
            cell = Cell(name, "numpy", "alpha")
            file.append(CellStarted(cell, ("alpha.first",), at))
            file.append(CellEnded(cell, 0, 1.0, at))
    return path


def test_merging_twice_is_merging_once(tmp_path: Path) -> None:
    """The order of ledgers and their repetition change nothing."""
    a, b = ledger(tmp_path / "a", "m1"), ledger(tmp_path / "b", "m2")
    once = merge([a, b])
    assert once == merge([b, a, b, a])
    assert len(once) == 4


def test_merging_refuses_missing_and_contradicting_cells(tmp_path: Path) -> None:
    """A cell run twice, a planned cell without records and an unplanned one are errors that name it."""
    a, b = ledger(tmp_path / "a", "m1"), ledger(tmp_path / "b", "m1", at=2.0)
    with pytest.raises(PolicyError, match=r"a cell was run twice.*m1/numpy/alpha/cpu"):
        merge([a, b])
    wanted = Plan("g", (Cell("m1", "numpy", "alpha"), Cell("m2", "numpy", "alpha")))
    with pytest.raises(PolicyError, match=r"planned cells are missing.*m2/numpy/alpha/cpu"):
        merge([a], wanted)
    with pytest.raises(PolicyError, match="not in the plan"):
        merge([a], Plan("g", ()))
    with pytest.raises(PolicyError, match="no such ledger"):
        merge([tmp_path / "nowhere"])


# --- running --------------------------------------------------------------------------------------------


def test_every_cell_runs_in_its_own_process_and_a_resume_runs_none(tmp_path: Path) -> None:
    """Two cells, two processes, a passing verdict; resumed, nothing runs and the verdict is byte-equal."""
    work = project(tmp_path)
    events: list[Event] = []
    records = executor.run(work, tmp_path / "out", jobs=2, progress=events.append)
    first = verdict(tmp_path, work, records)
    assert (first.status, first.exit_code) == (Status.PASSED, 0), first.sentence
    lines = (tmp_path / "suites/runs.txt").read_text().split("\n")[:-1]
    assert len({line.split()[1] for line in lines}) == 2
    assert sorted(e.kind for e in events) == ["ended", "ended", "started", "started"]
    assert events[-1].done == events[-1].total == 2
    assert events[-1].counts == {"passed": 2}
    events.clear()
    again = executor.run(work, tmp_path / "out", jobs=2, resume=True, progress=events.append)
    assert [e.kind for e in events] == ["resumed", "resumed"]
    assert msgspec.json.encode(verdict(tmp_path, work, again)) == msgspec.json.encode(first)
    assert ledgers.read(tmp_path / "out/ledger.jsonl") == again


def test_cells_run_from_both_ends_of_the_plan(tmp_path: Path) -> None:
    """Two at a time, one walks the plan forward and one backward; alone, it is walked in its order."""
    project(tmp_path)
    work = plan.build(gate_of(models=("a", "b", "c")), folder=tmp_path / "suites")
    for jobs, first in ((1, work.cells[:2]), (2, (work.cells[0], work.cells[-1]))):
        events: list[Event] = []
        executor.run(work, tmp_path / f"out{jobs}", jobs=jobs, progress=events.append)
        started = [event.cell for event in events if event.kind == "started"]
        assert tuple(started[:2]) == first
        assert sorted(started) == sorted(work.cells)


def test_a_resume_runs_again_what_changed(tmp_path: Path) -> None:
    """A suite whose code changed is run again, and its new failure is seen; the other is kept."""
    work = project(tmp_path)
    executor.run(work, tmp_path / "out", jobs=2)
    project(tmp_path, beta="assert False, 'now it is wrong'")
    from prill_harness.plan import provenance

    provenance.code_digest.cache_clear()
    events: list[Event] = []
    records = executor.run(work, tmp_path / "out", jobs=2, resume=True, progress=events.append)
    assert [(e.kind, e.cell.suite) for e in events if e.kind != "ended"] == [
        ("resumed", "alpha"),
        ("started", "beta"),
    ]
    assert by_check(records)["beta.second"].status is Status.FAILED


def test_a_selection_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    """A cell that ran one check alone is run again when a whole run resumes."""
    work = project(tmp_path)
    some = plan.build(gate_of(), checks=["alpha.first"], folder=tmp_path / "suites")
    assert set(by_check(executor.run(some, tmp_path / "out", jobs=1))) == {"alpha.first"}
    assert not executor.resumable(executor.ledger_path(tmp_path / "out", work.cells[0]), work.cells[0], work)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by signal 9 while beta.second ran"),
        ("os._exit(0)", "ended with exit code 0 while beta.second ran"),
        ("time.sleep(60)", "timed out after 3 s while beta.second ran"),
    ],
)
def test_a_cell_that_dies_leaves_an_error_and_never_a_pass(tmp_path: Path, body: str, told: str) -> None:
    """Killed, silently gone or too slow: the check in flight is an error, the verdict inconclusive."""
    work = project(tmp_path, beta=body)
    records = executor.run(work, tmp_path / "out", jobs=2, timeout_s=3)
    found = by_check(records)["beta.second"]
    assert found.status is Status.ERROR
    assert told in found.sentence
    result = verdict(tmp_path, work, records)
    assert (result.status, result.exit_code) == (Status.INCONCLUSIVE, 10)
    assert "beta.second" in result.sentence
    assert not executor.resumable(executor.ledger_path(tmp_path / "out", work.cells[1]), work.cells[1], work)


def test_a_cell_that_cannot_start_says_why(tmp_path: Path) -> None:
    """A suite that ends the process while it is collected leaves an error with its last words."""
    work = project(tmp_path)
    (tmp_path / "suites/beta.py").write_text("import os, sys\nos.write(2, b'no libcuda')\nos._exit(7)\n")
    found = by_check(executor.run(work, tmp_path / "out", jobs=2))["beta.process"]
    assert found.status is Status.ERROR
    assert "ended with exit code 7" in found.sentence


def test_the_callers_pytest_settings_do_not_reach_a_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PYTEST_ADDOPTS, an ini file and a conftest beside the caller change nothing in a cell."""
    work = project(tmp_path)
    (tmp_path / "conftest.py").write_text("raise SystemExit('the conftest was loaded')")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -k nothing\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k nothing")
    assert verdict(tmp_path, work, executor.run(work, Path("out"), jobs=2)).status is Status.PASSED


# --- ended half way -------------------------------------------------------------------------------------

DRIVER = """
import sys
from pathlib import Path
from prill_harness.plan import plan, policy
from prill_harness.run import executor
folder = Path(sys.argv[1])
work = plan.build(policy.load_policy(folder / "gates.toml").gate(), folder=folder / "suites")
try:
    executor.run(work, folder / "out", jobs=1)
except KeyboardInterrupt:
    ran = (folder / "suites/runs.txt").read_text().splitlines()
    sys.exit(2 if not Path("/proc", ran[-1].split()[1]).exists() else 9)
"""


def half_way(folder: Path, number: int) -> tuple[int, int]:
    """Start a run in a child, signal it while beta.second runs; the child's code, and the cell's pid."""
    child = subprocess.Popen([sys.executable, "-c", DRIVER, str(folder)], preexec_fn=interruptible)
    runs = folder / "suites/runs.txt"
    path = executor.ledger_path(folder / "out", Cell("a.gguf", "numpy", "beta"))
    while not (path.exists() and b'"beta.second","at"' in path.read_bytes()):
        assert child.poll() is None, "the run ended by itself"
        time.sleep(0.01)
    pid = next(int(line.split()[1]) for line in runs.read_text().splitlines() if line.startswith("beta"))
    child.send_signal(number)
    code = child.wait(20)
    for _ in range(1000):
        if not alive(pid):
            break
        time.sleep(0.01)
    return code, pid


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 2)])
def test_killed_half_way_and_resumed_gives_the_same_verdict(tmp_path: Path, number: int, code: int) -> None:
    """A run killed or interrupted in its second cell, then resumed, reaches the undisturbed run's verdict;
    its child does not outlive it, and what was finished is not run again."""
    whole = tmp_path / "whole"
    whole.mkdir()
    undisturbed = project(whole, beta=WAIT)
    (whole / "suites/go").touch()
    expected = verdict(whole, undisturbed, executor.run(undisturbed, whole / "out", jobs=1))
    assert expected.status is Status.PASSED

    work = project(tmp_path, beta=WAIT)
    got, pid = half_way(tmp_path, number)
    assert got == code
    assert not alive(pid)
    half = merge(list((tmp_path / "out/cells").glob("*.jsonl")))
    assert verdict(tmp_path, work, half).status is Status.INCONCLUSIVE
    (tmp_path / "suites/go").touch()
    resumed = verdict(tmp_path, work, executor.run(work, tmp_path / "out", jobs=1, resume=True))
    assert timeless(resumed) == timeless(expected)
    runs = (tmp_path / "suites/runs.txt").read_text().split()[::2]
    assert runs == ["alpha.first", "beta.first", "beta.first"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_merged_records_are_ordered_by_cell(picked: list[int]) -> None:
    """Whatever ledgers are given in whatever order, each cell's records stay together and in order."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        paths = [ledger(Path(folder, f"l{n}"), f"m{n}") for n in range(4)]
        records = merge([paths[n] for n in picked])
    cells = [r.cell for r in records]
    assert all(a <= b for a, b in pairwise(cells))
    assert len(records) == 2 * len(set(picked))
