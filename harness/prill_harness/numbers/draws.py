"""How close a draw is to a different token.

The sampler is imported as a module, so that suspending a planted fault in it takes effect here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from prill_harness.numbers.compare import REORDERED_ERROR, largest, smallest
from prill_harness.numbers.lanes import SIGMAS, expected_flips
from prill_runtime.sampling import sampler
from prill_runtime.sampling.sampler import SamplingParams

Row = NDArray[np.floating]


def left_by_filters(
    row: Row, params: SamplingParams, history: Sequence[int], tau: float
) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """The ids and probabilities that the filters may leave if two logits move apart by up to `tau`: with the
    fewest ids, and with the most.

    Every filter keeps the beginning of one order. Where an id lies on a filter's edge, noise decides whether
    it is kept, and with it goes its probability, in which the shares of all others grow or shrink. Between
    the two each id's share moves without a gap: what leaves last is no more probable than what stays.
    """
    if params.temperature == 0 or tau == 0:
        return [sampler.filtered_distribution(row, params, history)]
    factor = math.exp(min(tau / params.temperature, 500.0))
    plain = replace(params, top_k=0, top_p=1.0, min_p=0.0)
    ids, probabilities = sampler.filtered_distribution(row, plain, history)
    weights = probabilities / probabilities[0]
    found = []
    for by in (1 / factor, factor):
        top_p = params.top_p * by / (params.top_p * by + (1 - params.top_p))
        edges = replace(plain, top_k=params.top_k, top_p=top_p)
        count = sampler.filtered_distribution(row, edges, history)[0].size
        count = max(1, min(count, int(np.count_nonzero(weights >= params.min_p / by))))
        if by > 1:  # what noise may put in the place of the last one
            count = int(np.count_nonzero(weights >= weights[count - 1] / factor))
        found.append((ids[:count], probabilities[:count] / probabilities[:count].sum()))
    return found


def boundary_distance(
    row: Row, params: SamplingParams, history: Sequence[int], token: int, uniform: float, tau: float = 0.0
) -> float:
    """How far the draw lies inside the token's share of the cumulative distribution; 0 if outside.

    Args:
        tau: of `left_by_filters`; the least of the distances counts.
    """
    return smallest(
        *(
            _inside(ids, probabilities, token, uniform)
            for ids, probabilities in left_by_filters(row, params, history, tau)
        )
    )


def _inside(ids: NDArray[np.int64], probabilities: NDArray[np.float64], token: int, uniform: float) -> float:
    place = np.flatnonzero(ids == token)
    if not place.size:
        return 0.0
    upper = np.cumsum(probabilities)
    at = int(place[0])
    low, high = (float(upper[at - 1]) if at else -math.inf), float(upper[at])
    high = math.inf if at == ids.size - 1 else high
    return largest(0.0, smallest(uniform - low, high - uniform))


def share_distance(
    row: Row,
    params: SamplingParams,
    history: Sequence[int],
    token: int,
    uniform: float,
    noise: float = 0.0,
    tau: float = 0.0,
) -> float:
    """How far the draw lies outside the share of the cumulative distribution that the token may have.

    If probabilities move by a total variation of `noise`, two ids whose probabilities differ by at most
    twice as much may change places in the order of drawing, and a share then begins somewhere else
    altogether. Its own borders also move by `noise`, which the caller has to allow for. Infinite for an id
    that is filtered out.

    Args:
        tau: of `left_by_filters`; the token may have any share between.
    """
    shares = [
        _share(ids, probabilities, token, noise)
        for ids, probabilities in left_by_filters(row, params, history, tau)
        if token in ids
    ]
    if not shares:
        return math.inf
    low, high = smallest(*(low for low, _ in shares)), largest(*(high for _, high in shares))
    return largest(0.0, low - uniform, uniform - high)


def _share(
    ids: NDArray[np.int64], probabilities: NDArray[np.float64], token: int, noise: float
) -> tuple[float, float]:
    at = int(np.flatnonzero(ids == token)[0])
    own, before, after = probabilities[at], probabilities[:at], probabilities[at + 1 :]
    low = float(before[before > own + 2 * noise].sum() if noise else before.sum())
    high = float(before.sum() + own + after[after >= own - 2 * noise].sum() if noise else before.sum() + own)
    return low, high


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
    """The probability (0 to 1) that noise moves a token of a sampled run in the order of drawing, or an id
    over a filter's edge.

    Ids are drawn most probable first. In a vocabulary of tens of thousands the next id in that order may be
    closer than the noise, and if the two change places, the same draw gives the other one. An id that noise
    puts over an edge moves as many draws as it is probable.

    Args:
        rows: the oracle's logits (len(tokens), vocab), of which each token was drawn. tau: the largest gap
            between two of them that noise explains.
    """
    flips = 0.0
    for at, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        history = [*prompt, *tokens[:at]]
        ids, probabilities = sampler.filtered_distribution(row, params, history)
        with np.errstate(divide="ignore"):
            logits = np.log(probabilities) * params.temperature
        apart = np.abs(logits[ids != token] - logits[ids == token])
        flips += expected_flips(apart[apart <= SIGMAS * tau], tau)
        fewest, *most = left_by_filters(row, params, history, tau)
        if most and (more := most[0][1])[fewest[0].size :].size:
            flips += float(more[fewest[0].size :].sum())
    return -math.expm1(-flips)
