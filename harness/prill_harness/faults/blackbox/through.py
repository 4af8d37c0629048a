"""An engine whose answers are spoiled, or that has another file than it is believed to have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from prill_harness.engines.base import Engine, EngineInfo, Generation
from prill_runtime.errors import MissingCapability

Spoiling = Callable[["Through", Callable[..., Generation], dict[str, Any]], Generation]


@dataclass
class Through(Engine):
    """An engine, asked through this one, which spoils its answers in one way.

    Attributes:
        generation, ids, text: what becomes of a request to write, of a text's ids, of ids' text.
        batch: what becomes of the texts of requests at one time.
        told: what the engine says of itself, changed; a function makes it of what it says.
        vocabulary, context: the model's, where the spoiling needs them.
        ends: called when the engine is closed.
        requests: how many texts were asked for.
    """

    inner: Engine
    generation: Spoiling | None = None
    ids: Callable[[list[int]], list[int]] = list
    text: Callable[[bytes], bytes] = bytes
    batch: Callable[[list[Generation]], list[Generation]] = list
    told: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: int = 0
    context: int = 0
    ends: Callable[[], None] = lambda: None
    requests: int = 0

    @property
    def info(self) -> EngineInfo:
        said = self.inner.info
        told = {name: value(said) if callable(value) else value for name, value in self.told.items()}
        return replace(said, **told)

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        return self.ids(self.inner.tokenize(text, add_special))

    def detokenize(self, ids: Sequence[int]) -> bytes:
        return self.text(self.inner.detokenize(ids))

    def generate(self, ids: Sequence[int], **asked: Any) -> Generation:
        self.requests += 1
        if self.generation is None:
            return self.inner.generate(ids, **asked)
        return self.generation(self, self.inner.generate, {"ids": list(ids), **asked})

    def generate_batch(self, prompts: Sequence[Sequence[int]], **asked: Any) -> list[Generation]:
        if self.generation is None:
            return self.batch(self.inner.generate_batch(prompts, **asked))
        return super().generate_batch(prompts, **asked)

    def close(self) -> None:
        self.inner.close()
        self.ends()


def _passed_on(name: str) -> Callable[..., Any]:
    def call(self: Through, *arguments: Any, **named: Any) -> Any:
        return getattr(self.inner, name)(*arguments, **named)

    return call


for _name in ("logits", "logits_batch", "trace", "memory", "session", "ops", "phases", "copy_bandwidth"):
    setattr(Through, _name, _passed_on(_name))


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
