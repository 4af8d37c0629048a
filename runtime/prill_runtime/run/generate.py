"""Continue prompts: generated ids, their logprobs, and why each text ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from prill_runtime.errors import InvalidParameter
from prill_runtime.models.cache import KVCache
from prill_runtime.ops.protocol import Array
from prill_runtime.sampling.sampler import SamplingParams, sample
from prill_runtime.tokenizer.base import Tokenizer


class Predictor(Protocol):
    """The part of a Model that continuing a text needs."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def context_length(self) -> int: ...

    def new_cache(self, capacity: int) -> KVCache:
        """A cache for one sequence of so many positions."""
        ...

    def forward(self, batch: Sequence[tuple[KVCache, Sequence[int]]], *, last_only: bool) -> Sequence[Array]:
        """Append each sequence's new ids to its cache; its logits (row, vocab)."""
        ...


@dataclass(frozen=True)
class Generation:
    """What a model wrote.

    Attributes:
        ids: generated ids, without the end-of-generation id.
        logprobs: natural log-softmax of the raw logits at each id, before penalty and filters.
        finish_reason: "eos", "length", "stop", "context" or "cancelled".
        end_id: the end-of-generation id that ended the text; None where something else did.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    end_id: int | None = None


class StopStrings:
    """Finds strings in the bytes of a growing text, however they are split over tokens.

    Raises:
        InvalidParameter: a bare string, or one that is empty.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise InvalidParameter(
                "bad stop strings", where="stop", expected="non-empty strings", got=repr(stop)
            )
        self._wanted = [text.encode("utf-8", "surrogatepass") for text in stop]
        self._keep = max(map(len, self._wanted), default=1) - 1
        self._tail = b""

    def push(self, piece: bytes) -> bool:
        """Add bytes; whether a stop string ends within them. The cost does not grow with the text."""
        text = self._tail + piece
        self._tail = text[max(len(text) - self._keep, 0) :]
        return any(wanted in text for wanted in self._wanted)


def logprob(logits: Array, token: int) -> float:
    """log softmax(logits)[token] of one row (vocab,), in float64."""
    values = logits.astype(np.float64)
    top = values.max()
    return float(values[token] - top - np.log(np.exp(values - top).sum()))


class Writer:
    """One sequence being continued: run the ids in `feed` over `cache`, then `take` the last row of logits.

    Raises:
        InvalidParameter: max_tokens below 0, bad stop strings.
    """

    def __init__(
        self,
        model: Predictor,
        ids: Sequence[int],
        max_tokens: int,
        params: SamplingParams | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        on_token: Callable[[int, float], bool | None] | None = None,
        cache: KVCache | None = None,
    ) -> None:
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 0:
            raise InvalidParameter(
                "out of range", where="max_tokens", expected="an integer from 0", got=repr(max_tokens)
            )
        self.cache = cache or model.new_cache(max(1, min(model.context_length, len(ids) + max_tokens)))
        self.feed = self._history = [*ids]
        self._model, self._max_tokens, self._params = model, max_tokens, params or SamplingParams()
        self._stops, self._ignore_eos, self._on_token = StopStrings(stop), ignore_eos, on_token
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._end_id: int | None = None

    @property
    def history(self) -> Sequence[int]:
        """The prompt and the ids generated so far."""
        return self._history

    @property
    def remaining(self) -> int:
        """How many more ids max_tokens allows."""
        return self._max_tokens - len(self._ids)

    def spent(self) -> Generation | None:
        """The finished text if max_tokens allows no further id, else None."""
        return None if self.remaining else self._ended("length")

    def take(self, logits: Array) -> Generation | None:
        """Choose the next id from a row of logits (vocab,); returns the text once it has ended."""
        if (done := self.spent()) is not None:
            return done
        token = sample(logits, self._params, self.cache.position, self._history)
        return self.accept(token, logprob(logits, token))

    def accept(self, token: int, chosen: float) -> Generation | None:
        """Append an id chosen elsewhere, and its logprob; returns the text once it has ended."""
        if token in self._model.tokenizer.eog_ids and not self._ignore_eos:
            self._end_id = token
            return self._ended("eos")
        self._ids.append(token)
        self._history.append(token)
        self._logprobs.append(chosen)
        if self._on_token is not None and self._on_token(token, self._logprobs[-1]) is False:
            return self._ended("cancelled")
        if self._stops.push(self._model.tokenizer.piece(token)):
            return self._ended("stop")
        if len(self._ids) == self._max_tokens:
            return self._ended("length")
        if self.cache.length == self.cache.capacity:
            return self._ended("context")
        self.feed = [token]
        return None

    def _ended(self, reason: str) -> Generation:
        return Generation(tuple(self._ids), tuple(self._logprobs), reason, self._end_id)


def generate(
    model: Predictor,
    ids: Sequence[int],
    *,
    max_tokens: int,
    params: SamplingParams | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    on_token: Callable[[int, float], bool | None] | None = None,
    cache: KVCache | None = None,
) -> Generation:
    """Continue a prompt token by token.

    Args:
        ids: the prompt, or what follows the rows already in `cache`.
        params: greedy when None. A token is drawn at its position in the sequence, and the repetition
            penalty counts `ids` and what was generated.
        stop: the token that completes one of these texts is the last.
        on_token: called with each id and its logprob; False cancels.
        cache: continues this sequence; it then holds every generated id but the last.

    The last position of the context predicts one more token, which is generated and ends the text.
    A token costs the same at every position, except for the keys that attention reads and the ids that a
    repetition penalty looks at.

    Raises:
        ContextLengthExceeded: the prompt alone does not fit; nothing is written.
        InvalidParameter: no ids, an id outside the vocabulary, max_tokens below 0, bad stop strings.
        NotANumber: a stage that is not finite.
    """
    writer = Writer(model, ids, max_tokens, params, stop, ignore_eos, on_token, cache)
    while True:
        logits = model.forward([(writer.cache, writer.feed)], last_only=True)[0][-1]
        if (done := writer.take(logits)) is not None:
            return done


def generate_batch(
    model: Predictor,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    params: Sequence[SamplingParams] = (),
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
) -> list[Generation]:
    """As `generate`, for several prompts in one batch; a text that has ended leaves it.

    Args:
        params: one for each prompt; all greedy when empty.

    Raises:
        As `generate`; one prompt that cannot be continued fails them all.
    """
    params = params or [SamplingParams()] * len(prompts)
    writers = [
        Writer(model, ids, max_tokens, drawn, stop, ignore_eos)
        for ids, drawn in zip(prompts, params, strict=True)
    ]
    done: dict[int, Generation] = {}
    while live := [n for n in range(len(writers)) if n not in done]:
        batch = [(writers[n].cache, writers[n].feed) for n in live]
        for n, logits in zip(live, model.forward(batch, last_only=True), strict=True):
            if (ended := writers[n].take(logits[-1])) is not None:
                done[n] = ended
    return [done[n] for n in range(len(writers))]
