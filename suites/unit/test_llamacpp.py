"""llama.cpp's own server is judged as any engine is: right where it is, and wrong where it is made so."""

from __future__ import annotations

import json
import re
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import psutil
import pytest

from prill_harness.engines.base import Engine
from prill_harness.faults.opening import open_engine
from prill_harness.records.evidence import Status
from prill_harness.tokens.golden import Golden, golden_for
from prill_harness.tokens.judge import compare_prompt_ids
from prill_harness.tokens.steps import oracle_for
from prill_harness.tokens.verify import Verification, verified

pytest.importorskip("xllamacpp", reason="needs llama.cpp's server: make test-engines installs it")
pytestmark = pytest.mark.engines

SERVER = f"serve:{sys.executable} {Path(__file__).with_name('llamacpp_server.py')} {{model}} {{port}} {{ctx}}"
EXACT = f"{SERVER} float32,arithmetic=float32"
COUNT = 24
WRONG_AT = 9


def some(model: str) -> Golden:
    """The model's golden with three of its prompts."""
    whole = golden_for(model)
    return msgspec.structs.replace(whole, prompts=whole.prompts[:3])


@contextmanager
def read(spec: str, model: str) -> Iterator[tuple[Engine, Verification]]:
    with open_engine(spec, model) as engine, oracle_for(engine) as oracle:
        yield engine, verified(engine, some(model), oracle, COUNT)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_k"])
@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
def test_it_is_right(name: str, kind: str) -> None:
    """Prompt ids, every token and every logprob that it tells are the oracle's within the lane: the exact one
    for Llama in F32 without rounding on purpose, else the type's own. Nothing is left running."""
    model, before = f"fixture:{name}:{kind}", set(psutil.Process().children(recursive=True))
    exact = (name, kind) == ("llama-tiny", "f32")
    with read(EXACT if exact else SERVER, model) as (engine, reading):
        found = [compare_prompt_ids(engine, some(model)), reading.choices(), reading.numbers()]
        assert reading.positions >= 3 * COUNT
    assert [each.status for each in found] == [Status.PASSED] * 3, [each.sentence for each in found]
    assert reading.lane.name == ("exact" if exact else "f16" if kind == "f32" else kind)
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.parametrize(
    ("spec", "model"),
    [
        (f"{SERVER},arithmetic=float32", "fixture:llama-tiny:f32"),  # half-precision caches
        (EXACT, "fixture:gpt2-tiny:f32"),  # GELU is looked up in a table of float16
    ],
)
def test_what_is_not_float32_is_found_not_to_be(spec: str, model: str) -> None:
    """Declared to be float32, what llama.cpp rounds to half precision is found; its tokens are right."""
    with read(spec, model) as (_, reading):
        assert reading.numbers().status is Status.FAILED
        assert reading.choices().status is Status.PASSED


class Proxy(BaseHTTPRequestHandler):
    """Passes everything on, and puts the second best token in one place of every text."""

    protocol_version = "HTTP/1.1"
    behind = ""

    def log_message(self, *_: object) -> None:
        """Write nothing."""

    def do_GET(self) -> None:
        self._pass(None)

    def do_POST(self) -> None:
        self._pass(self.rfile.read(int(self.headers["Content-Length"])))

    def _pass(self, body: bytes | None) -> None:
        with urllib.request.urlopen(urllib.request.Request(self.behind + self.path, body)) as answer:
            said = json.load(answer)
        if self.path == "/completion":
            entry = said["completion_probabilities"][WRONG_AT]
            entry["id"] = said["tokens"][WRONG_AT] = entry["top_logprobs"][1]["id"]
        data = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def test_a_wrong_token_on_the_way_is_found_at_its_place() -> None:
    """A proxy that changes one token of each text is found out at that token, in the choice and not in the
    numbers before it."""
    model = "fixture:llama-tiny:f32"
    with open_engine(EXACT, model) as engine, oracle_for(engine) as oracle:
        handler = type("Own", (Proxy,), {"behind": engine._channel._channel._link.name})  # type: ignore[attr-defined]
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            spec = f"http://127.0.0.1:{proxy.server_port},arithmetic=float32"
            with open_engine(spec, model) as judged:
                found = verified(judged, some(model), oracle, COUNT).choices()
            proxy.shutdown()
    assert found.status is Status.FAILED
    assert re.search(rf"prompt 0, token {WRONG_AT}: expected .*the choice is wrong", found.sentence)
