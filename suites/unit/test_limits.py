"""Hostile inputs and hostile engines: bounded time and memory, one sentence, and no verdict lost."""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest

from prill_harness.plan.plan import Plan
from prill_harness.records import ledger as ledgers
from prill_harness.records.evidence import Cell, Evidence, Status
from prill_harness.run import pool
from prill_harness.run.executor import LEAST_S, patience, run
from prill_harness.run.pool import TIMEOUT_S
from prill_runtime.errors import ModelFileError
from prill_runtime.gguf.file import open_gguf
from prill_runtime.models.load import examine

from .commandline import child
from .tiny_gguf import tiny

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "words",
    [
        ("gate", "--policy", "FILE"),
        ("gate", "--waivers", "FILE"),
        ("gate", "--kills", "FILE"),
        ("gate", "--from", "FILE"),
        ("checklist", "--ledger", "FILE"),
        ("bisect", "--model", "fixture:llama-tiny", "--trace", "FILE"),
        ("golden", "compare", "FILE", "--model", "fixture:llama-tiny"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
@pytest.mark.parametrize("kind", ["pipe", "deep"])
def test_no_input_hangs_or_overflows(tmp_path: Path, words: tuple[str, ...], kind: str) -> None:
    """A pipe that nobody writes and a document nested a hundred thousand deep: one sentence, exit 4."""
    file = tmp_path / "input"
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.write_text(f"x = {DEEP}" if words[1] in ("--policy", "--waivers") else DEEP, encoding="utf-8")
    done = child(*(str(file) if word == "FILE" else word for word in words), cwd=tmp_path, timeout=60)
    assert done.returncode == 4, done
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_a_packed_trace_is_not_unpacked(tmp_path: Path) -> None:
    """Half a gigabyte of zeros in half a megabyte: refused with both figures before memory is taken."""
    file = tmp_path / "bomb.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as out:
        np.lib.format.write_array_header_1_0(  # type: ignore[no-untyped-call]
            out, {"descr": "<f4", "fortran_order": False, "shape": (1 << 27,)}
        )
        for _ in range(512):
            out.write(bytes(1 << 20))
    done = child("bisect", "--model", "fixture:llama-tiny", "--trace", str(file))
    assert done.returncode == 4
    assert "x.npy unpacks from" in done.stderr


def test_a_million_blocks_are_refused_at_once(tmp_path: Path) -> None:
    """`block_count` beyond the file's tensors: no table of a million entries is made."""
    file = tiny(tmp_path / "model.gguf", context=32)
    content = file.read_bytes()
    key = b"llama.block_count"
    at = content.index(key) + len(key) + 4
    value = (10**6).to_bytes(4, "little")
    file.write_bytes(content[:at] + value + content[at + 4 :])
    with (
        open_gguf(file) as opened,
        pytest.raises(ModelFileError, match=r"more blocks than tensors.*got 1000000"),
    ):
        examine(opened)
    assert gguf.GGUFReader(file).fields["llama.block_count"].contents() == 10**6


SUITE = '''
import os, signal, subprocess, sys, time
from prill_harness.run.checks import check

@check("mean.first", kills=("gelu_erf",))
def test_first(observe):
    """Sees something."""
    observe.saw(1, oracle="itself")

@check("mean.second", kills=("gelu_erf",))
def test_second(observe):
    """Does what an engine may do."""
    observe.saw(1, oracle="itself")
    {act}
'''


def cell_that(folder: Path, act: str, timeout_s: float = 120.0, jobs: int = 1) -> list[Evidence]:
    """The evidence of a cell whose second check does that."""
    suites = folder / "suites"
    suites.mkdir()
    (suites / "mean.py").write_text(SUITE.format(act=act), encoding="utf-8")
    plan = Plan("run", (Cell("fixture:llama-tiny", "numpy", "mean"),), folder=suites)
    return [r for r in run(plan, folder / "out", jobs, timeout_s=timeout_s) if isinstance(r, Evidence)]


def test_an_engine_that_floods_is_bounded(tmp_path: Path) -> None:
    """Three hundred megabytes of output: the verdict is kept, and what is kept of the output is little."""
    act = "[os.write(1, b'x' * (1 << 20)) for _ in range(300)]"
    first, second = cell_that(tmp_path, act)
    assert (first.status, second.status) == (Status.PASSED, Status.PASSED)
    (log,) = (tmp_path / "out" / "cells").glob("*.log")
    assert log.stat().st_size < 4 * pool.LOG_BYTES


def test_an_engine_that_ignores_everything_ends_with_its_cell(tmp_path: Path) -> None:
    """It blocks SIGTERM, leaves its session and sleeps: the cell's time ends it, the first verdict stands."""
    act = (
        textwrap.dedent(
            f"""signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with open({str(tmp_path / "pid")!r}, "w") as out:
            child = subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=subprocess.DEVNULL)
            print(child.pid, file=out, flush=True)
        time.sleep(600)"""
        )
        .replace("\n", "\n    ")
        .replace("\n            ", "\n    ")
    )
    first, second = cell_that(tmp_path, act, timeout_s=6.0)
    assert first.status is Status.PASSED
    assert second.status is Status.ERROR
    assert "timed out after 6 s while mean.second ran" in second.sentence
    pid = int((tmp_path / "pid").read_text())
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_server_that_dies_loses_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had started is started again as a process of its own."""
    suites = tmp_path / "suites"
    suites.mkdir()
    mark = tmp_path / "killed"
    act = f"""
    if not os.path.exists({str(mark)!r}):
        open({str(mark)!r}, "w").close()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)"""
    for name in ("mean", "other"):
        text = SUITE.format(act=act if name == "mean" else "pass").replace('"mean.', f'"{name}.')
        (suites / f"{name}.py").write_text(text, encoding="utf-8")
    cells = tuple(Cell("fixture:llama-tiny", "numpy", name) for name in ("mean", "other"))
    records = run(Plan("run", cells, folder=suites), tmp_path / "out", 2)
    found = {r.check: r.status for r in records if isinstance(r, Evidence)}
    assert mark.exists()
    assert set(found.values()) == {Status.PASSED}
    assert len(found) == 4


def test_a_cell_that_ended_in_an_error_runs_again(tmp_path: Path) -> None:
    """--resume keeps what was seen, and not what stopped."""
    act = f"""
    if not os.path.exists({str(tmp_path / "once")!r}):
        open({str(tmp_path / "once")!r}, "w").close()
        os._exit(9)"""
    first, second = cell_that(tmp_path, act)
    assert second.status is Status.ERROR
    plan = Plan("run", (first.cell,), folder=tmp_path / "suites")
    again = [r for r in run(plan, tmp_path / "out", 1, resume=True) if isinstance(r, Evidence)]
    assert [r.status for r in again] == [Status.PASSED, Status.PASSED]


def test_patience_follows_what_a_cell_took() -> None:
    """Twenty times as long, two minutes at least; a cell that never ran has a quarter of an hour."""
    assert (patience(None), patience(1.0), patience(60.0)) == (TIMEOUT_S, LEAST_S, 1200.0)


def test_a_gate_that_is_killed_leaves_ledgers_that_can_be_read(tmp_path: Path) -> None:
    """SIGKILL in the middle: whatever is there reads as records, and a resumed run completes it."""
    words = ["run", "blocks", "sampler", "--engine", "numpy", "--model", "fixture:llama-tiny", "-j", "2"]
    from .commandline import PRILL

    process = subprocess.Popen(
        [*PRILL, *words], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    cells = tmp_path / "out" / "run" / "cells"
    while process.poll() is None and not any(f.stat().st_size for f in cells.glob("*.jsonl")):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert all(ledgers.read(file) is not None for file in cells.glob("*.jsonl"))
    assert child(*words, cwd=tmp_path).returncode == 0
