"""A golden comes in; requests in which the model ends its text, or comes to a stop string, go out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice, takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.base import Engine, Generation
from prill_harness.run.checks import Observer
from prill_harness.tokens.golden import Golden
from prill_runtime.errors import Inconclusive
from prill_runtime.sampling.philox import philox_uniform
from prill_runtime.sampling.sampler import SamplingParams, filtered_distribution

HOT = 50.0  # temperature at which a distribution is almost flat
BEYOND = 4  # tokens asked for past an end
NEVER = "\x00never\x00"  # a stop string that no text holds
# How the texts are drawn in which a stop string is looked for, their tokens, and how many are drawn so.
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.5, "seed": 7},
    {"temperature": HOT, "seed": 8},
)
LENGTH, PROMPTS = 24, 4


def room(engine: Engine, ids: Sequence[int]) -> int:
    """How many tokens may follow ids without filling the context."""
    return int(engine.info.config.get("context_length", 1 << 31)) - len(ids)


def ending(
    observe: Observer, engine: Engine, golden: Golden, ends: Collection[int]
) -> tuple[list[int], int, dict[str, Any]]:
    """A request in which the model ends its text: prompt, how many tokens before the end, sampling.

    Args:
        ends: the ids that end a text, at least one.

    Raises:
        Inconclusive: the model never ended a text.
    """
    for ids, at, arguments in ends_expected(engine, golden, ends):
        most = at + BEYOND
        drawn = engine.generate(ids, max_tokens=most, ignore_eos=True, **arguments)
        observe.expect(
            drawn.finish_reason == "length",
            f"told to ignore the end of text, the engine ended after {len(drawn.ids)} of {most} tokens "
            f"with {drawn.finish_reason!r}",
        )
        if [n for n, token in enumerate(drawn.ids) if token in ends][:1] == [at]:
            return ids, at, arguments
        # Two ids about as probable change places when the row they are chosen from is rounded in another way.
    raise Inconclusive(
        "the engine's sampler does not draw the end of text where its logits say so",
        where=f"{len(golden.prompts)} prompts",
    )


def ends_expected(
    engine: Engine, golden: Golden, ends: Collection[int]
) -> Iterator[tuple[list[int], int, dict[str, Any]]]:
    """Requests as of `ending`: where the oracle ended a golden text, then where a hot draw is to end one."""
    for prompt in golden.prompts:
        if prompt.first_eos is not None:
            # Begin close to the end, so that a long text is prefilled rather than decoded.
            start = max(0, prompt.first_eos - 5)
            ids, at = [*prompt.ids, *prompt.tokens[:start]], prompt.first_eos - start
            if at + BEYOND <= room(engine, ids):
                yield ids, at, {}
    for prompt in golden.prompts:
        ids = prompt.ids[: max(1, room(engine, ()) - BEYOND)]
        yield ids, 0, hot_end(engine.logits(ids)[-1], ends, len(ids))


def hot_end(row: NDArray[np.floating], ends: Collection[int], position: int) -> dict[str, Any]:
    """Sampling arguments under which an end-of-text id is drawn at `position` from logits (vocab,).

    So hot a distribution is almost flat: one seed in twice `vocab` draws any given id from the middle half
    of its share: where the row that is drawn from is rounded in another way, that does not reach so far.

    Raises:
        Inconclusive: the model has no end-of-text id, or no seed draws one.
    """
    ids, probabilities = filtered_distribution(row, SamplingParams(temperature=HOT))
    places = np.flatnonzero(np.isin(ids, list(ends)))
    if not len(places):
        raise Inconclusive("no end-of-text id of the model has a finite logit")
    mass = np.cumsum(probabilities)
    place = int(places[0])
    low, high = (float(mass[place - 1]) if place else 0.0), float(mass[place])
    for seed in range(40 * len(ids)):
        if abs(philox_uniform(seed, position) * mass[-1] - (low + high) / 2) < (high - low) / 4:
            return {"temperature": HOT, "seed": seed}
    raise Inconclusive("no seed draws the end of text", expected=f"one in {len(ids)}", got=40 * len(ids))


@dataclass(frozen=True)
class Written:
    """A text that a model wrote when told to ignore its end, and a stop string in it.

    Attributes:
        count, reason: the tokens up to the end of the stop string, and what ends the text there.
    """

    prompt: list[int]
    arguments: dict[str, Any]
    free: Generation
    stop: str
    count: int
    reason: str

    def again(self, engine: Engine, stop: str = "", ignore_eos: bool = True) -> Generation:
        """The same request, with a stop string, or without."""
        return engine.generate(
            self.prompt,
            max_tokens=len(self.free.ids),
            ignore_eos=ignore_eos,
            stop=[stop] if stop else [],
            **self.arguments,
        )

    def pieces(self, engine: Engine, special: Collection[int]) -> list[bytes]:
        """The bytes that each id adds to the text, up to the first special token."""
        ids = list(takewhile(lambda token: token not in special, self.free.ids))
        texts = [engine.detokenize([*self.prompt, *ids[:n]]) for n in range(len(ids) + 1)]
        return [text[len(texts[n]) :] for n, text in enumerate(texts[1:])]

    def with_stop(self, found: tuple[str, int] | None) -> Written | None:
        """The same with another stop string and the tokens up to its end."""
        return replace(self, stop=found[0], count=found[1], reason="stop") if found else None


def written(engine: Engine, golden: Golden) -> Iterator[Written]:
    """What the model writes behind the beginnings of its golden texts, in several ways of drawing."""
    for arguments in WAYS:
        for prompt in golden.prompts[:PROMPTS]:
            ids = [*prompt.ids, *prompt.tokens][: min(12, max(1, room(engine, ()) // 2))]
            count = min(LENGTH, room(engine, ids))
            free = engine.generate(ids, max_tokens=count, ignore_eos=True, **arguments)
            yield Written(ids, arguments, free, NEVER, len(free.ids), "length")


def endless(observe: Observer, engine: Engine, golden: Golden) -> None:
    """A vocabulary without an end: no text ends by itself, whether the end is to be ignored or not."""
    texts = list(written(engine, golden))
    for text in texts:
        ended, count = text.again(engine, ignore_eos=False), len(text.free.ids)
        observe.saw(count, oracle="the same request, told to ignore the end")
        observe.expect(
            ended.ids == text.free.ids and ended.finish_reason == "length",
            f"no token ends a text, but the engine ended after {len(ended.ids)} of {count} tokens "
            f"with {ended.finish_reason!r}",
        )
    observe.say(f"no token of the vocabulary ends a text, and none of {len(texts)} texts ended by itself")


def stopping(engine: Engine, golden: Golden, special: Collection[int]) -> tuple[list[Written], str]:
    """Texts that come to a stop string, each with the string; and in words where those lie.

    Two that begin in one token and end in another, where the model writes any; one within a token where no
    two tokens make a text; where none makes any, a string that stops nothing.
    """
    over = (text.with_stop(over_a_border(text.pieces(engine, special))) for text in written(engine, golden))
    if found := list(islice(filter(None, over), 2)):
        return found, "split over two tokens, each ended the text at the token that completes it"
    texts = list(written(engine, golden))
    within = (text.with_stop(in_one_token(text.pieces(engine, special))) for text in texts)
    if found := list(islice(filter(None, within), 1)):
        return found, "within a token ended the text there; no two tokens of this model's texts make a word"
    return texts[:1], "ended nothing: no token of this model's texts stands for a character"


def over_a_border(pieces: Sequence[bytes]) -> tuple[str, int] | None:
    """A string that begins in one token and ends in a later one, nowhere before; the tokens up to its end.

    Two characters on each side of the border where there are as many, one where not, or the one character
    that the border divides.
    """
    ends, text = list(accumulate(map(len, pieces))), b"".join(pieces)
    for width in (2, 1, 0):
        for border in [*ends[3:-1], *ends[:3]]:
            span = _characters(text, border, width)
            if span is None:
                continue
            stop = text[slice(*span)]
            count = next(n for n, end in enumerate(ends, 1) if end >= span[1])
            # The first space of a text may be one that tokens have and the text has not.
            first = text.find(stop) == span[0] and (b" " + text).find(stop) == span[0] + 1
            if first and span[0] < ends[count - 1] - len(pieces[count - 1]):
                return stop.decode(), count
    return None


def in_one_token(pieces: Sequence[bytes]) -> tuple[str, int] | None:
    """The first token that is whole characters, as a string, and the tokens up to its end."""
    for n, piece in enumerate(pieces, 1):
        text = piece.decode("utf-8", "ignore")
        if text.strip() and text.encode() == piece and text.strip().encode() not in b"".join(pieces[: n - 1]):
            return text.strip(), n
    return None


def _characters(text: bytes, border: int, width: int) -> tuple[int, int] | None:
    """Where the `width` whole characters on each side of a border begin and end; 0: the one it divides."""
    whole = [n for n in range(max(0, border - 8), min(len(text), border + 8) + 1) if _is_boundary(text, n)]
    before, behind = [n for n in whole if n < border], [n for n in whole if n > border]
    if width and (border not in whole or min(len(before), len(behind)) < width):
        return None
    if not width and (border in whole or not before or not behind):
        return None
    span = before[-max(width, 1)], behind[max(width, 1) - 1]
    valid = text[slice(*span)].decode("utf-8", "ignore")
    return span if len(valid) == (2 * width or 1) and valid.encode() == text[slice(*span)] else None


def _is_boundary(text: bytes, at: int) -> bool:
    return at == len(text) or text[at] & 0xC0 != 0x80
