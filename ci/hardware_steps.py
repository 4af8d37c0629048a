"""The steps of a run on hardware; each yields its results as soon as they are known."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hardware_account as accounts
from hardware_account import Result
from hardware_job import Job
from hardware_sanitizer import sanitizer

from prill_harness.plan.policy import load_policy
from prill_harness.records import evidence
from prill_harness.records.evidence import CellEnded, CellStarted, Evidence
from prill_harness.records.ledger import read

HERE = Path(__file__).resolve().parent
PRILL = [sys.executable, "-c", "from prill_harness.cli import main; main()"]
# The rest is of the step "properties".
STEP_OF = {**dict.fromkeys(("blocks", "ops", "options", "sampler"), "ops"), "tokens": "goldens"}
LEDGER_CYCLES = 3


def machine(job: Job) -> Iterator[Result]:
    """Describe the machine."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    facts = {
        "commit": job.asked.commit or _said(["git", "-C", str(HERE), "rev-parse", "HEAD"]),
        "gpu, driver, memory": _said(query),
        "nvcc": _said(["nvcc", "--version"]).rpartition("release ")[2].partition("\n")[0],
        "python": f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    for name, fact in facts.items():
        yield Result("machine", name, "passed" if fact else "missing", fact or "not found")


def _said(words: Sequence[str]) -> str:
    if shutil.which(words[0]) is None:
        return ""
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def suites(step: str) -> Callable[[Job], Iterator[Result]]:
    """A step that runs its suites' share of the default gate's plan."""

    def run(job: Job) -> Iterator[Result]:
        for number, entry in enumerate(load_policy(job.asked.policy).gate().plan):
            names = [suite for suite in entry.suites if STEP_OF.get(suite, "properties") == step]
            if names:
                yield from _cells(job, step, number, names, entry.models)

    return run


def _cells(job: Job, step: str, number: int, names: Sequence[str], models: Sequence[str]) -> Iterator[Result]:
    """Run the cells; a result for each, as soon as it has ended."""
    folder = job.work / f"{step}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    words = [*PRILL, "run", *names, "-j", str(job.asked.jobs), "--out", str(folder)]
    words += [word for engine in job.asked.engine for word in ("--engine", engine)]
    words += [word for model in models for word in ("--model", model)]
    wanted = len(names) * len(models) * len(job.asked.engine)
    seen: set[Path] = set()
    for _ in job.running(words, job.work / f"{step}-{number}.log"):
        yield from _ended(step, folder, seen, only_whole=True)
    yield from _ended(step, folder, seen, only_whole=False, timed_out=job.timed_out)
    if len(seen) < wanted:
        errors = (job.work / f"{step}-{number}.err").read_text("utf-8", "replace").strip().splitlines()
        status = "timeout" if job.timed_out else "error"
        last = f": {errors[-1]}" if errors and not job.timed_out else ""
        yield Result(step, f"{wanted - len(seen)} cells", status, f"never ran{last}")


def _ended(
    step: str, folder: Path, seen: set[Path], *, only_whole: bool, timed_out: bool = False
) -> Iterator[Result]:
    """Results of new ledgers: of those with a final record, or of all."""
    for ledger in sorted(folder.glob("cells/*.jsonl")):
        if ledger in seen:
            continue
        records = read(ledger)
        whole = any(isinstance(r, CellEnded) for r in records)
        if whole or not only_whole:
            seen.add(ledger)
            yield _cell(step, records, "" if whole else "timeout" if timed_out else "error")


def _cell(step: str, records: Sequence[evidence.Record], broken: str) -> Result:
    """A cell passed if every planned check did; else its result is that of the worst check."""
    start = next(r for r in records if isinstance(r, CellStarted))
    checks = [r for r in records if isinstance(r, Evidence)]
    lost = set(start.planned) - {r.check for r in checks}
    statuses = [r.status.value for r in checks] + ([broken or "error"] if broken or lost else [])
    status = accounts.worst(statuses)
    counts = f"{sum(r.status.value == 'passed' for r in checks)} of {len(start.planned)} checks passed"
    bad = next((r for r in checks if r.status.value == status and status != "passed"), None)
    says = f"{counts}; {bad.check}: {bad.sentence}" if bad else counts
    took = sum(r.duration_s for r in checks)
    return Result(step, start.cell.id, status, says, took, {"observed": sum(r.observed for r in checks)})


def soak(job: Job) -> Iterator[Result]:
    """Run requests and loads in a process of their own; its lines are results."""
    words = [
        sys.executable,
        str(HERE / "soak.py"),
        "--engine",
        job.asked.engine[0],
        "--model",
        job.asked.model,
    ]
    words += ["--requests", str(job.asked.requests), "--cycles", str(job.asked.cycles)]
    yield from _lines(job, "soak", words, bool(job.asked.requests) + bool(job.asked.cycles))


def ledger(job: Job) -> Iterator[Result]:
    """Compare the ledger of device memory with CUPTI's records, in a process of its own."""
    words = [sys.executable, str(HERE / "vram_ledger.py"), "--engine", job.asked.engine[0]]
    words += ["--model", job.asked.model, "--cycles", str(LEDGER_CYCLES)]
    yield from _lines(job, "ledger", words, 3 * LEDGER_CYCLES)


def _lines(job: Job, step: str, words: Sequence[str], wanted: int) -> Iterator[Result]:
    """A result for every JSON line of a script, as soon as it is there, and one for any that are missing."""
    log, seen, began = job.work / f"{step}.log", list[Result](), time.monotonic()
    for _ in job.running(words, log):
        lines = [line for line in log.read_text("utf-8").splitlines(True) if line.endswith("\n")]
        for line in lines[len(seen) :]:
            seen.append(Result(step, **json.loads(line), seconds=time.monotonic() - began))
            yield seen[-1]
    told = any(result.status in ("inconclusive", "error") for result in seen)
    if len(seen) < wanted and not told:
        errors = log.with_suffix(".err").read_text("utf-8", "replace").strip().splitlines()
        status = "timeout" if job.timed_out else "error"
        says = "the time was over" if job.timed_out else (errors or ["no line came"])[-1]
        yield Result(step, f"{wanted - len(seen)} parts", status, says, time.monotonic() - began)


def bench(job: Job) -> Iterator[Result]:
    """Time every engine on every model: medians, spreads and goals."""
    for model in job.asked.bench_model:
        for engine in job.asked.engine:
            began = time.monotonic()
            words = [*PRILL, "bench", "--engine", engine, "--model", model, "--json"]
            words += ["--prompt", str(job.asked.prompt), "--tokens", str(job.asked.tokens)]
            words += ["--repeat", str(job.asked.repeat), "--loads", str(job.asked.loads)]
            log = job.work / "bench.log"
            for _ in job.running(words, log):
                pass
            yield _timed(job, engine, model, log, time.monotonic() - began)


def _timed(job: Job, engine: str, model: str, log: Path, took: float) -> Result:
    name = f"{engine}, {model}"
    if job.timed_out:
        return Result("bench", name, "timeout", "the time was over", took)
    if job.code:
        errors = log.with_suffix(".err").read_text("utf-8", "replace").strip().splitlines()
        return Result("bench", name, "error", (errors or ["no sentence"])[-1], took)
    shown: dict[str, Any] = json.loads(log.read_text("utf-8"))["data"]["result"]
    with (job.out / "bench.jsonl").open("a", encoding="utf-8") as kept:
        kept.write(json.dumps(shown) + "\n")
    rows = {row["name"]: row["sample"] for row in shown["engines"][0]["rows"]}
    share = next(row["share"] for row in shown["engines"][0]["rows"] if row["name"] == "decode")
    medians = {key: sample["median"] for key, sample in rows.items() if sample}
    judged = accounts.against_goals(model, medians)
    goals = [accounts.told(*goal) for goal in judged]
    status = "passed" if all(reached for *_, reached in judged) else "failed"
    sentence = "; ".join(goals) or f"decode {accounts.shown(medians['decode'])} tokens/s, no goal"
    return Result("bench", name, status, sentence, took, {"rows": rows, "share": share, "goals": goals})


def verdict(job: Job) -> Iterator[Result]:
    """One ledger, one JUnit file and the gate's own verdict from the steps' ledgers."""
    ledgers = sorted(job.work.glob("*/ledger.jsonl"))
    if not ledgers:
        yield Result("verdict", "gate", "inconclusive", "no step left a ledger")
        return
    folder = job.work / "gate"
    words = [*PRILL, "gate", "--out", str(folder), "--json"]
    words += ["--policy", str(job.asked.policy)] if job.asked.policy else []
    words += [word for engine in job.asked.engine for word in ("--engine", engine)]
    words += [word for ledger in ledgers if ledger.parent != folder for word in ("--from", str(ledger))]
    for _ in job.running(words, job.work / "gate.log"):
        pass
    for name in ("ledger.jsonl", "junit.xml", "verdict.json"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, job.out / name)
    if not (folder / "verdict.json").is_file():
        errors = (job.work / "gate.err").read_text("utf-8", "replace").strip().splitlines()
        yield Result("verdict", "gate", "error", (errors or ["no verdict was written"])[-1])
        return
    decided = json.loads((folder / "verdict.json").read_text("utf-8"))
    yield Result("verdict", "gate", decided["status"], decided["sentence"])


STEPS: dict[str, Callable[[Job], Iterator[Result]]] = {
    "machine": machine,
    "ops": suites("ops"),
    "goldens": suites("goldens"),
    "properties": suites("properties"),
    "sanitizer": sanitizer,
    "ledger": ledger,
    "soak": soak,
    "bench": bench,
    "verdict": verdict,
}
