"""Fit sections of lines into a number of bytes: the first entries of each stay, the rest are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

NOTE = 200  # bytes kept free in each section for the line that counts the rest


@dataclass(frozen=True)
class Passage:
    """Lines that stay together. `kind` is what it counts as where it is left out; `brief` says it in less."""

    kind: str
    lines: Sequence[str]
    brief: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """Lines that are always there, then entries, the most important first."""

    heading: Sequence[str]
    entries: Sequence[Passage] = field(default_factory=tuple)

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return weight(self.heading) + sum(weight(entry.lines) for entry in self.entries) + 1

    def within(self, room: int) -> list[str]:
        """The section in at most `room` bytes, its heading apart: entries in full, briefly, or counted."""
        lines, left, out = list(self.heading), room - weight(self.heading), Counter[str]()
        whole = self.size <= room
        for number, entry in enumerate(self.entries):
            versions = (entry.lines,) if whole else (entry.lines, entry.brief)
            spare = 0 if whole else NOTE
            fits = next((v for v in versions if v and weight(v) <= left - spare), None)
            if fits is None:
                out.update(each.kind for each in self.entries[number:])
                break
            lines += fits
            left -= weight(fits)
        if out:
            told = ", ".join(f"{count} {kind}" for kind, count in out.most_common(6))
            lines += [
                "",
                f"… and {out.total()} more: {told}; the HTML report and the ledger hold all of them.",
            ]
        return [*lines, ""]


def weight(lines: Sequence[str]) -> int:
    """Bytes of lines in UTF-8, each with its newline."""
    return sum(len(line.encode("utf-8")) + 1 for line in lines)


def fitted(sections: Sequence[Section], limit: int) -> list[str]:
    """All sections in order, in at most `limit` bytes where their headings and notes fit into it."""
    return [
        line
        for section, room in zip(sections, shares([s.size for s in sections], limit), strict=True)
        for line in section.within(room)
    ]


def shares(sizes: Sequence[int], limit: int) -> list[int]:
    """What each gets of `limit`: the small ones all they need, the large ones equal parts of the rest."""
    found, left = list(sizes), limit
    order = sorted(range(len(sizes)), key=lambda at: sizes[at])
    for number, at in enumerate(order):
        found[at] = min(sizes[at], left // (len(order) - number))
        left -= found[at]
    return found
