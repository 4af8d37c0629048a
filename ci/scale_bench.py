"""Measure prill's own share of a large run: plan, run, kill, resume, merge, render 10,000 cells of 1 ms.

    python ci/scale_bench.py --cells 10000 --out out/scale.json

A synthetic cell (`scale_cells.py`) is a real process, forked by the pool's own server; it computes for a
millisecond and writes a whole ledger. What it leaves out is pytest and the checks, which are the user's time.
The run is killed half-way with SIGKILL and resumed: no cell that had finished may run again, and the verdict
must be a pass of every cell. Exit 1 if that, or a limit of time or memory, is not kept.
Ledgers lie in memory where there is a folder for that, so that a disk's fsync, four for each cell, is not
what is measured; --folder names another place.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from scale_cells import CHECK, CODE, MODELS

from prill_harness.commands.shared import reporters
from prill_harness.decide import gate
from prill_harness.decide.checklist import load_checklists
from prill_harness.faults.trial.kills import FaultTrial, Kills
from prill_harness.plan import plan, policy
from prill_harness.records import ledger as ledgers
from prill_harness.records.evidence import CellEnded, Record
from prill_harness.records.verdict import Verdict
from prill_harness.run import executor, forkserver, gather
from prill_harness.run.pool import Event

SECONDS, MEBIBYTES = 60.0, 500.0
HERE = Path(__file__).resolve().parent
SUITE = """
from prill_harness.run.checks import check

@check("synthetic.one", kills=("rope_pairing",))
def test_one(observe):
    observe.saw(1, oracle="arithmetic")
"""
CHECKLIST = """
id = "synthetic"
title = "Synthetic"
[[items]]
id = "synthetic.one"
title = "One"
why = "so"
severity = "critical"
checks = ["synthetic.one"]
"""
POLICY = """
default = "synthetic"
suites = "suites"
[gates.synthetic]
checklists = ["synthetic"]
minimum_executed = {cells}
[[gates.synthetic.plan]]
models = {models}
engines = {engines}
suites = ["synthetic"]
devices = {devices}
"""


def project(folder: Path, cells: int) -> None:
    """A policy with so many cells: ten models, a hundred engines, the rest devices."""
    engines = max(1, min(100, cells // len(MODELS)))
    devices = max(1, cells // len(MODELS) // engines)
    (folder / "suites" / "checklists").mkdir(parents=True)
    (folder / "suites/synthetic.py").write_text(SUITE)
    (folder / "suites/checklists/synthetic.toml").write_text(CHECKLIST)
    names = {
        "models": MODELS,
        "engines": [f"engine-{n}" for n in range(engines)],
        "devices": [f"device-{n}" for n in range(devices)],
    }
    words = {key: json.dumps(value) for key, value in names.items()}
    (folder / "gates.toml").write_text(POLICY.format(cells=len(MODELS) * engines * devices, **words))


def planned(folder: Path) -> tuple[policy.Policy, plan.Plan]:
    found = policy.load_policy(folder / "gates.toml")
    return found, plan.build(found.gate(), folder=found.folder)


def execute(folder: Path, jobs: int, resume: bool = False) -> tuple[tuple[Record, ...], int]:
    """Run the plan; the records, and how many cells began."""
    forkserver.COMMAND = [sys.executable, str(HERE / "scale_cells.py")]
    begun = 0

    def count(event: Event) -> None:
        nonlocal begun
        begun += event.kind == "started"

    records = executor.run(planned(folder)[1], folder / "out", jobs, resume, count)
    return records, begun


def killed(folder: Path, jobs: int, cells: int) -> int:
    """Run the plan in another process and kill that once half of the cells have begun; how many had ended."""
    words = [sys.executable, str(HERE / "scale_bench.py"), "--execute", str(folder), "--jobs", str(jobs)]
    child = subprocess.Popen(words, start_new_session=True)
    place = folder / "out/cells"
    while child.poll() is None and (not place.is_dir() or len([*place.iterdir()]) < cells):  # log and ledger
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    time.sleep(0.2)  # cells end with whoever began them
    files = place.glob("*.jsonl")
    return sum(any(isinstance(r, CellEnded) for r in ledgers.read(file)) for file in files)


def decided(folder: Path, records: Sequence[Record]) -> Verdict:
    found, work = planned(folder)
    lists = load_checklists(["synthetic"], folder=folder / "suites/checklists", known=(CHECK,))
    trial = FaultTrial("", "head", "", ("logits",), MODELS[0], ("logits",), (CHECK,))
    kills = Kills({"rope_pairing": trial}, {CHECK: CODE})
    return gate.decide(found, work, records, checklists=lists, kills=kills, as_of=dt.date(2026, 1, 1))


def peak() -> int:
    """Most memory of this process in KiB; `ru_maxrss` begins with that of the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0])


def measure(folder: Path, cells: int, jobs: int) -> dict[str, object]:
    """The figures of one whole run, and `ok`: whether all was kept."""
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - began, 2)
        print(f"{name}: {seconds[name]:.2f} s", file=sys.stderr)

    project(folder, cells)
    with timed("plan"):
        work = planned(folder)[1]
    with timed("run, killed half-way"):
        ended = killed(folder, jobs, len(work.cells))
    with timed("resume"):
        _, begun = execute(folder, jobs, resume=True)
    with timed("merge"):
        merged = gather.merge([folder / "out/ledger.jsonl"], work)
    with timed("decide"):
        verdict = decided(folder, merged)
    sizes = {}
    for name in reporters.files():
        with timed(f"render {name}"):
            sizes[name] = len(reporters.render(name, verdict).encode())
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    total, held = sum(seconds.values()), max(peak(), children.ru_maxrss) / 1024
    again = ended + begun - len(work.cells)
    kept = total <= SECONDS and held <= MEBIBYTES and not again and verdict.exit_code == 0
    return {
        "cells": len(work.cells), "jobs": jobs, "load": os.getloadavg()[0], "seconds": seconds,
        "total_s": round(total, 2), "limit_s": SECONDS,
        "processor_s": round(own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime, 1),
        "mebibytes": round(held), "limit_mebibytes": MEBIBYTES,
        "ended_before_the_kill": ended, "begun_after_it": begun, "ran_twice": again,
        "verdict": verdict.sentence, "report_bytes": sizes, "ok": kept,
    }  # fmt: skip


def main() -> int:
    shaped = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shaped)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--folder", type=Path, help="where ledgers are written; default: in memory")
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    parser.add_argument("--execute", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.execute is not None:
        execute(asked.execute, asked.jobs)
        return 0
    memory = Path("/dev/shm")
    place = asked.folder or (memory if memory.is_dir() else None)
    with tempfile.TemporaryDirectory(dir=place, prefix="prill-scale-") as folder:
        found = measure(Path(folder), asked.cells, asked.jobs)
    text = json.dumps(found, indent=1)
    print(text)
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(text + "\n")
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
