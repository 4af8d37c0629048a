"""Is an engine's process sound at its boundary? Requests that nobody ought to send, and how it ends.

Any engine that has a process of its own is judged. For an engine of prill's own the example worker stands in,
which has a defect for each of these checks to find.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil  # type: ignore[import-untyped]
import pytest

from prill_harness.engines.base import Capability, Engine
from prill_harness.engines.channels import process
from prill_harness.engines.connect import connect, known
from prill_harness.engines.embedded import Embedded
from prill_harness.engines.others.capi import build
from prill_harness.engines.remote import Remote
from prill_harness.engines.spec import EngineSpec
from prill_harness.run.checks import Observer, check
from prill_harness.tokens.golden import Golden
from prill_runtime.errors import (
    ContextLengthExceeded,
    EngineError,
    InvalidParameter,
    MissingCapability,
    ModelFileError,
    PrillError,
    ProcessLost,
    Reported,
    UnsupportedModel,
)
from prill_suites.boundary_files import Broken, broken
from prill_suites.boundary_play import IDS
from prill_suites.sequences import context_of

TEXTS = (Capability.GENERATE,)
OWN_PROCESS = ("exec", "capi", "serve")
FILES = 24  # broken files that are opened, each by a process of its own
TOKENS = 8
PROTOCOL = "what the protocol and the file promise of each request"
DEFECT = "env PRILL_ENGINE_DEFECT="
NAMED = {
    "worker_dies": "was ended by SIGKILL",
    "worker_exits": "ended with exit status 3",
    "worker_garbage": "a line that is no JSON object",
    "worker_hangs": "no answer",
    "worker_floods": "a line without an end",
}
"""Defect of the example worker -> what the sentence about it has to say."""


@pytest.fixture
def subject(pytestconfig: pytest.Config, engine: Engine) -> str:
    """The spec of the process to judge.

    Raises:
        MissingCapability: an engine without a process of its own.
    """
    spec = str(pytestconfig.getoption("prill_engine"))
    if isinstance(engine, Embedded):
        return f"exec:{build.worker_command()}"
    if EngineSpec.parse(spec).name not in OWN_PROCESS:
        raise MissingCapability("the engine has no process of its own that prill starts", where=spec)
    return spec


def opened(spec: str, model: str | Path) -> Engine:
    """An engine inside whose calls planted faults are not suspended: the way to it is what is judged."""
    return connect(EngineSpec.parse(spec), model)


def opened_first(spec: str, model: str) -> Engine:
    """The same before anything is judged.

    Raises:
        MissingCapability: the engine says that it does not know what is in this file.
    """
    try:
        return opened(spec, model)
    except UnsupportedModel as error:
        raise MissingCapability(str(error)) from error


@check("process.requests", kills=("worker_dies_of_bad_ids", "worker_looks_up_any_id"), needs=TEXTS)
def test_requests(observe: Observer, subject: str, model_spec: str, golden: Golden, oracle: Embedded) -> None:
    """Requests that cannot be answered are refused in the same process, and the next one is right."""
    vocab, context = oracle.model.vocab_size, context_of(golden)
    ids = list(IDS)
    bad: list[dict[str, Any]] = [{"ids": [*ids, each]} for each in (-1, vocab, 2**31 - 1, 2**40, 2**70)]
    bad += [{"ids": []}, {"ids": [IDS[0]] * (context + 1)}, {"max_tokens": -1}]
    findings = []
    engine = opened_first(subject, model_spec)
    try:
        before = engine.generate(ids, max_tokens=TOKENS).ids
        for request in bad:
            what = ", ".join(f"{name}={str(value)[:60]}" for name, value in request.items())
            observe.saw(1, oracle=PROTOCOL)
            try:
                engine.generate(**{"ids": ids, "max_tokens": TOKENS, **request})
                findings.append(f"generate({what}): expected a refusal, got a text")
            except (InvalidParameter, ContextLengthExceeded):
                pass
            except ProcessLost as error:
                findings.append(f"generate({what}): {error}")
                engine.close()
                engine = opened(subject, model_spec)
            except PrillError as error:
                findings.append(f"generate({what}): expected it to be refused as such, got {error}")
            after = engine.generate(ids, max_tokens=TOKENS).ids
            if after != before:
                findings.append(f"behind generate({what}) the same request gives another text")
    finally:
        engine.close()
    _done(observe, findings, f"{len(bad)} bad requests refused, and the next request right behind each")


@check("process.malformed", kills=("worker_reads_past_end",))
def test_malformed(observe: Observer, subject: str, model_path: Path, tmp_path: Path) -> None:
    """A whole file that loads, broken in one place: refused, and nothing crashes."""
    cls, argument = known(EngineSpec.parse(subject))
    assert issubclass(cls, Remote)
    defects = list(broken(model_path))
    chosen = defects[:: max(1, len(defects) // FILES)]
    whole, file, findings = model_path.read_bytes(), tmp_path / "broken.gguf", []
    for defect in chosen:
        file.write_bytes(_changed(whole, defect))
        observe.saw(1, oracle="the file's format")
        try:
            cls.connect(cls.target(argument), str(file)).close()
            if defect.strict:
                findings.append(f"{defect.name}: the file is loaded without a word")
        except ProcessLost as error:
            if error.crashed:
                findings.append(f"{defect.name}: {error}; the change: {defect.change}")
        except PrillError:
            pass
    _done(observe, findings, f"{len(chosen)} broken files, each refused without a crash")


def _changed(whole: bytes, defect: Broken) -> bytes:
    data = bytearray(whole)
    for offset, value in defect.change.get("put", ()):
        data[offset : offset + len(value) // 2] = bytes.fromhex(value)
    return bytes(data[: defect.change.get("cut", len(data))])


@check("process.named", kills=("death_unnamed", "lost_worker_left"))
def test_named(observe: Observer, model_spec: str) -> None:
    """Death, silence, garbage and a flood in the middle of a text are named and ended."""
    worker = shlex.quote(str(build.worker()))
    with opened_first(f"exec:{worker}", model_spec) as sound:
        before = sound.generate(list(IDS), max_tokens=TOKENS).ids
    heard: list[str] = []
    with patch.object(process, "LONGEST", 1 << 16):
        for defect, words in NAMED.items():
            engine = opened(f"exec:{DEFECT}{defect} {worker},timeout=4", model_spec)
            pid = engine._channel.hello.pid  # type: ignore[attr-defined]
            try:
                engine.generate(list(IDS), max_tokens=TOKENS, on_token=lambda token, logprob: True)
                sentence = "nothing"
            except EngineError as error:
                sentence = str(error)
            observe.saw(1, oracle="what the example worker was told to do")
            running = psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
            with suppress(psutil.Error):
                psutil.Process(pid).kill()
            engine.close()
            observe.expect(
                words in sentence, f"{defect}: expected a sentence with {words!r}, got: {sentence}"
            )
            observe.expect("generate" in sentence, f"{defect}: the sentence names no call: {sentence}")
            observe.expect(not running, f"{defect}: its process is left running")
            heard.append(words)
    with opened_first(f"exec:{worker}", model_spec) as sound:
        observe.expect(sound.generate(list(IDS), max_tokens=TOKENS).ids == before, "another text afterwards")
    observe.say(f"{len(heard)} ways to go wrong, each named: {', '.join(heard)}")


@check("process.kinds", kills=("error_kinds_lost",))
def test_kinds(observe: Observer, model_spec: str, model_path: Path, tmp_path: Path) -> None:
    """The kind of an error and its sentence survive from the library through its process to here."""
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(model_path.read_bytes()[:5000])
    with opened_first("capi:example", model_spec) as engine:
        context = int(engine.info.config["context_length"])
        cases: list[tuple[type[PrillError], str, Callable[[], object]]] = [
            (InvalidParameter, "outside the vocabulary", lambda: engine.logits([-1])),
            (ContextLengthExceeded, f"holds {context}", lambda: engine.logits([1] * (context + 1))),
            (InvalidParameter, "sampling", lambda: engine.generate([1], max_tokens=1, top_p=math.nan)),
            (Reported, "available", lambda: opened("capi:example,options=memory=9999", model_spec)),
            (ModelFileError, "damaged", lambda: opened("capi:example", damaged)),
            (UnsupportedModel, "not llama", lambda: opened("capi:example", "fixture:gpt2-tiny")),
        ]
        for kind, words, call in cases:
            with _raised() as caught:
                call()
            error = caught[0]
            observe.saw(1, oracle="the code and the sentence that the library gave")
            right = type(error) is kind and words in str(error) and error.noun in str(error)
            observe.expect(right, f"expected {kind.noun} with {words!r}, got {type(error).__name__}: {error}")
    observe.say(f"{len(cases)} errors of five kinds, each with the library's sentence")


@contextmanager
def _raised() -> Iterator[list[PrillError]]:
    """The error that the block raises; none at all is an EngineError that says so."""
    caught: list[PrillError] = []
    try:
        yield caught
    except PrillError as error:
        caught.append(error)
    if not caught:
        caught.append(EngineError("nothing was raised"))


def _done(observe: Observer, findings: Sequence[str], sentence: str) -> None:
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    observe.expect(not findings, (findings[0] if findings else "") + more, findings=list(findings))
    observe.say(sentence)
