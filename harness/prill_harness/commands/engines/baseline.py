"""The part of `prill bench` that records a baseline and holds an engine to it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from prill_harness.console import Console
from prill_harness.measure import baseline
from prill_harness.measure.bench import Settings
from prill_harness.records.evidence import EXIT_CODES
from prill_harness.records.files import write_file
from prill_harness.records.verdict import SpeedResult

BUDGET = 1.10


def run(
    console: Console,
    engine: str,
    model: str,
    settings: Settings,
    *,
    file: Path,
    record: bool,
    budget: float | None,
    output: Path | None,
) -> int:
    """Record a baseline, or compare with one: exit code 1 where an interval is wholly over the budget, 10
    where it only reaches over it."""
    then = None if record else baseline.read(file)
    with console.progress(2 + settings.repeat, f"timing {model}") as bar:
        now = baseline.measured(model, engine, settings, tell=bar.step)
    spread = baseline.noise(now.calibrations_s)
    said = f"calibrated by {now.calibration}, which went apart by {spread:.1%}"
    if then is None:
        write_file(file, msgspec.json.format(msgspec.json.encode(now), indent=1).decode() + "\n")
        console.emit({"baseline": now})
        console.line(f"written: {file}, {settings.repeat} repetitions {said}")
        return 0
    speeds, most = baseline.compared(then, now), budget or BUDGET
    if output is not None:
        write_file(output, msgspec.json.encode({"speeds": speeds}).decode() + "\n")
    verdicts = {speed.name: _judged(speed, most) for speed in speeds}
    worst = next((word for word in EXIT_CODES if word in verdicts.values()), "inconclusive")
    console.emit({"speeds": speeds, "budget": most, "status": worst, "noise": spread, "now": now})
    for speed in speeds:
        told = f"{speed.ratio:.3f} times its baseline's time ({speed.low:.3f} to {speed.high:.3f})"
        console.line(
            f"{speed.name}: {told}, at most {most:g}: {verdicts[speed.name]}", status=verdicts[speed.name]
        )
    console.line(said)
    if worst == "inconclusive":
        wide = max((speed.high - speed.low) / 2 / speed.ratio for speed in speeds)
        console.line(f"the noise is {wide:.1%}, too much to tell: repeat more often, or on a quieter machine")
    return EXIT_CODES[worst]


def _judged(speed: SpeedResult, most: float) -> str:
    if speed.low > most:
        return "failed"
    return "passed" if speed.high <= most else "inconclusive"
