"""Ledgers of a GPU's device, pinned and managed memory, exact to the byte, from CUPTI's records.

Attach before the engine creates its context, and read no host ledger in the same process: CUPTI allocates
host memory at every call. The driver's own figure moves in steps of 2 MiB; what it holds beyond the records
is judged like resident memory.
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from prill_harness.leaks.ledgers.ledgers import PLANT_BYTES, LeakLedger, Series
from prill_harness.leaks.reports.verdict import Rule
from prill_runtime.errors import Inconclusive

KINDS = {"device": ("DEVICE", "ARRAY"), "pinned": ("PINNED",), "managed": ("MANAGED",)}
STATIC = "static"  # variables of modules; they count in the device's ledger
STATICS = ("DEVICE_STATIC", "MANAGED_STATIC")
BUFFER_BYTES = 8 << 20
HINT = "pip install 'prill[cuda]' on a machine with an NVIDIA driver"


class Records:
    """What CUPTI has reported so far: every live block by address.

    A module's variables are recorded when it is loaded but not when it is unloaded; loaded to the same
    address again, they are the same block.

    Attributes:
        blocks: kind -> address -> bytes; "static" is a kind of its own.
        unknown: releases of blocks whose allocation was not recorded.

    Raises:
        Inconclusive: no CUPTI, or it fails.
    """

    def __init__(self) -> None:
        self.blocks: dict[str, dict[int, int]] = {kind: {} for kind in (*KINDS, STATIC)}
        self.unknown = 0
        try:
            self._cupti: Any = import_module("cupti.cupti")  # the package does not import the module itself
            kinds, operations = self._cupti.ActivityMemoryKind, self._cupti.ActivityMemoryOperationType
            named = (KINDS | {STATIC: STATICS}).items()
            self._kind = {int(getattr(kinds, name)): kind for kind, names in named for name in names}
            self._taken, self._given = int(operations.ALLOCATION), int(operations.RELEASE)
            self._wanted = int(self._cupti.ActivityKind.MEMORY2)
            self._cupti.activity_register_callbacks(lambda: (BUFFER_BYTES, 0), self._completed)
            self._cupti.activity_enable(self._wanted)
            atexit.register(self.close)  # a record delivered after Python has shut down kills the process
        except Exception as error:  # of the loader, CUPTI or the driver: they all mean the same here
            told = f"{type(error).__name__}: {error}"
            raise Inconclusive("the device ledger is not attached", got=told, hint=HINT) from error

    def close(self) -> None:
        """Stop recording; records made until now are still collected."""
        with contextlib.suppress(Exception):  # at exit the driver may be gone already
            self._cupti.activity_disable(self._wanted)
            self._cupti.activity_flush_all(1)

    def _completed(self, activities: Sequence[Any]) -> None:
        for activity in activities:
            kind = self._kind.get(int(getattr(activity, "memory_kind", 0)))
            if int(activity.kind) != self._wanted or kind is None:
                continue
            known, operation = self.blocks[kind], int(activity.memory_operation_type)
            if operation == self._taken:
                known[int(activity.address)] = int(activity.bytes)
            elif operation == self._given and known.pop(int(activity.address), None) is None:
                self.unknown += 1

    def now(self) -> dict[str, dict[int, int]]:
        """Kind -> address -> bytes of every live block."""
        self._cupti.activity_flush_all(1)
        return {kind: dict(found) for kind, found in self.blocks.items()}

    def read(self) -> Mapping[str, Sequence[int]]:
        """Kind -> live blocks and bytes; modules' variables count as device memory."""
        live = {kind: [len(found), sum(found.values())] for kind, found in self.now().items()}
        blocks, held = live.pop(STATIC)
        live["device"] = [live["device"][0] + blocks, live["device"][1] + held]
        return live


class Driver:
    """The driver API on one device, whose primary context is current only inside calls.

    Raises:
        Inconclusive: no driver, no such device, or a call that fails.
    """

    def __init__(self, ordinal: int) -> None:
        try:
            self._cuda: Any = import_module("cuda.bindings.driver")
        except ImportError as error:
            raise Inconclusive("the device ledger is not attached", got=str(error), hint=HINT) from error
        self.call("cuInit", 0)
        self._device = self.call("cuDeviceGet", ordinal)
        self._context = self.call("cuDevicePrimaryCtxRetain", self._device)

    def call(self, name: str, *arguments: Any) -> Any:
        """The result of a driver call (None, one value or a tuple)."""
        code, *results = getattr(self._cuda, name)(*arguments)
        if int(code):
            raise Inconclusive(f"{name} failed", where="the CUDA driver", got=str(code))
        return results[0] if len(results) == 1 else tuple(results) or None

    def inside(self, name: str, *arguments: Any) -> Any:
        """As `call`, with the primary context current."""
        self.call("cuCtxPushCurrent", self._context)
        try:
            return self.call(name, *arguments)
        finally:
            self.call("cuCtxPopCurrent")

    @property
    def api(self) -> Any:
        """The bindings module."""
        return self._cuda

    def used(self) -> int:
        """Bytes of the device in use by any process."""
        free, total = self.inside("cuMemGetInfo")
        return int(total) - int(free)


TAKE = {"device": "cuMemAlloc", "pinned": "cuMemAllocHost", "managed": "cuMemAllocManaged"}
GIVE = {"device": "cuMemFree", "pinned": "cuMemFreeHost", "managed": "cuMemFree"}


def take(driver: Driver, kind: str, size: int) -> Any:
    """Allocate a block of this kind."""
    attach = driver.api.CUmemAttach_flags.CU_MEM_ATTACH_GLOBAL if kind == "managed" else None
    more = () if attach is None else (int(attach),)
    return driver.inside(TAKE[kind], size, *more)


class DeviceLedger(LeakLedger):
    """Blocks and bytes of one kind; for device memory also what the driver holds beyond them."""

    def __init__(self, kind: str, records: Records, driver: Driver) -> None:
        self._kind, self._records, self._driver = kind, records, driver
        self._planted: list[Any] = []
        self.series = (
            Series(kind, "blocks", "blocks", Rule.EXACT),
            Series(kind, "bytes", "B", Rule.EXACT),
            *((Series(kind, "unattributed", "B", Rule.RESIDENT),) if kind == "device" else ()),
        )

    def read(self) -> Sequence[int]:
        live = self._records.read()
        blocks, held = live[self._kind]
        if self._kind != "device":
            return blocks, held
        return blocks, held, self._driver.used() - held - live["managed"][1]

    def plant(self) -> Mapping[str, int]:
        """Plant 16 bytes; if the records round a block up, the rounded size must show."""
        blocks, held = self._records.read()[self._kind]
        self._planted.append(take(self._driver, self._kind, PLANT_BYTES))
        now = self._records.read()[self._kind]
        return {"blocks": 1, "bytes": now[1] - held if now[0] == blocks + 1 else PLANT_BYTES}

    def unplant(self) -> None:
        while self._planted:
            self._driver.inside(GIVE[self._kind], self._planted.pop())


def attached(ordinal: int) -> list[DeviceLedger]:
    """The ledgers of one GPU.

    Raises:
        Inconclusive: no CUPTI or no driver.
    """
    records = Records()
    driver = Driver(ordinal)
    return [DeviceLedger(kind, records, driver) for kind in KINDS]
