"""Small bugs of the harness that judges, and leaks of the engine that is probed: for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec

from prill_harness.engines.embedded import NumPy, NumPy64
from prill_harness.leaks.judge import probe as leaks
from prill_harness.leaks.reports.report import PathReport, Probe
from prill_harness.numbers import compare, lanes
from prill_harness.run import cells
from prill_harness.tokens import sides

from .planted import FAULTS, Patch, breaks, wrap

__all__ = ["FAULTS"]  # those of `planted` and these
Probing = Callable[[Probe], PathReport]


@breaks("harness.oracle")
def oracle_in_single_precision(patch: Patch) -> None:
    patch.setattr(NumPy64, "dtype", "float32")


@breaks("harness.golden")
def stale_golden_unnoticed(patch: Patch) -> None:
    patch.setattr(sides, "check_stale", lambda *given: None)


@breaks("harness.comparisons")
def expected_is_actual(patch: Patch) -> None:
    wrap(patch, compare, "pair", lambda o, a, b: (o(a, b)[1], o(a, b)[1]))


@breaks("harness.bounds")
def bounds_widened(patch: Patch) -> None:
    wrap(patch, lanes, "bounds", lambda o, lane, floor: o(replace(lane, ratio=10 * lane.ratio), floor))


@breaks("harness.records")
def probes_not_run(patch: Patch) -> None:
    wrap(patch, cells, "arguments", lambda o, *given: [*o(*given), "--check", "probes.sound"])


def probed(patch: Patch, changed: Callable[[str], str]) -> None:
    """Probe another engine than was asked for: no patch here reaches the process that is probed."""
    original: Probing = leaks.run
    patch.setattr(
        leaks, "run", lambda wanted: original(msgspec.structs.replace(wanted, engine=changed(wanted.engine)))
    )


@breaks("memory.success")
def request_leaks(patch: Patch) -> None:
    probed(patch, lambda engine: f"{engine}+fault:leak_every_eighth")


@breaks("memory.error")
def refusal_leaks(patch: Patch) -> None:
    probed(patch, lambda engine: f"{engine}+fault:leak_on_error")


@breaks("memory.cancel")
def cancelled_request_leaks(patch: Patch) -> None:
    probed(patch, lambda engine: f"{engine}+fault:leak_on_cancel")


@breaks("memory.load")
def unload_leaks(patch: Patch) -> None:
    probed(patch, lambda engine: f"{engine}+fault:leak_on_unload")


@breaks("memory.session")
def closed_session_kept(patch: Patch) -> None:
    probed(patch, lambda engine: f"{engine}+fault:session_cache_kept")


@breaks("memory.concurrent")
def concurrent_requests_leak(patch: Patch) -> None:
    probed(patch, lambda engine: f"{engine}+fault:leak_when_concurrent")


@breaks("memory.counters")
def reported_memory_constant(patch: Patch) -> None:
    wrap(patch, NumPy, "memory", lambda o, s: {"weights": 1 << 20, "cache": 0, "process": 1})


@breaks("memory.probe_sees")
def control_does_not_leak(patch: Patch) -> None:
    probed(patch, lambda engine: engine.replace("leak=block", "leak=none"))
