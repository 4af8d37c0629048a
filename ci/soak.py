"""Send an engine many requests and load it many times, and see whether memory is left behind.

    python ci/soak.py --engine cuda --model fixture:llama-tiny --requests 1000 --cycles 50

Prints a JSON line for each part. Requests are of every kind: greedy, sampled, long, stopped, cancelled,
refused. What an engine counts itself must be back at its idle value to the byte; what the system counts
(this process, the GPU's used memory) moves in steps, so it is suspected only if it grew in each of five
windows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from prill_harness.engines.base import Engine
from prill_harness.engines.embedded import anonymous_bytes
from prill_harness.faults.opening import open_engine
from prill_runtime.errors import PrillError

WINDOWS = 5
WARM = 24  # least requests before the first reading; a fifth of all if that is more
SYSTEM = ("process", "gpu")  # ledgers that others write to as well
Reading = Mapping[str, int]


def judge(readings: Sequence[Reading]) -> list[str]:
    """One clause for everything that was not given back; the first reading is the idle state.

    Args:
        readings: idle states, WINDOWS + 1 of them, evenly spaced.
    """
    first, last = readings[0], readings[-1]
    problems = []
    for name in sorted(set(first) | set(last)):
        values = [reading.get(name, 0) for reading in readings]
        growth = values[-1] - values[0]
        if name in SYSTEM:
            grew = all(later > earlier for earlier, later in pairwise(values))
            if grew and len(values) > WINDOWS:
                problems.append(f"{name} grew in all {len(values) - 1} windows, by {growth:,} bytes")
        elif growth:
            problems.append(f"{name} is {growth:+,} bytes off its idle {values[0]:,}")
    return problems


def request(engine: Engine, number: int) -> str:
    """Make one request, of the kind that `number` decides; returns how it ended."""
    config = engine.info.config
    vocabulary, context = int(config["vocab_size"]), int(config["context_length"])
    prompt = [(number * 7 + i * 13) % vocabulary for i in range(4 + number % 29)]
    sampled: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "seed": number}
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: engine.generate(prompt, max_tokens=8, ignore_eos=True),
        lambda: engine.generate(prompt, max_tokens=8, ignore_eos=True, **sampled),
        lambda: engine.generate((prompt * 99)[: min(300, context // 2)], max_tokens=4, ignore_eos=True),
        lambda: engine.generate(prompt, max_tokens=12, ignore_eos=True, on_token=_no),
        lambda: engine.generate(prompt, max_tokens=12, stop=("e",)),
        lambda: engine.generate([1] * (context + 1), max_tokens=1),
        lambda: engine.generate([*prompt, vocabulary], max_tokens=1),
        lambda: engine.generate_batch([prompt, prompt[:2]], max_tokens=4, ignore_eos=True),
    )
    kind = number % len(kinds)
    try:
        kinds[kind]()
    except PrillError:
        return "refused" if kind in (5, 6) else "failed"
    return "accepted" if kind in (5, 6) else "answered"


def requests(spec: str, model: str, count: int) -> dict[str, Any]:
    """Send `count` requests to one engine, and read its memory between windows.

    If the system's figures are suspicious, twice as many requests follow, once.
    """
    outcomes: Counter[str] = Counter()
    with open_engine(spec, model) as engine:
        for number in range(max(WARM, count // WINDOWS)):
            request(engine, number)
        for factor in (1, 2):
            readings = [reading(engine)]
            for window in range(WINDOWS):
                low, high = (factor * at * count // WINDOWS for at in (window, window + 1))
                outcomes.update(request(engine, number) for number in range(low, high))
                readings.append(reading(engine))
            problems = judge(readings)
            if not problems or not all(problem.startswith(SYSTEM) for problem in problems):
                break
    wrong = {kind: n for kind, n in outcomes.items() if kind not in ("answered", "refused")}
    if wrong:
        problems.append(f"requests that {wrong}")
    what = f"{outcomes['answered']} answers, {outcomes['refused']} refusals"
    return told("requests", what, problems, readings)


def cycles(spec: str, model: str, count: int) -> dict[str, Any]:
    """Open, use and close the engine `count` times, and read the system's memory between windows.

    If its figures are suspicious, twice as many cycles follow, once.
    """
    held: Counter[str] = Counter()
    for _ in range(max(2, count // 10)):
        _cycle(spec, model)
    for factor in (1, 2):
        readings: list[Reading] = [system()]
        for number in range(1, factor * count + 1):
            held.update(_cycle(spec, model))
            if number * WINDOWS // (factor * count) >= len(readings):
                readings.append(system())
        problems = judge(readings)
        if not problems:
            break
    if held:
        problems.append(f"closed engines still count {dict(held)}")
    return told("cycles", f"{number} loads and unloads", problems, readings)


def _cycle(spec: str, model: str) -> Reading:
    """Open, use and close the engine; what it still counts when closed."""
    with open_engine(spec, model) as engine:
        engine.generate([1, 2, 3], max_tokens=2, ignore_eos=True)
    return {name: value for name, value in own_memory(engine).items() if value}


def told(name: str, what: str, problems: Sequence[str], readings: Sequence[Reading]) -> dict[str, Any]:
    """The result as one line: failed with every problem; inconclusive if nothing was counted."""
    own = ", ".join(ledger for ledger in readings[0] if ledger not in SYSTEM)
    others = ", ".join(ledger for ledger in readings[0] if ledger in SYSTEM)
    if problems:
        status, says = "failed", "; ".join(problems)
    elif not any(readings[0].values()):
        status, says = "inconclusive", "no memory was counted"
    elif len(readings) <= WINDOWS:
        status, says = "inconclusive", f"{len(readings) - 1} windows decide nothing, {WINDOWS} do"
    else:
        own = f"{own} idle to the byte; " if own else ""
        status, says = "passed", f"{own}{others} without steady growth"
    figures = {"readings": [dict(reading) for reading in readings]}
    return {"name": name, "status": status, "sentence": f"{what}: {says}", "figures": figures}


def reading(engine: Engine) -> Reading:
    """What the engine and the system count now."""
    return {**own_memory(engine), **system()}


def own_memory(engine: Engine) -> Reading:
    """The engine's ledgers; empty if it has none, or reports none once closed."""
    try:
        return {name: int(value) for name, value in engine.memory().items() if name != "process"}
    except PrillError:
        return {}


def system() -> Reading:
    """Memory of this process, and of the GPU if there is one."""
    tool = shutil.which("nvidia-smi")
    found = {"process": anonymous_bytes()}
    if tool:
        query = [tool, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout.split()
        if said and said[0].isdecimal():
            found["gpu"] = int(said[0]) << 20
    return found


def _no(token: int, logprob: float) -> bool:
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both parts; the exit code, 1 if one failed."""
    parser = argparse.ArgumentParser(prog="soak.py", description=__doc__)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--cycles", type=int, default=50)
    asked = parser.parse_args(arguments)
    failed = False
    for part, count in ((requests, asked.requests), (cycles, asked.cycles)):
        if count:
            line = part(asked.engine, asked.model, count)
            print(json.dumps(line), flush=True)
            failed |= line["status"] == "failed"
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
