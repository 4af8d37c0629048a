"""A run on hardware: its settings, its results on disk, and its processes under a time limit."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import hardware_account as accounts
from hardware_account import Result

GRACE = 15.0  # seconds between the request to end and the kill


class Job:
    """The settings of a run, the folder of its results, and one process at a time."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.out = asked, Path(asked.out)
        self.work = Path(asked.work)
        self.results: list[Result] = []
        self.deadline = 0.0
        self.code: int | None = None
        self.timed_out = False
        for folder in (self.out, self.work):
            folder.mkdir(parents=True, exist_ok=True)

    def record(self, result: Result) -> None:
        """Append a result, synced to disk, and rewrite the account."""
        self.results.append(result)
        with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        command = " ".join(["python", "ci/hardware.py", *self.asked.given])
        title = f"{' and '.join(self.asked.engine)} on hardware"
        page = accounts.account(title, self.results, command)
        (self.out / "account.md").write_text(page, encoding="utf-8")
        print(f"{result.status:12} {result.step}: {result.name}: {result.sentence}", flush=True)

    def running(self, words: Sequence[str], log: Path) -> Iterator[None]:
        """Run a process until it ends or the step's time is over; yields now and then.

        Its output goes to `log`; afterwards `code` and `timed_out` say how it ended.
        """
        self.code, self.timed_out = None, False
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as output, log.with_suffix(".err").open("wb") as errors:
            process = subprocess.Popen(
                list(words), stdin=subprocess.PIPE, stdout=output, stderr=errors, env=environment,
                start_new_session=True,
            )  # fmt: skip
            try:
                while self.code is None:
                    left = self.deadline - time.monotonic()
                    try:
                        self.code = process.wait(timeout=min(0.5, max(0.0, left)))
                    except subprocess.TimeoutExpired:
                        if left <= 0:
                            self.timed_out = True
                            self.code = end(process)
                    yield
            finally:
                if process.poll() is None:
                    end(process)


def end(process: subprocess.Popen[bytes]) -> int:
    """Ask the process and its children to end, and kill them if they do not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            return process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            continue
    return process.wait()
