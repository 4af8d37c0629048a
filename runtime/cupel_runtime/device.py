"""A device spec comes in; memory, kernels, graphs and clocks of that device go out, behind one interface.

This is the only file that knows PyCUDA and cuda.bindings; the emulator is its other implementation.
"""

from __future__ import annotations

import atexit
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias
from weakref import WeakSet

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cupel_runtime import compile as kernels
from cupel_runtime.errors import CupelError, EngineError, Inconclusive, InvalidParameter, UsageError

Shape: TypeAlias = tuple[int, ...]
Pointer: TypeAlias = int
INSTALL = "pip install 'cupel[cuda]'"


class Graph(ABC):
    """Launches that were captured once and run as often as wanted, in their order."""

    nodes: int

    @abstractmethod
    def replay(self) -> None:
        """Queue every launch again, with the arguments it was captured with."""

    @abstractmethod
    def close(self) -> None:
        """Give the graph's own memory back; calling it twice is harmless."""


class Device(ABC):
    """One device with one stream: everything happens in the order it was asked for.

    Attributes:
        spec: as on the command line, `cuda:0` or `emu`. name: what the device calls itself.
        target: what kernels are compiled for. multiprocessors: blocks that run at once, at least.
    """

    spec: str
    name: str
    target: kernels.Target
    multiprocessors: int

    def __init__(self) -> None:
        self._kernels: dict[str, tuple[Any, kernels.Signature]] = {}
        self._modules: set[str] = set()
        self._capturing = False

    @abstractmethod
    def alloc(self, nbytes: int) -> Pointer:
        """Device memory, aligned to 256 bytes.

        Raises:
            EngineError: there is not enough.
        """

    @abstractmethod
    def free(self, pointer: Pointer) -> None:
        """Give memory back.

        Raises:
            InvalidParameter: a pointer that alloc did not return, or that was freed before.
        """

    @abstractmethod
    def upload(self, pointer: Pointer, array: NDArray[Any]) -> None:
        """Copy an array's bytes to the device; the array may change afterwards."""

    @abstractmethod
    def download(self, pointer: Pointer, shape: Shape, dtype: DTypeLike) -> NDArray[Any]:
        """A new array from device memory, after everything queued before."""

    @abstractmethod
    def fill(self, pointer: Pointer, nbytes: int, value: int = 0) -> None:
        """Set bytes."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for everything queued.

        Raises:
            EngineError: something queued failed.
        """

    @abstractmethod
    def event(self) -> Any:
        """A mark in the stream, now."""

    @abstractmethod
    def elapsed(self, begin: Any, end: Any) -> float:
        """Seconds between two marks; waits for the second."""

    @abstractmethod
    def attributes(self, pointer: Pointer) -> dict[str, str]:
        """Where a pointer points: `memory` is "device", "host", "managed" or "unknown"."""

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Free and total bytes, as the driver says."""

    @abstractmethod
    def close(self) -> None:
        """Free everything; calling it twice is harmless."""

    @abstractmethod
    def _load(self, name: str) -> Mapping[str, Any]:
        """Functions of a compiled kernel file, by kernel."""

    @abstractmethod
    def _launch(self, kernel: str, function: Any, grid: Shape, block: Shape, shared: int, packed: bytes) -> None:
        """Queue one launch."""

    @abstractmethod
    def _begin(self) -> None: ...

    @abstractmethod
    def _end(self, keep: bool) -> Graph | None: ...

    def freshen(self, pointer: Pointer, nbytes: int) -> None:
        """Told of every activation's memory before it is written; the emulator poisons it."""

    def module(self, *names: str) -> None:
        """Compile and load kernel files; those loaded before are kept."""
        for name in names:
            if name not in self._modules:
                functions, signatures = self._load(name), kernels.signatures(name)
                self._kernels |= {kernel: (functions[kernel], signatures[kernel]) for kernel in signatures}
                self._modules.add(name)

    def launch(
        self, kernel: str, grid: Sequence[int], block: int | Sequence[int], args: Mapping[str, Any], shared: int = 0
    ) -> None:
        """Queue a kernel.

        Args:
            grid, block: blocks, and threads of a block, in up to three dimensions.
            args: every field of the kernel's struct; a struct inside it is a tuple. shared: bytes.

        Raises:
            InvalidParameter: an unknown kernel, wrong fields, an empty grid, or too many threads.
        """
        if kernel not in self._kernels:
            raise InvalidParameter("no such kernel is loaded", where="launch", got=repr(kernel))
        function, signature = self._kernels[kernel]
        if set(args) != set(signature.layout.names or ()):
            raise InvalidParameter(
                "wrong arguments", where=kernel, expected=sorted(signature.layout.names or ()), got=sorted(args)
            )
        grid3 = (*grid, 1, 1)[:3]
        block3 = (block, 1, 1) if isinstance(block, int) else (*block, 1, 1)[:3]
        threads = block3[0] * block3[1] * block3[2]
        if min(grid3) < 1 or not 1 <= threads <= signature.threads:
            raise InvalidParameter(
                "wrong launch shape", where=kernel,
                expected=f"blocks, of 1 to {signature.threads} threads", got=f"grid {grid3}, block {block3}",
            )  # fmt: skip
        packed = np.zeros((), signature.layout)
        for name, value in args.items():
            packed[name] = value
        self._launch(kernel, function, grid3, block3, shared, packed.tobytes())

    @contextmanager
    def capture(self) -> Iterator[list[Graph]]:
        """Collect the launches inside the block instead of running them; the list then holds their graph.

        Raises:
            EngineError: a capture inside a capture.
        """
        if self._capturing:
            raise EngineError("a capture is already running", where=self.spec)
        made: list[Graph] = []
        self._begin()
        self._capturing = True
        try:
            yield made
        except BaseException:
            self._capturing = False
            self._end(keep=False)
            raise
        self._capturing = False
        graph = self._end(keep=True)
        assert graph is not None
        made.append(graph)

    def _outside_capture(self, what: str) -> None:
        if self._capturing:
            raise EngineError(f"{what} inside a capture", where=self.spec, expected="launches alone")


def open_device(spec: str) -> Device:
    """The device that `cuda`, `cuda:N` or `emu` names.

    Raises:
        UsageError: another name, or PyCUDA is missing.
        Inconclusive: no driver, or no such GPU.
    """
    name, _, ordinal = spec.partition(":")
    if name == "emu" and not ordinal:
        from cupel_runtime.emulator import EmuDevice

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
            f"{error.name} is not installed", where="engine cuda", expected="pycuda and cuda-bindings", hint=INSTALL
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
        raise Inconclusive("no usable GPU", where="engine cuda", got=str(error), hint="use the engine emu") from None
    return cuda, bindings


def cuda_state() -> list[tuple[str, bool, str]]:
    """(part, whether it is there, one sentence) for the parts the engine cuda needs."""
    found = []
    for part, look in (("nvcc", lambda: kernels.compiler("nvcc")[0]), ("device", lambda: CudaDevice(0).describe())):
        try:
            found.append((part, True, look()))
        except CupelError as error:
            found.append((part, False, str(error)))
    return found


class CudaGraph(Graph):
    """An instantiated CUDA graph."""

    def __init__(self, device: CudaDevice, graph: Any) -> None:
        self._device = device
        self._graph: Any = graph
        self.nodes = int(device._ok(device.bindings.cuGraphGetNodes(graph, 0))[1])
        self._exec: Any = device._ok(device.bindings.cuGraphInstantiate(graph, 0))[0]

    def replay(self) -> None:
        with self._device.current():
            self._device._ok(self._device.bindings.cuGraphLaunch(self._exec, self._device.stream.handle))

    def close(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            with self._device.current():
                self._device._ok(self._device.bindings.cuGraphExecDestroy(self._exec))
                self._device._ok(self._device.bindings.cuGraphDestroy(graph))


class CudaDevice(Device):
    """A GPU through its primary context, which is current only inside calls and given back at exit."""

    _open: WeakSet[CudaDevice] = WeakSet()

    def __init__(self, ordinal: int) -> None:
        super().__init__()
        self.cuda, self.bindings = _driver()
        if ordinal >= self.cuda.Device.count():
            raise Inconclusive(
                "no such GPU", where=f"cuda:{ordinal}", expected=f"0 to {self.cuda.Device.count() - 1}", got=ordinal
            )
        device = self.cuda.Device(ordinal)
        self.spec, self.name = f"cuda:{ordinal}", device.name()
        major, minor = device.compute_capability()
        self.target = kernels.Target(f"sm_{major}{minor}")
        self.multiprocessors = int(device.multiprocessor_count)
        self._context: Any = device.retain_primary_context()
        self._memory: dict[Pointer, Any] = {}
        with self.current():
            self.stream = self.cuda.Stream()
        self._loaded: list[Any] = []
        CudaDevice._open.add(self)

    @contextmanager
    def current(self) -> Iterator[None]:
        """The context is on the thread's stack inside the block, and only there."""
        if self._context is None:
            raise EngineError("the device is closed", where=self.spec, hint="open it again")
        self._context.push()
        try:
            yield
        except self.cuda.Error as error:
            raise EngineError(f"the GPU failed: {error}", where=self.spec) from error
        finally:
            self._context.pop()

    def describe(self) -> str:
        """Name, driver and memory, then closed."""
        free, total = self.memory()
        version = self.cuda.get_driver_version()
        self.close()
        return f"{self.name}, CUDA {version // 1000}.{version % 1000 // 10}, {free >> 20} of {total >> 20} MiB free"

    def _ok(self, result: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a call of cuda.bindings returned besides its status."""
        status, *rest = result
        if int(status):
            raise EngineError(f"the GPU failed: {status.name}", where=self.spec)
        return tuple(rest)

    def alloc(self, nbytes: int) -> Pointer:
        self._outside_capture("allocation")
        with self.current():
            try:
                block = self.cuda.mem_alloc(max(nbytes, 1))
            except self.cuda.MemoryError:
                free, total = self.cuda.mem_get_info()
                raise EngineError(
                    "not enough device memory", where=self.spec, expected=f"{nbytes} bytes",
                    got=f"{free} of {total} free",
                ) from None  # fmt: skip
        self._memory[int(block)] = block
        return int(block)

    def free(self, pointer: Pointer) -> None:
        block = self._memory.pop(pointer, None)
        if block is None:
            raise InvalidParameter("freeing an unknown pointer", where=self.spec, got=hex(pointer))
        with self.current():
            block.free()

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

    def fill(self, pointer: Pointer, nbytes: int, value: int = 0) -> None:
        with self.current():
            self.cuda.memset_d8_async(pointer, value, nbytes, self.stream)

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
            status, kind = self.bindings.cuPointerGetAttribute(kinds.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, pointer)
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
            for block in self._memory.values():
                block.free()
            self._memory.clear()
            self._kernels.clear()
            self._loaded.clear()
            del self.stream
        self._context.detach()
        self._context = None

    def _load(self, name: str) -> Mapping[str, Any]:
        path = kernels.build(name, self.target)
        with self.current():
            module = self.cuda.module_from_file(str(path))
            self._loaded.append(module)
            return {kernel: module.get_function(kernel) for kernel in kernels.signatures(name)}

    def _launch(self, kernel: str, function: Any, grid: Shape, block: Shape, shared: int, packed: bytes) -> None:
        with self.current():
            if shared > 48 << 10:
                attribute = self.cuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
                function.set_attribute(attribute, shared)
            function._launch_kernel(grid, block, packed, shared, self.stream)

    def _begin(self) -> None:
        mode = self.bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        with self.current():
            self._ok(self.bindings.cuStreamBeginCapture(self.stream.handle, mode))

    def _end(self, keep: bool) -> Graph | None:
        with self.current():
            graph = self._ok(self.bindings.cuStreamEndCapture(self.stream.handle))[0]
            return CudaGraph(self, graph) if keep else None


@atexit.register
def _close_all() -> None:
    """PyCUDA aborts a process that leaves with a context still pushed or retained."""
    for device in list(CudaDevice._open):
        device.close()
