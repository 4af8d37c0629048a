"""What must hold without an oracle: the same work in another shape, beside a control that must differ."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from prill_harness.checks import Observer, check
from prill_harness.compare import log_softmax
from prill_harness.divergence import first_difference
from prill_harness.engines.base import Capability, Engine
from prill_harness.golden import Golden
from prill_harness.lanes import bounds, lane_for
from prill_runtime.errors import Inconclusive
from prill_suites.common import SAME, control, embedded, fed, rounding, same
from prill_suites.properties_crowd import CROWD, crowded
from prill_suites.properties_ends import ending

ONE_PASS = "the engine's own logits in one pass"
CHUNKS = (1, 7, 31, 32, 33, 64)
TEXT, LATE = 230, 256  # tokens; positions, of which the last bucket begins after LATE
OTHER = {"llama": "fixture:gpt2-tiny", "gpt2": "fixture:llama-tiny"}
OpenModel = Callable[[str, str], Engine]


@pytest.fixture(scope="module")
def texts(golden: Golden) -> list[list[int]]:
    """Golden prompts with their continuations."""
    return [[*prompt.ids, *prompt.tokens] for prompt in golden.prompts]


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
def test_prefill_decode(observe: Observer, engine: Engine, texts: list[list[int]]) -> None:
    """A prompt of n and k single tokens give what a prompt of n + k gives."""
    ids = texts[0][:72]
    expected = engine.logits(ids)
    got = fed(engine, [ids[:48], *([i] for i in ids[48:])])
    observe.saw(expected.size, oracle=ONE_PASS)
    error = same(observe, engine, "48 + 24 x 1", expected, got)
    gap = control(
        observe, engine, "the last tokens without their prompt", expected[48:], fed(engine, [ids[48:]])
    )
    observe.say(f"48 and 24 single tokens equal 72 at once, NMSE {error:.2g}; without the prompt {gap:.2g}")


@check(
    "properties.chunking",
    kills=("chunk_start_ignored", "mask_off_by_one", "rope_position_restarts"),
    needs=(Capability.SESSIONS, Capability.LOGITS),
)
def test_chunking(observe: Observer, engine: Engine, texts: list[list[int]]) -> None:
    """Any chunking of a prompt gives what one chunk gives, past 256 positions too."""
    ids = texts[0][:300]
    expected, worst = engine.logits(ids), 0.0
    for sizes in (CHUNKS, CHUNKS[::-1], (255, 1), (256, 2)):
        starts = np.cumsum((0, *sizes)).tolist()
        pieces = [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True) if ids[a:b]]
        observe.saw(expected.size, oracle=ONE_PASS)
        worst = max(
            worst, same(observe, engine, f"chunks {[len(p) for p in pieces]}", expected, fed(engine, pieces))
        )
    swapped = fed(engine, [ids[150:], ids[:150]])
    gap = control(observe, engine, "chunks swapped", expected, swapped)
    observe.say(f"4 chunkings of {len(ids)} ids, worst NMSE {worst:.2g}; swapped chunks {gap:.2g}")


@check(
    "properties.batch",
    kills=("batch_rows_mixed", "batch_positions_of_first", "batch_keys_of_neighbour"),
    needs=(Capability.BATCH, Capability.LOGITS),
)
def test_batch(observe: Observer, engine: Engine, golden: Golden, texts: list[list[int]]) -> None:
    """A prompt gives the same alone and in any company, in any order."""
    batch = [texts[0][:90], texts[1][:1], texts[2][:17], texts[0][:33]]
    alone = [engine.logits(ids) for ids in batch]
    worst = 0.0
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2,), (1, 3)):
        together = engine.logits_batch([batch[i] for i in order])
        observe.expect(len(together) == len(order), f"{len(order)} prompts gave {len(together)} results")
        for place, i in enumerate(order):
            observe.saw(alone[i].size, oracle="each prompt alone")
            worst = max(
                worst, same(observe, engine, f"prompt {i} in batch {order}", alone[i], together[place])
            )
    gap = control(observe, engine, "a neighbour's rows", alone[0][:17], alone[2])
    prompts = [texts[0][:40], texts[1][:70], texts[2][:5]]
    written = engine.generate_batch(prompts, max_tokens=TEXT, ignore_eos=True)
    for place, prompt in enumerate(prompts[:2]):
        own = engine.generate(prompt, max_tokens=TEXT, ignore_eos=True)
        observe.saw(len(own.ids), oracle="each prompt alone")
        last = len(prompt) + len(own.ids)
        observe.expect(last > LATE, f"asked for {TEXT} tokens, got {len(own.ids)}: none is late")
        parted = first_difference(own.ids, written[place].ids)
        # An engine that rounds activations may flip a near tie where a batch rounds elsewhere.
        exact = rounding(engine) <= SAME["float32"]
        observe.expect(
            parted is None or not exact,
            f"prompt {place} in a batch of 3 parts from itself alone at token {parted}",
        )
    observe.expect(written[0].ids != written[1].ids, "the control did not differ: two prompts wrote one text")
    worst = max(worst, crowded(observe, engine, texts, logprob_bound(engine, golden)))
    observe.say(
        f"4 compositions and {CROWD} prompts equal each alone, worst NMSE {worst:.2g}; "
        f"a neighbour's rows {gap:.2g}; "
        + (f"2 texts of {TEXT} tokens in a batch are those alone" if exact else "texts are not compared")
    )


@check("properties.switching", kills=("models_share_state",), needs=(Capability.LOGITS,))
def test_switching(
    observe: Observer,
    engine: Engine,
    open_model: OpenModel,
    pytestconfig: pytest.Config,
    texts: list[list[int]],
) -> None:
    """Model A, then model B, then A again gives A's bits."""
    ids = texts[0][:40]
    before = engine.logits(ids)
    spec = OTHER.get(str(engine.info.config["architecture"]), OTHER["gpt2"])
    other = open_model(pytestconfig.getoption("prill_engine"), spec)
    own = [i % int(other.info.config["vocab_size"]) for i in ids]
    between = other.logits(own)
    after = engine.logits(ids)
    again = other.logits(own)
    observe.saw(before.size + between.size, oracle="the same model before the switch")
    observe.expect(
        bool(np.array_equal(before, after)), f"after {spec} the model gives other logits than before"
    )
    observe.expect(bool(np.array_equal(between, again)), f"{spec} gives other logits the second time")
    gap = control(observe, engine, "the other model", before, between)
    observe.say(f"A, {spec}, A: {before.size} logits bit-equal; the other model's differ (NMSE {gap:.2g})")


@check("properties.same_seed", kills=("seed_ignored",), needs=(Capability.GENERATE,))
def test_same_seed(observe: Observer, engine: Engine, texts: list[list[int]]) -> None:
    """Two runs of one seed are bit-equal; another seed differs."""
    runs = [
        engine.generate(texts[0][:12], max_tokens=24, temperature=1.2, seed=seed, ignore_eos=True)
        for seed in (1, 1, 2)
    ]
    observe.saw(len(runs[0].ids) * 2, oracle="the same request again")
    observe.expect(runs[0].ids == runs[1].ids, f"seed 1 twice: {runs[0].ids} and {runs[1].ids}")
    observe.expect(runs[0].logprobs == runs[1].logprobs, "seed 1 twice: the logprobs are not bit-equal")
    observe.expect(
        runs[0].ids != runs[2].ids, "the control did not differ: seeds 1 and 2 give the same tokens"
    )
    observe.say(f"{len(runs[0].ids)} tokens and logprobs of one seed bit-equal; another seed differs")


def logprob_bound(engine: Engine, golden: Golden) -> float:
    """How far two ways to one logprob may be apart: what its lane's noise may do, of engines that round."""
    if engine.info.arithmetic in ("float32", "float64"):
        return 1e-4
    lane = lane_for(golden.type, engine.info.arithmetic)
    return bounds(lane, golden.floors[lane.name]).dlogprob_max


@check(
    "properties.logprobs",
    kills=("logprob_base_two", "logprob_of_best", "logprob_not_normalised", "logprob_after_temperature"),
    needs=(Capability.GENERATE, Capability.LOGITS),
)
def test_logprobs(observe: Observer, engine: Engine, golden: Golden, texts: list[list[int]]) -> None:
    """The logprob of a generated token is the natural log-softmax of the engine's raw logits at it."""
    prompt, worst, told = texts[0][:12], 0.0, list[tuple[int, float]]()
    for drawn in ({}, {"temperature": 3.0, "top_k": 40, "seed": 7}):
        told.clear()
        done = engine.generate(
            prompt,
            max_tokens=16,
            ignore_eos=True,
            on_token=lambda token, logprob: told.append((token, logprob)),
            **drawn,  # type: ignore[arg-type]
        )
        rows = engine.logits([*prompt, *done.ids[:-1]])[len(prompt) - 1 :]
        expected = log_softmax(rows)[np.arange(len(done.ids)), list(done.ids)]
        observe.saw(len(done.ids), oracle="log-softmax of the engine's own logits")
        observe.expect(len(done.logprobs) == len(done.ids) == 16, f"16 tokens, {len(done.logprobs)} logprobs")
        heard = told == list(zip(done.ids, done.logprobs, strict=True))
        observe.expect(heard, f"the callback heard {told[:2]}…, the text has {done.logprobs[:2]}…")
        worst = max(worst, float(np.abs(expected - done.logprobs).max()))
    observe.metric("largest difference of a logprob", worst, at_most=logprob_bound(engine, golden))
    second = int(np.count_nonzero(rows.argmax(axis=-1) != done.ids))
    observe.metric("control: drawn tokens that are not the most probable", second, at_least=1)
    observe.say(
        f"{observe.observed} logprobs, largest difference {worst:.1e}; {second} are not of the best token"
    )


@check(
    "properties.end_of_text",
    kills=("eos_ignored", "eos_included", "ignore_eos_ignored", "finish_reason_lost"),
    needs=(Capability.GENERATE,),
)
def test_end_of_text(observe: Observer, engine: Engine, golden: Golden) -> None:
    """Text ends at the end-of-text token, which is no part of it; told to ignore that, the engine goes on."""
    prompt, at, arguments = ending(observe, engine, golden)
    free = engine.generate(prompt, max_tokens=at + 4, ignore_eos=True, **arguments)
    ended = engine.generate(prompt, max_tokens=at + 4, **arguments)
    observe.saw(at + 1, oracle="the same request, told to ignore the end")
    observe.expect(
        ended.finish_reason == "eos", f"expected 'eos' after {at} tokens, got {ended.finish_reason!r}"
    )
    observe.expect(
        ended.ids == free.ids[:at], f"expected the {at} tokens before the end, got {len(ended.ids)}"
    )
    longer = len(free.ids) == at + 4 and free.finish_reason == "length"
    observe.expect(longer, f"the control did not differ: ignoring the end gave {len(free.ids)} tokens")
    observe.say(
        f"stopped after {at} tokens at id {free.ids[at]}; told to ignore it, went on to {len(free.ids)}"
    )


@check(
    "properties.max_tokens",
    kills=("max_tokens_off_by_one", "first_token_dropped"),
    needs=(Capability.GENERATE,),
)
def test_max_tokens(observe: Observer, engine: Engine, texts: list[list[int]]) -> None:
    """Exactly as many tokens come as were asked for, and asking for more only adds to them."""
    prompt = texts[0][:12]
    runs = {n: engine.generate(prompt, max_tokens=n, ignore_eos=True) for n in (0, 1, 5, 6)}
    for n, done in runs.items():
        observe.saw(n + 1, oracle="the number asked for")
        observe.expect(
            len(done.ids) == n == len(done.logprobs) and done.finish_reason == "length",
            f"max_tokens {n}: {len(done.ids)} tokens, {len(done.logprobs)} logprobs, {done.finish_reason!r}",
        )
        observe.expect(
            done.ids == runs[6].ids[:n], f"the first {n} of 6 tokens are not those of max_tokens {n}"
        )
    observe.say("0, 1, 5 and 6 tokens asked for, as many given, each the beginning of the next")


@check(
    "properties.stop_strings",
    kills=("stop_within_token_only", "stop_ignored", "stop_from_half"),
    needs=(Capability.GENERATE,),
)
def test_stop_strings(observe: Observer, engine: Engine, texts: list[list[int]]) -> None:
    """A stop string split over two tokens ends the text at the token that completes it."""
    tried = 0
    for text in texts:
        prompt = text[:12]
        free = engine.generate(prompt, max_tokens=24, ignore_eos=True)
        lengths = [len(engine.detokenize([*prompt, *free.ids[:n]])) for n in range(len(free.ids) + 1)]
        whole = engine.detokenize([*prompt, *free.ids])[lengths[0] :].decode("utf-8", "replace")
        for n in range(4, len(free.ids) - 2):
            at = lengths[n] - lengths[0]
            stop = whole[at - 2 : at + 2]
            split = lengths[n] - lengths[n - 1] >= 2 and lengths[n + 1] - lengths[n] >= 2
            if not (stop.isascii() and split and whole.find(stop) == at - 2):
                continue
            done = engine.generate(prompt, max_tokens=24, ignore_eos=True, stop=[stop])
            observe.saw(n + 1, oracle="the same request without a stop string")
            observe.expect(
                done.finish_reason == "stop" and done.ids == free.ids[: n + 1],
                f"stop {stop!r} over tokens {n - 1} and {n}: expected {n + 1} tokens and 'stop', "
                f"got {len(done.ids)} and {done.finish_reason!r}",
            )
            never = engine.generate(prompt, max_tokens=24, ignore_eos=True, stop=["\x00never\x00"])
            same_text = never.ids == free.ids and never.finish_reason == "length"
            observe.expect(
                same_text, "the control differed: a stop string that never occurs changed the text"
            )
            tried += 1
            break
        if tried == 2:
            break
    if not tried:
        raise Inconclusive("no generated text had two letters on both sides of a token's border")
    observe.say(
        f"{tried} stop strings split over two tokens, each ended the text at the token that completes it"
    )


@check("properties.cancel", kills=("cancel_ignored", "callback_missing"), needs=(Capability.GENERATE,))
def test_cancel(observe: Observer, engine: Engine, texts: list[list[int]]) -> None:
    """A callback that says no ends the text at once; one that says nothing does not."""
    prompt, seen = texts[0][:12], list[int]()

    def three(token: int, logprob: float) -> bool:
        seen.append(token)
        return len(seen) < 3

    # First, so that nothing a cancelled request may leave behind is taken for a cancel that went wrong.
    free = engine.generate(prompt, max_tokens=9, ignore_eos=True, on_token=lambda token, logprob: None)
    done = engine.generate(prompt, max_tokens=9, ignore_eos=True, on_token=three)
    observe.saw(3, oracle="the tokens the callback saw")
    observe.expect(
        done.finish_reason == "cancelled" and list(done.ids) == seen and len(seen) == 3,
        f"cancelled at the third token: got {len(done.ids)} tokens and {done.finish_reason!r}",
    )
    going_on = len(free.ids) == 9 and free.ids[:3] == done.ids
    observe.expect(going_on, "the control did not differ: without a refusal the text did not go on")
    observe.say("cancelled after 3 of 9 tokens; without a refusal all 9 came")


def at_offset(engine: Engine, pieces: list[list[int]], offsets: list[int]) -> NDArray[np.floating]:
    """Logits of pieces fed into one cache whose position offset is set before each piece."""
    model = embedded(engine)
    cache = model.new_cache(sum(map(len, pieces)))
    rows = []
    for piece, offset in zip(pieces, offsets, strict=True):
        cache.offset = offset
        rows.append(model.forward([(cache, piece)])[0])
    return np.concatenate(rows)


@check(
    "properties.position_offset",
    kills=("rope_keys_not_rotated", "learned_positions_ignored", "rope_ignored"),
)
def test_position_offset(observe: Observer, engine: Engine, texts: list[list[int]]) -> None:
    """Moving all positions together changes nothing under RoPE, and must change a learned-position model."""
    ids, shift = texts[0][:48], 16
    halves = [ids[:24], ids[24:]]
    plain = at_offset(engine, halves, [0, 0])
    moved = at_offset(engine, halves, [shift, shift])
    torn = at_offset(engine, halves, [0, shift])
    observe.saw(plain.size, oracle="the same ids from position 0")
    gap = control(observe, engine, "half of the positions moved", plain[24:], torn[24:])
    if "rope_base" in engine.info.config:
        error = same(observe, engine, f"all positions + {shift}", plain, moved)
        observe.say(f"RoPE: all positions + {shift} change nothing, NMSE {error:.2g}; half of them {gap:.2g}")
    else:
        error = control(observe, engine, f"all positions + {shift}", plain, moved)
        observe.say(f"learned positions: + {shift} changes the logits, NMSE {error:.2g}")
