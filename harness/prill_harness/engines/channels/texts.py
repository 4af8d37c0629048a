"""`exec:COMMAND,adapter=text`: a command that takes a prompt and writes a text, one process for each.

In the command `{model}`, `{prompt}`, `{tokens}`, `{temperature}` and `{seed}` stand for what is asked;
without `{prompt}` it reads the prompt from its input. Its output is the text, behind as many lines as `skip`
says, without the prompt where it repeats that, and without one newline at the end.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from prill_harness.engines.remote import Hello, OnToken
from prill_runtime.errors import EngineError, MissingCapability
from prill_runtime.gguf.file import open_gguf
from prill_runtime.sampling.sampler import SamplingParams
from prill_runtime.tokenizer.base import Tokenizer
from prill_runtime.tokenizer.load import load_tokenizer

LONGEST = 1 << 24  # bytes of one text
PLACE = re.compile(r"\{(model|prompt|tokens|temperature|seed)\}")


class Texts:
    """A command as a channel that writes texts, and tells neither ids nor numbers."""

    def __init__(self, words: Sequence[str], path: str, timeout: float, skip: int = 0) -> None:
        self._words, self._path, self._timeout, self._skip = words, path, timeout, skip
        self._places = {place for word in words for place in PLACE.findall(word)}
        with open_gguf(path) as file:
            self._tokenizer = load_tokenizer(file.metadata)
        self._name = Path(words[0]).name
        self.hello = Hello(self._name, frozenset({"generate"}), draws="own")

    def call(self, name: str, arguments: Mapping[str, Any], on_token: OnToken | None = None) -> Any:
        if on_token is not None:
            raise MissingCapability("the command does not tell tokens as it writes them", where=self._name)
        return {"text": self._generate(**arguments), "finish_reason": "length"}

    def close(self) -> None:
        """No process outlives its text."""

    def _generate(
        self, ids: Sequence[int], max_tokens: int, stop: Sequence[str], ignore_eos: bool, **sampling: Any
    ) -> str:
        params, usual = SamplingParams(**sampling), SamplingParams()
        drawn = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        unusual = [name for name in drawn if getattr(params, name) != getattr(usual, name)]
        unusual += [name for name, asked in {"stop": stop, "ignore_eos": ignore_eos}.items() if asked]
        unusual += ["seed"] if params.temperature else []
        if lacking := [name for name in unusual if name not in self._places]:
            raise MissingCapability(f"the command does not take {', '.join(lacking)}", where=self._name)
        prompt = spelled(self._tokenizer, ids, self._name)
        given = {
            "model": self._path, "prompt": prompt, "tokens": str(max_tokens),
            "temperature": f"{params.temperature:g}", "seed": str(params.seed),
        }  # fmt: skip
        words = [PLACE.sub(lambda place: given[place[1]], word) for word in self._words]
        if "\0" in "".join(words):
            raise MissingCapability("no command line can carry the prompt's NUL", where=self._name)
        return self._text(self._output(words, b"" if "prompt" in self._places else prompt.encode()), prompt)

    def _text(self, output: bytes, prompt: str) -> str:
        # A character that is cut off at the end of the text is left out.
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(output).removesuffix("\n")
        lines = text.split("\n", self._skip)
        if len(lines) <= self._skip:
            raise EngineError(
                "the output ends before the text", where=self._name, expected=f"{self._skip} lines before it",
                got=repr(text[:80]),
            )  # fmt: skip
        return lines[-1].removeprefix(prompt)

    def _output(self, words: Sequence[str], given: bytes) -> bytes:
        """What a process writes; it and its children are over when this returns.

        Raises:
            EngineError: it cannot be started, ends badly, takes too long or writes too much.
        """
        with TemporaryFile() as told, TemporaryFile() as said:
            told.write(given)
            told.seek(0)
            try:
                process = subprocess.Popen(
                    words, stdin=told, stdout=subprocess.PIPE, stderr=said, start_new_session=True
                )
            except OSError as error:
                raise EngineError("cannot start the command", where=self._name, got=error.strerror) from error
            try:
                output = self._read(process)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                assert process.stdout is not None
                process.stdout.close()
            if process.returncode:
                said.seek(max(0, said.seek(0, os.SEEK_END) - 4096))
                raise EngineError(
                    f"the process {end_of(process.returncode)}", where=self._name, hint=last_line(said.read())
                )
        return output

    def _read(self, process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        output, until, pipe = bytearray(), time.monotonic() + self._timeout, process.stdout.fileno()
        while select.select([pipe], [], [], max(until - time.monotonic(), 0))[0]:
            if not (piece := os.read(pipe, 1 << 16)):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(until - time.monotonic(), 0))
                    return bytes(output)
                break
            output += piece
            if len(output) > LONGEST:
                raise EngineError(
                    "a text without an end", where=self._name, expected=f"at most {LONGEST} bytes",
                    got=len(output),
                )  # fmt: skip
        raise EngineError("no text", where=self._name, expected=f"one within {self._timeout:g} s", got="none")


def spelled(tokenizer: Tokenizer, ids: Sequence[int], where: str) -> str:
    """The text whose ids these are, for an engine that takes no ids.

    Raises:
        MissingCapability: no text has them.
    """
    text = tokenizer.decode(ids).decode("utf-8", "replace")
    if tokenizer.encode(text) != list(ids):
        raise MissingCapability("the engine takes texts, and none has these ids", where=where)
    return text


def end_of(code: int | None) -> str:
    """How a process ended, by its exit status; None: it only closed its output."""
    if code is None:
        return "closed its output"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"


def last_line(said: bytes) -> str:
    """The last line that a process wrote, as a hint."""
    lines = said.decode("utf-8", "replace").strip().splitlines()
    return f"it wrote: {lines[-1][:200]}" if lines else ""
