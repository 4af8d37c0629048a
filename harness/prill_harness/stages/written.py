"""Which mistake writes a text: the only way to name one in an engine that shows nothing else.

Every hypothesis of `prill bisect` is put into the oracle, one at a time and in all layers alike, and is
believed when the oracle with it writes the very texts of the engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.embedded import Embedded
from prill_harness.engines.models import resolve_model
from prill_harness.planting import faults
from prill_harness.stages.bisect import Subject
from prill_harness.stages.hypotheses.case import Case, Hypothesis, chosen
from prill_harness.stages.subject import open_subject
from prill_harness.tokens.steps import StepResult
from prill_runtime.errors import PrillError
from prill_runtime.gguf.file import open_gguf
from prill_runtime.models.base import Stage

LARGEST = 1 << 24  # parameters of a model that reads its texts some hundred times
TEXTS = 2  # that a mistake has to write
MOST_PASSES = 24  # over one text, of a hypothesis that writes it in other tokens than expected
SHOWN = 3  # hypotheses that write the same
Array = NDArray[np.float64]
Text = tuple[Sequence[int], str]


def explained(found: StepResult, oracle: Embedded) -> StepResult:
    """The finding, with the mistake in its sentence that writes the texts it found wrong.

    It is returned as it was where the texts are not told, where no mistake writes them, or where the model is
    too large to try.
    """
    texts = [(each["ids"], each["text"]) for each in found.detail.get("wrong_texts", ())]
    if found.ok or not texts or parameters(oracle) > LARGEST:
        return found
    with open_subject(resolve_model(oracle.info.model)) as subject, faults.only(()):
        writer = Rewriter(oracle, subject)
        mistakes = list(writer.mistakes(texts[0][0]))
        for text in texts[:TEXTS]:
            mistakes = [each for each in mistakes if writer.writes(each, text)]
        mistakes.sort(key=writer.of_weights)
    if not mistakes:
        return found
    clauses = list(dict.fromkeys(each.clause for each in mistakes))
    detail = {**found.detail, "explained": clauses}
    sentence = f"{found.sentence}; explained by: {', or '.join(clauses[:SHOWN])}"
    return replace(found, sentence=sentence, detail=detail)


def parameters(oracle: Embedded) -> int:
    """Values in the tensors of the oracle's file."""
    with open_gguf(resolve_model(oracle.info.model)) as file:
        return sum(math.prod(info.shape) for info in file.tensors.values())


@dataclass(frozen=True)
class Slip:
    """One hypothesis, made in every stage of these kinds."""

    clause: str
    function: Hypothesis
    kinds: frozenset[str]

    def made(self, case: Case) -> Array | None:
        """What the stage gives with the mistake; None where it cannot be made."""
        if case.stage.kind not in self.kinds or self.function not in chosen(case.stage):
            return None
        return next((array for clause, array in guesses(self.function, case) if clause == self.clause), None)


@dataclass
class Rewriter:
    """The oracle, made to compute with one mistake."""

    oracle: Embedded
    subject: Subject

    def mistakes(self, ids: Sequence[int]) -> Iterator[Slip]:
        """Every hypothesis that has something to say of a pass over these ids: in each kind of stage, and in
        all kinds together where there are several."""
        found: dict[tuple[str, Hypothesis], list[str]] = {}

        def look(case: Case) -> None:
            for function in chosen(case.stage):
                for clause, _ in guesses(function, case):
                    kinds = found.setdefault((clause, function), [])
                    if case.stage.kind not in kinds:
                        kinds.append(case.stage.kind)

        self.rows(ids, look)
        for (clause, function), kinds in found.items():
            sets = [frozenset(kinds), *(frozenset({kind}) for kind in kinds)]
            yield from (Slip(clause, function, each) for each in dict.fromkeys(sets))

    def of_weights(self, mistake: Slip) -> bool:
        """Whether it is one in weights, which all engines take from one file: of two mistakes that write the
        same the less likely one."""
        return any(stage.tensors for stage in self.subject.table.values() if stage.kind in mistake.kinds)

    def rows(self, ids: Sequence[int], change: Callable[[Case], Array | None]) -> Array:
        """Logits (len(ids), vocabulary) of a pass in which every stage is replaced by what `change` makes."""
        values: dict[str, Array] = {}

        def keep(name: str, array: NDArray[Any]) -> Array | None:
            values[name] = np.asarray(array, np.float64)
            stage = self.subject.table.get(name)
            if stage is None or not all(source in values for source in stage.inputs):
                return None
            made = change(self._case(stage, ids, values))
            if made is not None:
                values[name] = made
            return made

        model = self.oracle.model
        return np.asarray(model.forward([(model.new_cache(len(ids)), ids)], trace=keep)[0], np.float64)

    def _case(self, stage: Stage, ids: Sequence[int], values: dict[str, Array]) -> Case:
        inputs, own = tuple(values[source] for source in stage.inputs), values[stage.name]
        return Case(
            stage,
            self.subject.table,
            tuple(ids),
            inputs,
            own,
            own,
            self.subject.weight,
            self.subject.raw,
            values,
        )

    def writes(self, mistake: Slip, text: Text) -> bool:
        """Whether the oracle with this mistake continues the ids with the text.

        The text is taken to consist of the longest tokens; where another token is the likeliest one and the
        text goes on with it, the rest is taken apart anew behind it.
        """
        ids, data, written = [*text[0]], text[1].encode(), list[int]()
        for _ in range(MOST_PASSES):
            guess = self._longest(data[len(self._spelled(written)) :])
            try:
                rows = self.rows([*ids, *written, *guess[:-1]], mistake.made)[len(ids) + len(written) - 1 :]
            except PrillError:  # a mistake that gives no numbers writes nothing
                return False
            best = rows.argmax(axis=-1).tolist()
            alike = next(
                (n for n, pair in enumerate(zip(best, guess, strict=False)) if len({*pair}) > 1), len(guess)
            )
            if alike == len(guess):
                return len(self._spelled([*written, *guess])) == len(data)
            written += [*guess[:alike], best[alike]]
            if not self._piece(best[alike]) or not data.startswith(self._spelled(written)):
                return False
        return False

    def _spelled(self, ids: Sequence[int]) -> bytes:
        return b"".join(map(self._piece, ids))

    def _piece(self, token: int) -> bytes:
        return self.oracle.model.tokenizer.piece(token)

    @cached_property
    def _pieces(self) -> dict[bytes, int]:
        """Ids by what they spell; nothing is spelled by control tokens."""
        pieces = ((self._piece(token), token) for token in range(self.oracle.model.vocab_size))
        return {piece: token for piece, token in pieces if piece}

    def _longest(self, data: bytes) -> list[int]:
        """Ids of the longest tokens that spell the bytes, from their beginning, up to where there is none."""
        ids, at, size = list[int](), 0, max(map(len, self._pieces), default=0)
        while at < len(data):
            ends = range(min(at + size, len(data)), at, -1)
            end = next((end for end in ends if data[at:end] in self._pieces), None)
            if end is None:
                break
            ids.append(self._pieces[data[at:end]])
            at = end
        return ids


def guesses(function: Hypothesis, case: Case) -> Iterator[tuple[str, Array]]:
    """The guesses of one hypothesis that have the stage's size."""
    with np.errstate(all="ignore"):
        for clause, array in function(case, case.stage.node):
            if array.size == case.want.size:
                yield clause, np.asarray(array, np.float64).reshape(case.want.shape)
