"""Are tokens drawn by the rules? The sampler against known answers and a naive twin, alone and in use."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

import prill_runtime.run.generate as generation
from prill_harness.engines.base import Capability, Engine
from prill_harness.numbers.compare import largest
from prill_harness.run.checks import Observer, check
from prill_harness.tokens.golden import Golden
from prill_runtime.errors import MissingCapability
from prill_runtime.sampling import philox
from prill_runtime.sampling.sampler import SamplingParams, filtered_distribution
from prill_suites import sampler_twins as twins
from prill_suites.common import embedded, fed, refusal
from prill_suites.sampler_borders import borderline, draws_of_sizes
from prill_suites.sampler_rows import PENALISED, SEED, SETTINGS, hurting_rows, tied_logits
from prill_suites.sequences import context_of

TWIN = "naive float64 twin"
TIED = 1e-5  # of a share: what the last bits of two float32 logits make of it
FULL_VOCABULARY = 201_088
RANDOM123 = (  # counter, key, answer: kat_vectors of Random123 for philox4x32, 10 rounds
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def sample(logits: NDArray[Any], params: SamplingParams, position: int, history: Sequence[int] = ()) -> int:
    """Through the very name that the embedded engine calls."""
    return int(generation.sample(logits, params, position, history))  # type: ignore[attr-defined]


@check(
    "sampler.philox", kills=("seed_reused", "seed_ignored", "seed_truncated", "rng_advances", "philox_rounds")
)
def test_philox(observe: Observer, engine: Engine) -> None:
    """The generator gives Random123's known answers, and one number in [0, 1) per seed and position."""
    embedded(engine)
    for counter, key, answer in RANDOM123:
        observe.saw(4, oracle="Random123 known answers")
        got = philox.philox4x32(counter, key)
        observe.expect(got == answer, f"counter {counter}: expected {answer}, got {got}")
        observe.expect(tuple(twins.philox(counter, key)) == answer, "the twin itself misses a known answer")
    seen = set()
    for seed, position in product((0, 1, 2**32, 2**64 - 1), (0, 1, 2, 1023, 2**32)):
        got_u, expected = philox.philox_uniform(seed, position), twins.uniform(seed, position)
        observe.saw(1, oracle="Random123 known answers")
        observe.expect(
            got_u == expected, f"seed {seed} position {position}: expected {expected}, got {got_u}"
        )
        seen.add(got_u)
    observe.expect(len(seen) == 20, f"20 pairs of seed and position gave only {len(seen)} numbers")
    observe.say(f"3 known answers, and {len(seen)} pairs of seed and position, all different, as the twin")


@check("sampler.greedy", kills=("tie_highest_id", "negative_zero_tie", "temperature_zero_sampled"))
def test_greedy(observe: Observer, engine: Engine) -> None:
    """Temperature 0 takes the largest logit, the lowest id on ties, and -0.0 ties with 0.0."""
    embedded(engine)
    inf = float("inf")
    cases = (
        ([1.0, 3.0, 3.0, 2.0], 1),
        ([-0.0, 0.0, -1.0], 0),
        ([0.0, -0.0, -1.0], 0),
        ([-inf, -5.0, -5.0], 1),
        ([7.0] * 5000, 0),
        ([2.0], 0),
    )
    for logits, expected in cases:
        for position in (0, 9):
            got = sample(np.array(logits, np.float32), SamplingParams(), position)
            observe.saw(1, oracle="argmax by hand, lowest id on ties")
            observe.expect(got == expected, f"logits {logits[:4]}…: expected id {expected}, got {got}")
    observe.say(f"{observe.observed} greedy choices, ties to the lowest id")


@check("sampler.not_a_number", kills=("nan_logits_accepted",))
def test_not_a_number(observe: Observer, engine: Engine) -> None:
    """NaN, +infinity and nothing but -infinity are refused, greedy or not."""
    embedded(engine)
    inf, nan = float("inf"), float("nan")
    for logits, temperature in product(([0.0, nan, 1.0], [0.0, inf], [-inf, -inf]), (0.0, 1.0)):
        row, params = np.array(logits, np.float32), SamplingParams(temperature=temperature)
        says = "every logit" if max(logits) == -inf else "id 1"
        call = lambda row=row, params=params: sample(row, params, 0)  # noqa: E731
        sentence = refusal(observe, f"logits {logits}", call, 1, says)
    observe.say(f"6 rows refused, the last with: {sentence}")


@check(
    "sampler.filters",
    kills=(
        "topk_off_by_one",
        "topk_ignored",
        "top_p_before_softmax",
        "top_p_before_temperature",
        "min_p_absolute",
        "penalty_each_time",
        "penalty_by_default",
        "top_p_truncated_list",
        "temperature_twice",
        "penalty_wrong_sign",
        "tie_highest_id",
    ),
)
def test_filters(observe: Observer, engine: Engine) -> None:
    """Which ids survive, with what probability: penalty, temperature, top-k, top-p, min-p, their edges."""
    embedded(engine)
    logits, history, worst = tied_logits(), (1, 2, 3, 3, 100), 0.0
    size = len(logits)
    settings = product(
        (0.5, 1.0, 2.0),
        (0, 1, 7, size - 1, size, 10 * size),
        (0.0, 0.3, 0.95, 1.0),
        (0.0, 0.1, 1.0),
        (1.0, 1.4, 0.7),
    )
    for temperature, top_k, top_p, min_p, penalty in settings:
        named = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        named["repetition_penalty"] = penalty
        expected_ids, expected = twins.distribution(logits.tolist(), history=history, **named)  # type: ignore[arg-type]
        ids, probabilities = filtered_distribution(logits, SamplingParams(**named), history)  # type: ignore[arg-type]
        observe.saw(len(expected_ids), oracle=TWIN)
        observe.expect(
            ids.tolist() == expected_ids,
            f"{named}: expected {len(expected_ids)} ids {expected_ids[:4]}, got {ids[:4].tolist()}",
        )
        worst = largest(worst, float(np.abs(probabilities - expected).max()))
    observe.metric("largest difference of a probability", worst, at_most=1e-14)
    observe.say(f"{observe.observed} ids and probabilities, largest difference {worst:.1e}")


@check("sampler.penalty", kills=("penalty_wrong_sign", "penalty_ignored"))
def test_penalty(observe: Observer, engine: Engine) -> None:
    """A penalty above 1 makes every id already seen less probable, whatever the sign of its logit."""
    embedded(engine)
    logits = np.array([2.0, 1.0, -1.0, -2.0], np.float32)
    plain = dict(zip(*filtered_distribution(logits, SamplingParams(temperature=1.0)), strict=True))
    for seen in range(4):
        params = SamplingParams(temperature=1.0, repetition_penalty=1.5)
        after = dict(zip(*filtered_distribution(logits, params, [seen, seen]), strict=True))
        observe.saw(1, oracle="the same distribution without a penalty")
        observe.expect(
            after[seen] < plain[seen],
            f"id {seen} of logit {logits[seen]}: went from {plain[seen]:.3f} to {after[seen]:.3f}",
        )
    observe.say("4 logits of both signs, each less probable once seen")


@check("sampler.full_vocabulary", kills=("top_p_truncated_list", "vocabulary_truncated", "draw_in_float32"))
def test_full_vocabulary(observe: Observer, engine: Engine) -> None:
    """A flat distribution over 201,088 ids: every id counts, in top-p and in the draw."""
    embedded(engine)
    flat, size = np.zeros(FULL_VOCABULARY, np.float32), FULL_VOCABULARY
    for top_p in (0.25, 0.5, 0.75):
        ids, _ = filtered_distribution(flat, SamplingParams(temperature=1.0, top_p=top_p))
        observe.saw(len(ids), oracle="counting")
        expected = int(size * top_p)
        observe.expect(len(ids) == expected, f"top_p {top_p}: expected {expected} ids, got {len(ids)}")
        observe.expect(int(ids[-1]) == expected - 1, "ids of equal probability are not in ascending order")
    for position in range(20):
        got = sample(flat, SamplingParams(temperature=1.0, seed=SEED), position)
        expected = int(twins.uniform(SEED, position) * size)
        observe.saw(1, oracle="counting")
        observe.expect(abs(got - expected) <= 1, f"position {position}: expected id {expected}, got {got}")
    observe.say(f"top-p and 20 draws over {size} equal ids, all as counted")


@check(
    "sampler.draw",
    kills=(
        "seed_reused",
        "temperature_twice",
        "tie_highest_id",
        "topk_off_by_one",
        "penalty_forgets",
        "position_off_by_one",
        "late_draws_of_another_seed",
    ),
)
def test_draw(observe: Observer, engine: Engine) -> None:
    """The id at a position is the one whose stretch of the cumulative distribution Philox hits."""
    embedded(engine)
    logits, history = tied_logits(), list(range(0, 200, 2))
    for setting, seed in product(SETTINGS, (0, 1)):
        named = {"repetition_penalty": 1.0} | setting
        ids, probabilities = twins.distribution(logits.tolist(), history=history, **named)
        for position in range(40):
            expected = twins.draw(ids, probabilities, twins.uniform(seed, position))
            got = sample(logits, SamplingParams(**named, seed=seed), position, history)
            observe.saw(1, oracle=TWIN)
            observe.expect(
                got == expected,
                f"{named}, seed {seed}, position {position}: expected id {expected}, got {got}",
            )
    observe.say(f"{observe.observed} draws, each the id the twin draws")


@check(
    "sampler.backend",
    kills=(
        "tie_highest_id",
        "negative_zero_tie",
        "topk_off_by_one",
        "temperature_twice",
        "penalty_wrong_sign",
        "penalty_each_time",
        "position_off_by_one",
        "seed_reused",
        "nan_logits_accepted",
        "vocabulary_truncated",
    ),
    needs=(Capability.OPS,),
)
def test_backend(observe: Observer, engine: Engine) -> None:
    """Whatever computes the logits draws from them as the twin: its own kernels, or the sampler on the host.
    Ties, masks, one id, and settings at their ends; a draw on a border may fall on either side."""
    embedded(engine)
    draw = getattr(engine.ops(), "draw", sample)
    settings: tuple[dict[str, Any], ...] = (
        *SETTINGS,
        {"temperature": 0.0, "repetition_penalty": 2.0},
        {"temperature": 1e-150},
        {"temperature": 1e150, "top_p": 0.5},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 1 << 40, "repetition_penalty": 0.5},
        {"temperature": 3.0, "top_k": 700, "top_p": 0.999, "min_p": 1e-12},
    )
    for number, ((case, logits), setting) in enumerate(product(hurting_rows(), settings)):
        row, seed, position = np.array(logits, np.float32), number << 31 | 1, 3 * number
        history = [number % len(logits), 0, 0, len(logits) - 1]
        expected = borderline(row, seed, position, history, setting)
        got = int(draw(row, SamplingParams(**setting, seed=seed), position, history))
        observe.saw(1, oracle=TWIN)
        observe.expect(got in expected, f"{case}, {setting}: expected id {expected}, got {got}")
    draws_of_sizes(observe, draw, (SETTINGS[0], SETTINGS[-1]))
    flat = np.zeros(FULL_VOCABULARY, np.float32)
    for position, top_p in ((5, 1.0), (6, 0.75)):
        got = int(draw(flat, SamplingParams(1.0, top_p=top_p, seed=SEED), position))
        counted = int(twins.uniform(SEED, position) * int(FULL_VOCABULARY * top_p))
        observe.saw(1, oracle="counting")
        observe.expect(abs(got - counted) <= 1, f"flat, top_p {top_p}: expected id {counted}, got {got}")
    inf, nan = float("inf"), float("nan")
    for refused in ([0.0, nan], [0.0, inf], [-inf, -inf]):
        row, says = np.array(refused, np.float32), "every logit" if max(refused) == -inf else "id 1"
        call = lambda row=row: draw(row, SamplingParams(temperature=1.0), 0)  # noqa: E731
        refusal(observe, f"logits {refused}", call, 1, says)
    observe.say(f"{observe.observed} draws and refusals, as the twin's")


def equally_probable(ids: Sequence[int], probabilities: Sequence[float], several: Collection[int]) -> bool:
    """Whether several ids are as probable as one another, up to the last bits of float32 logits."""
    share = dict(zip(ids, probabilities, strict=True))
    found = [share.get(each, 0.0) for each in several]
    return len(found) > 1 and max(found) - min(found) <= TIED * max(found)


@check(
    "sampler.engine_replay",
    kills=("temperature_twice", "topk_off_by_one", "seed_reused", "sampling_ignored", "seed_zero_is_none"),
    needs=(Capability.GENERATE, Capability.LOGITS),
)
def test_engine_replay(observe: Observer, engine: Engine, golden: Golden) -> None:
    """The engine's sampled tokens are those a naive twin draws from the engine's own logits."""
    room = context_of(golden)
    prompt, close, tied = list(golden.prompts[0].ids[: min(16, room // 2)]), 0, 0
    count = min(16, room - len(prompt))
    for number, setting in enumerate((*SETTINGS, *PENALISED)):
        seed = 11 + number + (number << 40) if number else 0  # which is a seed as any other
        done = engine.generate(prompt, max_tokens=count, ignore_eos=True, seed=seed, **setting)
        got, greedy = len(done.ids), not setting["temperature"]
        observe.expect(got == count, f"{setting}: expected {count} tokens, got {got}")
        text = [*prompt, *done.ids]
        rows = engine.logits(text[:-1])
        steps: NDArray[Any] | None = None
        for position in range(len(prompt), len(text)):
            row = rows[position - 1].tolist()
            ids, probabilities = twins.distribution(row, history=text[:position], **setting)
            fraction = twins.uniform(seed, position)
            # One pass and single steps differ in the last bits of the logits: at a border either id will do.
            drawn = {twins.draw(ids, probabilities, fraction + nudge) for nudge in (-1e-5, 0.0, 1e-5)}
            decided = drawn == {text[position]}
            if not decided and Capability.SESSIONS in engine.info.capabilities:
                # Nor do ties keep their order: what it drew from were the logits of single steps.
                if steps is None:
                    steps = fed(engine, [prompt, *([token] for token in done.ids[:-1])])
                own = steps[position - 1].tolist()
                exact = twins.draw(*twins.distribution(own, history=text[:position], **setting), fraction)
                drawn |= {exact}
                decided = exact == text[position]
            observe.saw(1, oracle="naive float64 twin on the engine's logits")
            if position == len(prompt) and equally_probable(
                *(
                    twins.distribution(row, **setting | {"temperature": 1.0})
                    if greedy
                    else (ids, probabilities)
                ),
                {*drawn, text[position]},
            ):
                # An engine may compute the row behind a prompt by itself: ids that tie there change places.
                tied += 1
                continue
            close += not decided
            observe.expect(
                text[position] in drawn,
                f"{setting}, seed {seed}, position {position}: expected {drawn}, got {text[position]}",
            )
    if close * 5 > observe.observed:
        raise MissingCapability(
            f"{close} of {observe.observed} draws lay on a border: the replay decided nothing"
        )
    told = f", {tied} behind the prompt among ids that tie" if tied else ""
    observe.say(f"{observe.observed} sampled tokens replayed, {close} of them on a border{told}")
