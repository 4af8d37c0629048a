"""Run one path of a probe under memray, and find the call sites that left blocks behind."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from prill_harness.leaks.ledgers.ledgers import PLANT_EVERY
from prill_harness.leaks.probed import paths
from prill_harness.leaks.probed.protocol import LeakSites, Message, Refused
from prill_harness.leaks.reports.report import Probe, Site
from prill_runtime.errors import PrillError

SHOWN_SITES = 12
LEAST_BYTES = 16  # per call, of a single block that grows
SHOWN_FRAMES = 12  # of each site
# The engine's own frames end at these files.
OWN_FRAMES = ("probed/tracer.py", "probed/paths.py", "memray/", "<frozen", "runpy")
INTERPRETER = ("Objects/", "Python/", "Modules/", "Include/", "<unknown>", "sysdeps/", "malloc/", "malloc.c")


def traced(probe: Probe) -> tuple[Site, ...]:
    """Call the path under memray after a warm-up; the sites that left the most, those of every call first.

    Raises:
        PrillError: the engine cannot be opened, or does not offer the path.
    """
    import memray

    found: tuple[Site, ...] = ()

    if probe.engine.startswith("control:"):
        from prill_harness.leaks.controls import host as controls  # noqa: F401
    path = paths.Path.registry[probe.path](probe)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.bin"
        try:
            for number in range(1, probe.warmup + 1):
                path.call(number, path.ids)
            gc.collect()
            with memray.Tracker(file, native_traces=True):
                for number in range(1, probe.measured + 1):
                    path.call(number, path.ids)
                gc.collect()
            with memray.FileReader(file) as reader:
                records = list(reader.get_leaked_allocation_records(merge_threads=True))
                found = _sites(records, probe.measured)
        finally:
            path.close()
    return found


def _sites(records: Iterable[Any], calls: int) -> tuple[Site, ...]:
    """Sites that left at least as many blocks as a leak in every 8th call, or bytes in each; most first."""
    least = calls // PLANT_EVERY
    left = [r for r in records if r.n_allocations >= least or r.size >= calls * LEAST_BYTES]
    left.sort(key=lambda r: r.size, reverse=True)
    found = []
    for record in left:
        stack = _stack(record)
        if stack:
            found.append(Site(stack[0], stack, record.size / calls, record.n_allocations / calls))
        if len(found) == SHOWN_SITES:
            break
    return tuple(found)


def _stack(record: Any) -> tuple[str, ...]:
    """Frames as `function (file:line)` from the engine's innermost one outwards; empty if it has none."""
    try:
        raw = record.hybrid_stack_trace()
    except NotImplementedError:
        raw = record.stack_trace()
    frames = list(itertools.takewhile(lambda frame: not any(own in frame[1] for own in OWN_FRAMES), raw))
    inner = itertools.dropwhile(lambda frame: any(part in frame[1] for part in INTERPRETER), frames)
    return tuple(f"{function} ({Path(file).name}:{line})" for function, file, line in inner)[:SHOWN_FRAMES]


def main(arguments: Sequence[str]) -> int:
    """`tracer PROBE WRITE READ`: trace one path and write the result to the descriptor WRITE."""
    probe = msgspec.json.decode(arguments[0], type=Probe)

    def tell(message: Message) -> None:
        with os.fdopen(int(arguments[1]), "wb") as channel:
            channel.write(msgspec.json.encode(message) + b"\n")

    from prill_harness.engines.spec import EngineSpec
    from prill_harness.faults.catalogue import named
    from prill_harness.planting import faults

    try:
        planted = EngineSpec.parse(probe.engine).faults
        if planted:
            faults.ambient(named(planted))
        tell(LeakSites(traced(probe)))
    except PrillError as error:
        tell(Refused(str(error), True))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
