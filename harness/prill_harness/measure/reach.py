"""Lists and arrays that count the items that C code goes over in them.

Python's instructions do not tell how long a searched list was, or how much of an array was filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import BuiltinFunctionType
from typing import Any
from unittest import mock

import numpy as np

from prill_runtime.models.cache import KVCache
from prill_runtime.run.generate import Writer

Count = Callable[[int], None]
TEXTS = (bytes, bytearray, str)
SEARCHES = {"find", "rfind", "index", "rindex", "count", "split", "replace", "translate", "partition"}
LISTS = ("_history", "_ids", "_logprobs")  # of a text being written


def searched(function: object) -> int:
    """Characters that a string method would go over if it found nothing; 0 for any other function."""
    owner = function.__self__ if isinstance(function, BuiltinFunctionType) else None
    return len(owner) if isinstance(owner, TEXTS) and function.__name__ in SEARCHES else 0  # type: ignore[attr-defined]


class Walked(list[Any]):
    """A list that counts its items whenever they are all gone over."""

    count_of: Count

    def _walked(self) -> None:
        self.count_of(len(self))

    def __iter__(self) -> Iterator[Any]:
        self._walked()
        return super().__iter__()

    def __contains__(self, item: object) -> bool:
        self._walked()
        return super().__contains__(item)

    def count(self, item: Any) -> int:
        self._walked()
        return super().count(item)

    def index(self, *given: Any) -> int:
        self._walked()
        return super().index(*given)


class CountedWrites(np.ndarray[Any, Any]):
    """An array that counts the elements written into it."""

    count_of: Count | None = None

    def __array_finalize__(self, source: Any) -> None:
        self.count_of = getattr(source, "count_of", None)

    def __setitem__(self, at: Any, value: Any) -> None:
        if self.count_of is not None:
            self.count_of(int(np.size(self.view(np.ndarray)[at])))
        super().__setitem__(at, value)

    def fill(self, value: Any) -> None:
        if self.count_of is not None:
            self.count_of(int(self.size))
        super().fill(value)


def watching(walked: Count, written: Count) -> ExitStack:
    """Count, until it is closed, over the ids and logprobs of every text and the rows of every cache."""
    begin, reserve = Writer.__init__, KVCache._reserve

    def begun(self: Any, *given: Any, **named: Any) -> None:
        begin(self, *given, **named)
        for name in LISTS:
            counted = Walked(getattr(self, name))
            counted.count_of = walked
            if getattr(self, "feed", None) is getattr(self, name):
                self.feed = counted
            setattr(self, name, counted)

    def reserved(self: Any, *given: Any) -> None:
        reserve(self, *given)
        for name in ("_keys", "_values"):
            if type(rows := getattr(self, name, None)) is np.ndarray:
                counted = rows.view(CountedWrites)
                counted.count_of = written
                setattr(self, name, counted)

    stack = ExitStack()
    stack.enter_context(mock.patch.object(Writer, "__init__", begun))
    stack.enter_context(mock.patch.object(KVCache, "_reserve", reserved))
    return stack
