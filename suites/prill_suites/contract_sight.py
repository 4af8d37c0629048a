"""Whether the judges of the contract see, through this very connector: each is shown a known fault."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from prill_harness.engines.base import Engine, EngineInfo, Generation
from prill_harness.engines.embedded import Embedded
from prill_harness.faults.opening import open_engine
from prill_harness.faults.trial import changed
from prill_harness.faults.trial.changes import CHANGES
from prill_harness.run.checks import CheckFailed, Observer
from prill_runtime.errors import EngineError, Inconclusive, InvalidParameter, MissingCapability
from prill_suites import contract_judges as judges
from prill_suites import contract_requests as requests
from prill_suites.contract_judges import Client, Judge

Spoiling = Callable[["Through", Callable[..., Generation], dict[str, Any]], Generation]


@dataclass
class Through(Engine):
    """An engine behind something that spoils its answers in one way.

    Attributes:
        generation, ids, text: what becomes of a request to write, of a text's ids, of ids' text.
        told: what the engine says of itself, changed.
        vocabulary, context: the model's, where the spoiling needs them.
    """

    inner: Engine
    generation: Spoiling | None = None
    ids: Callable[[list[int]], list[int]] = list
    text: Callable[[bytes], bytes] = bytes
    told: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: int = 0
    context: int = 0
    requests: int = 0

    @property
    def info(self) -> EngineInfo:
        return replace(self.inner.info, **self.told)

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        return self.ids(self.inner.tokenize(text, add_special))

    def detokenize(self, ids: Sequence[int]) -> bytes:
        return self.text(self.inner.detokenize(ids))

    def generate(self, ids: Sequence[int], **asked: Any) -> Generation:
        self.requests += 1
        if self.generation is None:
            return self.inner.generate(ids, **asked)
        return self.generation(self, self.inner.generate, {"ids": list(ids), **asked})


def asked(**other: Any) -> Spoiling:
    """Some arguments of a request replaced, where they are given; a function makes new values of old ones."""

    def answer(_: Through, generate: Callable[..., Generation], given: dict[str, Any]) -> Generation:
        for name, value in other.items():
            if name in given:
                given[name] = value(given[name]) if callable(value) else value
        return generate(**given)

    return answer


def written(**other: Callable[[Any], Any]) -> Spoiling:
    """Some fields of a text replaced, where the engine tells them."""

    def answer(_: Through, generate: Callable[..., Generation], given: dict[str, Any]) -> Generation:
        made = generate(**given)
        there: dict[str, Any] = {}
        for name, change in other.items():
            with suppress(MissingCapability, AttributeError):
                there[name] = change(getattr(made, name))
        return with_fields(made, **there)

    return answer


def with_fields(made: Generation, **fields: Any) -> Generation:
    """A copy with some fields replaced; what is not told stays so."""
    copy = object.__new__(type(made))
    copy.__dict__.update(made.__dict__ | fields)
    return copy


def _in_turn(through: Through, generate: Callable[..., Generation], given: dict[str, Any]) -> Generation:
    """Every second text without its last token."""
    made = generate(**given)
    if through.requests % 2:
        return made
    cut = {
        name: value[:-1] for name in ("ids", "logprobs", "text", "top") if (value := made.__dict__.get(name))
    }
    return with_fields(made, **cut)


def _deaf(_: Through, generate: Callable[..., Generation], given: dict[str, Any]) -> Generation:
    """A callback's refusal is not heard."""
    if (on_token := given.get("on_token")) is not None:
        given["on_token"] = lambda token, logprob: on_token(token, logprob) or True
    return generate(**given)


def _token_untold(_: Through, generate: Callable[..., Generation], given: dict[str, Any]) -> Generation:
    """The second token of a text is not told while it is written."""
    if (on_token := given.get("on_token")) is not None:
        heard: list[int] = []

        def hear(token: int, logprob: float) -> Any:
            heard.append(token)
            return True if len(heard) == 2 else on_token(token, logprob)

        given["on_token"] = hear
    return generate(**given)


def _cut_off(through: Through, generate: Callable[..., Generation], given: dict[str, Any]) -> Generation:
    """What does not fit into the context is cut off."""
    given["ids"] = given["ids"][-(through.context - 8) :]
    return generate(**given)


def _any_id(through: Through, generate: Callable[..., Generation], given: dict[str, Any]) -> Generation:
    """Ids outside the vocabulary wrap around."""
    given["ids"] = [token % through.vocabulary for token in given["ids"]]
    return generate(**given)


def other_token(ids: tuple[int, ...]) -> tuple[int, ...]:
    return (*ids[:3], ids[3] ^ 1, *ids[4:]) if len(ids) > 3 else ids


def _tempered(through: Through, generate: Callable[..., Generation], given: dict[str, Any]) -> Generation:
    """Logprobs at a temperature are flatter than those of the raw logits."""
    made = generate(**given)
    flat = given.get("temperature", 0.0) > 0
    return with_fields(made, logprobs=tuple(value / 2 for value in made.logprobs)) if flat else made


def less(value: float) -> float:
    return value * 1.1 - 0.05


SPOILED: Mapping[str, tuple[Judge, Mapping[str, Any]]] = {
    "a token exchanged": (judges.choices, {"generation": written(ids=other_token)}),
    "logprobs a tenth too small": (judges.numbers, {"generation": written(
        logprobs=lambda row: tuple(map(less, row)),
        top=lambda rows: tuple({token: less(value) for token, value in row.items()} for row in rows))}),
    "logprobs behind the temperature": (judges.before_temperature, {"generation": _tempered}),
    "every second text shorter": (requests.repeatable, {"generation": _in_turn}),
    "seed left out": (requests.seeds, {"generation": asked(seed=5)}),
    "one token more": (requests.lengths, {"generation": asked(max_tokens=lambda count: count + 1)}),
    "stop strings left out": (requests.stops, {"generation": asked(stop=())}),
    "long prompts cut off": (requests.context, {"generation": _cut_off}),
    "ids that wrap around": (requests.vocabulary, {"generation": _any_id}),
    "a token not told": (requests.streaming, {"generation": _token_untold}),
    "a callback not heard": (requests.cancelled, {"generation": _deaf}),
    "the first id lost": (judges.tokenization, {"ids": lambda ids: ids[1:]}),
    "bytes beyond ASCII replaced": (judges.round_trip, {
        "text": lambda text: text.decode("ascii", "replace").encode()}),
}  # fmt: skip
"""What is done to every answer, and the judge that must not let it pass."""


def judged(judge: Judge, client: Client, engine: Engine, oracle: Embedded | None = None) -> str:
    """The sentence by which a judge finds an engine wrong; empty if it finds nothing.

    Raises:
        Inconclusive: the engine lacks what the judge asks for.
    """
    there = Client(Observer(), engine, client.golden, oracle or client.oracle)
    try:
        judge(there)
    except (CheckFailed, EngineError, InvalidParameter) as error:
        return str(error)
    return ""


def answers(client: Client) -> tuple[dict[str, str], list[str]]:
    """What each judge says of the engine behind its fault; and the faults about which nothing can be said.

    Raises:
        CheckFailed: a judge lets its fault pass.
    """
    seen: dict[str, str] = {}
    lacking: list[str] = []
    size = client.oracle.model.vocab_size
    for name, (judge, spoiled) in SPOILED.items():
        try:
            sentence = judged(
                judge, client, Through(client.engine, vocabulary=size, context=client.context, **spoiled)
            )
        except Inconclusive:
            lacking.append(name)
            continue
        if not sentence:
            raise CheckFailed(f"{name}: {judge.__name__} lets it pass through this connector")
        seen[name] = sentence
    return seen, lacking


PARTS: Mapping[str, Sequence[Judge]] = {
    changed.TOKENIZER: (judges.tokenization,),
    changed.NUMBERS: (judges.choices, judges.numbers),
}
PROMPTS = 2  # of the golden, for each changed file


def files(
    client: Client, spec: str, model: Path, folder: Path, one_model: bool
) -> tuple[dict[str, str], list[str]]:
    """What is said of the engine on each changed file; and the changes that drown in its lane's noise.

    Args:
        one_model: the engine has its model already, so its judge is given the changed file.

    Raises:
        CheckFailed: a change passes, or is blamed on another part.
    """
    few = msgspec.structs.replace(client.golden, prompts=client.golden.prompts[:PROMPTS])
    seen: dict[str, str] = {}
    drowned: list[str] = []
    if (sound := _blamed(Client(client.observe, client.engine, few, client.oracle)))[0]:
        raise Inconclusive(f"the engine is wrong on the file as it is, so no change of it shows: {sound[1]}")
    for change, copy in changed.applicable(CHANGES, model, folder):
        with open_engine("numpy64", copy) as right:
            assert isinstance(right, Embedded)
            if one_model:
                part, sentence = _blamed(Client(client.observe, client.engine, few, right))
            else:
                with open_engine(spec, copy) as engine:
                    part, sentence = _blamed(Client(client.observe, engine, few, client.oracle))
            if not part:
                as_exact = Through(right, told={"arithmetic": client.engine.info.arithmetic})
                part, sentence = _blamed(Client(client.observe, as_exact, few, client.oracle))
                if part:
                    raise CheckFailed(
                        f"{change.name}: not seen through this connector ({change.summary.lower()})"
                    )
                drowned.append(change.name)
                continue
        if part != change.blames:
            raise CheckFailed(
                f"{change.name} is blamed on the {part}, it breaks the {change.blames}: {sentence}"
            )
        seen[change.name] = sentence
    return seen, drowned


def _blamed(client: Client) -> tuple[str, str]:
    """The first part that is found wrong, and why; empty if none is."""
    for part, of in PARTS.items():
        for judge in of:
            with suppress(Inconclusive):
                if sentence := judged(judge, client, client.engine):
                    return part, sentence
    return "", ""
