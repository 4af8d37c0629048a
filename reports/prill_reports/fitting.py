"""Fit sections of lines into a number of bytes: the first entries of each stay, the rest are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

NOTE = 200  # bytes kept free in each section for the line that counts the rest
Lines = Sequence[str]


@dataclass(frozen=True)
class Passage:
    """Lines that stay together, written when they are looked at: of a thousand most never are.

    Attributes:
        kind: what it counts as where it is left out.
        write, write_brief: the lines, and the same in less; without the latter there is no shorter way.
    """

    kind: str
    write: Callable[[], Lines]
    write_brief: Callable[[], Lines] = tuple

    @cached_property
    def lines(self) -> Lines:
        return self.write()


@dataclass(frozen=True)
class Section:
    """Lines that are always there, then entries, the most important first."""

    heading: Lines
    entries: Sequence[Passage] = field(default_factory=tuple)

    def size(self, limit: int) -> int:
        """Bytes of all of it, or any number of at least `limit` where it has as many."""
        total = weight(self.heading) + 1
        for entry in self.entries:
            if total >= limit:
                break
            total += weight(entry.lines)
        return total

    def within(self, room: int) -> list[str]:
        """The section in at most `room` bytes, its heading apart: entries in full, briefly, or counted."""
        lines, left, out = list(self.heading), room - weight(self.heading), Counter[str]()
        spare = 0 if self.size(room + 1) <= room else NOTE
        for number, entry in enumerate(self.entries):
            found = entry.lines
            if spare and weight(found) > left - spare:
                found = entry.write_brief()
            if not found or weight(found) > left - spare:
                out.update(each.kind for each in self.entries[number:])
                break
            lines += found
            left -= weight(found)
        if out:
            told = ", ".join(f"{count} {kind}" for kind, count in out.most_common(6))
            lines += ["", f"… and {out.total()} more: {told}; the HTML report and the ledger hold all."]
        return [*lines, ""]


def weight(lines: Lines) -> int:
    """Bytes of lines in UTF-8, each with its newline."""
    return sum(len(line.encode("utf-8")) + 1 for line in lines)


def fitted(sections: Sequence[Section], limit: int) -> list[str]:
    """All sections in order, in at most `limit` bytes where their headings and notes fit into it."""
    rooms = shares([section.size(limit) for section in sections], limit)
    return [line for section, room in zip(sections, rooms, strict=True) for line in section.within(room)]


def shares(sizes: Sequence[int], limit: int) -> list[int]:
    """What each gets of `limit`: the small ones all they need, the large ones equal parts of the rest."""
    found, left = list(sizes), limit
    order = sorted(range(len(sizes)), key=lambda at: sizes[at])
    for number, at in enumerate(order):
        found[at] = min(sizes[at], left // (len(order) - number))
        left -= found[at]
    return found
