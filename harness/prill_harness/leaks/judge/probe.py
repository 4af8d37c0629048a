"""Probe paths, each in a fresh preloaded process under a time limit, and report on all of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence

import msgspec

from prill_harness.engines.spec import EngineSpec
from prill_harness.leaks.judge import judge, sites
from prill_harness.leaks.judge.hosted import Hosted
from prill_harness.leaks.ledgers import build, lastwords
from prill_harness.leaks.ledgers.ledgers import Book
from prill_harness.leaks.probed import paths, protocol
from prill_harness.leaks.probed.protocol import (
    Call,
    ControlRows,
    Failing,
    Finished,
    Opened,
    Refused,
    Rows,
)
from prill_harness.leaks.reports.report import JudgedSeries, LeakReport, LeakVerdict, PathReport, Probe, worst
from prill_harness.run import reproduce
from prill_harness.run.outcomes import one_line
from prill_runtime.errors import Inconclusive, UsageError

Watch = Callable[[Probe, Call], None]
HOST = "prill_harness.leaks.probed.host"
ON_DEVICE = ("cuda", "control_cuda")


def probe(
    wanted: Probe, names: Sequence[str] = (), watch: Watch = lambda probe, call: None, *, stacks: bool = True
) -> LeakReport:
    """Probe the named paths (the probe's own if none is named), each in a process of its own.

    Raises:
        UsageError: no such path.
        Inconclusive: the host ledger cannot be preloaded on this machine.
    """
    began, found = time.monotonic(), list[PathReport]()
    for name in names or (wanted.path,):
        one = msgspec.structs.replace(wanted, path=name)
        report = run(one, watch)
        if stacks and wanted.stacks and report.verdict is LeakVerdict.LEAK:
            report = sites.located(one, report)
        found.append(report)
    verdict = worst([p.verdict for p in found])
    telling = [p for p in found if p.verdict is verdict]
    sentence = "; ".join(
        f"{p.path}: {p.sentence}" for p in (telling if verdict is not LeakVerdict.CLEAN else telling[:1])
    )
    if verdict is LeakVerdict.CLEAN and len(found) > 1:
        sentence = f"{len(found)} paths are clean; {sentence}"
    return LeakReport(
        wanted.engine, wanted.model, verdict, sentence, tuple(found), again(wanted, names),
        round(time.monotonic() - began, 3),
    )  # fmt: skip


def again(wanted: Probe, names: Sequence[str]) -> str:
    """The shell command that repeats this probe."""
    return reproduce.line(
        "leak",
        engine=wanted.engine,
        model=wanted.model,
        calls=wanted.calls,
        path=names[0] if len(names) == 1 else "all" if names else wanted.path,
        timeout="" if wanted.timeout_s == Probe.timeout_s else f"{wanted.timeout_s:g}",
    )


def run(wanted: Probe, watch: Watch = lambda probe, call: None) -> PathReport:
    """Probe one path in a fresh process under its time limit; a process that dies is itself a finding.

    An engine on a GPU is probed twice: CUPTI, which records GPU memory, allocates host memory at every call,
    so the host's ledgers are read in a process without it.
    """
    if wanted.path not in paths.NAMES:
        raise UsageError("no such path", expected=" or ".join(paths.NAMES), got=repr(wanted.path))
    report = _run(wanted, watch)
    if report.verdict is LeakVerdict.BROKEN or EngineSpec.parse(wanted.engine).name not in ON_DEVICE:
        return report
    return joined(report, _run(msgspec.structs.replace(wanted, device=True), watch))


def joined(host: PathReport, device: PathReport) -> PathReport:
    """One report of a path's two runs; it cannot be clean if a run lacked a ledger."""
    verdict = worst([host.verdict, device.verdict])
    telling = [one.sentence for one in (host, device) if one.verdict is verdict]
    return msgspec.structs.replace(
        host,
        verdict=verdict,
        sentence=host.sentence if verdict is LeakVerdict.CLEAN else "; ".join(telling),
        planted=host.planted and device.planted,
        seen=host.seen + device.seen,
        missing=host.missing | device.missing | ({} if device.seen else {"device": device.sentence}),
        duration_s=round(host.duration_s + device.duration_s, 3),
        readings=host.readings | device.readings,
    )


def _run(wanted: Probe, watch: Watch) -> PathReport:
    began = time.monotonic()
    with (
        build.preloaded(os.environ.get("LD_PRELOAD", "")) as (preload, files),
        Hosted(wanted, HOST, {"LD_PRELOAD": preload}, files) as hosted,
    ):
        report = Conversation(wanted, hosted, watch).report()
    return msgspec.structs.replace(report, duration_s=round(time.monotonic() - began, 3))


class Conversation:
    """Listens to the measuring process, judges its readings, and tells it what to do next."""

    def __init__(self, wanted: Probe, hosted: Hosted, watch: Watch) -> None:
        self._wanted, self._hosted, self._watch = wanted, hosted, watch
        self._found: list[JudgedSeries] = []
        self._planted = self._doubled = self._distinct = False
        self._opened: Opened | None = None
        self._book: Book | None = None
        self._control: judge.ControlNoise | None = None
        self._failing: Failing | None = None
        self._done = 0

    def report(self) -> PathReport:
        """The report on the path."""
        for message in self._hosted.messages():
            if isinstance(message, Call):
                self._done = message.done
                self._watch(self._wanted, message)
            elif isinstance(message, Opened):
                self._opened = message
            elif isinstance(message, Rows):
                self._hosted.command(self._next(message))
            elif isinstance(message, ControlRows) and self._opened is not None:
                book = message.rows.book(self._opened.series)
                self._control = judge.ControlNoise(book, message.rows.first)
            elif isinstance(message, Failing):
                self._failing = message
            elif isinstance(message, Refused):
                verdict = LeakVerdict.BROKEN if message.broken else LeakVerdict.INCONCLUSIVE
                return PathReport(self._wanted.path, verdict, message.sentence, self._done)
            elif isinstance(message, Finished):
                return self._finished(message)
        return self._died()

    def _next(self, rows: Rows) -> bytes:
        """Judge the readings so far; the command for what is worth doing next."""
        assert self._opened is not None
        self._book = book = rows.book(self._opened.series)
        phase = judge.Phase(
            book, rows.first, doubled=self._doubled, distinct=self._distinct, control=self._control
        )
        if phase.open and (self._distinct or not phase.leaks):
            self._doubled = True
            return protocol.AGAIN
        if self._distinct:  # where these grow, they replace what was found before
            self._found = judge.with_distinct(self._found, phase.judged())
            return protocol.END
        self._found, self._planted = phase.judged(), all(phase.planted.values())
        clean = worst([j.verdict for j in self._found]) is LeakVerdict.CLEAN
        if self._opened.varies and clean:
            self._distinct, self._doubled = True, False
            return protocol.DISTINCT
        if self._opened.kinds and phase.leaks:
            return protocol.LOCATE
        # With the GPU's ledgers, CUPTI allocates host memory at every load, failed ones included.
        walks = self._wanted.path == "load" and not phase.leaks and not self._wanted.device
        return protocol.WALK if walks else protocol.END

    def _finished(self, message: Finished) -> PathReport:
        assert self._opened is not None
        assert self._book is not None
        found = [*self._found, *message.extra]
        if message.constant is not None:
            found = [j for j in found if j.ledger != "engine"] + [judge.constant(message.constant)]
        report = judge.concluded(self._wanted, self._book, found, self._planted, self._opened.missing)
        made = {kind: times * (report.calls - report.first + 1) for kind, times in self._opened.kinds.items()}
        sentence = report.sentence + judge.sites(report.leaks, message.left)
        return msgspec.structs.replace(report, walk=message.walk, kinds=made, sentence=sentence)

    def _died(self) -> PathReport:
        path, code, lines = self._wanted.path, self._hosted.ended(), self._hosted.said()
        if self._hosted.late:
            limit = f"{self._wanted.timeout_s:g} s and {self._done} of {self._wanted.calls} calls"
            return PathReport(path, LeakVerdict.INCONCLUSIVE, f"timed out after {limit}", self._done)
        if self._failing is not None and (end := lastwords.read(lines)) is not None:
            return self._died_refused(
                self._failing, end, signal.Signals(-code).name if code < 0 else f"exit code {code}"
            )
        where = f"in call {self._done + 1}"
        if code >= 0:  # an unexpected exception: no verdict on the engine's memory
            words = one_line(lines[-1]) if lines else "it printed nothing"
            return PathReport(path, LeakVerdict.INCONCLUSIVE, f"the probe ended {where}: {words}", self._done)
        words, name = one_line(lines[0]) if lines else "it printed nothing", signal.Signals(-code).name
        sentence = f"the engine's process was ended by {name} {where}: {words}"
        return PathReport(path, LeakVerdict.BROKEN, sentence, self._done)

    def _died_refused(self, failing: Failing, end: lastwords.LastWord, how: str) -> PathReport:
        """A load that died of a failed allocation: BROKEN only if it died in the engine's own code."""
        which = f"allocation {failing.nth} of {failing.of} of a load failed"
        sentence = f"host: {which}, and the process was ended by {how} {end.sentence}"
        verdict = LeakVerdict.BROKEN if end.engine else LeakVerdict.INCONCLUSIVE
        found = (*self._found, JudgedSeries("host", "failed allocations", "B", verdict, sentence))
        first = self._wanted.warmup + 1
        return PathReport(self._wanted.path, verdict, sentence, self._done, first, self._planted, found)


def attached() -> str:
    """Empty if the host ledger can be preloaded here, else why not."""
    try:
        build.interposer()
    except Inconclusive as error:
        return str(error)
    return ""
