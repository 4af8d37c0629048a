"""The command line: exit codes, one sentence per error, pure JSON, quiet pipes, examples everywhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result

from cupel_harness import cli, evidence
from cupel_harness.commands import run, runs
from cupel_harness.commands.generate import TextStream
from cupel_harness.console import Console, printable
from cupel_harness.plan import Plan
from cupel_runtime.errors import CupelError, EngineError, Inconclusive, NothingSelected

DATA = Path(__file__).parent / "data"
CUPEL = [sys.executable, "-c", "from cupel_harness.cli import main; main()"]


def invoke(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli.cli, list(args), input=stdin)


def child(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own, with pipes for its streams."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    options.setdefault("input", "")
    return subprocess.run(
        [*CUPEL, *args], capture_output=True, text=True, timeout=120, env=environment, check=False, **options
    )  # type: ignore[call-overload, no-any-return]


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    """Every command below this one, itself included."""
    found = [(path, command)]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            found += leaves(inner, (*path, name))
    return found


COMMANDS = [path for path, _ in leaves(cli.cli)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sound GGUF file of two tensors, with a long array and text that would move a cursor."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", "evil \x1b[31m name")
    writer.add_array("tokenizer.ggml.tokens", [f"t{n}" for n in range(50)])
    writer.add_tensor("token_embd.weight", np.ones((50, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_all_commands_are_there() -> None:
    """The commands the product promises exist, golden with its three."""
    assert {path[0] for path in COMMANDS if path} == {
        "gate", "run", "golden", "checklist", "generate", "inspect", "doctor", "report",
    }  # fmt: skip
    assert {path[1] for path in COMMANDS if path[:1] == ("golden",) and len(path) == 2} == {
        "record", "compare", "show",
    }  # fmt: skip


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_has_an_example_that_parses(path: tuple[str, ...]) -> None:
    """Each --help exits 0 and ends with an example whose options exist."""
    result = invoke(*path, "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    example = result.stdout.split("Example", 1)[1]
    lines = [part.strip() for line in example.splitlines()[1:] for part in line.split("|") if "cupel" in part]
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[:1] == ["cupel"], line
        root = cli.cli.make_context("cupel", words[1:], resilient_parsing=False)
        command, rest = cli.cli, [*root._protected_args, *root.args]
        while isinstance(command, click.Group):
            inner = command.get_command(root, rest.pop(0))
            assert inner is not None, line
            command = inner
        command.make_context("cupel", rest, parent=root)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_an_unknown_option_exits_4_with_one_sentence(path: tuple[str, ...]) -> None:
    """No command swallows an option it does not know; stdout stays empty."""
    result = invoke(*path, "--no-such-option")
    assert result.exit_code == 4
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "no such option" in result.stderr
    assert "--no-such-option" in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("frobnicate",),
        ("inspect",),
        ("inspect", "a", "b"),
        ("generate", "--model", "x", "--seed", "many"),
    ],
)
def test_usage_errors_exit_4(args: tuple[str, ...]) -> None:
    """An unknown command, a missing, superfluous or malformed argument: exit 4, one sentence."""
    result = invoke(*args)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (4, "", 1)
    assert result.stderr.startswith("usage error in cupel")


def test_version() -> None:
    """cupel --version prints the installed version."""
    result = child("--version")
    assert result.returncode == 0
    assert re.fullmatch(r"cupel, version \d+\.\d+\.\d+\n", result.stdout)


def test_nothing_asked_is_help() -> None:
    """cupel alone shows what it can do."""
    result = invoke()
    assert result.exit_code == 0
    assert "Commands:" in result.stdout


class Raises(click.Command):
    """A command that ends in one exception."""

    def __init__(self, error: BaseException) -> None:
        super().__init__("raises")
        self.error = error

    def invoke(self, ctx: click.Context) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CupelError("broke"), 3),
        (EngineError("gave up"), 1),
        (NothingSelected("no check"), 5),
        (Inconclusive("no GPU"), 10),
        (KeyboardInterrupt(), 2),
        (ZeroDivisionError("x\ny"), 3),
        (PermissionError(13, "Permission denied", "out/ledger.jsonl"), 4),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_every_end_has_its_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a command raises becomes its documented exit code and one line without a traceback."""
    monkeypatch.setattr(cli.Cli, "get_command", lambda self, ctx, name: Raises(error))
    result = invoke("raises")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1)
    assert "Traceback" not in result.stderr


def test_a_traceback_only_with_debug() -> None:
    """--debug shows where it happened, before or after the command; without it one sentence."""
    plain = invoke("inspect", "/nowhere.gguf")
    assert plain.exit_code == 4
    assert plain.stderr.count("\n") == 1
    for args in (("inspect", "/nowhere.gguf", "--debug"), ("--debug", "inspect", "/nowhere.gguf")):
        result = invoke(*args)
        assert result.exit_code == 4
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1] == plain.stderr.strip()


def test_inspect_shows_header_metadata_and_tensors(model: Path) -> None:
    """Every tensor with type and shape, long arrays abridged, control characters escaped."""
    result = child("inspect", str(model))
    assert result.returncode == 0
    assert re.search(r"token_embd\.weight +F32 +50 x 32 +6400", result.stdout)
    assert "50 values: 't0', 't1'" in result.stdout
    assert "t30" not in result.stdout
    assert "\x1b" not in result.stdout


def test_json_is_pure_and_complete(model: Path) -> None:
    """stdout of --json is one document; --full keeps whole arrays."""
    result = child("inspect", str(model), "--json")
    shown = json.loads(result.stdout)
    assert shown["architecture"] == "llama"
    assert {t["name"]: t["shape"] for t in shown["tensors"]} == {
        "token_embd.weight": [50, 32],
        "output_norm.weight": [32],
    }
    assert shown["metadata"]["tokenizer.ggml.tokens"] == {"length": 50, "first": [f"t{n}" for n in range(6)]}
    full = json.loads(child("inspect", str(model), "--json", "--full").stdout)
    assert len(full["metadata"]["tokenizer.ggml.tokens"]) == 50
    assert len(full["sha256"]) == 64


def test_a_malformed_file_is_one_sentence_and_exit_4(tmp_path: Path) -> None:
    """Garbage is refused by name; with --json stdout stays empty."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GARBAGE" * 10)
    for extra in ((), ("--json",)):
        result = child("inspect", str(path), *extra)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (4, "", 1)
        assert "bad.gguf" in result.stderr


def test_no_colour_in_a_pipe(model: Path) -> None:
    """No escape sequence reaches a pipe, neither on success nor on error."""
    for args in (("inspect", str(model)), ("inspect", "/nowhere"), ("--help",)):
        result = child(*args)
        assert "\x1b" not in result.stdout + result.stderr


def test_a_closed_pipe_is_quiet(model: Path) -> None:
    """When the reader goes away the writer says nothing."""
    process = subprocess.Popen(
        [*CUPEL, "inspect", str(model), "--full"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.wait(timeout=60)
    assert said == b""


def test_the_console_escapes_what_would_move_the_cursor() -> None:
    """Escape sequences, newlines, direction overrides and surrogates become visible."""
    assert printable("a\x1b[2J\r\n\u202e\ud800") == "a\\x1b[2J\\r\\n\\u202e\\ud800"


def test_progress_is_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal each step is one line on stderr with its count; stdout stays free."""
    with Console().progress(12, "cells") as bar:
        bar.step("one/cell: 3 passed")
        bar.at(5, "five")
    out, err = capsys.readouterr()
    assert out == ""
    assert [re.sub(r"\d+\.\d s", "T", line) for line in err.splitlines()] == [
        "[ 1/12]    T  one/cell: 3 passed",
        "[ 5/12]    T  five",
    ]


def spell(
    pieces: list[bytes], stop: tuple[str, ...] = (), prompt: tuple[int, ...] = ()
) -> tuple[list[str], str]:
    """Stream the pieces; the text after each, and all of it."""
    stream = TextStream(lambda ids: b"".join(pieces[i] for i in ids), prompt, stop)
    said = [stream.push(token) for token in range(len(prompt), len(pieces))]
    return said, "".join(said) + stream.finish()


def test_streaming_never_splits_a_character() -> None:
    """A character whose bytes are spread over tokens appears whole, once its last byte is there."""
    said, whole = spell([b"a", b"\xe2", b"\x82", b"\xac", b"!"])
    assert said == ["a", "", "", "\u20ac", "!"]
    assert whole == "a\u20ac!"
    assert spell([b"a", b"\xe2\x82"])[1] == "a\ufffd"


def test_streaming_holds_back_a_stop_string() -> None:
    """A stop string split over tokens is never shown, nor what follows; a false start is."""
    assert spell([b"one", b" E", b"N", b"D", b" two"], ("END",))[1] == "one "
    assert spell([b"one", b" E", b"N", b"x"], ("END",))[1] == "one ENx"
    assert spell([b"one E"], ("END",))[1] == "one E"
    assert spell([b"ab"], ("b", "ab"))[1] == ""


def test_streaming_begins_after_the_prompt() -> None:
    """The prompt's own text is not repeated."""
    assert spell([b"Hello", b" world"], prompt=(0,))[1] == " world"


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    """The sample verdict beside a ledger that agrees with it."""
    (tmp_path / "verdict.json").write_bytes((DATA / "verdict.json").read_bytes())
    with evidence.Ledger(tmp_path / "ledger.jsonl") as ledger:
        for check in json.loads((DATA / "verdict.json").read_text())["checks"]:
            status = "failed" if check["status"] == "waived" else check["status"]
            ledger.append(
                evidence.Evidence(
                    check=check["check"],
                    content="",
                    cell=evidence.Cell(**check["cell"]),
                    status=evidence.Status(status),
                    observed=check["observed"],
                    sentence=check["sentence"],
                    oracle=check["oracle"],
                    kills=("planted",),
                    reproduce=check["reproduce"],
                )
            )
    return tmp_path / "ledger.jsonl"


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
    """A ledger whose evidence contradicts the verdict is not rendered: exit 4."""
    text = judged.read_text()
    judged.write_text(text.replace('"status":"failed"', '"status":"inconclusive"', 1))
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
    assert written == {"cells", "ledger.jsonl", "verdict.json", "junit.xml", "report.md", "report.html"}
    verdict = json.loads((folder / "out/verdict.json").read_text())
    assert (verdict["exit_code"], verdict["as_of"]) == (10, "2026-01-31")
    assert {i["status"] for i in verdict["items"] if i["id"] == "foundation.kernels.blocks"} == {"proven"}
    assert verdict["sentence"] in result.stdout
    assert re.search(r"unproven +critical +foundation\.", result.stdout)
    assert [line[:6] for line in result.stderr.splitlines()] == ["[1/2] ", "[2/2] "]


def test_resume_json_and_shards_agree(gated: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """A resumed run, and the ledgers of two shards together, give the verdict of the whole run."""
    folder, _ = gated
    options = ("gate", "--policy", "gates.toml", "--as-of", "2026-01-31", "--json")
    whole = json.loads((folder / "out/verdict.json").read_text())
    resumed = child(*options, "--resume", cwd=folder)
    assert resumed.stderr.count("(kept)") == 2
    assert json.loads(resumed.stdout) == whole
    for part in ("1", "2"):
        shard = child(*options, "--shard", f"{part}/2", "--out", part, cwd=folder)
        assert shard.returncode == 0
        assert len(json.loads(shard.stdout)["cells"]) == 1
        assert not (folder / part / "verdict.json").exists()
    both = child(
        *options, "--out", "both", *("--from", "1/ledger.jsonl"), *("--from", "2/ledger.jsonl"), cwd=folder
    )
    merged = json.loads(both.stdout)
    assert both.returncode == 10
    for field in ("status", "sentence", "rules", "items", "counts"):
        assert merged[field] == whole[field]
    lost = child(*options, "--out", "lost", "--from", "1/ledger.jsonl", cwd=folder)
    assert lost.returncode == 10
    assert [c["status"] for c in json.loads(lost.stdout)["cells"]].count("missing") == 1


def test_an_old_verdict_does_not_outlive_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted gate ends with 2 and leaves no verdict or report of an earlier run behind."""
    from cupel_harness.commands import gate

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "gates.toml").write_text(POLICY)
    for name in ("verdict.json", "junit.xml", "report.md", "report.html"):
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(gate, "run", interrupted)
    result = invoke("gate", "--policy", str(tmp_path / "gates.toml"), "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "--resume" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"gates.toml"}


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
    shown = json.loads(child("run", *options, "--json", "blocks.all_types").stdout)
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
    shown = json.loads(child("checklist", "foundation", "--format", "json", cwd=folder).stdout)
    assert shown["counts"]["proven"] == 1
    assert shown["status"] == "inconclusive"


def test_doctor_sees_a_cache_it_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder that cannot be made is broken, with what to do, and the exit code is 1."""
    monkeypatch.setenv("CUPEL_CACHE", "/dev/null/cache")
    result = invoke("doctor", "--json")
    shown = json.loads(result.stdout)
    found = {f["name"]: f for f in shown["findings"]}
    assert result.exit_code == 1
    assert shown["ready"] is False
    assert found["cache"]["status"] == "broken"
    assert "CUPEL_CACHE" in found["cache"]["todo"]
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
    shown = json.loads(child(*options, "--prompt", "In the village", "--json").stdout)
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
    assert json.loads(made.stdout)["tokens"] == 6
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
    assert [(f["step"], f["status"]) for f in json.loads(bad.stdout)["findings"]] == [("tokenizer", "failed")]


def test_an_interrupt_ends_with_2() -> None:
    """SIGINT and SIGTERM both end a running command with exit 2 and one sentence."""
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            [*CUPEL, "generate", "--model", "fixture:llama-tiny"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        deadline = time.monotonic() + 60
        while not _waits_for_input(process.pid) and time.monotonic() < deadline:
            os.sched_yield()
        process.send_signal(number)
        assert process.wait(timeout=60) == 2
        assert process.stderr.read().count("\n") == 1
        process.stderr.close()
        assert process.stdin is not None
        process.stdin.close()


def _waits_for_input(pid: int) -> bool:
    """True when the process sleeps in a read of its standard input."""
    try:
        words = Path(f"/proc/{pid}/syscall").read_text().split()
    except OSError:
        return False
    return words[:2] == ["0", "0x0"]
