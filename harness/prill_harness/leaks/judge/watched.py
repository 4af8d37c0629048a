"""Probe an engine in a process that prill does not host: its resident memory, threads and descriptors.

The exact ledgers are inside a process and do not reach into this one. What is read from outside is pages,
and a sound engine's heap moves them too: less than 16 KiB per call is not seen, and the report says so.
Descriptors and threads are exact. A known leak is looked for first, alike, in the example worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from prill_harness.engines.base import Engine
from prill_harness.engines.connect import connect
from prill_harness.engines.others.capi import build
from prill_harness.engines.remote import Remote
from prill_harness.engines.spec import EngineSpec
from prill_harness.leaks.judge.judge import grown_in, moved
from prill_harness.leaks.probed.host import REMOTE
from prill_harness.leaks.reports.report import (
    JudgedSeries,
    LeakReport,
    LeakVerdict,
    PathReport,
    Probe,
    amount,
    worst,
)
from prill_harness.leaks.reports.verdict import RESIDENT_BYTES, WINDOWS, Rule, State, shape, state
from prill_runtime.errors import Inconclusive, PrillError, UsageError

IDS = (1, 5, 9, 3)
TOKENS = 4
CONTROL_MODEL = "fixture:llama-tiny"
SERIES: Mapping[str, tuple[str, Rule]] = {
    "resident": ("B", Rule.RESIDENT),
    "threads": ("threads", Rule.NEVER),
    "descriptors": ("descriptors", Rule.NEVER),
}
STATES = {
    State.LEAK: LeakVerdict.LEAK,
    State.CLEAN: LeakVerdict.CLEAN,
    State.UNCLEAR: LeakVerdict.INCONCLUSIVE,
}
Call = Callable[[Engine], object]


def _success(engine: Engine) -> None:
    engine.generate(list(IDS), max_tokens=TOKENS, ignore_eos=True)


def _error(engine: Engine) -> None:
    with suppress(UsageError):
        engine.generate([*IDS, -1], max_tokens=TOKENS)


def _cancel(engine: Engine) -> None:
    engine.generate(list(IDS), max_tokens=TOKENS, ignore_eos=True, on_token=lambda token, logprob: False)


PATHS: Mapping[str, Call] = {"success": _success, "error": _error, "cancel": _cancel}


def elsewhere(spec: str) -> bool:
    """Whether the engine works in a process that the probe cannot be loaded into."""
    return EngineSpec.parse(spec).name in REMOTE


def probe(wanted: Probe, names: Sequence[str], again: str) -> LeakReport:
    """Probe these paths, one after the other, on one opened engine.

    Args:
        again: the command that repeats it.

    Raises:
        UsageError: a path that is not one of PATHS. Inconclusive: the process is not known, or no control.
    """
    began = time.monotonic()
    for name in names:
        if name not in PATHS:
            raise UsageError(
                "a process is watched from outside on some paths only", where=f"--path {name}",
                expected=" or ".join(PATHS), got=name,
            )  # fmt: skip
    sees = control_seen(wanted)
    engine = connect(EngineSpec.parse(wanted.engine), wanted.model)
    assert isinstance(engine, Remote)
    with engine:
        reports = tuple(_path(engine, name, wanted, sees) for name in names)
    verdict = worst([report.verdict for report in reports])
    telling = "; ".join(f"{r.path}: {r.sentence}" for r in reports if r.verdict is verdict)
    taken = round(time.monotonic() - began, 3)
    return LeakReport(wanted.engine, wanted.model, verdict, telling, reports, again, taken)


def control_seen(wanted: Probe) -> bool:
    """Whether 32 KiB that the example worker leaks in every call are found, by as many calls.

    Raises:
        Inconclusive: the worker cannot be compiled.
    """
    leaky = EngineSpec.parse(f"exec:env PRILL_ENGINE_DEFECT=worker_leaks {build.worker_command()}")
    with connect(leaky, CONTROL_MODEL) as engine:
        assert isinstance(engine, Remote)
        seen = _path(engine, "success", wanted, True)
    return [judged.series for judged in seen.leaks] == ["resident"]


def _path(engine: Remote, name: str, wanted: Probe, sees: bool) -> PathReport:
    """Warm up, measure, and measure as many calls again where that could tell more."""
    began, call = time.monotonic(), PATHS[name]
    rows: dict[str, list[int]] = {series: [] for series in SERIES}
    try:
        for _ in range(wanted.warmup):
            call(engine)
        _read(engine, rows)
        for turn in (1, 2):
            for _ in range(wanted.measured):
                call(engine)
                if time.monotonic() - began > wanted.timeout_s:
                    done = len(rows["resident"])
                    late = f"timed out after {wanted.timeout_s:g} s and {done} of {wanted.measured} calls"
                    return PathReport(name, LeakVerdict.INCONCLUSIVE, late, done)
                _read(engine, rows)
            judged = [_judged(series, values, turn == 2) for series, values in rows.items()]
            if all(each.verdict is not LeakVerdict.INCONCLUSIVE for each in judged):
                break
    except Inconclusive:
        raise
    except PrillError as error:
        return PathReport(name, LeakVerdict.BROKEN, str(error), len(rows["resident"]))
    verdict = worst([each.verdict for each in judged])
    sentence = "; ".join(each.sentence for each in judged if each.verdict is verdict)
    if verdict is LeakVerdict.CLEAN:
        sentence += f"; read from outside, less than {amount(RESIDENT_BYTES)} per call is not seen"
        if not sees:
            verdict = LeakVerdict.INCONCLUSIVE
            sentence = "a leak of 32 KiB in every call of a control process was not found from outside"
    calls = wanted.warmup + len(rows["resident"]) - 1
    seconds = round(time.monotonic() - began, 3)
    return PathReport(
        name, verdict, sentence, calls, wanted.warmup + 1, sees, tuple(judged), duration_s=seconds
    )  # fmt: skip


def _read(engine: Remote, rows: Mapping[str, list[int]]) -> None:
    for series, value in engine.watched().items():
        rows[series].append(value)


def _judged(series: str, values: Sequence[int], doubled: bool) -> JudgedSeries:
    unit, rule = SERIES[series]
    seen = shape(values)
    verdict, grown = STATES[state(seen, rule, doubled=doubled)], grown_in(seen)
    words = moved(seen.last, unit, grown)
    if verdict is not LeakVerdict.CLEAN:
        rate = amount(seen.slope) if unit == "B" else f"{seen.slope:.3g} {unit}"
        words = f"{rate} per call, {grown} of {WINDOWS} windows; {words}"
    return JudgedSeries(
        "process", series, unit, verdict, f"process {series}: {words}", tuple(values), seen.slope, seen.low,
        seen.high, seen.growth, seen.fall, grown, WINDOWS,
    )  # fmt: skip
