"""Run cells in fresh processes, at most `jobs` at a time; even a cell that died leaves a ledger."""

from __future__ import annotations

import contextlib
import os
import platform
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from prill_harness.records import ledger as ledgers
from prill_harness.records.evidence import Cell, CellEnded, CellStarted, CheckStarted, Evidence, Status
from prill_harness.records.ledger import Ledger
from prill_harness.run import cells, orphans, reproduce
from prill_harness.run.forkserver import Forked, ForkServer, watched
from prill_harness.run.leases import Gpus, Lease, wanted
from prill_harness.run.outcomes import one_line

POLL_S = 0.02  # at most, between looks at time limits, logs and GPUs that others hold
TIMEOUT_S = 900.0
LOG_BYTES = 16 << 20  # of a cell's output; a longer log is emptied and begins anew
LAST_BYTES = 4096  # of a log, searched for a dead cell's last words


@dataclass(frozen=True)
class Event:
    """Progress: `kind` is "started", "ended" or "resumed" (kept from an earlier run).

    `counts` is set when a cell is over: evidence by status.
    """

    kind: str
    cell: Cell
    done: int
    total: int
    counts: dict[str, int] = field(default_factory=dict)
    attempt: int = 1


@dataclass(frozen=True)
class CellAttempt:
    """One process: a cell, what opens its model here, its ledger, the checks to run (none: all of them)."""

    cell: Cell
    spec: str
    ledger: Path
    checks: Sequence[str] = ()
    attempt: int = 1

    @property
    def log(self) -> Path:
        return self.ledger.with_suffix(".log")


@dataclass
class _Running:
    job: CellAttempt
    process: subprocess.Popen[bytes] | Forked
    deadline: float
    forward: bool
    lease: Lease

    @property
    def finished(self) -> bool:
        """Whether the cell wrote its final record."""
        path = self.job.ledger
        return path.exists() and any(isinstance(r, CellEnded) for r in ledgers.read(path))


NO_GPUS = Gpus()


class _Waiting:
    """The jobs that have not begun; those that need a GPU are asked first, for GPUs are fewer."""

    def __init__(self, todo: Sequence[CellAttempt], gpus: Gpus) -> None:
        self._gpus = gpus
        self._on_gpu = deque(job for job in todo if wanted(job.cell) is not None)
        self._rest = deque(job for job in todo if wanted(job.cell) is None)

    def __len__(self) -> int:
        return len(self._on_gpu) + len(self._rest)

    def take(self, forward: bool) -> tuple[CellAttempt, Lease] | None:
        """The next job, from the front or from the back, and its lease; None while every GPU that is wanted
        is taken and nothing else is left."""
        taken = set[int | None]()  # asked for in vain, so that thousands that wait cost nothing
        for queue in (self._on_gpu, self._rest):
            for _ in range(len(queue) if queue is self._on_gpu else min(1, len(queue))):
                job = queue.popleft() if forward else queue.pop()
                number = wanted(job.cell)
                lease = None if number in taken else self._gpus.lease(job.cell)
                if lease is not None:
                    return job, lease
                taken.add(number)
                queue.append(job) if forward else queue.appendleft(job)
        return None

    def again(self, job: CellAttempt) -> None:
        """Put a job back, to be run last."""
        (self._rest if wanted(job.cell) is None else self._on_gpu).append(job)


def run(
    todo: Sequence[CellAttempt],
    *,
    jobs: int,
    folder: Path | None,
    timeout_s: Mapping[Cell, float],
    ended: Callable[[CellAttempt], None],
    started: Callable[[CellAttempt], None],
    gpus: Gpus = NO_GPUS,
) -> None:
    """Run every job within the time limit of its cell; returns when all are over.

    Args:
        gpus: of which a cell that needs one gets one, once it is free.

    Raises:
        KeyboardInterrupt: once the running cells have been ended; their unfinished ledgers stay.
    """
    waiting, running = _Waiting(todo, gpus), list[_Running]()
    with ExitStack() as stack:
        server = _server(stack, todo, jobs)
        others = orphans.bystanders()
        stack.callback(_end_all, running, others)
        while waiting or running:
            while len(running) < jobs:
                # From both ends of the plan: its first cells start processes and compute, its last ones
                # stream weights, and two of those at once take a fifth longer each, for they share the
                # memory bus.
                forward = not any(one.forward for one in running)
                taken = waiting.take(forward)
                if taken is None:
                    break
                job, lease = taken
                started(job)
                job.ledger.unlink(missing_ok=True)
                job.log.write_bytes(b"")
                words = cells.arguments(job.cell, job.ledger, folder, job.checks, job.spec, job.attempt)
                process = _start(server, words, job.log, jobs, lease.environment)
                deadline = time.monotonic() + timeout_s[job.cell]
                running.append(_Running(job, process, deadline, forward, lease))
            for one in list(running):
                late = time.monotonic() > one.deadline
                if one.process.poll() is None and not late:
                    _bound(one.job.log)
                    continue
                _end(one, others)
                if isinstance(one.process, Forked) and server and server.gone and not one.finished:
                    waiting.again(one.job)  # it died with the server
                    running.remove(one)
                    continue
                _account(one, f"timed out after {timeout_s[one.job.cell]:g} s" if late else "")
                running.remove(one)
                ended(one.job)
            if waiting or running:
                _pause(running, server)


def _pause(running: Sequence[_Running], server: ForkServer | None) -> None:
    """Wait until a cell may have ended, POLL_S at most."""
    told = [server.fileno()] if server is not None and not server.gone else []
    pids = [one.process.pid for one in running if not isinstance(one.process, Forked)]
    own = [watch for watch in map(watched, pids) if watch is not None]
    try:
        select.select([*told, *own], [], [], POLL_S)
    finally:
        for watch in own:
            os.close(watch)


def _server(stack: ExitStack, todo: Sequence[CellAttempt], jobs: int) -> ForkServer | None:
    """A fork server, if it pays off and if a process that has imported NumPy may fork here."""
    environment = cells.environment(jobs)
    threaded = any(environment[name] != "1" for name in cells.THREADS)  # BLAS threads do not survive a fork
    if threaded or len(todo) < 2 or not sys.platform.startswith("linux"):
        return None
    return stack.enter_context(ForkServer(environment | cells.KEPT))


def _start(
    server: ForkServer | None, words: Sequence[str], log: Path, jobs: int, more: Mapping[str, str]
) -> subprocess.Popen[bytes] | Forked:
    """Start a cell from the server, or, if that has ended, as a new process."""
    if server is not None and not server.gone:
        with contextlib.suppress(ChildProcessError):
            return server.start(words, log, more)
    return _execute(words, log, jobs, more)


def _bound(log: Path) -> None:
    """Empty a log that has grown too long: an engine may print without end."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > LOG_BYTES:
            os.truncate(log, 0)  # its writers use O_APPEND


def _execute(words: Sequence[str], log: Path, jobs: int, more: Mapping[str, str]) -> subprocess.Popen[bytes]:
    own = cells.environment(jobs) | cells.KEPT | {orphans.CELL_VARIABLE: str(log.absolute()), **more}
    with log.open("ab") as out:
        return subprocess.Popen(
            [*cells.PYTHON, *words],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=own,
            start_new_session=True,  # the whole group can be ended, and a Ctrl-C reaches the parent alone
        )


def _end_all(running: Sequence[_Running], others: set[int]) -> None:
    for one in running:
        _end(one, others)


def _end(one: _Running, others: set[int]) -> None:
    """Kill what is left of the cell's process group, and daemons that left it; reap the cell, and give its
    GPU back."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(one.process.pid, signal.SIGKILL)
    one.process.wait()
    orphans.end(one.job.log.absolute(), others)
    one.lease.release()
    if one.process.stdin:
        one.process.stdin.close()


def _account(one: _Running, cause: str) -> None:
    """Record an error for a cell without a final record: of the check in flight, or of the cell itself."""
    job = one.job
    records = ledgers.read(job.ledger) if job.ledger.exists() else ()
    if any(isinstance(r, CellEnded) for r in records):
        return
    code = one.process.wait() or 0
    died = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    cause = cause or f"the cell's process {died}"
    reported = {r.check for r in records if isinstance(r, Evidence)}
    flying = [r.check for r in records if isinstance(r, CheckStarted) and r.check not in reported]
    with Ledger(job.ledger) as ledger:
        nothing = f"{job.cell.suite}.process"
        if not any(isinstance(r, CellStarted) for r in records):
            ledger.append(
                CellStarted(job.cell, (nothing,), time.time(), attempt=job.attempt, host=platform.node())
            )
        check = flying[-1] if flying else nothing
        where = f"while {check} ran" if flying else f"outside any check: {_last_words(job.log)}"
        again = flying[-1:] or job.checks
        ledger.append(_error(job, check, f"{cause} {where}", again))


def _error(job: CellAttempt, check: str, sentence: str, again: Sequence[str]) -> Evidence:
    return Evidence(
        check=check,
        content="",
        cell=job.cell,
        status=Status.ERROR,
        observed=0,
        sentence=sentence,
        oracle="",
        kills=(),
        reproduce=reproduce.cell(job.cell, job.spec, *again),
        at=time.time(),
        attempt=job.attempt,
    )


def _last_words(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
        text = file.read().decode("utf-8", "backslashreplace").strip()
    return one_line(text.splitlines()[-1]) if text else "it printed nothing"
