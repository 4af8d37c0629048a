"""Two versions timed in turn: what is slower is said to be, what differs is seen, what breaks is an error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "ci" / "versions_bench.py"
# An installed version whose clock goes by its work: seconds of a token of the prompt and of a decoded one.
VERSION = """
import time
from types import SimpleNamespace
now = 0.0
time.perf_counter = lambda: now

class Engine:
    info = SimpleNamespace(config={{"vocab_size": 50}})
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def generate(self, ids, *, max_tokens, ignore_eos):
        global now
        now += {prompt} * len(ids) + {decode} * (max_tokens - 1)
        return SimpleNamespace(ids=[{token}] * max_tokens)

def open_engine(spec, model):
    assert (spec, model) == ("numpy", "a.gguf")
    return Engine()
"""


def version(folder: Path, name: str, *, prompt: float = 1.0, decode: float = 2.0, token: int = 7) -> Path:
    package = folder / name / "prill_harness"
    package.mkdir(parents=True)
    text = VERSION.format(prompt=prompt, decode=decode, token=token)
    (package / "__init__.py").write_text(text, encoding="utf-8")
    return folder / name


def run(before: Path | str, after: Path) -> subprocess.CompletedProcess[str]:
    """A peer's command is text, a version's folder a path."""
    first = ["--before", str(before)] if isinstance(before, Path) else ["--peer", before]
    words = ["--engine", "numpy", "--model", "a.gguf", "--prompt", "8", "--tokens", "4", "--repeat", "2"]
    return subprocess.run(
        [sys.executable, str(SCRIPT), *first, "--after", str(after), *words],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("after", "code", "prompt", "decode"),
    [
        ({}, 0, 1.0, 1.0),
        ({"prompt": 0.5, "decode": 1.0}, 0, 2.0, 2.0),
        ({"decode": 2.5}, 1, 1.0, 0.8),
        ({"prompt": 1.25}, 1, 0.8, 1.0),
    ],
)
def test_a_slower_version_fails(
    tmp_path: Path, after: dict[str, float], code: int, prompt: float, decode: float
) -> None:
    """Either phase alone makes the verdict, and its share is the first's seconds over the second's."""
    ran = run(version(tmp_path, "before"), version(tmp_path, "after", **after))
    assert ran.returncode == code, ran.stderr
    said: dict[str, Any] = json.loads(ran.stdout)
    assert (said["prompt"]["share"], said["decode"]["share"]) == (prompt, decode)
    assert said["decode"]["before"] == 0.5  # tokens per second
    assert said["equal ids"]


def test_other_ids_are_seen(tmp_path: Path) -> None:
    """A version that answers otherwise is not the same engine made faster, and the line says so."""
    ran = run(version(tmp_path, "before"), version(tmp_path, "after", token=8))
    assert json.loads(ran.stdout)["equal ids"] is False


def test_a_version_that_breaks_is_an_error(tmp_path: Path) -> None:
    """No figures come from a version that cannot be opened: exit code 2 and the folder's name."""
    (tmp_path / "nothing").mkdir()
    ran = run(version(tmp_path, "before"), tmp_path / "nothing")
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert f"{tmp_path / 'nothing'}: expected seconds, got exit code 1" in ran.stderr


PEER = """
import sys
assert sys.argv[1:] == ["libs", "a.gguf", "8", "4"], sys.argv
for line in sys.stdin:
    print('{"prompt": 16.0, "decode": 3.0}' if int(line) >= 2 else "no number of a timed turn", flush=True)
"""


def test_another_program_is_timed_in_turn(tmp_path: Path) -> None:
    """A peer is told model and lengths, and its seconds are what it says; it has no ids to be compared."""
    (tmp_path / "peer.py").write_text(PEER, encoding="utf-8")
    ran = run(f"{sys.executable} {tmp_path / 'peer.py'} libs", version(tmp_path, "after"))
    assert ran.returncode == 0, ran.stderr
    said: dict[str, Any] = json.loads(ran.stdout)
    assert (said["prompt"]["share"], said["decode"]["share"]) == (2.0, 1.5)
    assert (said["prompt"]["before"], said["prompt"]["after"]) == (0.5, 1.0)
    assert "equal ids" not in said


def test_a_peer_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    """One sentence and exit code 2, and no figures."""
    ran = run(str(tmp_path / "no program"), version(tmp_path, "after"))
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "expected a program that starts, got No such file or directory" in ran.stderr
