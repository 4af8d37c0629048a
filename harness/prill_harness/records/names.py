"""Take check ids apart, and refuse unknown names with the nearest known one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from prill_runtime.errors import PrillError, UsageError

LISTED_WORDS = 16  # up to so many known words are all listed in the sentence


def base_of(check: str) -> str:
    """A check's id without its parameter: `tokens.greedy` of `tokens.greedy[0]`."""
    return check.partition("[")[0]


def suite_of(check: str) -> str:
    """The suite that a check's id begins with: `tokens` of `tokens.greedy`."""
    return check.partition(".")[0]


def look_up(
    word: str,
    words: Iterable[str],
    what: str,
    *,
    where: str = "",
    hint: str = "",
    error: type[PrillError] = UsageError,
) -> None:
    """Raise `error` with the clause `what` unless `word` is one of the known words.

    Args:
        hint: what to do if no known word is similar.
    """
    among = sorted(set(words))
    if word in among:
        return
    near = get_close_matches(word, among, n=1)
    raise error(
        what,
        where=where,
        expected=" or ".join(among) if 0 < len(among) <= LISTED_WORDS else f"one of {len(among)}",
        got=repr(word),
        hint=f"did you mean {near[0]!r}?" if near else hint,
    )
