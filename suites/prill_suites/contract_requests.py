"""What is promised of any engine's requests: how they end, repeat, stream, are refused and are cancelled."""

from __future__ import annotations

from itertools import takewhile

from prill_harness.engines.base import Engine, Generation
from prill_harness.numbers import compare, lanes
from prill_harness.tokens.divergence import named
from prill_runtime.errors import InvalidParameter, MissingCapability, PrillError
from prill_suites.contract_judges import HOT, ITSELF, SHORT, TOKENS, Client, told
from prill_suites.properties_ends import over_a_border
from prill_suites.sequences import texts_of
from prill_suites.tokenizer_texts import parting

SEEDS = range(2, 8)


def repeatable(client: Client) -> None:
    """A greedy text is the same cold and warm, behind other requests and beside them."""
    ids, other = client.prompt(0), client.prompt(1)
    first = client.write(ids)
    texts = {"asked again": client.write(ids)}
    client.write(other)
    texts["behind another"] = client.write(ids)
    longer = client.write([*ids, *other][: client.context // 2])
    texts["behind a longer one with the same beginning"] = client.write(ids)
    beside = client.engine.generate_batch(
        [other, ids, [*ids, *other][: client.context // 2]], max_tokens=SHORT
    )
    texts["beside two others"] = beside[1]
    different = {what: made for what, made in texts.items() if told(made) != told(first)}
    client.observe.saw(len(told(first)) * len(texts), oracle=ITSELF)
    if told(beside[2]) != told(longer):
        different["a longer one beside two others"] = beside[2]
    gap = compare.largest(0.0, *(apart(first, made) for made in texts.values()))
    bound = client.logprob_bound(ids)
    off = f"the same request gives other logprobs, {gap:.3g} apart where {bound:.2g} is noise"
    client.observe.expect(gap <= bound, off)
    if not different:
        same = f"{len(texts)} repetitions, warm, behind and beside others, equal the first"
        client.observe.say(f"{same}; their logprobs are within {gap:.2g} of {bound:.2g}")
        return
    # Another grouping of sums may turn a near tie, and the oracle says whether it was one.
    reading = client.reading()
    for what, made in different.items():
        prompt = ids if what in texts else [*ids, *other][: client.context // 2]
        reading.read(what, prompt, made, SHORT)
    found = reading.choices()
    client.observe.expect(found.ok, f"the same request gives another text: {found.sentence}")
    exact = lanes.EXACT.name == reading.lane.name
    what = next(iter(different))
    client.observe.expect(
        not exact or reading.flips > 0, f"{what}: another text, and no near tie explains it"
    )
    client.observe.say(f"{len(different)} of {len(texts)} repetitions turn near ties: {found.sentence}")


def apart(one: Generation, other: Generation) -> float:
    """How far the logprobs of two texts are apart, up to where the texts part; 0 where none are told."""
    try:
        pairs = zip(one.ids, other.ids, one.logprobs, other.logprobs, strict=False)
        alike = takewhile(lambda pair: pair[0] == pair[1], pairs)
        return compare.largest(0.0, *(abs(a - b) for _, _, a, b in alike))
    except MissingCapability:
        return 0.0


def seeds(client: Client) -> None:
    """One seed gives one text, another seed another."""
    ids = client.prompt(2)
    first = client.write(ids, temperature=HOT, seed=1)
    client.same("seed 1, asked again", first, client.write(ids, temperature=HOT, seed=1))
    others = [told(client.write(ids, temperature=HOT, seed=seed)) for seed in SEEDS]
    different = sum(text != told(first) for text in others)
    client.observe.expect(
        different > 0, f"seeds 1 to {SEEDS[-1]} all give the same text at temperature {HOT:g}"
    )
    client.observe.say(f"seed 1 repeats its text, {different} of {len(others)} other seeds give others")


def lengths(client: Client) -> None:
    """As many tokens as were asked for: none, one, and several."""
    ids = client.prompt(0)
    whole = client.write(ids, SHORT)
    for count in (1, 5, 0):
        try:
            made = client.write(ids, count)
        except InvalidParameter:
            if count:
                raise
            continue  # a text of no tokens may be refused, and nothing may break by it
        written = told(made)
        if isinstance(written, str):
            raise MissingCapability(
                f"engine {client.engine.info.name} does not tell how many tokens it wrote"
            )
        wrong = f"asked for {count} tokens, it wrote {len(written)}"
        client.observe.expect(
            written == list(told(whole))[:count], wrong + f": {parting(told(whole), written)}"
        )
        ended = f"asked for {count} tokens, it ended by {made.finish_reason}"
        client.observe.expect(made.finish_reason == "length", ended)
        client.observe.saw(count + 1, oracle="the number that was asked for")
    client.observe.say("texts of no token, one and five are as long as asked for")


def stops(client: Client) -> None:
    """A stop string that is split over two tokens ends the text at the second."""
    pieces_of, found = client.oracle.model.tokenizer.piece, 0
    for number in range(len(client.golden.prompts)):
        ids = client.prompt(number)
        free = client.write(ids, TOKENS)
        if isinstance(told(free), str):
            raise MissingCapability(
                f"engine {client.engine.info.name} does not tell the ids of what it writes"
            )
        if (cut := over_a_border([pieces_of(token) for token in free.ids])) is None:
            continue
        stop, count = cut
        made, found = client.write(ids, TOKENS, stop=[stop]), found + 1
        where = f"prompt {number}, stop {stop!r} complete at token {count - 1}"
        got = f"the text ends by {made.finish_reason} after {len(made.ids)} tokens"
        client.observe.expect(
            made.finish_reason == "stop" and made.ids == free.ids[:count], f"{where}: {got}"
        )
        client.observe.saw(count, oracle="the same text without a stop string")
        if found == 3:
            break
    client.observe.say(f"{found} stop strings split over tokens ended their texts where they were complete")


def context(client: Client) -> None:
    """A full context ends the text, one position too many is refused, and the next request is right."""
    text, ids = texts_of(client.golden)[0], client.prompt(0)
    whole = (text * (client.context // len(text) + 1))[: client.context + 1]
    before, left = client.write(ids), 4
    try:
        made = client.engine.generate(whole[: client.context - left], max_tokens=3 * left, ignore_eos=True)
    except MissingCapability:
        raise
    except PrillError as error:
        full = f"refused in full: {error}"
    else:
        count = len(told(made))
        full = f"{count} tokens before the end of {client.context} positions, ended by {made.finish_reason}"
        sound = made.finish_reason in ("context", "length") and left - 1 <= count <= left + 1
        client.observe.expect(sound, f"with {left} positions left: {full}")
    long = f"a prompt of {len(whole)} for {client.context}"
    sentence = client.refused(long, lambda: client.engine.generate(whole, max_tokens=1))
    client.same("after a prompt that is too long", before, client.write(ids))
    client.observe.say(f"{full}; one more is refused: {sentence[:120]}")


def vocabulary(client: Client) -> None:
    """Ids outside the vocabulary are refused, and the next request is right."""
    ids, size, sentence = client.prompt(0), client.oracle.model.vocab_size, ""
    before = client.write(ids)
    for bad in (size, -1, 2**31):
        sentence = client.refused(f"id {bad} of {size}", lambda bad=bad: client.write([*ids, bad], 1))  # type: ignore[misc]
        client.same(f"after id {bad} was refused", before, client.write(ids))
    client.observe.say(f"3 ids refused, and the next request is right: {sentence[:120]}")


def streaming(client: Client) -> None:
    """What is told while a text is written is the whole text: its ids, its logprobs, whole characters."""
    heard: list[tuple[int, float]] = []
    for number in range(3):
        ids = client.prompt(number)
        whole = client.write(ids, TOKENS)
        heard.clear()
        made = client.write(ids, TOKENS, on_token=lambda token, logprob: heard.append((token, logprob)))
        client.same(f"prompt {number}, streamed", whole, made)
        spoken = [token for token, _ in heard]
        where = f"prompt {number}: told while it was written"
        client.observe.expect(spoken == list(whole.ids), f"{where}: {parting(list(whole.ids), spoken)}")
        text = getattr(whole, "text", None)
        expected = client.oracle.model.tokenizer.decode(whole.ids).decode("utf-8", "replace")
        if text is not None:
            wrong = f"prompt {number}: its text is not that of its ids: {parting(expected, text)}"
            client.observe.expect(text.strip(" \ufffd") == expected.strip(" \ufffd"), wrong)
    client.observe.say(f"3 texts of {TOKENS} tokens are the same streamed and whole")


def cancelled(client: Client) -> None:
    """A callback that says no ends the text, and what it held is free for the next request."""
    ids, other = client.prompt(0), client.prompt(1)
    before = client.write(ids)
    for turn in range(6):
        heard: list[int] = []

        def hear(token: int, _: float, heard: list[int] = heard) -> bool:
            heard.append(token)
            return len(heard) < 3

        made = client.write(other, TOKENS, on_token=hear)
        cut = f"cancelled at its third token, the text ends by {made.finish_reason} after {len(made.ids)}"
        client.observe.expect(made.finish_reason == "cancelled" and len(made.ids) == 3, cut)
        client.observe.saw(len(heard), oracle="the token at which it was cancelled")
        if not turn:
            client.same("after a cancelled request", before, client.write(ids))
    client.same("after 6 cancelled requests", before, client.write(ids))
    client.observe.say("6 requests cancelled at their third token, and the next is right")


def ended(client: Client, other: Engine, end: int, at: int) -> None:
    """On a file whose end of text is a token that the model writes, the text ends there, unless told not to.

    Args:
        other: the engine on that file. end: the id that is the end there. at: tokens before it.
    """
    ids, free = client.prompt(0), client.write(client.prompt(0), TOKENS)
    made = other.generate(ids, max_tokens=TOKENS)
    where = f"the end of the text, {named(client.oracle, [end], 0)}, is token {at}"
    got = f"the text ends by {made.finish_reason} after {len(told(made))} tokens"
    client.observe.expect(made.finish_reason == "eos" and made.ids == free.ids[:at], f"{where}: {got}")
    over = other.generate(ids, max_tokens=TOKENS, ignore_eos=True)
    client.same("told to ignore the end of the text", free, over)
    client.observe.saw(at + 1, oracle="the same text on the file itself")
    client.observe.say(f"{where}, and the text ends there; told to ignore it, it goes on")
