"""Texts, a tokenizer and a context in; the prompts of a golden out, for any vocabulary and any context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from prill_runtime.errors import InvalidParameter
from prill_runtime.tokenizer.base import Tokenizer

TRIED_TEXTS = 400  # texts made up of the vocabulary's own tokens
POSITIONS_LEFT = 300  # positions that a prompt longer than half of the context has to leave
LONGEST_TEXT = 16  # ids of such a text
Prompt = tuple[str, list[int]]


def choose(tokenizer: Tokenizer, texts: Sequence[str], context: int) -> list[Prompt]:
    """As many prompts as there are texts, no two of the same ids, each at most half of the context long, or
    as much more as leaves LEFT positions.

    Texts that do not fit, or that the vocabulary cannot spell, give way to texts made up of its own tokens.
    Fewer come back where there are no more, and none at all where no text can be spelled.
    """
    room, found = max(context // 2, context - POSITIONS_LEFT), dict[tuple[int, ...], str]()
    for text in (*texts, *_made_up(tokenizer, min(room, LONGEST_TEXT))):
        if len(found) == len(texts):
            break
        ids = spelled(tokenizer, text)
        if ids is not None and 0 < len(ids) <= room:
            found.setdefault(tuple(ids), text)
    return [(text, list(ids)) for ids, text in found.items()]


def given(vocabulary: int, count: int, context: int) -> list[Prompt]:
    """Prompts without a text: ids for a vocabulary that spells none."""
    random = Random(0)
    longest = min(context // 2, LONGEST_TEXT)
    ids = ([random.randrange(vocabulary) for _ in range(1 + n % max(longest, 1))] for n in range(count))
    return [("", list(each)) for each in dict.fromkeys(map(tuple, ids))] if longest else []


def spelled(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """The ids of a text; None where the vocabulary has none for it."""
    try:
        return tokenizer.encode(text)
    except InvalidParameter:
        return None


def _made_up(tokenizer: Tokenizer, longest: int) -> Iterator[str]:
    """Texts that random ids stand for: as they are shown, and as the file spells them, special ones too."""
    random = Random(0)
    yield ""  # begins with BOS where the file asks for it
    for n in range(TRIED_TEXTS):
        ids = [random.randrange(tokenizer.vocab_size) for _ in range(1 + n // 2 % max(longest, 1))]
        shown = tokenizer.decode(ids).decode("utf-8", "ignore")
        yield shown if n % 2 else "".join(tokenizer.name(token) for token in ids)
