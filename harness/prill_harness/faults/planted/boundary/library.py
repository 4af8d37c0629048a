"""Faults of a C library: each switches on one defect of the example engine, wherever it is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ONE, around

VARIABLE = "PRILL_ENGINE_DEFECT"
ENVIRONMENT = "prill_harness.engines.others.capi.played:environment"
DEFECTS = {
    "version_wrong": "the library was built with another version of the header",
    "device_unchecked": "a device that the machine does not have is accepted",
    "null_handle_crashes": "the handle 0 is dereferenced",
    "null_buffer_crashes": "a null pointer to write to is dereferenced",
    "handle_dereferenced": "a handle that was never given is taken for an address",
    "handle_unchecked": "a handle that was freed still leads to its memory",
    "children_survive": "the sessions of a freed model go on with its weights",
    "zero_length_crashes": "a call without ids crashes",
    "positions_wrap": "the number of positions is cut to 16 bits",
    "room_unchecked": "more logits are written than the buffer holds",
    "buffer_overruns": "one logit is written behind the last one",
    "error_overruns": "a sentence that does not fit is written nevertheless",
    "id_unchecked": "ids outside the vocabulary are looked up",
    "context_unchecked": "a full cache is written past its end",
    "error_unknown": "every failure is of the kind unknown",
    "sampling_unchecked": "parameters of sampling are not looked at",
    "thread_bound": "only the thread that made the context can use it",
    "error_shared": "threads share the sentence of the last error",
    "busy_unchecked": "two calls work with one session at once",
    "cancel_ignored": "a session does not look whether it was cancelled",
    "cancel_sticks": "a cancelled session stays cancelled",
    "cancel_leaves_ids": "a cancelled call leaves the ids that it had appended",
    "error_silent": "a failure has no sentence",
    "error_sticks": "the call after an error fails too",
    "memory_unspoken": "out of memory says neither what was needed nor what was available",
    "truncation_unchecked": "a tensor behind the end of the file is read",
    "allocation_unchecked": "an allocation is expected to succeed",
    "failed_load_kept": "a load that fails keeps what it had read",
    "cache_kept": "a freed session keeps its cache",
    "memory_constant": "the memory that is reported never falls",
    "prints": "the library writes on the standard output",
    "rope_halves": "rotary pairs are half a head apart",
}
"""Defect of the example engine -> what is wrong."""


def planted(defect: str, summary: str) -> None:
    """Register the fault of a defect."""

    def patches() -> Iterator[Patch]:
        yield around(ENVIRONMENT, lambda inherited: {**inherited(), VARIABLE: defect})

    patches.__name__, patches.__doc__ = f"library_{defect}", f"{summary[0].upper()}{summary[1:]}."
    fault(area="boundary", blames=("boundary",), models=ONE)(patches)


for name, words in DEFECTS.items():
    planted(name, words)
