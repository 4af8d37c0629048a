"""Hold counted work to its bounds, which follow from the model file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from prill_harness.engines.base import Engine
from prill_harness.measure.cost import Spent
from prill_harness.numbers.compare import smallest
from prill_harness.run.checks import Observer
from prill_suites.common import file_tensors

T = TypeVar("T")
FILE = "the matrices of the file, as gguf reads it"
# A loop of Python's over what went before runs two instructions at least for each position; whoever joins or
# copies what went before takes eight bytes of an id, or a row of a cache. Lists that grow do so now and then.
BOUNDS, ATTEMPTS = (
    {"instructions": 1.0, "bytes": 5.0, "bytes on average": 12.0, "bytes far on": 5.0, "items": 0.5},
    3,
)
DENSE = ("llama", "gpt2")
BLOCK = 64  # query rows whose scores are computed at once, hidden ones included


def held(
    observe: Observer,
    look: Callable[[int], Mapping[tuple[str, str], float]],
    most: Callable[[str, str], float],
    of: str = "before it",
) -> None:
    """Hold what a token takes more for each position, (unit, function) by (unit, function), to its bound.

    What is found is looked at anew, twice at most: a position costs what it costs every time, but how much of
    a small array's memory NumPy had at hand is a matter of chance.
    """
    grown = dict(look(0))
    for attempt in range(1, ATTEMPTS):
        if all(slope < most(*key) for key, slope in grown.items()):
            break
        again = look(attempt)
        grown = {key: smallest(slope, again.get(key, 0.0)) for key, slope in grown.items()}
    for (unit, name), slope in grown.items():
        said = f"{name} takes {slope:.3g} more {unit} for each position {of}, expected fewer than"
        observe.expect(slope < most(unit, name), f"a token: {said} {most(unit, name):g}")


def weighed(path: Path) -> tuple[int, int]:
    """Multiply-adds of one row: of all layers' matrices, and of the head; from the file's own shapes."""
    sizes = {
        t.name: int(t.n_elements)
        for t in file_tensors(path)
        if len(t.shape) == 2 and t.name.endswith(".weight")
    }
    layers = sum(size for name, size in sizes.items() if name.startswith("blk."))
    return layers, sizes.get("output.weight", sizes["token_embd.weight"])


def known(engine: Engine, spent: Spent) -> bool:
    """Whether multiply-adds were counted, of an architecture in which every row meets every matrix."""
    config = engine.info.config
    return bool(spent.products) and config.get("architecture") in DENSE and not config.get("n_experts")


def scored(engine: Engine, pairs: int) -> int:
    """Multiply-adds of so many pairs of a query and a key, over all layers and heads, values included."""
    c = engine.info.config
    return 2 * int(c["n_layers"]) * int(c["n_heads"]) * int(c["head_dim"]) * pairs


def written(engine: Engine) -> int:
    """Values that one position has in a cache: keys and values of all layers and heads."""
    c = engine.info.config
    return 2 * int(c["n_layers"]) * int(c["n_kv_heads"]) * int(c["head_dim"])


def less(counts: Mapping[str, float], of_all: Mapping[str, int], pieces: int) -> dict[str, float]:
    """Counts of one piece of work without what a part of it takes, counted for several pieces together."""
    return {name: value - of_all.get(name, 0) / pieces for name, value in counts.items()}


def exact(observe: Observer, what: str, spent: Spent, weights: int, least: int, most: int) -> None:
    """Hold multiply-adds to what the file's shapes demand: each weight once a row, each key once a query."""
    linear, attention = spent.products.get("linear", 0), spent.products.get("attention", 0)
    observe.saw(2, oracle=FILE)
    observe.expect(
        linear == weights, f"{what}: expected {weights} multiply-adds with the file's weights, got {linear}"
    )
    observe.expect(
        least <= attention <= most,
        f"{what}: expected {least} to {most} multiply-adds of attention, got {attention}",
    )


def same(observe: Observer, first: Spent, last: Spent, apart: Iterable[str] = (), times: float = 1.0) -> None:
    """Hold what else NumPy did, by op, to `times` as many elements."""
    for op in {*first.elements, *last.elements}.difference(apart):
        before, after = first.elements.get(op, 0), last.elements.get(op, 0)
        observe.expect(
            after <= times * before,
            f"{op}: {before} elements at first, {after} later, expected {times * before:g}",
        )


def causal(first: int, count: int, window: int) -> tuple[int, int]:
    """Pairs of a query and a key it sees, for `count` queries behind `first`; and those of whole blocks."""
    least = sum(min(seen, window) for seen in range(first + 1, first + count + 1))
    return least, least + count * (BLOCK if count > 1 else 0)


def all_of(push: Callable[[T], object], items: Sequence[T]) -> None:
    for item in items:
        push(item)
