"""What a request must give, derived from the text that the model writes if nothing ends it.

By the rules alone, one token after the other: an end of text is no part of the text; a token is told to the
callback before anything else; the token that completes a stop string is the last; so is the last one asked
for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

LONG = 17  # bytes: more than a register or a short buffer holds
REFUSED = 2  # the token at which a callback refuses, or raises
NEVER = "\x00é\x00"  # a stop string that no text holds


@dataclass(frozen=True)
class TextOutcome:
    """Ids and reason of a text, the id that ended it, the ids that the callback heard, whether it raised."""

    count: int
    reason: str
    end: int | None = None
    heard: int = 0
    raised: bool = False


def outcome(
    ids: Sequence[int],
    pieces: Sequence[bytes],
    stops: Sequence[str],
    most: int,
    ends: Collection[int],
    callback: str,
) -> TextOutcome:
    """What comes of a text of these ids, told to end at any of these.

    Args:
        pieces: the bytes of each id.
        most: tokens asked for, no more than there are ids.
    """
    text, wanted = b"", [stop.encode() for stop in stops]
    for count in range(1, most + 1):
        if ids[count - 1] in ends:
            return TextOutcome(count - 1, "eos", ids[count - 1], count - 1)
        if callback == "raises" and count == REFUSED:
            return TextOutcome(count, "", None, count, raised=True)
        if callback == "refuses" and count == REFUSED:
            return TextOutcome(count, "cancelled", None, count)
        text += pieces[count - 1]
        if any(stop in text for stop in wanted):
            return TextOutcome(count, "stop", None, count)
    return TextOutcome(most, "length", None, most)


def spans(pieces: Sequence[bytes]) -> Iterator[tuple[int, int, str]]:
    """Every run of whole characters of a text, neither blank at its ends nor seen before: first and last
    token that it touches, and the run."""
    text, ends = b"".join(pieces), [*accumulate(map(len, pieces))]
    token = [n for n, piece in enumerate(pieces) for _ in piece]
    whole = [at for at in range(len(text) + 1) if at == len(text) or text[at] & 0xC0 != 0x80]
    for a, first in enumerate(whole):
        for last in whole[a + 1 : a + 3 * LONG]:
            run = text[first:last].decode("utf-8", "ignore")
            whole_run = run.encode() == text[first:last] and run == run.strip() and run.isprintable()
            if whole_run and text.find(text[first:last]) == first and ends:
                yield token[first], token[last - 1], run


def stop_strings(pieces: Sequence[bytes], prompt: bytes = b"") -> dict[str, list[str]]:
    """Kind of stop string -> strings of that kind; those that a text holds, where it holds any.

    Args:
        pieces: the bytes of each token of the text.
        prompt: what stands before it, in which no stop string begins.
    """
    found = list(spans(pieces))
    later = [(a, b, run) for a, b, run in found if b > 0]
    one = next((run for a, b, run in later if a == b), NEVER)
    over = next((run for a, b, run in later if b == a + 1 and b > 1), NEVER)
    long = next((run for a, b, run in later if b > a + 1 and len(run.encode()) >= LONG), NEVER)
    foreign = next((run for _, _, run in later if not run.isascii()), NEVER)
    # The last of them is the first that comes; those before it come later, or never.
    begun = prompt.decode("utf-8", "ignore")[-2:] + b"".join(pieces).decode("utf-8", "ignore")[:2]
    several = [NEVER, long, next((run for a, b, run in later if b > 3), NEVER), over]
    begun = begun.lstrip()  # the first space of a text may be one that its tokens alone have
    return {
        "none": [], "in a token": [one], "over tokens": [over], "long": [long], "not ASCII": [foreign],
        "begun in the prompt": [begun or NEVER], "several": several,
    }  # fmt: skip


def shown(pieces: Sequence[bytes], stops: Sequence[str]) -> str:
    """What a reader sees of a text: all of it before the first stop string."""
    text = b"".join(pieces).decode("utf-8", "replace")
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]
