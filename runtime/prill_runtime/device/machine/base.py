"""The interface of a device: memory, kernels, launches, graphs and clocks on one stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from threading import RLock
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from prill_runtime.device.machine import compile as kernels
from prill_runtime.errors import EngineError, InvalidParameter

MOST_MARKS: Final = 8
Shape: TypeAlias = tuple[int, ...]
Pointer: TypeAlias = int
P = ParamSpec("P")
R = TypeVar("R")


class Graph(ABC):
    """Launches that were captured once and can be replayed, in their order, any number of times."""

    nodes: int

    @abstractmethod
    def replay(self) -> None:
        """Queue every launch again, with the arguments it was captured with."""

    @abstractmethod
    def close(self) -> None:
        """Free the graph's own memory; calling it twice is harmless."""


class Device(ABC):
    """One device with one stream: everything runs in the order it was queued.

    Attributes:
        spec: as on the command line, `cuda:0` or `emu`. name: what the device calls itself.
        target: what kernels are compiled for. multiprocessors: at least so many thread blocks run at once.
        turn: a lock, held while a thread queues a step and reads its result: all threads share the stream,
            the arena's activations and the memory that captured graphs read.
    """

    spec: str
    name: str
    target: kernels.KernelTarget
    multiprocessors: int

    def __init__(self) -> None:
        self._kernels: dict[str, tuple[Any, kernels.Signature]] = {}
        self._modules: set[str] = set()
        self._capturing = False
        self.turn = RLock()

    @abstractmethod
    def alloc(self, nbytes: int) -> Pointer:
        """Allocate device memory, aligned to 256 bytes.

        Raises:
            EngineError: there is not enough.
        """

    @abstractmethod
    def free(self, pointer: Pointer) -> None:
        """Free memory.

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
    def mark(self) -> int:
        """Mark a place in the queue, for `peek`; only the last MOST_MARKS are remembered."""

    @abstractmethod
    def peek(self, pointer: Pointer, shape: Shape, dtype: DTypeLike, mark: int) -> NDArray[Any]:
        """As `download`, but waits only for what was queued before the mark; the rest keeps running."""

    @abstractmethod
    def fill(self, pointer: Pointer, nbytes: int, value: int = 0) -> None:
        """Set bytes."""

    @abstractmethod
    def copy(self, target: Pointer, source: Pointer, nbytes: int) -> None:
        """Queue a copy inside the device's memory."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for everything queued.

        Raises:
            EngineError: something queued failed.
        """

    @abstractmethod
    def event(self) -> Any:
        """Record an event in the stream."""

    @abstractmethod
    def elapsed(self, begin: Any, end: Any) -> float:
        """Seconds between two events; waits for the second."""

    @abstractmethod
    def attributes(self, pointer: Pointer) -> dict[str, str]:
        """Where a pointer points: `memory` is "device", "host", "managed" or "unknown"."""

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Free and total bytes, as the driver reports them."""

    @abstractmethod
    def close(self) -> None:
        """Free everything; calling it twice is harmless."""

    @abstractmethod
    def _load(self, name: str) -> Mapping[str, Any]:
        """The functions of a compiled kernel file, by kernel."""

    @abstractmethod
    def _launch(
        self, kernel: str, function: Any, grid: Shape, block: Shape, shared: int, packed: bytes
    ) -> None:
        """Queue one launch."""

    @abstractmethod
    def _begin(self) -> None: ...

    @abstractmethod
    def _end(self, keep: bool) -> Graph | None: ...

    def freshen(self, pointer: Pointer, nbytes: int) -> None:
        """Called for every activation's memory before it is written; the emulator poisons it."""

    def module(self, *names: str) -> None:
        """Compile and load kernel files that are not loaded yet."""
        for name in names:
            if name not in self._modules:
                functions, signatures = self._load(name), kernels.signatures(name)
                self._kernels |= {kernel: (functions[kernel], signatures[kernel]) for kernel in signatures}
                self._modules.add(name)

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: int | Sequence[int],
        args: Mapping[str, Any],
        shared: int = 0,
    ) -> None:
        """Queue a kernel.

        Args:
            grid, block: thread blocks, and threads of each, in up to three dimensions.
            args: every field of the kernel's struct; a struct inside it is a tuple. shared: bytes.

        Raises:
            InvalidParameter: an unknown kernel, wrong fields, an empty grid, or too many threads.
        """
        if kernel not in self._kernels:
            raise InvalidParameter("no such kernel is loaded", where="launch", got=repr(kernel))
        function, signature = self._kernels[kernel]
        if set(args) != set(signature.layout.names or ()):
            raise InvalidParameter(
                "wrong arguments",
                where=kernel,
                expected=sorted(signature.layout.names or ()),
                got=sorted(args),
            )
        grid3 = (*grid, 1, 1)[:3]
        block3 = (block, 1, 1) if isinstance(block, int) else (*block, 1, 1)[:3]
        threads = block3[0] * block3[1] * block3[2]
        if min(grid3) < 1 or not 1 <= threads <= signature.threads:
            raise InvalidParameter(
                "wrong launch shape", where=kernel,
                expected=f"thread blocks, of 1 to {signature.threads} threads",
                got=f"grid {grid3}, block {block3}",
            )  # fmt: skip
        packed = np.zeros((), signature.layout)
        for name, value in args.items():
            packed[name] = value
        self._launch(kernel, function, grid3, block3, shared, packed.tobytes())

    @contextmanager
    def capture(self) -> Iterator[list[Graph]]:
        """Record launches instead of running them; when the context ends, the list holds their graph.

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


class HasDevice(Protocol):
    """Anything that works on a device."""

    @property
    def device(self) -> Device: ...


T = TypeVar("T", bound=HasDevice)


def in_turn(step: Callable[Concatenate[T, P], R]) -> Callable[Concatenate[T, P], R]:
    """Make a method hold its device's turn while it runs, so that threads can share a model."""

    @wraps(step)
    def run(self: T, /, *args: P.args, **named: P.kwargs) -> R:
        with self.device.turn:
            return step(self, *args, **named)

    return run
