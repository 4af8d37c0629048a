"""SentencePiece-style BPE: ids by merging the pair of highest score first."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np

from prill_runtime.gguf.vocabulary import PREFIX, TokenType
from prill_runtime.tokenizer.base import Tokenizer
from prill_runtime.tokenizer.vocabulary import Defaults, read_vocabulary

SPACE = "\u2581"


class SentencePieceTokenizer(Tokenizer, model="llama"):
    """`tokenizer.ggml.model` "llama": the SPM tokenizer of llama.cpp and the BPE model of SentencePiece.

    Spaces become U+2581, so a U+2581 in the text comes back as a space; nothing else is normalised. With
    `add_space_prefix` (default true) every stretch of text at the start or after a special token gets one
    space in front. Characters merge by the highest score of the merged token, the leftmost on ties. What
    no token spells goes to `<0xXX>` byte tokens, or, where one of its bytes has none, to the unk token: one
    for a run of such characters, and none where there is no unk. Control, unknown and byte tokens never come
    out of merging; UNUSED tokens take part in it, and are taken apart again at the end (as SentencePiece).

    Where the file is silent: bos 1, eos 2, unk 0, add_bos true and all scores 0, as llama.cpp.

    Raises:
        ModelFileError: what `read_vocabulary` raises.
    """

    def __init__(self, metadata: Mapping[str, Any], vocab_size: int | None = None) -> None:
        vocabulary = read_vocabulary(
            metadata, vocab_size, Defaults(bos_id=1, eos_id=2, unk_id=0, add_bos=True)
        )
        self._adopt(vocabulary)
        scores = metadata.get(PREFIX + "scores")
        given = np.zeros(self.vocab_size) if scores is None else np.asarray(scores)
        with np.errstate(over="ignore"):
            self._all_scores = given.astype(np.float32)  # (vocab,)
        self.strips_prefix = bool(metadata.get(PREFIX + "add_space_prefix", True))
        mergeable = vocabulary.of_type(TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
        values = self._all_scores.tolist()
        self._ids = {vocabulary.tokens[i]: i for i in mergeable if vocabulary.tokens[i]}
        self._scores = {token: values[i] for token, i in self._ids.items()}
        self._unused = {vocabulary.tokens[i] for i in vocabulary.of_type(TokenType.UNUSED)}
        self._bytes = {int(vocabulary.tokens[i][3:5], 16): i for i in vocabulary.of_type(TokenType.BYTE)}

    def unspelled_bytes(self) -> int:
        return 256 - len(self._bytes)

    def _encode_text(self, text: str) -> list[int | None]:
        prefix = " " if self.strips_prefix else ""
        ids: list[int | None] = []
        in_unknown_run = False
        for symbol in merge_by_score((prefix + text).replace(" ", SPACE), self._scores, self._unused):
            token_id = self._ids.get(symbol)
            if token_id is not None:
                ids.append(token_id)
                in_unknown_run = False
                continue
            fallback = [self._bytes.get(byte) for byte in symbol.encode()]
            in_bytes = [byte_id for byte_id in fallback if byte_id is not None]
            if len(in_bytes) == len(fallback):
                ids.extend(in_bytes)
                in_unknown_run = False
            elif not in_unknown_run:
                ids.append(self.vocabulary.unk_id)
                in_unknown_run = self.vocabulary.unk_id is not None
        return ids

    def _text(self, token: str) -> bytes:
        return token.replace(SPACE, " ").encode()

    def _decisive(self) -> list[object]:
        return [self.strips_prefix, self._all_scores.astype("<f4").tobytes().hex()]


def merge_by_score(text: str, scores: Mapping[str, float], unused: Container[str] = ()) -> Sequence[str]:
    """Merge neighbouring symbols, best score first, until no pair is a token; O(n log n).

    Args:
        text: characters to merge.
        scores: score of each token that may result; the highest goes first, the leftmost on ties.
        unused: tokens to take apart again, the way they were merged.
    """
    symbols = list(text)  # "" once merged into its left neighbour
    end = len(symbols)
    before, after = list(range(-1, end - 1)), list(range(1, end + 1))
    origin: dict[str, tuple[str, str]] = {}
    queue: list[tuple[float, int, int, int]] = []  # (-score, left, right, length of the merged token)
    for left in range(end - 1):
        merged = symbols[left] + symbols[left + 1]
        score = scores.get(merged)
        if score is not None:
            queue.append((-score, left, left + 1, 2))
            if merged in unused:
                origin[merged] = (symbols[left], symbols[left + 1])
    heapify(queue)
    while queue:
        _, left, right, length = heappop(queue)
        # Symbols only grow or vanish, so the length tells whether this is still the pair that was queued.
        if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != length:
            continue
        symbols[left] += symbols[right]
        symbols[right] = ""
        after[left] = after[right]
        if after[left] < end:
            before[after[left]] = left
        for first, second in ((before[left], left), (left, after[left])):
            if first < 0 or second >= end:
                continue
            merged = symbols[first] + symbols[second]
            score = scores.get(merged)
            if score is not None:
                heappush(queue, (-score, first, second, len(merged)))
                if merged in unused:
                    origin[merged] = (symbols[first], symbols[second])
    result = [symbol for symbol in symbols if symbol]
    return _take_apart(result, origin) if origin else result


def _take_apart(symbols: Sequence[str], origin: Mapping[str, tuple[str, str]]) -> list[str]:
    result = []
    todo = list(reversed(symbols))
    while todo:
        symbol = todo.pop()
        if symbol in origin:
            todo.extend(reversed(origin[symbol]))
        else:
            result.append(symbol)
    return result
