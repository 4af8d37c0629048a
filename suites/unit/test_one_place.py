"""What several modules need is written in one of them: the others are read, and do not spell it again."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prill_harness.records.evidence import EXIT_CODES, Status, badness
from prill_harness.records.names import base_of, suite_of

ROOT = Path(__file__).resolve().parents[2]
HARNESS, REPORTS, CI = (ROOT / part for part in ("harness/prill_harness", "reports/prill_reports", "ci"))
WORDS = frozenset(EXIT_CODES)
CUTTING = {"split", "rsplit", "partition", "rpartition", "find", "index"}


def status_named(node: ast.AST | None) -> str:
    """The status that an expression names, as a member or as a word; empty for none."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Status":
        return node.attr.lower()
    return node.value if isinstance(node, ast.Constant) and node.value in WORDS else ""


def cuts_an_id(node: ast.AST) -> bool:
    """A check's id is cut at its parameter, or at its suite."""
    if isinstance(node, ast.Subscript) and ast.unparse(node).endswith(".partition('.')[0]"):
        return True
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
        return False
    first = node.args[0]
    return node.func.attr in CUTTING and isinstance(first, ast.Constant) and first.value == "["


def orders_statuses(node: ast.AST) -> bool:
    """Three statuses in an order, or a number for each of two."""
    if isinstance(node, ast.Tuple | ast.List):
        return sum(map(bool, map(status_named, node.elts))) >= 3
    if isinstance(node, ast.Dict):
        codes = [isinstance(v, ast.Constant) and type(v.value) is int for v in node.values]
        return sum(bool(status_named(k)) and code for k, code in zip(node.keys, codes, strict=True)) >= 2
    return False


def decodes_records(node: ast.AST) -> bool:
    """JSON is read as evidence."""
    return isinstance(node, ast.Call) and any(
        word.arg == "type" and ast.unparse(word.value) in ("Evidence", "Record") for word in node.keywords
    )


def places(rule: Callable[[ast.AST], bool], *folders: Path) -> Iterator[str]:
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            if any(map(rule, ast.walk(ast.parse(file.read_bytes())))):
                yield file.relative_to(ROOT).as_posix()


# These cut names of modules, which look like ids of checks.
CUT_MODULES = {f"harness/prill_harness/{file}" for file in ("plan/provenance.py", "records/sources.py")}


@pytest.mark.parametrize(
    ("rule", "home", "seen"),
    [
        (cuts_an_id, "records/names.py", 'x.split("[", 1)[0]'),
        (cuts_an_id, "records/names.py", 'x.partition(".")[0]'),
        (orders_statuses, "records/evidence.py", "{Status.PASSED: 0, Status.FAILED: 1}"),
        (orders_statuses, "records/evidence.py", '("failed", Status.ERROR, "passed")'),
        (decodes_records, "", "msgspec.json.decode(x, type=Evidence)"),
    ],
)
def test_it_is_spelled_once(rule: Callable[[ast.AST], bool], home: str, seen: str) -> None:
    """No module but its own cuts check ids, orders statuses, gives them exit codes or decodes evidence."""
    assert any(map(rule, ast.walk(ast.parse(seen)))), "the rule sees nothing"
    apart = CUT_MODULES if rule is cuts_an_id else set()
    found = [file for file in places(rule, HARNESS, REPORTS, CI) if file not in apart]
    assert found == [f"harness/prill_harness/{home}"] * bool(home)


@given(suite=st.from_regex(r"[a-z_]+", fullmatch=True), name=st.from_regex(r"[a-z_]+", fullmatch=True),
       parameter=st.text(max_size=8))  # fmt: skip
def test_an_id_comes_apart(suite: str, name: str, parameter: str) -> None:
    """`suite.name[parameter]` has the base `suite.name`, whatever the parameter, and the suite `suite`."""
    check = f"{suite}.{name}"
    assert base_of(f"{check}[{parameter}]") == base_of(check) == check
    assert suite_of(f"{check}[{parameter}]") == suite_of(check) == suite


def test_every_status_has_an_exit_code() -> None:
    """Only what let nothing bad through ends with 0, and everything that does is less bad than the rest."""
    assert {status.value for status in Status} <= WORDS
    good = {word for word, code in EXIT_CODES.items() if code == 0}
    assert good == {"passed", "waived"}
    assert min(map(badness, good)) > max(badness(word) for word in WORDS - good)
    assert badness("what nobody knows") < badness("failed")


@pytest.mark.parametrize(
    "name",
    ["Case", "Finding", "Generation", "Ledger", "Report", "Result", "Session", "TextStream", "Verdict"],
)
def test_a_name_means_one_thing(name: str) -> None:
    """No two classes of the shipped rooms share a name that readers meet in reports and signatures."""
    rooms = [
        ROOT / room / f"prill_{room}" for room in ("runtime", "harness", "suites", "fixtures", "reports")
    ]
    named = list(places(lambda node: isinstance(node, ast.ClassDef) and node.name == name, *rooms))
    assert len([file for file in named if "selftest/peer" not in file]) <= 1, named  # psleak's own


def classes_named_twice(files: dict[str, str]) -> dict[str, list[str]]:
    """Class name -> the files that define it, where it is defined more than once; private ones left out."""
    found: dict[str, list[str]] = {}
    for name, text in sorted(files.items()):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(name)
    return {name: where for name, where in found.items() if len(where) > 1}


# Pairs that still share a name; whoever renames one takes it off.
SHARED = {"Described", "Explanation"}


def test_a_class_name_means_one_thing() -> None:
    """No two classes of the product have one name, wherever they lie: nobody need ask which is meant."""
    folders = ("runtime", "harness", "reports", "suites/prill_suites", "fixtures", "ci")
    files = {
        file.relative_to(ROOT).as_posix(): file.read_text()
        for folder in folders
        for file in (ROOT / folder).rglob("*.py")
    }
    found = classes_named_twice(files)
    assert set(found) == SHARED, found


def test_a_second_class_of_a_name_is_found() -> None:
    """In another file or another function of one; a private one is its file's own affair."""
    one, inner = "class Plan: ...", "def f():\n class Plan: ..."
    private = "class _Plan: ..."
    assert classes_named_twice({"a": one, "b": inner}) == {"Plan": ["a", "b"]}
    assert classes_named_twice({"a": f"{one}\n{inner}"}) == {"Plan": ["a", "a"]}
    assert classes_named_twice({"a": f"{one}\n{private}", "b": private}) == {}
