"""Servers of somebody else's are found or started, asked in their dialect, and blamed for what they do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prill_harness.engines.base import Capability, Engine
from prill_harness.engines.channels import link
from prill_harness.engines.channels.completions import Entry, matched
from prill_harness.engines.channels.link import TOKEN, Link
from prill_harness.engines.remote import Remote
from prill_harness.faults.opening import open_engine
from prill_runtime.errors import (
    ContextLengthExceeded,
    EngineError,
    InvalidParameter,
    MissingCapability,
    UsageError,
)

from .commandline import child
from .served import ENDS_AT
from .serving import CONTEXT, MODEL, Started, servers, started

__all__ = ["servers", "started"]

PROMPT = "The quick brown fox"


@pytest.fixture
def server(started: Started, monkeypatch: pytest.MonkeyPatch) -> Started:
    """A sound server; a proxy in the environment, at which nobody listens, is not for it."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    return started


@pytest.fixture(scope="module")
def numpy() -> Iterator[Engine]:
    with open_engine("numpy", MODEL) as engine:
        yield engine


llama_only = pytest.mark.parametrize("started", ["llama"], indirect=True)
openai_only = pytest.mark.parametrize("started", ["openai"], indirect=True)


def test_it_is_asked_and_answers(server: Started, numpy: Engine) -> None:
    """Both dialects are told apart, and give what the engine behind them gives: ids, text and logprobs."""
    with open_engine(f"{server.url}/v1,arithmetic=float32", MODEL) as engine:
        info = engine.info
        assert info.capabilities == {Capability.TOKENIZE, Capability.GENERATE, Capability.BATCH}
        assert (info.name, info.version) == {"llama": ("llama.cpp", "b7"), "openai": ("test", "1.5")}[
            server.dialect
        ]
        assert (info.arithmetic, info.draws, info.config["served_context"]) == ("float32", "own", CONTEXT)
        ids = engine.tokenize(PROMPT)
        assert ids == numpy.tokenize(PROMPT)
        assert engine.tokenize(PROMPT, add_special=False) == numpy.tokenize(PROMPT, add_special=False)
        assert engine.detokenize(ids) == numpy.detokenize(ids)
        expected, made = numpy.generate(ids, max_tokens=8), engine.generate(ids, max_tokens=8)
        assert (made.ids, made.finish_reason) == (expected.ids, "length")
        np.testing.assert_allclose(made.logprobs, expected.logprobs, atol=1e-4)
        assert made.text.encode() == b"".join(map(numpy.model.tokenizer.piece, made.ids))
        assert [len(row) for row in made.top] == [20] * 8
        assert [row[token] for row, token in zip(made.top, made.ids, strict=True)] == list(made.logprobs)
        heard: list[int] = []
        assert engine.generate(ids, max_tokens=8, on_token=lambda token, _: heard.append(token)) == made
        assert heard == list(made.ids)
        cancelled = engine.generate(ids, max_tokens=8, on_token=lambda token, _: False)
        assert (cancelled.ids, cancelled.finish_reason) == (made.ids[:1], "cancelled")
        stop = made.text[:4]
        assert engine.generate(ids, max_tokens=8, stop=[stop]).finish_reason == "stop"
        assert engine.generate(ids, max_tokens=8).ids == made.ids


def test_an_end_ends_or_is_a_token_like_any_other(server: Started, numpy: Engine) -> None:
    """The end of the text is taken off and named, or, where it is to be ignored, is one of the tokens."""
    server.switch("ends")
    with open_engine(server.url, MODEL) as engine:
        ids, end = engine.tokenize(PROMPT), numpy.model.tokenizer.eos_id
        made = engine.generate(ids, max_tokens=6)
        assert (len(made.ids), made.finish_reason, made.end_id) == (ENDS_AT, "eos", end)
        assert len(made.logprobs) == ENDS_AT
        assert engine.generate(ids, max_tokens=ENDS_AT).finish_reason == "length"
        heard: list[int] = []
        on = engine.generate(ids, max_tokens=6, ignore_eos=True, on_token=lambda t, _: heard.append(t))
        assert (on.ids[: ENDS_AT + 1], on.finish_reason) == ((*made.ids, end), "length")
        assert len(on.ids) == len(on.logprobs) == 6
        assert heard == list(on.ids)
        assert engine.generate(ids, max_tokens=ENDS_AT + 1, ignore_eos=True).ids == (*made.ids, end)


@given(st.lists(st.integers(0, 3), max_size=12).flatmap(
    lambda ids: st.tuples(st.just(ids), st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
))  # fmt: skip
def test_entries_are_matched_by_id(drawn: tuple[list[int], list[bool]]) -> None:
    """Whichever entries are missing, one that is assigned is the id's own; and with all there, all are."""
    ids, there = drawn
    entries = [Entry(token, float(at), {}) for at, token in enumerate(ids) if there[at]]
    found = matched(ids, entries)
    for at, entry in enumerate(found):
        assert entry is None or (entry.logprob, entry.id) == (at, ids[at])
    if all(there):
        assert None not in found
    if len(set(ids)) == len(ids):
        assert [entry is not None for entry in found] == there
    with pytest.raises(ValueError, match="not among the ids"):
        matched(ids, [Entry(7, 0.0, {})])


@llama_only
def test_missing_entries_are_missing(server: Started) -> None:
    """Where the entries of some ids are left out, the others' count, and no list of logprobs is claimed."""
    server.switch("some_entries")
    with open_engine(server.url, MODEL) as engine:
        made = engine.generate(engine.tokenize(PROMPT), max_tokens=6)
        assert len(made.ids) == 6
        assert [bool(row) for row in made.top] == [True, True, False, True, True, False]
        with pytest.raises(
            MissingCapability, match=r"llama.cpp does not tell the logprobs of what it writes"
        ):
            _ = made.logprobs


@llama_only
def test_a_stream_that_hides_ids_is_not_believed(server: Started) -> None:
    """A stream whose count of tokens is not that of its ids has not told them all."""
    server.switch("hidden")
    with open_engine(server.url, MODEL) as engine:
        made = engine.generate(engine.tokenize(PROMPT), max_tokens=4)
        with pytest.raises(MissingCapability, match="does not tell the ids"):
            _ = made.ids
        with pytest.raises(MissingCapability, match="does not tell the id of every token as it is written"):
            engine.generate(engine.tokenize(PROMPT), max_tokens=4, on_token=lambda *_: None)


@openai_only
def test_what_a_plain_server_lacks_is_missing_by_name(server: Started, numpy: Engine) -> None:
    """One that takes texts and tells texts: no ids, no logprobs, no tokenizer, no end to ignore."""
    server.switch("plain no_tokenize")
    ids = numpy.tokenize(PROMPT)
    with open_engine(server.url, MODEL) as engine:
        assert engine.info.capabilities == {Capability.GENERATE, Capability.BATCH}
        made = engine.generate(ids, max_tokens=5)
        assert made.text.encode() == b"".join(
            map(numpy.model.tokenizer.piece, numpy.generate(ids, max_tokens=5).ids)
        )
        for lacking in (
            lambda: made.ids,
            lambda: made.logprobs,
            lambda: engine.tokenize(PROMPT),
            lambda: engine.generate(ids, max_tokens=5, ignore_eos=True),
            lambda: engine.generate(ids, max_tokens=5, temperature=1.0, top_k=3),
            lambda: engine.generate([5, 5, 5], max_tokens=5),
            lambda: engine.generate(ids, max_tokens=5, on_token=lambda *_: None),
        ):
            with pytest.raises(MissingCapability):
                lacking()
    server.switch("five")
    with open_engine(server.url, MODEL) as engine:
        assert [len(row) for row in engine.generate(ids, max_tokens=3).top] == [5] * 3


@openai_only
def test_one_of_several_models_is_named(server: Started) -> None:
    """A server of several models is asked for the one that the spec names."""
    server.switch("two")
    with pytest.raises(UsageError, match=r"which model.*got tiny, other"):
        open_engine(server.url, MODEL)
    with open_engine(f"{server.url},model=other", MODEL) as engine:
        assert engine.generate([1, 5], max_tokens=2).finish_reason == "length"


@pytest.mark.parametrize(
    ("started", "defect", "sentence", "streams"),
    [
        ("llama", "garbage", r"an answer that is no JSON: .*'<html>'", False),
        ("llama", "flood", r"more than 4096 characters", False),
        ("llama", "broken", r"status 500: out of memory", False),
        ("llama", "cut", r"the connection broke or carried no HTTP: expected a whole answer", False),
        ("llama", "cut", r"an answer that ends before the text does", True),
        ("llama", "silent", r"no answer: expected one within 1 s", False),
        ("llama", "pings", r"no answer: expected one within 1 s", True),
        ("llama", "bearer=x", r"the server wants another token.*read from PRILL_TOKEN", False),
        ("openai", "garbage", r"an answer that is no JSON: .*'<html>'", False),
        ("openai", "cut", r"an answer that ends before the text does", True),
        ("openai", "error_event", r"lost the device", True),
    ],
    indirect=["started"],
)
def test_its_failures_are_its_own(
    defect: str, sentence: str, streams: bool, server: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever breaks is one sentence with the address, is asked for once, and the next request works."""
    with open_engine(f"{server.url},timeout={1 if '1 s' in sentence else 60}", MODEL) as engine:
        ids = engine.tokenize(PROMPT)
        server.switch(defect)
        monkeypatch.setattr(link, "LONGEST", 4096)
        with pytest.raises(EngineError, match=sentence) as caught:
            engine.generate(ids, max_tokens=5, on_token=(lambda *_: None) if streams else None)
        assert "\n" not in str(caught.value)
        assert server.url in str(caught.value)
        monkeypatch.undo()
        assert sum("completion" in path for path in server.asked()) == 1
        server.switch()
        assert len(engine.generate(ids, max_tokens=5).ids) == 5


@llama_only
@pytest.mark.parametrize(
    ("defect", "sentence"),
    [("entry_of_another", "which is not among the ids"), ("id_text x", "")],
)
def test_odd_entries_are_of_the_wrong_form(defect: str, sentence: str, server: Started) -> None:
    """Logprobs of an id that was not written belong to nothing; an id written as a text is still that id."""
    server.switch(defect)
    with open_engine(server.url, MODEL) as engine:
        if sentence:
            with pytest.raises(EngineError, match=f"an answer of the wrong form: .*{sentence}"):
                engine.generate([1, 5], max_tokens=3)
        else:
            assert len(engine.generate([1, 5], max_tokens=3).ids) == 3


def test_refusals_keep_their_kind(server: Started) -> None:
    """Too long a prompt and an id outside the vocabulary are what they are, with the server's words."""
    with open_engine(server.url, MODEL) as engine:
        with pytest.raises(ContextLengthExceeded, match=f"maximum context length is {CONTEXT}"):
            engine.generate([5] * CONTEXT, max_tokens=1)
        with pytest.raises(InvalidParameter, match="Prompt contains invalid tokens"):
            engine.generate([1, 99999], max_tokens=1)


@pytest.mark.parametrize(
    ("defect", "sentence"),
    [
        ("moved", "the server sends elsewhere, where no token is sent"),
        ("odd_models", "it describes itself in another form"),
    ],
)
def test_what_is_no_server_of_completions_is_refused(defect: str, sentence: str, server: Started) -> None:
    """What answers otherwise than any dialect is one sentence."""
    server.switch(defect)
    with pytest.raises(EngineError, match=sentence):
        open_engine(server.url, MODEL)


def test_loading_is_waited_for(server: Started) -> None:
    """A server that says it is busy loading is asked again until it is not."""
    server.switch("loading")
    with open_engine(server.url, MODEL) as engine:
        assert engine.info.capabilities
    assert server.asked().count("/health") == 3


def test_a_process_that_was_named_is_watched(server: Started) -> None:
    """`pid=` gives resident memory, threads and descriptors; without it they are missing by name."""
    with open_engine(f"{server.url},pid={server.process.pid}", MODEL) as engine:
        assert isinstance(engine, Remote)
        seen = engine.watched()
        assert seen["resident"] > 1 << 20
        assert min(seen.values()) > 0
    with open_engine(server.url, MODEL) as engine:
        assert isinstance(engine, Remote)
        with pytest.raises(MissingCapability, match="declare it with pid="):
            engine.watched()


@llama_only
def test_a_token_is_sent_and_never_shown(
    server: Started, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The token of the environment reaches the server; no error, output or evidence repeats it, even where
    the server's own words do."""
    secret = "sk-very-secret"
    monkeypatch.setenv(TOKEN, secret)
    server.switch(f"bearer={secret}")
    with open_engine(server.url, MODEL) as engine:
        assert len(engine.generate([1, 5], max_tokens=2).ids) == 2
        server.switch(f"bearer={secret} broken")
        with pytest.raises(EngineError, match=r"out of memory, Bearer \*\*\*") as caught:
            engine.generate([1, 5], max_tokens=2)
        assert secret not in str(caught.value)
    spec = ("--engine", server.url, "--model", MODEL)
    done = child("run", "tokens.greedy", *spec, cwd=tmp_path)
    assert "out of memory" in done.stdout
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert written
    assert not [file for file in written if secret.encode() in file.read_bytes()]
    assert secret not in done.stdout + done.stderr


def test_a_token_that_no_header_can_carry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is sent, and without repeating it."""
    monkeypatch.setenv(TOKEN, "sk-sécret")
    with pytest.raises(UsageError, match="in PRILL_TOKEN: bad token") as caught:
        Link("http://127.0.0.1:1", 1.0)
    assert "cret" not in str(caught.value)


@llama_only
def test_a_text_that_is_no_unicode_is_the_servers_to_refuse(server: Started) -> None:
    """It reaches the server, whose answer is one sentence; the next request works."""
    with open_engine(server.url, MODEL) as engine:
        with pytest.raises(EngineError, match="the connection broke"):
            engine.tokenize("a\ud800b")
        assert engine.tokenize("The")
