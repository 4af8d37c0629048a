"""Fail the allocations of an engine's own process, one in each request, and see what becomes of it.

A request may be refused for lack of memory, or be answered all the same; the process goes on, and the next
request has the text that it always has. What the failure leaves behind is not seen from outside, nor whose
code asked: NumPy's ufuncs report a buffer that they lack without the interpreter's lock and die, so a process
with an interpreter in it is never called broken. The walk itself is believed when it finds the example worker
that uses a block without looking whether it got one.
"""

from __future__ import annotations

import mmap
import shlex
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from prill_harness.engines.base import Engine
from prill_harness.engines.connect import connect
from prill_harness.engines.others.capi import build
from prill_harness.engines.others.capi.compiler import compiled
from prill_harness.engines.spec import EngineSpec
from prill_harness.leaks.judge.watched import CONTROL_MODEL, IDS, TOKENS
from prill_harness.leaks.reports.report import LeakReport, LeakVerdict, PathReport, Probe
from prill_runtime.errors import Inconclusive, MissingCapability, PrillError, ProcessLost, UsageError

PATH = "allocation"
STARTED = ("exec", "serve")  # connectors whose command prill starts, and can load something into
SOURCE = Path(__file__).parents[1] / "ledgers" / "starve.c"
FLAGS = ("-std=c11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra")
MOST, CONTROL_MOST = 200, 20  # allocations that are failed, spread over those of a request
SHOWN = 3  # findings in a sentence
COUNTERS = struct.Struct("5q")  # of starve.c


@dataclass
class Starving:
    """The counters that a preloaded process shares."""

    memory: mmap.mmap

    def read(self) -> tuple[int, int, int, int, int]:
        """Processes that are here, allocations seen, how many are left, how many failed, their least size."""
        here, seen, left, failed, least = COUNTERS.unpack_from(self.memory)
        return here, seen, left, failed, least

    @property
    def failed(self) -> int:
        return self.read()[3]

    def aim(self, left: int) -> None:
        """Let the `left`-th allocation from now on fail; 0: none."""
        struct.pack_into("q", self.memory, 16, left)


@dataclass
class StarvedWalk:
    """What came of it: allocations failed, of how many; requests answered all the same; findings."""

    failed: int = 0
    of: int = 0
    answered: int = 0
    least: int = 0
    findings: list[str] = field(default_factory=list)

    @property
    def sentence(self) -> str:
        kind = f" of {self.least} bytes and more" if self.least else ""
        told = f"{self.failed} of the {self.of} allocations{kind} of a request failed in turn"
        if self.findings:
            more = len(self.findings) - SHOWN
            rest = f"; and {more} more" if more > 0 else ""
            return f"{told}: {'; '.join(self.findings[:SHOWN])}{rest}"
        good = f"{self.answered} requests were answered all the same, the others refused"
        return f"{told}: {good}; the process went on, and the next request was right"


def probe(wanted: Probe, again: str) -> LeakReport:
    """Walk the allocations of one request of an engine that prill starts by a command.

    Raises:
        UsageError: another engine. Inconclusive: nothing can be preloaded, or the texts differ by themselves.
    """
    began = time.monotonic()
    spec = EngineSpec.parse(wanted.engine)
    if spec.name not in STARTED or ",adapter=" in spec.argument:
        raise UsageError(
            "only in a process that is started by a command, and stays, can allocations be failed",
            where=f"--path {PATH}", expected=" or ".join(f"{name}:COMMAND" for name in STARTED),
            got=wanted.engine, hint="loads of other engines are walked by --path load",
        )  # fmt: skip
    unchecked = f"exec:env PRILL_ENGINE_DEFECT=allocation_unchecked {build.worker_command()}"
    sees = bool(walk(unchecked, CONTROL_MODEL, CONTROL_MOST, wanted.timeout_s).findings)
    found = walk(wanted.engine, wanted.model, MOST, wanted.timeout_s)
    verdict, sentence = LeakVerdict.BROKEN if found.findings else LeakVerdict.CLEAN, found.sentence
    if found.findings and found.least:
        verdict = LeakVerdict.INCONCLUSIVE
        sentence += "; in an interpreter its libraries may be to blame: NumPy dies of a buffer that it lacks"
    elif not found.failed:
        verdict, sentence = LeakVerdict.INCONCLUSIVE, "a request makes no allocation that could be failed"
    elif not found.findings and not sees:
        verdict = LeakVerdict.INCONCLUSIVE
        sentence = "the example worker that uses a block it did not get was not found"
    taken = round(time.monotonic() - began, 3)
    path = PathReport(PATH, verdict, sentence, 2 * found.failed + 3, 4, sees, duration_s=taken)
    return LeakReport(wanted.engine, wanted.model, verdict, f"{PATH}: {sentence}", (path,), again, taken)


def walk(engine: str, model: str, most: int, patience_s: float) -> StarvedWalk:
    """Fail up to `most` allocations, each in a request of its own, until the time is over.

    Raises:
        Inconclusive: the process was not reached, or does not write the same text twice.
    """
    ends, walked = time.monotonic() + patience_s, StarvedWalk()
    with starving(engine) as (spec, counters):
        opened = connect(EngineSpec.parse(spec), model)
        try:
            _ask(opened)
            text, begin = _ask(opened), counters.read()[1]
            if _ask(opened) != text:
                raise Inconclusive("one request has two texts, so none is known to be wrong", where=engine)
            here, seen, _, _, walked.least = counters.read()
            if not here:
                raise Inconclusive("nothing can be loaded into the engine's process", where=engine)
            walked.of = seen - begin
            for nth in spread(walked.of, most):
                if time.monotonic() > ends:
                    break
                before = counters.failed
                counters.aim(nth)
                finding, answered = _starved(opened, text)
                counters.aim(0)
                if counters.failed == before and not finding:
                    continue  # this time the request made fewer
                walked.failed += 1
                walked.answered += answered
                if finding := finding or _after(opened, text):
                    walked.findings.append(f"at allocation {nth} {finding}")
                    opened.close()
                    opened = connect(EngineSpec.parse(spec), model)
        finally:
            counters.aim(0)
            opened.close()
    return walked


def spread(count: int, most: int) -> Sequence[int]:
    """At most so many of 1 to `count`, spread over them, the first and the last among them."""
    if count <= most:
        return range(1, count + 1)
    return sorted({1 + round(number * (count - 1) / (most - 1)) for number in range(most)})


@contextmanager
def starving(engine: str) -> Iterator[tuple[str, Starving]]:
    """The spec by which the engine is started with its allocations counted, and the counters.

    Raises:
        Inconclusive: no C compiler.
    """
    library = compiled("what fails allocations", [SOURCE], FLAGS, "starve.so", "capi")
    with tempfile.NamedTemporaryFile(prefix="prill-starve-") as file:
        file.write(bytes(COUNTERS.size))
        file.flush()
        name, _, command = engine.partition(":")
        preload = shlex.join(["env", f"LD_PRELOAD={library}", f"PRILL_STARVE={file.name}"])
        with mmap.mmap(file.fileno(), COUNTERS.size) as memory:
            yield f"{name}:{preload} {command}", Starving(memory)


def _ask(engine: Engine) -> object:
    """What the engine writes: ids, or a text where it tells none."""
    made = engine.generate(list(IDS), max_tokens=TOKENS, ignore_eos=True)
    try:
        return tuple(made.ids)
    except MissingCapability:
        return str(getattr(made, "text", ""))


def _starved(engine: Engine, text: object) -> tuple[str, bool]:
    """What is wrong with the request whose allocation fails, if anything; whether it was answered."""
    try:
        same = _ask(engine) == text
    except ProcessLost as error:
        return str(error), False
    except PrillError:
        return "", False
    return "" if same else "another text is written without a word", same


def _after(engine: Engine, text: object) -> str:
    """What is wrong with the request behind it, if anything."""
    try:
        same = _ask(engine) == text
    except PrillError as error:
        return f"the next request fails: {error}"
    return "" if same else "the next request has another text"
