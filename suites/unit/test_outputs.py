"""Where output goes wrong: closed streams, full disks, links, pipes, names in Latin-1, text that acts."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from prill_harness.console import printable
from prill_harness.records.files import write_file
from prill_reports.markup import text
from prill_reports.text import one_line
from prill_runtime.errors import OutputError

from .commandline import PRILL, child, emitted
from .tiny_gguf import tiny

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """A line of sh in which $PRILL is the command."""
    words = " ".join(f"'{word}'" for word in PRILL)
    return subprocess.run(
        ["sh", "-c", f'prill() {{ {words} "$@"; }}; {line}'], cwd=folder, capture_output=True, check=False
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_a_closed_stream_is_no_traceback(tmp_path: Path, closed: str) -> None:
    """And what would have taken its number, a ledger say, is not printed into; the exit code stays true."""
    done = shell(f"prill checklist llama --format json {closed}", tmp_path)
    assert done.returncode == 10
    assert b"Traceback" not in done.stderr + done.stdout
    assert shell(f"prill inspect nosuch.gguf {closed}", tmp_path).returncode == 4


@needs_full
def test_a_full_disk_is_said(tmp_path: Path) -> None:
    """What cannot be printed is no success: exit 4, with the stream's name and the reason."""
    done = shell("prill checklist llama > /dev/full", tmp_path)
    assert done.returncode == 4
    said = "output error in standard output: cannot write: got No space left on device"
    assert done.stderr.decode().splitlines()[-1] == said


@needs_full
def test_what_cannot_be_written_names_the_path(tmp_path: Path) -> None:
    """A device that is full, and a folder that is a file, are one sentence each; nothing old is lost."""
    with pytest.raises(OutputError, match="in /dev/full: cannot write: got No space left on device"):
        write_file(FULL, "text")
    (tmp_path / "report").write_text("old")
    (tmp_path / "report").chmod(0o400)
    with pytest.raises(OutputError, match=r"report/x: cannot write"):
        write_file(tmp_path / "report" / "x", "text")
    assert (tmp_path / "report").read_text() == "old"


def test_a_link_stays_a_link_and_a_file_keeps_its_mode(tmp_path: Path) -> None:
    """`-o` writes through a symlink, and what others were not allowed to read they still are not."""
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "report.md", tmp_path / "report.md"
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real)
    write_file(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    assert sorted(tmp_path.rglob("*")) == sorted([real.parent, real, link])


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """A named pipe gets the text, and is a pipe afterwards."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE)
    write_file(pipe, "through the pipe")
    assert reader.communicate(timeout=60)[0] == b"through the pipe"
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(OutputError, match="cannot write"):
        write_file(tmp_path, "a folder")


def test_a_folder_that_is_gone_is_one_sentence(tmp_path: Path) -> None:
    """Whoever removed it: not an internal error."""
    done = shell("mkdir gone && cd gone && rmdir ../gone && prill doctor", tmp_path)
    assert done.returncode == 4
    assert done.stderr.decode() == "usage error: the current folder is gone; change to one that exists\n"


def test_a_name_in_latin_1_works(tmp_path: Path) -> None:
    """A model whose file name is no UTF-8 is inspected and checked; JSON shows the name with escapes."""
    file = Path(os.fsdecode(bytes(tmp_path) + b"/mod\xe8le.gguf"))
    shutil.copy(tiny(tmp_path / "model.gguf", context=32), file)
    done = child("inspect", "--json", file.name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    emitted(done.stdout)
    done = child("run", "stages.complete", "--model", file.name, "-j", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


ACTING = {
    "an escape": "\x1b[2J",
    "a bell": "\x07",
    "a C1 control": "\x9b31m",
    "an override": "\u202egnp.exe",
    "an isolate": "\u2066x",
    "a mark": "\u200fx",
    "an Arabic mark": "\u061cx",
    "a zero width space": "pass\u200bed",
    "a line separator": "a\u2028b",
    "a byte order mark": "\ufeffx",
}


@pytest.mark.parametrize("what", ACTING)
def test_no_text_acts_on_a_terminal_or_a_report(what: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Controls, turning and hiding marks come out as escapes, in JSON too, which reads them back."""
    from prill_harness.console import Console

    for shown in (printable(ACTING[what]), one_line(ACTING[what])):
        assert not set(shown) & set("\x1b\x07\x9b\u202e\u2066\u200f\u061c\u200b\u2028\ufeff")
        assert "\\" in shown
    Console(json=True).emit({"text": ACTING[what]})
    printed = capfd.readouterr().out
    assert printed.isascii()
    assert json.loads(printed)["data"] == {"text": ACTING[what]}


@pytest.mark.parametrize("said", ["owner/repo#2", "#2", "GH-12", "@name", "gh-3"])
def test_no_forge_links_what_a_model_says(said: str) -> None:
    """A mention or a reference to an issue in a sentence notifies nobody and links nothing."""
    shown = text(f"see {said}!")
    assert said not in shown
    assert shown.replace("\u2060", "").replace("\\", "") == f"see {said}!"


def test_docstrings_may_be_stripped(tmp_path: Path) -> None:
    """PYTHONOPTIMIZE=2 takes them away: faults still have names, and cells run with theirs."""
    words = [sys.executable, "-OO", *PRILL[1:], "faults", "show", "gelu_erf"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "gelu" in done.stdout
