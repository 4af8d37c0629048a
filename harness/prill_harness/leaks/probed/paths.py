"""The paths of a probe: success, error, cancel, load, session, concurrent, requests."""

from __future__ import annotations

import contextlib
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path as File
from threading import Barrier
from typing import Any, ClassVar

import numpy as np

from prill_harness.engines.base import Capability, Engine
from prill_harness.engines.connect import connect
from prill_harness.engines.models import resolve_model
from prill_harness.engines.spec import EngineSpec
from prill_harness.leaks.probed import kinds
from prill_harness.leaks.reports.report import Probe
from prill_harness.numbers.compare import largest
from prill_runtime.errors import Inconclusive, PrillError

PROMPT = "the quick brown fox jumps over the lazy dog"
PROMPT_IDS = 12
FULL_CONTEXT = 8192  # longer contexts are not overfilled: it would take too long
SESSIONS = 4
CANCEL_AT = 3
DISTINCT_PROMPTS = 1000  # so many prompts must be possible with a vocabulary and a length
CALLS_OF_A_KIND = 25  # in one call of the path `requests`: 200 in a window of eight
REQUESTS_S = (
    60.0  # seconds of the processor's that path may take; where a call is slow, each kind is made fewer times
)


def opened(spec: str, model: str) -> Engine:
    """As `open_engine`, for a process in which the spec's faults are planted everywhere: without a twin
    class per object, whose creation would be in the readings."""
    return connect(EngineSpec.parse(spec), model)


class Path(ABC):
    """One way to use the engine. `call` itself leaves no memory behind.

    Raises:
        Inconclusive: in `call`, if what the path is about does not happen.
    """

    registry: ClassVar[dict[str, type[Path]]] = {}
    varies = False  # whether distinct prompts make a difference
    control: Callable[[], None] | None = None  # a call like this path's in which the engine does no work
    kinds: Mapping[str, Callable[[int], object]] = {}  # the calls that one call consists of, if any
    times = 1  # how often each of them is made in it

    def __init_subclass__(cls, name: str) -> None:
        Path.registry[name] = cls

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.engine: Engine | None = opened(probe.engine, probe.model)
        self.info = self.engine.info
        self.ids = self._prompt(self.engine)
        self._digits = next((n for n in range(1, len(self.ids) + 1) if self._known**n >= DISTINCT_PROMPTS), 0)
        self.varies = self.varies and self._digits > 0

    @abstractmethod
    def call(self, number: int, ids: Sequence[int]) -> None:
        """One call; `number` counts from 1."""

    def memory(self) -> Callable[[], Mapping[str, int]] | None:
        """The function that reads the engine's counters; None if it has none."""
        return self.engine.memory if self.engine and Capability.MEMORY in self.info.capabilities else None

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    def distinct(self, number: int) -> list[int]:
        """A prompt like the usual one, different for every call."""
        ids = list(self.ids)
        for at in range(self._digits):  # the number, written with ids as digits
            number, ids[-1 - at] = divmod(number, self._known)
        return ids

    @property
    def _known(self) -> int:
        """Size of the vocabulary; the smallest of any model if the engine does not tell."""
        return int(self.info.config.get("vocab_size", 256))

    @property
    def _context(self) -> int:
        """Positions; 0 if the engine does not tell."""
        return int(self.info.config.get("context_length", 0))

    def _prompt(self, engine: Engine) -> list[int]:
        """At most PROMPT_IDS ids, fewer if the context would not hold the tokens of a cancelled request.

        Not made from a text if the vocabulary's size is known, for it need not have tokens for any.
        """
        texts = "vocab_size" not in self.info.config and Capability.TOKENIZE in self.info.capabilities
        ids = engine.tokenize(PROMPT) if texts else [n % self._known for n in range(1, PROMPT_IDS + 1)]
        return ids[: max(1, min(PROMPT_IDS, self._context - CANCEL_AT) if self._context else PROMPT_IDS)]

    def _needs(self, capability: Capability) -> Engine:
        if self.engine is None or capability not in self.info.capabilities:
            raise Inconclusive(f"engine {self.info.name} does not offer {capability.value}")
        return self.engine


class Success(Path, name="success"):
    """A request that works: prefill, a few decode steps, the end."""

    varies = True

    def call(self, number: int, ids: Sequence[int]) -> None:
        if Capability.GENERATE in self.info.capabilities:
            self._needs(Capability.GENERATE).generate(ids, max_tokens=self.probe.max_tokens, ignore_eos=True)
        else:
            self._needs(Capability.LOGITS).logits(ids)


class Error(Path, name="error"):
    """Every error a request can provoke, once each."""

    def __init__(self, probe: Probe) -> None:
        super().__init__(probe)
        over = self._known if "vocab_size" in self.info.config else 2**31 - 1
        self._requests: list[tuple[str, list[int], dict[str, Any]]] = [
            ("an id outside the vocabulary", [*self.ids, over], {}),
            ("an empty prompt", [], {}),
            ("a temperature below 0", self.ids, {"temperature": -1.0}),
            ("top-p above 1", self.ids, {"top_p": 1.5}),
        ]
        if 0 < self._context <= FULL_CONTEXT:
            long = (self.ids * (self._context // len(self.ids) + 1))[: self._context + 1]
            self._requests.append(("a prompt longer than the context", long, {}))

    def call(self, number: int, ids: Sequence[int]) -> None:
        engine, refused = self._needs(Capability.GENERATE), 0
        for _, prompt, rest in self._requests:
            try:
                engine.generate(prompt, max_tokens=1, **rest)
            except Exception:
                refused += 1
        if not refused:
            raise Inconclusive("no bad request was refused, so no error path was walked")


class Cancel(Path, name="cancel"):
    """A request that is cancelled at its third token."""

    def call(self, number: int, ids: Sequence[int]) -> None:
        seen = 0

        def enough(token: int, logprob: float) -> bool:
            nonlocal seen
            seen += 1
            return seen < CANCEL_AT

        engine = self._needs(Capability.GENERATE)
        done = engine.generate(ids, max_tokens=4 * CANCEL_AT, ignore_eos=True, on_token=enough)
        if done.finish_reason != "cancelled":
            raise Inconclusive("the request was not cancelled", got=done.finish_reason)


class Load(Path, name="load"):
    """The engine is opened on the model and closed."""

    def __init__(self, probe: Probe) -> None:
        fixture = probe.model.startswith("fixture:")  # resolved once: the load of its file is what is probed
        self.model = str(resolve_model(probe.model)) if fixture else probe.model
        super().__init__(probe)
        self.close()

    def call(self, number: int, ids: Sequence[int]) -> None:
        opened(self.probe.engine, self.model).close()

    def memory(self) -> Callable[[], Mapping[str, int]] | None:
        return None


class SessionPath(Path, name="session"):
    """A session is created, fed, and destroyed."""

    def call(self, number: int, ids: Sequence[int]) -> None:
        session = self._needs(Capability.SESSIONS).session()
        try:
            session.feed(ids)
        finally:
            session.close()


class Concurrent(Path, name="concurrent"):
    """Several requests at once, each in a thread of its own that is kept.

    How much concurrent threads leave in the free lists of the interpreter and of libraries is chance, the
    more so on a busy machine; control calls of the same run show how much.
    """

    def __init__(self, probe: Probe) -> None:
        super().__init__(probe)
        self._pool, self._all_there = ThreadPoolExecutor(SESSIONS), Barrier(SESSIONS)
        self.control()  # the pool starts threads on demand: now it has all

    def call(self, number: int, ids: Sequence[int]) -> None:
        generate = self._needs(Capability.GENERATE).generate
        self._at_once(lambda: generate(ids, max_tokens=CANCEL_AT, ignore_eos=True))

    def control(self) -> None:
        """As many threads at once, working on arrays that are not the engine's."""
        self._at_once(arithmetic)

    def _at_once(self, work: Callable[[], object]) -> None:
        def meet() -> None:
            self._all_there.wait()  # or one thread would do all, and others start only when measured
            work()

        for task in [self._pool.submit(meet) for _ in range(SESSIONS)]:
            task.result()

    def close(self) -> None:
        self._pool.shutdown()
        super().close()


class Requests(Path, name="requests"):
    """Every kind of call in the protocol, some of each: a leak in one call of two hundred shows, and one in a
    single way for a single kind to end."""

    def __init__(self, probe: Probe) -> None:
        super().__init__(probe)
        self._folder = tempfile.TemporaryDirectory(prefix="prill-leaks-")
        model = probe.model
        with contextlib.suppress(PrillError):
            model = str(resolve_model(model))
        assert self.engine is not None
        vocab = self._known if "vocab_size" in self.info.config else 0
        subject = kinds.CallSubject(
            self.engine, lambda file: opened(probe.engine, file), model, vocab, self._context
        )
        self.kinds = kinds.offered(subject, File(self._folder.name))
        self._poisoned = subject.poisoned
        if not self.kinds:
            raise Inconclusive(f"engine {self.info.name} offers no call that could be made")
        self._round(0)
        began = time.process_time()  # not affected by other load on the machine
        self._round(1)
        each = probe.calls * (time.process_time() - began)
        self.times = max(1, min(CALLS_OF_A_KIND, int(REQUESTS_S / largest(each, 1e-9))))

    def call(self, number: int, ids: Sequence[int]) -> None:
        for n in range(number * self.times, (number + 1) * self.times):
            self._round(n)

    def _round(self, n: int) -> None:
        for make in self.kinds.values():
            make(n)

    def close(self) -> None:
        super().close()
        if self._poisoned is not None:
            self._poisoned.close()
        self._folder.cleanup()


NAMES = tuple(Path.registry)


def arithmetic() -> None:
    """Array arithmetic like an engine's, without the engine: products, exponentials, small results."""
    with np.errstate(all="ignore"):
        for size in (1, 7, 12, 64, 288):
            row = np.ones((size, 64), np.float32)
            scores = np.exp(row @ row.T - size)
            scores /= scores.sum(-1, keepdims=True)
            np.argsort(scores[-1])


def counters_move(engine: Engine, ids: Sequence[int]) -> bool:
    """Whether the engine's counters react to a session or to work, or never move."""
    from prill_harness.leaks.ledgers.ledgers import counter_names

    def read() -> dict[str, int]:
        said = engine.memory()
        return {name: int(said[name]) for name in counter_names(said)}

    idle, during = read(), []
    if Capability.SESSIONS in engine.info.capabilities:
        session = engine.session()
        session.feed(ids)
        during.append(read())
        session.close()
    if Capability.GENERATE in engine.info.capabilities:
        engine.generate(ids, max_tokens=2, ignore_eos=True, on_token=lambda *_: during.append(read()))
    return any(reading != idle for reading in during)
