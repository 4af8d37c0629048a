"""What `cb_eval` shows of a pass: each tensor with its name, its op and what it was computed from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.others.llamacpp.library import EVAL, F16, F32, I32, GgmlTensor, LibLlama
from prill_harness.engines.others.llamacpp.mixture import CHOSEN, WEIGHTS

MOVED = ("RESHAPE", "PERMUTE", "TRANSPOSE")  # ops that compute nothing
DTYPES = {F32: np.float32, F16: np.float16, I32: np.int32}
Array = NDArray[np.floating]
Shown = tuple[str, Array]
"""`NAME = OP(SOURCE, …)`, as stages/table.py reads it, and rows (position, …)."""


class Tap:
    """The tensors of one pass after another that have a row for each position.

    Attributes:
        count: positions of the next pass.
        found: `NAME = OP(SOURCES)` and the rows (position, …), in execution order.
        ops, caches: every op of the pass, and the types of what is named a cache.
    """

    def __init__(self, library: LibLlama) -> None:
        self._library, self.callback = library, EVAL(self._see)
        self.count = 0
        self.found: list[Shown] = []
        self.ops: set[str] = set()
        self.caches: set[int] = set()
        self.error: Exception | None = None

    def _see(self, address: int, asks: bool, _: Any) -> bool:
        try:
            tensor = self._tensor(address)
            op = str(self._library.ggml_op_desc(address).decode())
            sources = [self._tensor(source) for source in tensor.src if source]
            if asks:
                self.ops.add(op)
                self.caches |= {each.type for each in sources if each.name.startswith(b"cache_")}
                return self._wanted(tensor, op, sources)
            named = ", ".join(_text(source) for source in sources)
            self.found.append((f"{_text(tensor)} = {op}({named})", self._rows(address, tensor)))
            return True
        except Exception as error:  # nothing may be raised through C
            self.error = error
            return False

    def _tensor(self, address: int) -> GgmlTensor:
        """Raises UsageError where the library's own words say that the struct is another."""
        tensor = GgmlTensor.from_address(address)
        name = (self._library.ggml_get_name(address) or 0) - address
        elements = self._library.ggml_nelements(address) if name == GgmlTensor.name.offset else -1
        if elements != prod(tensor.ne):
            raise self._library.refused(
                "its ggml_tensor is laid out in no known way",
                f"the name at byte {GgmlTensor.name.offset}",
                str(name),
            )
        return tensor

    def _wanted(self, tensor: GgmlTensor, op: str, sources: Sequence[GgmlTensor]) -> bool:
        """Whether it is computed here, is told by a name or a parameter, and has a row for each position."""
        slowest = next((size for size in reversed(tensor.ne) if size > 1), 1)
        rows = slowest == self.count or (self.count == 1 and prod(tensor.ne[1:]) >= 1)
        name = _text(tensor)
        nameless = not name or " (" in name
        told = not name.startswith("node_") or any(_is_parameter(_text(each)) for each in sources)
        if name.startswith((CHOSEN, WEIGHTS)):  # ids, and what a softmax without a name has made
            return rows and not nameless and tensor.type in DTYPES
        return rows and told and not nameless and op not in MOVED and tensor.type in (F32, F16)

    def _rows(self, address: int, tensor: GgmlTensor) -> Array:
        data = np.empty(self._library.ggml_nbytes(address), np.uint8)
        self._library.ggml_backend_tensor_get(address, data.ctypes.data, 0, data.size)
        shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
        whole: Array = np.ndarray(shape, DTYPES[tensor.type], data.data, strides=strides)
        return whole.reshape(self.count, -1).copy()


def _text(tensor: GgmlTensor) -> str:
    return bytes(tensor.name).decode("utf-8", "replace")


def _is_parameter(name: str) -> bool:
    return name.endswith((".weight", ".bias"))


def joined(chunks: Sequence[Sequence[Shown]]) -> Iterator[Shown]:
    """The tensors of passes over one stretch after another as those of one: the n-th of a name in each."""
    counted: list[dict[tuple[str, int], Array]] = []
    for chunk in chunks:
        seen: dict[str, int] = {}
        counted.append({})
        for name, rows in chunk:
            seen[name] = seen.get(name, 0) + 1
            counted[-1][name, seen[name]] = rows
    for key, first in counted[0].items():
        parts = [chunk[key] for chunk in counted if key in chunk]
        if len(parts) == len(counted) and {part.shape[1] for part in parts} == {first.shape[1]}:
            yield key[0], np.concatenate(parts)
