"""Faults of the sampler: of its filters, its penalty, its order on ties, and its random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ONE
from prill_runtime.sampling.sampler import SamplingParams, filtered_distribution, philox_uniform

FILTERS = "prill_runtime.sampling.sampler:filtered_distribution"
PENALTY = "prill_runtime.sampling.sampler:_penalised"
UNIFORM = ("prill_runtime.sampling.philox:philox_uniform", "prill_runtime.sampling.sampler:philox_uniform")
# The name that the engine calls, and that the checks of the sampler go through.
SAMPLE = "prill_runtime.run.generate:sample"
BLAMES = ("sampler",)
SHORT_LIST = 128  # ids
LAST = 64  # tokens


def other_settings(changed: Callable[[SamplingParams], dict[str, Any]]) -> Iterator[Patch]:
    """Filters that work with other settings than they were given."""

    def wrap(filters: Any) -> Any:
        return lambda logits, params, *rest: filters(logits, replace(params, **changed(params)), *rest)

    yield Patch(FILTERS, wrap)


def other_numbers(changed: Callable[[int, int], tuple[int, int]]) -> Iterator[Patch]:
    """Random numbers of another seed and position than were asked for."""
    for target in UNIFORM:
        yield Patch(target, lambda uniform: lambda seed, position: uniform(*changed(seed, position)))


@fault(area="sampler", blames=BLAMES, models=ONE)
def temperature_twice() -> Iterator[Patch]:
    """The logits are divided by the temperature twice."""
    yield from other_settings(lambda p: {"temperature": p.temperature**2})


@fault(area="sampler", blames=BLAMES, models=ONE)
def temperature_zero_sampled() -> Iterator[Patch]:
    """Temperature 0 draws at temperature 1 where it should take the largest logit."""
    yield from other_settings(lambda p: {"temperature": p.temperature or 1.0})


@fault(area="sampler", blames=BLAMES, models=ONE)
def topk_off_by_one() -> Iterator[Patch]:
    """Top-k keeps one id more than k."""
    yield from other_settings(lambda p: {"top_k": p.top_k + bool(p.top_k)})


@fault(area="sampler", blames=BLAMES, models=ONE)
def topk_ignored() -> Iterator[Patch]:
    """Top-k keeps every id."""
    yield from other_settings(lambda p: {"top_k": 0})


@fault(area="sampler", blames=BLAMES, models=ONE)
def top_p_truncated_list() -> Iterator[Patch]:
    """Top-p sees the most probable ids of a short list alone, as if they were all the mass."""
    yield from other_settings(
        lambda p: {"top_k": min(p.top_k or SHORT_LIST, SHORT_LIST)} if p.top_p < 1 else {}
    )


@fault(area="sampler", blames=BLAMES, models=ONE)
def vocabulary_truncated() -> Iterator[Patch]:
    """The softmax runs over the first 65,536 ids alone; the rest of a larger vocabulary is never drawn."""

    def wrap(filters: Any) -> Any:
        return lambda logits, *rest: filters(np.asarray(logits)[:65_536], *rest)

    yield Patch(FILTERS, wrap)


@fault(area="sampler", blames=BLAMES, models=ONE)
def top_p_before_softmax() -> Iterator[Patch]:
    """Top-p adds up logits where it should add up probabilities."""

    def wrap(filters: Any) -> Any:
        def cut(logits: Any, params: Any, history: Any = ()) -> Any:
            ids, probabilities = filters(logits, replace(params, top_p=1.0), history)
            mass = np.cumsum(np.maximum(np.asarray(logits, np.float64)[ids], 0.0))
            kept = ids.size if params.top_p == 1 else 1 + int(np.searchsorted(mass, params.top_p * mass[-1]))
            return ids[:kept], probabilities[:kept] / probabilities[:kept].sum()

        return cut

    yield Patch(FILTERS, wrap)


@fault(area="sampler", blames=BLAMES, models=ONE)
def top_p_before_temperature() -> Iterator[Patch]:
    """Top-p counts the mass before the temperature is applied."""

    def wrap(filters: Any) -> Any:
        def cut(logits: Any, params: Any, history: Any = ()) -> Any:
            if params.temperature == 0 or params.top_p == 1:
                return filters(logits, params, history)
            kept, _ = filters(logits, replace(params, temperature=1.0), history)
            return filters(logits, replace(params, top_p=1.0, top_k=kept.size), history)

        return cut

    yield Patch(FILTERS, wrap)


@fault(area="sampler", blames=BLAMES, models=ONE)
def min_p_absolute() -> Iterator[Patch]:
    """Min-p is held against the probability itself, not against the most probable id's."""

    def wrap(filters: Any) -> Any:
        def cut(logits: Any, params: Any, history: Any = ()) -> Any:
            ids, probabilities = filters(logits, replace(params, min_p=0.0), history)
            kept = max(1, int(np.count_nonzero(probabilities >= params.min_p)))
            return ids[:kept], probabilities[:kept] / probabilities[:kept].sum()

        return cut

    yield Patch(FILTERS, wrap)


@fault(area="sampler", blames=BLAMES, models=ONE)
def tie_highest_id() -> Iterator[Patch]:
    """Of equal logits the highest id comes first."""

    def wrap(filters: Any) -> Any:
        def backwards(logits: Any, params: Any, history: Sequence[int] = ()) -> Any:
            last = len(logits) - 1
            ids, probabilities = filters(logits[::-1], params, [last - i for i in history])
            return last - ids, probabilities

        return backwards

    yield Patch(FILTERS, wrap)


@fault(area="sampler", blames=BLAMES, models=ONE)
def negative_zero_tie() -> Iterator[Patch]:
    """A logit of -0.0 is less than one of 0.0, as their bits are."""

    def wrap(filters: Any) -> Any:
        def by_bits(logits: Any, *rest: Any) -> Any:
            negative = (logits == 0) & np.signbit(logits)
            return filters(np.where(negative, np.float64(-1e-300), logits), *rest)

        return by_bits

    yield Patch(FILTERS, wrap)


@fault(area="sampler", blames=BLAMES, models=ONE)
def nan_logits_accepted() -> Iterator[Patch]:
    """NaN counts as 0 and infinity as the largest number."""

    def wrap(penalised: Any) -> Any:
        return lambda logits, *rest: penalised(np.nan_to_num(logits), *rest)

    yield Patch(PENALTY, wrap)


@fault(area="sampler", blames=BLAMES, models=ONE)
def penalty_wrong_sign() -> Iterator[Patch]:
    """The repetition penalty divides negative logits too, which makes their ids more probable."""

    def wrap(penalised: Any) -> Any:
        def divided(logits: Any, penalty: float, history: Sequence[int]) -> Any:
            values = penalised(logits, 1.0, history)
            values[[*set(history)]] /= penalty
            return values

        return divided

    yield Patch(PENALTY, wrap)


@fault(area="sampler", blames=BLAMES, models=ONE)
def penalty_ignored() -> Iterator[Patch]:
    """The repetition penalty does nothing."""
    yield Patch(PENALTY, lambda penalised: lambda logits, penalty, history: penalised(logits, 1.0, history))


@fault(area="sampler", blames=BLAMES, models=ONE)
def penalty_by_default() -> Iterator[Patch]:
    """A repetition penalty of 1.1 holds where none was asked for."""
    yield from other_settings(
        lambda p: {"repetition_penalty": 1.1 if p.repetition_penalty == 1 else p.repetition_penalty}
    )


@fault(area="sampler", blames=BLAMES, models=ONE)
def penalty_each_time() -> Iterator[Patch]:
    """The repetition penalty counts an id as often as it occurred."""

    def wrap(penalised: Any) -> Any:
        def repeated(logits: Any, penalty: float, history: Sequence[int]) -> Any:
            for token in history:
                logits = penalised(logits, penalty, [token])
            return penalised(logits, 1.0, ())

        return repeated

    yield Patch(PENALTY, wrap)


@fault(area="sampler", blames=BLAMES, models=ONE)
def penalty_forgets() -> Iterator[Patch]:
    """The repetition penalty sees the last 64 tokens alone."""

    def wrap(sample: Any) -> Any:
        return lambda logits, params, position, history=(): sample(logits, params, position, history[-LAST:])

    yield Patch(SAMPLE, wrap)


@fault(area="sampler", blames=BLAMES, models=ONE)
def sampling_ignored() -> Iterator[Patch]:
    """Every choice is greedy, whatever was asked for."""

    def wrap(sample: Any) -> Any:
        return lambda logits, params, *rest: sample(logits, SamplingParams(), *rest)

    yield Patch(SAMPLE, wrap)


@fault(area="sampler", blames=BLAMES, models=ONE)
def draw_in_float32() -> Iterator[Patch]:
    """The cumulative distribution is added up in float32, and over a large vocabulary it runs off."""

    def wrap(sample: Any) -> Any:
        def drawn(logits: Any, params: Any, position: int, history: Sequence[int] = ()) -> int:
            ids, probabilities = filtered_distribution(logits, params, history)
            mass = np.cumsum(probabilities.astype(np.float32))
            at = np.searchsorted(mass, np.float32(philox_uniform(params.seed, position)) * mass[-1], "right")
            return int(ids[min(int(at), ids.size - 1)])

        return drawn

    yield Patch(SAMPLE, wrap)


@fault(area="sampler", blames=BLAMES, models=ONE)
def seed_reused() -> Iterator[Patch]:
    """Every position draws with the random number of the first."""
    yield from other_numbers(lambda seed, position: (seed, 0))


@fault(area="sampler", blames=BLAMES, models=ONE)
def seed_ignored() -> Iterator[Patch]:
    """Every seed gives the random numbers of seed 0."""
    yield from other_numbers(lambda seed, position: (0, position))


@fault(area="sampler", blames=BLAMES, models=ONE)
def seed_truncated() -> Iterator[Patch]:
    """A seed counts with its lower 32 bits alone."""
    yield from other_numbers(lambda seed, position: (seed & 0xFFFFFFFF, position))


@fault(area="sampler", blames=BLAMES, models=ONE)
def position_off_by_one() -> Iterator[Patch]:
    """A token is drawn with the random number of the position after its own."""

    def wrap(sample: Any) -> Any:
        return lambda logits, params, position, *rest: sample(logits, params, position + 1, *rest)

    yield Patch(SAMPLE, wrap)


@fault(area="sampler", blames=BLAMES, models=ONE)
def philox_rounds() -> Iterator[Patch]:
    """Philox runs seven rounds where it owes ten."""
    yield Patch("prill_runtime.sampling.philox:_ROUNDS", lambda rounds: rounds - 3)


@fault(area="sampler", blames=BLAMES, models=ONE)
def rng_advances() -> Iterator[Patch]:
    """Random numbers go on from draw to draw, whatever the position."""
    drawn = count()
    yield from other_numbers(lambda seed, position: (seed, next(drawn)))
