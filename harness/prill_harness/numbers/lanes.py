"""Lanes: the bounds for a file's type and an engine's arithmetic, as multiples of measured noise.

The noise floor of a lane is the oracle's own forward pass at that lane's precision, measured against float64
on the golden prompts: plain float32 for the exact lane, activations rounded to float16, bfloat16 or 8-bit
blocks for the others. Weights are dequantised from the same file on both sides, so only rounding remains.

The ratios were measured on both trained F16 fixtures and on random models of the same shapes, as the largest
of NMSE, KL p99, KL max and the bucket maxima over the recorded floor:

    exact: other summation orders (permuted, reversed, blocks of 32, strictly sequential)       0.05 to 3.6
           prefill in chunks of 7, decode one by one                                            0.06 to 1.9
           rotary angles computed in float32, which honest engines do                            3.2 to 19
           norm epsilon 1e-6 for 1e-5                                                 7,300 and more, always
    f16:   blocks permuted, only inputs rounded, rounding in float64, decode one by one        0.02 to 2.5
           bfloat16 activations instead; int8                                                     43; 53

The quietest order was at 0.05 of the floor, so a floor measured on such a machine and an engine with the
noisiest order are a factor of 50 apart: the exact ratio is 100, and the smallest bug is 73 times beyond it.
A type's noise comes from its format and hardly from the order: its ratio is 9, that is 3 in amplitude.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from prill_harness.numbers import compare
from prill_runtime.errors import UnsupportedModel

EXACT_RATIO = 100.0
TYPE_RATIO = 9.0
CONFIDENCE = 0.999
AGAINST_ZEROS = 1e300
SIGMAS = 4.0
"""The largest of thousands of errors is about four standard deviations."""


@dataclass(frozen=True, slots=True)
class Figures:
    """How far one run was from the oracle; `positions` is how many positions were compared."""

    nmse: float
    kl_mean: float
    kl_p99: float
    kl_max: float
    dlogprob_max: float
    top1: float
    top5: float
    worst_rank: int
    buckets: dict[str, float]
    positions: int = 0


@dataclass(frozen=True, slots=True)
class Lane:
    """activations: the type whose rounding is allowed; ratio: allowed error power over the floor's."""

    name: str
    activations: str
    ratio: float

    @property
    def linear(self) -> float:
        """The ratio for figures that grow with the error, not with its square."""
        return math.sqrt(self.ratio)

    @property
    def unit(self) -> str:
        """The type for `compare.ulp`."""
        return {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}.get(self.activations, "int8")


EXACT = Lane("exact", "f32", EXACT_RATIO)


def type_lane(file_type: str) -> Lane:
    """The lane of engines that multiply in the file's own type.

    Raises:
        UnsupportedModel: a type without a lane.
    """
    kind = file_type.lower()
    if kind in ("f32", "f16", "bf16"):
        # No engine's rounding of activations lies between float16 and float32, so an F32 file has F16's lane.
        kind = "f16" if kind == "f32" else kind
        return Lane(kind, kind, TYPE_RATIO)
    if kind.startswith(("q", "mxfp", "iq")):
        return Lane(kind, "q8_k" if kind.endswith(("_k", "_xs")) else "q8_0", TYPE_RATIO)
    raise UnsupportedModel(
        "no lane for this type", where=repr(file_type), expected="F32, F16, BF16, Q*, IQ*, MXFP4"
    )


def lane_for(file_type: str, arithmetic: str) -> Lane:
    """float32 and float64 engines are held to the exact lane on any file, all others to the file's lane."""
    return EXACT if arithmetic in ("float32", "float64") else type_lane(file_type)


def bounds(lane: Lane, floor: Figures) -> Figures:
    """The lane's floor times its ratio, or times the ratio's root for figures linear in the error.

    Disagreements are events: a floor run that saw k of them has a rate near k + 1/2, and the bound is what a
    noise √ratio as large stays under in 99.9 % of runs.
    """

    def share(agreement: float) -> float:
        seen = (1 - agreement) * floor.positions
        return compare.largest(0.0, 1 - poisson_upper(lane.linear * (seen + 0.5)) / max(floor.positions, 1))

    return Figures(
        nmse=lane.ratio * floor.nmse,
        kl_mean=lane.ratio * floor.kl_mean,
        kl_p99=lane.ratio * floor.kl_p99,
        kl_max=lane.ratio * floor.kl_max,
        dlogprob_max=lane.linear * floor.dlogprob_max,
        top1=share(floor.top1),
        top5=share(floor.top5),
        worst_rank=max(2, math.ceil(1 + lane.linear * (floor.worst_rank - 1))),
        buckets={label: lane.ratio * value for label, value in floor.buckets.items()},
        positions=floor.positions,
    )


def stored(floor: Figures, z_max: float) -> Figures:
    """The floor, or what rounding logits of up to |z_max| to float32 once may leave, where that is more.

    Rows of a head that are equal have equal logits in a product of many positions, and a floor of 0 or of
    what the judge's own log-softmax leaves; in one of few positions the last bits depend on a row's place.
    """
    unit = compare.ulp(z_max, "float32")
    kl = unit**2 / 8  # of logits that are half a unit off to either side (Hoeffding's lemma)
    return replace(
        floor,
        kl_p99=compare.largest(floor.kl_p99, kl),
        kl_max=compare.largest(floor.kl_max, kl),
        dlogprob_max=compare.largest(floor.dlogprob_max, unit),
        buckets={label: compare.largest(value, kl) for label, value in floor.buckets.items()},
    )


GATED = ("nmse", "kl_p99", "kl_max", "dlogprob_max", "top1", "top5", "worst_rank")
AT_LEAST = ("top1", "top5")


def judged(figures: Figures, bound: Figures) -> list[tuple[str, float, float, str]]:
    """Every gated figure with its bound: (name, value, bound, "<=" or ">="); means only inform."""
    rows = [
        (name, float(getattr(figures, name)), float(getattr(bound, name)), ">=" if name in AT_LEAST else "<=")
        for name in GATED
    ]
    for label, value in figures.buckets.items():
        # A bucket that the floor never reached takes the bound of the last one that it did.
        limit = bound.buckets.get(label, compare.largest(0.0, *bound.buckets.values()))
        rows.append((f"kl_max[{label}]", value, limit, "<="))
    return rows


def broken(figures: Figures, bound: Figures) -> list[tuple[str, float, float, str]]:
    """The rows of `judged` that are out of bound; NaN is out of every bound."""
    return [
        row
        for row in judged(figures, bound)
        if not (row[1] >= row[2] if row[3] == ">=" else row[1] <= row[2])
    ]


def tau(lane: Lane, floor: Figures, z_max: float) -> float:
    """The largest gap between two logits that the lane's noise explains: each may be off by the largest |Δ
    logprob| that the lane allows, but at least by half a unit in the last place of |z_max|."""
    return compare.largest(compare.ulp(z_max, lane.unit), 2 * lane.linear * floor.dlogprob_max)


def expected_flips(margins: NDArray[np.float64], largest: float) -> float:
    """How many positions noise is expected to flip: ΣΦ(−margin/σ), where σ is a quarter of the largest gap
    that it explains."""
    sigma = largest / SIGMAS
    if sigma <= 0:
        return float(np.count_nonzero(margins <= 0))
    return float(sum(0.5 * math.erfc(m / sigma / math.sqrt(2)) for m in margins.ravel().tolist()))


def poisson_upper(expected: float, confidence: float = CONFIDENCE) -> int:
    """The smallest count that a Poisson variable of this mean does not exceed with this confidence.

    Flips at different positions are rare and nearly independent, so their number is Poisson. For means far
    below one, as in small samples, a normal bound would allow none and raise an alarm once in 1/mean runs.
    """
    if expected > 700:
        return math.ceil(expected + 3.2905 * math.sqrt(expected))
    term = total = math.exp(-expected)
    count = 0
    while total < confidence:
        count += 1
        term *= expected / count
        total += term
    return count


@dataclass(slots=True)
class LogitTally:
    """Accumulates positions of several sequences and computes their figures."""

    error: float = 0.0
    energy: float = 0.0
    kl: list[NDArray[np.float64]] = field(default_factory=list)
    dlogprob: list[NDArray[np.float64]] = field(default_factory=list)
    ranks: list[NDArray[np.int64]] = field(default_factory=list)
    positions: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, oracle: NDArray[np.floating], candidate: NDArray[np.floating], first: int = 1) -> None:
        """Add logits (position, vocab) of both, from position `first` (counted from 1) of their sequence.

        Raises:
            EngineError: their shapes differ.
        """
        a, b = compare.pair(oracle, candidate)
        error, energy = compare.squares(a, b)
        self.error += error
        self.energy += energy
        logprobs = compare.Logprobs.of(a, b)
        self.kl.append(compare.kl_of(logprobs))
        self.dlogprob.append(compare.dlogprob_of(logprobs))
        self.ranks.append(compare.rank(a, b))
        self.positions.append(np.arange(first, first + len(a), dtype=np.int64))

    def figures(self) -> Figures:
        """The figures of everything added; at least one position must have been."""
        kl, ranks = np.concatenate(self.kl), np.concatenate(self.ranks)
        # Relative to logits of zero any error is infinite, also in a floor, and a golden stores no infinity.
        most = AGAINST_ZEROS if math.isfinite(self.error) else math.inf
        return Figures(
            nmse=compare.smallest(compare.nmse_of(self.error, self.energy), most),
            kl_mean=float(kl.mean()),
            kl_p99=compare.p99(kl),
            kl_max=float(kl.max()),
            dlogprob_max=float(np.concatenate(self.dlogprob).max()),
            top1=compare.agreement(ranks, 1),
            top5=compare.agreement(ranks, 5),
            worst_rank=int(ranks.max()),
            buckets=compare.bucket_max(kl, np.concatenate(self.positions)),
            positions=len(kl),
        )


def summary(figures: Figures) -> Mapping[str, float]:
    """The figures by name, buckets included, for evidence and reports."""
    rows = {name: float(getattr(figures, name)) for name in (*GATED, "kl_mean")}
    return rows | {f"kl_max[{label}]": value for label, value in figures.buckets.items()}
