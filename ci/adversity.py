"""Kill gates, run two in one folder, and run them on a full disk; tell what was lost.

    python ci/adversity.py --kills 100 --pairs 20 --full 20 --jobs 8

Each is a small gate in a folder of its own. Killed at a random moment, it must leave readable ledgers and,
when resumed, reach the clean gate's verdict. Of two in one folder one must be refused, and the other reach
the clean verdict. On a full disk (a small tmpfs; needs root) it must say so and never be green. Exit code: 0
if nothing was lost or false, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from prill_harness.records import ledger
from prill_harness.run.children import prill

POLICY = """default = "small"
[gates.small]
checklists = ["foundation"]
blocks_at = "low"
minimum_executed = 1
max_inconclusive = 0
max_flaky = 0
[[gates.small.plan]]
models = ["fixture:llama-tiny"]
engines = ["numpy"]
suites = ["blocks", "sampler", "stages", "cache"]
"""
LONGEST_S = 300.0


def start(folder: Path, *more: str, out: str = "out") -> subprocess.Popen[str]:
    """Start a small gate in a process group of its own."""
    (folder / "gates.toml").write_text(POLICY, encoding="utf-8")
    words = prill("gate", "--policy", "gates.toml", "-j", "2", "--out", out, *more)
    return subprocess.Popen(
        words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finished(gate: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = gate.communicate(timeout=LONGEST_S)
    return gate.returncode, said


def told(out: Path) -> Any:
    """What a verdict says, without times and digests; None if there is none."""
    file = out / "verdict.json"
    if not file.exists():
        return None
    verdict = json.loads(file.read_text(encoding="utf-8"))
    checks = sorted((c["check"], c["cell"]["suite"], c["status"]) for c in verdict["checks"])
    return verdict["exit_code"], verdict["status"], checks


def killed(folder: Path, moment: float, clean: Any) -> str:
    """What was lost when a gate was killed after so many seconds; empty if nothing was."""
    gate = start(folder)
    time.sleep(moment)
    gate.send_signal(signal.SIGKILL)
    gate.communicate()
    for file in (folder / "out" / "cells").glob("*.jsonl"):
        ledger.read(file)
    code, said = finished(start(folder, "--resume"))
    if "Traceback" in said or told(folder / "out") != clean:
        return f"resumed: exit {code}, {said.splitlines()[-1:]}"
    return ""


def doubled(folder: Path, clean: Any) -> str:
    """What two gates in one folder did wrong; empty if nothing."""
    both = [start(folder), start(folder)]
    ended = [finished(gate) for gate in both]
    refused = [said for code, said in ended if code == 4]
    if len(refused) != 1 or "another run writes into this folder" not in refused[0]:
        return f"exit codes {[code for code, _ in ended]}"
    return "" if told(folder / "out") == clean else f"the verdict is {told(folder / 'out')}"


def full(folder: Path, kilobytes: int) -> str:
    """What a gate claimed falsely on a disk of that size; empty if nothing."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)], check=True)
    try:
        code, said = finished(start(folder, out=str(disk / "out")))
        verdict = disk / "out" / "verdict.json"
        whole = verdict.exists() and json.loads(verdict.read_text(encoding="utf-8"))["exit_code"] == code
        if code == 0 or "Traceback" in said or not (whole or "No space left" in said):
            return f"{kilobytes} KiB: exit {code}, {said.splitlines()[-2:]}"
        return ""
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("kills", "pairs", "full"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="gates at a time")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    chance = random.Random(asked.seed)
    with tempfile.TemporaryDirectory(prefix="prill-adversity-") as folder:
        root, number = Path(folder), 0

        def place() -> Path:
            nonlocal number
            number += 1
            (root / str(number)).mkdir()
            return root / str(number)

        began, first = time.monotonic(), place()
        print(f"clean: exit {finished(start(first))[0]}", flush=True)
        lasts, clean = time.monotonic() - began, told(first / "out")
        if clean is None:
            return 1
        jobs: list[tuple[str, Callable[[], str]]] = []
        for _ in range(asked.kills):
            jobs.append(("killed", partial(killed, place(), chance.uniform(0, 1.5 * lasts), clean)))
        for _ in range(asked.pairs):
            jobs.append(("doubled", partial(doubled, place(), clean)))
        for _ in range(asked.full):
            jobs.append(("full", partial(full, place(), chance.randint(4, 400))))
        with ThreadPoolExecutor(asked.jobs) as pool:
            found = list(pool.map(lambda job: job[1](), jobs))
    results = [(what, lost) for (what, _), lost in zip(jobs, found, strict=True)]
    for what in dict.fromkeys(what for what, _ in results):
        mine = [lost for name, lost in results if name == what]
        print(f"{what}: {mine.count('')} of {len(mine)} lost nothing", *filter(None, mine), sep="\n  ")
    return int(any(result for _, result in results))


if __name__ == "__main__":
    sys.exit(main())
