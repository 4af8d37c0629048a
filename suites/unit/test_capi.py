"""A C library is driven through its header, judged at its boundary, and blamed by call, signal and kind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prill_harness.engines.channels.lines import error_of, told
from prill_harness.engines.channels.link import Link
from prill_harness.engines.models import resolve_model
from prill_harness.engines.others.capi import abi, build, played
from prill_harness.faults.opening import open_engine
from prill_harness.faults.planted.boundary.library import DEFECTS, VARIABLE
from prill_harness.faults.trial.matrix import claims
from prill_harness.numbers import lanes
from prill_harness.numbers.compare import nmse
from prill_harness.records.evidence import Status
from prill_harness.run.checks import CheckFailed, Observer
from prill_harness.tokens.golden import golden_for
from prill_runtime.errors import (
    EngineError,
    InvalidParameter,
    MissingCapability,
    PrillError,
    ProcessLost,
    Reported,
    UsageError,
)
from prill_runtime.run.model import require_loadable
from prill_suites import boundary, boundary_files
from prill_suites.boundary_play import CallBench, ok, refused

from .test_suites import run

MODEL = "fixture:llama-tiny"
SOURCES = Path(build.__file__).parent
IDS = [1, 5, 9, 3, 200]
CHECKED = {
    name: check for check, names in claims().items() for name in names if check.startswith("boundary.")
}


@pytest.fixture(scope="module")
def library() -> str:
    return str(build.example())


@pytest.fixture
def bench(library: str) -> CallBench:
    return CallBench(Observer(), library, resolve_model(MODEL))


@pytest.mark.parametrize(("compiler", "standard", "suffix"), [("cc", "c11", ".c"), ("c++", "c++17", ".cc")])
def test_the_header_is_plain(compiler: str, standard: str, suffix: str, tmp_path: Path) -> None:
    """It compiles as C11 and as C++17 without a warning, and every function can be named."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    names = ", ".join(f"(void *)prill_{name}" for name in ("abi_version", *abi.FUNCTIONS))
    source = tmp_path / f"uses{suffix}"
    source.write_text(
        f'#include "prill_engine.h"\nvoid *all(int n) {{ void *f[] = {{{names}}}; return f[n]; }}\n'
    )
    words = [compiler, f"-std={standard}", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}", "-c", str(source)]
    done = subprocess.run(
        [*words, "-o", str(tmp_path / "uses.o")], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr


def test_python_has_the_header_s_numbers() -> None:
    """Codes and functions are those of the header, in its order."""
    text = (SOURCES / "prill_engine.h").read_text()
    codes = dict(re.findall(r"PRILL_(\w+) = (\d+)", text))
    assert {name.lower(): int(number) for name, number in codes.items()} == {
        name: number for number, name in enumerate(abi.CODES)
    }
    declared = re.findall(r"^PRILL_EXPORT \w+ prill_(\w+)\(", text, re.MULTILINE)
    assert set(declared) == {"abi_version", *abi.FUNCTIONS}
    assert len(declared) == 14


@pytest.mark.parametrize("model", [MODEL, f"{MODEL}:f32", f"{MODEL}:q8_0", "fixture:llama-long"])
def test_the_example_is_right(model: str) -> None:
    """Its logits are the float64 oracle's within the exact lane, and its greedy text is prill's own."""
    golden = golden_for(model)
    lane = lanes.lane_for(golden.type, "float32")
    with open_engine("capi:example", model) as engine, open_engine("numpy64", model) as oracle:
        assert (
            nmse(oracle.logits(IDS), engine.logits(IDS)) <= lanes.bounds(lane, golden.floors[lane.name]).nmse
        )
        wanted = oracle.generate(IDS, max_tokens=12)
        made = engine.generate(IDS, max_tokens=12)
        assert made.ids == wanted.ids
        assert np.allclose(made.logprobs, wanted.logprobs, atol=1e-3)
        drawn = [engine.generate(IDS, max_tokens=8, temperature=1.0, seed=seed).ids for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
        full = int(engine.info.config["context_length"])
        end = engine.generate([1] * (full - 1), max_tokens=8, ignore_eos=True)
        assert (len(end.ids), end.finish_reason) == (2, "context")


def test_every_defect_is_claimed_by_a_check() -> None:
    """What can be switched on in the C sources is what is catalogued, and some check claims each."""
    text = "".join(file.read_text() for file in SOURCES.glob("*.[ch]"))
    found = {
        name for name in re.findall(r'defect\("(\w+)"\)', text) if name.islower() and name[:7] != "worker_"
    }
    assert found == set(DEFECTS)
    assert {f"library_{name}" for name in DEFECTS} == set(CHECKED)
    assert len(DEFECTS) >= 15


@pytest.mark.parametrize("defect", sorted(DEFECTS))
def test_a_defect_is_found(
    defect: str, library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The check that claims it fails on the library with this defect."""
    monkeypatch.setenv(VARIABLE, defect)
    check = CHECKED[f"library_{defect}"]
    if check in ("boundary.logits", "boundary.allocation"):  # they need more fixtures than a bench
        (evidence,) = run(tmp_path, "boundary", check).values()
        assert evidence.status is Status.FAILED, evidence.sentence
        return
    judge = getattr(boundary, f"test_{check.partition('.')[2]}")
    with pytest.raises(CheckFailed):
        judge(CallBench(Observer(), library, resolve_model(MODEL)))


def test_a_crash_is_told_and_the_rest_is_called(bench: CallBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash is named by signal and call, with a command that crashes alike; later calls are made."""
    monkeypatch.setenv(VARIABLE, "null_handle_crashes")
    steps = [
        refused("model_free", model=0),
        refused("session_free", session=0),
        ok("session_free", session="$s"),
    ]
    bench.play([*bench.opened(), *steps])
    first, second = bench.findings
    assert "model_free(model=0): the process was ended by SIGSEGV" in first["sentence"]
    assert "session_free(session=0)" in second["sentence"]
    assert bench.observe.observed > 3
    again = first["again"].replace("python", sys.executable, 1)
    done = subprocess.run(again, shell=True, capture_output=True, check=False)
    assert done.returncode in (-11, 139)


def test_silence_is_told(library: str) -> None:
    """A call that does not return is given up, and named."""
    steps = [{"call": "session_free", "session": 1}, {"call": "wait", "pause": 60}]
    done = played.played(library, steps, 1.0)
    assert done.ended.endswith("the process gave no answer within 1 s")


def test_what_a_library_prints_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose library writes on the standard output works all the same."""
    monkeypatch.setenv(VARIABLE, "prints")
    with open_engine("capi:example", MODEL) as engine:
        assert engine.logits(IDS).shape[0] == len(IDS)


@pytest.mark.parametrize(
    ("spec", "error", "sentence"),
    [
        ("capi:", UsageError, r"engine spec is incomplete"),
        ("capi:/nowhere/engine.so", UsageError, r"no such library.*got no such file"),
        ("capi:/", UsageError, r"no such library.*got a folder"),
        (f"capi:{__file__}", EngineError, r"the library cannot be loaded"),
        ("capi:libc", EngineError, r"the library exports no prill_abi_version, prill_context_create"),
        (
            "capi:example,options=memory=9999",
            Reported,
            r"^out of memory in .*needed \d+ bytes for .*, 9911 avail",
        ),
        ("capi:example,options=colour=red", InvalidParameter, r"expected memory=BYTES"),
    ],
)
def test_what_is_no_engine_is_refused(spec: str, error: type[PrillError], sentence: str) -> None:
    """One sentence says why a library cannot be used."""
    libc = next((f for f in Path("/lib").rglob("libc.so.6")), Path("/usr/lib/libc.so.6"))
    with pytest.raises(error, match=sentence):
        open_engine(spec.replace(":libc", f":{libc}"), MODEL)


def test_kind_and_sentence_reach_the_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a check records of a library out of memory is its kind and its own sentence."""
    monkeypatch.setattr(sys, "argv", ["prill"])
    ledger = tmp_path / "ledger.jsonl"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--prill-model={MODEL}"]
    words += ["--prill-engine=capi:example,options=memory=9999", f"--prill-ledger={ledger}"]
    file = str(Path(boundary.__file__))
    subprocess.run([*words, "--prill-check=boundary.interface", file], capture_output=True, check=False)
    records = [json.loads(line) for line in ledger.read_text().splitlines()]
    (seen,) = [record for record in records if record["kind"] == "check"]
    assert seen["status"] == "failed"
    assert re.match(r"out of memory in .*: needed \d+ bytes for .*, \d+ available", seen["sentence"])


@pytest.mark.parametrize("kind", abi.CODES[1:])
def test_a_kind_survives_every_way(kind: str, answering: Any) -> None:
    """An error of each kind is of that kind behind JSON lines, and in the body of an answer over HTTP."""
    there = error_of({"kind": kind, "message": "why"}, "x")
    assert told(there) == {"kind": kind, "message": "why"}
    assert there.noun in str(there)
    answering.body = {"error": {"kind": kind, "message": "why"}}
    link = Link(answering.url, 10.0)
    with pytest.raises(type(there), match="why") as caught:
        link.ask("/completion", {})
    link.close()
    assert told(caught.value)["kind"] == kind
    assert getattr(there, "retriable", False) == (kind == "out_of_memory")


@pytest.fixture(scope="module")
def answering() -> Iterator[Any]:
    """A server that answers every request with its `body` and status 500."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.dumps(self.server.body).encode()  # type: ignore[attr-defined]
            self.send_response(500)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *given: Any) -> None:
            pass

    server: Any = HTTPServer(("127.0.0.1", 0), Answer)
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_worker_in_c_speaks_like_the_one_in_python() -> None:
    """Texts, numbers and refusals of the C worker are those of the library behind the Python worker."""
    drawn = {"temperature": 1.0, "seed": 2**63, "top_p": 0.9, "repetition_penalty": 1.2}
    with (
        open_engine(f"exec:{build.worker_command()}", MODEL) as one,
        open_engine("capi:example", MODEL) as two,
    ):
        assert np.array_equal(one.logits(IDS), two.logits(IDS))
        assert one.info.config == two.info.config
        for asked in ({}, drawn):
            a, b = (engine.generate(IDS, max_tokens=9, **asked) for engine in (one, two))  # type: ignore[arg-type]
            assert (a.ids, a.finish_reason) == (b.ids, b.finish_reason)
        for engine in (one, two):
            heard: list[int] = []

            def hear(token: int, logprob: float, heard: list[int] = heard) -> bool:
                heard.append(token)
                return len(heard) < 3

            made = engine.generate(IDS, max_tokens=6, on_token=hear)
            assert (tuple(heard), made.finish_reason) == (made.ids, "cancelled")
            with pytest.raises(MissingCapability, match="strings to stop at"):
                engine.generate(IDS, max_tokens=2, stop=["a"])
            with pytest.raises(InvalidParameter, match=r"-1"):
                engine.logits([-1])


LINES = st.lists(
    st.text(st.characters(exclude_characters="\n\r\0", exclude_categories=["Cs"]), max_size=40)
    | st.text(st.sampled_from('{}[]":, \\1-ids'), max_size=40)
    | st.builds(json.dumps, st.dictionaries(st.sampled_from(["id", "call", "ids", "max_tokens"]),
                                            st.recursive(st.none() | st.integers() | st.text(max_size=9),
                                                         lambda inner: st.lists(inner, max_size=3)))),
    min_size=1, max_size=20,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(lines=LINES)
def test_the_worker_in_c_answers_any_line(lines: list[str]) -> None:
    """Whatever a line holds, the worker answers it with one JSON object and reads the next."""
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run([str(build.worker())], input=text.encode(), capture_output=True, check=False)
    assert done.returncode == 0
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(lines)
    assert all("error" in answer for answer in answers)


def test_the_broken_files_are_broken(tmp_path: Path) -> None:
    """prill's own reader refuses each file that every engine has to refuse, and loads the sound one."""
    model = resolve_model(MODEL)
    require_loadable(model)
    whole, file, count = model.read_bytes(), tmp_path / "broken.gguf", 0
    for defect in boundary_files.broken(model):
        data = bytearray(whole)
        for offset, value in defect.change.get("put", ()):
            data[offset : offset + len(value) // 2] = bytes.fromhex(value)
        assert bytes(data[: defect.change.get("cut", len(data))]) != whole, defect.name
        if defect.strict:
            file.write_bytes(data[: defect.change.get("cut", len(data))])
            with pytest.raises(PrillError):
                require_loadable(file)
            count += 1
    assert count >= 40


def test_the_end_of_a_process_is_told_from_its_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash is a lost process and says so; a refusal is not."""
    monkeypatch.setenv(VARIABLE, "id_unchecked")
    with open_engine(f"exec:{build.worker_command()}", MODEL) as engine:
        with pytest.raises(ProcessLost, match="SIGSEGV") as caught:
            engine.logits([2**31 - 1])
        assert caught.value.crashed
