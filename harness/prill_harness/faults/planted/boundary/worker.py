"""Faults of an engine's process, planted in the example worker, and of how its end and errors are told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ONE, around
from prill_runtime.errors import EngineError, ProcessLost

COMMAND = "prill_harness.engines.others.capi.build:worker_command"
WORKER = "prill_harness.engines.channels.process:Worker"
BLAMES = ("boundary",)


def _started_with(defect: str) -> Patch:
    return around(COMMAND, lambda command: f"env PRILL_ENGINE_DEFECT={defect} {command()}")


@fault(area="boundary", blames=BLAMES, models=ONE)
def worker_dies_of_bad_ids() -> Iterator[Patch]:
    """A process dies of ids that no 32 bits hold."""
    yield _started_with("worker_dies_of_bad_ids")


@fault(area="boundary", blames=BLAMES, models=ONE)
def worker_looks_up_any_id() -> Iterator[Patch]:
    """A process looks up ids outside the vocabulary."""
    yield _started_with("id_unchecked")


@fault(area="boundary", blames=BLAMES, models=ONE)
def worker_reads_past_end() -> Iterator[Patch]:
    """A process reads tensors behind the end of the file."""
    yield _started_with("truncation_unchecked")


@fault(area="boundary", blames=BLAMES, models=ONE)
def death_unnamed() -> Iterator[Patch]:
    """The end of a process is told without the signal or the status."""

    def changed(original: Any, self: Any, call: str) -> ProcessLost:
        original(self, call)
        return ProcessLost("the process is over", where=call)

    yield around(f"{WORKER}._ended", changed)


@fault(area="boundary", blames=BLAMES, models=ONE)
def lost_worker_left() -> Iterator[Patch]:
    """A process that hangs is left running."""
    yield around(f"{WORKER}._broken", lambda o, self, call, what, *facts: ProcessLost(what, where=call))


@fault(area="boundary", blames=BLAMES, models=ONE)
def error_kinds_lost() -> Iterator[Patch]:
    """Every error of a process is told as a failure of the engine, of no kind."""
    made = "prill_harness.engines.channels.process:error_of"
    yield around(made, lambda original, said, where: EngineError(str(original(said, where)), where=where))
