"""Run the op suite under compute-sanitizer, in parallel shards."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from hardware_account import Result
from hardware_job import Job, end

from prill_harness.records import ledger as ledgers
from prill_harness.records.evidence import Cell, CellStarted, Evidence
from prill_harness.run.cells import command

TOOLS = ("racecheck", "memcheck", "initcheck")  # the slowest first
SHARDS = 7
FOUND = 86  # the exit code that the tool is told to use if it found something
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)")
SHOWN = 60  # lines of a log to keep


@dataclass(frozen=True)
class Shard:
    """Some checks of the op suite under one tool, in a process of its own."""

    tool: str
    engine: str
    checks: tuple[str, ...]
    stem: Path  # of its ledger, the tool's log and the process's output

    def words(self, program: str, model: str) -> list[str]:
        words = [program, "--tool", self.tool, "--error-exitcode", str(FOUND)]
        words += ["--log-file", f"{self.stem}.txt"]
        # Bindings ask the driver for functions that it may lack; that is not an error of a kernel.
        words += ["--report-api-errors", "no"] if self.tool == "memcheck" else []
        return words + command(Cell(model, self.engine, "ops"), Path(f"{self.stem}.jsonl"), None, self.checks)


@dataclass(frozen=True)
class Seen:
    """The result of one shard: errors the tool counted, None if it did not end; passed and failed checks."""

    counted: int | None
    passed: frozenset[str]
    failed: frozenset[str]


def sanitizer(job: Job) -> Iterator[Result]:
    """Run the op suite under each tool, for every engine on a GPU."""
    program = shutil.which("compute-sanitizer")
    engines = [engine for engine in job.asked.engine if engine.startswith("cuda")]
    for engine in job.asked.engine:
        for tool in TOOLS if engine not in engines or program is None else ():
            status = "missing" if engine in engines else "inconclusive"
            says = "compute-sanitizer is not on the PATH" if engine in engines else "runs no kernel on a GPU"
            yield Result("sanitizer", f"{engine}, {tool}", status, says)
    if program is None or not engines:
        return
    planned = checks_of(job)
    if not planned:
        yield Result("sanitizer", "op suite", "error", "no check of it could be listed")
        return
    groups = {(e, t): shards(job, e, t, planned) for e in engines for t in TOOLS}
    began, missing = time.monotonic(), {key: len(group) for key, group in groups.items()}
    with ThreadPoolExecutor(job.asked.jobs) as pool:
        running = {
            pool.submit(run, job, program, shard): key for key, group in groups.items() for shard in group
        }
        for done in as_completed(running):
            key = running[done]
            missing[key] -= 1
            if not missing[key]:
                yield summed(job, *key, groups[key], planned, time.monotonic() - began)


def checks_of(job: Job) -> tuple[str, ...]:
    """The op suite's checks, as planned by a run on the CPU."""
    ledger = job.work / "sanitizer-planned.jsonl"
    ledger.unlink(missing_ok=True)
    words = command(Cell(job.asked.model, "numpy", "ops"), ledger, None)
    for _ in job.running(words, job.work / "sanitizer-planned.log"):
        pass
    records = ledgers.read(ledger) if ledger.is_file() else ()
    return next((tuple(r.planned) for r in records if isinstance(r, CellStarted)), ())


def shards(job: Job, engine: str, tool: str, planned: Sequence[str]) -> list[Shard]:
    """Deal the checks out one by one, so that costly neighbours go to different shards."""
    stem = f"{tool}-{engine.replace(':', '_')}"
    dealt = [tuple(planned[n::SHARDS]) for n in range(min(SHARDS, len(planned)))]
    return [Shard(tool, engine, some, job.work / f"{stem}-{n}") for n, some in enumerate(dealt)]


def run(job: Job, program: str, shard: Shard) -> None:
    """Run a shard until it ends or the step's time is over."""
    for ending in (".jsonl", ".txt"):
        Path(f"{shard.stem}{ending}").unlink(missing_ok=True)
    left = job.deadline - time.monotonic()
    if left <= 0:
        return
    with Path(f"{shard.stem}.log").open("wb") as output:
        process = subprocess.Popen(
            shard.words(program, job.asked.model), stdin=subprocess.PIPE, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(left)
        except subprocess.TimeoutExpired:
            end(process)


def seen(shard: Shard) -> Seen:
    """Read what a shard left on disk."""
    log, ledger = Path(f"{shard.stem}.txt"), Path(f"{shard.stem}.jsonl")
    counts = SUMMARY.findall(log.read_text("utf-8", "replace")) if log.is_file() else []
    records = [r for r in ledgers.read(ledger) if isinstance(r, Evidence)] if ledger.is_file() else []
    passed = frozenset(r.check for r in records if r.status.value == "passed")
    failed = frozenset(r.check for r in records if r.status.value in ("failed", "error"))
    return Seen(sum(map(int, counts)) if counts else None, passed, failed)


def summed(
    job: Job, engine: str, tool: str, group: Sequence[Shard], planned: Sequence[str], took: float
) -> Result:
    """Clean if every shard ended, the tool counted no error in any, and every check passed under it."""
    found = [seen(shard) for shard in group]
    with (job.out / "sanitizer.txt").open("a", encoding="utf-8") as kept:
        for shard in group:
            log = Path(f"{shard.stem}.txt")
            lines = log.read_text("utf-8", "replace").splitlines() if log.is_file() else []
            kept.write("\n".join([f"== {engine}, {tool}: {', '.join(shard.checks)}", *lines[:SHOWN], ""]))
    passed = frozenset().union(*(one.passed for one in found))
    failed = frozenset().union(*(one.failed for one in found))
    counted, lost = sum(one.counted or 0 for one in found), set(planned) - passed - failed
    name = f"{engine}, {tool}"
    if counted or failed:
        says = f"{counted} errors, {len(failed)} checks failed"
        return Result("sanitizer", name, "failed", says, took)
    if lost or any(one.counted is None for one in found):
        late = time.monotonic() >= job.deadline
        says = f"0 errors under {len(passed)} of {len(planned)} checks"
        says += " before the time was over" if late else ""
        return Result("sanitizer", name, "timeout" if late else "error", says, took)
    return Result("sanitizer", name, "passed", f"0 errors under {len(passed)} checks", took)
