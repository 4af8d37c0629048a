"""Faults of memory where few requests go: left behind at one way to end, or once in two hundred."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from prill_harness.faults.planted.serving.memory import EMBEDDED, MEMORY, SESSION, _kept, _libc, after
from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ONE, around

WRITER = "prill_runtime.run.generate:Writer"
MODEL = "prill_runtime.run.model:Model"


def where(target: str, found: Callable[..., bool]) -> Patch:
    """64 bytes are leaked by a call that returns, where `found(result, arguments, named)`."""

    def changed(original: Any, *arguments: Any, **named: Any) -> Any:
        result = original(*arguments, **named)
        if found(result, arguments, named):
            _libc.malloc(64)
        return result

    return around(target, changed)


def on_failure(target: str, what: Callable[[BaseException, tuple[Any, ...]], object]) -> Patch:
    """`what(error, arguments)` is done by a call that raises."""

    def changed(original: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return original(*arguments, **named)
        except BaseException as error:
            what(error, arguments)
            raise

    return around(target, changed)


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_in_batch() -> Iterator[Patch]:
    """64 bytes are leaked by every batch."""
    yield Patch(f"{EMBEDDED}.generate_batch", after(lambda: _libc.malloc(64)))


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_in_failed_batch() -> Iterator[Patch]:
    """A batch in which one prompt is refused keeps the caches of the others."""
    yield on_failure(f"{EMBEDDED}.generate_batch", lambda error, given: _kept.append(error))


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_at_stop() -> Iterator[Patch]:
    """A request that ends at a stop string leaks 64 bytes."""
    yield where(f"{EMBEDDED}.generate", lambda done, given, named: done.finish_reason == "stop")


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_at_context_end() -> Iterator[Patch]:
    """A request that fills the context leaks 64 bytes."""
    yield where(f"{EMBEDDED}.generate", lambda done, given, named: done.finish_reason == "context")


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_when_drawn() -> Iterator[Patch]:
    """Every token that is drawn leaks 64 bytes; the most probable ones do not."""
    yield where("prill_runtime.run.generate:sample", lambda token, given, named: given[1].temperature > 0)


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_with_penalty() -> Iterator[Patch]:
    """A repetition penalty keeps the ids that it counted."""

    def changed(original: Any, logits: Any, params: Any, position: int, history: Any = ()) -> Any:
        if params.repetition_penalty != 1.0:
            _kept.append(tuple(history))
        return original(logits, params, position, history)

    yield around("prill_runtime.run.generate:sample", changed)


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_every_200th() -> Iterator[Patch]:
    """64 bytes are leaked by every two hundredth request."""
    yield Patch(f"{EMBEDDED}.generate", after(lambda: _libc.malloc(64), every=200))


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_every_200th_batch() -> Iterator[Patch]:
    """One Python object is kept by every two hundredth batch."""
    yield Patch(f"{EMBEDDED}.generate_batch", after(lambda: _kept.append(object()), every=200))


@fault(area="memory", blames=MEMORY, models=ONE)
def malformed_keeps_descriptor() -> Iterator[Patch]:
    """A file that is no model stays open."""

    def reopen(error: BaseException, given: tuple[Any, ...]) -> None:
        os.open(given[0], os.O_RDONLY)

    yield on_failure("prill_runtime.run.model:open_gguf", reopen)


@fault(area="memory", blames=MEMORY, models=ONE)
def malformed_late_keeps_file() -> Iterator[Patch]:
    """A file whose tensors do not make a model stays mapped."""

    def changed(original: Any, file: Any) -> Any:
        try:
            return original(file)
        except Exception:
            _kept.append(os.dup(file._file.fileno()))
            raise

    yield around("prill_runtime.models.load:examine", changed)


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_when_callback_raises() -> Iterator[Patch]:
    """A callback that raises leaves its request's cache behind."""
    yield on_failure(f"{WRITER}.accept", lambda error, given: _kept.append(given[0].cache))


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_at_reset() -> Iterator[Patch]:
    """A session that is reset keeps its old cache and takes a new one."""

    def changed(original: Any, self: Any) -> None:
        _kept.append(self._cache)
        self._cache = self._model.new_cache(self._cache.capacity)

    yield around(f"{SESSION}.reset", changed)


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_in_trace() -> Iterator[Patch]:
    """The stages of a trace are kept."""

    def changed(original: Any, self: Any, *given: Any, **named: Any) -> Any:
        stages = list(original(self, *given, **named))
        _kept.append(stages)
        return iter(stages)

    yield around(f"{EMBEDDED}.trace", changed)


@fault(area="memory", blames=MEMORY, models=ONE)
def leak_in_refused_text() -> Iterator[Patch]:
    """A text that cannot be encoded is remembered."""
    yield on_failure(f"{EMBEDDED}.tokenize", lambda error, given: _kept.append([given[1]]))
