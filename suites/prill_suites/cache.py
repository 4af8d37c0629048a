"""Does the KV cache hold what it promises, and nothing of anybody else's? Sessions against fresh logits."""

from __future__ import annotations

import numpy as np
import pytest

from prill_harness.checks import Observer, check
from prill_harness.engines.base import Capability, Engine
from prill_harness.golden import Golden
from prill_runtime.errors import Inconclusive
from prill_suites.common import control, embedded, fed, refusal, same

FULL_CONTEXT = 2048  # a longer context is tested through a session of a smaller capacity
ONE_PASS = "the engine's own logits in one pass"


@pytest.fixture(scope="module")
def texts(golden: Golden) -> list[list[int]]:
    """Golden prompts with their continuations: realistic ids, 300 positions and more."""
    return [list(prompt.ids) + list(prompt.tokens) for prompt in golden.prompts]


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
def test_exactly_full(observe: Observer, engine: Engine, texts: list[list[int]]) -> None:
    """A cache of n takes n positions; one more is refused with both numbers and harms nothing."""
    ids = texts[0][:40]
    expected = engine.logits(ids)
    session = engine.session(len(ids))
    try:
        first = session.feed(ids[:30])
        refusal(observe, "11 ids into 10 free positions", lambda: session.feed([*ids[30:], 1]), 1, "40", "41")
        observe.expect(session.length == 30, f"after the refusal: expected length 30, got {session.length}")
        rest = session.feed(ids[30:])
        observe.expect(session.length == 40, f"full: expected length 40, got {session.length}")
        refusal(observe, "one id into a full cache", lambda: session.feed([ids[0]]), 1, "40", "41")
    finally:
        session.close()
    observe.saw(expected.size, oracle=ONE_PASS)
    error = same(observe, engine, "exactly full", expected, np.concatenate([first, rest]))
    observe.say(
        f"40 of 40 positions, NMSE {error:.2g}; the 41st refused twice, the cache still right after it"
    )


@check(
    "cache.context_full",
    kills=("context_full_off_by_one", "cache_capacity_new_tokens_only"),
    needs=(Capability.GENERATE,),
)
def test_context_full(observe: Observer, engine: Engine, texts: list[list[int]]) -> None:
    """The context holds prompt and new tokens: generation ends at its last position, and says so."""
    context = int(engine.info.config["context_length"])
    if context > FULL_CONTEXT:
        # Filling it would take minutes; the refusal of one too many is seen without filling.
        ids = (texts[0] * (context // len(texts[0]) + 1))[: context + 1]
        refusal(
            observe, "a prompt of context + 1", lambda: engine.generate(ids, max_tokens=1), 1, str(context)
        )
        observe.say(f"a prompt of {context + 1} ids is refused by a context of {context}")
        return
    ids = (texts[0] * (context // len(texts[0]) + 1))[: context + 1]
    done = engine.generate(ids[: context - 4], max_tokens=50, ignore_eos=True)
    # The last token needs no position of its own: nothing is predicted from it.
    observe.saw(len(done.ids), oracle="context length of the file")
    observe.expect(
        len(done.ids) == 5 and done.finish_reason == "context",
        f"prompt of {context - 4} in a context of {context}: expected 5 tokens and 'context', "
        f"got {len(done.ids)} and {done.finish_reason!r}",
    )
    refusal(observe, "a prompt of context + 1", lambda: engine.generate(ids, max_tokens=1), 1, str(context))
    observe.say(
        f"context of {context}: 4 free positions gave 5 tokens and 'context'; {context + 1} ids refused"
    )


@check("cache.sessions_apart", kills=("sessions_share_cache",), needs=(Capability.SESSIONS,))
def test_sessions_apart(observe: Observer, engine: Engine, texts: list[list[int]]) -> None:
    """Two sessions fed in turns give what each gives alone."""
    pieces = [[text[i : i + 8] for i in range(0, 32, 8)] for text in (texts[0], texts[1][1:])]
    sessions = [engine.session(), engine.session()]
    got: list[list[np.ndarray]] = [[], []]
    try:
        for turn in range(4):
            for which, session in enumerate(sessions):
                got[which].append(session.feed(pieces[which][turn]))
    finally:
        for session in sessions:
            session.close()
    mixed = [piece for turn in zip(*pieces, strict=True) for piece in turn]
    apart = [fed(engine, own) for own in pieces]
    for which, expected in enumerate(apart):
        same(observe, engine, f"session {which}", expected, np.concatenate(got[which]))
        observe.saw(expected.size, oracle="each session alone")
    shared = fed(engine, mixed)
    gap = control(observe, engine, "one cache for both", apart[1][-8:], shared[-8:])
    observe.say(f"two sessions in turns equal each alone; sharing one cache would give NMSE {gap:.2g}")


@check(
    "cache.cleared_between_requests",
    kills=("cache_not_cleared", "results_overwritten"),
    needs=(Capability.GENERATE, Capability.LOGITS),
)
def test_cleared_between_requests(observe: Observer, engine: Engine, texts: list[list[int]]) -> None:
    """A request gives the same tokens whatever request came before it."""
    one, two = texts[0][:24], texts[1][:24]
    first = engine.generate(one, max_tokens=12, ignore_eos=True)
    other = engine.generate(two, max_tokens=12, ignore_eos=True)
    again = engine.generate(one, max_tokens=12, ignore_eos=True)
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
    # A cache that still held the first request would answer as if both had been one text.
    gap = control(observe, engine, "cache kept", before, engine.logits([*two, *one])[-len(one) :])
    observe.expect(other.logprobs != first.logprobs, "the control did not differ: both requests agree")
    observe.say(f"tokens, logprobs and logits bit-equal; a kept cache would give NMSE {gap:.2g}")


@check("cache.cleared_after_cancel", kills=("cancel_leaves_cache",), needs=(Capability.GENERATE,))
def test_cleared_after_cancel(observe: Observer, engine: Engine, texts: list[list[int]]) -> None:
    """A request gives the same tokens after one that was cancelled, at its first token or a later one."""
    one, two = texts[0][:24], texts[1][:24]
    first = engine.generate(one, max_tokens=12, ignore_eos=True)
    for at in (1, 5):
        heard: list[int] = []

        def refuse(token: int, logprob: float, at: int = at, heard: list[int] = heard) -> bool:
            heard.append(token)
            return len(heard) < at

        ended = engine.generate(two, max_tokens=12, ignore_eos=True, on_token=refuse)
        if len(ended.ids) != at:
            raise Inconclusive(f"cancelled at token {at}, the engine wrote {len(ended.ids)}")
        again = engine.generate(one, max_tokens=12, ignore_eos=True)
        observe.saw(len(again.ids), oracle="the same request before the cancelled one")
        observe.expect(
            first.ids == again.ids,
            f"after a request cancelled at token {at}: expected {first.ids}, got {again.ids}",
        )
        observe.expect(
            first.logprobs == again.logprobs, f"after a request cancelled at token {at} the logprobs moved"
        )
    kept = engine.generate([*two, *one], max_tokens=12, ignore_eos=True)
    gap = control(observe, engine, "cache kept", np.array(first.logprobs), np.array(kept.logprobs))
    observe.say(f"{observe.observed} tokens and logprobs bit-equal; a kept cache would give NMSE {gap:.2g}")


@check("cache.reset", kills=("reset_keeps_rows", "truncate_keeps_a_row"), needs=(Capability.SESSIONS,))
def test_reset(observe: Observer, engine: Engine, texts: list[list[int]]) -> None:
    """A reset session is as good as a fresh one, bit for bit."""
    one, two = texts[0][:24], texts[1][:24]
    session = engine.session()
    try:
        session.feed(two)
        kept = session.feed(one)
        session.reset()
        observe.expect(session.length == 0, f"after reset: expected length 0, got {session.length}")
        reused = session.feed(one)
    finally:
        session.close()
    fresh = fed(engine, [one])
    observe.saw(fresh.size, oracle="a fresh session")
    observe.expect(bool(np.array_equal(fresh, reused)), "a reset session is not bit-equal to a fresh one")
    gap = control(observe, engine, "no reset", fresh, kept)
    observe.say(f"{fresh.size} logits bit-equal after reset; without reset NMSE {gap:.2g}")


@check("cache.size", kills=("cache_size_wrong", "cache_in_double"), needs=(Capability.SESSIONS,))
def test_size(observe: Observer, engine: Engine) -> None:
    """A cache takes 2 x layers x cache heads x head size x capacity values, and no more."""
    model, config = embedded(engine), engine.info.config
    per_position = 2 * int(config["n_layers"]) * int(config["n_kv_heads"]) * int(config["head_dim"])
    width = model.backend.dtype.itemsize  # keys and values have the type of the activations
    for capacity in (1, 33, 256):
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
