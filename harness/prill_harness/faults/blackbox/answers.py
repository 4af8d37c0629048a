"""The table of faults by spoiled answers: what becomes of them between an engine and its judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from prill_harness.engines.base import EngineInfo, Generation
from prill_harness.faults.blackbox.through import Through, asked, with_fields, written
from prill_runtime.errors import MissingCapability

Write = Callable[..., Generation]
Given = dict[str, Any]
RISES = ("rope_base", "context_length", "vocab_size")  # some of which any engine reports


@dataclass(frozen=True)
class Answer:
    """One fault.

    Attributes:
        kills: the check that has to find it.
        spoils: the arguments of `Through` that make it.
    """

    name: str
    summary: str
    kills: str
    spoils: Mapping[str, Any]


def _in_turn(through: Through, generate: Write, given: Given) -> Generation:
    made = generate(**given)
    if through.requests % 2:
        return made
    lists = ("ids", "logprobs", "text", "top")
    return with_fields(made, **{name: value[:-1] for name in lists if (value := made.__dict__.get(name))})


def _deaf(_: Through, generate: Write, given: Given) -> Generation:
    if (on_token := given.get("on_token")) is not None:
        given["on_token"] = lambda token, logprob: on_token(token, logprob) or True
    return generate(**given)


def _token_untold(_: Through, generate: Write, given: Given) -> Generation:
    if (on_token := given.get("on_token")) is not None:
        heard: list[int] = []

        def hear(token: int, logprob: float) -> Any:
            heard.append(token)
            return True if len(heard) == 2 else on_token(token, logprob)

        given["on_token"] = hear
    return generate(**given)


def _split(_: Through, generate: Write, given: Given) -> Generation:
    made = generate(**given)
    if given.get("on_token") is None:
        return made
    if (text := getattr(made, "text", None)) is None:
        raise MissingCapability("the engine tells no text beside its ids")
    return with_fields(made, text="".join(c if c.isascii() else "\ufffd" * len(c.encode()) for c in text))


def _cut_off(through: Through, generate: Write, given: Given) -> Generation:
    given["ids"] = given["ids"][-(through.context - 8) :]
    return generate(**given)


def _any_id(through: Through, generate: Write, given: Given) -> Generation:
    given["ids"] = [token % through.vocabulary for token in given["ids"]]
    return generate(**given)


def _last_lost(_: Through, generate: Write, given: Given) -> Generation:
    given["ids"] = given["ids"][:-1] or given["ids"]
    return generate(**given)


def _endless(_: Through, generate: Write, given: Given) -> Generation:
    return generate(**(given | {"ignore_eos": True}))


def _tempered(_: Through, generate: Write, given: Given) -> Generation:
    made = generate(**given)
    if given.get("temperature", 0.0) > 0:
        with suppress(MissingCapability):
            return with_fields(made, logprobs=tuple(value / 2 for value in made.logprobs))
    return made


def _other_token(ids: tuple[int, ...]) -> tuple[int, ...]:
    return (*ids[:3], ids[3] ^ 1, *ids[4:]) if len(ids) > 3 else ids


def _less(value: float) -> float:
    return value * 1.1 - 0.05


def _other_config(info: EngineInfo) -> Mapping[str, Any]:
    return {**info.config, **{name: info.config[name] + 1 for name in RISES if name in info.config}}  # type: ignore[operator]


ANSWERS: tuple[Answer, ...] = (
    Answer("answer_token", "The fourth token of every text is another",
           "contract.tokens", {"generation": written(ids=_other_token)}),
    Answer("answer_logprobs", "Logprobs are a tenth too small",
           "contract.logprobs", {"generation": written(
               logprobs=lambda row: tuple(map(_less, row)),
               top=lambda rows: tuple({t: _less(value) for t, value in row.items()} for row in rows))}),
    Answer("answer_tempered", "Logprobs of a text that is drawn are those behind the temperature",
           "contract.raw_logprobs", {"generation": _tempered}),
    Answer("answer_in_turn", "Every second text is a token shorter",
           "contract.repeatable", {"generation": _in_turn}),
    Answer("answer_exchanged", "Two texts of requests at one time have each other's place",
           "contract.beside", {"batch": lambda made: [*made[1::-1], *made[2:]]}),
    Answer("answer_last_lost", "The last id of a prompt is lost",
           "contract.continued", {"generation": _last_lost}),
    Answer("answer_seed", "The seed is left out",
           "contract.seeds", {"generation": asked(seed=5)}),
    Answer("answer_longer", "Every text is a token longer",
           "contract.lengths", {"generation": asked(max_tokens=lambda count: count + 1)}),
    Answer("answer_endless", "The end of a text goes unheeded",
           "contract.end", {"generation": _endless}),
    Answer("answer_stops", "Stop strings are left out",
           "contract.stops", {"generation": asked(stop=())}),
    Answer("answer_cut_off", "What does not fit into the context is cut off",
           "contract.context", {"generation": _cut_off}),
    Answer("answer_any_id", "Ids outside the vocabulary wrap around",
           "contract.vocabulary", {"generation": _any_id}),
    Answer("answer_untold", "The second token of a text is not told while it is written",
           "contract.streaming", {"generation": _token_untold}),
    Answer("answer_split", "A stream breaks characters into their bytes",
           "contract.streaming", {"generation": _split}),
    Answer("answer_deaf", "A callback's refusal is not heard",
           "contract.cancel", {"generation": _deaf}),
    Answer("answer_first_id", "The first id of every text is lost",
           "contract.tokenization", {"ids": lambda ids: ids[1:]}),
    Answer("answer_ascii", "Bytes beyond ASCII are replaced",
           "contract.round_trip", {"text": lambda text: text.decode("ascii", "replace").encode()}),
    Answer("answer_config", "A value of the configuration is reported one too large",
           "contract.configuration", {"told": {"config": _other_config}}),
)  # fmt: skip
