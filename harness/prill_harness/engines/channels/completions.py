"""Ask a server for completions: what all dialects share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from prill_harness.engines.channels.link import Link
from prill_harness.engines.remote import Channel, Hello, OnToken, Target
from prill_runtime.errors import EngineError, InvalidParameter, MissingCapability
from prill_runtime.sampling.sampler import SamplingParams
from prill_runtime.tokenizer.base import Tokenizer

TOLD = 20  # best ids whose logprobs are asked for at each position
UNDERFLOWN = -1e30  # a logprob below it stands for a probability that became 0


class Entry(NamedTuple):
    """One token and its logprobs, as a server tells them."""

    id: int
    logprob: float
    top: Mapping[int, float]


@dataclass
class Said:
    """What one message adds to a text.

    Attributes:
        ids: None if the message does not tell them.
        entries: those of some of the ids, in their order.
        reason: why the text ended; None while it goes on.
        total: how many ids the server counts in the whole text.
    """

    text: str
    ids: list[int] | None
    entries: list[Entry] = field(default_factory=list)
    reason: str | None = None
    total: int | None = None


def matched(ids: Sequence[int], entries: Sequence[Entry]) -> list[Entry | None]:
    """The entry of each id, by the id: None where there is none, or where it may be one of several ids'.

    A server leaves out the entries of some tokens, so the n-th entry is not the n-th id's. Entries are
    assigned as early and as late as their order allows, and count where both agree.
    """

    def assigned(ids: Sequence[int], entries: Sequence[Entry]) -> list[int]:
        places, at = [], 0
        for entry in entries:
            while at < len(ids) and ids[at] != entry.id:
                at += 1
            places.append(at)
            at += 1
        return places

    early = assigned(ids, entries)
    late = [len(ids) - 1 - at for at in reversed(assigned([*reversed(ids)], [*reversed(entries)]))]
    found: list[Entry | None] = [None] * len(ids)
    for entry, first, last in zip(entries, early, late, strict=True):
        if first >= len(ids):
            raise ValueError(f"logprobs of id {entry.id}, which is not among the ids at its place")
        if first == last:
            found[first] = entry
    return found


class Dialect(ABC, Channel):
    """A server that speaks one of the dialects, with one model loaded."""

    def __init__(self, link: Link, target: Target, tokenizer: Tokenizer, pid: int | None) -> None:
        self._link, self._tokenizer = link, tokenizer
        self._model, self._pid = target.declared.get("model"), pid
        self._context = {"served_context": int(ctx)} if (ctx := target.declared.get("ctx")) else {}
        self._hello = self._greet()

    @property
    def hello(self) -> Hello:
        return self._hello

    def call(self, name: str, arguments: Mapping[str, Any], on_token: OnToken | None = None) -> Any:
        if name == "generate":
            return self._generate(on_token, **arguments)
        return self._tokenize(**arguments) if name == "tokenize" else self._detokenize(**arguments)

    def close(self) -> None:
        self._link.close()

    @abstractmethod
    def _greet(self) -> Hello:
        """Ask what the server is and can."""

    @abstractmethod
    def _tokenize(self, text: str, add_special: bool) -> Any: ...

    @abstractmethod
    def _detokenize(self, ids: Sequence[int]) -> Any: ...

    @abstractmethod
    def _asked(
        self, ids: Sequence[int], count: int, stop: Sequence[str], ignore_eos: bool, params: SamplingParams
    ) -> tuple[str, dict[str, Any]]:
        """Path and body of a request. Raises MissingCapability for what the server cannot be asked."""

    @abstractmethod
    def _read(self, message: Any, count: int, stop: Sequence[str]) -> Said:
        """What a message says of a text of at most `count` ids."""

    def _generate(
        self,
        on_token: OnToken | None,
        ids: Sequence[int],
        max_tokens: int,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> dict[str, Any]:
        written, params = Growing(self._tokenizer.eog_ids, ignore_eos), SamplingParams(**sampling)
        while True:
            count = max_tokens - len(written.ids)
            path, body = self._asked([*ids, *written.ids], count, stop, ignore_eos, params)
            with closing(self._messages(path, body, on_token is not None)) as messages:
                reason, begun = None, len(written.ids)
                for message in messages:
                    try:
                        said = self._read(message, count, stop)
                        fresh = written.add(said)
                    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                        raise self._odd(path, f"{type(error).__name__}: {error}", message) from None
                    reason = said.reason or reason
                    written.spelled &= said.total in (None, len(written.ids) - begun)
                    if on_token is not None and not self._told(fresh, on_token, written):
                        return written.answer("cancelled")
            if reason is None:
                raise self._odd(path, "an answer that ends before the text does", message)
            if not (ignore_eos and reason == "eos" and written.at_end):
                return written.answer(reason)
            if len(written.ids) >= max_tokens:
                return written.answer("length")

    def _told(self, fresh: Sequence[tuple[int, float]], on_token: OnToken, written: Growing) -> bool:
        """Tell what has come; whether to go on."""
        if not written.spelled:
            raise MissingCapability(f"{self._link.name} does not tell the id of every token as it is written")
        told = [on_token(token, logprob) for token, logprob in fresh if not written.ends(token)]
        return False not in told

    def _messages(self, path: str, body: dict[str, Any], stream: bool) -> Generator[Any, None, None]:
        if stream:
            yield from self._link.events(path, {**body, "stream": True})
        else:
            yield self._link.ask(path, body)

    def _listed(self) -> list[Mapping[str, Any]]:
        """The models that the server lists; none if it has no list."""
        try:
            return list(self._link.ask("/v1/models")["data"])
        except (MissingCapability, InvalidParameter):
            return []

    def _calls(self) -> frozenset[str]:
        """The calls that the server answers, by asking."""
        calls = {"generate"}
        with suppress(MissingCapability, InvalidParameter):
            ids = self._tokenize("The", True)
            calls |= {"tokenize"}
            self._detokenize(ids)
            calls |= {"detokenize"}
        return frozenset(calls)

    def _field(self, path: str, body: Mapping[str, Any], *names: str) -> Any:
        """The first of these fields that the answer has."""
        answer = self._link.ask(path, body)
        found = [answer[name] for name in names if isinstance(answer, Mapping) and name in answer]
        if not found:
            raise self._odd(path, f"no {names[0]}", answer)
        return found[0]

    def _odd(self, path: str, what: str, got: object) -> EngineError:
        where = f"{self._link.name}{path}"
        return EngineError(
            "an answer of the wrong form", where=where, expected="as the API documents it",
            got=self._link.hidden(f"{what} in {got!r:.120}"),
        )  # fmt: skip


class Growing:
    """A text as it arrives: ids, each with its entry.

    Attributes:
        spelled: whether the server told every id.
    """

    def __init__(self, ends: frozenset[int], ignore_eos: bool) -> None:
        self._ends = frozenset() if ignore_eos else ends
        self._all_ends = ends
        self.ids: list[int] = []
        self.spelled = True
        self._entries: list[Entry | None] = []
        self._text = ""

    def ends(self, token: int) -> bool:
        """Whether an id ends the text, and is no part of it."""
        return token in self._ends

    @property
    def at_end(self) -> bool:
        """Whether the last id is one that ends texts."""
        return bool(self.ids) and self.ids[-1] in self._all_ends

    def add(self, said: Said) -> list[tuple[int, float]]:
        """Take a message; what it adds, as (id, logprob)."""
        self._text += said.text
        ids = said.ids or []
        self.spelled &= said.ids is not None or not said.text
        entries = matched(ids, said.entries)
        self.ids += ids
        self._entries += entries
        values = [float("nan") if entry is None else entry.logprob for entry in entries]
        return list(zip(ids, values, strict=True))

    def answer(self, reason: str) -> dict[str, Any]:
        """What `generate` returns: without what the server did not tell."""
        made: dict[str, Any] = {"finish_reason": reason, "text": self._text}
        if not self.spelled:
            return made
        if reason == "eos" and self.ids and self.ends(self.ids[-1]):
            made["end_id"] = self.ids.pop()
            self._entries.pop()
        told = [entry for entry in self._entries if entry is not None]
        if len(told) == len(self.ids):
            made["logprobs"] = [entry.logprob for entry in told]
        top = [{} if entry is None else entry.top for entry in self._entries]
        return {**made, "ids": self.ids, "top": top}


def entry_of(token: int, logprob: Any, top: Iterator[tuple[int, Any]]) -> Entry:
    told = {each: float(value) for each, value in top if value is not None}
    return Entry(token, float(logprob), {each: value for each, value in told.items() if value > UNDERFLOWN})


def by_id(listed: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """Entries of llama.cpp's form, whose tokens have an `id`."""
    return [
        entry_of(
            int(each["id"]), each["logprob"], ((int(t["id"]), t["logprob"]) for t in each["top_logprobs"])
        )
        for each in listed
    ]
