"""What is promised of any engine's texts and numbers, whoever wrote it: each promise judged on one engine.

A judge takes a client, and says what it saw. `contract.py` runs it on the engine, `contract_sight.py` on the
same engine behind a known fault, where it has to fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from prill_harness.engines.base import Engine, Generation
from prill_harness.engines.embedded import Embedded
from prill_harness.engines.models import resolve_model
from prill_harness.faults.blackbox import changed
from prill_harness.faults.blackbox.planted import BLACKBOX
from prill_harness.numbers import compare, lanes
from prill_harness.run.checks import CheckFailed, Observer
from prill_harness.stages.written import explained
from prill_harness.tokens.divergence import lane_of
from prill_harness.tokens.golden import Golden
from prill_harness.tokens.sides import oracle_logits
from prill_harness.tokens.verify import Verification, verified
from prill_runtime.errors import Inconclusive, InvalidParameter, MissingCapability, PrillError
from prill_suites.sequences import context_of
from prill_suites.tokenizer_texts import AROUND, NO_SPECIAL, RARE, WORDY, parting

ORACLE, ITSELF = "the float64 oracle on the same file", "the same request to the same engine"
TOKENIZER = "the file's tokenizer as the oracle reads it"
PROMPTS, TOKENS, SHORT = 6, 24, 12
HOT = 5.0
DRAWN, FEW = range(3, 19), 6  # seeds and tokens of texts drawn until two or so tell their logprobs
ALLOWED_SUM = 1 + 1e-4  # servers add up probabilities in float32
FOLLOWED = (("rope_base", "file_rope_base"), ("norm_eps", "file_rms_eps"), ("norm_eps", "file_norm_eps"))
"""Values that engines report, and the changed files in which they are others."""
Judge = Callable[["Client"], None]


@dataclass
class Client:
    """One engine, what judges it, and where that is written down.

    Attributes:
        reopen: opens the engine on another file; None if it has its model already.
        folder: where changed files go.
        explains: whether the mistake behind wrong texts is looked for, which takes a while.
    """

    observe: Observer
    engine: Engine
    golden: Golden
    oracle: Embedded
    reopen: Callable[[Path], Engine] | None = None
    folder: Path = Path()
    explains: bool = False

    @property
    def name(self) -> str:
        return f"engine {self.engine.info.name}"

    @property
    def model(self) -> Path:
        """The file that the engine is believed to have."""
        return resolve_model(self.oracle.info.model)

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
        """A text behind ids.

        Raises:
            CheckFailed: a plain request is refused. MissingCapability: one that asks for something more is.
        """
        try:
            return self.engine.generate(ids, max_tokens=min(count, self.context - len(ids)), **asked)
        except InvalidParameter as error:
            if asked:
                raise MissingCapability(f"{self.name} does not take {', '.join(asked)}: {error}") from None
            raise CheckFailed(f"a sound request is refused: {error}") from None

    def ids(self, ids: Sequence[int], count: int = SHORT, **asked: Any) -> list[int]:
        """The ids of a text. Raises MissingCapability for an engine that tells none."""
        return list(self.write(ids, count, **asked).ids)

    def reading(self) -> Verification:
        lane, floor, _ = lane_of(self.engine, self.golden)
        return Verification(self.oracle, lane, floor, self.context)

    def logprob_bound(self, ids: Sequence[int]) -> float:
        """How far a logprob behind these ids may be from the oracle's, by the lane."""
        lane, floor, _ = lane_of(self.engine, self.golden)
        largest = float(np.abs(oracle_logits(self.oracle, ids)).max())
        return lanes.bounds(lane, lanes.stored(floor, largest)).dlogprob_max

    @cached_property
    def noise(self) -> float:
        """How far two logprobs of one request may be apart."""
        return self.logprob_bound(self.prompt())

    def same(self, what: str, expected: Generation, got: Generation) -> None:
        """Hold a text and its logprobs to another's; an engine that tells no ids is held to its words."""
        a, b = told(expected), told(got)
        self.observe.saw(len(a), oracle=ITSELF)
        self.observe.expect(a == b, f"{what}: {parting(a, b)}")
        gap = apart(expected, got)
        off = f"{what}: the same text with other logprobs, {gap:.3g} apart where {self.noise:.2g} is noise"
        self.observe.expect(gap <= self.noise, off)

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


def apart(one: Generation, other: Generation) -> float:
    """How far the logprobs of two texts are apart, up to where the texts part; 0 where none are told."""
    try:
        pairs = zip(one.ids, other.ids, one.logprobs, other.logprobs, strict=False)
        alike = takewhile(lambda pair: pair[0] == pair[1], pairs)
        return compare.largest(0.0, *(abs(a - b) for _, _, a, b in alike))
    except MissingCapability:
        return 0.0


def hard_texts(client: Client) -> list[str]:
    """Texts that were chosen to hurt: white space, CRLF, scripts, bytes, and special tokens in the middle."""
    tokenizer = client.oracle.model.tokenizer
    special = sorted(token for token in {tokenizer.bos_id, *tokenizer.eog_ids} if token is not None)
    spelled = [tokenizer.piece(token).decode() or "<s>" for token in special]
    around = [form.replace("{}", text) for text in spelled for form in AROUND]
    texts = [*WORDY, *RARE, *NO_SPECIAL, "\r\n", " ", "a\r\n b", *around]
    return [*texts, *(prompt.text for prompt in client.golden.prompts)]


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
    own, count = client.oracle, 0
    more = (*RARE, *NO_SPECIAL, "".join(RARE))  # some of which are special tokens of some models
    texts = (*WORDY, *(text for text in more if own.detokenize(own.tokenize(text, False)).decode() == text))
    for text in texts:
        whole = text.encode()
        got = client.engine.detokenize(client.engine.tokenize(text, False))
        count += len(whole)
        wrong = f"{text[:40]!r} comes back as another text: {parting(whole, got)}"
        client.observe.expect(got in (whole, b" " + whole), wrong)
    client.observe.saw(count, oracle="the text itself")
    client.observe.say(f"{len(texts)} texts of {count} bytes come back whole")


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
    """Logprobs of texts drawn at a temperature are those of the raw logits."""
    ids, count = client.prompt(1), 0
    for made in _with_logprobs(client, ids):
        rows = oracle_logits(client.oracle, [*ids, *made.ids[:-1]])[len(ids) - 1 :]
        bound = client.logprob_bound([*ids, *made.ids[:-1]])
        for at, (token, own) in enumerate(zip(made.ids, made.logprobs, strict=True)):
            expected, behind = (float(compare.log_softmax(row)[token]) for row in (rows[at], rows[at] / HOT))
            where = f"token {at} at temperature {HOT:g}"
            wrong = f"{where}: logprob {own:.4g}, the raw logits' is {expected:.4g} (± {bound:.2g})"
            wrong += "; it is the one behind the temperature" if abs(own - behind) <= bound else ""
            client.observe.expect(abs(own - expected) <= bound, wrong)
        count += len(made.ids)
    client.observe.saw(count, oracle=ORACLE)
    client.observe.say(f"{count} logprobs at temperature {HOT:g} are those before it, of the raw logits")


def _with_logprobs(client: Client, ids: Sequence[int]) -> list[Generation]:
    """Texts that are drawn, each with the logprob of every token; servers leave some out."""
    found: list[Generation] = []
    for seed in DRAWN:
        made = client.write(ids, FEW, temperature=HOT, seed=seed)
        with suppress(MissingCapability):
            found += [made] if len(made.logprobs) else []
        if sum(len(made.ids) for made in found) >= 2 * FEW:
            break
    if not found:
        raise MissingCapability(f"{client.name} does not tell the logprobs of what it draws")
    return found


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
    moved = _followed(client, reported)
    more = f"; on a changed file it reports another {' and '.join(moved)}" if moved else ""
    client.observe.say(f"{len(seen)} of {len(expected)} values are reported, and are the file's{more}")


def _followed(client: Client, reported: Mapping[str, Any]) -> list[str]:
    """The values that the engine reports otherwise, as it should, on a file that has them otherwise."""
    moved = []
    for key, name in FOLLOWED:
        change = BLACKBOX[name]
        if key not in reported or client.reopen is None or not isinstance(change, changed.Change):
            continue
        if (copy := changed.planted(change, client.model, client.folder)) is None:
            continue
        with client.reopen(copy) as other:
            got = other.info.config.get(key)
        wrong = f"configuration: {key}: {reported[key]} on the file, and still {got} on one with another"
        client.observe.expect(not alike(reported[key], got), wrong)
        client.observe.saw(1, oracle="the file's metadata")
        moved.append(key)
    return moved


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
