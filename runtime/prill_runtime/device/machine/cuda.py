"""A CUDA GPU behind the interface of a device.

No other file of the runtime uses PyCUDA or cuda.bindings.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakSet

import numpy as np
from numpy.typing import DTypeLike, NDArray

from prill_runtime.device.machine import compile as kernels
from prill_runtime.device.machine.base import MOST_MARKS, Device, Graph, Pointer, Shape
from prill_runtime.errors import EngineError, Inconclusive, InvalidParameter, PrillError, UsageError

__all__ = ["CudaDevice", "Device", "Graph", "Pointer", "Shape", "cuda_state", "open_device"]

OVERLAP_VARIABLE = "PRILL_CUDA_OVERLAP"
"""Set to 0 to let no kernel of a graph start before the previous one has ended."""
COPY_BYTES = 1 << 28
INSTALL_HINT = "pip install 'prill[cuda]'"


def open_device(spec: str) -> Device:
    """The device that `cuda`, `cuda:N` or `emu` names.

    Raises:
        UsageError: another name, or PyCUDA is missing.
        Inconclusive: no driver, or no such GPU.
    """
    name, _, ordinal = spec.partition(":")
    if name == "emu" and not ordinal:
        from prill_runtime.device.machine.emulator import EmuDevice

        return EmuDevice()
    if name == "cuda" and (not ordinal or ordinal.isdecimal()):
        return CudaDevice(int(ordinal or 0))
    raise UsageError("unknown device", expected="cuda, cuda:N or emu", got=repr(spec))


def _driver() -> tuple[Any, Any]:
    """pycuda.driver and cuda.bindings.driver, initialised.

    Raises:
        UsageError: one of them is not installed.
        Inconclusive: no driver library, or no GPU.
    """
    try:
        import pycuda.driver as cuda
        from cuda.bindings import driver as bindings
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed",
            where="engine cuda",
            expected="pycuda and cuda-bindings",
            hint=INSTALL_HINT,
        ) from None
    except ImportError as error:
        raise Inconclusive(
            "the NVIDIA driver library cannot be loaded", where="engine cuda", got=str(error),
            hint="install the driver, or use the engine emu",
        ) from None  # fmt: skip
    try:
        cuda.init()
        if not cuda.Device.count():
            raise Inconclusive("no GPU", where="engine cuda", hint="use the engine emu")
    except cuda.Error as error:
        raise Inconclusive(
            "no usable GPU", where="engine cuda", got=str(error), hint="use the engine emu"
        ) from None
    return cuda, bindings


def cuda_state() -> list[tuple[str, bool, str]]:
    """(part, whether it is there, one sentence) for each part that the engine cuda needs."""
    found = []
    looks: dict[str, Callable[[], str]] = {
        "kernels": lambda: f"compiled by {kernels.compiler('nvcc')[0]}",
        "device": lambda: CudaDevice(0).describe(),
    }
    for part, look in looks.items():
        try:
            found.append((part, True, look()))
        except PrillError as error:
            found.append((part, False, str(error)))
    return found


class CudaGraph(Graph):
    """An instantiated CUDA graph: a chain of launches that overlap where the kernels wait by themselves."""

    def __init__(self, device: CudaDevice, graph: Any, waits: list[bool]) -> None:
        self._device = device
        self._graph: Any = graph
        self.nodes = len(waits)
        if any(waits) and os.environ.get(OVERLAP_VARIABLE) != "0":
            self._overlap(waits)
        self._exec: Any = device._ok(device.bindings.cuGraphInstantiate(graph, 0))[0]

    def _overlap(self, waits: list[bool]) -> None:
        """Turn edges into programmatic ones where a kernel itself waits for its predecessor."""
        cu, ok = self._device.bindings, self._device._ok
        count = ok(cu.cuGraphGetEdges(self._graph, 0))[-1]
        sources, targets, data, _ = ok(cu.cuGraphGetEdges(self._graph, count))
        following = {int(a): (a, b, e) for a, b, e in zip(sources, targets, data, strict=True)}
        reached = {int(b) for b in targets}
        at = next(node for node in following if node not in reached)
        early = cu.CUgraphEdgeData()
        early.from_port = 1
        early.type = cu.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC.value
        for wait in waits[1:]:
            source, target, plain = following[at]
            if wait:
                ok(cu.cuGraphRemoveDependencies(self._graph, [source], [target], [plain], 1))
                ok(cu.cuGraphAddDependencies(self._graph, [source], [target], [early], 1))
            at = int(target)

    def replay(self) -> None:
        with self._device.current():
            self._device._ok(self._device.bindings.cuGraphLaunch(self._exec, self._device.stream.handle))

    def close(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None and self._device.is_open:
            with self._device.current():
                self._device._ok(self._device.bindings.cuGraphExecDestroy(self._exec))
                self._device._ok(self._device.bindings.cuGraphDestroy(graph))


class CudaDevice(Device):
    """A GPU through its primary context, which is current only inside calls and released at exit."""

    _open: ClassVar[WeakSet[CudaDevice]] = WeakSet()

    def __init__(self, ordinal: int) -> None:
        super().__init__()
        self.cuda, self.bindings = _driver()
        if ordinal >= self.cuda.Device.count():
            raise Inconclusive(
                "no such GPU",
                where=f"cuda:{ordinal}",
                expected=f"0 to {self.cuda.Device.count() - 1}",
                got=ordinal,
            )
        device = self.cuda.Device(ordinal)
        self.spec, self.name = f"cuda:{ordinal}", device.name()
        major, minor = device.compute_capability()
        # sm_90a: warpgroup products of Hopper, which the plain architecture does not have.
        self.target = kernels.KernelTarget(f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else ""))
        self.multiprocessors = int(device.multiprocessor_count)
        self._context: Any = device.retain_primary_context()
        self._memory: dict[Pointer, Any] = {}
        with self.current():
            self.stream, self._aside = self.cuda.Stream(), self.cuda.Stream()
            # Created once: PyCUDA cannot free an event in a thread other than the context's.
            self._marks = [self.cuda.Event(self.cuda.event_flags.DISABLE_TIMING) for _ in range(MOST_MARKS)]
        self._marked = 0
        self._loaded: list[Any] = []
        self._waits: list[bool] = []
        self._waiting: set[str] = set()
        CudaDevice._open.add(self)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Push the context for the duration of the with statement."""
        if self._context is None:
            raise EngineError("the device is closed", where=self.spec, hint="open it again")
        self._context.push()
        try:
            yield
        except self.cuda.Error as error:
            raise EngineError(f"the GPU failed: {error}", where=self.spec) from error
        finally:
            self._context.pop()

    @property
    def is_open(self) -> bool:
        return self._context is not None

    def describe(self) -> str:
        """Name, driver and memory in a sentence; closes the device."""
        free, total = self.memory()
        version = self.cuda.get_driver_version()
        self.close()
        cuda = f"CUDA {version // 1000}.{version % 1000 // 10}"
        return f"{self.name}, {cuda}, {free >> 20} of {total >> 20} MiB free"

    def _ok(self, result: tuple[Any, ...]) -> tuple[Any, ...]:
        """Check the status that a call of cuda.bindings returned; the rest of its result."""
        status, *rest = result
        if int(status):
            raise EngineError(f"the GPU failed: {status.name}", where=self.spec)
        return tuple(rest)

    def alloc(self, nbytes: int) -> Pointer:
        self._outside_capture("allocation")
        with self.current():
            try:
                allocation = self.cuda.mem_alloc(max(nbytes, 1))
            except self.cuda.MemoryError:
                free, total = self.cuda.mem_get_info()
                raise EngineError(
                    "not enough device memory", where=self.spec, expected=f"{nbytes} bytes",
                    got=f"{free} of {total} free",
                ) from None  # fmt: skip
        self._memory[int(allocation)] = allocation
        return int(allocation)

    def free(self, pointer: Pointer) -> None:
        allocation = self._memory.pop(pointer, None)
        if allocation is None:
            raise InvalidParameter("freeing an unknown pointer", where=self.spec, got=hex(pointer))
        with self.current():
            allocation.free()

    def upload(self, pointer: Pointer, array: NDArray[Any]) -> None:
        self._outside_capture("an upload")
        if array.nbytes:
            with self.current():
                self.cuda.memcpy_htod_async(pointer, np.ascontiguousarray(array), self.stream)
                self.stream.synchronize()

    def download(self, pointer: Pointer, shape: Shape, dtype: DTypeLike) -> NDArray[Any]:
        self._outside_capture("a download")
        out = np.empty(shape, dtype)
        if out.nbytes:
            with self.current():
                self.cuda.memcpy_dtoh_async(out, pointer, self.stream)
                self.stream.synchronize()
        return out

    def mark(self) -> int:
        self._marked += 1
        with self.current():
            self._marks[self._marked % MOST_MARKS].record(self.stream)
        return self._marked

    def peek(self, pointer: Pointer, shape: Shape, dtype: DTypeLike, mark: int) -> NDArray[Any]:
        self._outside_capture("a download")
        out = np.empty(shape, dtype)
        with self.current():
            self._marks[mark % MOST_MARKS].synchronize()
            self.cuda.memcpy_dtoh_async(out, pointer, self._aside)
            self._aside.synchronize()
        return out

    def fill(self, pointer: Pointer, nbytes: int, value: int = 0) -> None:
        with self.current():
            self.cuda.memset_d8_async(pointer, value, nbytes, self.stream)

    def copy(self, target: Pointer, source: Pointer, nbytes: int) -> None:
        with self.current():
            self.cuda.memcpy_dtod_async(target, source, nbytes, self.stream)

    def synchronize(self) -> None:
        with self.current():
            self.stream.synchronize()

    def event(self) -> Any:
        with self.current():
            mark = self.cuda.Event()
            mark.record(self.stream)
        return mark

    def elapsed(self, begin: Any, end: Any) -> float:
        with self.current():
            end.synchronize()
            return float(begin.time_till(end)) / 1000

    def attributes(self, pointer: Pointer) -> dict[str, str]:
        kinds = self.bindings.CUpointer_attribute
        with self.current():
            status, kind = self.bindings.cuPointerGetAttribute(
                kinds.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, pointer
            )
            if int(status):
                return {"memory": "unknown"}
            managed = self._ok(
                self.bindings.cuPointerGetAttribute(kinds.CU_POINTER_ATTRIBUTE_IS_MANAGED, pointer)
            )[0]
        if int(managed):
            return {"memory": "managed"}
        return {"memory": {1: "host", 2: "device"}.get(int(kind), "unknown")}

    def memory(self) -> tuple[int, int]:
        with self.current():
            free, total = self.cuda.mem_get_info()
        return int(free), int(total)

    def close(self) -> None:
        if self._context is None:
            return
        with self.current():
            for allocation in self._memory.values():
                allocation.free()
            self._memory.clear()
            self._kernels.clear()
            self._loaded.clear()
            del self.stream, self._aside, self._marks
        self._context.detach()
        self._context = None

    def _load(self, name: str) -> Mapping[str, Any]:
        path = kernels.build(name, self.target)
        with self.current():
            module = self.cuda.module_from_file(str(path))
            self._loaded.append(module)
            found = {kernel: module.get_function(kernel) for kernel in kernels.signatures(name)}
        if kernels.waits(name):
            self._waiting |= set(found)
        return found

    def _launch(
        self, kernel: str, function: Any, grid: Shape, block: Shape, shared: int, packed: bytes
    ) -> None:
        with self.current():
            if shared > 48 << 10:
                attribute = self.cuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
                function.set_attribute(attribute, shared)
            if self._capturing:
                self._waits.append(kernel in self._waiting)
            function._launch_kernel(grid, block, packed, shared, self.stream)

    def _begin(self) -> None:
        self._waits = []
        mode = self.bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        with self.current():
            self._ok(self.bindings.cuStreamBeginCapture(self.stream.handle, mode))

    def _end(self, keep: bool) -> Graph | None:
        with self.current():
            graph = self._ok(self.bindings.cuStreamEndCapture(self.stream.handle))[0]
            return CudaGraph(self, graph, self._waits) if keep else None


def copy_bandwidth(device: Device) -> float | None:
    """Bytes read and written per second by a copy of COPY_BYTES, best of three; None if it does not fit."""
    if device.memory()[0] < 3 * COPY_BYTES:
        return None
    source, target = device.alloc(COPY_BYTES), device.alloc(COPY_BYTES)
    try:
        device.fill(source, COPY_BYTES, 0x5A)
        seconds = []
        for _ in range(4):
            begin = device.event()
            device.copy(target, source, COPY_BYTES)
            seconds.append(device.elapsed(begin, device.event()))
        return 2 * COPY_BYTES / min(seconds[1:])
    finally:
        device.free(source)
        device.free(target)


@atexit.register
def _close_all() -> None:
    """PyCUDA aborts a process that leaves with a context still pushed or retained."""
    for device in list(CudaDevice._open):
        device.close()
