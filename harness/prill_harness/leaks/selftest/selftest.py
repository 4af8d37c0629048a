"""Examine the probe on this machine, case by case, and write the page of figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prill_harness.console import Console
from prill_harness.leaks.judge import sites
from prill_harness.leaks.judge.probe import attached, run
from prill_harness.leaks.reports import bars
from prill_harness.leaks.reports.bars import Known
from prill_harness.leaks.reports.report import LeakVerdict, PathReport
from prill_harness.leaks.selftest import overhead, page, peer
from prill_harness.leaks.selftest.examination import Bar, Examination, Tried
from prill_harness.numbers.compare import largest
from prill_harness.records.files import write_file
from prill_runtime.errors import Inconclusive

SECONDS = 20.0  # limit for the probe on llama-tiny with numpy


def command(console: Console, *, quick: bool, device: bool, docs: Path | None, jobs: int) -> int:
    """Examine, print and write; exit code 0 only if every requirement holds."""
    why = attached()
    if why:
        raise Inconclusive("the probe cannot be examined", got=why)
    groups = {name: _cases(cases, quick) for name, cases in GROUPS.items()}
    total = sum(runs for cases in groups.values() for _, runs in cases)
    with console.progress(total, "probes") as bar:
        found = examine(groups, quick, device, jobs, bar.step)
    console.emit(found)
    for title, rows in page.tables(found):
        console.line(title)
        console.table(rows[0], rows[1:])
        console.line()
    for claim in found.bars:
        state = {True: "ok", False: "failed", None: "inconclusive"}[claim.holds]
        word = {True: "holds", False: "BROKEN", None: "not measured"}[claim.holds]
        console.line(f"{word}: {claim.claim}: asked {claim.asked}, measured {claim.measured}", status=state)
    if docs is not None:
        write_file(docs, page.render(found))
    return 0 if found.holds else 1


GROUPS = {"bar": bars.BAR, "planted": bars.PLANTED, "clean": bars.CLEAN, "undecided": bars.UNDECIDED}


def _cases(cases: Sequence[Known], quick: bool) -> list[tuple[Known, int]]:
    counts = [(case, case.quick if quick else case.runs) for case in cases]
    return [(case, runs) for case, runs in counts if runs]


def examine(
    groups: dict[str, list[tuple[Known, int]]],
    quick: bool,
    device: bool,
    jobs: int,
    step: Callable[[str], None],
) -> Examination:
    """Run every case; more than one job spoils the timings, not the verdicts."""
    began = time.monotonic()

    def one(pair: tuple[Known, int]) -> Tried:
        return _tried(pair[0], pair[1], quick, step)

    with ThreadPoolExecutor(jobs) as pool:
        tried = {name: list(pool.map(one, cases)) for name, cases in groups.items()}
    compared = peer.compared(quick)
    cost = overhead.measured(quick)
    claims = [
        _found("16 bytes leaked in every 8th call are found in at most 50 calls", tried["bar"]),
        _found("planted leaks are found on their path, in their ledger", tried["planted"]),
        _named(tried["planted"]),
        _clean(tried["clean"]),
        _found("what cannot be told apart is not called a leak", tried["undecided"]),
        _quickly(tried["clean"]),
        Bar("the preloaded ledger on a decode loop", "below 5 % more time", cost.sentence, cost.holds),
        _device(device, step),
    ]
    every = tuple(t for group in tried.values() for t in group)
    return Examination(quick, tuple(claims), every, tuple(compared), round(time.monotonic() - began, 1))


def _tried(case: Known, runs: int, quick: bool, step: Callable[[str], None]) -> Tried:
    reports = []
    for seed in range(runs):
        reports.append(run(case.probe(seed)))
        step(f"{case.name}: {reports[-1].verdict.value}")
    wrong = [report for report in reports if not right(case, report)]
    named = _stack(case, reports[0]) if case.function and not quick else ""
    return Tried(
        case=case,
        runs=runs,
        right=runs - len(wrong),
        alarms=sum(r.verdict in (LeakVerdict.LEAK, LeakVerdict.BROKEN) for r in reports),
        inconclusive=sum(r.verdict is LeakVerdict.INCONCLUSIVE for r in reports),
        calls=max(r.calls for r in reports),
        seconds=round(statistics.median(r.duration_s for r in reports), 1),
        named=named,
        wrong=f"{wrong[0].verdict.value}: {wrong[0].sentence}" if wrong else "",
    )


def right(case: Known, report: PathReport) -> bool:
    """Whether the verdict is one of the case's, its ledgers show the leak, and the sentence is right."""
    shown = {judged.ledger for judged in report.leaks}
    ledgers = set(case.ledgers) <= shown and bool(shown) == bool(case.ledgers or case.anywhere)
    in_time = not case.most_calls or report.calls <= case.most_calls
    return report.verdict in case.verdicts and ledgers and in_time and case.says in report.sentence


def _stack(case: Known, report: PathReport) -> str:
    """The case's function if a stack names it near its top; else what was found instead."""
    located = sites.located(case.probe(0), report)
    for site in located.sites:
        if any(case.function in frame for frame in site.stack[:3]):
            return case.function
    return located.stacks or (located.sites[0].function if located.sites else "no site")


def _found(claim: str, tried: Sequence[Tried]) -> Bar:
    runs, good = sum(t.runs for t in tried), sum(t.right for t in tried)
    wrong = next((f"; {t.case.name}: {t.wrong}" for t in tried if t.wrong), "")
    return Bar(claim, f"{runs} of {runs}", f"{good} of {runs}{wrong}", good == runs and runs > 0)


def _named(tried: Sequence[Tried]) -> Bar:
    asked = [t for t in tried if t.named]
    good = sum(t.named == t.case.function for t in asked)
    wrong = next((f"; {t.case.name}: {t.named}" for t in asked if t.named != t.case.function), "")
    measured = f"{good} of {len(asked)}{wrong}" if asked else "not in a quick examination"
    return Bar(
        "stacks name the function that leaks", f"all of {len(asked) or 'them'}", measured,
        good == len(asked) if asked else None,
    )  # fmt: skip


def _clean(tried: Sequence[Tried]) -> Bar:
    runs, alarms = sum(t.runs for t in tried), sum(t.alarms for t in tried)
    open_, wrong = sum(t.inconclusive for t in tried), next((t for t in tried if t.wrong), None)
    told = f"; {wrong.case.name}: {wrong.wrong}" if wrong else ""
    measured = f"{alarms} alarms and {open_} inconclusive in {runs} runs{told}"
    return Bar("clean engines raise no alarm", "0 alarms", measured, not alarms and open_ <= runs // 50)


def _quickly(tried: Sequence[Tried]) -> Bar:
    mine = [t for t in tried if t.case.name == "numpy on llama-tiny"]
    seconds = largest(0.0, *(t.seconds for t in mine))
    return Bar(
        "the probe on llama-tiny under numpy", f"below {SECONDS:g} s", f"{seconds:g} s (median)",
        0 < seconds < SECONDS if mine else None,
    )  # fmt: skip


def _device(asked: bool, step: Callable[[str], None] | None = None) -> Bar:
    claim = "leaks of device, pinned and managed memory are found"
    if not asked:
        return Bar(claim, "every one", "not asked for; --device", None)
    from prill_harness.leaks.controls.device import CASES

    told = step or (lambda sentence: None)
    tried = [_tried(case, case.runs, True, told) for case in CASES]
    absent = next((t for t in tried if "not attached" in t.wrong), None)
    if absent is not None:
        return Bar(claim, "every one", absent.wrong, None)
    return _found(claim, tried)
