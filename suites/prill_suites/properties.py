"""What must hold without an oracle: the same work in another shape, beside a control that must differ."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prill_harness.engines.base import Capability, Engine
from prill_harness.engines.embedded import Embedded
from prill_harness.engines.features import packaged
from prill_harness.numbers.compare import largest, log_softmax
from prill_harness.run.checks import Observer, check
from prill_harness.tokens.golden import Golden
from prill_suites.common import at_offset, fed, file_fields
from prill_suites.controls import Pair, Trial
from prill_suites.properties_batch import compositions, texts_alone
from prill_suites.properties_chunks import chunkings
from prill_suites.properties_crowd import CROWD, crowded, mingled
from prill_suites.properties_ends import BEYOND, NEVER, ending, endless, stopping
from prill_suites.properties_seeds import another_seed
from prill_suites.sequences import LONG, late_from, late_prompt, late_spans, longest_of, moves_freely
from prill_suites.tokenizer_twins import Twin

ONE_PASS = "the engine's own logits in one pass"
SIXTEEN_BITS = 1 << 16  # positions that are counted in so many
OpenModel = Callable[[str, str], Engine]


@pytest.fixture
def trial(observe: Observer, engine: Engine, oracle: Embedded, golden: Golden) -> Trial:
    return Trial(observe, engine, oracle, golden)


@pytest.fixture(scope="module")
def twin(model_path: Path) -> Twin:
    """What the file's metadata, as gguf reads it, says about text."""
    return Twin(file_fields(model_path))


@check(
    "properties.prefill_decode",
    kills=(
        "cache_last_row_not_written",
        "cache_rows_overwritten",
        "mask_off_by_one",
        "rope_position_restarts",
    ),
    needs=(Capability.SESSIONS, Capability.LOGITS),
)
def test_prefill_decode(trial: Trial, observe: Observer, engine: Engine) -> None:
    """A prompt of n and k single tokens give what a prompt of n + k gives."""
    ids = trial.texts[0][: min(72, trial.context)]
    first = 2 * len(ids) // 3
    expected, rest = engine.logits(ids), len(ids) - first
    got = fed(engine, [ids[:first], *([i] for i in ids[first:])])
    observe.saw(expected.size, oracle=ONE_PASS)
    error = trial.same(f"{first} + {rest} x 1", ids, expected, got)

    def without_prompt(engine: Engine) -> Pair:
        return engine.logits(ids)[first:], fed(engine, [ids[first:]])

    gap = trial.control("the last tokens without their prompt", without_prompt)
    said = f"{first} and {rest} single tokens equal {len(ids)} at once, NMSE {error:.2g}"
    observe.say(f"{said}; without the prompt: {gap}")


@check(
    "properties.chunking",
    kills=(
        "chunk_start_ignored",
        "mask_off_by_one",
        "rope_position_restarts",
        "late_chunk_blind",
        "late_decode_sees_less",
        "late_row_lost_when_grown",
        "late_chunk_misplaced",
        "late_single_row_blind",
        "late_small_chunk_blind",
    ),
    needs=(Capability.SESSIONS, Capability.LOGITS),
)
def test_chunking(trial: Trial, observe: Observer, engine: Engine) -> None:
    """Any chunking of a prompt gives what one chunk gives, past 256 positions too where there are as many.

    A small model's whole context is fed in chunks of 1, of 7, of 64 and of 512; up to 300 positions of any
    model in chunks of other sizes.
    """
    whole, worst = longest_of(trial.golden), 0.0
    expected, spans = engine.logits(whole), [range(late_from(trial.golden)), *late_spans(trial.golden)]
    ways = list(chunkings(len(whole)))
    for name, sizes in ways:
        starts = np.cumsum((0, *sizes)).tolist()
        got = fed(engine, [whole[a:b] for a, b in pairwise(starts)])
        observe.saw(got.size, oracle=ONE_PASS)
        for span in (range(span.start, min(span.stop, len(got))) for span in spans):
            if span:
                here, there = (rows[span.start : span.stop] for rows in (expected, got))
                worst = largest(
                    worst, trial.same(f"{name}, from {span.start}", whole[: span.stop], here, there)
                )
    ids = whole[:LONG]
    half = len(ids) // 2

    def swapped(engine: Engine) -> Pair:
        return engine.logits(ids), fed(engine, [ids[half:], ids[:half]])

    gap = trial.control("chunks swapped", swapped)
    observe.say(f"{len(ways)} chunkings of {len(whole)} ids, worst NMSE {worst:.2g}; swapped chunks: {gap}")


@check(
    "properties.batch",
    kills=(
        "batch_rows_mixed",
        "batch_positions_of_first",
        "batch_keys_of_neighbour",
        "shapes_past_16_sequences",
        "shapes_last_row_past_16",
        "shapes_mixed_step_keys",
        "shapes_mixed_step_positions",
    ),
    needs=(Capability.BATCH, Capability.LOGITS),
)
def test_batch(trial: Trial, observe: Observer, engine: Engine) -> None:
    """A prompt gives the same alone and in any company, in any order."""
    worst, neighbour = compositions(trial)
    gap = trial.control("a neighbour's rows", neighbour)
    said = texts_alone(trial)
    mixed, clause = mingled(trial)
    worst = largest(worst, mixed, crowded(trial, trial.logprob_bound))
    observe.say(
        f"4 compositions and {CROWD} prompts equal each alone, {clause}, worst NMSE {worst:.2g}; "
        f"a neighbour's rows: {gap}; {said}"
    )


@check("properties.switching", kills=("models_share_state",), needs=(Capability.LOGITS,))
def test_switching(
    trial: Trial, observe: Observer, engine: Engine, open_model: OpenModel, pytestconfig: pytest.Config
) -> None:
    """Model A, then model B, then A again gives A's bits."""
    ids = trial.texts[0][: min(40, trial.context)]
    before = engine.logits(ids)
    mine = trial.oracle.info.config["architecture"]
    spec = next(spec for spec, found in packaged().items() if found.architecture != mine)
    other = open_model(pytestconfig.getoption("prill_engine"), spec)
    own = [i % 256 for i in ids]  # every packaged model has as many
    between = other.logits(own)
    after, again = engine.logits(ids), other.logits(own)
    observe.saw(before.size + between.size, oracle="the same model before the switch")
    observe.expect(
        bool(np.array_equal(before, after)), f"after {spec} the model gives other logits than before"
    )
    observe.expect(bool(np.array_equal(between, again)), f"{spec} gives other logits the second time")
    gap = trial.control("the other model", lambda engine: (engine.logits(ids), between))
    observe.say(f"A, {spec}, A: {before.size} logits bit-equal; the other model's: {gap}")


@check("properties.same_seed", kills=("seed_ignored",), needs=(Capability.GENERATE,))
def test_same_seed(trial: Trial, observe: Observer, engine: Engine) -> None:
    """Two runs of one seed are bit-equal; another seed differs."""
    prompt = trial.prompt(0, 12)
    asked: dict[str, Any] = {"max_tokens": trial.room(prompt, 24), "temperature": 1.2, "ignore_eos": True}
    runs = [engine.generate(prompt, seed=1, **asked) for _ in range(2)]
    observe.saw(len(runs[0].ids) * 2, oracle="the same request again")
    observe.expect(runs[0].ids == runs[1].ids, f"seed 1 twice: {runs[0].ids} and {runs[1].ids}")
    observe.expect(runs[0].logprobs == runs[1].logprobs, "seed 1 twice: the logprobs are not bit-equal")

    other = another_seed(trial, prompt, asked)
    observe.say(f"{len(runs[0].ids)} tokens and logprobs of one seed bit-equal; another seed's text: {other}")


@check(
    "properties.logprobs",
    kills=(
        "logprob_base_two",
        "logprob_of_best",
        "logprob_not_normalised",
        "logprob_after_temperature",
        "late_logprob_in_half",
    ),
    needs=(Capability.GENERATE, Capability.LOGITS),
)
def test_logprobs(trial: Trial, observe: Observer, engine: Engine) -> None:
    """The logprob of a generated token is the natural log-softmax of the engine's raw logits at it, at the
    end of a small model's context too."""
    prompt, worst, told = trial.prompt(0, 12), 0.0, list[tuple[int, float]]()
    count = trial.room(prompt, 16)
    greedy: dict[str, Any] = {"max_tokens": count, "ignore_eos": True}
    hot = greedy | {"temperature": 3.0, "top_k": 40, "seed": 7}
    late = longest_of(trial.golden)[:-count]
    for ids, drawn in ((prompt, greedy), (prompt, hot), *[(late, hot)] * (len(late) >= LONG)):
        told.clear()
        done = engine.generate(ids, on_token=lambda token, logprob: told.append((token, logprob)), **drawn)
        rows = engine.logits([*ids, *done.ids[:-1]])[len(ids) - 1 :]
        expected = log_softmax(rows)[np.arange(len(done.ids)), list(done.ids)]
        observe.saw(len(done.ids), oracle="log-softmax of the engine's own logits")
        as_many = len(done.logprobs) == len(done.ids) == count
        observe.expect(as_many, f"{count} tokens, {len(done.logprobs)} logprobs")
        heard = told == list(zip(done.ids, done.logprobs, strict=True))
        observe.expect(heard, f"the callback heard {told[:2]}…, the text has {done.logprobs[:2]}…")
        worst = largest(worst, float(np.abs(expected - done.logprobs).max()))
    observe.metric("largest difference of a logprob", worst, at_most=trial.logprob_bound)

    def others(engine: Engine) -> bool:
        for seed in range(7, 15):  # of a text that is all but certain one may draw nothing else
            made = list(engine.generate(prompt, **hot | {"seed": seed}).ids)
            rows = engine.logits([*prompt, *made[:-1]])[len(prompt) - 1 :]
            if np.any(rows.max(axis=-1) - rows[np.arange(len(made)), made] > trial.tau(rows)):
                return True
        return False

    other = trial.differs("all tokens drawn are the most probable", others)
    observe.say(
        f"{observe.observed} logprobs, largest difference {worst:.1e}; drawn beside the best token: {other}"
    )


@check(
    "properties.end_of_text",
    kills=(
        "eos_ignored",
        "eos_included",
        "ignore_eos_ignored",
        "finish_reason_lost",
        "ends_forgotten",
        "late_end_ignored",
    ),
    needs=(Capability.GENERATE,),
)
def test_end_of_text(observe: Observer, engine: Engine, golden: Golden, twin: Twin) -> None:
    """Text ends at the end-of-text token, which is no part of it, behind a late prompt too; told to ignore
    that, the engine goes on."""
    if not twin.ends:
        endless(observe, engine, golden)
        return
    told = []
    for prompt, at, arguments in ending(observe, engine, golden, twin.ends):
        free = engine.generate(prompt, max_tokens=at + BEYOND, ignore_eos=True, **arguments)
        ended = engine.generate(prompt, max_tokens=at + BEYOND, **arguments)
        observe.saw(at + 1, oracle="the same request, told to ignore the end")
        where = f"behind {len(prompt)} ids"
        observe.expect(
            ended.finish_reason == "eos",
            f"{where}: expected 'eos' after {at} tokens, got {ended.finish_reason!r}",
        )
        observe.expect(
            ended.ids == free.ids[:at],
            f"{where}: expected the {at} tokens before the end, got {len(ended.ids)}",
        )
        longer = len(free.ids) == at + BEYOND and free.finish_reason == "length"
        observe.expect(longer, f"the control did not differ: ignoring the end gave {len(free.ids)} tokens")
        observe.expect(
            ended.end_id in (None, free.ids[at]), f"ended by id {free.ids[at]}, but reports {ended.end_id}"
        )
        told.append(f"{where} after {at} tokens at id {free.ids[at]} {twin.tokens[free.ids[at]]!r}")
    observe.say(f"stopped {' and '.join(told)}; told to ignore it, went on for {BEYOND} tokens")


@check(
    "properties.max_tokens",
    kills=("max_tokens_off_by_one", "first_token_dropped"),
    needs=(Capability.GENERATE,),
)
def test_max_tokens(trial: Trial, observe: Observer, engine: Engine) -> None:
    """Exactly as many tokens come as were asked for, and asking for more only adds to them."""
    prompt = trial.prompt(0, 12)
    most = trial.room(prompt, 6)
    asked = (0, 1, most - 1, most)
    runs = {n: engine.generate(prompt, max_tokens=n, ignore_eos=True) for n in asked}
    for n, done in runs.items():
        observe.saw(n + 1, oracle="the number asked for")
        observe.expect(
            len(done.ids) == n == len(done.logprobs) and done.finish_reason == "length",
            f"max_tokens {n}: {len(done.ids)} tokens, {len(done.logprobs)} logprobs, {done.finish_reason!r}",
        )
        observe.expect(
            done.ids == runs[most].ids[:n], f"the first {n} of {most} tokens are not those of max_tokens {n}"
        )
    observe.say(f"{', '.join(map(str, asked))} tokens asked for, as many given, each the start of the next")


@check(
    "properties.stop_strings",
    kills=("stop_within_token_only", "stop_ignored", "stop_from_half", "late_stop_ignored"),
    needs=(Capability.GENERATE,),
)
def test_stop_strings(observe: Observer, engine: Engine, golden: Golden, twin: Twin) -> None:
    """A stop string split over two tokens ends the text at the token that completes it, in any script, and
    behind a late prompt."""
    found, where = stopping(engine, golden, twin.special)
    for text in found:
        stopped, never = text.again(engine, text.stop), text.again(engine, NEVER)
        observe.saw(text.count, oracle="the same request without a stop string")
        observe.expect(
            stopped.ids == text.free.ids[: text.count] and stopped.finish_reason == text.reason,
            f"stop {text.stop!r}: expected {text.count} tokens and {text.reason!r}, "
            f"got {len(stopped.ids)} and {stopped.finish_reason!r}",
        )
        observe.expect(
            never.ids == text.free.ids and never.finish_reason == "length",
            "the control differed: a stop string that never occurs changed the text",
        )
    observe.say(f"{len(found)} stop strings {where}")


@check(
    "properties.cancel",
    kills=("cancel_ignored", "callback_missing", "late_cancel_ignored"),
    needs=(Capability.GENERATE,),
)
def test_cancel(trial: Trial, observe: Observer, engine: Engine) -> None:
    """A callback that says no ends the text at once; one that says nothing does not; late on small models."""
    prompt, seen = late_prompt(trial.golden) or trial.prompt(0, 12), list[int]()
    count = trial.room(prompt, 9)
    most = max(1, min(3, count - 1))

    def some(token: int, logprob: float) -> bool:
        seen.append(token)
        return len(seen) < most

    # First, so that nothing a cancelled request may leave behind is taken for a cancel that went wrong.
    free = engine.generate(prompt, max_tokens=count, ignore_eos=True, on_token=lambda token, logprob: None)
    done = engine.generate(prompt, max_tokens=count, ignore_eos=True, on_token=some)
    observe.saw(most, oracle="the tokens the callback saw")
    observe.expect(
        done.finish_reason == "cancelled" and list(done.ids) == seen and len(seen) == most,
        f"cancelled at token {most}: got {len(done.ids)} tokens and {done.finish_reason!r}",
    )
    going_on = len(free.ids) == count and free.ids[:most] == done.ids
    observe.expect(going_on, "the control did not differ: without a refusal the text did not go on")
    observe.say(f"cancelled after {most} of {count} tokens; without a refusal all of them came")


@check(
    "properties.position_offset",
    kills=("rope_keys_not_rotated", "learned_positions_ignored", "rope_ignored", "late_position_of_16_bits"),
)
def test_position_offset(trial: Trial, observe: Observer, engine: Engine) -> None:
    """Moving all positions together changes nothing under RoPE, not even to either side of position 65536,
    and must change a model with learned positions, with sharper queries or with other divisors late."""
    length = min(48, max(2, 3 * trial.context // 4))
    half, ids = length // 2, trial.texts[0][:length]
    rotary = moves_freely(engine.info.config)
    shift = SIXTEEN_BITS - half if "rope_base" in engine.info.config else min(16, trial.context - length)
    halves = [ids[:half], ids[half:]]
    plain, moved = at_offset(engine, halves, [0, 0]), at_offset(engine, halves, [shift, shift])
    observe.saw(plain.size, oracle="the same ids from position 0")

    def by(first: int, second: int) -> Callable[[Engine], Pair]:
        return lambda e: (at_offset(e, halves, [0, 0])[half:], at_offset(e, halves, [first, second])[half:])

    gap = trial.control("half of the positions moved", by(0, shift))
    if rotary:
        error = trial.same(f"all positions + {shift}", ids, plain, moved)
        observe.say(f"RoPE: all positions + {shift} change nothing, NMSE {error:.2g}; half of them: {gap}")
    else:
        change = trial.control(f"all positions + {shift}", by(shift, shift))
        observe.say(f"positions that count: + {shift} and the logits: {change}; half of them: {gap}")
