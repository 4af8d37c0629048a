"""Measure one path of a probe from inside this fresh, preloaded process.

This process only measures: memory allocated for judging would be in the readings.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from prill_harness.engines.spec import EngineSpec
from prill_harness.leaks.ledgers import ledgers, settle
from prill_harness.leaks.probed import paths, protocol, walk
from prill_harness.leaks.probed.protocol import Call, ControlRows, Finished, Message, Opened, Refused, Rows
from prill_harness.leaks.reports.report import JudgedSeries, Probe
from prill_runtime.errors import Inconclusive, PrillError

CONTROL_FIRST = 2  # control calls before those that count
SECOND_WARMUP = 2  # calls with distinct prompts before they are measured
# Calls of each kind, and passes over the kinds, to find which kind leaves something every time.
CALLS_TO_LOCATE, PASSES_TO_LOCATE = 200, 3
REMOTE = ("http", "exec", "capi", "serve")  # engines whose memory is in another process


class ProbedRun:
    """The calls of one path, with a reading after each."""

    def __init__(
        self,
        probe: Probe,
        path: paths.Path,
        tell: Callable[[Message], None],
        device: Sequence[ledgers.LeakLedger] = (),
    ) -> None:
        self.probe, self.path, self._tell = probe, path, tell
        memory = path.memory()
        self.book, self.missing = ledgers.opened(
            probe.calls + 3 * probe.measured + SECOND_WARMUP, memory, device
        )
        if memory is None and not device and not isinstance(path, paths.Load):
            self.missing["engine"] = f"engine {path.info.name} does not report its memory"
        self._total = probe.calls

    def carry_out(self, order: Callable[[], bytes]) -> bytes:
        """Measure as `order` commands; returns the command that ended it."""
        probe, first, distinct = self.probe, self.probe.warmup + 1, False
        made_of = dict.fromkeys(self.path.kinds, self.path.times)
        self._tell(Opened(self.book.series, self.missing, self.path.varies and probe.vary, made_of))
        settle.begin()
        self._control()
        self._calls(probe.warmup)
        settle.freeze()
        self._calls(probe.measured)
        while True:
            self._tell(Rows.of(self.book, first))
            command = order()
            if command not in (protocol.AGAIN, protocol.DISTINCT):
                self.book.unplant()
                return command
            self._total = self.book.calls + probe.measured
            if command == protocol.DISTINCT:
                distinct = True
                self._calls(SECOND_WARMUP, distinct)
                first = self.book.calls + 1
            self._calls(probe.measured, distinct)

    def left(self) -> dict[str, dict[str, int]]:
        """Kind of call -> what grew in each of PASSES_TO_LOCATE passes of calls of that kind alone."""
        kinds, count = self.path.kinds, max(1, CALLS_TO_LOCATE * self.path.times // paths.CALLS_OF_A_KIND)
        book = self.book.beside(PASSES_TO_LOCATE * len(kinds) + 1)
        book.close_call()
        for make in list(kinds.values()) * PASSES_TO_LOCATE:
            for n in range(count):
                make(n)
            book.close_call()
        book.unplant()
        rows = (book.rows - book.planted)[: book.calls]
        grown = np.diff(rows, axis=0).reshape(PASSES_TO_LOCATE, len(kinds), -1).min(axis=0)  # (kind, series)
        told = [(f"{s.ledger} {s.name}", at) for at, s in enumerate(book.series) if s.rule and not s.part]
        return {
            kind: {name: int(by[at]) for name, at in told if by[at] > 0}
            for kind, by in zip(kinds, grown, strict=True)
        }

    def _control(self) -> None:
        """Make as many control calls as calls are measured, if the path has a control."""
        if self.path.control is None:
            return
        book = self.book.beside(self.probe.measured + CONTROL_FIRST)
        for _ in range(self.probe.measured + CONTROL_FIRST):
            self.path.control()
            book.close_call()
        book.unplant()
        self._tell(ControlRows(Rows.of(book, CONTROL_FIRST + 1)))

    def _calls(self, count: int, distinct: bool = False) -> None:
        for _ in range(count):
            number = self.book.calls + 1
            self.path.call(number, self.path.distinct(number) if distinct else self.path.ids)
            self.book.close_call()
            self._tell(Call(self.book.calls, max(self._total, self.book.calls), self.book.last()))


def serve(probe: Probe, tell: Callable[[Message], None], order: Callable[[], bytes]) -> None:
    """Probe one path in this process.

    Raises:
        PrillError: the engine cannot be opened, or does not offer the path.
    """
    name = probe.engine.partition(":")[0].partition("+")[0]
    if name in REMOTE:
        raise Inconclusive(
            "the engine works in another process, whose memory is not seen from here", got=name
        )
    if name == "control":
        from prill_harness.leaks.controls import host as controls  # noqa: F401
    if name == "control_cuda":
        from prill_harness.leaks.controls import device as device_controls  # noqa: F401
    device = _device(probe) if probe.device else ()
    path = paths.Path.registry[probe.path](probe)
    try:
        run = ProbedRun(probe, path, tell, device)
        command = run.carry_out(order)
        extra, done = list[JudgedSeries](), None
        left = run.left() if command == protocol.LOCATE else {}
        if command == protocol.WALK and isinstance(path, paths.Load):
            extra, done = walk.walked(probe, path.model, tell)
        constant = None
        if not device and path.memory() and path.engine and not paths.counters_move(path.engine, path.ids):
            constant = tuple(ledgers.counter_names(path.engine.memory()))
        tell(Finished(tuple(extra), constant, done, left))
    finally:
        with contextlib.suppress(PrillError):
            path.close()


def _device(probe: Probe) -> Sequence[ledgers.LeakLedger]:
    """Attach the device's ledgers, before the engine creates its context.

    Raises:
        Inconclusive: no CUPTI or no driver.
    """
    from prill_harness.leaks.ledgers import device

    ordinal = EngineSpec.parse(probe.engine).argument.split(",")[0]
    return device.attached(int(ordinal) if ordinal.isdecimal() else 0)


def main(arguments: Sequence[str]) -> int:
    """`host PROBE WRITE READ`: probe one path; messages to one descriptor, commands from the other."""
    _, _, own = os.environ.pop("LD_PRELOAD", "").partition(":")
    if own:  # the caller's own LD_PRELOAD; child processes are not probed
        os.environ["LD_PRELOAD"] = own
    probe = msgspec.json.decode(arguments[0], type=Probe)
    writing, reading = map(int, arguments[1:3])

    def tell(message: Message) -> None:
        text = memoryview(msgspec.json.encode(message) + b"\n")
        while text:
            text = text[os.write(writing, text) :]

    from prill_harness.faults.catalogue import named
    from prill_harness.planting import faults

    try:
        planted = EngineSpec.parse(probe.engine).faults
        if planted:  # for the whole process, so that threads do not switch it on and off for one another
            faults.ambient(named(planted))
        serve(probe, tell, lambda: os.read(reading, 1))
    except PrillError as error:
        tell(Refused(str(error), not isinstance(error, Inconclusive)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
