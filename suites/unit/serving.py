"""The tests' own server in child processes, one of each dialect for a module of tests."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prill_harness.engines.embedded import Embedded
from prill_harness.faults.opening import open_engine

MODEL = "fixture:llama-tiny"
SERVED = Path(__file__).with_name("served.py")
CONTEXT = 512
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Started:
    """A server of the tests' own in a child process."""

    def __init__(self, dialect: str) -> None:
        self.dialect = dialect
        words = [sys.executable, str(SERVED), MODEL, "0", str(CONTEXT), dialect]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{self.process.stdout.readline().strip()}"

    def switch(self, defects: str = "") -> None:
        request = urllib.request.Request(f"{self.url}/defect", json.dumps(defects).encode())
        DIRECT.open(request).close()

    def release(self) -> None:
        """Free a slot that a defect kept."""
        DIRECT.open(urllib.request.Request(f"{self.url}/release", b"0")).close()

    def asked(self) -> list[str]:
        with DIRECT.open(f"{self.url}/asked") as answer:
            return list(json.load(answer))[:-1]


@pytest.fixture(scope="module")
def servers() -> Iterator[Callable[[str], Started]]:
    """The server of a dialect, started when it is first asked for."""
    running: dict[str, Started] = {}

    def of(dialect: str) -> Started:
        return running.setdefault(dialect, running.get(dialect) or Started(dialect))

    yield of
    for server in running.values():
        server.process.kill()
        server.process.wait()


@pytest.fixture(params=["llama", "openai"])
def started(request: pytest.FixtureRequest, servers: Callable[[str], Started]) -> Iterator[Started]:
    """A server of either dialect, or of the one that a test asks for; sound until a test says otherwise."""
    server = servers(str(request.param))
    yield server
    server.switch()


@pytest.fixture(scope="module")
def oracle() -> Iterator[Embedded]:
    with open_engine("numpy64", MODEL) as engine:
        assert isinstance(engine, Embedded)
        yield engine
