"""What the text of a Python file names and declares: modules, files beside it, checks; each is parsed once.

A process that judges needs some 200 texts, more than a second of parsing. What was found is therefore kept in
the user's cache under the digest of the text, in a file named after the digest of this one: another text, or
another way to read it, is never taken for it.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import msgspec

from prill_runtime import user_cache
from prill_runtime.errors import PrillError

ROOMS = ("prill_harness", "prill_suites", "prill_fixtures")
MODULE = re.compile(rf"(?:{'|'.join(ROOMS)})(?:\.\w+)+")
BESIDE = re.compile(r"\w+\.(?!py$)\w+")
_LEAVES = (ast.Name, ast.expr_context, ast.operator, ast.cmpop)  # most of a tree, and they name no file
_MOST = 4096  # texts kept; edits add to them


class Named(msgspec.Struct, frozen=True):
    """What one part of a file names.

    Attributes:
        modules: each is a module, or is imported as one.
        members: of modules; `from package import name` names both, for the name may be a module.
        texts: strings that may name a module of prill, or its beginning (with the dot), or a file.
    """

    modules: frozenset[str]
    members: frozenset[str]
    texts: frozenset[str]


class Parsed(msgspec.Struct, frozen=True):
    """What one file names and declares.

    Attributes:
        outside: what it names outside fixtures.
        fixtures: name of a pytest fixture -> what it names, and its arguments.
        arguments: of all functions.
        checks: literal id and line of each check.
    """

    outside: Named
    fixtures: Mapping[str, tuple[Named, frozenset[str]]]
    arguments: frozenset[str]
    checks: tuple[tuple[str, int], ...]


class _Part:
    """Collects what one part of a file names."""

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self.members: set[str] = set()
        self.texts: set[str] = set()

    def add(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            self.modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            self.modules.add(node.module)
            self.members |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if MODULE.fullmatch(text.removesuffix(".")) or BESIDE.fullmatch(text):
                self.texts.add(text)

    def named(self) -> Named:
        return Named(frozenset(self.modules), frozenset(self.members), frozenset(self.texts))


def parse(text: bytes, name: str) -> Parsed:
    """What a file with this text names and declares.

    Args:
        name: of the file, for the error.

    Raises:
        SyntaxError, ValueError: it is not Python.
    """
    outside, arguments, checks = _Part(), set[str](), list[tuple[str, int]]()
    found: dict[str, tuple[_Part, frozenset[str]]] = {}
    pending: list[tuple[ast.AST, _Part]] = [(ast.parse(text, name), outside)]
    while pending:
        node, part = pending.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.FunctionDef):
            own = frozenset(a.arg for a in (*node.args.args, *node.args.kwonlyargs))
            arguments |= own
            if any("fixture" in ast.unparse(decorator) for decorator in node.decorator_list):
                part = _Part()
                found[node.name] = part, own
        elif isinstance(node, ast.Call) and (check := _check(node)):
            checks.append((check, node.lineno))
        part.add(node)
        for value in vars(node).values():
            for child in value if isinstance(value, list) else (value,):
                if isinstance(child, ast.AST) and not isinstance(child, _LEAVES):
                    pending.append((child, part))
    fixtures = {fixture: (inner.named(), own) for fixture, (inner, own) in found.items()}
    checks.sort(key=lambda check: check[1])
    return Parsed(outside.named(), fixtures, frozenset(arguments), tuple(checks))


def _check(call: ast.Call) -> str:
    """The id of the check that a call declares; empty if it declares none, or none by a literal name."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    values = [*call.args[:1], *(k.value for k in call.keywords if k.arg == "name")]
    first = values[0] if name == "check" and values else None
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""


class Kept:
    """What was found in texts, by their digests, and in the user's cache as far as it can be used.

    A cache that cannot be read or written costs time alone.
    """

    def __init__(self) -> None:
        self._known: dict[str, Parsed] = {}
        self._asked: dict[str, Parsed] = {}
        with suppress(PrillError, OSError, msgspec.MsgspecError):
            if user_cache.whole(file := _place()):
                self._known = msgspec.json.decode(file.read_bytes(), type=dict[str, Parsed])

    def read(self, file: Path) -> Parsed:
        """What a file names and declares.

        Raises:
            SyntaxError, ValueError: it is not Python.
        """
        text = file.read_bytes()
        digest = hashlib.sha256(text).hexdigest()
        if digest not in self._asked:
            self._asked[digest] = self._known.get(digest) or parse(text, str(file))
        return self._asked[digest]

    def save(self) -> None:
        """Keep what was read anew."""
        if self._asked.keys() <= self._known.keys():
            return
        both = self._known | self._asked
        self._known = both if len(both) <= _MOST else dict(self._asked)
        with suppress(PrillError, OSError):
            user_cache.put(_place(), self._write)

    def _write(self, file: Path) -> None:
        file.write_bytes(msgspec.json.encode(self._known))


@cache
def kept() -> Kept:
    """What this process and those before it found."""
    return Kept()


@cache
def _own_digest() -> str:
    own = hashlib.sha256(Path(__file__).read_bytes())
    own.update(repr(sys.version_info[:2]).encode())
    return own.hexdigest()


def _place() -> Path:
    return user_cache.folder("parsed") / f"{_own_digest()[:24]}.json"
