"""`asked:FILE`: prill's own engine, which writes down what it is asked; and the form of a request.

A request is one line of JSON, with what `lines.py` says of its call:

    {"digest": "logits:0f…:9a…", "model": "0f…", "call": "logits", "ids": [1, 450], "repeat": 0}

`digest` is made of all the rest, and begins with the call and the first half of the model's own SHA-256;
`repeat` counts how often the same was asked before, because an engine may answer otherwise the next time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from prill_harness.engines.channels.completions import TOLD
from prill_harness.engines.channels.lines import PROTOCOL, packed
from prill_harness.engines.embedded import NumPy
from prill_harness.engines.remote import Channel, Hello, OnToken, Remote, Target
from prill_runtime.sampling.sampler import SamplingParams

WRITING = {"max_tokens": 0, "stop": [], "ignore_eos": False, "top": TOLD, **asdict(SamplingParams())}
"""What `generate` is asked where nothing else is said; `top`: logprobs that are wanted at each position."""
FIELDS = ("model", "call", "repeat", "protocol", "text", "add_special", "ids", *WRITING)
CALLS = ("tokenize", "detokenize", "logits", "generate")


def request(model: str, call: str, arguments: Mapping[str, Any], repeat: int = 0) -> dict[str, Any]:
    """The request for a call to the model with this SHA-256."""
    defaults = WRITING if call == "generate" else {}
    body = {"model": model, "call": call, **defaults, **packed(arguments), "repeat": repeat}
    return {"digest": digest(body), **body}


def greeting(model: str) -> dict[str, Any]:
    """The request by which an engine is asked what it is."""
    return request(model, "hello", {"protocol": PROTOCOL})


def digest(body: Mapping[str, Any]) -> str:
    """The digest of a request, whatever else stands in its line; whole numbers are the same with a point."""
    asked = {name: _whole(body[name]) for name in FIELDS if name in body}
    told = json.dumps(asked, sort_keys=True, separators=(",", ":"))
    return f"{body['call']}:{body['model'][:32]}:{sha256(told.encode()).hexdigest()[:32]}"


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


class AskedNumPy(Remote, spec="asked"):
    """prill's own engine in float32; every call goes to a file before it is answered."""

    has_model = True

    connector = "asked"

    @classmethod
    def accepts(cls, argument: str) -> None:
        Target.parse(cls.connector, argument)

    @classmethod
    def connect(cls, target: Target, path: str) -> Channel:
        return WritingDown(Path(target.what), path)


class WritingDown:
    """Calls that are written down and answered; streams are answered alone, for no recording shows them."""

    def __init__(self, file: Path, path: str) -> None:
        self._engine, self._file, self._seen = NumPy.open("", path), file, Counter[str]()
        info = self._engine.info
        self._model = info.model_sha256
        self.hello = Hello("asked", frozenset(CALLS), arithmetic=info.arithmetic, config=info.config)

    def call(self, name: str, arguments: Mapping[str, Any], on_token: OnToken | None = None) -> Any:
        if on_token is not None:
            return self._engine.generate(**arguments, on_token=on_token)
        first = request(self._model, name, arguments)["digest"]
        line = request(self._model, name, arguments, self._seen[first])
        self._seen[first] += 1
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        return getattr(self._engine, name)(**arguments)

    def close(self) -> None:
        self._engine.close()
