"""What CPython and NumPy keep of what was freed in; as much of it at every reading as at any other out.

A reading that moves with the fill of these stores cannot be told from a leak of one block in a few calls.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

# NumPy keeps up to seven freed blocks of each size below 1,024 bytes, and of the dimensions of an array. How
# many it keeps depends on how many were in use at once: of threads that meet, a matter of chance.
KEPT, SMALL, DIMENSIONS = 7, 1024, 16
TEXT_FILES = 256

# CPython remembers attributes it looked up, and keeps the names: one that is composed for each lookup, as
# extensions in C do, stays until another falls on its place. Thousands of calls later that has an end.
_forget_lookups: Callable[[], None] = getattr(sys, "_clear_internal_caches", sys._clear_type_cache)
_BYTE, _SHAPES = np.dtype(np.uint8), (*range(1, SMALL), *((1,) * n for n in range(DIMENSIONS)))


def settled() -> None:
    """Bring every store to its fixed level: garbage and remembered names gone, NumPy's small blocks full."""
    gc.collect()  # empties Python's free lists too, which count as blocks
    _forget_lookups()
    for shape in _SHAPES:
        _ = [np.empty(shape, _BYTE) for _ in range(KEPT)]


def begin() -> None:
    """Before the first reading; what lives now is not looked at again by later collections."""
    for _ in range(
        TEXT_FILES
    ):  # CPython keeps a block of each of the first hundred or so text files it opens
        with Path(os.devnull).open(encoding="utf-8"):
            pass
    freeze()


def freeze() -> None:
    """What lives now is not looked at again by the collection before each reading."""
    gc.collect()
    gc.freeze()
