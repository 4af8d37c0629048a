"""The registry of reporters: a file in the folder of formats is a format, with nothing to sign up."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import msgspec
import pytest

from prill_harness.commands.shared import reporters
from prill_harness.records.verdict import Verdict
from prill_reports import formats
from prill_runtime.errors import UsageError

VERDICT = msgspec.json.decode((Path(__file__).parent / "data/verdict.json").read_bytes(), type=Verdict)
FOLDER = Path(formats.__path__[0])


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    """Entry points that the registry finds in place of the installed ones."""
    points: list[EntryPoint] = []
    monkeypatch.setattr(reporters, "entry_points", lambda group: points)
    reporters.installed.cache_clear()
    yield points
    reporters.installed.cache_clear()


def test_every_file_of_the_folder_is_a_format() -> None:
    """The installed formats are the modules that lie there, by their names; no two write one file."""
    files = {file.stem.replace("_", "-") for file in FOLDER.glob("*.py")} - {"--init--"}
    assert set(reporters.installed()) == files >= {"junit", "markdown", "html", "checklist"}
    assert len(set(reporters.files().values())) == len(reporters.files()) >= 3


@pytest.mark.parametrize("name", sorted(reporters.installed()))
def test_every_format_renders_the_same_verdict_to_the_same_text(name: str) -> None:
    """Some text, twice the same, whatever the format."""
    text = reporters.render(name, VERDICT)
    assert len(text) > 20
    assert text == reporters.render(name, VERDICT)


def test_one_new_file_is_a_new_format(
    found: list[EntryPoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropped into the folder of a package that an entry point names, it renders, and each gate writes it."""
    (tmp_path / "their_formats").mkdir()
    (tmp_path / "their_formats" / "__init__.py").write_text("")
    text = "FILE = 'one_line.txt'\ndef render(verdict, *, options):\n    return verdict.sentence\n"
    (tmp_path / "their_formats" / "one_line.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    found.append(EntryPoint("theirs", "their_formats", reporters.GROUP))
    assert reporters.files() == {"one-line": "one_line.txt"}
    assert reporters.render("one-line", VERDICT) == VERDICT.sentence


def test_a_function_is_a_format_by_the_name_of_its_entry_point(found: list[EntryPoint]) -> None:
    """As packages of others have named their reporters until now; no gate writes it."""
    found.append(EntryPoint("theirs", "prill_reports.formats.markdown:render", reporters.GROUP))
    assert set(reporters.installed()) == {"theirs"}
    assert reporters.files() == {}
    assert reporters.render("theirs", VERDICT).startswith("# FAILED")


def test_an_unknown_format_is_refused_by_name() -> None:
    """The nearest right one is named."""
    with pytest.raises(UsageError, match=r"no such reporter.*markdwon.*markdown"):
        reporters.render("markdwon", VERDICT)
