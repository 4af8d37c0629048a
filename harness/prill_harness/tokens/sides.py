"""Whether a golden, its model's file and today's oracle can be believed, and if not, which is wrong and why.

An engine is judged by a golden and by the oracle, and either may be wrong itself. This is settled before
anything is said of the engine: neither a golden of another file nor an oracle that contradicts itself can
judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.embedded import Embedded
from prill_harness.engines.models import fixture_name, resolve_model
from prill_harness.numbers import compare
from prill_harness.numbers.compare import REORDERED_ERROR
from prill_harness.tokens.golden import Golden, GoldenPrompt, file_type, versions
from prill_runtime.errors import EngineError, Inconclusive, UsageError
from prill_runtime.gguf.file import open_gguf

Rows = NDArray[np.floating]
_asked: WeakKeyDictionary[Embedded, tuple[list[int], Rows]] = WeakKeyDictionary()
STORED_ROUNDING = 2.0**-23  # float32 logprobs keep half a unit in the last place


@dataclass(frozen=True)
class Doubt:
    """Which of golden, file and oracle cannot be believed, and the sentence that says why."""

    side: Literal["golden", "file", "oracle"]
    sentence: str


@dataclass(frozen=True)
class Gap:
    """A logprob in the golden that today's oracle does not reproduce, after `at` tokens of a prompt."""

    prompt: int
    at: int
    token: int
    stored: float
    today: float

    @property
    def size(self) -> float:
        return abs(self.today - self.stored)

    @property
    def place(self) -> str:
        return f"in the logprob of token {self.token} at prompt {self.prompt}, token {self.at}"


def allowed(stored: Rows | float) -> Rows | float:
    """How far a stored logprob may be from the value it was rounded from."""
    return np.abs(stored) * STORED_ROUNDING + REORDERED_ERROR


def of_another_file(golden: Golden, oracle: Embedded) -> Doubt | None:
    """A doubt if the golden was recorded from another file than the oracle has open: another model, or an
    earlier state of this one."""
    mark, found = golden.fingerprint, oracle.info
    if mark.model_sha256 == found.model_sha256:
        return None
    with open_gguf(path := resolve_model(found.model)) as file:
        kind = file_type(file)
    named = fixture_name(found.model)
    name, tokenizer = named[0] if named else path.stem, oracle.model.tokenizer.digest
    own = (name, kind, tokenizer, found.config["architecture"])
    if own != (golden.name, golden.type, mark.tokenizer_digest, golden.config.get("architecture")):
        return Doubt(
            "golden",
            "the golden belongs to another model: it was recorded from "
            f"{_described(golden.name, golden.type, mark.model_sha256, mark.tokenizer_digest)}; "
            f"this is {_described(name, kind, found.model_sha256, tokenizer)}",
        )
    changed = [key for key, value in found.config.items() if golden.config.get(key) != value]
    what = (
        f"in {', '.join(changed)}"
        if changed
        else "in its tensors: its tokenizer and configuration are the same"
    )
    return Doubt(
        "file",
        f"the file has changed since the golden was recorded, {what}; {name} had sha256 "
        f"{mark.model_sha256[:12]}…, and has {found.model_sha256[:12]}… now: no engine is judged by that",
    )


def refuse_another(golden: Golden, oracle: Embedded, where: str) -> None:
    """Refuse a golden that the user gave if it is of another model than the oracle has open.

    Raises:
        UsageError: names both, with type, digest and tokenizer.
    """
    doubt = of_another_file(golden, oracle)
    if doubt is not None and doubt.side == "golden":
        raise UsageError(doubt.sentence, where=where, hint="`prill golden record` records this model's own")


def _described(name: str, kind: str, sha256: str, tokenizer: str) -> str:
    return f"{name} {kind} (sha256 {sha256[:12]}…, tokenizer {tokenizer[:12]}…)"


def check_stale(golden: Golden, oracle: Embedded, prompts: int | None = None) -> Doubt | None:
    """None if both the golden and today's oracle can be believed, else which cannot.

    Args:
        prompts: how many of the golden's to check; None: all.
    """
    doubt = of_another_file(golden, oracle)
    if doubt is not None:
        return doubt
    for number, prompt in enumerate(golden.prompts[:prompts]):
        if not prompt.unspelled and oracle.tokenize(prompt.text) != prompt.ids:
            sentence = f"the golden is stale: today's tokenizer gives other ids for prompt {number}"
            return Doubt("golden", sentence + since(golden))
        gap = gap_at(number, prompt, oracle_logits(oracle, prompt.sequence))
        if gap is not None:
            return explained(gap, golden, oracle)
    return None


def oracle_logits(oracle: Embedded, ids: Sequence[int], *, again: bool = False) -> Rows:
    """The oracle's logits (len(ids), vocab): those of the call before, where that asked for the same ids and
    nobody wants them `again`.

    Raises:
        Inconclusive: it fails, which says nothing about the engine.
    """
    known = _asked.get(oracle)
    if known is not None and known[0] == list(ids) and not again:
        return known[1]
    try:
        _asked[oracle] = list(ids), (rows := oracle.logits(ids))
        return rows
    except EngineError as error:
        raise Inconclusive(
            f"today's oracle itself stops on this file, so no engine can be judged on it: {error}"
        ) from error


def gap_at(number: int, prompt: GoldenPrompt, logits: Rows) -> Gap | None:
    """The first stored logprob of a prompt that the oracle's logits of its sequence (position, vocab) do not
    reproduce; None if they reproduce all."""
    ids, stored = prompt.top_ids.array, prompt.top_logprobs.array.astype(np.float64)
    today = np.take_along_axis(compare.log_softmax(logits[len(prompt.ids) - 1 :]), ids, axis=-1)
    wrong = ~(np.abs(today - stored) <= allowed(stored))
    if not wrong.any():
        return None
    at, place = (int(i) for i in np.argwhere(wrong)[0])
    return Gap(number, at, int(ids[at, place]), float(stored[at, place]), float(today[at, place]))


def explained(gap: Gap, golden: Golden, oracle: Embedded) -> Doubt:
    """Who is to blame for a gap: the golden, unless today's oracle gives two answers to one question.

    The oracle is asked once more in the same way, and in the way the golden was recorded: all prompts
    together, token by token.
    """
    prompt = golden.prompts[gap.prompt]
    again = oracle_logits(oracle, prompt.sequence, again=True)[len(prompt.ids) - 1 + gap.at]
    apart = abs(float(compare.log_softmax(again)[gap.token]) - gap.today)
    neither = "; neither the golden nor the engine can be judged by it"
    if not apart <= allowed(gap.today):
        sentence = f"today's oracle does not reproduce itself: two runs differ by {apart:.2g} {gap.place}"
        return Doubt("oracle", sentence + neither)
    rows = oracle.decoded_logits(
        [each.ids for each in golden.prompts], [each.tokens[: gap.at] for each in golden.prompts]
    )
    # One may be close by chance; an oracle that recorded the golden reproduces the whole row.
    stored = prompt.top_logprobs.array[gap.at].astype(np.float64)
    decoded = compare.log_softmax(rows[gap.prompt])[prompt.top_ids.array[gap.at]]
    if bool((np.abs(decoded - stored) <= allowed(stored)).all()):
        sentence = (
            "today's oracle contradicts itself: token by token it gives the golden's numbers, in one pass "
            f"others, {gap.size:.2g} off {gap.place}: rounding decides what this file gives, or the oracle's "
            "own code is wrong"
        )
        return Doubt("oracle", sentence + neither)
    sentence = f"the golden is stale: today's oracle differs from it by {gap.size:.2g} {gap.place}"
    return Doubt("golden", sentence + since(golden))


def since(golden: Golden) -> str:
    """The versions that have changed since the golden was recorded, as a clause; empty if none has."""
    then, now = golden.fingerprint.versions, versions()
    moved = [
        f"{name} {then[name]}, now {now[name]}"
        for name in sorted(then.keys() & now)
        if then[name] != now[name]
    ]
    return f" (recorded with {'; '.join(moved)})" if moved else ""
