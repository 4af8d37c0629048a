"""What lies in the folder where prill is started: nothing of it is imported, and nothing of it can judge."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import prill_harness

from .commandline import child

HARNESS = Path(prill_harness.__file__).parent
FORGED = """
from pathlib import Path
Path({marker!r}).write_text("imported", encoding="utf-8")
raise SystemExit(0)
"""
NAMES = (
    "queue.py",
    "random.py",
    "numpy.py",
    "pytest.py",
    "tokenizers/__init__.py",
    "prill_suites/__init__.py",
)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A folder whose modules shadow what cells import, and say so when they are imported."""
    for name in NAMES:
        file = tmp_path / "trap" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(FORGED.format(marker=str(tmp_path / "marker")), encoding="utf-8")
    return tmp_path / "trap"


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_cell_imports_nothing_of_the_current_folder(trap: Path, tmp_path: Path, jobs: str) -> None:
    """With one job and a process for each cell, and with the server that forks them."""
    words = ["run", "-j", jobs, "--out", str(tmp_path / "out"), "--model", "fixture:llama-tiny"]
    assert child_there(trap, *words, "stages.complete", "cache.reset") == 0
    assert not (tmp_path / "marker").exists()


def test_a_leak_probe_imports_nothing_of_it(trap: Path, tmp_path: Path) -> None:
    """The process that hosts the engine is prill's too."""
    words = ["leak", "--model", "fixture:llama-tiny", "--calls", "50", "--path", "success"]
    assert child_there(trap, *words) in (0, 10)
    assert not (tmp_path / "marker").exists()


def child_there(folder: Path, *words: str) -> int:
    """The exit code of prill started in the folder; the first process is started as its script starts it."""
    return child(*words, cwd=folder, safe=True).returncode


def test_every_child_interpreter_is_started_so() -> None:
    """Every place of the harness that starts an interpreter keeps the current folder out."""
    seen, strange = set(), []
    for file in HARNESS.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.List | ast.Tuple) and any(_executable(each) for each in node.elts):
                seen.add(file.name)
                if "-P" not in [getattr(each, "value", None) for each in node.elts]:
                    strange.append(f"{file.name}:{node.lineno}")
    assert not strange
    assert "children.py" in seen


def _executable(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "executable"
