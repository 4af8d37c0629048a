"""Faults of requests: of several stop strings, ends and features together, and of callbacks that raise."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import around
from prill_runtime.errors import EngineError, PrillError
from prill_runtime.sampling.sampler import SamplingParams

MODULE = "prill_runtime.run.generate"
WRITER = f"{MODULE}:Writer.__init__"
TAKE = f"{MODULE}:Writer.take"
ACCEPT = f"{MODULE}:Writer.accept"
STOPS = f"{MODULE}:StopStrings.__init__"
PUSH = f"{MODULE}:StopStrings.push"
SHOWN = "prill_harness.engines.textstream:IncrementalDetokenizer"
AREA, BLAMES = "requests", ("generate",)


def other_stops(changed: Any) -> Iterator[Patch]:
    """Stop strings as `changed` makes them of those that were given."""
    yield Patch(STOPS, lambda made: lambda self, stop: made(self, changed(list(stop))))


@fault(area=AREA, blames=BLAMES)
def second_stop_ignored() -> Iterator[Patch]:
    """Of several stop strings only the first stops anything."""
    yield from other_stops(lambda stops: stops[:1])


@fault(area=AREA, blames=BLAMES)
def stop_not_ascii_ignored() -> Iterator[Patch]:
    """A stop string with a character beyond ASCII stops nothing."""
    yield from other_stops(lambda stops: [stop for stop in stops if stop.isascii()])


@fault(area=AREA, blames=BLAMES)
def stop_in_sixteen_bytes() -> Iterator[Patch]:
    """Stop strings are looked for in the last 16 bytes of a text alone."""

    def wrap(push: Any) -> Any:
        def narrow(self: Any, piece: bytes) -> bool:
            self._tail = self._tail[-16:]
            return bool(push(self, piece))

        return narrow

    yield Patch(PUSH, wrap)


@fault(area=AREA, blames=BLAMES)
def stop_kept_by_characters() -> Iterator[Patch]:
    """As many bytes are kept to look in as the longest stop string has characters."""

    def wrap(made: Any) -> Any:
        def short(self: Any, stop: Any) -> None:
            made(self, stop)
            self._keep = max(map(len, stop), default=1) - 1

        return short

    yield Patch(STOPS, wrap)


@fault(area=AREA, blames=BLAMES)
def stop_starts_over() -> Iterator[Patch]:
    """After a character that does not go on with a stop string, the search begins anew behind it."""

    def wrap(push: Any) -> Any:
        def automaton(self: Any, piece: bytes) -> bool:
            at = self.__dict__.setdefault("at", [0] * len(self._wanted))
            for byte in piece:
                at[:] = [
                    n + 1 if wanted[n] == byte else 0 for wanted, n in zip(self._wanted, at, strict=True)
                ]
                if any(n == len(wanted) for wanted, n in zip(self._wanted, at, strict=True)):
                    return True
            return False

        return automaton

    yield Patch(PUSH, wrap)


@fault(area=AREA, blames=BLAMES)
def stop_tail_shown() -> Iterator[Patch]:
    """What has been written of a stop string is shown before the rest of it comes."""

    def wrap(release: Any) -> Any:
        def eager(self: Any, text: str) -> str:
            shown, self._held = release(self, text) + self._held, ""
            return str(shown)

        return eager

    yield Patch(f"{SHOWN}._release", wrap)


@fault(area=AREA, blames=BLAMES)
def stop_tail_lost() -> Iterator[Patch]:
    """What was held back as the beginning of a stop string is not shown when the text ends in it."""

    def wrap(finish: Any) -> Any:
        def forgetting(self: Any) -> str:
            self._held = ""
            return str(finish(self))

        return forgetting

    yield Patch(f"{SHOWN}.finish", wrap)


@fault(area=AREA, blames=("generate", "sampler"))
def seed_zero_is_none() -> Iterator[Patch]:
    """Seed 0 counts as no seed: each text is drawn from another."""

    def wrap(made: Any) -> Any:
        def seeded(self: Any, model: Any, ids: Any, count: int, params: Any = None, *rest: Any) -> None:
            chosen = params or SamplingParams()
            made(self, model, ids, count, replace(chosen, seed=chosen.seed or time.time_ns()), *rest)

        return seeded

    yield Patch(WRITER, wrap)


@fault(area=AREA, blames=BLAMES)
def second_end_ignored() -> Iterator[Patch]:
    """Of several ids that end a text only the lowest does."""

    def wrap(accept: Any) -> Any:
        def first_alone(self: Any, token: int, chosen: float) -> Any:
            own, ends = self._ignore_eos, self._model.tokenizer.eog_ids
            self._ignore_eos = own or token != min(ends, default=-1)
            try:
                return accept(self, token, chosen)
            finally:
                self._ignore_eos = own

        return first_alone

    yield Patch(ACCEPT, wrap)


@fault(area=AREA, blames=BLAMES)
def end_told_to_callback() -> Iterator[Patch]:
    """The callback hears the token that ends the text, too."""

    def wrap(accept: Any) -> Any:
        def telling(self: Any, token: int, chosen: float) -> Any:
            done = accept(self, token, chosen)
            if done is not None and done.finish_reason == "eos" and self._on_token is not None:
                self._on_token(token, chosen)
            return done

        return telling

    yield Patch(ACCEPT, wrap)


@fault(area=AREA, blames=BLAMES)
def stop_found_in_prompt() -> Iterator[Patch]:
    """A stop string may begin in the prompt."""

    def wrap(made: Any) -> Any:
        def seeded(self: Any, model: Any, ids: Any, *rest: Any) -> None:
            made(self, model, ids, *rest)
            self._stops.push(model.tokenizer.decode(list(ids)))

        return seeded

    yield Patch(WRITER, wrap)


@fault(area=AREA, blames=BLAMES)
def raising_callback_swallowed() -> Iterator[Patch]:
    """What a callback raises is taken for a refusal."""

    def wrap(made: Any) -> Any:
        def deaf(self: Any, *given: Any) -> None:
            made(self, *given)
            if (told := self._on_token) is not None:
                self._on_token = lambda *token: _asked(told, *token)

        return deaf

    yield Patch(WRITER, wrap)


def _asked(told: Any, *token: Any) -> Any:
    try:
        return told(*token)
    except PrillError:
        raise
    except Exception:
        return False


def after_raising(then: Callable[[Any, Any], None]) -> Iterator[Patch]:
    """The request behind one whose callback raised is `then(it, that callback)`, once."""
    left: list[Any] = []

    def accept(original: Any, self: Any, token: int, chosen: float) -> Any:
        try:
            return original(self, token, chosen)
        except Exception:
            left.append(self._on_token)
            raise

    def made(original: Any, self: Any, *given: Any) -> None:
        original(self, *given)
        if left:
            then(self, left.pop())

    yield around(ACCEPT, accept)
    yield around(WRITER, made)


@fault(area=AREA, blames=BLAMES)
def raising_callback_keeps_slot() -> Iterator[Patch]:
    """A request whose callback raised keeps its slot: the next one finds none."""

    def refuse(request: Any, told: Any) -> None:
        raise EngineError("no slot is free", expected="one for each request")

    yield from after_raising(refuse)


@fault(area=AREA, blames=BLAMES)
def raising_callback_stays() -> Iterator[Patch]:
    """The callback that raised is asked in the next request, too."""
    yield from after_raising(lambda request, told: setattr(request, "_on_token", told))


@fault(area=AREA, blames=BLAMES)
def no_tokens_are_one() -> Iterator[Patch]:
    """At least one token is written, where none was asked for too."""

    def wrap(made: Any) -> Any:
        return lambda self, model, ids, count, *rest: made(self, model, ids, max(count, 1), *rest)

    yield Patch(WRITER, wrap)


@fault(area=AREA, blames=BLAMES)
def limit_before_stop() -> Iterator[Patch]:
    """The last token that was asked for is not looked at for a stop string."""

    def wrap(accept: Any) -> Any:
        def hurried(self: Any, token: int, chosen: float) -> Any:
            done = accept(self, token, chosen)
            last = done is not None and done.finish_reason == "stop" and not self.remaining
            return replace(done, finish_reason="length") if last else done

        return hurried

    yield Patch(ACCEPT, wrap)


@fault(area=AREA, blames=BLAMES)
def logprob_after_penalty() -> Iterator[Patch]:
    """Logprobs are those of the logits that the repetition penalty has changed."""

    def wrap(take: Any) -> Any:
        def penalised(self: Any, logits: Any) -> Any:
            changed = np.array(logits, np.float64)
            seen = np.unique(self._history)
            factor = self._params.repetition_penalty
            changed[seen] = np.where(changed[seen] > 0, changed[seen] / factor, changed[seen] * factor)
            plain = replace(self._params, repetition_penalty=1.0)
            self._params, own = plain, self._params
            try:
                return take(self, changed)
            finally:
                self._params = own

        return penalised

    yield Patch(TAKE, wrap)


@fault(area=AREA, blames=BLAMES)
def logprob_of_drawn_not_a_number() -> Iterator[Patch]:
    """A token that was drawn and is not the most probable one has a logprob of NaN."""

    def wrap(logprob: Any) -> Any:
        return lambda logits, token: logprob(logits, token) if token == int(np.argmax(logits)) else math.nan

    yield Patch(f"{MODULE}:logprob", wrap)
