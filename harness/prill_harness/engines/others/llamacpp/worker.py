"""A model on libllama, as the child process of `llamacpp:` has it.

    python -m prill_harness.engines.others.llamacpp.worker LIBRARY CONTEXT float32|half

answers the JSON lines of `channels/lines.py`. Logits, ids, draws and stages are libllama's; the loop that
asks for one token after another, and ends a text, is the runtime's.
"""

from __future__ import annotations

import ctypes as c
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.channels.worker import main
from prill_harness.engines.others.llamacpp.library import F32, LOG, LibLlama, Params
from prill_harness.engines.others.llamacpp.mixture import by_expert
from prill_harness.engines.others.llamacpp.tap import Shown, Tap, joined
from prill_runtime.errors import (
    ContextLengthExceeded,
    EngineError,
    InvalidParameter,
    MissingCapability,
)
from prill_runtime.run.generate import Writer, logprob
from prill_runtime.sampling.sampler import SamplingParams

BATCH = 512  # positions of one pass
BEST = 64  # ids whose logprobs are told beside each token
RANDOM_SEED = (1 << 32) - 1  # LLAMA_DEFAULT_SEED: choose one
WARNING, ERROR = 3, 4  # of enum ggml_log_level
FLASH = "FLASH_ATTN_EXT"
Array = NDArray[np.floating]


@dataclass
class Place:
    """How far a sequence has come, as a writer of texts asks."""

    capacity: int
    length: int = 0

    @property
    def position(self) -> int:
        return self.length


class Ends:
    """The ids that end a text, by the library."""

    def __init__(self, is_end: Callable[[int], bool]) -> None:
        self._is_end = is_end

    def __contains__(self, token: object) -> bool:
        return isinstance(token, int) and self._is_end(token)


class Llama:
    """One model and one context; each call begins with an empty cache.

    Args:
        context: positions; 0: as many as the model was trained with.
        arithmetic: "float32": caches of float32 and no flash attention; "half": the library's own defaults.
    """

    name, device = "libllama", "cpu"

    def __init__(self, library: LibLlama, model: str, context: int, arithmetic: str) -> None:
        self._library, self._exact = library, arithmetic == "float32"
        self._said: list[str] = []
        self.version = library.version
        self._model: int | None = None
        self._context: int | None = None
        self._batch = library.llama_batch_init(BATCH, 0, 1)
        self._log = LOG(self._hear)
        library.llama_log_set(self._log, None)
        library.llama_backend_init()
        params, self._no_gpu = library.llama_model_default_params(), (c.c_void_p * 1)(None)
        self._set(params, 0, c.addressof(self._no_gpu))
        self._model = library.llama_model_load_from_file(os.fsencode(model), params)
        if not self._model:
            raise EngineError("libllama does not load the model", where=model, got=self._reason())
        self._vocab = library.llama_model_get_vocab(self._model)
        self._size = int(library.llama_vocab_n_tokens(self._vocab))
        self._asked = context or int(library.llama_model_n_ctx_train(self._model))
        self._context = self._opened()
        # The library rounds the context up, also past the positions that a model has.
        self._positions = min(self._asked, int(library.llama_n_ctx(self._context)))
        self._proved()
        self.tokenizer, self.context_length = self, self._positions  # of generate.Predictor
        self.eog_ids = Ends(lambda token: bool(library.llama_vocab_is_eog(self._vocab, token)))

    @property
    def config(self) -> dict[str, int]:
        """What the library says of the model, by the runtime's names."""
        ask = self._library
        return {
            "vocab_size": self._size,
            "n_layers": ask.llama_model_n_layer(self._model),
            "width": ask.llama_model_n_embd(self._model),
            "n_heads": ask.llama_model_n_head(self._model),
            "n_kv_heads": ask.llama_model_n_head_kv(self._model),
            "context_length": ask.llama_model_n_ctx_train(self._model),
            "served_context": self._positions,
        }

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        data = text.encode("utf-8", "surrogateescape")
        room = (c.c_int32 * (len(data) + 8))()
        count = self._library.llama_tokenize(self._vocab, data, len(data), room, len(room), add_special, True)
        if not 0 <= count <= len(room):
            raise EngineError(f"llama_tokenize returns {count}", expected=f"0 to {len(room)}")
        return list(room[:count])

    def detokenize(self, ids: Sequence[int]) -> bytes:
        given = (c.c_int32 * len(ids))(*self._checked(ids))
        return self._filled(
            lambda room, size: self._library.llama_detokenize(
                self._vocab, given, len(given), room, size, False, False
            )
        )

    def piece(self, token: int) -> bytes:
        return self._filled(
            lambda room, size: self._library.llama_token_to_piece(self._vocab, token, room, size, 0, False)
        )

    def logits(self, ids: Sequence[int]) -> Array:
        self._forget(self._context)
        return np.concatenate([rows for _, rows in self._run(self._context, ids, 0, whole=True)])

    def generate(
        self,
        ids: Sequence[int],
        max_tokens: int,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        on_token: Callable[[int, float], bool | None] | None = None,
        **sampling: Any,
    ) -> dict[str, Any]:
        """Drawn by the library's samplers in the runtime's order; `top` has the best ids' logprobs."""
        params = SamplingParams(**sampling)
        if params.temperature and params.seed >= RANDOM_SEED:
            raise MissingCapability("llama.cpp has seeds of 32 bits, the last of which means any")
        if params.repetition_penalty != 1 and not self._library.penalises():
            raise MissingCapability("the library's penalties are not understood")
        place: Any = Place(self._positions)
        model: Any = self
        writer = Writer(model, ids, max_tokens, params, stop, ignore_eos, on_token, place)
        top: list[list[tuple[int, float]]] = []
        self._forget(self._context)
        sampler = self._sampler(params)
        try:
            for token in ids if params.repetition_penalty != 1 else ():
                self._library.llama_sampler_accept(sampler, token)
            while True:
                *_, (_, rows) = self._run(self._context, writer.feed, place.length, whole=False)
                place.length += len(writer.feed)
                done = writer.spent()
                if done is None:
                    token = self._library.llama_sampler_sample(sampler, self._context, -1)
                    done = writer.accept(token, logprob(rows[-1], token))
                    best = np.argsort(-rows[-1], kind="stable")[:BEST]
                    top.append([(int(each), logprob(rows[-1], each)) for each in best])
                if done is not None:
                    return {**asdict(done), "top": top[: len(done.ids)]}
        finally:
            self._library.llama_sampler_free(sampler)

    def trace(self, ids: Sequence[int]) -> list[Shown]:
        """Each tensor with a row for each position: `NAME = OP(SOURCES)`, rows (len(ids), …)."""
        return list(by_expert(joined(self._seen(ids)[0])))

    def close(self) -> None:
        for free, what in (
            (self._library.llama_free, self._context),
            (self._library.llama_model_free, self._model),
        ):
            if what:
                free(what)
        if self._model:
            self._library.llama_batch_free(self._batch)
        self._context = self._model = None

    def _seen(self, ids: Sequence[int]) -> tuple[list[list[Shown]], Tap]:
        """What is shown of each stretch, in a context that is there for it alone."""
        tap = Tap(self._library)
        context = self._opened(tap)
        chunks = []
        try:
            for _ in self._run(context, ids, 0, whole=True, tap=tap):
                chunks.append(tap.found)
                tap.found = []
        finally:
            self._library.llama_free(context)
        return chunks, tap

    def _proved(self) -> None:
        """What was written into the params struct is what the library does.

        Raises:
            UsageError: it is not.
        """
        ask, context = self._library, self._context
        batch = min(BATCH, self._asked)
        got = [ask.llama_n_batch(context), ask.llama_n_ubatch(context), ask.llama_n_threads(context)]
        chunks, tap = self._seen([0])
        differs = got != [batch, batch, threads()] or ask.llama_n_ctx(context) < self._asked
        if differs or not chunks[0] or (self._exact and (tap.caches != {F32} or FLASH in tap.ops)):
            raise ask.refused(
                "its context is not what was asked for, so its params structs are not understood",
                expected=f"batches of {batch}, {threads()} threads, float32 caches, no {FLASH}, tensors",
                got=f"{got}, cache types {sorted(tap.caches)}, {len(chunks[0])} tensors",
            )  # fmt: skip

    def _opened(self, tap: Tap | None = None) -> int:
        """A new context."""
        params, at = self._library.llama_context_default_params(), self._library.layout
        batch = min(BATCH, self._asked)
        params.words[0], params.words[1], params.words[2] = self._asked, batch, batch
        params.words[at.threads] = params.words[at.threads + 1] = threads()
        if self._exact:
            params.words[at.types] = params.words[at.types + 1] = F32
            if at.flash is not None:
                params.words[at.flash] = 0
        if tap is not None:
            self._set(params, at.eval, c.cast(tap.callback, c.c_void_p).value or 0)
        context: int | None = self._library.llama_init_from_model(self._model, params)
        if not context:
            raise EngineError("libllama opens no context", got=self._reason())
        return context

    @staticmethod
    def _set(params: Params, word: int, address: int) -> None:
        params.words[word], params.words[word + 1] = address & 0xFFFFFFFF, address >> 32

    def _forget(self, context: int | None) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(context), True)

    def _checked(self, ids: Sequence[int]) -> list[int]:
        """Ids as 32 bits hold them; whether the vocabulary has them is for the library to say."""
        if wrong := next((each for each in ids if not -(1 << 31) <= each < 1 << 31), None):
            raise InvalidParameter("id outside the vocabulary", expected=f"0 to {self._size - 1}", got=wrong)
        return list(ids)

    def _run(
        self, context: int | None, ids: Sequence[int], begin: int, *, whole: bool, tap: Tap | None = None
    ) -> Iterator[tuple[int, Array]]:
        """(first position, logits (rows, vocabulary)) of each stretch, or of its last position alone."""
        if not ids:
            raise InvalidParameter("no ids", expected="one at least", got="none")
        if begin + len(ids) > self._positions:
            raise ContextLengthExceeded(f"{begin + len(ids)} positions of {self._positions} asked for")
        ids = self._checked(ids)
        room = self._batch
        for first in range(0, len(ids), BATCH):
            part = ids[first : first + BATCH]
            room.count = len(part)
            for at, token in enumerate(part):
                room.token[at], room.pos[at] = token, begin + first + at
                room.sequences[at], room.sequence[at][0] = 1, 0
                room.logits[at] = whole or at == len(part) - 1
            if tap is not None:
                tap.count = len(part)
            said = self._library.llama_decode(context, room)
            if tap is not None and tap.error is not None:
                raise tap.error
            if said == 1:
                raise ContextLengthExceeded(f"no room for {begin + first + len(part)} positions")
            if said:
                kind = InvalidParameter if said == -1 else EngineError
                raise kind(f"llama_decode returns {said}", got=self._reason())
            rows = len(part) if whole else 1
            logits = np.ctypeslib.as_array(self._library.llama_get_logits(context), (rows, self._size))
            yield first, logits.copy()

    def _sampler(self, params: SamplingParams) -> int:
        ask = self._library
        chain = ask.llama_sampler_chain_init(ask.llama_sampler_chain_default_params())

        def add(sampler: int) -> None:
            ask.llama_sampler_chain_add(chain, sampler)

        if params.repetition_penalty != 1:
            add(ask.penalties(max(self._size, self._positions), params.repetition_penalty))
        if not params.temperature:
            add(ask.llama_sampler_init_greedy())
            return int(chain)
        add(ask.llama_sampler_init_temp(params.temperature))
        if params.top_k:
            add(ask.llama_sampler_init_top_k(min(params.top_k, self._size)))
        if params.top_p < 1:
            add(ask.llama_sampler_init_top_p(params.top_p, 1))
        if params.min_p > 0:
            add(ask.llama_sampler_init_min_p(params.min_p, 1))
        add(ask.llama_sampler_init_dist(params.seed))
        return int(chain)

    def _filled(self, call: Callable[[Any, int], int]) -> bytes:
        """What a call writes into a room; it returns minus the size where that is too small."""
        room = c.create_string_buffer(4096)
        if (size := call(room, len(room))) < 0:
            room = c.create_string_buffer(-size)
            size = call(room, len(room))
        return room.raw[: max(size, 0)]

    def _hear(self, level: int, text: bytes, _: Any) -> None:
        if level >= WARNING:
            sys.stderr.write(text.decode("utf-8", "replace"))
        if level == ERROR:
            self._said.append(text.decode("utf-8", "replace").strip())

    def _reason(self) -> str:
        """The first of the errors that were logged since the last time, which names the cause."""
        said, self._said = self._said, []
        return said[0] if said else "no reason"


def threads() -> int:
    """As many as there are processors for this process, or as OMP_NUM_THREADS says."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(here, int(said)) if said.isdigit() and int(said) else here


if __name__ == "__main__":
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # which would call a debugger when it aborts
    at, positions, kind = sys.argv[1:]
    main(lambda model: Llama(LibLlama(Path(at)), model, int(positions), kind), "libllama")
