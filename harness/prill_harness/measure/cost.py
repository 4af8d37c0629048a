"""Count what a piece of work takes, without timing it: instructions, operations, memory, launches.

Seconds say little on a machine that others use. What is counted is the same in every run: instructions of
Python's and bytes that were taken, by function; operations of NumPy's on arrays that a backend was given, by
the backend's op; launches and threads of an emulated device. What takes longer with every token shows in one.
"""

from __future__ import annotations

import gc
import math
import sys
import sysconfig
import tracemalloc
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import CodeType, FrameType
from typing import Any

import numpy as np

from prill_harness.engines.base import Engine
from prill_harness.measure import reach
from prill_harness.measure.interpreter import profile_again, watch
from prill_runtime.device.machine.emulator import EmuDevice
from prill_runtime.ops.numpy import NumpyBackend
from prill_runtime.run.model import Model

LIBRARY = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
LIBRARY += (str(Path(np.__file__).parent),)  # which may be installed for the user, or below this environment
OUTSIDE = "the caller"
# Where counts begin: Python has small integers at hand, and only larger ones take memory, each as much.
NONE = 1 << 20
OPS = ("embed", "rms_norm", "layer_norm", "linear", "rope", "attention", "swiglu", "gelu_tanh", "add")


@dataclass(frozen=True)
class Spent:
    """What a piece of work took.

    Attributes:
        instructions: of Python's, by function; what a library's functions execute is their caller's.
        allocated: bytes, by function, as far as they were held at the same time between two calls.
        transient: most bytes held beyond those held before it; kept: after it.
        products: by op of a NumPy backend, multiply-adds of matrix products; elements: of all else NumPy did.
            Of op "cache": what was written into the rows of a cache.
        reached: items of a text's ids and characters of texts that C went over, by function.
        launches, threads: of an emulated device, by kernel.
    """

    instructions: Mapping[str, int] = field(default_factory=dict)
    allocated: Mapping[str, int] = field(default_factory=dict)
    transient: int = 0
    kept: int = 0
    products: Mapping[str, int] = field(default_factory=dict)
    elements: Mapping[str, int] = field(default_factory=dict)
    reached: Mapping[str, int] = field(default_factory=dict)
    launches: Mapping[str, int] = field(default_factory=dict)
    threads: Mapping[str, int] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Instructions of all functions."""
        return sum(self.instructions.values())


class Meter:
    """Counts what this thread does between two readings; everything counts from `start` to `stop` alone.

    Attributes:
        running: whether it counts now.
    """

    def __init__(self, engine: Engine | None = None) -> None:
        self._base = self._most = self._low = 0
        self._launches: Counter[str] = Counter()
        self._threads: Counter[str] = Counter()
        # Numbers in arrays, by the place of a function's name: what the meter notes takes no memory.
        self._instructions, self._allocated = array("q", [NONE]), array("q", [NONE])
        self._reached = array("q", [NONE])
        self._places = {OUTSIDE: 0}
        self._known: dict[CodeType, int] = {}  # -1 for a library's
        self._callers = [0]
        self._products: Counter[str] = Counter()
        self._elements: Counter[str] = Counter()
        self.running, self._stack = False, ExitStack()
        self._watch = watch(self._entered, self._stepped, self._left, __file__, reach.__file__)
        self._collects = self._traces = False
        self._profiler: object = None
        model = getattr(engine, "model", None)
        backend = model.backend if isinstance(model, Model) else None
        device = getattr(backend, "device", None)
        if model is not None:
            self._stack.enter_context(reach.watching(self._walked, self._written))
        if isinstance(backend, NumpyBackend):
            for op in OPS:
                self._stack.enter_context(_replaced(backend, op, self._counting(backend, op)))
        if isinstance(device, EmuDevice):
            self._stack.enter_context(_replaced(device, "execute", self._launching(device)))

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self.stop()
        self._stack.close()

    def start(self) -> None:
        """Count from here on."""
        self.running, self._callers = True, [0]
        self._collects = gc.isenabled()
        gc.disable()  # a collection comes when it comes, and gives back what nobody expects
        self._traces, self._profiler = tracemalloc.is_tracing(), sys.getprofile()
        tracemalloc.start()
        self._clear()
        sys.setprofile(self._called)
        self._watch.start()

    def stop(self) -> Spent:
        """What was spent since the last reading; counting ends, since it makes everything slow, and whoever
        watched this thread before does so again."""
        self._watch.stop()
        sys.setprofile(None)
        spent = self.read()
        if not self._traces:
            tracemalloc.stop()
        self.running = False
        if self._collects:
            gc.enable()
        profile_again(self._profiler)
        return spent

    def read(self) -> Spent:
        """What was spent since the last reading."""
        self._segment()
        held = tracemalloc.get_traced_memory()[0]
        spent = Spent(
            self._named(self._instructions), self._named(self._allocated),
            self._most - self._base, held - self._base,
            _some(self._products), _some(self._elements), self._named(self._reached),
            dict(self._launches), dict(self._threads),
        )  # fmt: skip
        self._clear()
        return spent

    def spent(self, work: Callable[[], object]) -> Spent:
        """What one piece of work takes; its result is let go of."""
        self.start()
        try:
            work()
        finally:
            spent = self.stop()
        return spent

    def _clear(self) -> None:
        for at in range(len(self._places)):
            self._instructions[at] = self._allocated[at] = self._reached[at] = NONE
        # Counts keep their names: a dictionary that finds its size again would be in the bytes.
        for counts in (self._products, self._elements):
            for name in counts:
                counts[name] = 0
        for counts in (self._launches, self._threads):
            counts.clear()
        tracemalloc.reset_peak()
        self._base = self._most = self._low = tracemalloc.get_traced_memory()[0]

    def _named(self, numbers: array[int]) -> dict[str, int]:
        return {name: n - NONE for name, n in zip(self._places, numbers, strict=True) if n != NONE}

    def _entered(self, code: CodeType) -> None:
        self._segment()
        place = self._known.get(code)
        if place is None:
            place = self._place(code)
        self._callers.append(self._callers[-1] if place < 0 else place)

    def _place(self, code: CodeType) -> int:
        """The place of a function's numbers, a new one for a new name; what that takes is the meter's own."""
        place = -1
        if not code.co_filename.startswith((*LIBRARY, "<")):
            place = self._places.setdefault(code.co_qualname, len(self._places))
            if place == len(self._allocated):
                for numbers in (self._instructions, self._allocated, self._reached):
                    numbers.append(NONE)
        self._known[code] = place
        held, low = tracemalloc.get_traced_memory()[0], self._low
        tracemalloc.reset_peak()
        self._base, self._most, self._low = self._base + held - low, self._most + held - low, held
        return place

    def _stepped(self, code: CodeType) -> None:
        self._instructions[self._callers[-1]] += 1

    def _left(self, code: CodeType) -> None:
        self._segment()
        if len(self._callers) > 1:
            self._callers.pop()

    def _called(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "c_call" and (length := reach.searched(argument)):
            self._walked(length)

    def _walked(self, items: int) -> None:
        if self.running:
            self._reached[self._callers[-1]] += items

    def _written(self, elements: int) -> None:
        if self.running:
            self._elements["cache"] += elements

    def _segment(self) -> None:
        """Give what was taken since the last call or return to the function that ran."""
        held, most = tracemalloc.get_traced_memory()
        self._allocated[self._callers[-1]] += most - self._low
        self._most, self._low = max(self._most, int(most)), held
        tracemalloc.reset_peak()

    def _counting(self, backend: NumpyBackend, op: str) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            work = getattr(type(backend), op)
            if not self.running:
                return work(backend, *given, **named)
            tally = Tally(self._products, self._elements, op)
            return tally.plain(work(backend, *map(tally.seen, given), **named))

        return call

    def _launching(self, device: EmuDevice) -> Callable[..., Any]:
        def execute(kernel: str, function: Any, shape: Any, packed: bytes) -> None:
            if self.running:
                self._launches[kernel] += 1
                self._threads[kernel] += math.prod(shape[:6])
            type(device).execute(device, kernel, function, shape, packed)

        return execute


class Tally:
    """Where the operations on one op's arrays are added up."""

    def __init__(self, products: Counter[str], elements: Counter[str], op: str) -> None:
        self.products, self.elements, self.op = products, elements, op

    def seen(self, value: Any) -> Any:
        """An array as one whose operations are counted; anything else as it is."""
        if isinstance(value, reach.CountedWrites):
            value = value.view(np.ndarray)
        if type(value) is not np.ndarray or value.dtype.kind != "f":
            return value
        view = value.view(Counted)
        view.tally = self
        return view

    def plain(self, value: Any) -> Any:
        return value.view(np.ndarray) if isinstance(value, Counted) else value

    def count(self, name: str, given: Sequence[Any], made: Any) -> None:
        if name == "matmul":
            self.products[self.op] += int(made.size) * given[0].shape[-1]
        else:
            self.elements[self.op] += max(int(np.size(each)) for each in (*given, made))


class Counted(np.ndarray[Any, Any]):
    """An array that counts what NumPy does with it and with whatever comes of it."""

    tally: Tally | None = None

    def __array_finalize__(self, source: Any) -> None:
        self.tally = getattr(source, "tally", None)

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *given: Any, out: Any = None, **named: Any
    ) -> Any:
        tally = self.tally or next((g.tally for g in given if isinstance(g, Counted) and g.tally), None)
        plain = [g.view(np.ndarray) if isinstance(g, Counted) else g for g in given]
        if out is not None:
            named["out"] = tuple(o.view(np.ndarray) if isinstance(o, Counted) else o for o in out)
        made: Any = getattr(ufunc, method)(*plain, **named)
        if tally is None:
            return made
        tally.count(ufunc.__name__, plain, made)
        return out[0] if out is not None else tally.seen(made)


def _some(counts: Mapping[str, int]) -> dict[str, int]:
    """Those that are not 0. Nothing of Python's library is called, which would count."""
    return {name: count for name, count in counts.items() if count}


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of this one object replaced, and its class's again afterwards."""
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)


def average(spent: Sequence[Spent], count: Callable[[Spent], Mapping[str, int]]) -> dict[str, float]:
    """The mean of a count over several pieces of work, by its keys."""
    total: Counter[str] = Counter()
    for each in spent:
        total.update(count(each))
    return {name: value / len(spent) for name, value in total.items()}


def typical(spent: Sequence[Spent], count: Callable[[Spent], Mapping[str, int]]) -> dict[str, float]:
    """As `average`, the median: what happens now and then, a list that finds its size say, is left out."""
    names = {name for each in spent for name in count(each)}
    return {name: median(count(each).get(name, 0) for each in spent) for name in names}


def slopes(first: Mapping[str, float], last: Mapping[str, float], added: int) -> dict[str, float]:
    """By how much each count grew for each of what was added, the fastest first."""
    found = {name: (last.get(name, 0) - first.get(name, 0)) / added for name in {*first, *last}}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
