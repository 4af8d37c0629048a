"""Digests and versions of everything that evidence about a model by a suite depends on."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import re
import shlex
import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from prill_harness.engines.base import Engine
from prill_harness.engines.channels import python
from prill_harness.engines.remote import Remote
from prill_harness.engines.spec import EngineSpec
from prill_harness.faults.opening import foreign
from prill_harness.version import version
from prill_harness.witness import naive
from prill_harness.witness.second import asked
from prill_runtime.errors import PrillError
from prill_runtime.models import registry

SOURCES = ("prill_runtime", "prill_harness", "prill_fixtures")
BROUGHT = (registry.GROUP, naive.GROUP)
LARGEST = 256 << 20  # bytes of an engine's file that is read whole


def describe(model: str, suite_file: Path, checks: Sequence[str] = (), engine: str = "") -> dict[str, str]:
    """What `CellStarted.versions` holds: library versions, code digest, model sha256, architecture and
    features, what other packages bring for it, the files of an engine of others, the check ids the run was
    restricted to, and the second reading of the model that was asked for.

    If a model cannot be read, `model_sha256` is empty; the cell's checks then say why.
    """
    facts = model_facts(model)
    return {
        **_libraries(),
        "python": platform.python_version(),
        "code_sha256": code_digest(suite_file.resolve()),
        "engine_sha256": engine_digest(engine),
        "selection": ",".join(sorted(checks)),
        "second": asked(),
        **facts,
        **brought(facts["architecture"]),
    }


@cache
def _libraries() -> dict[str, str]:
    return {"prill": version()} | {name: metadata.version(name) for name in ("numpy", "gguf", "pytest")}


def warm() -> None:
    """Read all that is the same for every cell, for processes forked from this one."""
    sources()
    _libraries()
    _points()


@cache
def model_facts(spec: str) -> dict[str, str]:
    """sha256, architecture and features of the file a model spec names, the last two read without planted
    faults; empty strings for what cannot be read, and no word of features that nobody knows."""
    from prill_harness.engines.features import traits
    from prill_harness.engines.models import resolve_model
    from prill_harness.planting import faults
    from prill_runtime.gguf.file import open_gguf

    with faults.only(()):
        facts = {"model_sha256": "", **traits(spec).recorded}
    with suppress(PrillError, OSError):
        paths: tuple[Path, ...] = (resolve_model(spec),)
        with suppress(PrillError), open_gguf(paths[0]) as file:
            paths = file.paths
        facts["model_sha256"] = file_digest(*paths)
    return facts


@cache
def brought(architecture: str) -> dict[str, str]:
    """Entry points of other packages for an architecture -> sha256 of their sources; none for prill's own."""
    mine = (point for point in _points() if point.name == architecture)
    return {f"{point.group} {point.value}": _digest_of(point.module) for point in mine}


@cache
def _points() -> tuple[metadata.EntryPoint, ...]:
    return tuple(point for group in BROUGHT for point in metadata.entry_points(group=group))


def _digest_of(module: str, *folders: Path) -> str:
    """sha256 over the Python files of a module or package that need not be importable (hex), in these folders
    or else where modules are."""
    top, *_ = module.split(".")
    spec = PathFinder.find_spec(top, [str(each) for each in folders]) or importlib.util.find_spec(top)
    places = [] if spec is None else spec.submodule_search_locations or [spec.origin or ""]
    files = [file for place in map(Path, places) for file in (place, *place.rglob("*.py")) if file.is_file()]
    return file_digest(*sorted(files))


def engine_digest(spec: str) -> str:
    """sha256 (hex) over the files that an engine of others consists of, as far as its spec names them: the
    words of a command, a library or a folder of them, a class's file or package. Empty where it names none,
    and for prill's own engines, whose code is in other digests."""
    if not spec or not foreign(spec):
        return ""
    parsed = EngineSpec.parse(spec)
    modules = [point.module for point in metadata.entry_points(group=python.GROUP, name=parsed.name)]
    remote = Engine.registry.get(parsed.name)
    what = remote.target(parsed.argument).what if remote and issubclass(remote, Remote) else ""
    try:
        words = shlex.split(what)
    except ValueError:  # no command, so a name as it stands
        words = [what]
    files: list[Path] = []
    for number, word in enumerate(words):
        place = Path((not number and shutil.which(word)) or word)
        owner, _, name = word.rpartition(":")
        if place.is_dir():
            files += sorted(file for sub in ("", "lib", "bin") for file in (place / sub).glob("*.so*"))
        elif place.is_file():
            files.append(place)
        elif owner.endswith(".py") and Path(owner).is_file():
            files.append(Path(owner))
        elif name.isidentifier() and re.fullmatch(r"\w+(\.\w+)*", owner):
            modules.append(owner)
    told = [_digest_of(module, Path.cwd()) for module in modules] + [_content(file) for file in files]
    return hashlib.sha256("\0".join(told).encode()).hexdigest() if told else ""


def _content(file: Path) -> str:
    """The file's digest; of one that takes long to read, its size and time of change."""
    facts = file.stat()
    return file_digest(file) if facts.st_size < LARGEST else f"{facts.st_size} {facts.st_mtime_ns}"


@cache
def assumed(spec: str) -> tuple[tuple[str, str, str], ...]:
    """(key, assumed, why) for whatever a model's file leaves open; nothing if it cannot be read."""
    from prill_harness.engines.models import resolve_model
    from prill_runtime.gguf.file import open_gguf
    from prill_runtime.models.assumptions import assumptions

    with suppress(PrillError, OSError), open_gguf(resolve_model(spec)) as file:
        return tuple((each.key, each.assumed, each.why) for each in assumptions(file))
    return ()


def file_digest(*paths: Path) -> str:
    """sha256 (hex) of the files' contents, concatenated."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


@cache
def code_digest(suite_file: Path) -> str:
    """sha256 (hex) over the suite and over the sources and goldens of prill that judge for it."""
    return hashlib.sha256(_named(suite_file) + sources()).hexdigest()


@cache
def sources() -> bytes:
    """sha256 of the names and contents of the sources and goldens of prill that judge, read once in a process
    and those forked from it."""
    found: list[Path] = []
    for package in SOURCES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            found += [p for p in Path(folder).rglob("*") if p.suffix in (".py", ".json")]
    return hashlib.sha256(b"".join(map(_named, sorted(found)))).digest()


def _named(file: Path) -> bytes:
    return file.name.encode() + b"\0" + file.read_bytes()
