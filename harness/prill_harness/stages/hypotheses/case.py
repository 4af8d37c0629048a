"""One wrong stage with everything it was computed from, and the search over hypotheses for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from prill_runtime.models.base import Node, Stage
from prill_runtime.models.nodes.attention import Attention

Array = NDArray[np.float64]
Guess = tuple[str, Array]
Weight = Callable[[str], Array | None]
N = TypeVar("N", bound=Node)
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
Hypothesis = Callable[["Case", Any], Iterable[Guess]]
REGISTRY: dict[type[Node], list[tuple[Hypothesis, tuple[str, ...]]]] = {}
"""By the kind of node, with the kinds of its stages that they speak of; none: all of them."""


class Raw(Protocol):
    """Bytes and type name of a tensor as they lie in the file."""

    def __call__(self, name: str, shift: int = 0) -> tuple[NDArray[np.uint8], str] | None:
        """`shift` bytes after the tensor's own offset; None when the model has no such tensor."""


@dataclass(frozen=True)
class Case:
    """A stage whose output is wrong although its input was right.

    Attributes:
        table: every stage of the model by name.
        inputs: the oracle's arrays of the stage's inputs, in the stage table's order.
        want: the oracle's output; got: the candidate's, computed from the same inputs, same shape.
        weight: float64 array of a tensor by its full name, None when the model has none.
        raw: the tensor's bytes and type name in the file, None when the model has none.
        values: what the walk fed to any stage, by name, as far as it is known.
    """

    stage: Stage
    table: Mapping[str, Stage]
    ids: tuple[int, ...]
    inputs: tuple[Array, ...]
    want: Array
    got: Array
    weight: Weight
    raw: Raw
    values: Mapping[str, Array] = field(default_factory=dict)

    @property
    def heads(self) -> int:
        """Query heads of the model, 0 without attention."""
        return next((node.heads for node in self.nodes(Attention)), 0)

    def nodes(self, kind: type[N]) -> Iterator[N]:
        """The model's nodes of a kind that name a stage, in execution order, equal ones once."""
        yield from dict.fromkeys(s.node for s in self.table.values() if isinstance(s.node, kind))

    def neighbour(self, name: str, by: int) -> Array | None:
        """The tensor of that name (`blk.N.…`) so many blocks further on; None when the model has none."""
        found = _BLOCK.fullmatch(name)
        return None if found is None else self.weight(f"blk.{int(found[1]) + by}.{found[2]}")

    @property
    def positions(self) -> Array:
        return np.arange(len(self.ids), dtype=np.float64)


@dataclass(frozen=True)
class Explanation:
    """The guess that fits best: a clause ("base 10000 instead of 50000") and the NMSE it leaves."""

    clause: str
    nmse: float


def hypothesis(*kinds: type[Node], stages: tuple[str, ...] = ()) -> Callable[[Hypothesis], Hypothesis]:
    """Register a generator of guesses for the kinds of nodes it can explain, which it receives with the case.

    Args:
        stages: kinds of stages (`q`), where it speaks of some of a node's alone.
    """

    def register(function: Hypothesis) -> Hypothesis:
        for kind in kinds:
            REGISTRY.setdefault(kind, []).append((function, stages))
        return function

    return register


def guesses(case: Case) -> Iterator[Guess]:
    """Every guess of the right shape, those of the node's own kind before those of any node."""
    for function in chosen(case.stage):
        for clause, array in function(case, case.stage.node):
            if array.size == case.want.size:
                yield clause, array.reshape(case.want.shape)


def chosen(stage: Stage) -> list[Hypothesis]:
    """The hypotheses of a stage, by the kind of its node and by what that is a kind of."""
    return [
        function
        for kind in type(stage.node).__mro__
        for function, stages in REGISTRY.get(kind, ())
        if not stages or stage.kind in stages
    ]


def wrong_rows(case: Case, axes: int = 1) -> NDArray[np.bool_]:
    """(token,), or as many axes as asked for: where values are far further off than the rounding of right
    ones."""
    error = np.abs(case.got - case.want).reshape(*case.want.shape[:axes], -1).max(axis=-1)
    scale = float(np.abs(case.want).max())
    return np.asarray(~(error <= max(1e-6 * scale, 1e-5 * float(np.nanmax(error, initial=0.0)))))


def explain(case: Case, floor: float) -> Explanation | None:
    """The guess that agrees with the candidate best, if it agrees far better than the oracle does.

    Args:
        floor: NMSE that a right stage may leave here. A guess counts when it comes down to the floor, or
            takes away all but a thousandth of the error.
    """
    before = min(_nmse(case.got, case.want), 1.0)  # a guess is far better than zeros are, too
    best: Explanation | None = None
    with np.errstate(all="ignore"):
        for clause, array in guesses(case):
            left = _nmse(case.got, array)
            if best is None or left < best.nmse * 0.5:
                best = Explanation(clause, left)
    if best is None or not (best.nmse <= max(floor, before * 1e-3)) or best.nmse >= before * 0.1:
        return None
    return best


def _nmse(got: Array, want: Array) -> float:
    power = float(np.sum(want**2))
    error = float(np.sum((got - want) ** 2))
    if not np.isfinite(error) or not np.isfinite(power):
        return float("inf")
    return error / power if power else (0.0 if error == 0 else float("inf"))
