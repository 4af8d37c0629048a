"""Whether a suite's check looks at the very last answer that it asks for.

A check that stops looking half way, at the eighth position or after the first text, may go on asking and
counting. So it is run twice: on a sound engine, whose answers are counted, and on one whose last answer is
wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import prill_runtime.run.generate as generation
from prill_harness.engines.base import Engine, Generation
from prill_harness.run.checks import Observer
from prill_harness.tokens.golden import Golden
from prill_suites import errors, sampler, tokenizer
from prill_suites.tokenizer_twins import Twin

IDS = 12
ASKED = ("tokenize", "detokenize", "logits", "generate")


@dataclass
class Count:
    """How many answers were given, and which of them is wrong; none when 0."""

    given: int = 0
    wrong: int = 0

    def told(self, answer: Any) -> Any:
        """The answer, or another where it is the wrong one's turn."""
        self.given += 1
        return another(answer) if self.given == self.wrong else answer


def another(answer: Any) -> Any:
    """An answer that differs at its end."""
    if isinstance(answer, int):
        return answer ^ 1
    if isinstance(answer, bytes):
        return answer + b"."
    if isinstance(answer, np.ndarray):
        answer = answer.copy()
        answer[-1, -1] += 1
        return answer
    if isinstance(answer, Generation):
        return replace(answer, ids=tuple(another(list(answer.ids))))
    return [*answer[:-1], answer[-1] ^ 1] if answer else [0]


class Asked:
    """An engine that counts its answers; what is not asked of it by name is the engine's own."""

    def __init__(self, engine: Engine, count: Count) -> None:
        self._engine, self._count = engine, count

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._engine, name)
        if name not in ASKED:
            return found
        return lambda *given, **named: self._count.told(found(*given, **named))


Judge = Callable[[Observer, bool], object]


def cases(sound: Callable[[], Engine], golden: Golden, twin: Twin) -> Iterator[tuple[str, Judge]]:
    """(the check, a judge for its sound and its wrong case), of checks whose last answer decides."""
    ids = golden.prompts[0].ids[:IDS]
    given: dict[Callable[..., object], Sequence[Any]] = {
        errors.test_empty_prompt: (ids,),
        errors.test_id_out_of_vocabulary: (ids,),
        errors.test_too_long: (ids,),
        errors.test_sampling_parameters: (ids,),
        tokenizer.test_prompt_ids: (golden, twin),
        tokenizer.test_merges: (golden, twin),
        tokenizer.test_round_trip: (twin,),
        tokenizer.test_special_whole: (twin,),
        tokenizer.test_bos_once: (twin,),
        tokenizer.test_byte_fallback: (twin,),
    }
    for check, rest in given.items():
        yield _name(check), _of_engine(check, sound, rest)
    for check in (sampler.test_greedy, sampler.test_draw):
        yield _name(check), _of_sampler(check, sound)


def _name(check: Callable[..., object]) -> str:
    marks = {mark.name: mark.kwargs for mark in getattr(check, "pytestmark", ())}
    return str(marks.get("prill_check", {}).get("name", getattr(check, "__name__", "a check")))


def _of_engine(check: Callable[..., object], sound: Callable[[], Engine], rest: Sequence[Any]) -> Judge:
    seen = Count()

    def judge(observe: Observer, wrong: bool) -> None:
        count = Count(wrong=seen.given) if wrong else seen
        check(observe, Asked(sound(), count), *rest)

    return judge


def _of_sampler(check: Callable[..., object], sound: Callable[[], Engine]) -> Judge:
    seen = Count()

    def judge(observe: Observer, wrong: bool) -> None:
        count, own = Count(wrong=seen.given) if wrong else seen, generation.sample  # type: ignore[attr-defined]
        generation.sample = lambda *given: count.told(own(*given))  # type: ignore[attr-defined]
        try:
            check(observe, sound())
        finally:
            generation.sample = own  # type: ignore[attr-defined]

    return judge
