"""Check an engine's ledger of device memory against CUPTI's records, to the byte.

    python ci/vram_ledger.py --engine cuda --model fixture:llama-tiny --cycles 3

CUPTI's records are attached before anything creates a context. A block of each kind is allocated and freed,
which the records must show. Then the engine is opened, used and closed once to warm up, and `--cycles` times
to be judged: at each moment CUPTI's live blocks of device memory must be the arena's, address by address and
byte by byte, with no pinned or managed block. Prints a JSON line for each moment.

It also says what is not compared: device blocks that were live before the first judged cycle (of the
context, and of what the driver loads on first use), static variables of modules, and what the driver holds
without a record.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from prill_harness.engines.base import Engine
from prill_harness.engines.spec import EngineSpec
from prill_harness.faults.opening import open_engine
from prill_harness.leaks.ledgers.device import GIVE, KINDS, STATIC, Driver, Records, take
from prill_runtime.device.memory.arena import Arena
from prill_runtime.errors import EngineError, Inconclusive, PrillError

MOMENTS = ("load", "request", "unload")
PROBE_BYTES = 12345  # of the blocks that the records must show; not round, so that rounding would show
PROMPT = (1, 2, 3, 4, 5)
Live = Mapping[str, Mapping[int, int]]


def arena_of(engine: Engine) -> Arena:
    """The engine's arena. Raises Inconclusive if it has none on a device."""
    try:
        arena = getattr(getattr(getattr(engine, "model", None), "backend", None), "arena", None)
    except EngineError:
        arena = None
    if not isinstance(arena, Arena):
        raise Inconclusive("the engine keeps no ledger of device memory", got=engine.info.name)
    return arena


def sees(records: Records, driver: Driver) -> None:
    """Raises Inconclusive if a new block is not in the records to the byte, or stays there once freed."""
    for kind in ("device", "pinned"):
        before = set(records.now()[kind])
        block = take(driver, kind, PROBE_BYTES)
        found = {at: size for at, size in records.now()[kind].items() if at not in before}
        driver.inside(GIVE[kind], block)
        left = set(records.now()[kind]) - before
        if found != {int(block): PROBE_BYTES} or left:
            raise Inconclusive(
                f"CUPTI does not show a block of {kind} memory", expected=f"{PROBE_BYTES} bytes, then none",
                got=f"{sorted(found.values())} bytes, then {len(left)} blocks",
            )  # fmt: skip


def differences(arena: Arena, live: Live, excluded: Live) -> list[str]:
    """One clause for every difference between ledger and records; none if they agree to the byte."""
    found = []
    for kind in KINDS:
        mine = arena.blocks() if kind == "device" else {}
        theirs = {at: size for at, size in live[kind].items() if at in mine or excluded[kind].get(at) != size}
        for at in sorted(set(mine) | set(theirs)):
            if mine.get(at) != theirs.get(at):
                says = [f"{size:,} bytes" if size else "nothing" for size in (mine.get(at), theirs.get(at))]
                found.append(f"{kind} memory at {at:#x}: the ledger has {says[0]}, CUPTI {says[1]}")
    parts = sum(region.size for region in arena.regions.values())
    if parts != arena.size:
        found.append(f"the purposes' parts are {parts:,} bytes, the arena {arena.size:,}")
    over = [p for p, held in arena.ledger().items() if held > arena.regions[p].size]
    if over:
        found.append(f"more is held than there is for {', '.join(over)}")
    return found


def moments(spec: str, model: str, cycles: int) -> Iterator[dict[str, Any]]:
    """Results of every moment of every cycle, as lines.

    Raises:
        Inconclusive: no CUPTI, no GPU, records that miss a block, or an engine without an arena.
    """
    records = Records()
    ordinal = EngineSpec.parse(spec).argument.split(",")[0]
    driver = Driver(int(ordinal) if ordinal.isdecimal() else 0)
    sees(records, driver)
    context = records.now()
    warm: list[int] = []
    for _ in cycle(spec, model, lambda name, arena: warm.extend(arena.blocks())):
        pass
    before = records.now()
    kept = sorted(set(warm) & set(before["device"]))
    device = {at: size for at, size in before["device"].items() if at not in warm}
    excluded = context | {"device": device}  # nothing needs to keep pinned or managed memory
    if kept:
        yield line("warm-up", [f"the arena at {kept[0]:#x} was not given back"], "")

    def judged(number: int, name: str, arena: Arena) -> dict[str, Any]:
        live = records.now()
        return line(
            f"cycle {number}: {name}", differences(arena, live, excluded),
            told(arena, live, excluded, driver.used()), figures(arena, live, driver.used()),
        )  # fmt: skip

    for number in range(1, cycles + 1):
        yield from cycle(spec, model, partial(judged, number))


def cycle(spec: str, model: str, look: Callable[[str, Arena], Any]) -> Iterator[Any]:
    """Open, use and close the engine; yields what `look` returns at each moment."""
    with open_engine(spec, model) as engine:
        arena = arena_of(engine)
        yield look("load", arena)
        engine.generate(PROMPT, max_tokens=8, ignore_eos=True)
        engine.logits(PROMPT)
        yield look("request", arena)
    yield look("unload", arena)


def told(arena: Arena, live: Live, excluded: Live, used: int) -> str:
    """A sentence on what agreed and what was not compared."""
    mine, held = sum(arena.blocks().values()), sum(arena.ledger().values()) if arena.blocks() else 0
    before = {kind: sum(excluded[kind].values()) for kind in KINDS}
    recorded = sum(sum(live[kind].values()) for kind in ("device", "managed", STATIC))
    return (
        f"{mine:,} bytes of device memory in {len(arena.blocks())} blocks of the ledger ({held:,} held), the "
        f"same in CUPTI's records; no pinned, no managed block. Not compared: "
        f"{', '.join(f'{size:,} bytes {kind}' for kind, size in before.items())} from before, "
        f"{sum(live[STATIC].values()):,} bytes static, {used - recorded:,} bytes of the device in use that "
        "have no record"
    )


def figures(arena: Arena, live: Live, used: int) -> dict[str, Any]:
    """Bytes by ledger, for the step's record."""
    cupti = {kind: {"blocks": len(found), "bytes": sum(found.values())} for kind, found in live.items()}
    return {
        "arena": sum(arena.blocks().values()),
        "held": arena.ledger(),
        "cupti": cupti,
        "driver used": used,
    }


def line(
    name: str, problems: list[str], otherwise: str, seen: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One result: failed with every problem, else passed."""
    status = "failed" if problems else "passed"
    return {
        "name": name,
        "status": status,
        "sentence": "; ".join(problems) or otherwise,
        "figures": seen or {},
    }


def main(arguments: list[str] | None = None) -> int:
    """Print a line for every moment; 0 if all agree, 1 if one differs, 10 if nothing could be compared."""
    parser = argparse.ArgumentParser(prog="vram_ledger.py", description=__doc__)
    parser.add_argument("--engine", default="cuda")
    parser.add_argument("--model", default="fixture:llama-tiny")
    parser.add_argument("--cycles", type=int, default=3)
    asked = parser.parse_args(arguments)
    statuses = set[str]()
    try:
        for result in moments(asked.engine, asked.model, asked.cycles):
            statuses.add(result["status"])
            print(json.dumps(result), flush=True)
    except PrillError as error:
        status = "inconclusive" if isinstance(error, Inconclusive) else "error"
        print(json.dumps({"name": "records", "status": status, "sentence": str(error)}), flush=True)
        return 10 if status == "inconclusive" else 1
    return int("failed" in statuses)


if __name__ == "__main__":
    sys.exit(main())
