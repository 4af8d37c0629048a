"""Compare prill's probe with psleak on the control library: verdicts, calls, seconds."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from prill_harness.leaks.judge.probe import run
from prill_harness.leaks.reports.report import LeakVerdict, Probe
from prill_harness.run import cells
from prill_harness.run.children import python
from prill_runtime.errors import UsageError

# (description, engine spec, whether it leaks)
CASES = (
    ("16 bytes in every call", "control:leak=block,size=16", True),
    ("16 bytes in every 8th call", "control:leak=block,size=16,every=8", True),
    ("64 bytes in every 8th call", "control:leak=block,size=64,every=8", True),
    ("16 bytes, amid a worker pool", "control:leak=block,size=16,noise=pool", True),
    ("16 bytes in every 8th call, amid churn", "control:leak=block,size=16,every=8,noise=churn", True),
    ("nothing, amid churn", "control:noise=churn", False),
    ("nothing, amid a worker pool", "control:noise=pool", False),
)
RUNS, LIMIT_S, QUICK_LIMIT_S = 2, 20.0, 8.0


class Compared(msgspec.Struct, frozen=True):
    """One case for both tools: correct runs, most calls, and total seconds."""

    name: str
    runs: int
    prill_right: int
    prill_calls: int
    prill_s: float
    psleak_right: int
    psleak_calls: int
    psleak_s: float
    psleak_late: int
    version: str


class PeerAnswer(msgspec.Struct, frozen=True):
    """psleak's answer, from its own process."""

    leak: bool
    calls: int


def compared(quick: bool) -> list[Compared]:
    """Run both tools on the same library, in turn; nothing without psleak (extra dev)."""
    if importlib.util.find_spec("psleak") is None:
        return []
    version = importlib.metadata.version("psleak")
    return [
        _case(*case, runs=1 if quick else RUNS, limit_s=QUICK_LIMIT_S if quick else LIMIT_S, version=version)
        for case in (CASES[1:2] if quick else CASES)
    ]


def _case(name: str, engine: str, leaks: bool, *, runs: int, limit_s: float, version: str) -> Compared:
    wanted = LeakVerdict.LEAK if leaks else LeakVerdict.CLEAN
    ours = [run(Probe(f"{engine},seed={seed}", "none", stacks=False)) for seed in range(runs)]
    began = time.monotonic()
    theirs = [_ask(f"{engine},seed={seed}", limit_s) for seed in range(runs)]
    return Compared(
        name=name,
        runs=runs,
        prill_right=sum(report.verdict is wanted for report in ours),
        prill_calls=max(report.calls for report in ours),
        prill_s=round(sum(report.duration_s for report in ours), 1),
        psleak_right=sum(answer is not None and answer.leak is leaks for answer in theirs),
        psleak_calls=max((answer.calls for answer in theirs if answer), default=0),
        psleak_s=round(time.monotonic() - began, 1),
        psleak_late=sum(answer is None for answer in theirs),
        version=version,
    )


def _ask(engine: str, limit_s: float) -> PeerAnswer | None:
    """psleak's verdict; None if it reaches none within the limit."""
    words = [*python(__spec__.name), engine]
    environment = cells.environment(2) | {"PYTHONMALLOC": "malloc"}  # psleak requires it
    try:
        done = subprocess.run(words, capture_output=True, timeout=limit_s, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        lines = done.stderr.decode("utf-8", "backslashreplace").strip().splitlines() or ["no output"]
        raise UsageError("psleak could not be asked", where=engine, got=lines[-1])
    return msgspec.json.decode(done.stdout.strip().splitlines()[-1], type=PeerAnswer)


def main(arguments: Sequence[str]) -> int:
    """`peer ENGINE`: run psleak with its defaults on successful requests of a control engine."""
    import psleak

    from prill_harness.leaks.controls import host as controls

    engine = controls.ControlEngine.open(arguments[0].removeprefix("control:"), "none")
    ids, calls, leak = list(range(1, 13)), 0, False

    def request() -> None:
        nonlocal calls
        calls += 1
        engine.generate(ids, max_tokens=8)

    class PsleakCase(psleak.MemoryLeakTestCase):  # type: ignore[misc]
        def runTest(self) -> Any:  # noqa: N802
            self.execute(request)

    request()  # so that threads started by the first request exist
    try:
        PsleakCase().runTest()
    except psleak.Error:
        leak = True
    sys.stdout.write(msgspec.json.encode(PeerAnswer(leak, calls)).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
