"""`python -m prill_harness.engines.others.capi.worker LIBRARY [OPTIONS]`: a C library behind JSON lines.

The library is called by `prill_engine.h`, in this process alone: when it crashes, the process is what ends.
"""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.channels.lines import error_of
from prill_harness.engines.channels.worker import serve
from prill_harness.engines.others.capi.abi import CODES, RawLibrary, Unusable
from prill_runtime.errors import EngineError, InvalidParameter, MissingCapability

OnToken = Callable[[int, float], bool]


class Loaded:
    """The library with one model loaded; what it lacks a tokenizer for, the host does or it is not done."""

    def __init__(self, library: str, options: str, model: str) -> None:
        try:
            self._library = RawLibrary(library)
        except Unusable as error:
            raise EngineError(str(error), where=library) from None
        self._context = self._ask("context_create", device=0, options=options or None)["out"]
        self._model = self._ask("model_load", context=self._context, path=model)["out"]
        about = self._ask("context_device", context=self._context)
        self.name, self.version, self.device = (about[key] for key in ("name", "version", "device"))
        self.arithmetic = about["arithmetic"]
        config = self._ask("model_describe", model=self._model)
        self._end = config.pop("eos_id")
        self.config = config
        self.draws = "own"

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        _check(ids)
        vocab = self.config["vocab_size"]
        with self._session(max(len(ids), 1)) as session:
            made = self._ask("session_logits", session=session, ids=ids, room=max(len(ids), 1) * vocab)
        return np.frombuffer(base64.b64decode(made["out"]), np.float32).reshape(-1, vocab)

    def generate(
        self,
        ids: Sequence[int],
        max_tokens: int,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        on_token: OnToken | None = None,
        **sampling: Any,
    ) -> dict[str, Any]:
        _check(ids)
        if max_tokens < 0:
            raise InvalidParameter("max_tokens below 0", expected="0 or more", got=max_tokens)
        if stop:
            raise MissingCapability("prill_engine.h has no texts, so no strings to stop at")
        written: list[int] = []
        told: list[float] = []
        positions, fed = len(ids) + max_tokens, list(ids)
        reason, end = "length", None
        with self._session(positions) as session:
            room = min(positions, self.config["context_length"])
            while len(written) < max_tokens:
                if written and len(ids) + len(written) > room:
                    reason = "context"
                    break
                made = self._ask("session_next", session=session, ids=fed, sampling=sampling)
                token, logprob = int(made["id"]), float(made["logprob"])
                if token == self._end and not ignore_eos:
                    reason, end = "eos", token
                    break
                written.append(token)
                told.append(logprob)
                fed = [token]
                if on_token is not None and not on_token(token, logprob):
                    reason = "cancelled"
                    break
        return {"ids": written, "logprobs": told, "finish_reason": reason, "end_id": end}

    def _session(self, positions: int) -> SessionHandle:
        wanted = max(1, min(positions, self.config["context_length"]))
        return SessionHandle(self, self._ask("session_create", model=self._model, positions=wanted)["out"])

    def close(self) -> None:
        self._ask("context_destroy", context=self._context)

    def _ask(self, call: str, **given: Any) -> dict[str, Any]:
        """What a call wrote. Raises the error of its code, with the library's sentence."""
        code, found = self._library.call(call, **given)
        if code:
            kind = CODES[code] if 0 < code < len(CODES) else f"code {code}"
            sentence = self._library.sentence() or f"{call} gave {kind} and no sentence"
            raise error_of({"kind": kind, "message": sentence}, call)
        if "overrun" in found:
            raise EngineError(
                "the library wrote behind the end of a buffer", where=call, got=found["overrun"]
            )
        return found


def _check(ids: Sequence[int]) -> None:
    """Refuse ids that the library could not be given: they would be cut to 32 bits."""
    for each in ids:
        if not -(2**31) <= each < 2**31:
            raise InvalidParameter("an id that no vocabulary has", expected="a number of 32 bits", got=each)


class SessionHandle:
    """A session that ends with the block."""

    def __init__(self, loaded: Loaded, session: int) -> None:
        self._loaded, self._session = loaded, session

    def __enter__(self) -> int:
        return self._session

    def __exit__(self, *error: object) -> None:
        self._loaded._ask("session_free", session=self._session)


def main(library: str, options: str = "") -> None:
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the library prints is no answer
    sys.stdout = sys.stderr
    serve(lambda model: Loaded(library, options, model), library, sys.stdin, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
