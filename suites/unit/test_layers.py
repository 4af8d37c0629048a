"""The rooms import one another in one direction only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "runtime": {"runtime"},
    "fixtures": {"fixtures"},
    "harness": {"harness", "runtime", "fixtures"},
    "reports": {"reports", "harness", "runtime"},
    "suites": {"suites", "harness", "runtime", "fixtures"},
}
# The harness finds a packaged model, a golden and text for clean runs through these doors alone.
FIXTURES_DOOR = {
    "harness/prill_harness/engines/spec.py",
    "harness/prill_harness/tokens/golden.py",
    "harness/prill_harness/faults/trial/clean.py",
}
SOURCES = [file for room in MAY_IMPORT for file in sorted((ROOT / room / f"prill_{room}").rglob("*.py"))]


def rooms_imported(file: Path) -> set[str]:
    """Rooms named by any import statement of the file, lazy ones included."""
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    tops = {name.split(".")[0] for name in names}
    return {top.removeprefix("prill_") for top in tops if top.startswith("prill_")}


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_follow_the_walk(file: Path) -> None:
    """No file imports a room that comes after its own."""
    name = str(file.relative_to(ROOT))
    room = name.split("/")[0]
    imported = rooms_imported(file)
    assert imported <= MAY_IMPORT[room], f"{name} imports {sorted(imported - MAY_IMPORT[room])}"
    if room == "harness" and "fixtures" in imported:
        assert name in FIXTURES_DOOR, f"{name} imports fixtures; only {sorted(FIXTURES_DOOR)} may"


def test_the_walker_sees_imports() -> None:
    """The check is not vacuous: it finds files in every room and at least one import across rooms."""
    assert {str(f.relative_to(ROOT)).split("/")[0] for f in SOURCES} == set(MAY_IMPORT)
    crossing = [f for f in SOURCES if rooms_imported(f) - {f.relative_to(ROOT).parts[0]}]
    assert len(crossing) > 5


def test_a_backward_import_is_seen(tmp_path: Path) -> None:
    """A planted lazy import of a later room is found."""
    file = tmp_path / "planted.py"
    file.write_text("def f():\n    from prill_reports import junit\n    return junit\n")
    assert rooms_imported(file) == {"reports"}
