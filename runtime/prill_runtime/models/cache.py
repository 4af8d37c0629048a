"""The KV cache of one sequence: its keys and values, and how many positions of it there are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from prill_runtime.errors import ContextLengthExceeded, InvalidParameter
from prill_runtime.ops.protocol import Array


class KVCache:
    """Keys and values of one sequence in all layers, with room for `capacity` positions from the start.

    The cache alone counts its positions. A pass writes rows behind them, which count from `commit` on, so a
    pass that fails half way leaves `length` and the rows below it as they were. `offset` is the position of
    row 0; only tests of position invariance set it.

    Raises:
        InvalidParameter: a size below one, a negative offset, or more memory than there is.
    """

    def __init__(
        self,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: DTypeLike,
        offset: int = 0,
    ) -> None:
        self.shape = (n_layers, n_kv_heads, capacity, head_dim)
        if min(self.shape) < 1 or offset < 0:
            raise InvalidParameter(
                "size out of range",
                where="KV cache",
                expected="layers, heads, capacity and dimension of at least 1, offset of at least 0",
                got=f"{self.shape}, offset {offset}",
            )
        self.capacity = capacity
        self.offset = offset
        self._length = 0
        self._pending = [0] * n_layers
        self._keys: Array
        self._values: Array
        self._reserve(np.dtype(dtype))

    def _reserve(self, dtype: np.dtype[Any]) -> None:
        """Memory for the keys and values, (layer, kv_head, position, dim) each."""
        try:
            self._keys = np.zeros(self.shape, dtype)
            self._values = np.zeros(self.shape, dtype)
        except (MemoryError, ValueError) as error:
            raise InvalidParameter(
                "does not fit into memory",
                where="KV cache",
                got=f"{self.capacity} positions",
                hint="ask for a smaller capacity",
            ) from error

    @property
    def length(self) -> int:
        """Committed positions."""
        return self._length

    @property
    def position(self) -> int:
        """Position in the text of the next row."""
        return self.offset + self._length

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._keys.dtype

    @property
    def nbytes(self) -> int:
        """Bytes reserved for keys and values."""
        return self._keys.nbytes + self._values.nbytes

    def require(self, rows: int) -> None:
        """Make sure that `rows` more positions fit.

        Raises:
            ContextLengthExceeded: they do not.
        """
        if self.length + rows > self.capacity:
            raise ContextLengthExceeded(
                "the sequence does not fit",
                where="KV cache",
                expected=f"at most {self.capacity} positions",
                got=f"{self.length} in the cache and {rows} new ones, {self.length + rows} needed",
                hint="shorten the prompt or raise the capacity",
            )

    def append(self, layer: int, k: Array, v: Array) -> None:
        """Write rows k, v (row, kv_head, head_dim) of one layer behind the committed ones.

        Raises:
            ContextLengthExceeded: before anything is written.
        """
        low = self.length + self._pending[layer]
        self.require(self._pending[layer] + len(k))
        self._keys[layer, :, low : low + len(k)] = k.transpose(1, 0, 2)
        self._values[layer, :, low : low + len(v)] = v.transpose(1, 0, 2)
        self._pending[layer] += len(k)

    def view(self, layer: int) -> tuple[Array, Array]:
        """Keys and values (kv_head, row, head_dim) of one layer, uncommitted rows included; views."""
        length = self.length + self._pending[layer]
        return self._keys[layer, :, :length], self._values[layer, :, :length]

    def commit(self, written: int | None = None) -> None:
        """Count the new rows: those appended, or as many as a pass has `written` in every layer by itself.

        Nothing else makes the sequence longer.

        Raises:
            InvalidParameter: layers received different numbers of rows.
            ContextLengthExceeded: more were written than fit.
        """
        if written is not None:
            self.require(written)
            self._pending = [written] * len(self._pending)
        if len(set(self._pending)) != 1:
            raise InvalidParameter(
                "layers hold different numbers of new rows", where="KV cache", got=self._pending
            )
        self._length += self._pending[0]
        self.rollback()

    def rollback(self) -> None:
        """Drop rows appended since the last commit."""
        self._pending = [0] * len(self._pending)

    def truncate(self, length: int) -> None:
        """Keep the first `length` positions.

        Raises:
            InvalidParameter: a negative length, or more than there are.
        """
        if not 0 <= length <= self.length:
            raise InvalidParameter(
                "cannot truncate", where="KV cache", expected=f"a length of 0 to {self.length}", got=length
            )
        self.rollback()
        self._length = length

    def clear(self) -> None:
        """Forget every position."""
        self.truncate(0)
