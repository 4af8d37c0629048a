"""What is promised of any engine's texts and numbers, whoever wrote it: each promise judged on one engine.

A judge takes a client, and says what it saw. `contract.py` runs it on the engine, `contract_sight.py` on the
same engine behind a known fault, where it has to fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import numpy as np

from prill_harness.engines.base import Engine, Generation
from prill_harness.engines.embedded import Embedded
from prill_harness.numbers import compare, lanes
from prill_harness.run.checks import CheckFailed, Observer
from prill_harness.stages.written import explained
from prill_harness.tokens.divergence import lane_of
from prill_harness.tokens.golden import Golden
from prill_harness.tokens.sides import oracle_logits
from prill_harness.tokens.verify import Verification, verified
from prill_runtime.errors import Inconclusive, MissingCapability, PrillError
from prill_suites.sequences import context_of
from prill_suites.tokenizer_texts import AROUND, WORDY, parting

ORACLE, ITSELF = "the float64 oracle on the same file", "the same request to the same engine"
TOKENIZER = "the file's tokenizer as the oracle reads it"
PROMPTS, TOKENS, SHORT = 6, 24, 12
HOT = 5.0
ALLOWED_SUM = 1 + 1e-4  # servers add up probabilities in float32
Judge = Callable[["Client"], None]


@dataclass
class Client:
    """One engine, what judges it, and where that is written down.

    Attributes:
        explains: whether the mistake behind wrong texts is looked for, which takes a while.
    """

    observe: Observer
    engine: Engine
    golden: Golden
    oracle: Embedded
    explains: bool = False

    @cached_property
    def context(self) -> int:
        """Positions that the engine has."""
        return int(self.engine.info.config.get("served_context", context_of(self.golden)))

    @cached_property
    def few(self) -> Golden:
        """The golden with as many prompts as a judge asks."""
        return msgspec.structs.replace(self.golden, prompts=self.golden.prompts[:PROMPTS])

    def prompt(self, which: int = 0) -> list[int]:
        return list(self.golden.prompts[which % len(self.golden.prompts)].ids[: self.context // 2])

    def write(self, ids: Sequence[int], count: int = SHORT, **asked: Any) -> Generation:
        return self.engine.generate(ids, max_tokens=min(count, self.context - len(ids)), **asked)

    def reading(self) -> Verification:
        lane, floor, _ = lane_of(self.engine, self.golden)
        return Verification(self.oracle, lane, floor, self.context)

    def logprob_bound(self, ids: Sequence[int]) -> float:
        """How far a logprob behind these ids may be from the oracle's, by the lane."""
        lane, floor, _ = lane_of(self.engine, self.golden)
        largest = float(np.abs(oracle_logits(self.oracle, ids)).max())
        return lanes.bounds(lane, lanes.stored(floor, largest)).dlogprob_max

    def same(self, what: str, expected: Generation, got: Generation) -> None:
        """Hold a text to another; an engine that tells no ids is held to its words."""
        a, b = told(expected), told(got)
        self.observe.saw(len(a), oracle=ITSELF)
        self.observe.expect(a == b, f"{what}: {parting(a, b)}")

    def refused(self, what: str, call: Callable[[], Generation]) -> str:
        """The sentence with which a request is refused; an answer is a finding."""
        try:
            made = call()
        except Inconclusive:
            raise
        except PrillError as error:
            self.observe.saw(1, oracle="the vocabulary and the context of the file")
            return str(error)
        raise CheckFailed(f"{what}: expected a refusal, got a text of {len(told(made))} with no word of it")


def told(made: Generation) -> Sequence[Any]:
    """The ids of a text, or the text where the engine tells none."""
    try:
        return list(made.ids)
    except MissingCapability:
        return str(getattr(made, "text", ""))


def hard_texts(client: Client) -> list[str]:
    """Texts that were chosen to hurt: white space, CRLF, scripts, bytes, and special tokens in the middle."""
    tokenizer = client.oracle.model.tokenizer
    special = sorted(token for token in {tokenizer.bos_id, *tokenizer.eog_ids} if token is not None)
    spelled = [tokenizer.piece(token).decode() or "<s>" for token in special]
    around = [form.replace("{}", text) for text in spelled for form in AROUND]
    return [*WORDY, "\r\n", " ", "a\r\n b", *around, *(prompt.text for prompt in client.golden.prompts)]


def tokenization(client: Client) -> None:
    """Every text has the ids that the file gives it, with and without what begins and ends a text."""
    texts, count = hard_texts(client), 0
    for text in texts:
        for special in (True, False):
            expected = client.oracle.tokenize(text, special)
            got = client.engine.tokenize(text, special)
            count += len(expected)
            what = f"{text[:40]!r}, add_special={special}"
            client.observe.expect(expected == got, f"tokenizer: {what}: {parting(expected, got)}")
    client.observe.saw(count, oracle=TOKENIZER)
    client.observe.say(f"{count} ids of {len(texts)} texts equal the file's, with and without special tokens")


def round_trip(client: Client) -> None:
    """A text's ids, decoded, are the text; the space that tokenizers put in front may stay."""
    count = 0
    for text in WORDY:
        ids, whole = client.engine.tokenize(text, False), text.encode()
        got = client.engine.detokenize(ids)
        count += len(whole)
        wrong = f"{text[:40]!r} comes back as another text: {parting(whole, got)}"
        client.observe.expect(got in (whole, b" " + whole), wrong)
    client.observe.saw(count, oracle="the text itself")
    client.observe.say(f"{len(WORDY)} texts of {count} bytes come back whole")


def choices(client: Client) -> None:
    """Greedy texts, read by the oracle: each token its best, or a near tie of as many as noise explains."""
    found = verified(client.engine, client.few, client.oracle, TOKENS).choices()
    _judge(client, explained(found, client.oracle) if client.explains else found)


def numbers(client: Client) -> None:
    """The logprobs told beside greedy texts, by their ids; their probabilities add up to one at most."""
    reading = verified(client.engine, client.few, client.oracle, TOKENS)
    _judge(client, reading.numbers())
    for number, made in enumerate(client.write(client.prompt(n)) for n in range(2)):
        for at, (own, best) in enumerate(zip(made.logprobs, _tops(made), strict=True)):
            where, token = f"prompt {number}, token {at}", made.ids[at]
            total = math.fsum(map(math.exp, best.values())) if best else math.exp(own)
            sums = f"{where}: its probabilities add up to {total:.6g}"
            client.observe.expect(total <= ALLOWED_SUM, sums)
            beside = f"{where}: logprob {own:.6g} beside the text, {best.get(token, own):.6g} in its list"
            client.observe.expect(abs(best.get(token, own) - own) < 1e-4, beside)


def before_temperature(client: Client) -> None:
    """Logprobs of a text drawn at a temperature are those of the raw logits."""
    ids = client.prompt(1)
    made = client.write(ids, temperature=HOT, seed=3)
    rows = oracle_logits(client.oracle, [*ids, *made.ids[:-1]])[len(ids) - 1 :]
    bound = client.logprob_bound([*ids, *made.ids[:-1]])
    for at, (token, own) in enumerate(zip(made.ids, made.logprobs, strict=True)):
        expected = float(compare.log_softmax(rows[at])[token])
        where = f"token {at} at temperature {HOT:g}"
        wrong = f"{where}: logprob {own:.4g}, the raw logits' is {expected:.4g} (± {bound:.2g})"
        client.observe.expect(abs(own - expected) <= bound, wrong)
    client.observe.saw(len(made.ids), oracle=ORACLE)
    client.observe.say(f"{len(made.ids)} logprobs at temperature {HOT:g} are those of the raw logits")


def configuration(client: Client) -> None:
    """Whatever of its configuration the engine reports is the file's."""
    reported, expected = client.engine.info.config, client.golden.config
    seen = [key for key in expected if key in reported]
    if not seen:
        raise MissingCapability(f"engine {client.engine.info.name} reports no configuration")
    for key in seen:
        wrong = f"configuration: {key}: the file says {expected[key]}, the engine reports {reported[key]}"
        client.observe.expect(alike(expected[key], reported[key]), wrong)
    client.observe.saw(len(seen), oracle="the file's metadata")
    client.observe.say(f"{len(seen)} of {len(expected)} values are reported, and are the file's")


def alike(expected: Any, got: Any) -> bool:
    if isinstance(expected, float) and isinstance(got, float | int):
        return math.isclose(expected, got, rel_tol=1e-6)
    return bool(expected == got)


def _tops(made: Generation) -> Sequence[Any]:
    return getattr(made, "top", ()) or [{}] * len(made.ids)


def _judge(client: Client, found: Any) -> None:
    client.observe.saw(found.observed, oracle=ORACLE)
    client.observe.note(**found.detail)
    client.observe.expect(found.ok, found.sentence)
    client.observe.say(found.sentence)
