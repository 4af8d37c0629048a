"""Bring the free lists of CPython and NumPy to the same level before every reading.

A reading that moves with their fill level could not be told from a leak of one block in a few calls.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

# NumPy keeps up to seven freed blocks of each size below 1,024 bytes, and of arrays' dimensions. How many
# depends on how many were in use at once, which is chance if there are several threads.
KEPT, SMALL, DIMENSIONS = 7, 1024, 16
TEXT_FILES = 256

# CPython caches attribute lookups and keeps the names: one that is composed for each lookup, as C
# extensions do, stays until another takes its slot. Only after thousands of calls does that settle.
_forget_lookups: Callable[[], None] = getattr(sys, "_clear_internal_caches", sys._clear_type_cache)
_BYTE, _SHAPES = np.dtype(np.uint8), (*range(1, SMALL), *((1,) * n for n in range(DIMENSIONS)))


def settled() -> None:
    """Bring every free list to its fixed level: no garbage, no cached names, NumPy's small blocks full."""
    gc.collect()  # also empties Python's free lists, which count as blocks
    _forget_lookups()
    for shape in _SHAPES:
        _ = [np.empty(shape, _BYTE) for _ in range(KEPT)]


def begin() -> None:
    """Prepare for the first reading; objects alive now are left out of later collections."""
    for _ in range(
        TEXT_FILES
    ):  # CPython keeps a block for each of the first hundred or so text files it opens
        with Path(os.devnull).open(encoding="utf-8"):
            pass
    freeze()


def freeze() -> None:
    """Leave objects alive now out of the collection before each reading."""
    gc.collect()
    gc.freeze()
