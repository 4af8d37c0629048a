"""Does the KV cache hold what it promises, and nothing of anybody else's? Sessions against fresh logits."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from prill_harness.engines.base import Capability, Engine
from prill_harness.engines.embedded import Embedded
from prill_harness.run.checks import Observer, check
from prill_harness.tokens.golden import Golden
from prill_runtime.errors import Inconclusive
from prill_suites.common import embedded, fed, refusal
from prill_suites.controls import Pair, Trial
from prill_suites.sequences import longest_of

FULL_CONTEXT = 2048  # a longer context is tested through a session of a smaller capacity
ONE_PASS = "the engine's own logits in one pass"


@pytest.fixture
def trial(observe: Observer, engine: Engine, oracle: Embedded, golden: Golden) -> Trial:
    return Trial(observe, engine, oracle, golden)


@check(
    "cache.exactly_full",
    kills=(
        "cache_capacity_off_by_one",
        "cache_last_row_not_written",
        "stale_position_after_error",
        "rows_kept_after_error",
    ),
    needs=(Capability.SESSIONS, Capability.LOGITS),
)
def test_exactly_full(trial: Trial, observe: Observer, engine: Engine) -> None:
    """A cache of n takes n positions; one more is refused with both numbers and harms nothing."""
    full = min(40, trial.context)
    most, free = 3 * full // 4, full - 3 * full // 4
    ids, says = trial.texts[0][:full], (str(full), str(full + 1))
    expected = engine.logits(ids)
    session = engine.session(full)
    try:
        first = session.feed(ids[:most])
        what = f"{free + 1} ids into {free} free positions"
        refusal(observe, what, lambda: session.feed([*ids[most:], ids[0]]), 1, *says)
        kept = session.length
        observe.expect(kept == most, f"after the refusal: expected length {most}, got {kept}")
        rest = session.feed(ids[most:])
        observe.expect(session.length == full, f"full: expected length {full}, got {session.length}")
        refusal(observe, "one id into a full cache", lambda: session.feed([ids[0]]), 1, *says)
    finally:
        session.close()
    observe.saw(expected.size, oracle=ONE_PASS)
    error = trial.same("exactly full", ids, expected, np.concatenate([first, rest]))
    observe.say(
        f"{full} of {full} positions, NMSE {error:.2g}; one more refused twice, the cache still right after"
    )


@check(
    "cache.context_full",
    kills=("context_full_off_by_one", "cache_capacity_new_tokens_only"),
    needs=(Capability.GENERATE,),
)
def test_context_full(trial: Trial, observe: Observer, engine: Engine) -> None:
    """The context holds prompt and new tokens: generation ends at its last position, and says so."""
    texts, context = trial.texts, int(engine.info.config["context_length"])
    if context > FULL_CONTEXT:
        # Filling it would take minutes; the refusal of one too many is seen without filling.
        ids = (texts[0] * (context // len(texts[0]) + 1))[: context + 1]
        refusal(
            observe, "a prompt of context + 1", lambda: engine.generate(ids, max_tokens=1), 1, str(context)
        )
        observe.say(f"a prompt of {context + 1} ids is refused by a context of {context}")
        return
    ids = (texts[0] * (context // len(texts[0]) + 1))[: context + 1]
    free = min(4, context - 1)
    done = engine.generate(ids[: context - free], max_tokens=50, ignore_eos=True)
    # The last token needs no position of its own: nothing is predicted from it.
    observe.saw(len(done.ids), oracle="context length of the file")
    observe.expect(
        len(done.ids) == free + 1 and done.finish_reason == "context",
        f"prompt of {context - free} in a context of {context}: expected {free + 1} tokens and 'context', "
        f"got {len(done.ids)} and {done.finish_reason!r}",
    )
    refusal(observe, "a prompt of context + 1", lambda: engine.generate(ids, max_tokens=1), 1, str(context))
    observe.say(
        f"context of {context}: {free} free positions gave {free + 1} tokens and 'context'; "
        f"{context + 1} ids refused"
    )


@check("cache.sessions_apart", kills=("sessions_share_cache",), needs=(Capability.SESSIONS,))
def test_sessions_apart(trial: Trial, observe: Observer, engine: Engine) -> None:
    """Two sessions fed in turns give what each gives alone."""
    step = max(1, min(8, trial.context // 8))
    turns = min(4, trial.context // 2 // step)  # one cache has to hold both texts
    two = trial.texts[0], trial.texts[1][1:]
    pieces = [[text[i : i + step] for i in range(0, turns * step, step)] for text in two]
    sessions = [engine.session(), engine.session()]
    got: list[list[np.ndarray]] = [[], []]
    try:
        for turn in range(turns):
            for which, session in enumerate(sessions):
                got[which].append(session.feed(pieces[which][turn]))
    finally:
        for session in sessions:
            session.close()
    mixed = [piece for turn in zip(*pieces, strict=True) for piece in turn]
    apart = [fed(engine, own) for own in pieces]
    for which, expected in enumerate(apart):
        ids = [i for piece in pieces[which] for i in piece]
        trial.same(f"session {which}", ids, expected, np.concatenate(got[which]))
        observe.saw(expected.size, oracle="each session alone")

    def shared(engine: Engine) -> Pair:
        return fed(engine, pieces[1])[-step:], fed(engine, mixed)[-step:]

    gap = trial.control("one cache for both", shared)
    observe.say(f"two sessions in turns equal each alone; one cache for both: {gap}")


@check(
    "cache.cleared_between_requests",
    kills=("cache_not_cleared", "results_overwritten"),
    needs=(Capability.GENERATE, Capability.LOGITS),
)
def test_cleared_between_requests(trial: Trial, observe: Observer, engine: Engine) -> None:
    """A request gives the same tokens whatever request came before it."""
    one, two = trial.prompt(0, 24), trial.prompt(1, 24)
    count = trial.room(one, 12)
    first = engine.generate(one, max_tokens=count, ignore_eos=True)
    engine.generate(two, max_tokens=count, ignore_eos=True)
    again = engine.generate(one, max_tokens=count, ignore_eos=True)
    observe.saw(len(again.ids), oracle="the same request before the other")
    observe.expect(first.ids == again.ids, f"after another request: expected {first.ids}, got {again.ids}")
    observe.expect(first.logprobs == again.logprobs, "after another request the logprobs moved")
    before = engine.logits(one)
    kept = before.copy()
    engine.logits(two)
    observe.expect(bool(np.array_equal(kept, before)), "another request overwrote logits already handed out")
    after = engine.logits(one)
    observe.saw(before.size, oracle="the same request before the other")
    observe.expect(bool(np.array_equal(before, after)), "after another request the logits are not bit-equal")

    def kept_cache(engine: Engine) -> Pair:
        """A cache that still held the other request would answer as if both had been one text."""
        return engine.logits(one), engine.logits([*two, *one])[-len(one) :]

    def two_answers(engine: Engine) -> Pair:
        answers = [engine.generate(ids, max_tokens=count, ignore_eos=True).logprobs for ids in (one, two)]
        return np.asarray(answers[0]), np.asarray(answers[1])

    gap, other = trial.control("cache kept", kept_cache), trial.control("the other answer", two_answers)
    observe.say(f"tokens, logprobs and logits bit-equal; a kept cache: {gap}; the other answer: {other}")


@check("cache.cleared_after_cancel", kills=("cancel_leaves_cache",), needs=(Capability.GENERATE,))
def test_cleared_after_cancel(trial: Trial, observe: Observer, engine: Engine) -> None:
    """A request gives the same tokens after one that was cancelled, at its first token or a later one."""
    length = min(24, max(1, (trial.context - 1) // 2))
    one, two = trial.texts[0][:length], trial.texts[1][:length]
    count = max(1, trial.room([*two, *one], 12))
    first = engine.generate(one, max_tokens=count, ignore_eos=True)
    for at in sorted({1, min(5, count)}):
        heard: list[int] = []

        def refuse(token: int, logprob: float, at: int = at, heard: list[int] = heard) -> bool:
            heard.append(token)
            return len(heard) < at

        ended = engine.generate(two, max_tokens=count, ignore_eos=True, on_token=refuse)
        if len(ended.ids) != at:
            raise Inconclusive(f"cancelled at token {at}, the engine wrote {len(ended.ids)}")
        again = engine.generate(one, max_tokens=count, ignore_eos=True)
        observe.saw(len(again.ids), oracle="the same request before the cancelled one")
        observe.expect(
            first.ids == again.ids,
            f"after a request cancelled at token {at}: expected {first.ids}, got {again.ids}",
        )
        observe.expect(
            first.logprobs == again.logprobs, f"after a request cancelled at token {at} the logprobs moved"
        )

    def kept(engine: Engine) -> Pair:
        made = (engine.generate(ids, max_tokens=count, ignore_eos=True) for ids in (one, [*two, *one]))
        fresh, late = (np.asarray(text.logprobs) for text in made)
        return fresh, late

    gap = trial.control("cache kept", kept)
    observe.say(f"{observe.observed} tokens and logprobs bit-equal; a kept cache: {gap}")


@check(
    "cache.reset",
    kills=("reset_keeps_rows", "truncate_keeps_a_row", "late_reset_keeps_rows"),
    needs=(Capability.SESSIONS,),
)
def test_reset(trial: Trial, observe: Observer, engine: Engine) -> None:
    """A reset session is as good as a fresh one, bit for bit, whether it held two prompts or was full.

    The full one has all positions of a small model, and knows it: one id more is refused and changes nothing.
    """
    one, two = trial.prompt(0, 24), trial.prompt(1, 24)
    fresh, whole = fed(engine, [one]), longest_of(trial.golden)
    for pieces, capacity in (([two, one], None), ([whole], len(whole))):
        session, held = engine.session(capacity), sum(map(len, pieces))
        try:
            for piece in pieces:
                session.feed(piece)
            if capacity:
                says = (str(held), str(held + 1))
                refusal(observe, "one id into a full session", partial(session.feed, one[:1]), 1, *says)
            told = session.length
            observe.expect(told == held, f"fed {held} ids: expected length {held}, got {told}")
            session.reset()
            observe.expect(session.length == 0, f"after reset: expected length 0, got {session.length}")
            reused = session.feed(one)
        finally:
            session.close()
        observe.saw(fresh.size, oracle="a fresh session")
        same = bool(np.array_equal(fresh, reused))
        observe.expect(same, f"reset after {held} ids a session is not bit-equal to a fresh one")

    def kept(engine: Engine) -> Pair:
        return fed(engine, [one]), fed(engine, [two, one])[len(two) :]

    gap = trial.control("no reset", kept)
    observe.say(
        f"{2 * fresh.size} logits bit-equal after reset, once of {len(whole)} ids; without reset: {gap}"
    )


@check("cache.size", kills=("cache_size_wrong", "cache_in_double"), needs=(Capability.SESSIONS,))
def test_size(observe: Observer, engine: Engine) -> None:
    """A cache takes 2 x layers x cache heads x head size x capacity values, and no more."""
    model, config = embedded(engine), engine.info.config
    per_position = 2 * int(config["n_layers"]) * int(config["n_kv_heads"]) * int(config["head_dim"])
    width = model.backend.dtype.itemsize  # keys and values have the type of the activations
    for capacity in sorted({min(capacity, model.context_length) for capacity in (1, 33, 256)}):
        before = engine.memory()["cache"]
        session = engine.session(capacity)
        held = engine.memory()["cache"] - before
        session.close()
        expected = per_position * capacity * width
        observe.saw(1, oracle="the formula over the file's configuration")
        observe.expect(held == expected, f"cache of {capacity}: expected {expected} bytes, got {held}")
        observe.expect(engine.memory()["cache"] == before, f"cache of {capacity}: not released by close")
    observe.say(
        f"{per_position * width} bytes a position in {model.context_length} positions, released by close"
    )
