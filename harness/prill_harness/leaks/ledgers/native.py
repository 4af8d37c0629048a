"""The preloaded library from Python: its readings, and failing chosen allocations."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prill_harness.leaks.ledgers.owners import Code, mapped
from prill_runtime.errors import Inconclusive

PROCESS = ("rss_anon", "swap", "threads", "descriptors")
EVERY_THREAD, THIS_THREAD = 1, 0
LEARN = -1
PLACE_BYTES = 512  # bytes of a place's name


class Interposer:
    """The library that is preloaded into this process; reading it leaves no memory behind.

    Raises:
        Inconclusive: the library is not preloaded.
    """

    def __init__(self) -> None:
        loaded = ctypes.CDLL(None)
        try:
            self._classes = int(loaded.prill_leaks_classes())
        except AttributeError:
            raise Inconclusive("the allocation ledger is not attached", where="this process") from None
        self._read, self._process = loaded.prill_leaks_read, loaded.prill_leaks_process
        self._fail, self._fail_end = loaded.prill_leaks_fail, loaded.prill_leaks_fail_end
        self._plant, self._unplant = loaded.prill_leaks_plant, loaded.prill_leaks_unplant
        self._code, self._spared = loaded.prill_leaks_code, loaded.prill_leaks_spared
        self._failed_at, self._last_word = loaded.prill_leaks_failed_at, loaded.prill_leaks_last_word
        loaded.prill_leaks_class_size.restype = ctypes.c_long
        self._fail.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_int)
        self._fail_end.restype = self._plant.restype = ctypes.c_long
        self._plant.argtypes = (ctypes.c_long,)
        self._code.argtypes = (ctypes.c_ulong, ctypes.c_ulong, ctypes.c_int)
        self._failed_at.argtypes = (ctypes.c_char_p, ctypes.c_long)
        self._spared.restype = ctypes.c_long
        self._told: set[Code] = set()
        self._where = ctypes.create_string_buffer(PLACE_BYTES)
        self.sizes = tuple(int(loaded.prill_leaks_class_size(c)) for c in range(self._classes))
        self._counts = (ctypes.c_long * (2 * self._classes + 1))()
        self._about = (ctypes.c_long * len(PROCESS))()

    def read(self) -> tuple[list[int], list[int], int]:
        """(live blocks by class, live bytes by class, mapped bytes)."""
        self._read(self._counts)
        n = self._classes
        return self._counts[:n], self._counts[n : 2 * n], self._counts[2 * n]

    def totals(self) -> tuple[int, int, int]:
        """(live blocks, live bytes, mapped bytes)."""
        blocks, sizes, mapped = self.read()
        return sum(blocks), sum(sizes), mapped

    def process(self) -> dict[str, int]:
        """Anonymous resident bytes, swapped bytes, threads and open descriptors of this process."""
        self._process(self._about)
        return dict(zip(PROCESS, self._about, strict=True))

    def plant(self, size: int) -> int:
        """Leak a block of `size` bytes; how many bytes the allocator gave it."""
        return int(self._plant(size))

    def unplant(self) -> None:
        """Free every planted block."""
        self._unplant()

    def attribute(self) -> None:
        """Sort the code loaded by now into libraries and engine; libraries' allocations are not failed."""
        with Path("/proc/self/maps").open() as maps:
            fresh = mapped(maps) - self._told
        self._told |= {code for code in fresh if self._code(*code)}

    def last_word(self) -> None:
        """Make this process print, before it dies of a failed allocation, in whose code it died."""
        self._last_word()

    @property
    def failed_at(self) -> str:
        """Function, file and offset that requested the allocation failed last; empty: the interpreter."""
        self._failed_at(self._where, PLACE_BYTES)
        return self._where.value.decode("utf-8", "replace")

    @contextmanager
    def failing(self, nth: int, *, least: int = 0, scope: int = THIS_THREAD) -> Iterator[list[int]]:
        """Fail the nth allocation of at least `least` bytes inside the with statement; 0 fails none.

        LEARN fails none either; allocations that libraries make inside may be failed from then on.

        Yields:
            A list that afterwards holds the candidates seen, 1 if one was failed, and how many were spared.
        """
        seen: list[int] = []
        self._fail(nth, least, scope)
        try:
            yield seen
        finally:
            count = int(self._fail_end())
            seen += [abs(count), int(count < 0), int(self._spared())]
