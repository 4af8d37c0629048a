"""The pieces of work whose counts are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from prill_harness.engines.base import Engine
from prill_harness.measure.cost import Meter, Spent
from prill_suites.common import embedded

NEVER = ("a stop that no text holds", "\u00e9\u00e8\u00ea")
TEXT = "The quick brown fox jumps over the lazy dog; don't 3.14 na\u00efve caf\u00e9 \u65e5\u672c\u8a9e. "
SAME = "a"


def behind(engine: Engine, meter: Meter, prompt: list[int], count: int) -> list[Spent]:
    """What each of `count` drawn tokens behind a prompt took, but for the first."""
    spent = list[Spent]()

    def told(token: int, logprob: float) -> None:
        spent.append(meter.read() if meter.running else Spent())
        if len(spent) == 1:
            meter.start()

    engine.generate(
        prompt, max_tokens=count, temperature=1.0, top_k=40, repetition_penalty=1.1, seed=0,
        stop=NEVER, ignore_eos=True, on_token=told,
    )  # fmt: skip
    meter.stop()
    return spent[1:]


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
