"""Choose a golden's prompts, for any vocabulary and any context length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from prill_runtime.errors import InvalidParameter
from prill_runtime.tokenizer.base import Tokenizer

TRIED_TEXTS = 400  # texts made up of the vocabulary's own tokens
POSITIONS_LEFT = 300  # that a prompt longer than half of the context must leave free
LONGEST_TEXT = 16  # ids of a made-up text
Prompt = tuple[str, list[int]]


def choose(tokenizer: Tokenizer, texts: Sequence[str], context: int) -> list[Prompt]:
    """As many prompts as there are texts, all with different ids, each at most half of the context long, or
    longer if it leaves POSITIONS_LEFT.

    Texts that do not fit, or that the vocabulary cannot spell, are replaced by texts made up of its own
    tokens. Fewer are returned if no more can be found, and none if no text can be spelled.
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
    """Prompts without a text: plain ids, for a vocabulary that can spell none."""
    random = Random(0)
    longest = min(context // 2, LONGEST_TEXT)
    ids = ([random.randrange(vocabulary) for _ in range(1 + n % max(longest, 1))] for n in range(count))
    return [("", list(each)) for each in dict.fromkeys(map(tuple, ids))] if longest else []


def spelled(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """The ids of a text; None if the vocabulary cannot spell it."""
    try:
        return tokenizer.encode(text)
    except InvalidParameter:
        return None


def _made_up(tokenizer: Tokenizer, longest: int) -> Iterator[str]:
    """Texts made from random ids: as they are shown, and as the file spells them, special tokens included."""
    random = Random(0)
    yield ""  # BOS alone, if the file asks for it
    for n in range(TRIED_TEXTS):
        ids = [random.randrange(tokenizer.vocab_size) for _ in range(1 + n // 2 % max(longest, 1))]
        shown = tokenizer.decode(ids).decode("utf-8", "ignore")
        yield shown if n % 2 else "".join(tokenizer.name(token) for token in ids)
