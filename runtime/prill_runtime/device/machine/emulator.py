"""A device that runs the CUDA kernels, compiled for the host, thread by thread."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Mapping
from threading import Lock
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
from numpy.typing import DTypeLike, NDArray

from prill_runtime.device.machine import compile as kernels
from prill_runtime.device.machine.base import Device, Graph, Pointer, Shape
from prill_runtime.errors import EngineError, InvalidParameter

ORDER_VARIABLE = "PRILL_EMU_ORDER"
ALIGNMENT = 256
POISON = 0xFF  # a float32 of these bytes is NaN
FAILURES = {
    1: "not every thread reached the same barrier",
    2: "the launch shape does not suit the kernel",
    3: "a thread block wrote behind its dynamic shared memory",
}


class EmuGraph(Graph):
    """Recorded launches, run in order by a replay."""

    def __init__(self, device: EmuDevice, launches: list[tuple[str, Any, Any, bytes]]) -> None:
        self._device, self._launches = device, launches
        self.nodes = len(launches)

    def replay(self) -> None:
        for launch in self._launches:
            self._device.execute(*launch)

    def close(self) -> None:
        self._launches = []


class EmuDevice(Device):
    """A device in host memory of its own; a launch has finished when it returns.

    Memory is poisoned, so that a value that was never written reads as NaN: device memory when it is
    allocated, a thread block's shared memory and statics before it runs; local variables are -1.7e38. The
    sanitized build catches accesses outside the arena and outside the kernels' own arrays; inside the arena,
    guards lie between allocations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spec, self.name = "emu", "CPU emulator"
        self.target = kernels.emulator_target()
        self.reverse = os.environ.get(ORDER_VARIABLE) == "reverse"
        self.multiprocessors = 2
        self.launches = 0
        self._memory: dict[Pointer, NDArray[np.uint8]] = {}
        self._recorded: list[tuple[str, Any, Any, bytes]] = []
        self._lock = Lock()

    def alloc(self, nbytes: int) -> Pointer:
        self._outside_capture("allocation")
        try:
            memory = np.empty(nbytes + ALIGNMENT, np.uint8)
        except MemoryError:
            raise EngineError("not enough memory", where="emu", expected=f"{nbytes} bytes") from None
        pointer = -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT
        self._memory[pointer] = memory
        self.fill(pointer, nbytes, POISON)
        return pointer

    def free(self, pointer: Pointer) -> None:
        if self._memory.pop(pointer, None) is None:
            raise InvalidParameter("freeing an unknown pointer", where="emu", got=hex(pointer))

    def upload(self, pointer: Pointer, array: NDArray[Any]) -> None:
        self._outside_capture("an upload")
        self._check(pointer, array.nbytes)
        ctypes.memmove(pointer, np.ascontiguousarray(array).ctypes.data, array.nbytes)

    def download(self, pointer: Pointer, shape: Shape, dtype: DTypeLike) -> NDArray[Any]:
        self._outside_capture("a download")
        out = np.empty(shape, dtype)
        self._check(pointer, out.nbytes)
        ctypes.memmove(out.ctypes.data, pointer, out.nbytes)
        return out

    def mark(self) -> int:
        return 0

    def peek(self, pointer: Pointer, shape: Shape, dtype: DTypeLike, mark: int) -> NDArray[Any]:
        return self.download(pointer, shape, dtype)

    def fill(self, pointer: Pointer, nbytes: int, value: int = 0) -> None:
        self._check(pointer, nbytes)
        ctypes.memset(pointer, value, nbytes)

    def copy(self, target: Pointer, source: Pointer, nbytes: int) -> None:
        self._check(target, nbytes)
        self._check(source, nbytes)
        ctypes.memmove(target, source, nbytes)

    def freshen(self, pointer: Pointer, nbytes: int) -> None:
        if not self._capturing:
            self.fill(pointer, nbytes, POISON)

    def synchronize(self) -> None:
        """Nothing is ever queued."""

    def event(self) -> float:
        return time.perf_counter()

    def elapsed(self, begin: float, end: float) -> float:
        return end - begin

    def attributes(self, pointer: Pointer) -> dict[str, str]:
        return {"memory": "device" if self._inside(pointer, 1) else "host"}

    def memory(self) -> tuple[int, int]:
        held = psutil.virtual_memory()
        return int(held.available), int(held.total)

    def close(self) -> None:
        self._memory.clear()
        self._kernels.clear()
        self._modules.clear()

    def execute(self, kernel: str, function: Any, shape: Any, packed: bytes) -> None:
        """Run one launch to completion.

        Raises:
            EngineError: a barrier that not every thread reaches, a launch shape the kernel cannot take, or a
                write behind dynamic shared memory.
        """
        with self._lock:
            self.launches += 1
            failure = function(packed, shape)
        if failure:
            raise EngineError(FAILURES[failure], where=kernel, got=f"launch shape {list(shape)}")

    def _inside(self, pointer: Pointer, nbytes: int) -> bool:
        return any(
            base <= pointer and pointer + nbytes <= base + memory.nbytes - ALIGNMENT
            for base, memory in self._memory.items()
        )

    def _check(self, pointer: Pointer, nbytes: int) -> None:
        if nbytes and not self._inside(pointer, nbytes):
            raise EngineError(
                "a copy outside device memory", where="emu", got=f"{nbytes} bytes at {pointer:#x}"
            )

    def _load(self, name: str) -> Mapping[str, Any]:
        library = ctypes.CDLL(str(kernels.build(name, self.target)))
        functions = {}
        for kernel in kernels.signatures(name):
            functions[kernel] = getattr(library, f"emu_{kernel}")
            functions[kernel].argtypes = (ctypes.c_char_p, ctypes.c_void_p)
        return functions

    def _launch(
        self, kernel: str, function: Any, grid: Shape, block: Shape, shared: int, packed: bytes
    ) -> None:
        shape = (ctypes.c_uint * 8)(*grid, *block, shared, int(self.reverse))
        launch = (kernel, function, shape, packed)
        if self._capturing:
            self._recorded.append(launch)
        else:
            self.execute(*launch)

    def _begin(self) -> None:
        self._recorded = []

    def _end(self, keep: bool) -> Graph | None:
        recorded, self._recorded = self._recorded, []
        return EmuGraph(self, recorded) if keep else None
