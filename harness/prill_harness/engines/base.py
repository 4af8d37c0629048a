"""The Engine protocol: the few calls by which prill uses any engine with one model loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any, ClassVar, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from prill_runtime.errors import MissingCapability
from prill_runtime.ops.protocol import Backend
from prill_runtime.run.generate import Generation
from prill_runtime.sampling.sampler import SamplingParams

__all__ = ["Capability", "Engine", "EngineInfo", "Generation", "Session"]

LOAD_PHASES = ("init", "module load", "upload and repack", "capture")


class Capability(StrEnum):
    """What an engine may offer; a check that needs something absent is inconclusive, never passed."""

    TOKENIZE = "tokenize"
    LOGITS = "logits"
    GENERATE = "generate"
    TRACE = "trace"
    REPLACE = "replace"
    MEMORY = "memory"
    SESSIONS = "sessions"
    BATCH = "batch"
    OPS = "ops"


@dataclass(frozen=True)
class EngineInfo:
    """What the engine says of itself.

    Attributes:
        arithmetic: "float64", "float32", "half", "int8" or "unknown"; it chooses the lane.
        config: the effective configuration that the engine reports, by the runtime's names.
        draws: "philox" if a seed gives the draws that the runtime's sampler makes of it, else "own".
    """

    name: str
    version: str
    device: str
    model: str
    model_sha256: str
    arithmetic: str
    capabilities: frozenset[Capability]
    config: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    draws: str = "philox"


class Session(ABC):
    """One sequence with its own cache."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Positions already in the cache."""

    @abstractmethod
    def feed(self, ids: Sequence[int]) -> NDArray[np.floating]:
        """Append ids; logits (len(ids), vocab) in the engine's own precision: row i predicts the token after
        ids[i]."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything; a reset session behaves like a new one."""

    @abstractmethod
    def close(self) -> None:
        """Release the cache."""


class Engine(ABC):
    """One loaded model. Subclasses register by declaration: `class NumPy(Engine, spec="numpy")`."""

    registry: ClassVar[dict[str, type[Engine]]] = {}

    def __init_subclass__(cls, spec: str | None = None, **rest: object) -> None:
        super().__init_subclass__(**rest)
        if spec is not None:
            Engine.registry[spec] = cls

    @classmethod
    def accepts(cls, argument: str) -> None:
        """Raise UsageError for an argument that `open` would refuse; nothing is opened."""

    @classmethod
    def fits(cls, argument: str, model: str) -> None:
        """Raise UsageError for a model that the engine of this argument cannot be asked about."""

    @classmethod
    def open(cls, argument: str, model: str) -> Engine:
        """Open `model` (a model spec); `argument` is what follows the colon of the engine spec."""
        raise NotImplementedError

    @property
    @abstractmethod
    def info(self) -> EngineInfo: ...

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        self._lacks(Capability.TOKENIZE)

    def detokenize(self, ids: Sequence[int]) -> bytes:
        self._lacks(Capability.TOKENIZE)

    def logits(self, ids: Sequence[int]) -> NDArray[np.floating]:
        """Logits (len(ids), vocab) in the precision the engine computes in; row i predicts the token after
        ids[i]."""
        self._lacks(Capability.LOGITS)

    def logits_batch(self, batch: Sequence[Sequence[int]]) -> list[NDArray[np.floating]]:
        """Logits of several prompts computed together, each (len(ids), vocab)."""
        self._lacks(Capability.BATCH)

    def generate(
        self,
        ids: Sequence[int],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        on_token: Callable[[int, float], bool | None] | None = None,
    ) -> Generation:
        """Continue ids; `on_token(id, logprob)` returning False cancels.

        An engine may take the six parameters of sampling as `**sampling`, for SamplingParams(**sampling).
        """
        self._lacks(Capability.GENERATE)

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        ignore_eos: bool = False,
        sampling: Sequence[SamplingParams] = (),
    ) -> list[Generation]:
        """Continuations of several prompts, computed together where the engine can (BATCH).

        Args:
            sampling: one for each prompt; all greedy when empty.
        """
        sampling = sampling or [SamplingParams()] * len(prompts)
        return [
            self.generate(ids, max_tokens=max_tokens, ignore_eos=ignore_eos, **asdict(drawn))
            for ids, drawn in zip(prompts, sampling, strict=True)
        ]

    def trace(
        self, ids: Sequence[int], replace: Mapping[str, NDArray[np.float64]] | None = None
    ) -> Iterator[tuple[str, NDArray[np.floating]]]:
        """(stage, array) in execution order; arrays are copies.

        Args:
            replace: arrays that replace the stages of these names for the rest of the pass, once captured;
                needs the capability REPLACE.
        """
        self._lacks(Capability.TRACE)

    def memory(self) -> Mapping[str, int]:
        """Bytes held now, by purpose."""
        self._lacks(Capability.MEMORY)

    def session(self, capacity: int | None = None) -> Session:
        """A new empty sequence; capacity in positions, the model's context length when None."""
        self._lacks(Capability.SESSIONS)

    def ops(self) -> Backend[Any]:
        """The engine's single ops, for checks of each against its float64 twin."""
        self._lacks(Capability.OPS)

    def phases(self) -> Mapping[str, float]:
        """Seconds that phases of opening took, by name (LOAD_PHASES); an engine may report only some.

        What an engine makes on its first request, such as a captured graph, it may report from then on.
        """
        return {}

    def copy_bandwidth(self) -> float | None:
        """Bytes per second, read and written, of one large copy in the memory the engine computes from,
        measured now; None: the engine does not measure it."""
        return None

    def close(self) -> None:
        """Release everything; calling it twice is harmless."""

    def _lacks(self, capability: Capability) -> NoReturn:
        raise MissingCapability(f"engine {self.info.name} does not offer {capability.value}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
