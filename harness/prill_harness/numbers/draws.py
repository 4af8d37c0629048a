"""How close a draw is to a different token.

The sampler is imported as a module, so that suspending a planted fault in it takes effect here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prill_harness.numbers.compare import REORDERED_ERROR, largest, smallest
from prill_harness.numbers.lanes import SIGMAS, expected_flips
from prill_runtime.sampling import sampler
from prill_runtime.sampling.sampler import SamplingParams

Row = NDArray[np.floating]


def boundary_distance(
    row: Row, params: SamplingParams, history: Sequence[int], token: int, uniform: float
) -> float:
    """How far the draw lies inside the token's share of the cumulative distribution; 0 if outside."""
    ids, probabilities = sampler.filtered_distribution(row, params, history)
    place = np.flatnonzero(ids == token)
    if not place.size:
        return 0.0
    upper = np.cumsum(probabilities)
    at = int(place[0])
    low, high = (float(upper[at - 1]) if at else -math.inf), float(upper[at])
    high = math.inf if at == ids.size - 1 else high
    return largest(0.0, smallest(uniform - low, high - uniform))


def share_distance(
    row: Row, params: SamplingParams, history: Sequence[int], token: int, uniform: float, noise: float = 0.0
) -> float:
    """How far the draw lies outside the share of the cumulative distribution that the token may have.

    If probabilities move by a total variation of `noise`, two ids whose probabilities differ by at most
    twice as much may change places in the order of drawing, and a share then begins somewhere else
    altogether. Its own borders also move by `noise`, which the caller has to allow for. Infinite for an id
    that is filtered out.
    """
    ids, probabilities = sampler.filtered_distribution(row, params, history)
    place = np.flatnonzero(ids == token)
    if not place.size:
        return math.inf
    at = int(place[0])
    own, before, after = probabilities[at], probabilities[:at], probabilities[at + 1 :]
    low = float(before[before > own + 2 * noise].sum() if noise else before.sum())
    high = float(before.sum() + own + after[after >= own - 2 * noise].sum() if noise else before.sum() + own)
    return largest(0.0, low - uniform, uniform - high)


def equally_likely(
    row: Row, params: SamplingParams, history: Sequence[int], expected: int, taken: int
) -> bool:
    """Whether two ids tie before any filter, so that only their order decides which is drawn."""
    if not 0 <= taken < len(row):
        return False
    plain = SamplingParams(temperature=1.0, repetition_penalty=params.repetition_penalty)
    ids, probabilities = sampler.filtered_distribution(row, plain, history)
    of = {token: float(probabilities[ids == token].sum()) for token in (expected, taken)}
    return smallest(*of.values()) > 0 and abs(math.log(of[expected] / of[taken])) <= REORDERED_ERROR


def expected_swaps(
    rows: NDArray[np.floating],
    prompt: Sequence[int],
    tokens: Sequence[int],
    params: SamplingParams,
    tau: float,
) -> float:
    """The probability (0 to 1) that noise moves a token of a sampled run in the order of drawing.

    Ids are drawn most probable first. In a vocabulary of tens of thousands the next id in that order may be
    closer than the noise, and if the two change places, the same draw gives the other one.

    Args:
        rows: the oracle's logits (len(tokens), vocab), of which each token was drawn. tau: the largest gap
            between two of them that noise explains.
    """
    flips = 0.0
    for at, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        ids, probabilities = sampler.filtered_distribution(row, params, [*prompt, *tokens[:at]])
        with np.errstate(divide="ignore"):
            logits = np.log(probabilities) * params.temperature
        apart = np.abs(logits[ids != token] - logits[ids == token])
        flips += expected_flips(apart[apart <= SIGMAS * tau], tau)
    return -math.expm1(-flips)
