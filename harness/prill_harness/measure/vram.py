"""Account for a device engine's memory at each moment, and find what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from prill_harness.engines.base import Engine
from prill_harness.engines.device import OnDevice
from prill_runtime.device.memory.arena import PURPOSES, shown
from prill_runtime.errors import Inconclusive

SESSIONS = 8
SESSION_POSITIONS = 64  # of each session, if the cache has so many
VALUE_BYTES = 4  # caches are float32
MOMENTS = ("loaded", "idle", "in use", "after")


class Account(msgspec.Struct, frozen=True):
    """Bytes of device memory.

    Attributes:
        planned: by purpose, for the model's lifetime. held: by moment and purpose; "idle" is after a first
            request, "in use" with `SESSIONS` sessions open, "after" once they are closed.
        file_bytes: of the file's tensors. position_bytes: of one position of a cache, by the formula.
        free, gap: unused bytes of the cache's region, all and in one piece, with every second session closed.
        wrong: one clause for each defect.
    """

    planned: Mapping[str, int]
    held: Mapping[str, Mapping[str, int]]
    file_bytes: int
    position_bytes: int
    positions: int
    free: int
    gap: int
    wrong: tuple[str, ...]


def account(engine: Engine, file_bytes: int) -> Account:
    """Load, a request, sessions side by side, every second closed, all closed.

    Raises:
        Inconclusive: the engine keeps no ledger of device memory.
    """
    if not isinstance(engine, OnDevice):
        raise Inconclusive(
            "no ledger of device memory", where=engine.info.name, expected="an engine on a device: emu, cuda"
        )
    planned = {name: int(size) for name, size in engine.model.plan.sizes.items()}
    held = {"loaded": _ledger(engine)}
    engine.generate([0], max_tokens=2)
    held["idle"] = _ledger(engine)
    each = position_bytes(engine.info.config)
    capacity = max(1, min(SESSION_POSITIONS, planned["cache"] // each // (2 * SESSIONS)))
    sessions = [engine.session(capacity) for _ in range(SESSIONS)]
    for session in sessions:
        session.feed([0])
    held["in use"] = _ledger(engine)
    for session in sessions[::2]:
        session.close()
    pool = engine.model.backend.arena.regions["cache"]
    free, gap = pool.size - pool.held, pool.gap
    for session in sessions[1::2]:
        session.close()
    held["after"] = _ledger(engine)
    wrong = _wrong(planned, held, each * capacity * SESSIONS, file_bytes)
    return Account(planned, held, file_bytes, each, capacity, free, gap, wrong)


def position_bytes(config: Mapping[str, int | float | str | bool]) -> int:
    """2 x layers x cache heads x head size x 4: keys and values of one position, in float32."""
    layers, heads, size = (int(config[name]) for name in ("n_layers", "n_kv_heads", "head_dim"))
    return 2 * layers * heads * size * VALUE_BYTES


def _ledger(engine: OnDevice) -> dict[str, int]:
    held = engine.memory()
    return {purpose: int(held.get(purpose, 0)) for purpose in PURPOSES}


def _wrong(
    planned: Mapping[str, int], held: Mapping[str, Mapping[str, int]], cache: int, file_bytes: int
) -> tuple[str, ...]:
    found = []
    if held["loaded"]["weights"] < file_bytes:
        found.append(
            f"weights: {shown(held['loaded']['weights'])} held, {shown(file_bytes)} in the file: not all of "
            "it was loaded"
        )
    for moment, by_purpose in held.items():
        found += [
            f"{purpose}: {shown(size)} held {moment}, {shown(planned[purpose])} planned"
            for purpose, size in by_purpose.items()
            if size > planned[purpose]
        ]
    taken = held["in use"]["cache"] - held["idle"]["cache"]
    if taken != cache:
        found.append(f"cache: {taken} bytes held for the sessions' positions, {cache} by the formula")
    found += [
        f"{purpose}: {size - held['idle'][purpose]:+d} bytes beside idle after all sessions were closed"
        for purpose, size in held["after"].items()
        if size != held["idle"][purpose]
    ]
    return tuple(found)
