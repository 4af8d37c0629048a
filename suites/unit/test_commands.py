"""The commands: what each writes, says and exits with, mostly through real processes."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import msgspec
import pytest

from prill_harness.commands.gates import run
from prill_harness.commands.shared import runs
from prill_harness.plan.plan import Plan
from prill_harness.plan.provenance import file_digest
from prill_harness.records import evidence
from prill_harness.records import ledger as ledgers
from prill_harness.records.verdict import Verdict

from .commandline import child, emitted, invoke
from .sample import laid


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    return laid(tmp_path)


@pytest.mark.parametrize(
    ("form", "start"), [("junit", "<?xml"), ("markdown", "# FAILED"), ("html", "<!doctype html>")]
)
def test_report_renders_every_format(judged: Path, form: str, start: str) -> None:
    """Each format comes out on stdout, and the same text into a file."""
    result = child("report", "--ledger", str(judged), "--format", form)
    assert result.returncode == 0, result.stderr
    assert result.stdout.lstrip().startswith(start)
    target = judged.parent / "deep" / "report"
    assert child("report", "--ledger", str(judged), "--format", form, "-o", str(target)).stdout == ""
    assert target.read_text(encoding="utf-8") == result.stdout


def test_report_takes_the_dialect(judged: Path) -> None:
    """--dialect reaches the reporter; an unknown one, or an unknown format, is exit 4."""
    strict = invoke("report", "--ledger", str(judged), "--format", "junit", "--dialect", "jenkins-strict")
    assert "<testsuites" in strict.stdout
    assert "<properties" not in strict.stdout
    assert invoke("report", "--ledger", str(judged), "--format", "junit", "--dialect", "x").exit_code == 4
    assert invoke("report", "--ledger", str(judged), "--format", "pdf").exit_code == 4


def test_report_refuses_a_verdict_of_another_run(judged: Path) -> None:
    """A verdict whose ledger is this one, and whose evidence is another's, is not rendered: exit 4."""
    records = list(ledgers.read(judged))
    at = next(n for n, r in enumerate(records) if isinstance(r, evidence.Evidence) and r.status == "failed")
    records[at] = msgspec.structs.replace(records[at], status=evidence.Status.INCONCLUSIVE)
    judged.write_bytes(ledgers.lines(records))
    assert "the verdict is of another ledger" in invoke("report", "--ledger", str(judged)).stderr
    verdict = msgspec.json.decode((judged.parent / "verdict.json").read_bytes(), type=Verdict)
    sealed = verdict.sealed(file_digest(judged))
    (judged.parent / "verdict.json").write_bytes(msgspec.json.encode(sealed))
    result = invoke("report", "--ledger", str(judged))
    assert result.exit_code == 4
    assert "another run" in result.stderr
    judged.unlink()
    assert invoke("report", "--ledger", str(judged)).exit_code == 4


POLICY = """default = "small"
[gates.small]
checklists = ["foundation"]
minimum_executed = 1
[[gates.small.plan]]
models = ["fixture:llama-tiny", "fixture:gpt2-tiny"]
engines = ["numpy"]
suites = ["blocks"]
"""


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder in which a small gate ran, and what it said."""
    folder = tmp_path_factory.mktemp("gated")
    (folder / "gates.toml").write_text(POLICY)
    return folder, child("gate", "--policy", "gates.toml", "--as-of", "2026-01-31", cwd=folder)


def test_gate_writes_everything_and_says_why(gated: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """A gate with unproven critical items ends with 10, names the rule, and leaves all its files."""
    folder, result = gated
    assert result.returncode == 10, result.stderr
    written = {path.name for path in (folder / "out").iterdir()}
    assert written == {
        ".lock",
        "cells",
        "ledger.jsonl",
        "verdict.json",
        "junit.xml",
        "report.md",
        "report.html",
        "history.jsonl",
        "report.sarif",
        "ctrf.json",
        "in-toto.json",
    }
    verdict = json.loads((folder / "out/verdict.json").read_text())
    assert (verdict["exit_code"], verdict["as_of"]) == (10, "2026-01-31")
    assert {i["status"] for i in verdict["items"] if i["id"] == "foundation.kernels.blocks"} == {"proven"}
    assert verdict["sentence"] in result.stdout
    assert re.search(r"unproven +critical +foundation\.", result.stdout)
    assert [line[:6] for line in result.stderr.splitlines()] == ["[0/2] ", "[1/2] ", "[2/2] "]


def test_resume_json_and_shards_agree(gated: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """A resumed run, and the ledgers of two shards together, give the verdict of the whole run."""
    folder, _ = gated
    options = ("gate", "--policy", "gates.toml", "--as-of", "2026-01-31", "--json")
    whole = json.loads((folder / "out/verdict.json").read_text())
    resumed = child(*options, "--resume", cwd=folder)
    assert resumed.stderr.count("(kept)") == 2
    assert emitted(resumed.stdout) == whole
    for part in ("1", "2"):
        shard = child(*options, "--shard", f"{part}/2", "--out", part, cwd=folder)
        assert shard.returncode == 0
        assert len(emitted(shard.stdout)["cells"]) == 1
        assert not (folder / part / "verdict.json").exists()
    both = child(
        *options, "--out", "both", *("--from", "1/ledger.jsonl"), *("--from", "2/ledger.jsonl"), cwd=folder
    )
    merged = emitted(both.stdout)
    assert both.returncode == 10
    for field in ("status", "sentence", "rules", "items", "counts"):
        assert merged[field] == whole[field]
    lost = child(*options, "--out", "lost", "--from", "1/ledger.jsonl", cwd=folder)
    assert lost.returncode == 10
    assert [c["status"] for c in emitted(lost.stdout)["cells"]].count("missing") == 1


def test_an_old_verdict_does_not_outlive_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted gate ends with 2 and leaves no verdict or report of an earlier run behind."""
    from prill_harness.commands.gates import gate

    def interrupted(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "gates.toml").write_text(POLICY)
    for name in ("verdict.json", "junit.xml", "report.md", "report.html"):
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(gate, "run", interrupted)
    result = invoke("gate", "--policy", str(tmp_path / "gates.toml"), "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "--resume" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "gates.toml"}


@pytest.mark.parametrize(
    "args",
    [
        ("no-such-gate",),
        ("--policy", "/nowhere.toml"),
        ("--waivers", "/nowhere.toml"),
        ("--as-of", "soon"),
        ("--shard", "2"),
        ("--shard", "3/2"),
        ("--from", "/nowhere.jsonl"),
        ("--from", "x", "--resume"),
    ],
    ids=" ".join,
)
def test_a_gate_that_cannot_be_asked_for_exits_4(args: tuple[str, ...], tmp_path: Path) -> None:
    """Unknown gates, unreadable policies, waivers and ledgers, bad dates and shards: one sentence, exit 4."""
    (tmp_path / "gates.toml").write_text(POLICY)
    policy = () if "--policy" in args else ("--policy", str(tmp_path / "gates.toml"))
    result = invoke("gate", *policy, "--out", str(tmp_path / "out"), *args)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (4, "", 1)


def test_run_prints_each_check(tmp_path: Path) -> None:
    """A single check runs alone, prints its sentence, and exits by the worst status."""
    options = ("--model", "fixture:llama-tiny", "--out", str(tmp_path))
    result = child("run", *options, "blocks.all_types")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^passed +blocks\.all_types ", result.stdout, re.M)
    assert "1 passed" in result.stdout
    shown = emitted(child("run", *options, "--json", "blocks.all_types").stdout)
    assert [(e["check"], e["status"]) for e in shown["evidence"]] == [("blocks.all_types", "passed")]


@pytest.mark.parametrize("command", [("gate",), ("run", "blocks")], ids=" ".join)
@pytest.mark.parametrize(
    ("option", "spec"),
    [("--engine", "nonesuch"), ("--model", "fixture:nonesuch"), ("--model", "bad.gguf"), ("--model", "/no")],
)
def test_what_no_cell_could_open_is_refused_at_once(
    command: tuple[str, ...], option: str, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown engine or fixture, a malformed or absent model: exit 4 before any cell runs."""
    monkeypatch.chdir(tmp_path)
    Path("bad.gguf").write_bytes(b"GGUF" + b"\xff" * 60)
    result = invoke(*command, option, spec, "--out", "out")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (4, "", 1)
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["nonesuch", "tokens.nonesuch", "blocks.all_types.x"])
def test_run_selects_nothing(name: str) -> None:
    """A name that is neither suite nor check: exit 5."""
    result = invoke("run", name)
    assert result.exit_code == 5
    assert name in result.stderr


def test_a_suite_beside_a_check_stands_for_its_checks() -> None:
    """Mixed names select every check of the suite and the single one."""
    suites, checks = run.selected(["blocks", "tokens.greedy"])
    assert suites == ("blocks", "tokens")
    assert "tokens.greedy" in checks
    assert "blocks.all_types" in checks
    assert "tokens.config" not in checks
    assert run.selected(["tokens"]) == (("tokens",), ())


CELL = evidence.Cell("m", "e", "s")


def record(status: str) -> evidence.Evidence:
    return evidence.Evidence(
        check=f"s.{status}", content="", cell=CELL, status=evidence.Status(status), observed=1, sentence="",
        oracle="o", kills=("k",), reproduce="",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("statuses", "ended", "code"),
    [
        (("passed",), True, 0),
        (("passed", "failed", "error"), True, 1),
        (("passed", "error", "inconclusive"), True, 3),
        (("passed", "inconclusive"), True, 10),
        (("passed",), False, 3),
        ((), True, 10),
        ((), False, 3),
    ],
)
def test_the_worst_status_decides_the_exit_code(statuses: tuple[str, ...], ended: bool, code: int) -> None:
    """Failed before error before inconclusive; a cell without its last record or checks is no pass."""
    records: list[evidence.Record] = [record(status) for status in statuses]
    records += [evidence.CellEnded(CELL, 0, 1.0, 0.0)] if ended else []
    assert runs.outcome(Plan("run", (CELL,)), records).exit_code == code


def test_a_planned_check_without_evidence_is_missing() -> None:
    """What a cell planned and did not report is counted and is no pass."""
    started = evidence.CellStarted(CELL, ("s.passed", "s.lost"), 0.0)
    seen = runs.outcome(
        Plan("run", (CELL,)), [started, record("passed"), evidence.CellEnded(CELL, 0, 1.0, 0.0)]
    )
    assert (seen.exit_code, seen.lost, seen.counts) == (
        3,
        ((CELL.id, "s.lost"),),
        {"missing": 1, "passed": 1},
    )


def test_checklist_without_evidence_proves_nothing(tmp_path: Path) -> None:
    """Without a ledger every item is unproven, that is said, and the exit code is 10."""
    result = child("checklist", "llama", cwd=tmp_path)
    assert result.returncode == 10
    assert "every item is unproven" in result.stderr
    assert result.stdout.startswith("# Integration checklist: llama")
    assert "[x]" not in result.stdout
    assert child("checklist", "nonesuch", cwd=tmp_path).returncode == 4


def test_checklist_ticks_what_the_ledger_proves(gated: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Items whose checks passed are ticked with their evidence; the others are not."""
    folder, _ = gated
    result = child("checklist", "foundation", cwd=folder)
    ticked = [line for line in result.stdout.splitlines() if "[x]" in line]
    assert len(ticked) == 1
    assert "foundation.kernels.blocks" in ticked[0]
    assert "values compared with" in result.stdout
    shown = emitted(child("checklist", "foundation", "--format", "json", cwd=folder).stdout)
    assert shown["counts"]["proven"] == 1
    assert shown["status"] == "inconclusive"


def test_an_engine_has_an_integration_report_of_its_own(
    gated: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """`integration` is all that the ledger asked about, of the engine named; an engine that left no evidence
    is refused. A family and the contract have the names that people use."""
    folder, _ = gated
    result = child("checklist", "integration", "--from", "numpy", cwd=folder)
    assert result.returncode == 10
    heads = [line for line in result.stdout.splitlines() if line.startswith("#")]
    assert heads[0] == "# Integration checklist: integration, of numpy"
    assert any(head.startswith("## foundation: 1 of") for head in heads)
    assert not any("contract" in head for head in heads)
    refused = child("checklist", "integration", "--from", "numpy64", cwd=folder)
    assert refused.returncode == 4
    assert "no evidence of such an engine" in refused.stderr
    for name, lists in (("gpt", {"gpt2", "gpt-oss"}), ("adapter", {"contract"})):
        shown = emitted(child("checklist", name, "--format", "json", cwd=folder).stdout)
        assert {item["checklist"] for item in shown["items"]} == lists


def test_doctor_sees_a_cache_it_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder that cannot be made is broken, with what to do, and the exit code is 1."""
    monkeypatch.setenv("PRILL_CACHE", "/dev/null/cache")
    result = invoke("doctor", "--json")
    shown = emitted(result.stdout)
    found = {f["name"]: f for f in shown["findings"]}
    assert result.exit_code == 1
    assert shown["ready"] is False
    assert found["cache"]["status"] == "broken"
    assert "PRILL_CACHE" in found["cache"]["todo"]
    assert found["python"]["status"] == "ok"
    assert {"numpy", "click", "threads", "gpu", "nvcc", "extra hf"} <= set(found)


def test_generate_streams_and_counts(tmp_path: Path) -> None:
    """Text on stdout, speed on stderr; stdin is a prompt; --json holds the same text, ids and logprobs."""
    options = ("generate", "--model", "fixture:llama-tiny", "--max-tokens", "12")
    spoken = child(*options, "--prompt", "In the village")
    assert spoken.returncode == 0
    assert "tokens/s" in spoken.stderr
    piped = child(*options, "--prompt", "-", input="In the village")
    assert piped.stdout == spoken.stdout
    shown = emitted(child(*options, "--prompt", "In the village", "--json").stdout)
    assert shown["text"] == spoken.stdout[:-1]
    assert len(shown["ids"]) == len(shown["logprobs"]) == 12
    assert shown["finish_reason"] == "length"
    drawn = [child(*options, "--temperature", "1", "--seed", seed).stdout for seed in ("3", "3", "4")]
    assert drawn[0] == drawn[1] != drawn[2]


def test_golden_record_show_and_compare(tmp_path: Path) -> None:
    """A recorded golden agrees with the float32 engine; a changed one is a failure, exit 1."""
    target = tmp_path / "g.json"
    made = child(
        "golden", "record", "fixture:gpt2-tiny", "-o", str(target), "--tokens", "6", "--prompt", "A", "--json"
    )
    assert emitted(made.stdout)["tokens"] == 6
    options = ("golden", "compare", "--model", "fixture:gpt2-tiny", "--golden", str(target))
    good = child(*options)
    assert good.returncode == 0, good.stdout + good.stderr
    steps = [line.split(":")[:2] for line in good.stdout.splitlines() if ": passed:" in line]
    assert [step for step, _ in steps] == ["tokenizer", "config", "logits", "greedy", "sampled"]
    assert re.search(r"kl_max +\S+ +<= ", good.stdout)
    golden = json.loads(target.read_text())
    golden["prompts"][0]["ids"][0] += 1
    target.write_text(json.dumps(golden))
    bad = child(*options, "--json")
    assert bad.returncode == 1
    assert [(f["step"], f["status"]) for f in emitted(bad.stdout)["findings"]] == [("tokenizer", "failed")]
