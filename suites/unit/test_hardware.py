"""The run on hardware: its glue on the CPU, what it keeps, and that nothing passes that was not seen."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prill_harness.engines.base import Engine, EngineInfo, Generation
from prill_harness.records.evidence import Cell, Evidence, Status
from prill_harness.records.ledger import Ledger
from prill_runtime.errors import InvalidParameter

CI = Path(__file__).resolve().parents[2] / "ci"
POLICY = """default = "small"
[gates.small]
checklists = ["foundation"]
minimum_executed = 1
[[gates.small.plan]]
models = ["fixture:llama-tiny"]
engines = ["numpy"]
suites = ["blocks"]
"""


def script(name: str) -> ModuleType:
    """A module of the folder ci."""
    if str(CI) not in sys.path:
        sys.path.insert(0, str(CI))
    return importlib.import_module(name)


accounts, soak, steps = script("hardware_account"), script("soak"), script("hardware_steps")
hardware, sanitizing = script("hardware"), script("hardware_sanitizer")


def job(tmp_path: Path, *options: str) -> Any:
    given = ["--engine", "numpy", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *options]
    made = script("hardware_job").Job(hardware.arguments(given))
    made.deadline = time.monotonic() + 120
    return made


def kept(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]


def test_a_whole_run_on_the_cpu(tmp_path: Path) -> None:
    """Cells, soak, bench and verdict leave results, an account, a ledger and JUnit; what failed is exit 1."""
    (tmp_path / "gates.toml").write_text(POLICY)
    options = ["--policy", str(tmp_path / "gates.toml"), "--steps", "ops,soak,bench,verdict", "--jobs", "1"]
    options += ["--requests", "8", "--cycles", "5", "--bench-model", "fixture:llama-tiny"]
    options += ["--prompt", "8", "--tokens", "16", "--repeat", "1", "--loads", "1", "--commit", "abc"]
    folders = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert hardware.main(["--engine", "numpy", *folders, *options]) == 1
    results = kept(tmp_path)
    statuses = {(r["step"], r["name"]): r["status"] for r in results}
    assert statuses.pop(("verdict", "gate")) == "inconclusive", "one suite does not prove a checklist"
    assert set(statuses) == {
        ("ops", "fixture:llama-tiny/numpy/blocks/cpu"),
        ("soak", "requests"),
        ("soak", "cycles"),
        ("bench", "numpy, fixture:llama-tiny"),
    }
    assert statuses["ops", "fixture:llama-tiny/numpy/blocks/cpu"] == "passed"
    timed = next(r for r in results if r["step"] == "bench")
    assert "decode " in timed["sentence"] or "took no longer" in timed["sentence"]  # a machine may be busy
    told = [r["sentence"] for r in results if r["step"] == "soak"]
    assert " refusals" in told[0]
    assert " loads and unloads" in told[1]
    assert results[0]["sentence"] == "17 of 17 checks passed"
    assert results[0]["figures"]["observed"] > 10_000
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written | {"bench.jsonl"} == {
        "account.md", "results.jsonl", "bench.jsonl", "ledger.jsonl", "junit.xml", "verdict.json",
    }  # fmt: skip
    page = (tmp_path / "out/account.md").read_text()
    assert "| ops | passed | 1 passed |" in page
    assert ("| numpy, fixture:llama-tiny | " in page) == (timed["status"] == "passed")
    assert "--steps ops,soak,bench,verdict" in page


def test_a_step_without_time_has_not_passed(tmp_path: Path) -> None:
    """Processes are ended with their children, and what they did not do is a timeout by name."""
    (tmp_path / "gates.toml").write_text(POLICY)
    made = job(tmp_path, "--policy", str(tmp_path / "gates.toml"), "--requests", "5", "--cycles", "5")
    made.deadline = 0.0
    for step, parts in (("ops", "1 cells"), ("soak", "2 parts")):
        results = list(steps.STEPS[step](made))
        assert [(r.name, r.status) for r in results] == [(parts, "timeout")]
        assert made.timed_out
        assert made.code != 0
    (result,) = steps.bench(job(tmp_path, "--bench-model", "no such file.gguf"))
    assert (result.status, "no such file" in result.sentence) == ("error", True)


def test_a_step_that_breaks_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception is a result of its step; the next step still runs, and both stand on the disk."""

    def broken(made: Any) -> Any:
        raise RuntimeError("the cable was pulled")

    def fine(made: Any) -> Any:
        assert len(kept(tmp_path)) == 1, "the result before is on the disk already"
        yield accounts.Result("bench", "it", "passed", "seen")

    monkeypatch.setitem(steps.STEPS, "ops", broken)
    monkeypatch.setitem(steps.STEPS, "bench", fine)
    folders = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert hardware.main([*folders, "--steps", "ops,bench"]) == 1
    assert [(r["step"], r["status"]) for r in kept(tmp_path)] == [("ops", "error"), ("bench", "passed")]
    assert "the cable was pulled" in (tmp_path / "out/account.md").read_text()


@pytest.mark.parametrize("options", [["--steps", "opps"], ["--seconds", "ops"], ["--seconds", "x=3"]])
def test_wrong_options_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Unknown steps and times are said, with the steps there are."""
    with pytest.raises(SystemExit):
        hardware.arguments(["--out", "x", *options])
    assert "goldens" in capsys.readouterr().err


# the sanitizer


def test_no_sanitizer_and_no_gpu_prove_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine without kernels on a GPU is inconclusive; a tool that is absent is missing."""
    assert {r.status for r in steps.sanitizer(job(tmp_path))} == {"inconclusive"}
    monkeypatch.setenv("PATH", "")
    made = job(tmp_path)
    made.asked.engine = ["cuda", "cuda:fast"]
    results = list(steps.sanitizer(made))
    named = [f"{engine}, {tool}" for engine in made.asked.engine for tool in sanitizing.TOOLS]
    assert [(r.name, r.status) for r in results] == [(name, "missing") for name in named]


CLEAN = "========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    ("texts", "statuses", "expected"),
    [
        ((CLEAN, CLEAN), ["passed", "passed"], "passed"),
        (
            (CLEAN, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"),
            ["passed"] * 2,
            "passed",
        ),
        ((CLEAN, "========= ERROR SUMMARY: 3 errors\n"), ["passed", "passed"], "failed"),
        (("========= RACECHECK SUMMARY: 1 hazard displayed\n", CLEAN), ["passed", "passed"], "failed"),
        ((CLEAN, CLEAN), ["passed", "failed"], "failed"),
        ((CLEAN, CLEAN), ["passed"], "error"),
        ((CLEAN, ""), ["passed", "passed"], "error"),
        (("", ""), [], "error"),
    ],
)
def test_a_sanitizer_is_clean_only_when_it_said_so(
    tmp_path: Path, texts: tuple[str, str], statuses: list[str], expected: str
) -> None:
    """Nought counted in every shard and every check seen to pass under it; a lost check or log is no pass."""
    made, planned = job(tmp_path), ["ops.0", "ops.1"]
    group = [sanitizing.Shard("memcheck", "cuda", (name,), made.work / name) for name in planned]
    for number, (shard, text) in enumerate(zip(group, texts, strict=True)):
        Path(f"{shard.stem}.txt").write_text(text)
        with Ledger(Path(f"{shard.stem}.jsonl")) as file:
            for status in statuses[number : number + 1]:
                cell = Cell("m", "cuda", "ops")
                file.append(Evidence(f"ops.{number}", "", cell, Status(status), 1, "s", "twin", ("f",), "r"))
    result = sanitizing.summed(made, "cuda", "memcheck", group, planned, 1.0)
    assert result.status == expected
    assert all(text.strip() in (tmp_path / "out/sanitizer.txt").read_text() for text in texts)


def test_every_check_is_in_one_shard(tmp_path: Path) -> None:
    """As many shards as there are checks at most, none of them empty."""
    for count in (1, 3, 7, 29):
        planned = [f"ops.{n}" for n in range(count)]
        dealt = sanitizing.shards(job(tmp_path), "cuda:fast", "racecheck", planned)
        assert sorted(itertools.chain(*(shard.checks for shard in dealt))) == sorted(planned)
        assert all(shard.checks for shard in dealt)
        assert len({shard.stem for shard in dealt}) == len(dealt) == min(count, sanitizing.SHARDS)


TOOL = """#!/bin/sh
while [ "$1" != --log-file ]; do shift; done
echo "========= ERROR SUMMARY: 0 errors" > "$2"
while [ "${1##*python*}" ]; do shift; done
exec "$@"
"""


def test_shards_run_side_by_side_and_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretended tool that finds nothing, and the real op suite in three processes on the CPU."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizing.shutil, "which", lambda name: str(tool))
    monkeypatch.setattr(sanitizing, "SHARDS", 3)
    monkeypatch.setattr(sanitizing, "TOOLS", ("racecheck",))
    real = sanitizing.Shard.words

    def on_the_cpu(shard: Any, program: str, model: str) -> list[str]:
        return ["numpy" if word == "cuda" else word for word in real(shard, program, model)]

    monkeypatch.setattr(sanitizing.Shard, "words", on_the_cpu)
    made = job(tmp_path, "--jobs", "2")
    made.asked.engine = ["cuda"]
    (result,) = steps.sanitizer(made)
    assert (result.name, result.status) == ("cuda, racecheck", "passed"), result.sentence
    assert result.sentence == "0 errors under 32 checks"
    made.deadline = 0.0
    monkeypatch.setattr(sanitizing, "checks_of", lambda job: ("ops.add", "ops.rope"))
    (late,) = steps.sanitizer(made)
    assert (late.status, "before the time was over" in late.sentence) == ("timeout", True)


# soak


@pytest.mark.parametrize(
    ("readings", "words"),
    [
        ([{"cache": 5}] * 6, []),
        ([{"cache": 5}] * 5 + [{"cache": 6}], ["cache is +1 bytes off its idle 5"]),
        ([{"cache": 5}] * 5 + [{}], ["cache is -5 bytes off"]),
        ([{"process": n} for n in (1, 2, 3, 4, 5, 6)], ["process grew in all 5 windows, by 5 bytes"]),
        ([{"process": n} for n in (1, 2, 2, 4, 5, 6)], []),
        ([{"process": n} for n in (1, 2, 3)], []),
        ([{"gpu": n, "weights": 3} for n in range(6)], ["gpu grew"]),
    ],
)
def test_own_ledgers_are_exact_and_the_systems_have_windows(
    readings: list[dict[str, int]], words: list[str]
) -> None:
    """One byte of the engine's own counts; the system's memory only when no window stood still."""
    problems = soak.judge(readings)
    assert len(problems) == len(words)
    assert all(word in problem for word, problem in zip(words, problems, strict=True))


@given(st.lists(st.integers(0, 9), min_size=6, max_size=6))
def test_a_window_that_did_not_grow_clears_the_process(values: list[int]) -> None:
    """Whatever the readings: a leak is suspected exactly when each is above the one before."""
    strictly = all(a < b for a, b in itertools.pairwise(values))
    assert bool(soak.judge([{"process": v} for v in values])) == strictly


class Leaky(Engine):
    """Answers everything; keeps `leak` bytes of every eighth request. `strict`: refuses what must be."""

    def __init__(self, leak: int = 0, strict: bool = True, counts: bool = True) -> None:
        self.leak, self.strict, self.counts = leak, strict, counts
        self.requests, self.held = 0, 1000

    @property
    def info(self) -> EngineInfo:
        config = {"vocab_size": 50, "context_length": 64}
        return EngineInfo("leaky", "1", "cpu", "m", "", "float32", frozenset(), config)

    def generate(self, ids: Sequence[int], *, max_tokens: int, **rest: Any) -> Generation:
        self.requests += 1
        self.held += self.leak if self.requests % 8 == 0 else 0
        if self.strict and (len(ids) > 64 or max(ids) >= 50):
            raise InvalidParameter("not this")
        return Generation((1,) * max_tokens, (0.0,) * max_tokens, "length")

    def memory(self) -> dict[str, int]:
        return {"cache": self.held} if self.counts else {}


@pytest.mark.parametrize(
    ("engine", "status", "words"),
    [
        (Leaky(), "passed", "60 answers, 20 refusals: cache idle to the byte"),
        (Leaky(leak=16), "failed", "cache is +"),
        (Leaky(strict=False), "failed", "requests that {'accepted': 20}"),
    ],
)
def test_requests_come_back_to_idle_or_fail(
    engine: Leaky, status: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 bytes of every eighth request, and a bad prompt that was accepted, are found."""
    monkeypatch.setattr(soak, "open_engine", lambda spec, model: engine)
    monkeypatch.setattr(soak, "system", lambda: {"process": 7})
    line = soak.requests("it", "m", 80)
    assert (line["name"], line["status"]) == ("requests", status)
    assert words in line["sentence"]


def test_a_suspicion_is_followed_by_twice_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process grew in five windows, and not in the next five: no leak, after three times the requests."""
    engine, readings = Leaky(), iter([1, 2, 3, 4, 5, 6, *[6] * 6])
    monkeypatch.setattr(soak, "open_engine", lambda spec, model: engine)
    monkeypatch.setattr(soak, "system", lambda: {"process": next(readings)})
    line = soak.requests("it", "m", 40)
    assert (line["status"], "90 answers, 30 refusals" in line["sentence"]) == ("passed", True)


def test_loads_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed engine that still counts bytes fails; one that counts nothing, on such a system, says so."""
    monkeypatch.setattr(soak, "system", lambda: {"process": 7})
    monkeypatch.setattr(soak, "open_engine", lambda spec, model: Leaky())
    assert "closed engines still count {'cache': 10000}" in soak.cycles("it", "m", 10)["sentence"]
    monkeypatch.setattr(soak, "open_engine", lambda spec, model: Leaky(counts=False))
    assert soak.cycles("it", "m", 10)["status"] == "passed"
    assert "2 windows decide nothing" in soak.cycles("it", "m", 2)["sentence"]
    monkeypatch.setattr(soak, "system", dict)
    line = soak.cycles("it", "m", 10)
    assert (line["status"], "no memory was counted" in line["sentence"]) == ("inconclusive", True)


# the account


def test_goals_are_reached_or_missed_by_a_figure() -> None:
    """Rates must be as high, loading as short; a figure that is not there is not reached."""
    rows = {"decode": 190.0, "prompt": 16_000.0, "open": 12.0}
    judged = accounts.against_goals("synth:llama-8b:q8_0", rows)
    assert {name: reached for name, _, _, reached in judged} == {
        "decode": False, "prompt": True, "open": False,
    }  # fmt: skip
    assert accounts.told(*judged[0]) == "decode 190 of 380 tokens/s, missed by 50%"
    assert accounts.told(*judged[1]) == "prompt 16,000 of 16,000 tokens/s, reached"
    assert accounts.told(*judged[2]) == "open 12 of 10 s, missed by 20%"
    ((name, value, goal, reached),) = accounts.against_goals("synth:llama-1b:f16", {})
    assert (name, math.isnan(value), reached) == ("decode", True, False)
    assert "not measured" in accounts.told(name, value, goal, reached)
    assert accounts.against_goals("another", rows) == []


def test_the_worst_of_nothing_is_inconclusive() -> None:
    """A step without results has not passed."""
    assert accounts.worst([]) == "inconclusive"
    assert accounts.worst(["passed", "missing", "passed"]) == "missing"
    assert accounts.worst(["inconclusive", "timeout", "failed"]) == "failed"
