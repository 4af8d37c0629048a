"""What is promised of any engine's texts when they are asked for again: anew, beside others, in parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing

from prill_harness.engines.base import Generation
from prill_harness.faults.blackbox import changed
from prill_harness.faults.blackbox.changes import CHANGES
from prill_harness.faults.blackbox.through import with_fields
from prill_harness.numbers import compare, lanes
from prill_runtime.errors import Inconclusive
from prill_suites.contract_judges import FEW, ITSELF, SHORT, TOKENS, Client, apart, told

AT_ONCE = 8  # requests on their way at one time
CUTS = (1, 2, 7, 13, 20)  # tokens behind which a text is begun anew
NUMBERS = [change for change in CHANGES if change.blames == changed.NUMBERS]


def repeatable(client: Client) -> None:
    """A greedy text is the same cold and warm, behind other requests and behind another model."""
    ids, other = client.prompt(0), client.prompt(1)
    first, another = client.write(ids), client.write(other)
    texts = {"asked again behind another": client.write(ids), "asked again": client.write(ids)}
    client.write([*ids, *other][: client.context // 2])
    texts["behind a longer one with the same beginning"] = client.write(ids)
    models = ""
    if client.reopen is not None:
        copies = changed.applicable(NUMBERS, client.model, client.folder)
        with closing(copies), client.reopen(next(copies)[1]) as engine:
            engine.generate(ids, max_tokens=SHORT)
            texts["beside another model"] = client.write(ids)
        texts["behind another model"] = client.write(ids)
        models = ", and of another model"
    if told(another) == told(first):
        raise Inconclusive("two prompts have the same text, so nothing shows by texts")
    found = held(client, {what: (ids, first, made) for what, made in texts.items()})
    client.observe.say(f"{len(texts)} repetitions, warm and behind others{models}: {found}")


def beside(client: Client) -> None:
    """Requests that are on their way at one time have the texts that each has alone."""
    prompts = [
        [*client.prompt(n)[: None if n % 2 else 12], *client.prompt(n + 1)[:n]][: client.context // 2]
        for n in range(AT_ONCE)
    ]
    alone = [client.write(ids) for ids in prompts]
    if len({str(told(made)) for made in alone}) < 2:
        raise Inconclusive("all prompts have the same text, so one in another's place would not show")
    for turn in range(2):
        made = client.engine.generate_batch(prompts, max_tokens=SHORT)
        client.observe.expect(len(made) == len(prompts), f"{len(made)} texts of {len(prompts)} requests")
        texts = enumerate(zip(prompts, alone, made, strict=True))
        found = held(client, {f"request {n} beside others, turn {turn}": each for n, each in texts})
    client.observe.say(f"{len(prompts)} requests at one time, twice: {found}")


def continued(client: Client) -> None:
    """A text asked for in two parts, cut anywhere, is the text in one: prefill and decode agree."""
    ids, other = client.prompt(0), client.prompt(1)
    whole = client.write(ids, TOKENS)
    written = list(whole.ids)
    cuts = [cut for cut in CUTS if cut < len(written)]
    if not cuts:
        raise Inconclusive(f"a text of {len(written)} tokens cannot be cut")
    texts = {}
    for cut in cuts:
        rest = client.write([*ids, *written[:cut]], len(written) - cut)
        texts[f"begun anew at token {cut}"] = [*ids, *written[:cut]], behind(whole, cut), rest
    found = held(client, texts)
    control = client.ids([*other, *written[: cuts[-1]]], len(written) - cuts[-1])
    if control == written[cuts[-1] :] and len(control) > FEW:
        raise Inconclusive("behind another prompt the text goes on in the same way, so no cut would show")
    client.observe.say(f"{len(cuts)} places at which a text was begun anew: {found}")


def behind(made: Generation, cut: int) -> Generation:
    """What follows the first tokens of a text."""
    lists = {name: made.__dict__[name][cut:] for name in ("ids", "logprobs", "top") if name in made.__dict__}
    return with_fields(made, **lists)


def held(client: Client, texts: Mapping[str, tuple[Sequence[int], Generation, Generation]]) -> str:
    """Hold texts to what they should be, and say how near they are: another grouping of sums may turn a near
    tie, and the oracle says whether it was one.

    Args:
        texts: what was done -> the prompt, the text expected, the text that came.
    """
    client.observe.saw(sum(len(told(expected)) for _, expected, _ in texts.values()), oracle=ITSELF)
    gap = compare.largest(0.0, *(apart(expected, made) for _, expected, made in texts.values()))
    bound = max(client.logprob_bound(ids) for ids, _, _ in list(texts.values())[-2:])
    off = f"the same request gives other logprobs, {gap:.3g} apart where {bound:.2g} is noise"
    client.observe.expect(gap <= bound, off)
    different = {what: each for what, each in texts.items() if told(each[1]) != told(each[2])}
    if not different:
        return f"all {len(texts)} equal the first, their logprobs within {gap:.2g} of {bound:.2g}"
    reading = client.reading()
    for what, (ids, expected, made) in different.items():
        reading.read(what, ids, made, max(len(told(expected)), 1))
    found, first = reading.choices(), next(iter(different))
    client.observe.expect(found.ok, f"the same request gives another text: {found.sentence}")
    exact = lanes.EXACT.name == reading.lane.name
    unexplained = f"{first}: another text, and no near tie explains it"
    client.observe.expect(not exact or reading.flips > 0, unexplained)
    return f"{len(different)} of {len(texts)} turn near ties: {found.sentence}"
