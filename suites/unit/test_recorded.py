"""Answers that an engine gave in another process, and in a file, are judged as the engine is."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prill_harness.engines.others.asked import digest, request
from prill_harness.faults.opening import open_engine
from prill_runtime.errors import ContextLengthExceeded, MissingCapability, UsageError

from .commandline import emitted, invoke

MODEL = "fixture:llama-window"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "RECORDED.md"
ENGINE = """
from dataclasses import asdict
from prill_harness import open_engine

class Engine:
    def __init__(self, model):
        self.inner = open_engine("numpy", model)
        info = self.inner.info
        self.tokenize, self.logits = self.inner.tokenize, self.inner.logits
        self.about = {"name": "far", "arithmetic": "float32", "draws": "philox", "config": dict(info.config)}

    def generate(self, **asked):
        made = asdict(self.inner.generate(**asked))
        return {key: made[key] for key in ("ids", "logprobs", "finish_reason", "end_id")}
"""
Lines = list[dict[str, Any]]


def answered(folder: Path, *names: str) -> tuple[Lines, Lines]:
    """The requests of suites or checks, and what an engine elsewhere answers by the page's script."""
    script = re.search(r"```python\n# answer\.py\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert script is not None
    (folder / "answer.py").write_text(script[1], "utf-8")
    (folder / "my_engine.py").write_text(ENGINE, "utf-8")
    requests = folder / "requests.jsonl"
    result = invoke("requests", "--model", MODEL, *names, "-o", str(requests), "-j", "1")
    assert result.exit_code == 0, result.output
    with requests.open() as asked:
        words = [sys.executable, "answer.py", MODEL]
        done = subprocess.run(words, cwd=folder, stdin=asked, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    written, told = (
        [json.loads(line) for line in text.splitlines()] for text in (requests.read_text(), done.stdout)
    )
    return written, told


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lines, Lines]:
    """Requests and answers of the suite that is asked for by default."""
    return answered(tmp_path_factory.mktemp("far"))


@pytest.fixture
def written(recorded: tuple[Lines, Lines], tmp_path: Path) -> Callable[..., Path]:
    """Writes the answers to a file, after something was changed in their lines, whole requests in each."""

    def write(change: Callable[[Lines], object] = lambda lines: None) -> Path:
        requests, answers = json.loads(json.dumps(recorded))
        lines = [{**asked, **answer} for asked, answer in zip(requests, answers, strict=True)]
        change(lines)
        path = tmp_path / "answers.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        return path

    return write


def judged(path: Path, tmp_path: Path, *names: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit code, and status and sentence by check, of a run of the recorded engine."""
    out = str(tmp_path / "out")
    words = ["run", *names, "--json", "-j", "1", "--out", out, "--model", MODEL]
    result = invoke(*words, "--engine", f"recorded:{path}")
    assert result.exit_code in (0, 1, 10), result.output
    records = emitted(result.stdout)["evidence"]
    return result.exit_code, {each["check"]: (each["status"], each["sentence"]) for each in records}


def test_an_engine_elsewhere_is_green(
    recorded: tuple[Lines, Lines], written: Callable[..., Path], tmp_path: Path
) -> None:
    """Requests that another process answered pass the whole suite, by digest alone or as whole lines."""
    code, found = judged(written(), tmp_path, "tokens")
    assert (code, {status for status, _ in found.values()}) == (0, {"passed"}), found
    assert len(found) == 7
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps(line) + "\n" for line in recorded[1]), "utf-8")
    assert set(recorded[1][1]) == {"digest", "answer"}
    assert judged(bare, tmp_path, "tokens.greedy", "tokens.prompt_ids")[0] == 0


def test_an_engine_without_logits_is_read(tmp_path: Path) -> None:
    """The requests that the page names for it are of texts alone, as often as asked; all are judged."""
    names = ("tokens.prompt_ids", "contract.tokens", "contract.logprobs")
    assert " ".join(names) in " ".join(PAGE.read_text("utf-8").split())
    requests, answers = answered(tmp_path, *names)
    assert {line["call"] for line in requests} == {"hello", "tokenize", "generate"}
    assert {line["repeat"] for line in requests} == {0, 1}
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in answers), "utf-8")
    code, found = judged(path, tmp_path, *names, "contract.streaming")
    assert (code, found.pop("contract.streaming")[0]) == (10, "inconclusive")
    assert {status for status, _ in found.values()} == {"passed"}, found


def of(lines: Lines, call: str, **fields: object) -> Lines:
    return [line for line in lines if line["call"] == call and fields.items() <= line.items()]


def test_a_wrong_token_is_found_at_its_place(written: Callable[..., Path], tmp_path: Path) -> None:
    """One token of one greedy text, exchanged in the file, fails there and nowhere else."""

    def change(lines: Lines) -> None:
        text = of(lines, "generate", temperature=0.0)[1]["answer"]["ids"]
        text[7] ^= 1

    code, found = judged(written(change), tmp_path, "tokens")
    status, sentence = found["tokens.greedy"]
    assert (code, status) == (1, "failed")
    assert sentence.startswith("prompt 1: first divergence at token 7: expected "), sentence
    assert {check for check, (status, _) in found.items() if status == "failed"} == {"tokens.greedy"}


def test_wrong_logits_are_found_at_their_place(written: Callable[..., Path], tmp_path: Path) -> None:
    """A row of logits of another position is a finding of the step that is about logits."""

    def change(lines: Lines) -> None:
        answer = of(lines, "logits")[2]["answer"]
        rows = np.frombuffer(base64.b64decode(answer["base64"]), answer["dtype"])
        rows = rows.reshape(answer["shape"]).copy()
        rows[40] = rows[41]
        answer["base64"] = base64.b64encode(rows.tobytes()).decode()

    code, found = judged(written(change), tmp_path, "tokens")
    assert (code, found["tokens.teacher_forced"][0]) == (1, "failed")
    assert "worst at prompt 2, position 41" in found["tokens.teacher_forced"][1]


DROPPED: dict[str, tuple[str, dict[str, Any], str]] = {
    "tokens.prompt_ids": ("tokenize", {}, r"tokenize of '.*' \(tokenize:\w{32}:\w{32}\) was not recorded"),
    "tokens.teacher_forced": ("logits", {}, r"logits of \d+ ids \(logits:.*\) was not recorded"),
    "tokens.greedy": (
        "generate",
        {"temperature": 0.0},
        r"generate of \d+ ids, 300 tokens \(.*\) was not rec",
    ),
    "tokens.sampled": ("generate", {"seed": 20}, r"generate of \d+ ids, 32 tokens, seed 20 \(.*not recorded"),
}


def test_a_dropped_answer_is_inconclusive_by_name(written: Callable[..., Path], tmp_path: Path) -> None:
    """The last answer of each kind, left out: its check says which, and none fails."""

    def change(lines: Lines) -> None:
        for call, fields, _ in DROPPED.values():
            lines.remove(of(lines, call, **fields)[-1])

    code, found = judged(written(change), tmp_path, "tokens")
    assert code == 10
    for check, (_, _, said) in DROPPED.items():
        assert found[check][0] == "inconclusive"
        assert re.search(said, found[check][1]), found[check][1]
    assert "failed" not in {status for status, _ in found.values()}


def test_a_kind_that_nobody_answered_is_not_offered(written: Callable[..., Path], tmp_path: Path) -> None:
    """Without any logits and without a word of what the engine is, its texts are judged all the same."""

    def change(lines: Lines) -> None:
        lines[:] = [line for line in lines if line["call"] not in ("logits", "hello")]

    path = written(change)
    _, found = judged(
        path, tmp_path, "tokens.teacher_forced", *("tokens.config", "tokens.greedy", "tokens.sampled")
    )
    assert found["tokens.teacher_forced"][0] == found["tokens.config"][0] == "inconclusive"
    assert found["tokens.greedy"][0] == "passed"
    assert "draws numbers of its own" in found["tokens.sampled"][1]
    with open_engine(f"recorded:{path}", MODEL) as engine:
        assert (engine.info.name, engine.info.arithmetic) == ("answers.jsonl", "unknown")


def _doubled(lines: Lines) -> None:
    lines.append(lines[1])


def _of_another_model(lines: Lines) -> None:
    lines[2] |= request("ab" * 32, "tokenize", {"text": "a", "add_special": True})


def _changed(lines: Lines) -> None:
    of(lines, "generate")[0]["max_tokens"] = 5


def _arithmetic(lines: Lines) -> None:
    lines[0]["answer"]["arithmetic"] = "float33"


REFUSED: dict[Any, str] = {
    _of_another_model: "line 3: an answer to another model's request: expected answers of the model",
    _doubled: "a request is answered twice",
    _changed: "the request was changed, or is another one's",
    _arithmetic: "line 1: unknown arithmetic",
    list.clear: "no answer: expected requests",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_cannot_be_judged_is_refused_before_anything_runs(
    change: Any, written: Callable[..., Path], tmp_path: Path
) -> None:
    """Exit code 4 and one sentence with the line, from every command that judges; nothing is written."""
    path = written(change)
    for words in (("run", "tokens"), ("golden", "compare"), ("gate", "contract")):
        out = () if words[0] == "golden" else ("--out", str(tmp_path / "out"))
        result = invoke(*words, *out, "--model", MODEL, "--engine", f"recorded:{path}")
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (4, "", 1), result.output
        assert REFUSED[change] in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["[1, 2]", "{", "null", '{"digest": 5}', '{"digest": "ask:1:2"}', "[" * 99999]
)
def test_lines_that_are_no_requests_are_refused(text: str, tmp_path: Path) -> None:
    """Whatever else stands on a line is one sentence that names the line."""
    path = tmp_path / "answers.jsonl"
    path.write_text(f"\n{text}\n", "utf-8")
    with pytest.raises(UsageError, match=r"line 2: (no JSON|no request's digest)"):
        open_engine(f"recorded:{path}", MODEL)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    """A missing file, a folder, and a spec without a file."""
    for spec in (f"recorded:{tmp_path / 'none'}", f"recorded:{tmp_path}", "recorded:", "asked:"):
        result = invoke("run", "tokens", "--model", MODEL, "--engine", spec, "--out", str(tmp_path / "out"))
        assert (result.exit_code, result.stderr.count("\n")) == (4, 1), result.output


def test_repeats_errors_and_streams(tmp_path: Path) -> None:
    """The n-th time of a request has the n-th answer; a refusal is the engine's; a stream is not shown."""
    with open_engine("numpy", MODEL) as engine:
        sha256 = engine.info.model_sha256
    asked = {"ids": [1, 5], "max_tokens": 2, "stop": [], "ignore_eos": False}
    first, second = (request(sha256, "generate", asked, repeat) for repeat in range(2))
    long = request(sha256, "generate", {**asked, "max_tokens": 9})
    refusal = {"error": {"kind": "context_length_exceeded", "message": "too long"}}
    lines = [
        first | {"answer": {"ids": [7, 8], "finish_reason": "length"}},
        {"digest": second["digest"], "answer": {"ids": [7, 9], "finish_reason": "length"}},
        {**long, **refusal},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    with open_engine(f"recorded:{path}", MODEL) as engine:
        assert [engine.generate([1, 5], max_tokens=2).ids for _ in range(2)] == [(7, 8), (7, 9)]
        with pytest.raises(
            MissingCapability, match=r"2 tokens \(generate:.*\), asked 3 times was not recorded"
        ):
            engine.generate([1, 5], max_tokens=2)
        with pytest.raises(ContextLengthExceeded, match="too long"):
            engine.generate([1, 5], max_tokens=9)
        with pytest.raises(MissingCapability, match="while it is written"):
            engine.generate([1, 5], max_tokens=2, on_token=lambda token, logprob: None)
        with pytest.raises(MissingCapability, match="does not offer logits"):
            engine.logits([1])


ASKED = st.fixed_dictionaries(
    {"ids": st.lists(st.integers(0, 9), max_size=3), "max_tokens": st.integers(0, 9)},
    optional={"temperature": st.sampled_from((0.0, 0.5, 1.0)), "seed": st.integers(0, 2**64 - 1)},
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ASKED, ASKED, st.integers(0, 2), st.integers(0, 2))
def test_a_digest_is_of_what_is_asked(one: Any, other: Any, n: int, m: int) -> None:
    """Equal requests have one digest, in any order of fields, with 1 for 1.0; others have another."""
    a, b = request("ab" * 32, "generate", one, n), request("ab" * 32, "generate", other, m)
    same = {k: v for k, v in a.items() if k != "digest"} == {k: v for k, v in b.items() if k != "digest"}
    assert (a["digest"] == b["digest"]) == same
    turned = {key: int(v) if isinstance(v, float) and v.is_integer() else v for key, v in reversed(a.items())}
    assert digest(turned | {"answer": 5, "took": 0.1}) == a["digest"]
    assert request("cd" * 32, "generate", one, n)["digest"] != a["digest"]
