"""What CONTRIBUTING names is there: every path, and what it says a file holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import prill_runtime
from prill_runtime.models import registry
from prill_runtime.models.base import Node

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
ROOMS = ("runtime", "harness", "suites", "fixtures", "reports", "ci", "docs")
THERE = {
    path.relative_to(ROOT).as_posix() + "/" * path.is_dir()
    for path in (*ROOT.glob("*.*"), *(p for room in ROOMS for p in (ROOT / room).rglob("*")))
    if "__pycache__" not in path.parts
}
PATH = re.compile(r"`([\w.*-]+(?:/[\w.*-]+)*/?)`")
INSIDE = re.compile(r"`(\w+)`\s+(?:of|in)\s+`([\w./-]+\.(?:py|cuh?|toml))`")
PLACEHOLDERS = {"NAME": r"\w+"}
KINDS = (
    "An architecture",
    "A kind of node",
    "An op",
    "A block format",
    "An engine",
    "A call of a library",
    "A check",
    "A fault",
    "A report",
)


def paths(text: str) -> set[str]:
    """What a text puts in code marks that is a path: with a slash, or a file's ending."""
    return {
        name for name in PATH.findall(text)
        if "/" in name or name.endswith((".py", ".cu", ".cuh", ".toml", ".md"))
    }  # fmt: skip


def places(name: str, there: set[str]) -> list[str]:
    """The files or folders that a path means: without the rooms it stands in, with a `*`, with NAME."""
    told = re.escape(name).replace(r"\*", r"[^/]*")
    for placeholder, pattern in PLACEHOLDERS.items():
        told = told.replace(placeholder, pattern)
    return [path for path in there if re.search(rf"(?:^|/){told}$", path)]


def section() -> str:
    """The page's part on where a new line goes."""
    return PAGE[PAGE.index("## Where a new line goes") : PAGE.index("## A new check")]


def test_every_kind_has_numbered_steps() -> None:
    """Nine kinds of addition, each with its steps counted from 1 without a gap."""
    parts = re.split(r"^(An? [a-z ]+)[,:].*?(?=^1\.)", section(), flags=re.MULTILINE | re.DOTALL)
    assert tuple(parts[1::2]) == KINDS
    for kind, steps in zip(parts[1::2], parts[2::2], strict=True):
        numbers = [int(number) for number in re.findall(r"^(\d+)\. ", steps, re.MULTILINE)]
        assert len(numbers) >= 2, kind
        assert numbers == list(range(1, len(numbers) + 1)), kind


def test_every_path_is_there() -> None:
    """Each names at least one file or folder of the tree."""
    found = paths(PAGE)
    assert len(found) > 30
    assert [name for name in sorted(found) if not places(name, THERE)] == []


def test_what_a_file_is_said_to_hold_is_in_it() -> None:
    """`NAME` of `file`: the word stands in the file."""
    said = INSIDE.findall(section())
    assert len(said) >= 6
    for word, name in said:
        texts = [(ROOT / place).read_text("utf-8") for place in places(name, THERE)]
        assert any(re.search(rf"\b{word}\b", text) for text in texts), f"{word} of {name}"


@pytest.mark.parametrize("name", ["ops/nowhere.py", "kernels/fused.cu*h2", "faults/plant/", "pyproject.tom"])
def test_a_path_that_is_not_there_is_seen(name: str) -> None:
    """One wrong letter is enough, in a file, a pattern or a folder."""
    assert not places(name, THERE)
    assert places("ops/numpy.py", THERE) == ["runtime/prill_runtime/ops/numpy.py"]


def test_descriptions_elsewhere_have_every_kind_of_node() -> None:
    """Whatever node the package has, `prill_runtime` offers: step 5 of a kind of node was not forgotten."""
    registry.packaged()

    def last(kind: type) -> set[type]:
        return {each for child in kind.__subclasses__() for each in last(child)} or {kind}

    kinds = {kind.__name__ for kind in last(Node) if kind.__module__.startswith("prill_runtime.")}
    assert {"Attention", "Network"} <= kinds <= set(prill_runtime.__all__)
