"""Planted faults: small named bugs that keep every check honest."""

from __future__ import annotations

from prill_harness.faults.core import (
    AREAS,
    Fault,
    Patch,
    active,
    ambient,
    catalogue,
    fault,
    known,
    named,
    only,
    scoped,
)

__all__ = [
    "AREAS",
    "Fault",
    "Patch",
    "active",
    "ambient",
    "catalogue",
    "fault",
    "known",
    "named",
    "only",
    "scoped",
]
