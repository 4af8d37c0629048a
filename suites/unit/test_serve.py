"""Servers are reached where they come up late, trusted by certificate, started, watched and ended."""

from __future__ import annotations

import shutil
import signal
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from prill_harness.engines.channels import link
from prill_harness.engines.channels.link import Link
from prill_harness.engines.channels.serve import free_port
from prill_harness.engines.remote import Remote
from prill_harness.faults.opening import open_engine
from prill_runtime.errors import EngineError, MissingCapability

from .serving import MODEL, SERVED

SERVE = f"serve:{sys.executable} -m served {{model}} {{port}} {{ctx}}"


class Quiet(BaseHTTPRequestHandler):
    """Answers every GET with an empty object."""

    def log_message(self, *_: object) -> None:
        """Write nothing."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")


def test_a_refused_connection_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that comes up between two tries is reached; one that never does is one sentence."""
    port, servers = free_port(), list[ThreadingHTTPServer]()

    def comes_up(_: float) -> None:
        if len(servers) == 0:
            servers.append(ThreadingHTTPServer(("127.0.0.1", port), Quiet))
            threading.Thread(target=servers[0].serve_forever, daemon=True).start()

    monkeypatch.setattr(link.time, "sleep", comes_up)
    reached = Link(f"http://127.0.0.1:{port}", 10.0)
    assert reached.ask("/health") == {}
    assert len(servers) == 1
    reached.close()
    servers[0].shutdown()
    servers[0].server_close()
    waited: list[float] = []
    monkeypatch.setattr(link.time, "sleep", waited.append)
    with pytest.raises(EngineError, match=r"cannot connect: expected a server that listens, got .*refused"):
        open_engine(f"http://127.0.0.1:{free_port()}", MODEL)
    assert waited == list(link.REFUSED)


def test_certificates_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate counts when SSL_CERT_FILE vouches for it; without, nothing is asked of its server."""
    openssl = shutil.which("openssl")
    assert openssl is not None, "this test needs the command openssl"
    words = f"{openssl} req -x509 -newkey rsa:2048 -nodes -keyout key -out cert -days 2 -subj /CN=localhost"
    subprocess.run(
        [*words.split(), "-addext", "subjectAltName=DNS:localhost"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"https://localhost:{server.server_port}"
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert"))
        trusting = Link(url, 10.0)
        assert trusting.ask("/health") == {}
        trusting.close()
        monkeypatch.delenv("SSL_CERT_FILE")
        doubting = Link(url, 10.0)
        with pytest.raises(EngineError, match=r"cannot connect: .*[Cc]ertificate"):
            doubting.ask("/health")
        doubting.close()
        server.shutdown()


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SERVED.parent))


@pytest.mark.usefixtures("importable")
def test_a_server_is_started_watched_and_ended(tmp_path: Path) -> None:
    """With the model, a free port and the file's context; its log is kept, its death told by signal and last
    words, and nothing is left running."""
    log = tmp_path / "server.log"
    before = set(psutil.Process().children())
    with open_engine(f"{SERVE} llama,log={log}", MODEL) as engine:
        assert isinstance(engine, Remote)
        assert engine.info.config["served_context"] == 1024
        assert engine.tokenize("The quick")[0] == 1
        (process,) = set(psutil.Process().children()) - before
        assert engine.watched()["resident"] > 1 << 20
        process.send_signal(signal.SIGSEGV)
        with pytest.raises(EngineError, match=r"the server was ended by SIGSEGV; it wrote: \d+"):
            engine.tokenize("The")
        with pytest.raises(MissingCapability, match=r"the process of engine llama.cpp cannot be read"):
            engine.watched()
    engine.close()
    with pytest.raises(EngineError, match="engine is closed"):
        engine.tokenize("The")
    assert not process.is_running()
    assert log.read_text().strip().isdecimal()


@pytest.mark.usefixtures("importable")
def test_children_of_a_server_end_with_it() -> None:
    """A server behind a shell is ended with the shell; `ctx=` goes before the file's context."""
    before = set(psutil.Process().children(recursive=True))
    script = f"{sys.executable} -m served $0 $1 $2 openai & echo started; wait"
    with open_engine(f"serve:sh -c '{script}' {{model}} {{port}} {{ctx}},ctx=99", MODEL) as engine:
        assert engine.info.config["served_context"] == 99
        family = set(psutil.Process().children(recursive=True)) - before
        assert len(family) == 2
    assert not [member for member in family if member.is_running()]


@pytest.mark.usefixtures("importable")
def test_death_before_health_is_one_sentence() -> None:
    """With its status and the last lines that it wrote."""
    before = set(psutil.Process().children())
    with pytest.raises(
        EngineError, match=r"the server ended with exit status 3; it wrote: no such device \| giving up"
    ):
        open_engine(f"{SERVE} dead", MODEL)
    assert set(psutil.Process().children()) <= before
