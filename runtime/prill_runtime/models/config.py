"""Metadata of a file goes in, a checked configuration comes out; keys nobody read are known by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import numpy as np

from prill_runtime.errors import ModelFileError, UnsupportedModel

MAX_INTEGER = 1 << 31


@dataclass(frozen=True)
class Config:
    """What a forward pass reads; None is what an architecture does not have.

    Attributes:
        width, ffn: components of the hidden state and of the feed-forward layer.
        rope_dim: rotated components of each head. rope_factor: linear position interpolation.
        window: keys that a query sees, its own included; None is all of them.
        tied_head: the embedding table is also the output matrix.
    """

    architecture: str
    vocab_size: int
    n_layers: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn: int
    context_length: int
    norm_eps: float
    tied_head: bool
    rope_base: float | None = None
    rope_dim: int | None = None
    rope_scaling: str | None = None
    rope_factor: float | None = None
    window: int | None = None

    def effective(self) -> dict[str, int | float | str | bool]:
        """The configuration as an engine reports it: what is absent is missing."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Keys:
    """Metadata under one architecture's prefix, each value checked when it is read.

    Every reading method raises ModelFileError for a missing key without a default, a wrong type or a value
    out of range.
    """

    def __init__(self, architecture: str, metadata: Mapping[str, Any]) -> None:
        self.prefix = f"{architecture}."
        self._values = {key: value for key, value in metadata.items() if key.startswith(self.prefix)}
        self._read: set[str] = set()

    def _get(self, key: str) -> Any:
        name = self.prefix + key
        self._read.add(name)
        value = self._values.get(name)
        if isinstance(value, np.ndarray):
            value = value.tolist()
        return self._same(name, value) if isinstance(value, list) else value

    @staticmethod
    def _same(name: str, values: list[Any]) -> Any:
        """The one value of a per-layer array."""
        if not values or any(value != values[0] for value in values):
            raise UnsupportedModel(
                "layers of different sizes are not implemented", where=name, got=repr(values[:8])
            )
        return values[0]

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """An integer of at least `least`."""
        value = self._get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < MAX_INTEGER:
            self._wrong(key, f"an integer from {least} to {MAX_INTEGER - 1}", value)
        return int(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self._get(key)
        if value is None and default is not None:
            return default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            self._wrong(key, "a finite number above 0", value)
        return float(value)

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self._wrong(key, "a string", value)
        return str(value)

    def has(self, key: str) -> bool:
        """Whether the file names the key."""
        return self.prefix + key in self._values

    def unread(self) -> tuple[str, ...]:
        """Keys of the architecture that nothing has read, sorted."""
        return tuple(sorted(set(self._values) - self._read))

    def _wrong(self, key: str, expected: str, value: Any) -> NoReturn:
        got = "no such key" if value is None else repr(value)
        raise ModelFileError("bad metadata value", where=self.prefix + key, expected=expected, got=got)


def heads(keys: Keys, width: int) -> tuple[int, int, int]:
    """Query heads, cache heads and head dimension of an architecture with attention.

    Raises:
        ModelFileError: the heads do not divide the width or one another.
        UnsupportedModel: keys and values of different sizes.
    """
    n_heads = keys.integer("attention.head_count")
    n_kv_heads = keys.integer("attention.head_count_kv", default=n_heads)
    if n_heads % n_kv_heads:
        raise ModelFileError(
            "query heads are not a multiple of cache heads",
            where=f"{keys.prefix}attention.head_count_kv",
            expected=f"a divisor of {n_heads}",
            got=n_kv_heads,
        )
    if not keys.has("attention.key_length") and width % n_heads:
        raise ModelFileError(
            "heads do not divide the width",
            where=f"{keys.prefix}attention.head_count",
            expected=f"a divisor of {width}",
            got=n_heads,
        )
    head_dim = keys.integer("attention.key_length", default=width // n_heads)
    value_dim = keys.integer("attention.value_length", default=head_dim)
    if value_dim != head_dim:
        raise UnsupportedModel(
            "keys and values of different sizes are not implemented",
            where=f"{keys.prefix}attention.value_length",
            expected=head_dim,
            got=value_dim,
        )
    return n_heads, n_kv_heads, head_dim
