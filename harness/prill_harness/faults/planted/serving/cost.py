"""Faults of cost: every number is right, and what was done before is done again for every token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ONE, around, op

GENERATE = "prill_runtime.run.generate"
ACCEPT = f"{GENERATE}:Writer.accept"
PUSH = f"{GENERATE}:StopStrings.push"
TOKENIZER = "prill_runtime.tokenizer.base:Tokenizer"
CACHE = "prill_runtime.models.cache:KVCache"
MODEL = "prill_runtime.run.model:Model"
COST = ("cost",)


@fault(area="cost", blames=COST)
def cost_prefix_recomputed() -> Iterator[Patch]:
    """Every token runs the whole text through the model, as without a cache."""

    def changed(original: Any, self: Any, logits: Any) -> Any:
        done = original(self, logits)
        if done is None:
            self.cache.clear()
            self.feed = list(self.history)
        return done

    yield around(f"{GENERATE}:Writer.take", changed)


@fault(area="cost", blames=COST)
def cost_text_decoded_anew() -> Iterator[Patch]:
    """Every token decodes all that was written to look for stop strings."""

    def changed(original: Any, self: Any, token: int, chosen: float) -> Any:
        self._model.tokenizer.decode(self._history)
        return original(self, token, chosen)

    yield around(ACCEPT, changed)


@fault(area="cost", blames=COST)
def cost_text_tokenized_anew() -> Iterator[Patch]:
    """Every token tokenizes all that was written."""
    texts: dict[int, str] = {}

    def changed(original: Any, self: Any, token: int, chosen: float) -> Any:
        tokenizer = self._model.tokenizer
        text = texts.get(id(self), "") if self._ids else ""
        texts[id(self)] = text + tokenizer.piece(token).decode(errors="replace")
        tokenizer.encode(texts[id(self)])
        return original(self, token, chosen)

    yield around(ACCEPT, changed)


@fault(area="cost", blames=COST)
def cost_cache_copied() -> Iterator[Patch]:
    """Every layer of every token copies the keys and values that it reads."""

    def changed(original: Any, self: Any, layer: int) -> Any:
        keys, values = original(self, layer)
        return keys.copy(), values.copy()

    yield around(f"{CACHE}.view", changed)


@fault(area="cost", blames=COST)
def cost_history_walked() -> Iterator[Patch]:
    """Every token counts the ids before it one by one."""

    def changed(original: Any, logits: Any, params: Any, position: int, history: Any = ()) -> Any:
        seen: Counter[int] = Counter()
        for token in history:
            seen[token] += 1
        return original(logits, params, position, list(history))

    yield around(f"{GENERATE}:sample", changed)


@fault(area="cost", blames=COST)
def cost_sampler_sorts_for_each() -> Iterator[Patch]:
    """The penalty sorts the logits once for each id it has seen."""

    def changed(original: Any, logits: Any, params: Any, position: int, history: Any = ()) -> Any:
        if params.repetition_penalty != 1.0:
            for token in history:
                int(np.argsort(-logits)[0] == token)
        return original(logits, params, position, history)

    yield around(f"{GENERATE}:sample", changed)


@fault(area="cost", blames=COST)
def cost_logits_of_all_rows() -> Iterator[Patch]:
    """A prompt's logits are computed at all its positions, and those of the last one are used."""

    def changed(original: Any, self: Any, batch: Any, trace: Any = None, *, last_only: bool = False) -> Any:
        logits = original(self, batch, trace)
        return [rows[-1:] for rows in logits] if last_only else logits

    yield around(f"{MODEL}.forward", changed)


@fault(area="cost", blames=COST)
def cost_attention_twice() -> Iterator[Patch]:
    """Attention over a prompt is computed once more for its last rows."""

    def changed(original: Any, self: Any, q: Any, k: Any, v: Any, *, start: int, **rest: Any) -> Any:
        mixed = original(self, q, k, v, start=start, **rest)
        if len(q) > 1:
            half = len(q) // 2
            mixed[half:] = original(self, q[half:], k, v, start=start + half, **rest)
        return mixed

    yield op("attention", changed)


@fault(area="cost", blames=COST)
def cost_batch_padded() -> Iterator[Patch]:
    """The prompts of a batch are made as long as the longest, and what was computed too much is cut off."""

    def changed(original: Any, self: Any, batch: Any, trace: Any = None, *, last_only: bool = False) -> Any:
        longest = max(len(ids) for _, ids in batch)
        if len(batch) > 1 and not last_only:
            for _, ids in batch:
                pad = longest - len(ids)
                if pad:
                    original(self, [(self.new_cache(pad), [ids[-1]] * pad)])
        return original(self, batch, trace, last_only=last_only)

    yield around(f"{MODEL}.forward", changed)


@fault(area="cost", blames=COST)
def cost_session_feeds_all() -> Iterator[Patch]:
    """A session that is fed runs what it was fed before through the model again."""
    told: dict[int, list[int]] = {}

    def changed(original: Any, self: Any, ids: Any) -> Any:
        before = told.get(id(self), []) if self.length else []
        if before and len(before) == self.length:
            self._model.forward([(self._model.new_cache(len(before)), before)])
        told[id(self)] = [*before, *ids]
        return original(self, ids)

    yield around("prill_harness.engines.embedded:EmbeddedSession.feed", changed)


@fault(area="cost", blames=COST)
def cost_square_mask() -> Iterator[Patch]:
    """Attention over a prompt makes a mask of all its rows and keys for every layer and head."""

    def changed(original: Any, self: Any, q: Any, k: Any, v: Any, **rest: Any) -> Any:
        rows, heads, _ = q.shape
        mask = np.zeros((4 * heads, rows, k.shape[1]), np.float64)
        return original(self, q, k, v, **rest) + mask[0, 0, 0]

    yield op("attention", changed)


@fault(area="cost", blames=COST, models=ONE)
def cost_merges_scan_all() -> Iterator[Patch]:
    """Every fourth symbol of a text is looked for among all of them."""

    def merged(original: Any, text: str, *rest: Any) -> Any:
        symbols = original(text, *rest)
        for symbol in symbols[::4]:
            sum(other == symbol for other in symbols)
        return symbols

    yield around("prill_runtime.tokenizer.spm:merge_by_score", merged)


@fault(area="cost", blames=COST)
def cost_suffixes_tokenized() -> Iterator[Patch]:
    """A text is tokenized again from every sixteenth of its characters on."""

    def changed(original: Any, self: Any, text: str) -> Any:
        for at in range(16, len(text), 16):
            original(self, text[at:])
        return original(self, text)

    yield around("prill_runtime.tokenizer.spm:SentencePieceTokenizer._encode_text", changed)
    yield around("prill_runtime.tokenizer.bpe:ByteLevelTokenizer._encode_text", changed)


@fault(area="cost", blames=COST, models=ONE)
def cost_text_searched_for_each() -> Iterator[Patch]:
    """Every tenth symbol of a text is counted in all of it."""

    def merged(original: Any, text: str, *rest: Any) -> Any:
        for at in range(0, len(text), 10):
            text.count(text[at])
        return original(text, *rest)

    yield around("prill_runtime.tokenizer.spm:merge_by_score", merged)


@fault(area="cost", blames=COST)
def cost_text_joined_anew() -> Iterator[Patch]:
    """Decoding begins anew with every sixteenth id."""

    def decode(original: Any, self: Any, ids: Any, *, continuation: bool = False) -> Any:
        for count in range(16, len(ids), 16):
            original(self, ids[:count], continuation=continuation)
        return original(self, ids, continuation=continuation)

    yield around(f"{TOKENIZER}.decode", decode)


@fault(area="cost", blames=COST)
def cost_stream_decodes_prefix() -> Iterator[Patch]:
    """A stream decodes all its ids again for every one that arrives."""

    def changed(original: Any, self: Any, token: int) -> str:
        ids = self.__dict__.setdefault("ids", [])
        ids.append(token)
        self._reader._tokenizer.decode(ids)
        return str(original(self, token))

    yield around("prill_runtime.tokenizer.base:TextStream.push", changed)


@fault(area="cost", blames=COST)
def cost_stop_searches_text() -> Iterator[Patch]:
    """A stop string is looked for in all that was written."""

    def changed(original: Any, self: Any, piece: bytes) -> bool:
        self._tail += piece
        return any(wanted in self._tail for wanted in self._wanted)

    yield around(PUSH, changed)


@fault(area="cost", blames=COST)
def cost_stop_keeps_text() -> Iterator[Patch]:
    """A stop string is looked for in a buffer that only grows, without a copy of it."""

    def changed(original: Any, self: Any, piece: bytes) -> bool:
        text = self.__dict__.setdefault("text", bytearray())
        text += piece
        return any(wanted in text for wanted in self._wanted)

    yield around(PUSH, changed)


@fault(area="cost", blames=COST)
def cost_stop_searches_buffer() -> Iterator[Patch]:
    """A stop string is looked for from the start of a buffer in which all text has room."""

    def changed(original: Any, self: Any, piece: bytes) -> bool:
        text, end = self.__dict__.setdefault("buffer", (bytearray(1 << 16), [0]))
        text[end[0] : end[0] + len(piece)] = piece
        end[0] += len(piece)
        return any(text.find(wanted, 0, end[0]) >= 0 for wanted in self._wanted)

    yield around(PUSH, changed)


@fault(area="cost", blames=COST)
def cost_ids_searched() -> Iterator[Patch]:
    """Every token is looked for among all ids before it."""

    def changed(original: Any, self: Any, token: int, chosen: float) -> Any:
        self._history.count(token)
        return original(self, token, chosen)

    yield around(ACCEPT, changed)


@fault(area="cost", blames=COST)
def cost_cache_rest_cleared() -> Iterator[Patch]:
    """Every layer of every token clears the rows of the cache behind its own."""

    def changed(original: Any, self: Any, layer: int, k: Any, v: Any) -> None:
        original(self, layer, k, v)
        end = self.length + self._pending[layer]
        self._keys[layer, :, end:] = 0

    yield around(f"{CACHE}.append", changed)


@fault(area="cost", blames=COST)
def cost_square_mask_for_each() -> Iterator[Patch]:
    """Every layer of every token makes a mask of all positions by all positions."""

    def attention(original: Any, self: Any, q: Any, k: Any, v: Any, **rest: Any) -> Any:
        mask = np.ones((k.shape[1], k.shape[1]), np.bool_)
        return original(self, q, k, v, **rest) + (0 if mask[-1, -1] else 1)

    yield op("attention", attention)
