"""One allocation of device memory per model, divided by purpose, every byte of it accounted for."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping
from threading import RLock

from prill_runtime.device.machine.base import Device, Pointer
from prill_runtime.errors import EngineError, InvalidParameter, PrillError

PURPOSES = ("weights", "cache", "activations", "scratch", "logits")
ALIGNMENT = 256
GUARD_BYTES = 256
"""Bytes left unused after every allocation, so that an overrun does not reach the next one."""


class OutOfDeviceMemory(EngineError):
    """More device memory was asked for than the budget, the device or the arena has."""

    noun = "out of device memory"


class NotResident(EngineError):
    """A pointer the engine computes from is not device memory."""

    noun = "not in device memory"


def padded(nbytes: int, rows: int = 1) -> int:
    """Bytes that an allocation of this size takes up in an arena, guard included.

    An allocation of rows is padded row by row. If all allocations of a step are, their addresses scale with
    the number of rows, so memory that suffices for n rows suffices for fewer.
    """
    each = -(-nbytes // max(1, rows))
    return (-(-each // ALIGNMENT) * ALIGNMENT + GUARD_BYTES) * max(1, rows)


def shown(nbytes: int) -> str:
    """Bytes as a person reads them: `1.5 GiB`."""
    return f"{nbytes} bytes" if nbytes < 1 << 20 else f"{nbytes / 2**20:.1f} MiB"


def parse_size(text: str) -> int:
    """Bytes of `2GiB`, `500MiB`, `64KiB` or a plain number.

    Raises:
        InvalidParameter: something else.
    """
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("", 1)):
        number = text.removesuffix(unit)
        if text.endswith(unit) and number.replace(".", "", 1).isdecimal():
            return int(float(number) * factor)
    raise InvalidParameter(
        "not a size", where="budget", expected="a number with GiB, MiB or KiB", got=repr(text)
    )


class Region:
    """The part of the arena for one purpose: first fit; adjacent gaps are joined on free.

    Attributes:
        held: bytes allocated and not freed.
    """

    def __init__(self, purpose: str, base: Pointer, size: int) -> None:
        self.purpose, self.base, self.size = purpose, base, size
        self.held = self._front = self._back = 0
        self._free: list[tuple[Pointer, Pointer]] = [(base, base + size)] if size else []
        self._live: dict[Pointer, tuple[int, int]] = {}  # bytes asked for, bytes taken

    def alloc(self, nbytes: int, rows: int = 1, passing: bool = False) -> Pointer:
        """Allocate.

        Args:
            rows: pad for so many rows. passing: scratch memory of a single op, taken from the end of the
                region, so that it does not fragment the space of allocations that stay.

        Raises:
            OutOfDeviceMemory: no gap is long enough.
        """
        need = padded(nbytes, rows)
        found = [at for at, (low, high) in enumerate(self._free) if high - low >= need]
        if not found:
            raise OutOfDeviceMemory(
                f"{self.purpose} do not fit into the arena",
                expected=f"at most {shown(max(0, self.gap - GUARD_BYTES))} in one piece",
                got=f"{shown(nbytes)} besides {shown(self.held)} in {self.live} allocations",
                hint="say what was run, with the model's sizes: the plan of the arena is too small for it",
            )
        at = found[-1 if passing else 0]
        low, high = self._free[at]
        pointer, rest = (high - need, (low, high - need)) if passing else (low, (low + need, high))
        self._free[at : at + 1] = [rest] if high - low > need else []
        self._live[pointer] = nbytes, need
        self.held += nbytes
        if passing:
            self._back = max(self._back, self.base + self.size - pointer)
        else:
            self._front = max(self._front, pointer + need - self.base)
        return pointer

    def free(self, pointer: Pointer) -> None:
        nbytes, need = self._live.pop(pointer)
        self.held -= nbytes
        insort(self._free, (pointer, pointer + need))
        joined: list[tuple[Pointer, Pointer]] = []
        for low, high in self._free:
            if joined and joined[-1][1] == low:
                joined[-1] = joined[-1][0], high
            else:
                joined.append((low, high))
        self._free = joined

    def owns(self, pointer: Pointer) -> bool:
        return pointer in self._live

    @property
    def live(self) -> int:
        """Allocations not freed."""
        return len(self._live)

    @property
    def gap(self) -> int:
        """Bytes of the longest gap."""
        return max((high - low for low, high in self._free), default=0)

    @property
    def peak(self) -> int:
        """Bytes that have been enough so far, padding and gaps included."""
        return self._front + self._back


class Arena:
    """One allocation for a whole model, divided by purpose; nothing is allocated on the device after it.

    Args:
        sizes: bytes of each purpose, allocations padded (`padded`).
        budget: most bytes in all, None: no limit. model: whose memory it is, for the error.

    Raises:
        OutOfDeviceMemory: before anything is allocated: over the budget, or over what the device has free.
    """

    def __init__(self, device: Device, sizes: Mapping[str, int], budget: int | None, model: str) -> None:
        unknown = set(sizes) - set(PURPOSES)
        if unknown:
            raise PrillError("unknown purpose of device memory", expected=PURPOSES, got=sorted(unknown))
        sizes = {purpose: -(-size // ALIGNMENT) * ALIGNMENT for purpose, size in sizes.items()}
        self.device, self.size = device, sum(sizes.values())
        free, _ = device.memory()
        available = free if budget is None else min(free, budget)
        if self.size > available:
            parts = ", ".join(f"{purpose} {shown(size)}" for purpose, size in sizes.items() if size)
            limit = "the budget" if budget is not None and budget <= free else "free on the device"
            raise OutOfDeviceMemory(
                f"{model} does not fit on {device.spec}",
                expected=f"at most {shown(available)}, {limit}",
                got=f"{shown(self.size)} needed ({parts})",
                hint="raise the budget, shorten the cache, or take a smaller model",
            )
        self._lock = RLock()  # any thread may open a cache, or drop the last reference to memory
        self._base: Pointer | None = device.alloc(max(self.size, ALIGNMENT))
        at, self.regions = self._base, {}
        for purpose in PURPOSES:
            self.regions[purpose] = Region(purpose, at, sizes.get(purpose, 0))
            at += sizes.get(purpose, 0)

    def alloc(self, purpose: str, nbytes: int, rows: int = 1, passing: bool = False) -> Pointer:
        """Allocate for one purpose, as `Region.alloc`.

        Raises:
            OutOfDeviceMemory: the purpose's part of the arena is used up.
        """
        with self._lock:
            pointer = self.regions[purpose].alloc(nbytes, rows, passing)
        self.device.freshen(pointer, nbytes)
        return pointer

    def free(self, pointer: Pointer) -> None:
        """Free an allocation.

        Raises:
            InvalidParameter: no allocation of this arena, or freed before.
        """
        with self._lock:
            for region in self.regions.values():
                if region.owns(pointer):
                    region.free(pointer)
                    return
        raise InvalidParameter("freeing an unknown pointer", where="arena", got=hex(pointer))

    def ledger(self) -> dict[str, int]:
        """Bytes held now, by purpose."""
        return {purpose: region.held for purpose, region in self.regions.items()}

    def blocks(self) -> dict[Pointer, int]:
        """Address and bytes of the device memory that the arena holds; nothing once it is closed."""
        return {} if self._base is None else {self._base: max(self.size, ALIGNMENT)}

    def require_resident(self, pointers: Iterable[Pointer]) -> int:
        """Check that every pointer is device memory, as nothing else is allowed; how many were checked.

        Raises:
            NotResident: host or managed memory, or a pointer the driver does not know.
        """
        count = 0
        for pointer in pointers:
            found = self.device.attributes(pointer)["memory"]
            if found != "device":
                raise NotResident("wrong memory", where=hex(pointer), expected="device", got=found)
            count += 1
        return count

    def close(self) -> None:
        """Free all of it; calling it twice is harmless."""
        base, self._base = self._base, None
        if base is not None:
            self.device.free(base)
