"""A probe in; each path in a fresh preloaded process, watched and timed, and one report of them all out."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO

import msgspec

from cupel_harness.leaks import build, paths
from cupel_harness.leaks.host import Call, Done, Message
from cupel_harness.leaks.report import PathReport, Probe, Report, Verdict, worst
from cupel_harness.outcomes import one_line
from cupel_runtime.errors import Inconclusive, UsageError

Watch = Callable[[Probe, Call], None]
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def probe(
    wanted: Probe, names: Sequence[str] = (), watch: Watch = lambda probe, call: None, *, stacks: bool = True
) -> Report:
    """Probe the named paths (the probe's own, when none is named), each in a process of its own.

    Raises:
        UsageError: no such path.
        Inconclusive: this machine cannot preload the host ledger.
    """
    from cupel_harness.leaks import sites

    began, found = time.monotonic(), []
    for name in names or (wanted.path,):
        one = msgspec.structs.replace(wanted, path=name)
        report = run(one, watch)
        if stacks and wanted.stacks and report.verdict is Verdict.LEAK:
            report = sites.located(one, report)
        found.append(report)
    verdict = worst([p.verdict for p in found])
    telling = [p for p in found if p.verdict is verdict]
    sentence = "; ".join(f"{p.path}: {p.sentence}" for p in (telling if verdict is not Verdict.CLEAN else telling[:1]))
    if verdict is Verdict.CLEAN and len(found) > 1:
        sentence = f"{len(found)} paths are clean; {sentence}"
    return Report(
        wanted.engine, wanted.model, verdict, sentence, tuple(found), reproduce(wanted, names),
        round(time.monotonic() - began, 3),
    )  # fmt: skip


def reproduce(wanted: Probe, names: Sequence[str]) -> str:
    """The shell command that probes this again."""
    which = names[0] if len(names) == 1 else "all" if names else wanted.path
    words = ["cupel", "leak", "--engine", wanted.engine, "--model", wanted.model]
    words += ["--calls", str(wanted.calls), "--path", which]
    return shlex.join(words)


def run(wanted: Probe, watch: Watch = lambda probe, call: None) -> PathReport:
    """Probe one path in a fresh process under its time limit; a process that dies is itself a finding."""
    if wanted.path not in paths.NAMES:
        raise UsageError("no such path", expected=" or ".join(paths.NAMES), got=repr(wanted.path))
    began = time.monotonic()
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as said, os.fdopen(reading, "rb") as messages:
        process = start(wanted, writing, said, {"LD_PRELOAD": str(build.interposer())})
        os.close(writing)
        late = threading.Event()

        def expire() -> None:
            late.set()
            _kill(process)

        timer = threading.Timer(wanted.timeout_s, expire)
        timer.start()
        try:
            report, done = _listen(wanted, messages, watch)
            process.wait()
        finally:
            timer.cancel()
            _kill(process)
            process.wait()
        if report is None:
            report = _died(wanted, process.returncode, done, late.is_set(), said)
    return msgspec.structs.replace(report, duration_s=round(time.monotonic() - began, 3))


def start(
    wanted: Probe, channel: int, said: IO[bytes], extra: dict[str, str], module: str = "host"
) -> subprocess.Popen[bytes]:
    """The process that hosts the engine: its own group, one BLAS thread, hashes that never differ."""
    dropped = ("PYTHONMALLOC", "PYTHONTRACEMALLOC", "MALLOC_", "LD_PRELOAD")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    fixed = dict.fromkeys(THREADS, "1") | {"PYTHONHASHSEED": "0"}
    words = [sys.executable, "-X", "faulthandler", "-m", f"cupel_harness.leaks.{module}"]
    return subprocess.Popen(
        [*words, msgspec.json.encode(wanted).decode(), str(channel)],
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=subprocess.STDOUT,
        pass_fds=(channel,),
        env=inherited | fixed | extra,
        start_new_session=True,
    )


def _listen(wanted: Probe, messages: IO[bytes], watch: Watch) -> tuple[PathReport | None, int]:
    """(the report, or None when the process ended without one; calls done until then)."""
    decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)
    done = 0
    for line in messages:
        with contextlib.suppress(msgspec.DecodeError):  # a killed writer leaves half a line
            message = decoder.decode(line)
            if isinstance(message, Done):
                return message.report, done
            done = message.done
            watch(wanted, message)
    return None, done


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _died(wanted: Probe, code: int, done: int, late: bool, said: IO[bytes]) -> PathReport:
    if late:
        sentence = f"timed out after {wanted.timeout_s:g} s and {done} of {wanted.calls} calls"
        return PathReport(wanted.path, Verdict.INCONCLUSIVE, sentence, done)
    said.seek(0)
    lines = [line for line in said.read().decode("utf-8", "backslashreplace").splitlines() if line.strip()]
    if code >= 0:  # an exception nobody expected: the harness's or the engine's, in any case no verdict
        words = one_line(lines[-1]) if lines else "it printed nothing"
        return PathReport(wanted.path, Verdict.INCONCLUSIVE, f"the probe ended in call {done + 1}: {words}", done)
    words = one_line(lines[0]) if lines else "it printed nothing"
    name = signal.Signals(-code).name
    sentence = f"the engine's process was ended by {name} in call {done + 1}: {words}"
    return PathReport(wanted.path, Verdict.BROKEN, sentence, done)


def attached() -> str:
    """Empty when the host ledger can be preloaded here, else why not."""
    try:
        build.interposer()
    except Inconclusive as error:
        return str(error)
    return ""
