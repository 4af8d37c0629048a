"""An engine in another process is watched from outside: what grows there is found, what does not is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from prill_harness.engines.others.capi import build
from prill_harness.leaks.judge import watched
from prill_harness.leaks.reports.report import LeakVerdict, Probe
from prill_runtime.errors import UsageError

from .commandline import child, emitted
from .serving import MODEL, Started, servers

__all__ = ["servers"]

CLASS = """
import os, threading

class Mine:
    arithmetic = "float32"
    kept = []

    def __init__(self, model): pass

    def generate(self, ids, max_tokens, **rest):
        {body}
        return {{"ids": [1] * max_tokens, "logprobs": [0.0] * max_tokens, "finish_reason": "length"}}
"""


def spec_of(tmp_path: Path, body: str) -> str:
    file = tmp_path / "mine.py"
    file.write_text(CLASS.format(body=body))
    return f"exec:{sys.executable} -m prill_harness.engines.channels.worker {file}:Mine"


@pytest.mark.parametrize(
    ("body", "series"),
    [
        ("self.kept.append(os.open(os.devnull, os.O_RDONLY))", "descriptors"),
        ("threading.Thread(target=threading.Event().wait, daemon=True).start()", "threads"),
        ("self.kept.append(b'x' * 100_000)", "resident"),
        ("b'x' * 100_000", ""),
    ],
)
def test_what_grows_in_another_process_is_found(body: str, series: str, tmp_path: Path) -> None:
    """A descriptor, a thread or 100 kB left in each call are a leak, and nothing left is clean."""
    report = watched.probe(Probe(spec_of(tmp_path, body), MODEL), ["success"], "")
    assert report.verdict is (LeakVerdict.LEAK if series else LeakVerdict.CLEAN), report.sentence
    found = {judged.series for judged in report.paths[0].leaks}
    assert series in found if series else not found
    assert report.paths[0].planted


def test_the_error_of_a_dead_process_is_a_finding(tmp_path: Path) -> None:
    """A process that dies in a call is broken, with the signal in the sentence."""
    report = watched.probe(Probe(spec_of(tmp_path, "os.kill(os.getpid(), 9)"), MODEL), ["success"], "")
    assert report.verdict is LeakVerdict.BROKEN
    assert "SIGKILL" in report.sentence


def test_a_probe_that_sees_nothing_is_not_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the control's leak is not found, nothing is called clean."""
    monkeypatch.setattr(watched, "control_seen", lambda wanted: False)
    report = watched.probe(Probe(spec_of(tmp_path, "pass"), MODEL), ["success"], "")
    assert report.verdict is LeakVerdict.INCONCLUSIVE
    assert "was not found" in report.sentence


def test_paths_that_cannot_be_watched_are_refused() -> None:
    """Loading and sessions have no meaning for a process that is there already."""
    with pytest.raises(UsageError, match="success or error or cancel"):
        watched.probe(Probe("capi:example", MODEL), ["load"], "")


def test_a_server_is_watched_by_its_pid(servers: object, tmp_path: Path) -> None:
    """`--pid` names the process of a server; without it nothing is claimed, and no other engine takes it."""
    server: Started = servers("llama.cpp")  # type: ignore[operator]
    words = ["leak", "--engine", f"http:{server.url}", "--model", MODEL, "--path", "error", "--json"]
    done = child(*words, "--pid", str(server.process.pid), cwd=tmp_path)
    report = emitted(done.stdout)
    assert (done.returncode, report["verdict"]) == (0, "clean"), done.stdout + done.stderr
    assert f"pid={server.process.pid}" in report["reproduce"]
    unknown = child(*words, cwd=tmp_path)
    assert unknown.returncode == 10
    refused = child("leak", "--engine", "capi:example", "--model", MODEL, "--pid", "1", cwd=tmp_path)
    assert refused.returncode == 4
    assert "only a server's process" in refused.stderr


def test_the_leaking_worker_is_found_on_the_command_line(tmp_path: Path) -> None:
    """32 KiB in each call of a process are a leak: exit code 1, with the figure."""
    leaky = f"exec:env PRILL_ENGINE_DEFECT=worker_leaks {build.worker_command()}"
    done = child("leak", "--engine", leaky, "--model", MODEL, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "process resident" in done.stdout
