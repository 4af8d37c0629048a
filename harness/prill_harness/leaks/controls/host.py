"""The mock engine `control:KEY=VALUE,…`: known leaks, caches and noise, made by control.c."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.base import Capability, Engine, EngineInfo, Generation, Session
from prill_harness.leaks.ledgers import build
from prill_runtime.errors import EngineError, InvalidParameter, UsageError

LEAKS = ("none", "block", "list", "buffer", "mapping", "arena", "raw", "descriptor", "thread", "double_free")
NOISES = ("quiet", "churn", "pool", "threads", "ragged")
PLACES = ("success", "error", "cancel", "load", "session", "third_failure", "any_failure")
FORGETS = {"third_failure": 3, "any_failure": -1}  # where a failed allocation leaves earlier ones behind
DEFAULTS = {
    "leak": "none",  # what leaks, one of LEAKS
    "size": "16",  # bytes
    "every": "1",  # in every nth call of its path
    "on": "success",  # its path, one of PLACES
    "noise": "quiet",  # what else goes on, one of NOISES
    "ring": "0",  # entries of a cache that every call enters
    "prompts": "0",  # entries of a cache that every distinct prompt enters
    "entry": "512",  # bytes of a cache entry
    "tells": "yes",  # the engine counts its caches; "constant": it says the same whatever happens
    "seed": "1",
}


@functools.cache
def _loaded() -> ctypes.CDLL:
    """control.c, compiled and opened once, so that this is not part of a load."""
    return ctypes.CDLL(str(build.control()))


class Library:
    """The functions of control.c, typed."""

    def __init__(self) -> None:
        loaded = _loaded()
        self.work, self.cache = loaded.control_work, loaded.control_cache
        self.load, self.unload, self.seed = loaded.control_load, loaded.control_unload, loaded.control_seed
        self.work.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long)
        self.cache.argtypes, self.cache.restype = (ctypes.c_long,) * 3, ctypes.c_long
        self.load.argtypes, self.load.restype = (ctypes.c_int,), ctypes.c_void_p
        self.unload.argtypes = (ctypes.c_void_p, ctypes.c_int)
        self.seed.argtypes = (ctypes.c_ulong,)


def loader(spec: str) -> Callable[[], None]:
    """Load and unload in C alone, for the walk over failed allocations.

    Raises:
        EngineError: in the call, when an allocation failed.
    """
    asked = DEFAULTS | dict(part.partition("=")[::2] for part in spec.partition(":")[2].split(",") if part)
    library, forgets = Library(), FORGETS.get(asked["on"], 0)

    def load() -> None:
        model = library.load(forgets)
        if not model:
            raise EngineError("out of memory", where="load")
        library.unload(model, 0)

    return load


class Holder(Protocol):
    """An engine that counts its open sessions."""

    sessions: int

    def pass_by(self, place: str) -> None:
        """A session was closed."""


class ControlSession(Session):
    """A sequence of the mock engine: a NumPy row for each position."""

    def __init__(self, engine: Holder) -> None:
        self._engine, self._rows = engine, [np.zeros(64, np.float32)]
        engine.sessions += 1

    @property
    def length(self) -> int:
        return len(self._rows) - 1

    def feed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self._rows += [np.full(64, i, np.float32) for i in ids]
        return np.zeros((len(ids), 8), np.float32)

    def reset(self) -> None:
        del self._rows[1:]

    def close(self) -> None:
        if self._rows:
            self._rows = []
            self._engine.sessions -= 1
            self._engine.pass_by("session")


class ControlEngine(Engine, spec="control"):
    """The mock engine; DEFAULTS lists what it can be asked to do."""

    def __init__(self, asked: Mapping[str, str]) -> None:
        self._asked = asked
        self._leak, self._noise = LEAKS.index(asked["leak"]), NOISES.index(asked["noise"])
        self._size, self._every = int(asked["size"]), int(asked["every"])
        self._ring, self._prompts = int(asked["ring"]), int(asked["prompts"])
        self._passed = dict.fromkeys(PLACES, 0)
        self._calls = self._cached = self.sessions = 0
        self._library = Library()
        self._model = self._library.load(FORGETS.get(asked["on"], 0))
        if not self._model:
            raise EngineError("out of memory", where="load")

    @classmethod
    def open(cls, argument: str, model: str) -> Engine:
        given = dict(part.partition("=")[::2] for part in argument.split(",") if part)
        unknown = sorted(set(given) - set(DEFAULTS))
        asked = DEFAULTS | given
        legal = (asked["leak"] in LEAKS, asked["noise"] in NOISES, asked["on"] in PLACES)
        if unknown or not all(legal):
            raise UsageError("no such control", where="engine spec", got=repr(argument))
        engine = cls(asked)
        engine._library.seed(int(asked["seed"]))
        return engine

    @property
    def info(self) -> EngineInfo:
        offers = {Capability.GENERATE, Capability.SESSIONS, Capability.MEMORY}
        config = {"vocab_size": 1000, "context_length": 256}
        return EngineInfo("control", "1", "cpu", "none", "", "unknown", frozenset(offers), config)

    def pass_by(self, place: str) -> None:
        """One call of a path: the leak planted there happens if it is due."""
        if place == self._asked["on"]:
            self._passed[place] += 1
            due = self._passed[place] % self._every == 0
            self._library.work(self._noise, self._leak if due else 0, self._size)

    def generate(
        self,
        ids: Sequence[int],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        on_token: Callable[[int, float], bool | None] | None = None,
        **rest: Any,
    ) -> Generation:
        known = 0 < len(ids) <= 256 and all(0 <= i < 1000 for i in ids) and temperature >= 0.0
        if not known:
            self.pass_by("error")
            raise InvalidParameter("bad request", where="generate", got=len(ids))
        if self._asked["on"] != "success":
            self._library.work(self._noise, 0, 0)
        self._calls += 1
        if self._ring:
            self._cached = self._library.cache(self._calls, self._ring, int(self._asked["entry"]))
        if self._prompts:
            self._cached = self._library.cache(
                hash(tuple(ids)) & 0x7FFFFFFF, self._prompts, int(self._asked["entry"])
            )
        for token in range(max_tokens):
            if on_token is not None and on_token(token, -1.0) is False:
                self.pass_by("cancel")
                return Generation(tuple(range(token + 1)), (-1.0,) * (token + 1), "cancelled")
        self.pass_by("success")
        return Generation(tuple(range(max_tokens)), (-1.0,) * max_tokens, "length")

    def session(self, capacity: int | None = None) -> ControlSession:
        return ControlSession(self)

    def memory(self) -> Mapping[str, int]:
        if self._asked["tells"] == "constant":
            return {"cache": 4096, "sessions": 0}
        held = {"sessions": self.sessions}
        if (self._ring or self._prompts) and self._asked["tells"] == "yes":
            limit = max(self._ring, self._prompts) * int(self._asked["entry"])
            held |= {"cache": self._cached, "cache_limit": limit}
        return held

    def close(self) -> None:
        if self._model:
            forgets = self._asked["on"] == "load" and self._asked["leak"] != "none"
            self._library.unload(self._model, int(forgets))
            self._model = None
