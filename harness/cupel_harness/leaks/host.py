"""One path of one probe on the command line in; its report, from inside this preloaded fresh process, out."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence

import msgspec

from cupel_harness.leaks import judge, ledgers, paths, walk
from cupel_harness.leaks.ledgers import Book
from cupel_harness.leaks.report import Judged, PathReport, Probe, Verdict, worst
from cupel_runtime.errors import CupelError, Inconclusive

SECOND_WARMUP = 2  # calls with distinct prompts before they are measured
REMOTE = ("http", "exec")  # their memory is another process's


class Call(msgspec.Struct, frozen=True, tag="call"):
    """Progress: `done` of `total` calls, and the newest readings."""

    done: int
    total: int
    values: dict[str, int]


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The end of the path."""

    report: PathReport


Message = Call | Done


class Run:
    """The calls of one path, read after each, judged, doubled once where that is not clear."""

    def __init__(self, probe: Probe, path: paths.Path, tell: Callable[[Message], None]) -> None:
        self.probe, self.path, self._tell = probe, path, tell
        self.total = probe.calls + (probe.measured + SECOND_WARMUP if path.varies else 0)
        memory = path.memory()
        self.book, self.missing = ledgers.opened(probe.calls + 3 * probe.measured + SECOND_WARMUP, memory)
        self.counting = memory is not None
        self._rehearse()
        gc.collect()
        gc.freeze()  # what lives now is not looked at again after each call

    def _rehearse(self) -> None:
        """Judge empty readings, so that what judging imports and caches is there before the first call."""
        self.book.calls = self.probe.calls
        judge.Phase(self.book, self.probe.warmup + 1).judged()
        self.book.calls = 0

    def calls(self, count: int, *, distinct: bool = False) -> None:
        for _ in range(count):
            number = self.book.calls + 1
            self.path.call(number, self.path.distinct(number) if distinct else self.path.ids)
            self.book.close_call()
            self._tell(Call(self.book.calls, max(self.total, self.book.calls), self.book.last()))

    def judged(self) -> tuple[list[Judged], bool]:
        """(every series with its verdict, whether the plants were found)."""
        probe, book = self.probe, self.book
        self.calls(probe.warmup)
        gc.collect()
        gc.freeze()
        self.calls(probe.measured)
        phase = self._phase(probe.warmup + 1, distinct=False)
        found, planted = phase.judged(), all(phase.planted.values())
        if self.path.varies and worst([j.verdict for j in found]) is Verdict.CLEAN:
            found = self._distinct(found)
        return found, planted

    def _phase(self, first: int, *, distinct: bool) -> judge.Phase:
        """The calls since `first`, judged; doubled once where that may tell more."""
        phase = judge.Phase(self.book, first, distinct=distinct)
        if not phase.open or (phase.leaks and not distinct):
            return phase
        del phase  # what is judged again must not weigh on what is measured
        self.total += self.probe.measured
        self.calls(self.probe.measured, distinct=distinct)
        return judge.Phase(self.book, first, doubled=True, distinct=distinct)

    def _distinct(self, before: list[Judged]) -> list[Judged]:
        """The same with distinct prompts; where that grows, it takes the place of what was found before."""
        self.calls(SECOND_WARMUP, distinct=True)
        first = self.book.calls + 1
        self.calls(self.probe.measured, distinct=True)
        phase = self._phase(first, distinct=True)
        found = {(j.ledger, j.series): j for j in phase.judged() if j.verdict is not Verdict.CLEAN}
        return [found.get((j.ledger, j.series), j) for j in before]


def probe_path(probe: Probe, tell: Callable[[Message], None]) -> PathReport:
    """Probe one path in this process.

    Raises:
        CupelError: the engine cannot be opened, or the path cannot be walked on it.
    """
    began = time.monotonic()
    name = probe.engine.partition(":")[0].partition("+")[0]
    if name in REMOTE:
        raise Inconclusive("the engine works in another process, whose memory is not seen from here", got=name)
    if name == "control":
        from cupel_harness.leaks import controls  # noqa: F401
    path = paths.Path.registry[probe.path](probe)
    try:
        run = Run(probe, path, tell)
        found, planted = run.judged()
        missing = dict(run.missing)
        if not run.counting and not isinstance(path, paths.Load):
            missing["engine"] = f"engine {path.info.name} does not report its memory"
        elif run.counting and path.engine and not paths.counters_move(path.engine, path.ids):
            found = [j for j in found if j.ledger != "engine"]
            found.append(judge.constant(dict.fromkeys(ledgers.counter_names(path.engine.memory()), 0)))
        if isinstance(path, paths.Load) and worst([j.verdict for j in found]) is not Verdict.LEAK:
            found += walk.walked(probe)
        return concluded(probe, run.book, found, planted, missing, time.monotonic() - began)
    finally:
        with contextlib.suppress(CupelError):
            path.close()


def concluded(
    probe: Probe, book: Book, found: Sequence[Judged], planted: bool, missing: dict[str, str], duration: float
) -> PathReport:
    """The report of a path; a ledger that is missing forbids to say clean."""
    verdict = worst([j.verdict for j in found])
    telling = [j for j in found if j.verdict is verdict]
    if verdict is Verdict.CLEAN and (missing or not planted):
        verdict = Verdict.INCONCLUSIVE
    if verdict is Verdict.CLEAN:
        first = probe.warmup + 1
        sentence = (
            f"no ledger grew in {book.calls - probe.warmup} calls after {probe.warmup} of warm-up; a planted "
            f"leak of {ledgers.PLANT_BYTES} bytes in every {ledgers.PLANT_EVERY}th call was found"
        )
    elif verdict is Verdict.INCONCLUSIVE and not any(j.verdict is verdict for j in found):
        sentence = "; ".join(f"{name}: {why}" for name, why in missing.items()) or "the planted leak was not found"
    else:
        sentence = main_sentence(telling)
    first = probe.warmup + 1
    book.unplant()
    return PathReport(
        probe.path, verdict, sentence, book.calls, first, planted, tuple(found), missing,
        duration_s=round(duration, 3), readings=book.last(),
    )  # fmt: skip


PREFERRED = ("bytes", "mapped", "blocks")


def main_sentence(found: Sequence[Judged]) -> str:
    """One sentence per ledger, its series in bytes before that in blocks."""
    order = {name: i for i, name in enumerate(PREFERRED)}
    best: dict[tuple[str, str], Judged] = {}
    for j in sorted(found, key=lambda j: order.get(j.series, 0)):
        best.setdefault((j.ledger, "memory" if j.series in ("bytes", "blocks") else j.series), j)
    return "; ".join(j.sentence for j in best.values())


def main(arguments: Sequence[str]) -> int:
    """`host PROBE FD`: probe one path, messages as JSON lines to the descriptor."""
    os.environ.pop("LD_PRELOAD", None)  # what this process starts is not what is probed
    probe = msgspec.json.decode(arguments[0], type=Probe)
    channel = int(arguments[1])

    def tell(message: Message) -> None:
        os.write(channel, msgspec.json.encode(message) + b"\n")

    from cupel_harness import faults
    from cupel_harness.engines import EngineSpec

    planted = EngineSpec.parse(probe.engine).faults
    try:
        if planted:  # for the whole process: its threads must not switch it on and off under one another
            faults.ambient(faults.named(planted))
        report = probe_path(probe, tell)
    except CupelError as error:
        verdict = Verdict.INCONCLUSIVE if isinstance(error, Inconclusive) else Verdict.BROKEN
        report = PathReport(probe.path, verdict, str(error))
    tell(Done(report))
    return report.verdict.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
