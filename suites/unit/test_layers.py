"""What may import what: five packages in one direction, and inside two of them rooms in one order."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from importlib.util import find_spec
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
    "harness/prill_harness/engines/models.py",
    "harness/prill_harness/tokens/golden.py",
    "harness/prill_harness/faults/trial/clean.py",
}
ROOMS = {
    "runtime": (
        "errors", "files", "user_cache",
        "gguf", "quants", "tokenizer", "ops", "models", "sampling", "run",
        "device.machine", "device.memory", "device.ops", "device.steps", "device.plan", "device.model",
    ),
    "harness": (
        "version", "records", "console", "engines", "planting", "numbers", "witness",
        "stages.table", "stages.trace", "stages.routing", "tokens", "stages.hypotheses", "stages",
        "faults.planted.model", "faults.planted.serving", "faults.planted.boundary", "faults.planted.device",
        "faults.planted.judges", "faults.planted", "faults.catalogue", "faults.blackbox", "faults.opening",
        "measure", "plan", "run", "faults.trial", "decide", "incidents",
        "leaks.reports", "leaks.ledgers", "leaks.controls", "leaks.probed", "leaks.judge", "leaks.selftest",
        "recording", "commands.shared", "commands.engines", "commands.fleet", "commands.gates",
        "commands.ledgers", "commands.incidents",
        "plugin", "cli",
    ),
}  # fmt: skip
"""Rooms and single modules, each of which may import itself and what stands before it.

A room that is named with an inner one holds the rest of it."""
BY_NAME = {
    ("records.sources", "plugin"),  # reads the text of what runs every check
    ("records.sources", "recording.fixtures"),
    ("records.sources", "recording.recorder"),
    ("records.sources", "run.outcomes"),
    ("run.cells", "plugin"),  # what pytest is told to load in the cell's own process
    ("run.forkserver", "recording.forked"),  # the process from which cells are forked
}
"""(module, what it names in a text) where that stands after it: another process runs it, or nobody."""
DOZEN = 12
SOURCES = [file for room in MAY_IMPORT for file in sorted((ROOT / room / f"prill_{room}").rglob("*.py"))]
WITH_ROOMS = [f for f in SOURCES if f.relative_to(ROOT).parts[0] in ROOMS and f.name != "__init__.py"]


def imported(file: Path) -> Iterator[tuple[str, str]]:
    """(module, name or nothing) of every import statement: inside functions and for types alone too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def rooms_imported(file: Path) -> set[str]:
    """Packages of prill named by any import statement of the file."""
    tops = {module.split(".")[0] for module, _ in imported(file)}
    return {top.removeprefix("prill_") for top in tops if top.startswith("prill_")}


def module_of(file: Path, package: Path) -> str:
    """The file's name below its package, without it: `gguf.file`."""
    return ".".join(file.relative_to(package).with_suffix("").parts)


def graph(package: Path) -> dict[str, set[str]]:
    """Module -> the modules of the same package that it imports; a package stands for its __init__."""
    modules = {module_of(file, package): file for file in package.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for module, file in modules.items():
        found[module] = set()
        for of, name in imported(file):
            if of.split(".")[0] != package.name:
                continue
            below = of.split(".")[1:]
            choices = (".".join([*below, name]), ".".join([*below, name, "__init__"]), ".".join(below))
            found[module].add(next((c for c in choices if c in modules), ".".join([*below, "__init__"])))
    return found


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    """Modules that import one another, the first again at the end; empty where there are none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def place(module: str, order: Sequence[str]) -> int:
    """Where a module stands: at the longest name that is its own or its room's."""
    names = [name for name in order if module == name or module.startswith(f"{name}.")]
    assert names, f"{module} stands in no room of the table"
    return order.index(max(names, key=len))


def upward(imports: Mapping[str, set[str]], order: Sequence[str]) -> list[str]:
    """`module -> module` for every import of what stands after the importer."""
    return [
        f"{module} -> {other}"
        for module, others in imports.items()
        if not module.endswith("__init__")
        for other in sorted(others)
        if place(other, order) > place(module, order)
    ]


@pytest.fixture(scope="module", params=sorted(ROOMS))
def package(request: pytest.FixtureRequest) -> Path:
    return ROOT / str(request.param) / f"prill_{request.param}"


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_follow_the_walk(file: Path) -> None:
    """No file imports a package that comes after its own."""
    name = str(file.relative_to(ROOT))
    room = name.split("/")[0]
    found = rooms_imported(file)
    assert found <= MAY_IMPORT[room], f"{name} imports {sorted(found - MAY_IMPORT[room])}"
    if room == "harness" and "fixtures" in found:
        assert name in FIXTURES_DOOR, f"{name} imports fixtures; only {sorted(FIXTURES_DOOR)} may"


def test_no_arrow_points_up(package: Path) -> None:
    """Every module imports only its own room and those before it, whatever the place of the import."""
    assert upward(graph(package), ROOMS[package.parent.name]) == []


def test_no_circle(package: Path) -> None:
    """No module imports what imports it, by any number of steps."""
    assert circle(graph(package)) == []


def test_a_dozen_at_one_level(package: Path) -> None:
    """A folder holds at most a dozen modules and rooms; its __init__ is not counted, for it holds nothing."""
    for folder in [package, *(each for each in package.rglob("*") if each.is_dir())]:
        held = [
            each.name
            for each in folder.iterdir()
            if (each.is_dir() and any(each.rglob("*.py"))) or each.suffix == ".py"
        ]
        held = [name for name in held if name != "__init__.py"]
        if folder == package:
            held = [name for name in held if name.endswith(".py")]  # rooms of the first level are the plan
        assert len(held) <= DOZEN, f"{folder.relative_to(ROOT)} holds {len(held)}: {', '.join(sorted(held))}"


def test_the_table_names_what_is_there(package: Path) -> None:
    """Each entry is a room or a module, and each module stands in one."""
    order = ROOMS[package.parent.name]
    modules = {module_of(f, package) for f in package.rglob("*.py") if f.name != "__init__.py"}
    used = {order[place(module, order)] for module in modules}
    assert used == set(order)
    assert len(order) == len(set(order))


def test_a_room_opens_nothing(package: Path) -> None:
    """The __init__ of a room says what the room is for, and imports nothing: no arrow starts there unseen."""
    for file in package.rglob("*/__init__.py"):
        (only,) = ast.parse(file.read_text("utf-8")).body
        assert isinstance(only, ast.Expr), file
        assert isinstance(only.value, ast.Constant), file


def test_nothing_is_imported_by_way_of_the_front_door(package: Path) -> None:
    """What the package offers to others is imported from where it is, and no room is imported as a whole."""
    found = {
        f"{module} imports {other}"
        for module, others in graph(package).items()
        for other in others
        if other.endswith("__init__")
        and other != "faults.planted.__init__"  # which the catalogue walks
        and module != "__init__"
        and not (module == "cli" and other.startswith("commands."))
    }
    assert found == set()


def test_names_in_texts_are_no_way_up() -> None:
    """A text names a module that stands after its own only where another process runs it."""
    found = set()
    for room, order in ROOMS.items():
        package = ROOT / room / f"prill_{room}"
        pattern = re.compile(rf"{package.name}\.([\w.]+)")
        for file in package.rglob("*.py"):
            module = module_of(file, package)
            texts = {
                n.value for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.Constant)
            }
            named = {m[1] for text in texts if isinstance(text, str) and (m := pattern.fullmatch(text))}
            found |= {
                (module, name)
                for name in named
                if not module.endswith("__init__") and place(name, order) > place(module, order)
            }
    assert found == BY_NAME


@pytest.mark.parametrize("folder", ["suites/unit", "ci"])
def test_what_only_some_environments_import_is_there(folder: str) -> None:
    """Every module of prill's that a test or a script names has what it takes, installed extras or not."""
    named = {
        (node.module, alias.name)
        for file in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("prill_")
        for alias in node.names
    }
    assert named
    assert sorted(each for each in named if not there(*each)) == []


def test_an_import_of_what_is_not_there_is_seen() -> None:
    """A module that moved, a room that went and a name that went are each found."""
    assert there("prill_runtime.gguf", "file")
    assert there("prill_runtime.gguf.file", "open_gguf")
    assert not there("prill_runtime.nosuch", "open_gguf")
    assert not there("prill_nosuch.gguf", "open_gguf")
    assert not there("prill_runtime.gguf.file", "nosuch")


def there(module: str, name: str) -> bool:
    """True when `from module import name` would work."""
    try:
        return hasattr(import_module(module), name) or find_spec(f"{module}.{name}") is not None
    except ModuleNotFoundError:
        return False


def test_the_walker_sees_imports() -> None:
    """The checks are not vacuous: there are files in every package, imports across them and inside them."""
    assert {str(f.relative_to(ROOT)).split("/")[0] for f in SOURCES} == set(MAY_IMPORT)
    crossing = [f for f in SOURCES if rooms_imported(f) - {f.relative_to(ROOT).parts[0]}]
    assert len(crossing) > 5
    for room in ROOMS:
        assert sum(map(len, graph(ROOT / room / f"prill_{room}").values())) > len(WITH_ROOMS) / 4


def test_a_backward_import_is_seen(tmp_path: Path) -> None:
    """A planted lazy import of a later package is found."""
    file = tmp_path / "planted.py"
    file.write_text("def f():\n    from prill_reports.formats import junit\n    return junit\n")
    assert rooms_imported(file) == {"reports"}


@pytest.mark.parametrize(
    "line",
    [
        "from prill_small.high import wide",
        "from prill_small.high.wide import f",
        "import prill_small.high.wide",
        "def g():\n    from prill_small.high.wide import f",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from prill_small.high.wide import f",
    ],
)
def test_a_planted_arrow_and_a_planted_circle_are_seen(tmp_path: Path, line: str) -> None:
    """However it is written and wherever it stands."""
    package = tmp_path / "prill_small"
    for name, text in {"low/narrow.py": line, "high/wide.py": "from prill_small.low import narrow"}.items():
        (package / name).parent.mkdir(parents=True)
        (package / name).write_text(text + "\n")
    assert upward(graph(package), ["low", "high"]) == ["low.narrow -> high.wide"]
    assert set(circle(graph(package))) == {"low.narrow", "high.wide"}
    (package / "low/narrow.py").write_text("import ast\n")
    assert upward(graph(package), ["low", "high"]) == [] == circle(graph(package))
