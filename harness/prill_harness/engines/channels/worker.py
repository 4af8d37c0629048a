"""An engine in Python behind JSON lines: `python -m prill_harness.engines.channels.worker module:Class`.

The reference of the protocol in `lines.py`: the class is made with the model's path, as `py:` makes it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from typing import IO, Any

from prill_harness.engines.channels.lines import PROTOCOL, packed, told, unpacked
from prill_harness.engines.channels.python import Calls, load
from prill_runtime.errors import UsageError


def serve(make: Callable[[str], Any], name: str, read: IO[str], write: IO[str]) -> None:
    """Answer lines until the input ends; `make(path)` is asked for the engine by the first of them."""

    def send(**message: Any) -> None:
        write.write(json.dumps(packed(message)) + "\n")
        write.flush()

    def asks(number: int) -> Callable[[int, float], bool]:
        def on_token(token: int, logprob: float) -> bool:
            send(id=number, token=int(token), logprob=float(logprob))
            line = read.readline()
            return bool(line) and bool(json.loads(line).get("go"))

        return on_token

    engine: Calls | None = None
    for line in read:
        message = dict(unpacked(json.loads(line)))
        number, call = message.pop("id"), message.pop("call")
        on_token = asks(number) if message.pop("stream", False) else None
        try:
            if call == "hello":
                if message.get("protocol") != PROTOCOL:
                    raise UsageError("unknown protocol", expected=PROTOCOL, got=message.get("protocol"))
                engine = Calls(make(str(message["model"])), name)
                send(id=number, result=_said(engine))
            elif engine is None:
                raise UsageError("a call before hello", got=repr(call))
            else:
                made = engine.call(call, message, on_token)
                send(id=number, result=asdict(made) if is_dataclass(made) else made)  # type: ignore[arg-type]
        except Exception as error:
            send(id=number, error=told(error))
    if engine is not None:
        engine.close()


def _said(engine: Calls) -> Mapping[str, Any]:
    hello = engine.hello
    return {**asdict(hello), "calls": sorted(hello.calls), "config": dict(hello.config)}


def main(make: Callable[[str], Any], name: str) -> None:
    """Answer on standard output; what an engine or a C library prints there is no answer."""
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)
        serve(make, name, sys.stdin, output)


if __name__ == "__main__":
    spec = sys.argv[1] if len(sys.argv) == 2 else ""
    main(load(spec, repr(spec)), spec)
