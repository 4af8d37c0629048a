"""Prove an engine on a machine and measure its speed there, step by step, offline.

    python ci/hardware.py --engine cuda --out out/hardware --commit $(git rev-parse HEAD)
    python ci/hardware.py --engine cuda --out out/hardware --steps ops,bench --seconds bench=240

Steps: machine; ops, goldens, properties (the default gate's plan, by suite); sanitizer (compute-sanitizer
over the op suite); ledger (device memory beside CUPTI's records); soak (requests, loads and unloads); bench;
verdict (ledger and JUnit of what ran before).
Every result is appended to results.jsonl at once and account.md is rewritten, so that a killed run loses
only the work in flight. A step that runs out of time or lacks its tool says so and does not pass. prill and
its dependencies must be importable; nvidia-smi and compute-sanitizer are looked up on the PATH.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import hardware_account as accounts
from hardware_account import Result
from hardware_job import Job
from hardware_steps import STEPS

SECONDS = {
    "machine": 60, "ops": 300, "goldens": 900, "properties": 600, "sanitizer": 900, "ledger": 300,
    "soak": 600, "bench": 900, "verdict": 120,
}  # fmt: skip


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        prog="hardware.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", action="append", help="repeatable; some steps take the first")
    parser.add_argument("--out", required=True, help="folder of the results")
    parser.add_argument("--work", default="out/hardware-work", help="folder for logs and cells")
    parser.add_argument("--steps", default=",".join(STEPS), help="names with commas; default all")
    parser.add_argument("--seconds", action="append", default=[], metavar="STEP=N", help="time of a step")
    parser.add_argument("--commit", default="", help="default: what git says")
    parser.add_argument("--policy", type=Path, help="default: the packaged gates.toml")
    parser.add_argument("--model", default="fixture:llama-tiny", help="of sanitizer, ledger and soak")
    parser.add_argument("--bench-model", action="append", help=f"default: {', '.join(accounts.GOALS)}")
    for name, default in {
        "jobs": min(8, os.cpu_count() or 1), "requests": 1000, "cycles": 50,
        "prompt": 512, "tokens": 128, "repeat": 7, "loads": 3,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args(given)
    asked.given = list(given)
    asked.engine = asked.engine or ["cuda"]
    asked.bench_model = asked.bench_model or list(accounts.GOALS)
    asked.steps = asked.steps.split(",")
    asked.budget = dict(SECONDS)
    for text in asked.seconds:
        step, _, number = text.partition("=")
        if step not in STEPS or not number.isdecimal():
            parser.error(f"--seconds {text}: expected STEP=N with a step of {', '.join(STEPS)}")
        asked.budget[step] = int(number)
    unknown = [step for step in asked.steps if step not in STEPS]
    if unknown:
        parser.error(f"unknown step {unknown[0]!r}: expected some of {', '.join(STEPS)}")
    return asked


def main(given: Sequence[str] | None = None) -> int:
    """Run the steps; the exit code, 0 if everything passed, else 1."""
    asked = arguments(sys.argv[1:] if given is None else given)
    job = Job(asked)
    for step in asked.steps:
        began = time.monotonic()
        job.deadline = began + asked.budget[step]
        try:
            for result in STEPS[step](job):
                job.record(result)
        except Exception as error:  # a step that breaks must not cost the others
            says = f"{type(error).__name__}: {error}"
            job.record(Result(step, "step", "error", says, time.monotonic() - began))
    return 0 if {result.status for result in job.results} == {"passed"} else 1


if __name__ == "__main__":
    sys.exit(main())
