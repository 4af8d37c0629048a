"""Does a request get what it asks for? Every two features of one together, against the rules alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import prill_runtime.run.generate as generation
from prill_harness.engines.base import Capability, Engine, Generation
from prill_harness.engines.embedded import Embedded
from prill_harness.engines.textstream import IncrementalDetokenizer
from prill_harness.numbers.compare import largest, log_softmax
from prill_harness.run.checks import Observer, check
from prill_harness.tokens.golden import Golden
from prill_runtime.errors import PrillError
from prill_suites.common import embedded, file_fields
from prill_suites.controls import Trial
from prill_suites.requests_table import MANY, SAMPLING, TOKENS, Request, every_pair, table
from prill_suites.requests_twins import NEVER, REFUSED, TextOutcome, outcome, shown, stop_strings
from prill_suites.tokenizer_twins import Twin

RULES = "the rules alone, on the same text written without an end"
HOT_SEEDS = 6  # texts among which one is looked for that holds a character beyond ASCII
# Hard to search: beginnings of stop strings, in several scripts, before the strings themselves.
HARD = (
    "aaab, caf\u00e9 caf\u00e9s \u65e5\u65e5\u672c\u8a9e \U0001f9ea\U0001f469\u200d\U0001f52c, "
    "and what is longer than sixteen bytes."
)
HARD_STOPS = (
    ("aab",),
    ("caf\u00e9s",),
    ("\u65e5\u672c",),
    ("\U0001f469\u200d\U0001f52c",),
    ("what is longer than sixteen bytes",),
    ("nowhere", "\u65e5\u672c", "a\u00e9"),
    ("x", "what is longer than sixteen", "bytes."),
    ("longer than sixteen", "sixteen bytes"),
    ("\u00e9s \u65e5", "z"),
    ("no", "where"),
    ("sixteen bytes. And",),
    ("WHAT IS", "Caf\u00e9"),
    ("\u00e9 ",),
    (" \u65e5\u65e5",),
)


class Interrupted(Exception):
    """What a callback raises."""


@dataclass(frozen=True)
class Text:
    """What a model writes when nothing ends it, drawn in one way.

    Attributes:
        pieces: the bytes that each id stands for.
        stops: stop strings of each kind that it comes to.
    """

    prompt: list[int]
    arguments: dict[str, Any]
    free: Generation
    pieces: list[bytes]
    stops: dict[str, list[str]]

    @classmethod
    def of(cls, engine: Engine, prompt: list[int], count: int, arguments: dict[str, Any], twin: Twin) -> Text:
        free = engine.generate(prompt, max_tokens=count, ignore_eos=True, **arguments)
        pieces = [twin.piece(token) for token in free.ids]
        plain = [*takewhile(lambda token: token not in twin.special, free.ids)]
        stops = stop_strings(pieces[: len(plain)], engine.detokenize(prompt))
        return cls(prompt, arguments, free, pieces, stops)


@pytest.fixture
def trial(observe: Observer, engine: Engine, oracle: Embedded, golden: Golden) -> Trial:
    return Trial(observe, engine, oracle, golden)


@pytest.fixture(scope="module")
def twin(model_path: Path) -> Twin:
    """What the file's metadata, as gguf reads it, says about text."""
    return Twin(file_fields(model_path))


def texts(trial: Trial, twin: Twin) -> dict[str, Text]:
    """A text of each way of sampling; of the almost flat one, in a script beyond ASCII where one is drawn."""
    prompt = trial.prompt(0, 12)
    count = trial.room(prompt, MANY)
    found = {
        name: Text.of(trial.engine, prompt, count, arguments, twin) for name, arguments in SAMPLING.items()
    }
    for seed in range(1, HOT_SEEDS + 1):
        arguments = SAMPLING["hot"] | {"seed": seed}
        found["hot"] = Text.of(trial.engine, prompt, count, arguments, twin)
        if NEVER not in found["hot"].stops["not ASCII"]:
            break
    return found


@contextmanager
def ending_at(engine: Engine, ends: frozenset[int] | None) -> Iterator[None]:
    """An embedded engine's model with other ids that end a text; None: the file's."""
    if ends is None:
        yield
        return
    tokenizer = embedded(engine).tokenizer
    own = tokenizer.eog_ids
    tokenizer.eog_ids = ends
    try:
        yield
    finally:
        tokenizer.eog_ids = own


def other_ends(ids: Sequence[int], number: int) -> frozenset[int]:
    """Two ids of a text, of which now the larger comes first, now the smaller."""
    first = ids[min(2 + number % 3, len(ids) - 1) :]
    beside = [i for i in first if i != first[0] and (i > first[0]) == bool(number % 2)]
    return frozenset([*first[:1], *beside[:1]])


def named(request: Request) -> str:
    return ", ".join(f"{feature} {value}" for feature, value in request.items())


def asked(
    observe: Observer, engine: Engine, text: Text, request: Request, ends: frozenset[int] | None
) -> tuple[Generation | None, list[tuple[int, float]]]:
    """What the engine answers, None where the callback's own exception came back, and what it heard."""
    heard: list[tuple[int, float]] = []

    def on_token(token: int, logprob: float) -> bool | None:
        heard.append((token, logprob))
        if len(heard) < REFUSED or request["callback"] == "listens":
            return None
        if request["callback"] == "raises":
            raise Interrupted
        return False

    with ending_at(engine, ends):
        try:
            done = engine.generate(
                text.prompt,
                max_tokens=min(TOKENS[request["tokens"]], len(text.free.ids)),
                stop=text.stops[request["stop"]],
                ignore_eos=request["ends"] == "ignored",
                on_token=None if request["callback"] == "none" else on_token,
                **text.arguments,
            )
        except Interrupted:
            return None, heard
        except PrillError as error:
            observe.fail(f"{named(request)}: the request was refused: {error}")
    return done, heard


def wrong(
    text: Text,
    expected: TextOutcome,
    done: Generation | None,
    heard: list[tuple[int, float]] | None,
    bound: float,
) -> str:
    """What an answer has other than the rules say; empty where nothing.

    Args:
        heard: None where nobody listened.
        bound: how far two ways to one logprob may be apart.
    """
    ids, logprobs = text.free.ids[: expected.count], text.free.logprobs[: expected.count]
    told = [token for token, _ in heard or ()]
    if heard is not None and told != list(text.free.ids[: expected.heard]):
        return f"the callback heard {len(told)} tokens {told[:4]}, expected {expected.heard}"
    if done is None or expected.raised:
        return (
            ""
            if done is None and expected.raised
            else f"raised: expected {expected.raised}, got {done is None}"
        )
    if done.ids != ids or done.finish_reason != expected.reason:
        return (
            f"expected {expected.count} tokens and {expected.reason!r}, "
            f"got {len(done.ids)} and {done.finish_reason!r}"
        )
    if expected.end != done.end_id and done.end_id is not None:
        return f"expected to be ended by id {expected.end}, got {done.end_id}"
    gaps = [abs(a - b) for a, b in zip(logprobs, done.logprobs, strict=False)]
    if len(done.logprobs) != len(ids) or not largest(0.0, *gaps) <= bound:
        return f"logprobs {done.logprobs[:3]}, expected {logprobs[:3]}"
    return ""


@check(
    "requests.features",
    kills=(
        "second_stop_ignored",
        "stop_not_ascii_ignored",
        "stop_in_sixteen_bytes",
        "seed_zero_is_none",
        "second_end_ignored",
        "end_told_to_callback",
        "raising_callback_keeps_slot",
        "raising_callback_stays",
        "raising_callback_swallowed",
        "no_tokens_are_one",
        "limit_before_stop",
        "stop_found_in_prompt",
    ),
    needs=(Capability.GENERATE, Capability.TOKENIZE),
)
def test_features(trial: Trial, observe: Observer, engine: Engine, golden: Golden, twin: Twin) -> None:
    """Sampling, stop strings, number of tokens, ends and callback, every two of them in one request: each
    text ends where the rules say, tells what they say, and leaves the next request what it was."""
    found, bound, ended = texts(trial, twin), trial.logprob_bound, set[str]()
    remembers = Capability.MEMORY in engine.info.capabilities
    held = engine.memory()["cache"] if remembers else 0
    requests = list(table())
    for number, request in enumerate(requests):
        text = found[request["sampling"]]
        several = request["ends"] == "several" and hasattr(engine, "model")
        ends = other_ends(text.free.ids, number) if several else None
        expected = outcome(
            text.free.ids,
            text.pieces,
            text.stops[request["stop"]],
            min(TOKENS[request["tokens"]], len(text.free.ids)),
            () if request["ends"] == "ignored" else ends or twin.ends,
            request["callback"],
        )
        done, heard = asked(observe, engine, text, request, ends)
        observe.saw(expected.count + 1, oracle=RULES)
        fault = wrong(text, expected, done, None if request["callback"] == "none" else heard, bound)
        observe.expect(not fault, f"{named(request)}: {fault}", **request)
        if remembers:
            now = engine.memory()["cache"]
            observe.expect(now == held, f"{request}: {now - held} B of cache are kept after the text")
        ended |= {
            expected.reason or "raised",
            *([f"stop {request['stop']}"] if expected.reason == "stop" else ()),
        }
    observe.note(ended=sorted(ended))
    observe.say(
        f"{len(requests)} requests with {len(every_pair())} pairs of features, each as the rules say; "
        f"ended by {', '.join(sorted(ended))}"
    )


@check(
    "requests.logprobs",
    kills=("logprob_after_penalty", "logprob_of_drawn_not_a_number", "logprob_after_temperature"),
    needs=(Capability.GENERATE, Capability.LOGITS),
)
def test_logprobs(trial: Trial, observe: Observer, engine: Engine, golden: Golden) -> None:
    """However a token was chosen, its logprob is the natural log-softmax of the raw logits at it."""
    prompt, worst = trial.prompt(1, 9), 0.0
    for name, arguments in SAMPLING.items():
        done = engine.generate(prompt, max_tokens=trial.room(prompt, MANY), ignore_eos=True, **arguments)
        rows = engine.logits([*prompt, *done.ids[:-1]])[len(prompt) - 1 :]
        expected = log_softmax(rows)[np.arange(len(done.ids)), list(done.ids)]
        observe.expect(
            len(done.logprobs) == len(expected),
            f"{name}: {len(expected)} tokens, {len(done.logprobs)} logprobs",
        )
        observe.saw(len(expected), oracle="log-softmax of the engine's own logits")
        worst = largest(worst, *np.abs(expected - done.logprobs))
    observe.metric("largest difference of a logprob", worst, at_most=trial.logprob_bound)
    observe.say(
        f"{observe.observed} logprobs of {len(SAMPLING)} ways to draw, largest difference {worst:.1e}"
    )


def joined(pieces: Sequence[bytes], ids: Sequence[int]) -> bytes:
    """What ids stand for, where they number pieces."""
    return b"".join(pieces[i] for i in ids)


@check(
    "requests.stops",
    kills=("stop_tail_shown", "stop_tail_lost", "stop_kept_by_characters", "stop_starts_over"),
    needs=(Capability.GENERATE, Capability.TOKENIZE),
)
def test_stops(observe: Observer, engine: Engine) -> None:
    """Stop strings end a text that arrives in pieces of any size, and nothing of them is ever shown."""
    embedded(engine)
    data = HARD.encode()
    for stops in HARD_STOPS:
        for size in (1, 2, 3, 5, 16, 17, len(data)):
            pieces = [data[at : at + size] for at in range(0, len(data), size)]
            found = outcome(range(len(pieces)), pieces, stops, len(pieces), (), "none")
            search = generation.StopStrings(stops)
            got = next((n for n, piece in enumerate(pieces, 1) if search.push(piece)), 0)
            observe.saw(found.count, oracle="a search of the whole text")
            expected = found.count if found.reason == "stop" else 0
            observe.expect(
                got == expected,
                f"{stops} in pieces of {size} bytes: stopped at piece {got}, expected {expected}",
            )
            stream = IncrementalDetokenizer(partial(joined, pieces), [], stops)
            seen = "".join(stream.push(n) for n in range(found.count)) + stream.finish()
            wanted = shown(pieces[: found.count], stops)
            observe.saw(len(wanted), oracle="the text up to the first stop string")
            observe.expect(
                seen == wanted,
                f"{stops} in pieces of {size} bytes: shown {seen[-24:]!r}, expected {wanted[-24:]!r}",
            )
    observe.say(
        f"{len(HARD_STOPS)} sets of stop strings in pieces of 7 sizes, each found where it ends, none shown"
    )
