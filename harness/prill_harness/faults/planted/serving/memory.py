"""Faults of memory: left behind by a call that works, fails, is cancelled, loads, or runs beside others."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ONE

EMBEDDED = "prill_harness.engines.embedded:Embedded"
SESSION = "prill_harness.engines.embedded:EmbeddedSession"
MEMORY = ("memory",)
_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = (ctypes.c_size_t,)
_libc.free.argtypes = (ctypes.c_void_p,)
_kept: list[object] = []  # what stays reachable and is of no use
_passed: Counter[str] = Counter()


def after(what: Callable[[], object], *, every: int = 1) -> Callable[[Any], Any]:
    """A wrap that does `what` once the wrapped call has returned, in every nth call."""

    def wrap(method: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            result = method(*arguments, **named)
            _passed[method.__qualname__] += 1
            if _passed[method.__qualname__] % every == 0:
                what()
            return result

        return call

    return wrap


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_on_success() -> Iterator[Patch]:
    """64 bytes are leaked by every request that works."""
    yield Patch(f"{EMBEDDED}.generate", after(lambda: _libc.malloc(64)))


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_every_eighth() -> Iterator[Patch]:
    """16 bytes are leaked by every eighth request."""
    yield Patch(f"{EMBEDDED}.generate", after(lambda: _libc.malloc(16), every=8))


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_on_error() -> Iterator[Patch]:
    """A request that is refused leaks 64 bytes."""

    def wrap(generate: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            try:
                return generate(*arguments, **named)
            except Exception:
                _libc.malloc(64)
                raise

        return call

    yield Patch(f"{EMBEDDED}.generate", wrap)


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_on_cancel() -> Iterator[Patch]:
    """A request that is cancelled leaks 64 bytes."""

    def wrap(generate: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            done = generate(*arguments, **named)
            if done.finish_reason == "cancelled":
                _libc.malloc(64)
            return done

        return call

    yield Patch(f"{EMBEDDED}.generate", wrap)


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_on_unload() -> Iterator[Patch]:
    """Closing the engine leaves 4 KiB behind."""
    yield Patch(f"{EMBEDDED}.close", after(lambda: _libc.malloc(4096)))


@fault(area="memory", blames=MEMORY, models=ONE)
def failed_load_leaks() -> Iterator[Patch]:
    """A load that fails keeps its error, and with that the tensors it had read before."""

    def wrap(load: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            try:
                return load(*arguments, **named)
            except MemoryError as error:
                _kept.append(error)
                raise

        return call

    yield Patch("prill_runtime.run.model:Model.load", wrap)


@fault(area="memory", blames=MEMORY, models=ONE)
def history_grows() -> Iterator[Patch]:
    """A list of all requests only grows: reachable, and of no use."""
    yield Patch(f"{EMBEDDED}.generate", after(lambda: _kept.append(object())))


@fault(area="memory", blames=MEMORY, models=ONE)
def session_cache_kept() -> Iterator[Patch]:
    """A session that is closed keeps its cache."""

    def wrap(close: Any) -> Any:
        def call(self: Any) -> None:
            if self._cache is not None:
                _kept.append(self._cache)
            close(self)

        return call

    yield Patch(f"{SESSION}.close", wrap)


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_mapping() -> Iterator[Patch]:
    """Every request maps 64 KiB and never unmaps them."""
    yield Patch(f"{EMBEDDED}.generate", after(lambda: _kept.append(mmap.mmap(-1, 65536))))


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_descriptor() -> Iterator[Patch]:
    """Every request opens a file and never closes it."""
    yield Patch(f"{EMBEDDED}.generate", after(lambda: os.open(os.devnull, os.O_RDONLY)))


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_thread() -> Iterator[Patch]:
    """Every request starts a thread that never ends."""

    def start() -> None:
        threading.Thread(target=threading.Event().wait, daemon=True).start()

    yield Patch(f"{EMBEDDED}.generate", after(start))


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_when_concurrent() -> Iterator[Patch]:
    """64 bytes are leaked by a request that meets another one."""
    working: list[int] = []

    def wrap(generate: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            working.append(1)
            try:
                result = generate(*arguments, **named)
                if len(working) > 1:
                    _libc.malloc(64)
                return result
            finally:
                working.pop()

        return call

    yield Patch(f"{EMBEDDED}.generate", wrap)


@fault(area="memory", blames=MEMORY, models=ONE)
def double_free() -> Iterator[Patch]:
    """Every request frees a block twice."""

    def twice() -> None:
        if not hasattr(_libc, "prill_leaks_read"):
            return  # only in a process that is probed: it ends there and then
        block = _libc.malloc(64)
        _libc.free(block)
        _libc.free(block)

    yield Patch(f"{EMBEDDED}.generate", after(twice))


@fault(area="memory", blames=MEMORY, models=ONE)
def memory_constant() -> Iterator[Patch]:
    """The memory that the engine reports is a constant."""

    def wrap(memory: Any) -> Any:
        return lambda self: {"weights": 1 << 20, "cache": 0, "process": 1 << 26}

    yield Patch(f"{EMBEDDED}.memory", wrap)


@fault(area="harness", blames=("harness",), models=ONE)
def probe_blind() -> Iterator[Patch]:
    """The leak probe's allocation ledger says the same whatever is allocated."""

    def wrap(read: Any) -> Any:
        def constant(self: Any) -> Any:
            blocks, sizes, _ = read(self)
            return [0] * len(blocks), [0] * len(sizes), 0

        return constant

    yield Patch("prill_harness.leaks.ledgers.native:Interposer.read", wrap)
