"""ci/fault_gates.py: gates of a converted gpt-oss file are red by the stage that a fault is blamed on."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prill_harness.faults.catalogue import catalogue

from .converted import FILE
from .test_converted import MISTAKES

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "ci"))
script: Any = importlib.import_module("fault_gates")


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for all, so that the golden is recorded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("fault", ["sinks_left_out", "close_experts_exchanged"])
@pytest.mark.usefixtures("cached")
def test_a_gate_is_red_by_the_stage(fault: str) -> None:
    """A whole gate, of its plan's three suites, on the file of the public converter's making."""
    said = script.gate(FILE, fault)
    assert (said.word, said.exit_code, said.check) == ("red", 1, "stages.early")
    assert said.stage.rpartition(".")[2] in catalogue()[fault].blames


@pytest.mark.usefixtures("cached")
def test_the_engine_itself_fails_nothing() -> None:
    """Green, or stale where the kills on record were seen with other code of the checks."""
    said = script.gate(FILE, "")
    assert (said.word, said.exit_code) in {("green", 0), ("stale", 10)}


def test_every_fault_is_gated_that_is_gpt_osss_own() -> None:
    """Those that bisect is tried on are among them, but for three of any model, and many more."""
    names = {fault.name for fault in script.shown_by(FILE)}
    anywhere = {"window_off_by_one", "softmax_with_sink", "mxfp4_nibbles_interleaved"}
    assert names >= set(MISTAKES) - anywhere
    assert not names & anywhere
    assert len(names) >= 54


def verdict(*checks: tuple[str, str, str]) -> dict[str, Any]:
    """A verdict with these checks, status and sentence of each."""
    keys = ("check", "status", "sentence")
    return {"checks": [dict(zip(keys, each, strict=True)) for each in checks], "exit_code": 1, "rules": []}


OTHER = "blk.1.q is the first wrong stage: NMSE 1"
FIRST = "blk.1.attn is the first wrong stage: NMSE 1"


@pytest.mark.parametrize(
    ("checks", "exit_code", "word"),
    [
        ([("stages.early", "failed", FIRST)], 1, "red"),
        ([("stages.late", "failed", FIRST)], 1, "red"),
        ([("stages.early", "failed", FIRST)], 10, "other"),
        ([("stages.early", "failed", OTHER)], 1, "other"),
        ([("stages.late", "failed", FIRST), ("stages.early", "failed", OTHER)], 1, "other"),
        ([("tokens.teacher_forced", "failed", "regressed")], 1, "other"),
        ([("stages.early", "passed", FIRST)], 0, "quiet"),
        ([("stages.early", "inconclusive", FIRST)], 10, "quiet"),
    ],
)  # fmt: skip
def test_red_is_a_failure_by_the_right_stage(checks: list[Any], exit_code: int, word: str) -> None:
    """The early stages say which comes first; a check that did not fail says nothing."""
    assert script.judged("window_off_by_one", ("attn",), exit_code, verdict(*checks)).word == word


def said(**words: str) -> list[Any]:
    return [script.Said(fault.removeprefix("engine"), word, 1, "", "") for fault, word in words.items()]


@pytest.mark.parametrize(
    ("words", "otherwise", "code"),
    [
        ({"a": "red", "engine": "green"}, {}, 0),
        ({"a": "red", "engine": "stale"}, {}, 10),
        ({"a": "red", "engine": "alarm"}, {}, 1),
        ({"a": "red", "engine": "broken"}, {}, 1),
        ({"a": "quiet", "engine": "green"}, {}, 1),
        ({"a": "quiet", "engine": "green"}, {"a": "quiet"}, 0),
        ({"a": "red", "engine": "green"}, {"a": "quiet"}, 1),
        ({"a": "other", "b": "red", "engine": "green"}, {}, 1),
        ({"a": "broken", "engine": "stale"}, {}, 1),
        ({"engine": "green"}, {}, 1),
    ],
)
def test_the_exit_code_is_that_of_the_worst(
    words: dict[str, str], otherwise: dict[str, str], code: int
) -> None:
    """Every fault red or as was declared, none red that was not, and at least one; the engine green."""
    assert script.code(said(**words), otherwise) == code
