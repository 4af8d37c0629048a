"""Does a token cost what was promised, at every position? Work is counted, never timed: a quadratic shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from prill_harness.engines.base import Capability, Engine
from prill_harness.measure.cost import Meter, Spent, average, slopes, typical
from prill_harness.run.checks import Observer, check
from prill_harness.tokens.golden import Golden
from prill_runtime.errors import Inconclusive
from prill_runtime.run.generate import StopStrings
from prill_suites.common import embedded
from prill_suites.cost_bounds import (
    BLOCK,
    BOUNDS,
    all_of,
    causal,
    exact,
    held,
    known,
    less,
    same,
    scored,
    weighed,
)
from prill_suites.sequences import context_of

# Tokens before the two windows, in them, and first ones let go. The lists of a text's ids take more memory at
# 76, 92 and 108; a window has five tokens that count, so that two in which a list grows are not the median.
EARLY, LATE, LOOKED, SETTLED = 8, 78, 7, 2
APART = LATE - EARLY  # positions between them, fewer in a short context
WRITTEN = "earlier tokens of the same text"
# What grows with the position, in bytes for each: rows of scores, and the ids that a penalty counts.
SCORES, HISTORY = 5, 64
GROWING = ("attention", "softmax", "_penalised")
DOUBLED = 2.2  # most for twice as much
FOURFOLD = {"tokenizing": 6.0, "detokenizing": 4.6}  # and for four times: merging has a logarithm in it
TOGETHER = 40  # most instructions for one more id of a prompt and a layer: rows are computed together
NEVER = ("a stop that no text holds", "\u00e9\u00e8\u00ea")
TEXT = "The quick brown fox jumps over the lazy dog; don't 3.14 na\u00efve caf\u00e9 \u65e5\u672c\u8a9e. "
SAME = "a"


@pytest.fixture
def meter(engine: Engine) -> Iterator[Meter]:
    """What counts the engine's work.

    Raises:
        MissingCapability: an engine of somebody else, whose work cannot be counted from here.
    """
    embedded(engine)
    with Meter(engine) as made:
        yield made


@check(
    "cost.token",
    kills=(
        "cost_prefix_recomputed",
        "cost_text_decoded_anew",
        "cost_text_tokenized_anew",
        "cost_cache_copied",
        "cost_history_walked",
        "cost_sampler_sorts_for_each",
    ),
    needs=(Capability.GENERATE,),
)
def test_token(observe: Observer, engine: Engine, meter: Meter, golden: Golden, model_path: Path) -> None:
    """A token costs the same at every position, but for the keys that attention reads and a penalty's ids."""
    last = min(LATE, context_of(golden) - LOOKED - 2)
    count, added = last + LOOKED, last - EARLY
    begin, tokens = [golden.prompts[0].ids[0]], list[int]()
    windows: tuple[list[Spent], list[Spent]] = ([], [])
    if added < APART // 4:
        only_token(observe, engine, meter, begin, model_path)
        return

    def look(attempt: int) -> dict[tuple[str, str], float]:
        tokens.clear()
        for window in windows:
            window.clear()
        engine.generate(
            begin, max_tokens=count, temperature=1.0, top_k=40, repetition_penalty=1.1, seed=attempt,
            stop=NEVER, ignore_eos=True, on_token=looked,
        )  # fmt: skip
        if len(tokens) < count:
            raise Inconclusive("the text ended early", expected=f"{count} tokens", got=len(tokens))
        # What a token's own text takes, long or short, is no matter of its position.
        piece = embedded(engine).tokenizer.piece
        texts = [
            meter.spent(partial(all_of, piece, tokens[at - LOOKED + SETTLED : at]))
            for at in (EARLY + LOOKED, count)
        ]
        both = [window[SETTLED:] for window in windows]
        if attempt == 0:
            observe.saw(sum(each.steps for window in both for each in window), oracle=WRITTEN)
        walked = [
            less(average(window, lambda s: s.instructions), text.instructions, len(window))
            for window, text in zip(both, texts, strict=True)
        ]
        found = {("instructions", name): slope for name, slope in slopes(walked[0], walked[1], added).items()}
        for unit, mean in (("bytes", typical), ("bytes on average", average)):
            early, late = (mean(window, lambda s: s.allocated) for window in both)
            taken = slopes(early, late, added)
            found |= {(unit, name): by for name, by in taken.items() if name not in texts[1].allocated}
        return found

    def looked(token: int, logprob: float) -> None:
        tokens.append(token)
        for first, window in zip((EARLY, last), windows, strict=True):
            if len(tokens) == first:
                meter.start()
            elif first < len(tokens) <= first + LOOKED:
                window.append(meter.read() if len(tokens) < first + LOOKED else meter.stop())

    scale = APART / added  # what happens once now and then weighs more over fewer positions
    rows = SCORES * int(engine.info.config["n_layers"]) * int(engine.info.config["n_heads"]) * 8
    growing = dict(zip(GROWING, (rows, rows, HISTORY), strict=True))

    def most(unit: str, name: str) -> float:
        usual = growing.get(name.rpartition(".")[2], 0) if unit != "instructions" else 0
        return scale * (usual or BOUNDS[unit])

    held(observe, look, most)
    before, after = (window[-1] for window in windows)
    same(observe, before, after, ("attention",))
    said = ""
    if known(engine, after):
        layers, head = weighed(model_path)
        for at, each in ((EARLY, before), (last, after)):
            keys = min(at + LOOKED, int(engine.info.config.get("window") or at + LOOKED))
            pairs = scored(engine, keys)
            exact(observe, f"token {at + LOOKED}", each, layers + head, pairs, pairs)
        said = f"; {layers + head} multiply-adds, one for each weight in the file"
    for name in ("launches", "threads"):
        first, then = getattr(before, name), getattr(after, name)
        observe.expect(
            first == then, f"a token takes {first} {name} of a device at {EARLY}, {then} at {last}"
        )
    observe.say(f"token {last} costs what token {EARLY} costs: {after.steps} instructions{said}")


def only_token(observe: Observer, engine: Engine, meter: Meter, begin: list[int], path: Path) -> None:
    """Of a context too short for a comparison of positions: what the first token costs.

    Raises:
        Inconclusive: nothing says what it has to cost.
    """
    spent = meter.spent(partial(engine.generate, begin, max_tokens=1, ignore_eos=True))
    if not known(engine, spent):
        raise Inconclusive("the context is too short to compare positions")
    exact(observe, "the first token", spent, sum(weighed(path)), scored(engine, 1), scored(engine, 1))
    observe.say("the context is too short to compare positions; the first token meets each weight once")


@check(
    "cost.prompt",
    kills=(
        "cost_logits_of_all_rows",
        "cost_attention_twice",
        "cost_batch_padded",
        "cost_session_feeds_all",
        "cost_square_mask",
    ),
    needs=(Capability.GENERATE, Capability.SESSIONS),
)
def test_prompt(observe: Observer, engine: Engine, meter: Meter, golden: Golden, model_path: Path) -> None:
    """A prompt twice as long costs twice as much; alone, in a batch and piece by piece it costs the same."""
    long = min(256, context_of(golden)) // 2 * 2
    if not long:
        raise Inconclusive("the context is too short", expected="2 positions", got=context_of(golden))
    ids = (golden.prompts[0].ids * long)[:long]
    _, half, whole = (
        meter.spent(partial(engine.generate, ids[:size], max_tokens=1, ignore_eos=True))
        for size in (1, long // 2, long)
    )
    observe.saw(half.steps + whole.steps, oracle="a prompt of half its length")
    for what, before, after in (
        ("instructions", half.steps, whole.steps),
        ("bytes at once", half.transient, whole.transient),
    ):
        times, square = after / max(1, before), what == "bytes at once" and long < 2 * BLOCK
        most = 2 * DOUBLED if square else DOUBLED  # up to a block the scores are a square
        observe.metric(f"{what} of {long} ids over those of {long // 2}", times, at_most=most)
    each = (whole.steps - half.steps) / (long - long // 2) / int(engine.info.config["n_layers"])
    observe.metric("instructions for each further id and layer", each, at_most=TOGETHER)
    same(observe, half, whole, ("attention",), times=DOUBLED)
    capacity(observe, engine, meter, ids[: min(9, long)], context_of(golden))
    for kernel, threads in whole.threads.items():
        most = DOUBLED ** (1 + ("attention" in kernel)) * half.threads.get(kernel, 0)
        said = f"{kernel}: expected at most {most:.0f} threads for {long} ids, got {threads}"
        observe.expect(threads <= most, said)
    observe.say(f"{long} ids cost at most {DOUBLED:g} times what {long // 2} cost")
    if not known(engine, whole):
        return
    (layers, head), window = weighed(model_path), int(engine.info.config.get("window") or long)

    def hold(what: str, spent: Spent, heads: int, *stretches: tuple[int, int]) -> None:
        rows = sum(count for _, count in stretches)
        pairs = [causal(first, count, window) for first, count in stretches]
        least, most = (scored(engine, sum(of)) for of in zip(*pairs, strict=True))
        exact(observe, what, spent, rows * layers + heads * head, least, most)

    hold(f"a prompt of {long // 2}", half, 1, (0, long // 2))
    hold(f"a prompt of {long}", whole, 1, (0, long))
    third = max(1, long // 3)
    rest = min(20, long - third - 1)
    session = engine.session()
    try:
        for first, count in ((0, third), (third, 1), (third + 1, rest))[: 3 if rest else 2]:
            piece = meter.spent(partial(session.feed, ids[first : first + count]))
            hold(f"{count} ids fed behind {first}", piece, count, (first, count))
    finally:
        session.close()
    few, more = min(5, long), 2 * third
    batch = meter.spent(partial(engine.logits_batch, [ids[:few], ids[:more]]))
    hold(f"a batch of {few} and {more} ids", batch, few + more, (0, few), (0, more))
    prompts, most = [ids[:1], ids[1:2]], min(4, long - 1)
    with ending(engine, ids[0]):
        made = engine.generate_batch(prompts, max_tokens=most)
        spent = meter.spent(partial(engine.generate_batch, prompts, max_tokens=most))
    chosen = [len(text.ids) + (text.finish_reason == "eos") for text in made]
    hold(f"texts of {chosen} tokens in a batch", spent, sum(chosen), *((0, count) for count in chosen))
    observe.say(f"{long} ids cost twice what {long // 2} cost; each {layers} multiply-adds, in any company")


def capacity(observe: Observer, engine: Engine, meter: Meter, ids: list[int], context: int) -> None:
    """Hold a token to the same bytes whatever room its cache has."""
    if context < len(ids) + APART:
        return  # next to no difference

    def look(attempt: int) -> dict[tuple[str, str], float]:
        taken = []
        for room in (len(ids), context):
            session = engine.session(room)
            try:
                session.feed(ids[:-2])
                meter.spent(partial(session.feed, ids[-2:-1]))
                taken.append(meter.spent(partial(session.feed, ids[-1:])).allocated)
            finally:
                session.close()
        return {("bytes", name): by for name, by in slopes(taken[0], taken[1], context - len(ids)).items()}

    held(observe, look, lambda unit, name: BOUNDS[unit], "that a cache has room for")


@contextmanager
def ending(engine: Engine, first: int) -> Iterator[None]:
    """For a while texts end at the second most probable id behind `first`: one of a batch ends early."""
    tokenizer = embedded(engine).tokenizer
    before, ids = tokenizer.eog_ids, engine.generate([first], max_tokens=2, ignore_eos=True).ids
    tokenizer.eog_ids = frozenset(ids[1:])
    try:
        yield
    finally:
        tokenizer.eog_ids = before


@check(
    "cost.text",
    kills=("cost_merges_scan_all", "cost_suffixes_tokenized", "cost_text_joined_anew"),
    needs=(Capability.TOKENIZE,),
)
def test_text(observe: Observer, engine: Engine, meter: Meter) -> None:
    """A text four times as long takes four times the work, into ids and back, whatever it says."""
    told = []
    for text in (TEXT, SAME):
        for what, short, long in of_both(engine, meter, text):
            observe.saw(short.steps + long.steps, oracle="the work on a quarter of the text")
            for unit, before, after in (
                ("instructions", short.steps, long.steps),
                ("bytes taken", sum(short.allocated.values()), sum(long.allocated.values())),
            ):
                name = f"{unit} of {what} four times {text[:3]!r}… over once"
                observe.metric(name, after / max(1, before), at_most=FOURFOLD[what])
            told.append(f"{long.steps / max(1, short.steps):.2f}")
    observe.say(f"four times the text, {', '.join(told)} times the instructions")


def of_both(engine: Engine, meter: Meter, text: str) -> Iterator[tuple[str, Spent, Spent]]:
    """Both directions, on a text and on four times as much."""
    texts = [(text * size)[:size] for size in (150, 600)]
    _, short, long = (meter.spent(partial(engine.tokenize, each)) for each in (texts[0], *texts))
    yield "tokenizing", short, long
    if text == SAME:
        return  # of which the way back says nothing more
    both = [engine.tokenize(each) for each in texts]
    _, short, long = (meter.spent(partial(engine.detokenize, ids)) for ids in (both[0], *both))
    yield "detokenizing", short, long


@check(
    "cost.stream",
    kills=("cost_stream_decodes_prefix", "cost_stop_searches_text", "cost_stop_keeps_text"),
    needs=(Capability.TOKENIZE,),
)
def test_stream(observe: Observer, engine: Engine, meter: Meter) -> None:
    """A token that is streamed, and searched for a stop string, costs the same however long the text is."""
    tokenizer = embedded(engine).tokenizer
    ids = engine.tokenize((TEXT * 9)[:500], add_special=False) or [*range(min(100, tokenizer.vocab_size))]
    stream, stops, count = tokenizer.stream(), StopStrings(NEVER), 60
    ids = (ids * count)[:count]
    pieces = [tokenizer.piece(token) for token in ids]
    pushes: tuple[tuple[str, Callable[[int], object]], ...] = (
        ("a stream", lambda at: stream.push(ids[at])),
        ("a stop string", lambda at: stops.push(pieces[at])),
    )
    for what, push in pushes:
        _, once, twice = (
            meter.spent(partial(all_of, push, part))
            for part in (range(count), range(count), [*range(count)] * 2)
        )
        observe.saw(once.steps + twice.steps, oracle="half as many tokens pushed before")
        for unit, before, after in (
            ("instructions", once.steps, twice.steps),
            ("bytes taken", sum(once.allocated.values()), sum(twice.allocated.values())),
        ):
            grown = (after - 2 * before) / (3 * count**2)  # what a token takes more for each one before it
            observe.metric(f"{unit} of {what} for each token before it", grown, at_most=0.1)
        kept = (twice.kept - once.kept) / count
        observe.metric(f"bytes that {what} keeps of each token", kept, at_most=0.5)
    observe.say(f"{4 * count} tokens streamed and searched, the last at the price of the first")
