"""Faults of tokenizers that no trained vocabulary shows: overlaps, ties, and pieces of several spaces."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify
from typing import Any

from prill_harness.faults.planted.serving.tokenizer import BLAMES, SPM_FILE
from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import around

BASE = "prill_runtime.tokenizer.base"
SPM = "prill_runtime.tokenizer.spm"
AREA = "tokenizer"
SPACE = "\u2581"
Entry = tuple[float, int, int, int]  # of the queue of merges: minus the score, left, right, length


@fault(area=AREA, blames=BLAMES, models=SPM_FILE)
def ties_to_the_right() -> Iterator[Patch]:
    """Of pairs with equal scores the rightmost merges first."""

    def heappop(original: Any, queue: list[Entry]) -> Entry:
        best = min(queue, key=lambda entry: (entry[0], -entry[1]))
        queue.remove(best)
        heapify(queue)
        return best

    yield around(f"{SPM}:heappop", heappop)


@fault(area=AREA, blames=BLAMES, models=SPM_FILE)
def specials_in_order_of_ids() -> Iterator[Patch]:
    """Special tokens are cut out of a text in the order of their ids, not the longest first."""

    def adopt(original: Any, self: Any, vocabulary: Any) -> None:
        original(self, vocabulary)
        self._special.sort()

    yield around(f"{BASE}:Tokenizer._adopt", adopt)


@fault(area=AREA, blames=BLAMES, models=SPM_FILE)
def specials_from_the_left() -> Iterator[Patch]:
    """The special token that begins first is cut out first, of those that begin there the longest."""

    def partition(original: Any, self: Any, text: str, parse_special: bool) -> Iterator[int | str]:
        wanted = [(i, self.vocabulary.tokens[i]) for i in self._special]
        wanted = [(i, token) for i, token in wanted if parse_special or self._is_user_defined(i)]
        plain, at = "", 0
        while at < len(text):
            found = next(((i, token) for i, token in wanted if text.startswith(token, at)), None)
            if found is None:
                plain, at = plain + text[at], at + 1
                continue
            if plain:
                yield plain
            yield found[0]
            plain, at = "", at + len(found[1])
        if plain:
            yield plain

    yield around(f"{BASE}:Tokenizer._partition", partition)


@fault(area=AREA, blames=BLAMES, models=SPM_FILE)
def runs_of_spaces_apart() -> Iterator[Patch]:
    """A run of three spaces or more never becomes one piece."""

    def merge(original: Any, text: str, scores: Any, *rest: Any) -> Any:
        kept = {token: score for token, score in scores.items() if SPACE * 3 not in token}
        return original(text, kept, *rest)

    yield around(f"{SPM}:merge_by_score", merge)


@fault(area=AREA, blames=BLAMES, models=SPM_FILE)
def all_spaces_of_prefix_stripped() -> Iterator[Patch]:
    """Of a first piece of several spaces all are taken for the one that encoding added."""

    def read(original: Any, self: Any, token_id: int) -> bytes:
        first, piece = self._at_prefix, original(self, token_id)
        return bytes(piece.lstrip(b" ") if first and token_id not in self._tokenizer._control else piece)

    yield around(f"{BASE}:_PieceReader.read", read)


@fault(area=AREA, blames=BLAMES, models=("fixture:gpt-oss-tiny",))
def harmony_token_split() -> Iterator[Patch]:
    """The marks of a channel and of a message are split into pieces like any text."""

    def adopt(original: Any, self: Any, vocabulary: Any) -> None:
        original(self, vocabulary)
        marks = ("<|channel|>", "<|message|>")
        self._special = [i for i in self._special if vocabulary.tokens[i] not in marks]

    yield around(f"{BASE}:Tokenizer._adopt", adopt)
