"""`py:...`: an engine in a user's class, named by module, file or entry point."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from prill_harness.engines.base import Engine
from prill_harness.engines.remote import CALLS, Channel, Hello, OnToken, Remote, Target
from prill_runtime.errors import EngineError, MissingCapability, PrillError, UsageError

GROUP = "prill.engines"
OWN = ("name", "version", "device", "arithmetic", "config", "draws", "at_once")
"""Attributes by which an object may describe itself; `at_once`, how many threads may call it at one time."""
USUAL = {"stop": [], "ignore_eos": False}
"""Arguments of `generate` that a class need not take as long as they have these values."""


def load(spec: str, where: str) -> Any:
    """The class that `module:Class` or `file.py:Class` names; modules of the current folder are found.

    Raises:
        UsageError: no such module or class, or one that cannot be imported.
    """
    module, _, name = spec.rpartition(":")
    if not module or not name.isidentifier():
        raise UsageError("no class named", where=where, expected="py:package.module:Class", got=repr(spec))
    try:
        loaded = _file(module) if module.endswith(".py") else _module(module)
    except PrillError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"the module {module} cannot be imported", where=where, got=f"{type(error).__name__}: {error}"
        ) from error
    if not callable(found := getattr(loaded, name, None)):
        raise UsageError(f"{module} has no class {name}", where=where, got=repr(found))
    return found


def _module(name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _file(name: str) -> Any:
    path = Path(name).resolve()
    if not path.is_file():
        raise UsageError("no such file", where="py", got=repr(name))
    known = f"prill_engine_{path.stem}"
    loaded = sys.modules.get(known)
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    spec = importlib.util.spec_from_file_location(known, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module
    spec.loader.exec_module(module)
    return module


class Calls:
    """The methods of a user's object as a channel; whatever they raise is an error of the engine."""

    def __init__(self, engine: Any, name: str) -> None:
        self._engine: Any = engine
        self._name = name
        said = {key: value for key in OWN if not callable(value := getattr(engine, key, None)) and value}
        methods = {call for call in (*CALLS, "detokenize") if callable(getattr(engine, call, None))}
        self.hello = Hello(**{"name": name, **said}, calls=frozenset(methods))
        takes = inspect.signature(engine.generate).parameters if "generate" in methods else {}
        named = all(each.kind is not each.VAR_KEYWORD for each in takes.values())
        self._takes = frozenset(takes) if named else None
        self._streams = "on_token" in takes

    def call(self, name: str, arguments: Mapping[str, Any], on_token: OnToken | None = None) -> Any:
        if self._engine is None:
            raise EngineError("engine is closed", expected="an open engine", hint="open it again")
        if on_token is not None:
            if not self._streams:
                raise MissingCapability(f"engine {self._name} does not take on_token")
            arguments = {**arguments, "on_token": on_token}
        if name == "generate" and self._takes is not None:
            lacking = [each for each in arguments if each not in self._takes]
            if unusual := [each for each in lacking if arguments[each] != USUAL.get(each)]:
                raise MissingCapability(f"engine {self._name} does not take {', '.join(unusual)}")
            arguments = {each: value for each, value in arguments.items() if each not in lacking}
        return guarded(lambda: getattr(self._engine, name)(**arguments), f"{self._name}.{name}")

    def close(self) -> None:
        engine, self._engine = self._engine, None
        if callable(close := getattr(engine, "close", None)):
            guarded(close, f"{self._name}.close")


def guarded(call: Any, where: str) -> Any:
    """The result of a call.

    Raises:
        MissingCapability: the call raised a NotImplementedError.
        PrillError: as the call raised it.
        EngineError: any other exception, with its kind and sentence.
    """
    try:
        return call()
    except PrillError:
        raise
    except NotImplementedError as error:
        raise MissingCapability(str(error) or "not implemented", where=where) from error
    except Exception as error:
        raise EngineError(f"{type(error).__name__}: {error}", where=where) from error


class Python(Remote, spec="py"):
    """A class of the user's: made with the model's path, called by its methods.

    ```python
    class Mine:
        arithmetic = "float32"
        def __init__(self, model): ...
        def tokenize(self, text, add_special=True): ...  # -> ids
        def logits(self, ids): ...  # -> (len(ids), vocabulary)
        def generate(self, ids, max_tokens, temperature=0.0, ..., stop=(), ignore_eos=False): ...
    ```
    """

    connector = "py"

    @classmethod
    def accepts(cls, argument: str) -> None:
        target = Target.parse(cls.connector, argument)
        load(target.what, repr(f"py:{target.what}"))

    @classmethod
    def connect(cls, target: Target, path: str) -> Channel:
        made = load(target.what, repr(f"py:{target.what}"))
        return made_of(made, target.what, path)


def made_of(cls: Any, name: str, path: str) -> Channel:
    """The channel to an object that a class makes of a model's path."""
    return Calls(guarded(lambda: cls(path), name), name)


@cache
def installed() -> dict[str, EntryPoint]:
    """The engines that installed packages offer, in the group `prill.engines`; nothing of them is imported.

    Looked up once: each look leaves some objects behind, which a leak probe would count to an engine.
    """
    return {entry.name: entry for entry in entry_points(group=GROUP)}


@cache
def offered(name: str) -> type[Engine]:
    """The engine class of one of `installed()`: the one that its entry point names, or a connector to
    whatever it names.

    Raises:
        UsageError: it cannot be imported.
    """
    entry = installed()[name]
    found = load(entry.value, f"entry point {name!r} of {GROUP}")
    if isinstance(found, type) and issubclass(found, Engine):
        return found

    class Offered(Remote):
        connector = name

        @classmethod
        def accepts(cls, argument: str) -> None:
            target = Target.parse(name, whole(argument))
            if target.what != entry.value:
                raise UsageError(
                    f"{name} takes options only", where=repr(f"{name}:{argument}"),
                    expected=f"{name}, or {name}:arithmetic=NAME or timeout=SECONDS", got=repr(argument),
                )  # fmt: skip

        @classmethod
        def open(cls, argument: str, model: str) -> Engine:
            return super().open(whole(argument), model)

        @classmethod
        def connect(cls, target: Target, path: str) -> Channel:
            return made_of(found, name, path)

    def whole(argument: str) -> str:
        return f"{entry.value},{argument}" if argument else entry.value

    return Offered
