"""The runtime's NumPy engine, in float32 (under test) and float64 (the oracle)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal
from weakref import WeakSet

import numpy as np
import psutil  # type: ignore[import-untyped]
from numpy.typing import NDArray

from prill_harness.engines.base import Capability, Engine, EngineInfo, Session
from prill_harness.engines.models import resolve_model
from prill_harness.version import version
from prill_runtime.errors import EngineError, UsageError
from prill_runtime.models.cache import KVCache
from prill_runtime.ops.protocol import Backend
from prill_runtime.run.model import Generation, Model, generate, generate_batch
from prill_runtime.sampling.sampler import SamplingParams


class EmbeddedSession(Session):
    """One sequence of an embedded model, with a cache of its own."""

    def __init__(self, model: Model, capacity: int | None) -> None:
        self._model = model
        self._cache: KVCache | None = model.new_cache(capacity)

    @property
    def cache(self) -> KVCache:
        """Raises EngineError once the session is closed."""
        if self._cache is None:
            raise EngineError("session is closed", expected="an open session", hint="open a new one")
        return self._cache

    @property
    def nbytes(self) -> int:
        return 0 if self._cache is None else array_bytes(self._cache)

    @property
    def length(self) -> int:
        return self.cache.length

    def feed(self, ids: Sequence[int]) -> NDArray[np.floating]:
        return self._model.forward([(self.cache, ids)])[0]

    def reset(self) -> None:
        self.cache.clear()

    def close(self) -> None:
        self._cache = None


class Embedded(Engine):
    """The runtime's Model behind the engine protocol; subclasses fix the arithmetic."""

    dtype: ClassVar[Literal["float32", "float64"]]
    # The runtime's loop for this kind of model.
    _continue: ClassVar[Callable[..., Generation]] = staticmethod(generate)

    def __init__(self, model: Model, spec: str) -> None:
        self._model: Model | None = model
        self._sessions: WeakSet[EmbeddedSession] = WeakSet()
        self._info = EngineInfo(
            name=f"numpy-{self.dtype}",
            version=version(),
            device="cpu",
            model=spec,
            model_sha256=model.sha256,
            arithmetic=self.dtype,
            capabilities=frozenset(Capability),
            config=dict(model.config),
        )

    @classmethod
    def accepts(cls, argument: str) -> None:
        if argument:
            raise UsageError("this engine takes no argument", where="engine spec", got=repr(argument))

    @classmethod
    def open(cls, argument: str, model: str) -> Engine:
        cls.accepts(argument)
        return cls(Model.load(resolve_model(model), dtype=cls.dtype), model)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def model(self) -> Model:
        """The runtime's model. Raises EngineError once the engine is closed."""
        if self._model is None:
            raise EngineError("engine is closed", expected="an open engine", hint="open it again")
        return self._model

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        return self.model.tokenizer.encode(text, add_special=add_special)

    def detokenize(self, ids: Sequence[int]) -> bytes:
        return self.model.tokenizer.decode(ids)

    def logits(self, ids: Sequence[int]) -> NDArray[np.floating]:
        return self.logits_batch([ids])[0]

    def logits_batch(self, batch: Sequence[Sequence[int]]) -> list[NDArray[np.floating]]:
        return list(self.model.forward([(self._cache_for(ids), ids) for ids in batch]))

    def decoded_logits(
        self, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
    ) -> list[NDArray[np.floating]]:
        """Logits (vocab,) behind each prompt and its text: the prompts as one batch, then their texts token
        by token; a prompt whose text is over leaves the batch."""
        caches = [self.model.new_cache(len(i) + len(t)) for i, t in zip(prompts, texts, strict=True)]
        rows: list[NDArray[np.floating]] = [np.empty(0)] * len(prompts)
        for step in range(max(map(len, texts)) + 1):
            live = [number for number, text in enumerate(texts) if len(text) >= step]
            fresh = [[texts[number][step - 1]] if step else prompts[number] for number in live]
            batch = [(caches[number], ids) for number, ids in zip(live, fresh, strict=True)]
            for number, logits in zip(live, self.model.forward(batch, last_only=True), strict=True):
                rows[number] = logits[-1]
        return rows

    def generate(
        self,
        ids: Sequence[int],
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        on_token: Callable[[int, float], bool | None] | None = None,
        **sampling: Any,
    ) -> Generation:
        return self._continue(
            self.model,
            ids,
            max_tokens=max_tokens,
            params=SamplingParams(**sampling),
            stop=stop,
            ignore_eos=ignore_eos,
            on_token=on_token,
        )

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        ignore_eos: bool = False,
        sampling: Sequence[SamplingParams] = (),
    ) -> list[Generation]:
        return generate_batch(
            self.model, prompts, max_tokens=max_tokens, params=sampling, ignore_eos=ignore_eos
        )

    def trace(
        self, ids: Sequence[int], replace: Mapping[str, NDArray[np.float64]] | None = None
    ) -> Iterator[tuple[str, NDArray[np.floating]]]:
        stages: list[tuple[str, NDArray[np.floating]]] = []

        def keep(stage: str, array: NDArray[np.floating]) -> NDArray[np.floating] | None:
            stages.append((stage, array))
            return None if replace is None else replace.get(stage)

        self.model.forward([(self._cache_for(ids), ids)], trace=keep)
        return iter(stages)

    def memory(self) -> Mapping[str, int]:
        """Bytes now: `weights` and `cache` are the arrays actually held, `process` is this process's resident
        anonymous memory (RssAnon on Linux, the unique set elsewhere)."""
        return {
            "weights": 0 if self._model is None else array_bytes(self._model.wired),
            "cache": sum(session.nbytes for session in self._sessions),
            "process": anonymous_bytes(),
        }

    def session(self, capacity: int | None = None) -> EmbeddedSession:
        session = EmbeddedSession(self.model, capacity)
        self._sessions.add(session)
        return session

    def ops(self) -> Backend[Any]:
        return self.model.backend

    def close(self) -> None:
        for session in list(self._sessions):
            session.close()
        self._sessions.clear()
        if self._model is not None:
            self._model.close()
            self._model = None

    def _cache_for(self, ids: Sequence[int]) -> KVCache:
        """A cache as large as this call needs; `forward` refuses more ids than the context holds."""
        return self.model.new_cache(max(1, min(len(ids), self.model.context_length)))


class NumPy(Embedded, spec="numpy"):
    """The engine under test: NumPy in float32."""

    dtype = "float32"


class NumPy64(Embedded, spec="numpy64"):
    """The oracle: the same forward pass in float64."""

    dtype = "float64"


def array_bytes(root: object) -> int:
    """Bytes of the distinct arrays reachable from an object through its attributes and containers."""
    seen: set[int] = set()
    pending, total = [root], 0
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, np.ndarray):
            if isinstance(item.base, np.ndarray):
                pending.append(item.base)
            else:
                total += item.nbytes
        elif isinstance(item, Mapping):
            pending.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            pending.extend(item)
        elif type(item).__module__.startswith("prill_runtime"):
            pending.extend(getattr(item, "__dict__", {}).values())
            slots = (name for cls in type(item).__mro__ for name in getattr(cls, "__slots__", ()))
            pending.extend(getattr(item, name) for name in slots if hasattr(item, name))
    return total


def anonymous_bytes() -> int:
    """Resident anonymous memory of this process; read without the buffers of a text file."""
    try:
        status = os.open("/proc/self/status", os.O_RDONLY)
    except OSError:
        return int(psutil.Process().memory_full_info().uss)
    try:
        lines = os.read(status, 8192).splitlines()
    finally:
        os.close(status)
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(b"RssAnon:")]
    return found[0] if found else int(psutil.Process().memory_full_info().uss)
