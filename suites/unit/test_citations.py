"""A page that a comment, a docstring or another page cites is there to be read."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("runtime", "harness", "suites", "fixtures", "reports", "ci", "docs")
FILES = [f for room in ROOMS for f in sorted((ROOT / room).rglob("*")) if f.is_file()]
PAGES = [*ROOT.glob("*.md"), *(file for file in FILES if file.suffix == ".md")]
SOURCES = [*PAGES, *(file for file in FILES if file.suffix in (".py", ".toml", ".cu", ".cuh"))]
CITED = re.compile(r"(?<![\w/.:*-])(?:\.{0,2}/)?(?:[\w.-]+/)*[\w-]+\.md\b")
WRITTEN = {"account.md", "report.md"}  # by runs, into folders that are not kept


def prose(file: Path) -> Iterator[str]:
    """What a file says to its readers: all of a page, the comments of a source, the docstrings of Python."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        yield text
    elif file.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        yield from (token.string for token in tokens if token.type == tokenize.COMMENT)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""
    elif file.suffix == ".toml":
        yield text
    else:
        yield from re.findall(r"//.*|/\*.*?\*/", text, re.DOTALL)


def absent(text: str, file: Path) -> list[str]:
    """The pages that a text of a file cites and that are neither beside it, nor below the top, nor unique."""
    names = {page.name for page in PAGES}
    return [
        cited
        for cited in CITED.findall(text)
        if Path(cited).name not in WRITTEN
        and not any((base / cited).is_file() for base in (file.parent, ROOT, ROOT / "docs"))
        and ("/" in cited or cited not in names)
    ]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_cited_pages_are_there(file: Path) -> None:
    """Every page that a file cites exists: beside it, at its path from the top, or under that name."""
    assert [name for text in prose(file) for name in absent(text, file)] == []


def test_an_absent_page_is_seen(tmp_path: Path) -> None:
    """A comment, a docstring and a link that lead nowhere are found; one that leads somewhere is not."""
    source = tmp_path / "x.py"
    source.write_text('"""See docs/NOWHERE.md."""\n\n# as GONE.md says; docs/LEAKS.md stays\n')
    page = tmp_path / "x.md"
    page.write_text("[one](lost.md) and [another](LEAKS.md)")
    assert [n for t in prose(source) for n in absent(t, source)] == ["GONE.md", "docs/NOWHERE.md"]
    assert [n for t in prose(page) for n in absent(t, page)] == ["lost.md"]
