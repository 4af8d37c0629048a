"""Allocations of an engine's own process fail in turn: a sound one refuses and goes on, others are found."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from prill_harness.engines.others.capi import build
from prill_harness.leaks.judge import starved
from prill_harness.leaks.reports.report import LeakVerdict, Probe
from prill_runtime.errors import Inconclusive, UsageError

from .commandline import child, emitted, invoke
from .serving import MODEL

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloads a library")
CALLER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int count, char **words)
{
    const char *way = words[1];
    char line[4096];
    int poor = 0;
    while (fgets(line, sizeof line, stdin)) {
        int id = 0, hello = strstr(line, "\"hello\"") != NULL;
        sscanf(line, "{\"id\": %d", &id);
        char *block = hello || !strcmp(way, "asks for nothing") ? line : malloc(64);
        if (!block && !strcmp(way, "dies"))
            block[0] = 1;
        if (!block && !strcmp(way, "ends"))
            exit(3);
        poor = !block || (poor && !strcmp(way, "stays poor"));
        if (hello)
            printf("{\"id\": %d, \"result\": {\"name\": \"c\", \"calls\": [\"generate\"]}}\n", id);
        else if (poor && (!strcmp(way, "refuses") || !strcmp(way, "stays poor")))
            printf("{\"id\": %d, \"error\": {\"kind\": \"out_of_memory\", \"message\": \"no block\"}}\n", id);
        else
            printf("{\"id\": %d, \"result\": {\"ids\": [1, 2, 3, %d], \"finish_reason\": \"length\"}}\n", id,
                   poor && !strcmp(way, "writes another text") ? 5 : !strcmp(way, "never twice") ? id : 4);
        fflush(stdout);
        if (block && block != line)
            free(block);
    }
    return count - 2;
}
"""
FOUND = {
    "refuses": (LeakVerdict.CLEAN, "0 requests were answered all the same, the others refused"),
    "makes it good": (LeakVerdict.CLEAN, "1 requests were answered all the same"),
    "writes another text": (LeakVerdict.BROKEN, "at allocation 1 another text is written without a word"),
    "dies": (LeakVerdict.BROKEN, "the process was ended by SIGSEGV"),
    "ends": (LeakVerdict.BROKEN, "ended with exit status 3"),
    "stays poor": (LeakVerdict.BROKEN, "at allocation 1 the next request fails: "),
    "asks for nothing": (LeakVerdict.INCONCLUSIVE, "makes no allocation that could be failed"),
}
"""What the program does when it has no block -> what is said of it."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("starved")
    (folder / "caller.c").write_text(CALLER)
    subprocess.run(["cc", "-O1", "-o", "caller", "caller.c"], cwd=folder, check=True)
    return shlex.quote(str(folder / "caller"))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control was found: it is judged by itself, and takes a second."""
    whole = starved.walk

    def walk(engine: str, *rest: object) -> starved.StarvedWalk:
        return starved.StarvedWalk(1, 1, findings=["it dies"]) if "DEFECT" in engine else whole(engine, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(starved, "walk", walk)


@pytest.mark.parametrize("way", FOUND)
def test_what_becomes_of_a_failed_allocation_is_told(way: str, program: str, seen: None) -> None:
    """Refused or made good, and right again: clean. Dead, over, silently another text, or broken for the next
    request: a finding with the allocation. Nothing to fail: nothing is claimed."""
    report = starved.probe(Probe(f"exec:{program} '{way}'", MODEL), "")
    verdict, sentence = FOUND[way]
    assert (report.verdict, sentence in report.sentence) == (verdict, True), report.sentence
    assert way == "asks for nothing" or "1 of the 1 allocations of a request failed" in report.sentence


def test_a_text_that_is_never_the_same_decides_nothing(program: str) -> None:
    """What differs by itself is no finding."""
    with pytest.raises(Inconclusive, match="one request has two texts"):
        starved.walk(f"exec:{program} 'never twice'", MODEL, 5, 60)


def test_an_interpreter_is_not_blamed_for_its_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a process with Python in it blocks of a page and more fail, and what dies may be NumPy."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import os\n"
        "class Mine:\n"
        "    def __init__(self, model): pass\n"
        "    def generate(self, ids, max_tokens, **rest):\n"
        "        try:\n"
        "            for _ in range(8):\n"
        "                bytearray(1 << 20)\n"
        "        except MemoryError:\n"
        "            os.abort()\n"
        "        return {'ids': [1] * max_tokens, 'finish_reason': 'length'}\n"
    )
    spec = f"exec:{sys.executable} -m prill_harness.engines.channels.worker {file}:Mine"
    walked = starved.walk(spec, MODEL, 10, 60)
    assert sum("SIGABRT" in finding for finding in walked.findings) >= 4
    monkeypatch.setattr(starved, "walk", lambda *_: walked)
    report = starved.probe(Probe(spec, MODEL), "")
    assert report.verdict is LeakVerdict.INCONCLUSIVE
    assert "allocations of 4096 bytes and more" in report.sentence
    assert report.sentence.endswith("NumPy dies of a buffer that it lacks")


def test_a_walk_that_sees_nothing_claims_nothing(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the worker that dies of it is not found, nothing is called clean."""
    monkeypatch.setattr(starved, "walk", lambda *_: starved.StarvedWalk(3, 3))
    report = starved.probe(Probe(f"exec:{program} refuses", MODEL), "")
    assert report.verdict is LeakVerdict.INCONCLUSIVE
    assert "was not found" in report.sentence


def test_the_example_worker_survives_every_failure_and_its_defect_none(tmp_path: Path) -> None:
    """On the command line: the sound worker is clean, with the control found; unchecked, it is broken."""
    worker = build.worker_command()
    words = ["leak", "--model", MODEL, "--path", "allocation", "--json", "--engine"]
    sound = child(*words, f"exec:{worker}", cwd=tmp_path)
    report = emitted(sound.stdout)
    assert (sound.returncode, report["verdict"], report["paths"][0]["planted"]) == (0, "clean", True)
    assert "--path allocation" in report["reproduce"]
    walked = starved.walk(f"exec:env PRILL_ENGINE_DEFECT=allocation_unchecked {worker}", MODEL, 20, 60)
    assert any("SIGSEGV" in finding for finding in walked.findings)


@pytest.mark.parametrize(
    "engine", ["numpy", "capi:example", "http://localhost:9", "exec:cat {prompt},adapter=text"]
)
def test_other_engines_are_refused(engine: str) -> None:
    """One sentence for what prill does not start by a command, or starts anew for each text."""
    with pytest.raises(UsageError, match="only in a process that is started by a command, and stays"):
        starved.probe(Probe(engine, MODEL), "")
    done = invoke("leak", "--engine", "numpy", "--model", MODEL, "--path", "allocation")
    assert done.exit_code == 4


@pytest.mark.parametrize(("count", "most"), [(5, 200), (200, 200), (1000, 7), (3, 2)])
def test_the_failed_ones_are_spread_over_all(count: int, most: int) -> None:
    """The first, the last, no more than asked for, each once."""
    found = list(starved.spread(count, most))
    assert found == sorted(set(found))
    assert (found[0], found[-1], len(found)) == (1, count, min(count, most))
