"""Values of a model file as text that fits on one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prill_harness.console import printable

SHOWN = 6  # elements of a long array
LONGEST = 72  # characters of a string value on a terminal


def shaped(shape: Sequence[int]) -> str:
    """A shape as shown in a table."""
    return " x ".join(map(str, shape)) or "scalar"


def abridged(value: Any, full: bool) -> Any:
    """A long array as its length and first elements."""
    if full or not isinstance(value, Sequence) or isinstance(value, str) or len(value) <= SHOWN:
        return value
    return {"length": len(value), "first": list(value[:SHOWN])}


def shown(value: Any, full: bool) -> str:
    """A value on one line."""
    if isinstance(value, dict):
        return f"{value['length']} values: {shown(value['first'], full)[1:-1]}, ..."
    text = printable(repr(value) if isinstance(value, str | list) else value)
    return text if full or len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)"
