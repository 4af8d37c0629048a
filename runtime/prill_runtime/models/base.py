"""What every node of a model has in common, and the step that it takes part in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from prill_runtime.models.cache import KVCache
from prill_runtime.ops.protocol import Array, Backend, Ids

Value = int | float | str | bool
# Sees every named stage and returns what the pass goes on with.
Tap = Callable[[str, Array], Array]


def untouched(stage: str, x: Array) -> Array:
    """The tap that changes nothing."""
    return x


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that a node reads: its name in the file, and its shape there."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """One named point of a forward pass.

    Attributes:
        name: full name, `blk.3.q_rope`. inputs: full names of the stages it is computed from.
        tensors: stems of the weights it reads, without `.weight` or `.bias`. node: what computes it.
    """

    name: str
    inputs: tuple[str, ...]
    tensors: tuple[str, ...]
    node: Node

    @property
    def layer(self) -> int | None:
        """Block number, None outside the blocks."""
        return int(self.name.split(".")[1]) if self.name.startswith("blk.") else None

    @property
    def kind(self) -> str:
        """Name without the block, `q_rope`."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Step:
    """One forward step: the new rows of every sequence, one below the other.

    Attributes:
        ids, positions: (row,). sequences: each cache and its rows.
    """

    ids: Ids
    positions: Ids
    sequences: tuple[tuple[KVCache, slice], ...]


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass of a Network: what every node computes with, and who looks on."""

    network: Any
    weights: Mapping[str, Array]
    ops: Backend
    step: Step
    tap: Tap = untouched


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """What a layer keeps of every position; a query sees the last `window` keys, None: all."""

    kv_heads: int
    key_size: int
    value_size: int
    window: int | None


@dataclass(frozen=True)
class Node:
    """A part of a model; the defaults here say nothing of it."""

    def tensors(self) -> Iterator[Tensor]:
        """Those it reads itself, without its parts'."""
        yield from ()

    def effective(self) -> dict[str, Value]:
        """Its own part of the configuration as an engine reports it."""
        return {}

    def features(self) -> set[str]:
        """What it has that not every model has; items, faults and hypotheses are chosen by these."""
        return set()

    def walk(self) -> Iterator[Node]:
        """The node and all parts of it, in the order in which they are written."""
        yield self
        for field in fields(self):
            value = getattr(self, field.name)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Node):
                    yield from part.walk()
