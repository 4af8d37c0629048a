"""A table of requests in which every pair of feature values occurs (pairwise testing)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Request = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]

# What of a request may change where its text ends, and what is told of it.
FEATURES: Mapping[str, tuple[str, ...]] = {
    "sampling": ("greedy", "seed 0", "hot", "penalty", "penalty and seed"),
    "stop": ("none", "in a token", "over tokens", "long", "not ASCII", "begun in the prompt", "several"),
    "tokens": ("0", "1", "few", "many"),
    "ends": ("ignored", "own", "several"),
    "callback": ("none", "listens", "refuses", "raises"),
}
# Of each way of sampling; those of "hot" make an almost flat distribution, in which any script comes up.
SAMPLING: Mapping[str, dict[str, Any]] = {
    "greedy": {},
    "seed 0": {"temperature": 1.0, "seed": 0},
    "hot": {"temperature": 50.0, "seed": 1},
    "penalty": {"repetition_penalty": 1.8},
    "penalty and seed": {
        "temperature": 0.9, "top_k": 40, "top_p": 0.97, "repetition_penalty": 1.3, "seed": (1 << 40) + 5,
    },
}  # fmt: skip
TOKENS: Mapping[str, int] = {"0": 0, "1": 1, "few": 3, "many": 10}
MANY = TOKENS["many"]


def pairs(request: Request) -> set[Pair]:
    """Every two of its values, each with its feature; in a text of few tokens, those of its length alone:
    nothing else comes to pass in it."""
    found = set(combinations(request.items(), 2))
    if request["tokens"] == "many":
        return found
    return {pair for pair in found if "tokens" in (pair[0][0], pair[1][0])}


def every_pair(features: Mapping[str, Sequence[str]] = FEATURES) -> set[Pair]:
    """What a table has to cover."""
    among = combinations(features.items(), 2)
    return {((a, v), (b, w)) for (a, ones), (b, others) in among for v, w in product(ones, others)}


def table(features: Mapping[str, Sequence[str]] = FEATURES) -> Iterator[Request]:
    """Requests until every pair has occurred, each the one of all with most that have not."""
    left = every_pair(features)
    whole = [dict(zip(features, values, strict=True)) for values in product(*features.values())]
    covered = [pairs(request) for request in whole]
    while left:
        best = max(range(len(whole)), key=lambda number: len(covered[number] & left))
        left -= covered[best]
        yield whole[best]
