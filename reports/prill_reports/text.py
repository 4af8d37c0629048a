"""Make untrusted text safe for every kind of report."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping

# Everything that XML 1.0 forbids, C1 controls, and the carriage return, which parsers turn into a newline.
_UNPRINTABLE = re.compile("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# Marks that reverse or hide text would let a sentence rearrange the report around it.
_OVERRIDE = re.compile("[\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


def visible(text: str) -> str:
    """The text with control characters, lone surrogates and direction overrides written as escapes."""
    return _OVERRIDE.sub(_escape, _UNPRINTABLE.sub(_escape, text))


def one_line(text: str) -> str:
    """`visible`, with tabs and newlines escaped as well."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def figure(value: object) -> str:
    """A number to six significant digits; "not finite" for NaN, infinity and None; other values as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "not finite" if value is None else one_line(str(value))
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return "too large to show"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.6g}"


def seconds(value: float) -> float:
    """A duration for a report: finite, not negative, whole milliseconds."""
    return round(value, 3) if math.isfinite(value) and value > 0 else 0.0


def bound(metric: Mapping[str, object]) -> str:
    """`name value <= bound` for a metric, or `name value` if it has no bound."""
    limit = metric.get("bound")
    tail = "" if limit is None else f" (bound {metric.get('relation', '<=')} {figure(limit)})"
    return f"{one_line(str(metric.get('name', '')))} {figure(metric.get('value'))}{tail}"


def unique(name: str, taken: set[str]) -> str:
    """The name, with a number if it is taken already; the result is added to `taken`."""
    chosen, number = name, 2
    while chosen in taken:
        chosen, number = f"{name} ({number})", number + 1
    taken.add(chosen)
    return chosen


def listed(words: Iterable[str], limit: int = 6) -> str:
    """At most `limit` words, separated by commas, and how many more there are."""
    words = list(words)
    more = f" and {len(words) - limit} more" if len(words) > limit else ""
    return ", ".join(words[:limit]) + more


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
