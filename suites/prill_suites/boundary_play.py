"""Raw calls of a library, each with what it may answer; whatever else happens is a finding."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.channels.capi import CApi
from prill_harness.engines.embedded import Embedded
from prill_harness.engines.others.capi import build
from prill_harness.engines.others.capi.abi import FUNCTIONS
from prill_harness.engines.others.capi.played import Played, environment, played, told
from prill_harness.engines.spec import EngineSpec
from prill_harness.numbers.compare import nmse
from prill_harness.run.checks import CheckFailed, Observer
from prill_runtime.errors import MissingCapability
from prill_suites.common import SAME

HEADER = "what prill_engine.h promises of each call"
IDS = (1, 5, 9, 3)
UNKNOWN = "unsupported_type"
HANDLES = {"context": "c", "model": "m", "session": "s"}
MOST = 6  # processes that one list of calls may take: after a crash the rest is called in another one
LOADING = 600.0  # seconds for the first load
PATIENCE, SLOWER = 15.0, 20  # seconds for one call, or so many times as long as the sound calls took
Step = dict[str, Any]
Answers = Mapping[int, Mapping[str, Any]]


def ok(call: str, **given: Any) -> Step:
    """A call that has to succeed."""
    return {"call": call, **given, "expect": ["ok"]}


def refused(call: str, *kinds: str, **given: Any) -> Step:
    """A call that has to fail with one of these kinds; `invalid_parameter` when none is named."""
    return {"call": call, **given, "expect": list(kinds or ("invalid_parameter",))}


def by_handle() -> Iterator[tuple[str, str]]:
    """Each function that takes a handle first, and what kind it takes."""
    for name, arguments in FUNCTIONS.items():
        kind = next(iter(arguments))
        if kind in HANDLES:
            yield name, kind


def library_of(spec: str, engine: type) -> str:
    """The library under test: that of a `capi` engine; the example stands in for an engine of prill's own.

    Raises:
        MissingCapability: another engine, which is no library.
    """
    parsed = EngineSpec.parse(spec)
    if parsed.name == CApi.connector:
        return str(CApi.library(parsed.argument))
    if issubclass(engine, Embedded):
        return str(build.example())
    raise MissingCapability(f"engine {parsed.name} is no library", hint="judge a library with capi:PATH.so")


_untouched: dict[Any, tuple[Mapping[str, Any], NDArray[np.float32]]] = {}
"""Library, model and environment -> what sound calls gave."""


@dataclass
class CallBench:
    """Plays steps on a library with one model, and keeps what was found.

    Attributes:
        preload, files: what the processes are started with, for ledgers.
    """

    observe: Observer
    library: str
    model: Path
    preload: str = ""
    files: Sequence[int] = ()
    findings: list[dict[str, str]] = field(default_factory=list)
    info: Mapping[str, Any] = field(default_factory=dict)
    reference: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        key = self.library, str(self.model), tuple(sorted(environment().items()))
        if key not in _untouched:
            _untouched[key] = self._first()
        self.info, self.reference = _untouched[key]

    def _first(self) -> tuple[Mapping[str, Any], NDArray[np.float32]]:
        """What the library says of itself and of the model, and logits of IDS, from sound calls alone."""
        began = time.monotonic()
        asked = [*self.opened(), ok("context_device", context="$c"), ok("model_describe", model="$m")]
        self.info = {k: v for each in self._sound(asked).values() for k, v in each.items()}
        last = self._sound([*self.opened(), self.logits("$s")])[3]
        self.info = {**self.info, "patience": max(PATIENCE, SLOWER * (time.monotonic() - began) / 2)}
        return self.info, rows(last, self.vocab)

    def _sound(self, steps: Sequence[Step]) -> Answers:
        """The answers of calls that have to succeed before anything else can be asked.

        Raises:
            MissingCapability: the library says that it does not know what is in the model's file.
        """
        done = self._played(steps)
        wrong = [
            f"{each['code']}: {each.get('sentence')}"
            for each in done.answers.values()
            if each["code"] != "ok"
        ]
        if why := done.unusable or done.ended or next(iter(wrong), ""):
            if why.startswith(f"{UNKNOWN}: "):
                raise MissingCapability(f"the library does not know what is in this file: {why}")
            raise CheckFailed(f"sound calls do not work: {why}; again: {done.again}")
        return done.answers

    @property
    def vocab(self) -> int:
        return int(self.info["vocab_size"])

    @property
    def context(self) -> int:
        return int(self.info["context_length"])

    def opened(self, mark: str = "", positions: int = 64) -> list[Step]:
        """A context `$c`, a model `$m` and a session `$s`, with a mark behind their names."""
        return [
            ok("context_create", **{"as": f"c{mark}"}),
            self.load(f"c{mark}", f"m{mark}"),
            ok("session_create", model=f"$m{mark}", positions=positions, **{"as": f"s{mark}"}),
        ]

    def load(self, context: str, name: str) -> Step:
        return ok("model_load", context=f"${context}", path=str(self.model), **{"as": name})

    def logits(self, session: Any, ids: Sequence[int] = IDS, **other: Any) -> Step:
        """Logits of `ids`, with a buffer that fits."""
        return ok("session_logits", session=session, ids=list(ids), room=len(ids) * self.vocab, **other)

    def sound(self, call: str) -> Step:
        """Arguments with which a call would work, but for its handle."""
        ids = {"ids": list(IDS)}
        known: dict[str, Step] = {
            "model_load": {"path": str(self.model)}, "session_create": {"positions": 8},
            "session_logits": {**ids, "room": len(IDS) * self.vocab}, "session_next": ids,
        }  # fmt: skip
        return known.get(call, {})

    def play(self, steps: Sequence[Step], right: bool = True) -> Answers:
        """What the steps answered; findings are kept. A call that ends the process is left out of the next.

        Args:
            right: whether a model opened afterwards, in the same process, has to give the right logits.
        """
        right_ones = [*self.opened("_right"), self.logits("$s_right")] if right else []
        left = list(enumerate([*steps, *right_ones]))
        for _ in range(MOST):
            done = self._played([step for _, step in left])
            if not done.ended:
                break
            self._found(done.ended, done)
            number, step = left[done.at]
            if done.late or number >= len(steps) or (step.get("expect") == ["ok"] and "as" in step):
                break  # nothing that follows could work
            del left[done.at]
        if done.unusable:
            self._found(done.unusable, done)
        answers = {left[at][0]: answer for at, answer in done.answers.items()}
        for number, step in left:
            if number in answers:
                self._judge(step, answers[number], done)
        last = answers.get(len(steps) + 3, {})
        if right and last.get("code") == "ok":
            self.same("after these calls the same request", last, done.again)
        return {number: answer for number, answer in answers.items() if number < len(steps)}

    def printed(self, steps: Sequence[Step]) -> str:
        """What the library writes on the standard output while it makes these calls."""
        return self._played(steps).printed

    def same(self, what: str, answer: Mapping[str, Any], again: str = "") -> None:
        """Hold logits of IDS to those of an untouched library."""
        if "out" not in answer:
            return
        got = rows(answer, self.vocab)
        self.observe.saw(got.size, oracle=HEADER)
        bound = SAME.get(str(self.info.get("arithmetic")), SAME["half"])
        apart = nmse(self.reference, got) if got.shape == self.reference.shape else float("inf")
        if not apart <= bound:
            self.add(f"{what} gives other logits: NMSE {apart:.2g}, at most {bound:.2g}", again)

    def _judge(self, step: Step, answer: Mapping[str, Any], done: Played) -> None:
        code, expect, said = answer["code"], step.get("expect"), str(answer.get("sentence", ""))
        self.observe.saw(1, oracle=HEADER)
        if expect is not None and code not in expect:
            words = f": {said}" if said else ""
            self._found(f"{told(step)}: expected {' or '.join(expect)}, got {code}{words}", done)
        elif code != "ok" and "sentence" in answer and (not said.strip() or "\n" in said):
            self._found(f"{told(step)}: {code} with no sentence that says why, got {said!r}", done)
        if "overrun" in answer:
            self._found(f"{told(step)}: written behind the end of {', '.join(answer['overrun'])}", done)

    def _found(self, sentence: str, done: Played) -> None:
        self.add(sentence, done.again)

    def add(self, sentence: str, again: str = "") -> None:
        self.findings.append({"sentence": sentence, "again": again})

    def expect(self, condition: bool, otherwise: str) -> None:
        self.observe.saw(1, oracle=HEADER)
        if not condition:
            self.add(otherwise)

    def done(self, sentence: str) -> None:
        """Fail with the first finding and how to see it again, all in the evidence; or say `sentence`."""
        if self.findings:
            first, more = self.findings[0], len(self.findings) - 1
            others = f" (and {more} more)" if more else ""
            again = f"; again: {first['again']}" if first["again"] else ""
            self.observe.fail(f"{first['sentence']}{others}{again}", findings=self.findings)
        self.observe.say(sentence)

    def _played(self, steps: Sequence[Step]) -> Played:
        patience = float(self.info.get("patience", LOADING))
        return played(self.library, steps, patience, self.preload, self.files)


def rows(answer: Mapping[str, Any], vocab: int) -> NDArray[np.float32]:
    """Logits (positions, vocab) of an answer."""
    return np.frombuffer(base64.b64decode(answer["out"]), np.float32).reshape(-1, vocab)


def overlapped(inner: Mapping[str, Any], outer: Mapping[str, Any]) -> bool:
    """Whether one call was made wholly while another ran."""
    return bool(outer["began"] < inner["began"] and inner["ended"] < outer["ended"])


Judge = Callable[[CallBench], None]
