"""Distances between the oracle's numbers and a candidate's, in float64.

Every function is pure. Logits are (position, vocab). A NaN or infinity of the candidate is infinitely wrong
under every measure, and arrays of different shapes are an error, never a shorter comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prill_runtime.errors import EngineError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TOP_K = 20
SUM_ROUNDING = 1e-4  # by which told probabilities may miss their sum: float32 softmaxes miss it by 1e-5
REORDERED_ERROR = 1e-9  # float64 logits summed in another order differ by far less
BUCKETS = (("1-16", 16), ("17-64", 64), ("65-256", 256), ("257+", math.inf))
"""Position buckets: label, last position in it (positions count from 1)."""

# Bits of the significand, the hidden one included, and the exponent of the smallest normal number.
FLOATS = {"float64": (53, -1022), "float32": (24, -126), "float16": (11, -14), "bfloat16": (8, -126)}


def pair(oracle: ArrayLike, candidate: ArrayLike) -> tuple[Floats, Floats]:
    """Both as float64.

    Raises:
        EngineError: their shapes differ, so that something was truncated or added.
    """
    a, b = np.asarray(oracle, np.float64), np.asarray(candidate, np.float64)
    if a.shape != b.shape:
        raise EngineError("the engine returned an array of another shape", expected=a.shape, got=b.shape)
    return a, b


def largest(*values: float) -> float:
    """The largest of them; NaN if any is NaN, wherever it stands: `max` might drop it."""
    return float(np.max(values))


def smallest(*values: float) -> float:
    """The smallest of them; NaN if any is NaN."""
    return float(np.min(values))


def nmse(oracle: ArrayLike, candidate: ArrayLike) -> float:
    """Σ(a−b)²/Σa²; infinite for a candidate that is not finite, or differs from an oracle of zeros."""
    a, b = pair(oracle, candidate)
    return nmse_of(*squares(a, b))


def squares(oracle: Floats, candidate: Floats) -> tuple[float, float]:
    """Σ(a−b)² and Σa², to be added up over several arrays before they are divided."""
    if not (np.isfinite(oracle).all() and np.isfinite(candidate).all()):
        return math.inf, 1.0
    return float(np.sum((oracle - candidate) ** 2)), float(np.sum(oracle**2))


def nmse_of(error: float, energy: float) -> float:
    """The quotient of `squares`."""
    if energy == 0:
        return 0.0 if error == 0 else math.inf
    return error / energy


def log_softmax(logits: ArrayLike) -> Floats:
    """Natural logprobs over the last axis."""
    z = np.asarray(logits, np.float64)
    shifted = z - z.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural logprobs of both at the `sound` positions, where every logit of both is finite."""

    sound: NDArray[np.bool_]  # (position,)
    oracle: Floats  # (sound position, vocab)
    candidate: Floats

    @classmethod
    def of(cls, oracle: ArrayLike, candidate: ArrayLike) -> Logprobs:
        """From logits (position, vocab)."""
        a, b = pair(oracle, candidate)
        sound = finite(a, b)
        return cls(sound, log_softmax(a[sound]), log_softmax(b[sound]))

    def spread(self, values: Floats) -> Floats:
        """Values (sound position,) spread over all positions, with infinity at the others."""
        out = np.full(self.sound.shape, np.inf)
        out[self.sound] = values
        return out


def kl(oracle: ArrayLike, candidate: ArrayLike) -> Floats:
    """`kl_of` two arrays of logits (position, vocab)."""
    return kl_of(Logprobs.of(oracle, candidate))


def kl_of(logprobs: Logprobs) -> Floats:
    """KL(oracle‖candidate) of each position, in nats, never below zero.

    Because Σp = Σq, Σp·log(p/q) equals Σ(q − p + p·log(p/q)), whose terms are all at least zero: float32
    noise near 1e-13 is summed without cancellation.
    """
    log_p, log_q = logprobs.oracle, logprobs.candidate
    p, d = np.exp(log_p), log_p - log_q
    clipped = np.clip(d, -1, 1)
    terms = p * (np.expm1(-clipped) + clipped)
    far = clipped != d
    terms[far] = np.exp(log_q[far]) - p[far] + p[far] * d[far]
    return logprobs.spread(np.maximum(terms, 0).sum(axis=-1))


def finite(oracle: Floats, candidate: Floats) -> NDArray[np.bool_]:
    """Positions at which every number of both is finite."""
    return np.asarray(np.isfinite(oracle).all(axis=-1) & np.isfinite(candidate).all(axis=-1))


def top_ids(logits: ArrayLike, k: int) -> Ints:
    """The k best ids of each position, best first, lowest id first on ties: (position, k)."""
    z = np.asarray(logits, np.float64)
    return np.asarray(np.argsort(-z, axis=-1, kind="stable")[..., :k], np.int64)


def best_ids(logits: ArrayLike) -> Ints:
    """The best id of each position, the lowest on ties."""
    return np.asarray(np.argmax(np.asarray(logits), axis=-1), np.int64)


def dlogprob(oracle: ArrayLike, candidate: ArrayLike, k: int = TOP_K) -> Floats:
    """`dlogprob_of` two arrays of logits (position, vocab)."""
    return dlogprob_of(Logprobs.of(oracle, candidate), k)


def dlogprob_of(logprobs: Logprobs, k: int = TOP_K) -> Floats:
    """max |Δ logprob| of each position over the oracle's top k ids."""
    count = min(k, logprobs.oracle.shape[-1])
    ids = np.argpartition(-logprobs.oracle, count - 1, axis=-1)[..., :count]
    gap = np.take_along_axis(logprobs.oracle, ids, -1) - np.take_along_axis(logprobs.candidate, ids, -1)
    return logprobs.spread(np.abs(gap).max(axis=-1))


def rank(oracle: ArrayLike, candidate: ArrayLike) -> Ints:
    """Rank, from 1, that the candidate gives the oracle's best id, or an id that ties with it; the
    vocabulary's size if anything is not finite."""
    a, b = pair(oracle, candidate)
    best = best_ids(a)[..., None]
    own = np.take_along_axis(b, best, -1)
    ids = np.arange(a.shape[-1])
    other = np.take_along_axis(a, best, -1) - a > REORDERED_ERROR
    before = other & ((b > own) | ((b == own) & (ids < best)))
    return np.asarray(np.where(finite(a, b), 1 + before.sum(axis=-1), a.shape[-1]), np.int64)


def agreement(ranks: Ints, k: int) -> float:
    """Share of positions whose oracle's best id is among the candidate's k best."""
    return float(np.mean(ranks <= k))


def p99(values: Floats) -> float:
    """99th percentile, rounded up to a value that occurred."""
    return float(np.quantile(values, 0.99, method="higher"))


def bucket_max(values: Floats, positions: Ints) -> dict[str, float]:
    """The largest value in each position bucket that occurs; positions count from 1."""
    out, first = {}, 1.0
    for label, last in BUCKETS:
        inside = values[(positions >= first) & (positions <= last)]
        if inside.size:
            out[label] = float(inside.max())
        first = last + 1
    return out


def ulp(value: float, kind: str) -> float:
    """Distance from |value| to the next number of a type.

    Args:
        kind: "float64", "float32", "float16", "bfloat16", or "int8": the step of a block whose largest
            magnitude is |value| (|value|/127).
    """
    magnitude = abs(float(value))
    if kind == "int8":
        return magnitude / 127
    bits, smallest = FLOATS[kind]
    exponent = smallest if magnitude == 0 else max(math.frexp(magnitude)[1] - 1, smallest)
    return math.ldexp(1.0, exponent - bits + 1)


@dataclass(frozen=True, slots=True)
class Margin:
    """How far the oracle puts its own best id above the candidate's choice, and the largest gap that the
    lane's noise explains (in logits)."""

    margin: float
    tau: float

    @property
    def near_tie(self) -> bool:
        return self.margin <= self.tau


def margin_of(oracle_row: ArrayLike, token: int, tau: float) -> Margin:
    """The margin of the oracle's best logit over `token`'s; infinite for an id outside the vocabulary."""
    z = np.asarray(oracle_row, np.float64)
    inside = 0 <= token < z.shape[-1]
    return Margin(float(z.max() - z[token]) if inside else math.inf, tau)


@dataclass(frozen=True, slots=True)
class TopN:
    """What can be said of one position when the engine returns only its best n logprobs.

    Attributes:
        kl_low: lower bound of KL(oracle‖candidate).
        kl_high: upper bound; infinite unless a least logprob was given, because the ids not returned
            may have any probability down to zero.
        distance_high: upper bound of the total variation distance (0 to 1).
        oracle_tail, candidate_tail: probability outside the returned ids.
        dlogprob: max |Δ logprob| over the returned ids.
    """

    kl_low: float
    kl_high: float
    distance_high: float
    oracle_tail: float
    candidate_tail: float
    dlogprob: float
    ids: int

    @property
    def sentence(self) -> str:
        high = "unbounded" if math.isinf(self.kl_high) else f"at most {self.kl_high:.2g}"
        return (
            f"compared on the {self.ids} ids that were returned: KL at least {self.kl_low:.2g} and {high}, "
            f"total variation at most {self.distance_high:.2g}; not seen: {self.candidate_tail:.2g} of the "
            f"candidate's probability and {self.oracle_tail:.2g} of the oracle's"
        )


def top_n(
    oracle_row: ArrayLike, ids: Sequence[int], logprobs: Sequence[float], least_logprob: float | None = None
) -> TopN:
    """Compare one position of a black box that returns only its best n ids and their natural logprobs.

    Lower bound: KL of the two distributions among the returned ids, which a common error of all logprobs
    leaves alone, and KL of the returned ids' share, as far as SUM_ROUNDING does not explain it (chain rule,
    without the tail's own part). Upper bound: every tail id at `least_logprob`, if the caller knows one.

    Raises:
        EngineError: ids repeat, lie outside the vocabulary, or do not match the logprobs in number.
    """
    log_p = log_softmax(oracle_row)
    chosen = np.asarray(ids, np.int64)
    log_q = np.asarray(logprobs, np.float64)
    unique = len(set(map(int, ids))) == len(ids) == log_q.size > 0
    if not unique or chosen.min() < 0 or chosen.max() >= log_p.size:
        raise EngineError(
            "the top logprobs are malformed",
            expected=f"distinct ids below {log_p.size}, one logprob each",
            got=f"{len(ids)} ids, {log_q.size} logprobs",
        )
    q_sum = float(np.exp(log_q).sum())
    if not np.isfinite(log_q).all() or q_sum > 1 + SUM_ROUNDING:
        return TopN(math.inf, math.inf, 1.0, 1.0, 1.0, math.inf, len(ids))
    p = np.exp(log_p)
    rest = np.ones(log_p.size, bool)
    rest[chosen] = False
    p_tail, q_tail = float(p[rest].sum()), largest(0.0, 1 - q_sum)
    seen = float(np.sum(p[chosen] * (log_p[chosen] - log_q)))
    p_sum = float(p[chosen].sum())
    among = float(kl_of(Logprobs.of(log_p[None, chosen], log_q[None]))[0])
    nearest = smallest(largest(p_sum, q_sum - SUM_ROUNDING), q_sum + SUM_ROUNDING, 1.0)
    tail_high = 0.0 if p_tail == 0 else math.inf
    if least_logprob is not None:
        tail_high = float(np.sum(p[rest] * (log_p[rest] - least_logprob)))
    apart = 0.5 * (float(np.abs(p[chosen] - np.exp(log_q)).sum()) + p_tail + q_tail)
    return TopN(
        kl_low=p_sum * among + _kl_of_shares(p_sum, nearest),
        kl_high=largest(0.0, seen + tail_high),
        distance_high=smallest(1.0, apart),
        oracle_tail=p_tail,
        candidate_tail=q_tail,
        dlogprob=float(np.abs(log_p[chosen] - log_q).max()),
        ids=len(ids),
    )


def _kl_of_shares(p: float, q: float) -> float:
    """KL of two outcomes with probabilities p and 1 − p from q and 1 − q, never below zero."""
    if p == q:
        return 0.0
    terms = [a * (math.log(a / b) if b > 0 else math.inf) for a, b in ((p, q), (1 - p, 1 - q)) if a > 0]
    return largest(0.0, math.fsum(terms))
