"""What is promised of any engine's requests: how they end, stream, are refused and are cancelled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from prill_harness.engines.base import Engine, Generation
from prill_harness.faults.blackbox import changed
from prill_harness.tokens.divergence import named
from prill_runtime.errors import Inconclusive, InvalidParameter, MissingCapability, PrillError
from prill_suites.contract_judges import HOT, SHORT, TOKENS, Client, told
from prill_suites.properties_ends import over_a_border
from prill_suites.sequences import texts_of
from prill_suites.tokenizer_texts import parting

SEEDS = range(2, 8)
CANCELLED = 16  # more than servers have slots by default
LEAD = 3  # tokens before a character that is looked at
FLAT, ENDLESS, ENDS_TRIED, BEYOND = 50.0, 200, 32, 4  # temperature, tokens and seeds by which an end is drawn


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
            made = client.engine.generate(ids, max_tokens=count)
        except InvalidParameter as error:
            client.observe.expect(not count, f"a text of {count} tokens is refused: {error}")
            continue  # one of no tokens may be refused, and nothing may break by it
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
        if (text := getattr(made, "text", None)) is not None:
            whole = client.oracle.model.tokenizer.decode(free.ids[:count]).decode("utf-8", "replace")
            before = whole.partition(stop)[0]
            wrong = f"{where}: the text is not what stands before it: {parting(before, text)}"
            client.observe.expect(text.strip(" ") == before.strip(" "), wrong)
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
        spoiled = partial(client.engine.generate, [*ids, bad], max_tokens=1)
        sentence = client.refused(f"id {bad} of {size}", spoiled)
        client.same(f"after id {bad} was refused", before, client.write(ids))
    client.observe.say(f"3 ids refused, and the next request is right: {sentence[:120]}")


def streaming(client: Client) -> None:
    """What is told while a text is written is the whole text: its ids, its logprobs, whole characters."""
    heard: list[tuple[int, float]] = []

    def hear(token: int, logprob: float) -> None:
        heard.append((token, logprob))

    for number in range(3):
        ids = client.prompt(number)
        whole = client.write(ids, TOKENS)
        heard.clear()
        made = client.write(ids, TOKENS, on_token=hear)
        client.same(f"prompt {number}, streamed", whole, made)
        spoken = [token for token, _ in heard]
        where = f"prompt {number}: told while it was written"
        client.observe.expect(spoken == list(whole.ids), f"{where}: {parting(list(whole.ids), spoken)}")
        spelled(client, f"prompt {number}", whole, made)
    seen = {"whole": 0, "of several tokens": 0}
    for kind, parts in zip(seen, (False, True), strict=True):
        for ids in before_characters(client, parts=parts):
            whole = client.write(ids)
            try:
                made = client.write(ids, on_token=hear)
            except MissingCapability:
                if not parts:
                    raise
                break  # some servers do not stream the ids of parts of characters
            seen[kind] += spelled(client, f"where a character is {kind}", whole, made)
    told_of = " and ".join(f"{count} {kind}" for kind, count in seen.items())
    client.observe.say(
        f"3 texts of {TOKENS} tokens are the same streamed and whole; characters beyond ASCII: {told_of}"
    )


def spelled(client: Client, where: str, whole: Generation, streamed: Generation) -> int:
    """Hold both texts to the characters of the ids; how many of them have more than a byte."""
    expected = client.oracle.model.tokenizer.decode(whole.ids).decode("utf-8", "replace").strip(" \ufffd")
    for how, made in (("whole", whole), ("streamed", streamed)):
        if (text := getattr(made, "text", None)) is not None:
            wrong = f"{where}: its text, {how}, is not that of its ids: {parting(expected, text)}"
            client.observe.expect(text.strip(" \ufffd") == expected, wrong)
            client.observe.saw(len(expected), oracle="the characters of its ids")
    return sum(not each.isascii() for each in expected)


def before_characters(client: Client, *, parts: bool) -> list[list[int]]:
    """Prompts behind which the golden writes a character beyond ASCII; a few, if there are any.

    Args:
        parts: one that has several tokens, or else one that is the end of a token.
    """
    found, piece = [], client.oracle.model.tokenizer.piece
    for prompt in client.golden.prompts:
        text = [*prompt.ids, *prompt.tokens]
        for at in range(len(prompt.ids) + LEAD, min(len(text), client.context - SHORT)):
            if not piece(text[at]).isascii() and _whole(piece(text[at])) is not parts:
                found.append(text[: at - LEAD])
                break
    return found[:2]


def _whole(piece: bytes) -> bool:
    try:
        return piece.decode() != ""
    except UnicodeDecodeError:
        return False


def cancelled(client: Client) -> None:
    """A callback that says no ends the text, and what it held is free for the next request."""
    ids, other = client.prompt(0), client.prompt(1)
    before = client.write(ids)
    for turn in range(CANCELLED):
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
    client.same(f"after {CANCELLED} cancelled requests", before, client.write(ids))
    client.observe.say(f"{CANCELLED} requests cancelled at their third token, and the next is right")


def ended(client: Client) -> None:
    """A text ends where the file says that texts end, unless told to ignore it."""
    if client.reopen is None:
        _end_drawn(client)
    else:
        _end_moved(client, client.reopen)


def _end_moved(client: Client, reopen: Callable[[Path], Engine]) -> None:
    """On a file whose end of text is a token that the model writes."""
    ids, free = client.prompt(0), client.write(client.prompt(0), TOKENS)
    written = list(free.ids)
    at = next((n for n, token in enumerate(written) if token not in written[:n] and n > 2), None)
    if at is None:
        raise Inconclusive("the text repeats itself, so no token of it could end it")
    end = written[at]
    where = f"the end of the text, {named(client.oracle, [end], 0)}, is token {at}"
    with reopen(changed.end_moved(client.model, client.folder, end)) as other:
        made = other.generate(ids, max_tokens=TOKENS)
        got = f"the text ends by {made.finish_reason} after {len(told(made))} tokens"
        client.observe.expect(made.finish_reason == "eos" and made.ids == free.ids[:at], f"{where}: {got}")
        over = other.generate(ids, max_tokens=TOKENS, ignore_eos=True)
    client.same("told to ignore the end of the text", free, over)
    client.observe.saw(at + 1, oracle="the same text on the file itself")
    client.observe.say(f"{where}, and the text ends there; told to ignore it, it goes on")


def _end_drawn(client: Client) -> None:
    """On the file itself, so hot that any token comes in time, the end of the text as well."""
    ids, ends, drawn = client.prompt(0), client.oracle.model.tokenizer.eog_ids, 0
    for seed in range(ENDS_TRIED):
        hot = {"temperature": FLAT, "seed": seed}
        made = client.write(ids, ENDLESS, **hot)
        written = list(made.ids)
        drawn += len(written)
        inside = next((at for at, token in enumerate(written) if token in ends), None)
        wrong = f"drawn by seed {seed}, token {inside} is the end of the text, and it went on"
        client.observe.expect(inside is None, wrong)
        if made.finish_reason == "eos":
            break
    else:
        raise MissingCapability(
            f"no end came among {drawn} tokens that {client.name} drew", hint="start it with serve:"
        )
    where = f"drawn by seed {seed}, the text ends at token {len(written)}"
    over = client.write(ids, len(written) + BEYOND, **hot, ignore_eos=True)
    got = f"told to ignore it, it ends by {over.finish_reason} after {len(over.ids)} tokens"
    sound = over.ids[: len(written)] == made.ids and over.finish_reason == "length"
    past = len(over.ids) == len(written) + BEYOND and over.ids[len(written)] in ends
    client.observe.expect(sound and past, f"{where}; {got}: {parting(written, over.ids)}")
    client.observe.saw(drawn, oracle="the ends that the file names")
    client.observe.say(f"{where} of {drawn} drawn, none of which is an end; told to ignore it, it goes on")
