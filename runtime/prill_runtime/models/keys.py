"""A file's metadata and tensor names, checked as they are read; unread keys are found by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, NoReturn

import numpy as np

from prill_runtime.errors import ModelFileError, UnsupportedModel
from prill_runtime.gguf.tensors import TensorInfo

MAX_INTEGER = 1 << 31
EMBEDDING = "token_embd.weight"
ANY: Final = object()
HARMLESS: Final[Mapping[str, Any]] = {
    "vocab_size": ANY, "tensor_data_layout": ANY, "pooling_type": ANY, "expert_used_count": ANY,
    "expert_group_count": ANY, "expert_group_used_count": ANY, "rope.scaling.original_context_length": ANY,
    "rope.scaling.finetuned": ANY, "attention.causal": True, "use_parallel_residual": False,
    "attention.max_alibi_bias": 0, "attention.clamp_kqv": 0, "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0, "logit_scale": 1, "residual_scale": 1, "embedding_scale": 1,
}  # fmt: skip
"""Keys that an architecture may leave unread: those that change no result, whatever they say or with this
value. `expert_count` is refused by itself where there are experts; where an original length counts, it is
read."""


class Keys:
    """Metadata under one architecture's prefix, each value checked when it is read, and tensors by name.

    Every reading method raises ModelFileError for a missing key without a default, a wrong type or a value
    out of range.
    """

    def __init__(
        self, architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> None:
        self.prefix = f"{architecture}."
        self._values = {key: value for key, value in metadata.items() if key.startswith(self.prefix)}
        self._read: set[str] = set()
        self._asked: set[str] = set()
        self._tensors = tensors

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

    def number(self, key: str, default: float) -> float:
        """A finite number of at least zero."""
        value = self._get(key)
        if value is None:
            return default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < 0:
            self._wrong(key, "a finite number of at least 0", value)
        return float(value)

    def truth(self, key: str) -> bool:
        """True or false; it has no default."""
        value = self._get(key)
        if not isinstance(value, bool):
            self._wrong(key, "true or false", value)
        return bool(value)

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

    def has_tensor(self, name: str) -> bool:
        """Whether the file has the tensor: how a description asks for one that may be missing."""
        self._asked.add(name)
        return name in self._tensors

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding table.

        Raises:
            ModelFileError: no such table, or the file states another size.
        """
        table = self._tensors.get(EMBEDDING)
        if table is None or len(table.shape) != 2:
            got = "no such tensor" if table is None else f"shape {table.shape}"
            raise ModelFileError("no embedding table", expected=f"{EMBEDDING} (vocab, width)", got=got)
        rows = int(table.shape[0])
        stated = self.integer("vocab_size", default=rows)
        if stated != rows:
            raise ModelFileError(
                "vocabulary and embedding table differ",
                where=f"{self.prefix}vocab_size",
                expected=f"{rows}, the rows of {EMBEDDING}",
                got=stated,
            )
        return rows

    def blocks(self) -> int:
        """How many blocks there are: each has tensors, so that a table of a million is not made.

        Raises:
            ModelFileError: more than the file has tensors.
        """
        count = self.integer("block_count")
        if count > len(self._tensors):
            raise ModelFileError(
                "more blocks than tensors",
                where=f"{self.prefix}block_count",
                expected=f"at most {len(self._tensors)}, the tensors of the file",
                got=count,
            )
        return count

    def refuse(self, key: str, what: str) -> None:
        """Make sure that a count is 0.

        Raises:
            UnsupportedModel: it is not; `what` says what the architecture would need.
        """
        if count := self.integer(key, default=0, least=0):
            raise UnsupportedModel(
                f"{what} not implemented for this architecture",
                where=f"{self.prefix}{key}", expected=0, got=count,
            )  # fmt: skip

    @property
    def asked(self) -> frozenset[str]:
        """The keys that were read, without their prefix, and the tensors that were asked for, so far."""
        return frozenset({*self._asked, *(name.removeprefix(self.prefix) for name in self._read)})

    def require_all_read(self) -> None:
        """Make sure that nothing was left unread that may change a result.

        Raises:
            UnsupportedModel: keys that neither the description reads nor HARMLESS names.
        """
        left = []
        for name in sorted(set(self._values) - self._read):
            neutral = HARMLESS.get(name.removeprefix(self.prefix))
            if neutral is not ANY and (neutral is None or self._values[name] != neutral):
                left.append(name)
        if left:
            raise UnsupportedModel(
                "a key that may change the result is not read", where=left[0],
                expected="keys that the architecture's description reads, or that change nothing",
                got=", ".join(f"{name} = {str(self._values[name])[:40]}" for name in left[:5]),
            )  # fmt: skip

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


def rope_dim(keys: Keys, head_dim: int) -> int:
    """Rotated components of each head.

    Raises:
        ModelFileError: an odd number, or more than a head has.
    """
    dim = keys.integer("rope.dimension_count", default=head_dim)
    if dim % 2 or dim > head_dim:
        raise ModelFileError(
            "bad rotary dimension",
            where=f"{keys.prefix}rope.dimension_count",
            expected=f"an even number up to the head dimension {head_dim}",
            got=dim,
        )
    return dim
