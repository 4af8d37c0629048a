"""Faults of generation: of what ends a text, of what is reported of it, and of what is never refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from prill_harness.planting.faults import Patch, fault
from prill_runtime.run.generate import Generation
from prill_runtime.run.generate import logprob as natural

MODULE = "prill_runtime.run.generate"
WRITER = f"{MODULE}:Writer.__init__"
ENDED = f"{MODULE}:Writer._ended"
STOP = f"{MODULE}:StopStrings.push"
LOGPROB = f"{MODULE}:logprob"
IDS = "prill_runtime.run.model:checked_ids"
GENERATE, ERRORS = ("generate",), ("errors",)


@fault(area="generation", blames=GENERATE)
def max_tokens_off_by_one() -> Iterator[Patch]:
    """One token more is written than was asked for."""

    def wrap(made: Any) -> Any:
        return lambda self, model, ids, count, *rest: made(self, model, ids, count + 1, *rest)

    yield Patch(WRITER, wrap)


@fault(area="generation", blames=GENERATE)
def first_token_dropped() -> Iterator[Patch]:
    """What the prompt's last row predicts is not part of the text."""

    def wrap(ended: Any) -> Any:
        def without(self: Any, reason: str) -> Generation:
            done = ended(self, reason)
            return Generation(done.ids[1:], done.logprobs[1:], reason)

        return without

    yield Patch(ENDED, wrap)


@fault(area="generation", blames=GENERATE)
def eos_ignored() -> Iterator[Patch]:
    """The end-of-text token is a token like any other."""

    def wrap(made: Any) -> Any:
        def deaf(self: Any, *given: Any) -> None:
            made(self, *given)
            self._ignore_eos = True

        return deaf

    yield Patch(WRITER, wrap)


@fault(area="generation", blames=GENERATE)
def eos_included() -> Iterator[Patch]:
    """The end-of-text token is part of the text that it ends."""

    def wrap(ended: Any) -> Any:
        def with_end(self: Any, reason: str) -> Generation:
            done = ended(self, reason)
            if reason != "eos":
                return done  # type: ignore[no-any-return]
            return Generation((*done.ids, min(self._model.tokenizer.eog_ids)), (*done.logprobs, 0.0), reason)

        return with_end

    yield Patch(ENDED, wrap)


@fault(area="generation", blames=GENERATE)
def ignore_eos_ignored() -> Iterator[Patch]:
    """A text ends at the end-of-text token even where that was to be ignored."""

    def wrap(made: Any) -> Any:
        def strict(self: Any, *given: Any) -> None:
            made(self, *given)
            self._ignore_eos = False

        return strict

    yield Patch(WRITER, wrap)


@fault(area="generation", blames=GENERATE)
def stop_ignored() -> Iterator[Patch]:
    """Stop strings stop nothing."""
    yield Patch(STOP, lambda push: lambda self, piece: False)


@fault(area="generation", blames=GENERATE)
def stop_within_token_only() -> Iterator[Patch]:
    """A stop string is looked for in each token by itself, never over their border."""
    yield Patch(STOP, lambda push: lambda self, piece: any(wanted in piece for wanted in self._wanted))


@fault(area="generation", blames=GENERATE)
def stop_from_half() -> Iterator[Patch]:
    """The text ends as soon as the first half of a stop string has been written."""

    def wrap(push: Any) -> Any:
        def early(self: Any, piece: bytes) -> bool:
            seen = self._tail + piece
            return bool(push(self, piece)) or any(w[: (len(w) + 1) // 2] in seen for w in self._wanted)

        return early

    yield Patch(STOP, wrap)


@fault(area="generation", blames=GENERATE)
def cancel_ignored() -> Iterator[Patch]:
    """The callback's refusal is not listened to."""

    def wrap(made: Any) -> Any:
        def deaf(self: Any, *given: Any) -> None:
            made(self, *given)
            if (told := self._on_token) is not None:
                self._on_token = lambda *token: (told(*token), None)[1]

        return deaf

    yield Patch(WRITER, wrap)


@fault(area="generation", blames=GENERATE)
def callback_missing() -> Iterator[Patch]:
    """The callback is never called."""

    def wrap(made: Any) -> Any:
        def silent(self: Any, *given: Any) -> None:
            made(self, *given)
            self._on_token = None

        return silent

    yield Patch(WRITER, wrap)


@fault(area="generation", blames=GENERATE)
def finish_reason_lost() -> Iterator[Patch]:
    """Every text ends with the reason "length"."""
    yield Patch(
        ENDED, lambda ended: lambda self, reason: replace(ended(self, reason), finish_reason="length")
    )


@fault(area="generation", blames=GENERATE)
def logprob_base_two() -> Iterator[Patch]:
    """Logprobs are logarithms of base two."""
    yield Patch(LOGPROB, lambda logprob: lambda logits, token: logprob(logits, token) / math.log(2))


@fault(area="generation", blames=GENERATE)
def logprob_of_best() -> Iterator[Patch]:
    """A token is reported with the logprob of the most probable one."""
    yield Patch(LOGPROB, lambda logprob: lambda logits, token: logprob(logits, int(np.argmax(logits))))


@fault(area="generation", blames=GENERATE)
def logprob_not_normalised() -> Iterator[Patch]:
    """What is called a logprob is the distance to the best logit."""
    yield Patch(LOGPROB, lambda logprob: lambda logits, token: float(logits[token] - logits.max()))


@fault(area="generation", blames=GENERATE)
def logprob_after_temperature() -> Iterator[Patch]:
    """Logprobs are those of the sharpened distribution that was drawn from."""

    def wrap(take: Any) -> Any:
        def sharpened(self: Any, logits: Any) -> Any:
            count = len(self._logprobs)
            done = take(self, logits)
            if len(self._logprobs) > count and self._params.temperature:
                self._logprobs[-1] = natural(logits / self._params.temperature, self._ids[-1])
            return done if done is None else self._ended(done.finish_reason)

        return sharpened

    yield Patch(f"{MODULE}:Writer.take", wrap)


@fault(area="generation", blames=ERRORS)
def sampling_range_unchecked() -> Iterator[Patch]:
    """Sampling parameters are taken as they come."""
    yield Patch(
        "prill_runtime.sampling.sampler:SamplingParams.__post_init__", lambda check: lambda self: None
    )


@fault(area="generation", blames=ERRORS)
def empty_prompt_accepted() -> Iterator[Patch]:
    """A prompt without ids is continued from id 0."""
    yield Patch(IDS, lambda checked: lambda ids, size: checked([*ids] or [0], size))


@fault(area="generation", blames=ERRORS)
def id_range_unchecked() -> Iterator[Patch]:
    """An id outside the vocabulary wraps around."""

    def wrap(checked: Any) -> Any:
        def wrapped(ids: Sequence[int], size: int) -> Any:
            return checked([int(i) % size for i in ids], size)

        return wrapped

    yield Patch(IDS, wrap)


@fault(area="generation", blames=ERRORS)
def negative_id_accepted() -> Iterator[Patch]:
    """A negative id counts from the end of the vocabulary, as an index of NumPy does."""

    def wrap(checked: Any) -> Any:
        def from_end(ids: Sequence[int], size: int) -> Any:
            return checked([i + size if -size <= i < 0 else i for i in ids], size)

        return from_end

    yield Patch(IDS, wrap)
