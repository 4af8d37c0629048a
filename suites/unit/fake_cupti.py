"""A fake of CUPTI's Python module: names, numbers and record fields of cupti-python 13.0.1, and no driver.

It plays back what it is told was allocated and released, when it is flushed. Nothing was recorded on a GPU.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


class ActivityKind(enum.IntEnum):
    MEMCPY = 1
    MEMORY = 45
    MEMORY2 = 49
    MEMORY_POOL = 50


class ActivityMemoryKind(enum.IntEnum):
    UNKNOWN = 0
    PAGEABLE = 1
    PINNED = 2
    DEVICE = 3
    ARRAY = 4
    MANAGED = 5
    DEVICE_STATIC = 6
    MANAGED_STATIC = 7


class ActivityMemoryOperationType(enum.IntEnum):
    INVALID = 0
    ALLOCATION = 1
    RELEASE = 2


@dataclass
class ActivityMemory4:
    """A record as the callback gets it: its enumerations are plain integers."""

    address: int
    bytes: int
    memory_kind: int
    memory_operation_type: int
    kind: int = 49
    device_id: int = 0
    context_id: int = 1


class FakeCupti:
    """The module `cupti.cupti`."""

    ActivityKind: ClassVar = ActivityKind
    ActivityMemoryKind: ClassVar = ActivityMemoryKind
    ActivityMemoryOperationType: ClassVar = ActivityMemoryOperationType

    def __init__(self) -> None:
        self.enabled: set[int] = set()
        self.waiting: list[ActivityMemory4] = []
        self.buffer: tuple[int, int] = (0, -1)
        self._requested: Callable[[], tuple[int, int]] | None = None
        self._completed: Callable[[Sequence[Any]], None] | None = None

    def activity_register_callbacks(self, func_buffer_requested: Any, func_buffer_completed: Any) -> None:
        self._requested, self._completed = func_buffer_requested, func_buffer_completed

    def activity_enable(self, kind: int) -> None:
        self.enabled.add(kind)

    def activity_disable(self, kind: int) -> None:
        self.enabled.discard(kind)

    def activity_flush_all(self, flag: int) -> None:
        assert flag in (0, 1)
        waiting, self.waiting = self.waiting, []
        if waiting:
            assert self._requested is not None
            assert self._completed is not None
            self.buffer = self._requested()
            self._completed(waiting)

    def allocated(self, address: int, size: int, kind: str = "DEVICE") -> None:
        """The driver allocated."""
        self._record(address, size, kind, ActivityMemoryOperationType.ALLOCATION)

    def released(self, address: int, size: int, kind: str = "DEVICE") -> None:
        """The driver released."""
        self._record(address, size, kind, ActivityMemoryOperationType.RELEASE)

    def _record(self, address: int, size: int, kind: str, operation: int) -> None:
        if int(ActivityKind.MEMORY2) in self.enabled:
            where = int(ActivityMemoryKind[kind])
            self.waiting.append(ActivityMemory4(address, size, where, int(operation)))
