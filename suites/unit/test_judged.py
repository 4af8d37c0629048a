"""`prill judged`: the table of engines of others is what a run of them says; the rest of the page stays."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from prill_harness.commands.engines import judged
from prill_harness.records.evidence import Cell, Evidence, Status
from prill_harness.records.strict import load_toml

from .commandline import invoke

ROOT = Path(__file__).resolve().parents[2]
CLASS = '''
class Deaf:
    """An engine of ids alone, which are wrong."""

    def __init__(self, model):
        pass

    def tokenize(self, text, add_special=True):
        return [1, 2, 3]
'''
FILE = """
[[engines]]
name = "here"
package = "numpy"
spec = "py:deaf.py:Deaf"
models = ["fixture:llama-tiny"]
[[engines.deviations]]
what = "says the same of every text"
reproduce = "prill run tokens.prompt_ids"

[[engines]]
name = "elsewhere"
package = "no-such-package-of-anybody"
spec = "py:nowhere.py:Nowhere"
models = ["fixture:llama-tiny"]
"""
ROW = "| elsewhere | 1.0 | py | fixture:llama-tiny | 9 | 0 | 2 | 2026-01-01 |"
TABLE = f"{judged.HEAD}{ROW}\n\n- **elsewhere**: x: `y`\n"
PAGE = f"# Above\n\n{judged.BEGIN}{TABLE}{judged.END}\nBelow {{}} stays.\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an engine, a declaration and a page, in which the suite tokens alone is run."""
    for name, text in {"deaf.py": CLASS, "engines.toml": FILE, "page.md": PAGE}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(judged, "SUITES", ("tokens",))
    return tmp_path


WORDS = ("judged", "engines.toml", "--page", "page.md")


def test_the_table_is_what_the_run_says(folder: Path) -> None:
    """The installed engine gets a row and its findings, the other keeps its row, marked; prose stays. Then
    --check has nothing to say, until a figure is another."""
    done = invoke(*WORDS, "--check")
    assert done.exit_code == 1
    assert "says something else of here" in done.output
    assert (folder / "page.md").read_text("utf-8") == PAGE
    assert invoke(*WORDS).exit_code == 0
    text = (folder / "page.md").read_text("utf-8")
    assert text.startswith("# Above\n\n")
    assert text.endswith("\nBelow {} stays.\n")
    (row,) = [line for line in text.splitlines() if line.startswith("| here |")]
    cells = row.strip("| ").split(" | ")
    assert cells[2:4] == ["py", "fixture:llama-tiny"]
    assert int(cells[5]) >= 1
    assert int(cells[6]) >= 1
    again = "`prill run tokens.prompt_ids --engine py:deaf.py:Deaf --model fixture:llama-tiny"
    assert "- **here** fails tokens.prompt_ids" in text
    assert again.split(" --")[0] in text
    assert "- **here**: says the same of every text: `prill run tokens.prompt_ids`" in text
    assert f"{ROW.removesuffix(' |')}{judged.KEPT} |" in text
    assert "- **elsewhere**: x: `y`" in text
    assert invoke(*WORDS, "--check").exit_code == 0
    (folder / "page.md").write_text(text.replace(row, row.replace(f"| {cells[5]} |", "| 77 |", 1)), "utf-8")
    assert invoke(*WORDS, "--check").exit_code == 1


def test_an_engine_that_was_not_asked_for_keeps_its_row(folder: Path) -> None:
    """With --only, what is installed and not named is not marked as missing."""
    text = FILE.replace("no-such-package-of-anybody", "pytest")
    (folder / "engines.toml").write_text(text, encoding="utf-8")
    assert invoke(*WORDS, "--only", "here").exit_code == 0
    assert f"{ROW}\n" in (folder / "page.md").read_text("utf-8")
    done = invoke(*WORDS, "--only", "nobody")
    assert (done.exit_code, "no such engine" in done.output) == (4, True)


@pytest.mark.parametrize(
    ("file", "old", "new", "code", "sentence"),
    [
        ("page.md", judged.END, "", 4, "does not say where its table stands"),
        ("page.md", judged.BEGIN, judged.BEGIN + judged.END, 4, "does not say where its table stands"),
        ("engines.toml", '"numpy"', '"no-such-package-either"', 5, "none of the engines is installed"),
        ("engines.toml", "models =", "model =", 4, "unknown field `model`"),
        ("engines.toml", "py:deaf.py:Deaf", "py:deaf.py:Dumb", 4, "has no class Dumb"),
        ("engines.toml", "py:deaf.py:Deaf", "llamacpp:@package:nobodys_module@", 4, "no such module"),
    ],
)
def test_what_cannot_be_judged(folder: Path, file: str, old: str, new: str, code: int, sentence: str) -> None:
    """One sentence each, and the page stays as it is."""
    text = (folder / file).read_text("utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    page = (folder / "page.md").read_text("utf-8")
    done = invoke(*WORDS)
    assert done.exit_code == code, done.output
    assert sentence in done.output
    assert (folder / "page.md").read_text("utf-8") == page


def test_places_of_this_machine_are_in_no_page() -> None:
    """What stands for the interpreter, its commands and a module's folder is filled in, and shown without."""
    spec = "exec:@bin@/mine --by @python@ @package:gguf@/x {model}"
    engine = judged.Declared("mine", "gguf", spec, ())
    commands = Path(sys.executable).parent
    begins, ends = f"exec:{commands}/mine --by {sys.executable} ", "/gguf/x {model}"
    assert engine.here.startswith(begins)
    assert engine.here.endswith(ends)
    assert engine.shown == "exec:mine --by python FOLDER/x {model}"


def test_a_finding_is_told_with_the_mistake_behind_it() -> None:
    """Where checks of a suite found one, it stands once; another suite's is none of it."""
    cell = Cell("fixture:llama-tiny", "py:x.py:X", "contract")

    def failed(check: str, *clauses: str) -> Evidence:
        detail = {"explained": list(clauses)} if clauses else {}
        return Evidence(check, "", cell, Status.FAILED, 1, "wrong", "", ("bug",), "", detail=detail)

    bad = [failed("contract.tokens", "one", "two"), failed("contract.seeds"), failed("contract.end", "one")]
    assert judged._why(bad, "contract") == ", explained by one, or two"
    assert judged._why(bad, "tokens") == judged._why([failed("contract.seeds")], "contract") == ""


def test_the_page_names_what_memvanta_does() -> None:
    """The first mistake in the wild that prill found stands in the table, by the check that found it."""
    _, region, _ = judged._parts(ROOT / "docs" / "ENGINES.md")
    told = [line for line in region.splitlines() if line.startswith("- **memvanta** fails contract.tokens")]
    assert len(told) == 1
    assert "explained by pairs (i, i+d/2) instead of (2i, 2i+1)" in told[0]


def test_the_declaration_of_the_project_and_its_page_belong_together() -> None:
    """Every declared engine has a row in docs/ENGINES.md, and no row is of another."""
    declared = load_toml(ROOT / "docs" / "engines.toml", judged._File).engines
    _, region, _ = judged._parts(ROOT / "docs" / "ENGINES.md")
    rows = [line.split(" | ")[0].strip("| ") for line in region.removeprefix(judged.HEAD).splitlines()]
    rows = [row for row in rows if row and not row.startswith("- ")]
    assert list(dict.fromkeys(rows)) == [each.name for each in declared]
