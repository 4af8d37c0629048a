"""`recorded:FILE`: answers that an engine gave elsewhere, to the requests that `prill requests` wrote.

A line of the file is a request with `answer` (what `lines.py` calls the result) or `error` beside it, or its
`digest` with one of these. Arrays of a pass, in other forms of file, are read by `passes.py`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from prill_harness.engines.channels.lines import error_of, unpacked
from prill_harness.engines.models import resolve_model
from prill_harness.engines.others.asked import CALLS, digest, greeting, request
from prill_harness.engines.others.passes import SIGNS, SavedPass, read_passes
from prill_harness.engines.remote import ARITHMETIC, Channel, Hello, OnToken, Remote, Target
from prill_harness.records.names import look_up
from prill_runtime.errors import EngineError, MissingCapability, UsageError
from prill_runtime.files import refuse_pipe
from prill_runtime.gguf.file import open_gguf

DIGEST = re.compile(rf"({'|'.join(('hello', *CALLS))}):([0-9a-f]{{32}}):[0-9a-f]{{32}}")
FIELDS = ("name", "version", "device", "arithmetic", "config", "draws")
TELLS = ("answer", "error")
HINT = "`prill requests` writes what to ask, and docs/RECORDED.md how to answer"


class Recorded(Remote, spec="recorded"):
    """An engine that is not here; what was not recorded is missing, by its name."""

    has_model = True

    connector = "recorded"

    @classmethod
    def accepts(cls, argument: str) -> None:
        path = Path(Target.parse(cls.connector, argument).what)
        if not path.is_file():
            got = "a folder" if path.is_dir() else "a pipe or device" if path.exists() else "no such file"
            raise UsageError("no recorded answers", where=str(path), expected="a file", got=got, hint=HINT)

    @classmethod
    def fits(cls, argument: str, model: str) -> None:
        cls.connect(Target.parse(cls.connector, argument), str(resolve_model(model)))

    @classmethod
    def connect(cls, target: Target, path: str) -> Channel:
        file = Path(target.what)
        refuse_pipe(file)
        with file.open("rb") as stream:
            sign = stream.read(max(map(len, SIGNS)))
        if sign.startswith(SIGNS):
            return Answers(file.name, "", {}, read_passes(file, path))
        with open_gguf(path) as model:
            sha256 = model.sha256
        return Answers(file.name, sha256, answers(file, file.stat().st_mtime_ns, sha256))

    @property
    def passes(self) -> Sequence[SavedPass]:
        """Passes of the engine's own choice, which nobody asked for."""
        assert isinstance(self._channel, Answers)
        return self._channel.passes


class Answers:
    """Recorded answers as a channel. A request that is repeated has an answer of its own."""

    def __init__(
        self, name: str, model: str, told: Mapping[str, Mapping[str, Any]], passes: Sequence[SavedPass] = ()
    ) -> None:
        self._name, self._model, self._told, self.passes = name, model, told, passes
        self._seen: Counter[str] = Counter()
        self._whole = {each.ids: each.rows for each in passes if each.whole}
        calls = {key.partition(":")[0] for key in told} - {"hello"} | ({"logits"} if passes else set())
        said = self._told.get(greeting(model)["digest"], {}).get("answer", {}) if told else {}
        own = {field: said[field] for field in FIELDS if field in said}
        self.hello = Hello(**{"name": name, "draws": "own", **own}, calls=frozenset(calls))

    def call(self, name: str, arguments: Mapping[str, Any], on_token: OnToken | None = None) -> Any:
        if on_token is not None:
            raise MissingCapability("a recording does not show a text while it is written", where=self._name)
        # Each once: what was computed once says nothing of a second time.
        if name == "logits" and (rows := self._whole.pop(tuple(arguments["ids"]), None)) is not None:
            return rows
        first = request(self._model, name, arguments)["digest"]
        asked = request(self._model, name, arguments, self._seen[first])
        self._seen[first] += 1
        line = self._told.get(asked["digest"])
        if line is None:
            again = f", asked {asked['repeat'] + 1} times" if asked["repeat"] else ""
            raise MissingCapability(f"{described(asked)}{again} was not recorded", where=self._name)
        if "error" in line:
            raise error_of(line["error"], f"{self._name}, {name}")
        try:
            return unpacked(line["answer"])
        except ValueError as error:
            raise EngineError(
                f"the answer to {described(asked)} is none", where=self._name, got=error
            ) from None

    def close(self) -> None:
        """Nothing is held open."""


def described(asked: Mapping[str, Any]) -> str:
    """A request in a sentence: `generate of 12 ids, 300 tokens (generate:0f…:9a…)`."""
    what = f"{len(asked['ids'])} ids" if "ids" in asked else f"{str(asked.get('text', ''))[:20]!r}"
    length = f", {asked['max_tokens']} tokens" if "max_tokens" in asked else ""
    drawn = f", seed {asked['seed']}" if asked.get("temperature") else ""
    return f"{asked['call']} of {what}{length}{drawn} ({asked['digest']})"


@lru_cache(maxsize=1)
def answers(file: Path, written: int, sha256: str) -> Mapping[str, Mapping[str, Any]]:
    """The answers of a file by digest, as it was when last `written`.

    Raises:
        UsageError: a line that is no request of this model with an answer, or an answer given twice.
    """
    found: dict[str, Mapping[str, Any]] = {}
    with file.open("rb") as stream:
        for number, text in enumerate(stream, 1):
            if not text.strip():
                continue
            line = checked(text, f"{file}, line {number}", sha256)
            if not any(name in line for name in TELLS):
                continue
            if line["digest"] in found:
                refuse(f"{file}, line {number}", "a request is answered twice", "one answer", line["digest"])
            # Of a whole request only the answer is kept: the digest says what was asked.
            found[line["digest"]] = {name: line[name] for name in TELLS if name in line}
    if not found:
        refuse(str(file), "no answer", "requests with `answer` or `error` beside them", "none")
    return found


def checked(text: bytes, where: str, sha256: str) -> Mapping[str, Any]:
    """A line of the file as JSON, once it is sure to speak of the model with this SHA-256."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        refuse(where, "no JSON", "a JSON object on each line", repr(text[:40]))
    told = line.get("digest") if isinstance(line, dict) else None
    sign = DIGEST.fullmatch(told) if isinstance(told, str) else None
    if sign is None:
        refuse(where, "no request's digest", "digest of a request", repr(told)[:80])
    if sign[2] != sha256[:32] or line.get("model", sha256) != sha256:
        other = line.get("model", sign[2]) if sign[2] == sha256[:32] else sign[2]
        expected = f"answers of the model with sha256 {sha256[:12]}…"
        refuse(where, "an answer to another model's request", expected, f"{str(other)[:12]}…")
    if "call" in line and (own := digest({"model": sha256, **line})) != line["digest"]:
        refuse(where, "the request was changed, or is another one's", f"digest {own}", line["digest"])
    if sign[1] == "hello" and "answer" in line:
        _check_hello(line["answer"], where)
    return dict(line)


def _check_hello(said: Any, where: str) -> None:
    words = isinstance(said, dict) and all(
        isinstance(value, dict if field == "config" else str)
        for field, value in said.items()
        if field in FIELDS
    )
    if not words:
        refuse(
            where,
            "an engine that describes itself in another form",
            '{"name": …, "config": {…}}',
            repr(said)[:80],
        )
    look_up(said.get("arithmetic", "unknown"), ARITHMETIC, "unknown arithmetic", where=where)
    look_up(said.get("draws", "own"), ("own", "philox"), "unknown draws", where=where)


def refuse(where: str, what: str, expected: str, got: str) -> NoReturn:
    raise UsageError(what, where=where, expected=expected, got=got, hint=HINT)
