"""Draw a token id from logits: one order of filters, ties to the lowest id, no hidden state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prill_runtime.errors import InvalidParameter, NotANumber
from prill_runtime.sampling.philox import philox_uniform

__all__ = ["SamplingParams", "filtered_distribution", "philox_uniform", "sample"]

Logits = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the next token; the defaults are greedy.

    Attributes:
        temperature: divides the logits; 0 takes the largest logit.
        top_k: keeps the k most probable ids; 0 is off.
        top_p: keeps the fewest most probable ids whose mass reaches top_p; 1 is off, 0 keeps the first.
        min_p: keeps ids at least min_p times as probable as the first; 0 is off.
        repetition_penalty: divides positive and multiplies negative logits of ids already seen; 1 is off.
        seed: key of the random numbers, 64 bits.

    Raises:
        InvalidParameter: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _real("temperature", self.temperature, 0.0, math.inf)
        _real("top_p", self.top_p, 0.0, 1.0)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("repetition_penalty", self.repetition_penalty, 0.0, math.inf)
        if self.repetition_penalty == 0:
            raise InvalidParameter("out of range", where="repetition_penalty", expected="above 0", got=0)
        _integer("top_k", self.top_k, 1 << 63)
        _integer("seed", self.seed, 1 << 64)


def _real(name: str, value: object, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type,operator]
        wanted = f"a number from {low:g} to {high:g}" if high < math.inf else f"a finite number from {low:g}"
        raise InvalidParameter("out of range", where=name, expected=wanted, got=repr(value))


def _integer(name: str, value: object, limit: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        raise InvalidParameter(
            "out of range", where=name, expected=f"an integer from 0 to {limit - 1}", got=repr(value)
        )


def _penalised(logits: Logits, penalty: float, history: Sequence[int]) -> NDArray[np.float64]:
    """Logits (vocab,) in float64 with the repetition penalty applied, checked to be usable."""
    values = np.array(logits, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise InvalidParameter("not one row of logits", where="logits", expected="(vocab,)", got=values.shape)
    if penalty != 1.0 and len(history):
        seen = np.unique(np.asarray(history, dtype=np.int64))
        if seen[0] < 0 or seen[-1] >= values.size:
            raise InvalidParameter(
                "id outside the vocabulary",
                where="history",
                expected=f"0 to {values.size - 1}",
                got=int(seen[0] if seen[0] < 0 else seen[-1]),
            )
        with np.errstate(over="ignore"):
            values[seen] = np.where(values[seen] > 0, values[seen] / penalty, values[seen] * penalty)
    top = values.max()  # NaN where one of them is
    if np.isnan(top) or top == np.inf:
        where = int((np.isnan(values) | (values == np.inf)).argmax())
        raise NotANumber(
            f"the logit of id {where} is {values[where]}", where="sampler", expected="a finite number or -inf"
        )
    if top == -np.inf:
        raise NotANumber("every logit is -inf", where="sampler", expected="one finite logit at least")
    return values


def filtered_distribution(
    logits: Logits, params: SamplingParams, history: Sequence[int] = ()
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The ids (n,) that may be drawn and their probabilities (n,), most probable first, ties lowest id first.

    Filters, in this order: repetition penalty, temperature, top-k, top-p, min-p. Each sees the distribution
    that the one before it left; the result sums to 1. Masked ids (−inf) are never among them.

    Raises:
        NotANumber: a NaN or +inf logit, or nothing but −inf.
        InvalidParameter: logits that are not one row, or an id in history outside the vocabulary.
    """
    values = _penalised(logits, params.repetition_penalty, history)
    if params.temperature == 0:
        return np.array([values.argmax()]), np.ones(1)
    ids = np.argsort(-values, kind="stable")
    ids = ids[: np.count_nonzero(values > -np.inf)]
    if params.top_k:
        ids = ids[: params.top_k]
    with np.errstate(over="ignore"):
        # Not normalised: equal logits weigh exactly 1 each, so top-p counts a flat distribution exactly.
        weights = np.exp((values[ids] - values[ids[0]]) / params.temperature)
    if params.top_p < 1:
        mass = np.cumsum(weights)
        weights = weights[: np.searchsorted(mass, params.top_p * mass[-1]) + 1]
    weights = weights[weights >= params.min_p]  # the first weight is 1
    return ids[: weights.size], weights / weights.sum()


def sample(logits: Logits, params: SamplingParams, position: int, history: Sequence[int] = ()) -> int:
    """Draw the id that stands at `position` of the sequence, from logits (vocab,), in float64.

    The same logits, parameters, position and history give the same id in every process and on every backend.
    It sorts the vocabulary once; the history is read only if there is a penalty, once.

    Raises:
        NotANumber, InvalidParameter: as `filtered_distribution`; a position outside 0 … 2⁶⁴ − 1.
    """
    ids, probabilities = filtered_distribution(logits, params, history)
    if ids.size == 1:
        return int(ids[0])
    mass = np.cumsum(probabilities)
    drawn = int(np.searchsorted(mass, philox_uniform(params.seed, position) * mass[-1], side="right"))
    # The product may round up to the whole mass; an id whose probability underflowed must not be drawn.
    return int(ids[min(drawn, int(np.count_nonzero(probabilities)) - 1)])
