"""How a gate that fails ends: the cause of its failures, how to see it again, and where to look next."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from prill_harness.commands.shared.verdicts import read_verdict
from prill_harness.decide import rootcause
from prill_harness.records.evidence import Cell, Evidence, Status
from prill_harness.records.verdict import CheckResult, LeadResult

from .commandline import child

MODEL, ENGINE = "my.gguf", "numpy"
WRONG = "blk.0.q_rope is the first wrong stage: NMSE 1.5, at most 1e-11"


def failed(check: str, sentence: str = "wrong", engine: str = ENGINE, **more: Any) -> Evidence:
    cell = Cell("m", engine, check.partition(".")[0])
    return Evidence(
        check, "", cell, Status.FAILED, 3, sentence, "the oracle", ("x",), f"prill run {check}", **more
    )


@pytest.mark.parametrize(
    ("checks", "guilty", "following"),
    [
        (("cache.size", "stages.early", "tokens.greedy"), "stages.early", "bisect"),
        (("stages.late", "tokens.late_positions"), "stages.late", "bisect"),
        (("tokens.teacher_forced",), "tokens.teacher_forced", "bisect"),
        (("ops.rope", "tokens.teacher_forced"), "ops.rope", "bisect"),
        (("sampler.filters[3]",), "sampler.filters[3]", "explain sampler.filters"),
        (("stages.early", "file.weights"), "file.weights", "explain file.weights"),
        (("memory.success", "cache.size"), "memory.success", "leak"),
        (("harness.bounds", "stages.early"), "harness.bounds", "explain harness.bounds"),
        (("boundary.freed", "process.requests"), "boundary.freed", "explain boundary.freed"),
    ],
)
def test_the_cause_comes_first_in_the_walk_of_data(
    checks: tuple[str, ...], guilty: str, following: str
) -> None:
    """Whatever order the failures have, the one is named that explains the others, with its own commands."""
    for order in (checks, checks[::-1]):
        seen = [failed(name, WRONG if name.startswith("stages") else "wrong") for name in order]
        cause = rootcause.find(seen, {"m": MODEL}, ask=False)
        assert cause is not None
        assert (cause.check, cause.reproduce) == (guilty, f"prill run {guilty}")
        assert cause.following.startswith(f"prill {following}")
        if following in ("bisect", "leak"):
            assert f"--engine {ENGINE} --model {MODEL}" in cause.following


def test_late_mistakes_are_looked_for_late() -> None:
    """What is right on the first 64 positions is not looked for there alone."""
    cause = rootcause.find([failed("stages.late", WRONG)], {}, ask=False)
    assert cause is not None
    assert cause.following.endswith("--tokens 300")


def test_engines_are_not_mixed_up() -> None:
    """The failures of another engine explain nothing of the first one's."""
    seen = [failed("tokens.greedy"), failed("file.weights", engine="other")]
    cause = rootcause.find(seen, {}, ask=False)
    assert cause is not None
    assert "--engine numpy" in cause.following


def test_nothing_failed_has_no_cause() -> None:
    assert rootcause.find([], {}) is None


@pytest.mark.parametrize("end", ["late", "agrees", "broke", "unopened"])
def test_a_bisect_that_cannot_tell_leaves_the_failure(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """Late, agreeing, broken or not opened: the failed check's own sentence is the cause that is said."""

    def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        assert options["timeout"] <= rootcause.LIMIT_S
        if end == "late":
            raise subprocess.TimeoutExpired(words, options["timeout"])
        codes = {"agrees": 0, "broke": 3, "unopened": 1}
        return subprocess.CompletedProcess(words, codes[end], b"", b"")

    monkeypatch.setattr(subprocess, "run", run)
    cause = rootcause.find([failed("stages.early", WRONG)], {"m": MODEL})
    assert cause is not None
    assert cause.sentence == f"stages.early: {WRONG}"
    assert cause.following == f"prill bisect --engine numpy --model {MODEL} --tokens 64"


POLICY = """default = "small"
[gates.small]
checklists = ["model"]
minimum_executed = 1
[[gates.small.plan]]
models = ["fixture:llama-tiny"]
engines = ["numpy"]
suites = ["stages"]
"""
EXPIRED = """[[waivers]]
id = "W-7"
item = "llama.stages"
conditions = { engine = "numpy+fault:rope_pairing", device = "cpu" }
check = "stages.early"
signature = "blk.0.q_rope"
owner = "ada"
issue = "https://tracker/7"
reason = "somebody else's rope"
created = 2026-01-01
expires = 2026-01-30
"""


def test_a_failing_gate_ends_with_its_cause(tmp_path: Path) -> None:
    """The last three lines: the first wrong stage with the mistake behind it, the command that shows the
    failure again, the bisect to go on with. A waiver that has run out is said before the verdict."""
    (tmp_path / "gates.toml").write_text(POLICY)
    (tmp_path / "waivers.toml").write_text(EXPIRED)
    result = child(
        "gate", "--policy", "gates.toml", "--waivers", "waivers.toml", "--as-of", "2026-01-31",
        "--engine", "numpy+fault:rope_pairing", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    *before, cause, again, following = result.stdout.splitlines()
    assert re.fullmatch(
        r"root cause: blk\.0\.q_rope is the first wrong stage: .*pairs \(i, i\+d/2\).*", cause
    )
    place = "--engine numpy+fault:rope_pairing --model fixture:llama-tiny"
    assert again == f"reproduce stages.early: prill run {place} stages.early"
    assert following == f"next: prill bisect {place} --tokens 64"
    told = [n for n, line in enumerate(before) if "W-7" in line]
    verdict = next(n for n, line in enumerate(before) if line.startswith("gate small failed"))
    assert told
    assert before[told[0]] == "expired waiver: waiver W-7 of ada expired on 2026-01-30"
    assert told[0] < verdict
    assert before[1].startswith("failed")
    known = read_verdict(tmp_path / "out/verdict.json")
    assert known.lead is not None
    assert (f"root cause: {known.lead.cause}", known.lead.check) == (cause, "stages.early")
    first = next(one for one in known.lead.stages if not one["ok"])
    assert (first["stage"], len(known.lead.stages) > 40) == ("blk.0.q_rope", True)
    # The cause is in the ledger: where neither model nor engine is, the verdict comes out the same.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("gates.toml", "waivers.toml"):
        (elsewhere / name).write_bytes((tmp_path / name).read_bytes())
    (elsewhere / "copied.jsonl").write_bytes((tmp_path / "out/ledger.jsonl").read_bytes())
    anew = child(
        "gate", "--policy", "gates.toml", "--waivers", "waivers.toml", "--as-of", "2026-01-31",
        "--engine", "numpy+fault:rope_pairing", "--from", "copied.jsonl", cwd=elsewhere,
    )  # fmt: skip
    assert anew.returncode == 1, anew.stderr
    assert (elsewhere / "out/verdict.json").read_bytes() == (tmp_path / "out/verdict.json").read_bytes()


def test_what_nobody_is_to_blame_for_has_a_command() -> None:
    """Without a cause on record the worst check is named: how to run it, and what explains it."""
    cell = Cell("m", ENGINE, "cache")
    seen = [
        CheckResult("cache.full", cell, Status.INCONCLUSIVE, "no", 0, 0.0, "prill run cache.full"),
        CheckResult("cache.size[3]", cell, Status.ERROR, "broke", 0, 0.0, "prill run cache.size[3]"),
        CheckResult("cache.reset", cell, Status.PASSED, "", 1, 0.0, "prill run cache.reset"),
    ]
    assert rootcause.lead(seen[2:], ()) is None
    found = rootcause.lead(seen, ())
    assert found == LeadResult("cache.size[3]", "", "prill run cache.size[3]", "prill explain cache.size")
