"""The command line: exit codes, one sentence per error, pure JSON, quiet pipes, examples everywhere."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import click
import gguf
import numpy as np
import pytest

from prill_harness import cli
from prill_harness.console import Console, printable
from prill_harness.engines.textstream import IncrementalDetokenizer
from prill_runtime.errors import EngineError, Inconclusive, NothingSelected, PrillError

from .commandline import PRILL, child, emitted, interruptible, invoke

DATA = Path(__file__).parent / "data"


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
        "gate", "run", "new", "golden", "bisect", "trace", "checklist", "faults", "generate", "inspect",
        "doctor", "report", "bench", "leak", "explain", "completion", "vram", "requests", "judged",
        "incident", "waive", "plan", "merge", "show", "diff", "badge",
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
    lines = [part.strip() for line in example.splitlines()[1:] for part in line.split("|") if "prill" in part]
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[:1] == ["prill"], line
        root = cli.cli.make_context("prill", words[1:], resilient_parsing=False)
        command, rest = cli.cli, [*root._protected_args, *root.args]
        while isinstance(command, click.Group):
            inner = command.get_command(root, rest.pop(0))
            assert inner is not None, line
            command = inner
        command.make_context("prill", rest, parent=root)


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
        ("inspect", "a", "b", "c"),
        ("generate", "--model", "x", "--seed", "many"),
    ],
)
def test_usage_errors_exit_4(args: tuple[str, ...]) -> None:
    """An unknown command, a missing, superfluous or malformed argument: exit 4, one sentence."""
    result = invoke(*args)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (4, "", 1)
    assert result.stderr.startswith("usage error in prill")


def test_nothing_asked_is_help() -> None:
    """prill alone shows what it can do."""
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
        (PrillError("broke"), 3),
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
    assert "features      not known: nothing here describes this file" in result.stdout  # it has no layers


def test_json_is_pure_and_complete(model: Path) -> None:
    """stdout of --json is one document; --full keeps whole arrays."""
    result = child("inspect", str(model), "--json")
    shown = emitted(result.stdout)
    assert shown["architecture"] == "llama"
    assert {t["name"]: t["shape"] for t in shown["tensors"]} == {
        "token_embd.weight": [50, 32],
        "output_norm.weight": [32],
    }
    assert shown["metadata"]["tokenizer.ggml.tokens"] == {"length": 50, "first": [f"t{n}" for n in range(6)]}
    full = emitted(child("inspect", str(model), "--json", "--full").stdout)
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
        [*PRILL, "inspect", str(model), "--full"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
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
    stream = IncrementalDetokenizer(lambda ids: b"".join(pieces[i] for i in ids), prompt, stop)
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


def test_an_interrupt_ends_with_2() -> None:
    """SIGINT and SIGTERM both end a running command with exit 2 and one sentence."""
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            [*PRILL, "generate", "--model", "fixture:llama-tiny"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=interruptible,
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
