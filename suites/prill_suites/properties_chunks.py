"""A length comes in; ways to cut a prompt of it into chunks, each with a name, go out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from prill_suites.sequences import LONG

SIZES = (1, 7, 31, 32, 33, 64)
PAST = 256  # positions of the first chunk, where there are more
EVEN = (1, 7, 64, 512)  # sizes in which the whole of a long prompt is fed, one at a time
Chunking = tuple[str, list[int]]


def chunkings(length: int) -> Iterator[Chunking]:
    """What the chunks are, and their sizes, which add up to `length` or, in a long prompt, to LONG."""
    short = min(length, LONG)
    last = max(2, min(PAST, short - 2))
    for sizes in (SIZES, SIZES[::-1], (last - 1, 1), (last, 2)):
        cut = filled(sizes, short)
        yield f"chunks {cut}", cut
    if length > LONG:
        for size in EVEN:
            yield f"chunks of {size} to {length}", filled([size] * (length // size), length)
        # None of them ends where the others do, at a multiple of a power of two.
        yield f"a chunk of 31 and chunks of 64 to {length}", filled([31, *[64] * (length // 64)], length)


def filled(sizes: Sequence[int], length: int) -> list[int]:
    """As many of the sizes as there is room for, the last cut short, and one chunk of what is left."""
    out: list[int] = []
    for size in chain(sizes, [length]):
        if left := length - sum(out):
            out.append(min(size, left))
    return out
