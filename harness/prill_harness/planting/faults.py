"""A planted fault is a name and a few patches; what is active while which engine works is decided here alone.

Production code has no branch for faults: a fault replaces attributes of its modules and classes from
outside. An engine opened as `numpy+fault:NAME` has its fault active only inside its own calls. A process that
tests such an engine makes the fault ambient, so that code called without an engine (a sampler, a decoder) is
faulty too; engines without a fault, the oracle above all, then suspend it inside their calls. A fault of the
area `common` is in the code that all engines share: once ambient, nothing suspends it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any, TypeVar

from prill_harness.engines.base import Engine, Session
from prill_harness.engines.features import Traits, having, in_words, packaged
from prill_runtime.errors import UsageError

Wrap = Callable[[Any], Any]
Patches = Callable[[], Iterable["Patch"]]
AREAS = (
    "file", "blocks", "embedding", "norm", "rope", "attention", "feed-forward", "options", "head", "sampler",
    "tokenizer", "requests", "generation", "state", "late", "shapes", "memory", "boundary", "cost", "trace",
    "device", "harness", "common",
)  # fmt: skip
COMMON = "common"


@dataclass(frozen=True)
class Patch:
    """One attribute replaced: `module:Qualified.name`, and a function from original to replacement."""

    target: str
    wrap: Wrap

    def owner(self) -> tuple[Any, str]:
        """The object that holds the attribute, and the attribute's name."""
        module, _, path = self.target.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        return owner, name


@dataclass(frozen=True)
class Fault:
    """One small named bug.

    Attributes:
        area: the row of the table of faults it belongs to, one of AREAS.
        blames: stage kinds (`q_rope`) or parts (`file`, `tokenizer`, `sampler`, `state` …) of which one has
            to be blamed by whoever finds it.
        summary: what is wrong, one clause.
        given: model specs on which it shows, where a particular file is needed; else its features say which.
        patches: yields the patches.
        engine: the engine whose code it changes.
        needs, lacks: features that a model has to have, or not to have, for the fault to be in what it runs.
    """

    name: str
    area: str
    blames: tuple[str, ...]
    summary: str
    given: tuple[str, ...]
    patches: Patches
    engine: str = "numpy"
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()

    @functools.cached_property
    def models(self) -> tuple[str, ...]:
        """Model specs on which it shows; the first is the one it is run on.

        Those that were given; else the first packaged model that suits it, or, where any does, the first of
        each architecture.

        Raises:
            UsageError: no packaged model has what it needs.
        """
        if self.given:
            return self.given
        with only(()):
            if not (self.needs or self.lacks):
                first: dict[str, str] = {}
                for spec, found in packaged().items():
                    first.setdefault(found.architecture, spec)
                return tuple(first.values())
            suits = having(self.needs, self.lacks)
        if suits is None:
            expected = f"one {in_words(self.needs, self.lacks)}"
            raise UsageError(f"no packaged model can show fault {self.name}", expected=expected,
                             hint="give it a model of its own, or package one")  # fmt: skip
        return (suits,)

    def applies_to(self, model: Traits) -> bool:
        """Whether a model is known to have what the fault breaks."""
        return model.suits(self.needs, self.lacks) is True

    @property
    def source(self) -> str:
        """The code of the fault, for `prill faults show`."""
        return inspect.getsource(self.patches)

    @property
    def code(self) -> str:
        """The source, and whatever of the faults' own modules it names, for its content hash."""
        return "\n".join(text for _, text in sorted(_used(self.patches).items()))


def _used(function: Callable[..., Any]) -> dict[str, str]:
    """Name -> source or value of a function and of everything it uses that modules of its room define."""
    own = tuple(f"{room}." for room in (__package__, ".".join(function.__module__.split(".")[:2])))
    found: dict[str, str] = {}
    pending: list[Any] = [function]
    while pending:
        each = pending.pop()
        if each.__qualname__ in found:
            continue
        found[each.__qualname__] = inspect.getsource(each)
        for name in _names(each.__code__) if inspect.isfunction(each) else ():
            value = each.__globals__.get(name)
            module = str(getattr(value, "__module__", ""))
            if module.startswith(own) and module != __name__:
                pending.append(value)
            elif _plain(value):
                found[name] = repr(value)
    return found


def _plain(value: object) -> bool:
    """True for numbers, text, and tuples and dictionaries of them, which look the same in every process."""
    if isinstance(value, tuple | dict):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return all(_plain(each) for each in inner)
    return isinstance(value, str | int | float)


def _names(code: CodeType) -> set[str]:
    """Every global name in a function's code and in the functions inside it."""
    inner = [names for part in code.co_consts if isinstance(part, CodeType) for names in _names(part)]
    return {*code.co_names, *inner}


REGISTRY: dict[str, Fault] = {}


def fault(
    *,
    area: str,
    blames: Sequence[str],
    models: Sequence[str] = (),
    needs: Sequence[str] = (),
    lacks: Sequence[str] = (),
    engine: str = "numpy",
) -> Callable[[Patches], Patches]:
    """Register a function that yields patches as the fault of its name; its docstring is the summary. For the
    rest see `Fault`; `models` are given where a particular file is needed."""

    def register(function: Patches) -> Patches:
        name = function.__name__
        told = function.__doc__ or (name.replace("_", " ") if sys.flags.optimize > 1 else "")
        if name in REGISTRY or area not in AREAS or not blames or not told:
            raise ValueError(f"fault {name} is declared twice or incompletely")
        summary = told.strip().rstrip(".")
        REGISTRY[name] = Fault(
            name, area, tuple(blames), summary, tuple(models), function, engine, tuple(needs), tuple(lacks)
        )
        return function

    return register


def planted_in_both(name: str, blames: Sequence[str]) -> None:
    """Register a fault that is declared already once more, as one of engine and oracle alike."""
    own = REGISTRY[name]
    summary = f"Engine and oracle alike: {own.summary[:1].lower()}{own.summary[1:]}"
    REGISTRY[f"common_{name}"] = replace(
        own, name=f"common_{name}", area=COMMON, blames=tuple(blames), summary=summary
    )


_active: tuple[Fault, ...] = ()
_shared: tuple[Fault, ...] = ()  # of the area `common`, planted for the rest of the process
_undo: list[tuple[Any, str, Any, bool]] = []


@contextmanager
def only(faults: tuple[Fault, ...]) -> Iterator[None]:
    """Make exactly these faults active, beside shared ones; what was before is restored on the way out."""
    before, faults = _active, (*_shared, *(each for each in faults if each not in _shared))
    if before == faults:
        yield
        return
    _install(faults)
    try:
        yield
    finally:
        _install(before)


def ambient(faults: tuple[Fault, ...]) -> None:
    """Make these faults active for the rest of the process."""
    global _shared
    _shared = tuple(each for each in faults if each.area == COMMON)
    _install((*_shared, *(each for each in faults if each not in _shared)))


def active() -> tuple[Fault, ...]:
    """The faults that are active now."""
    return _active


@functools.cache
def _patches(fault: Fault) -> tuple[Patch, ...]:
    """Made once, so that what a fault remembers outlives the calls for which it is suspended."""
    return tuple(fault.patches())


def _install(faults: tuple[Fault, ...]) -> None:
    global _active
    while _undo:
        owner, name, original, own = _undo.pop()
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
    _active = faults
    for each in faults:
        for patch in _patches(each):
            owner, name = patch.owner()
            own = name in vars(owner)
            original = vars(owner)[name] if own else getattr(owner, name)
            kind = type(original) if isinstance(original, staticmethod | classmethod) else None
            replacement = patch.wrap(original.__func__ if kind else original)
            _undo.append((owner, name, original, own))
            setattr(owner, name, kind(replacement) if kind else replacement)


T = TypeVar("T", Engine, Session)


def scoped(open_it: Callable[[], Engine], faults: tuple[Fault, ...]) -> Engine:
    """Open an engine under exactly these faults, and keep each of its later calls under them.

    Without any, in a process without any, it is opened as it is.
    """
    if not faults and not active():
        return open_it()
    with only(faults):
        engine = open_it()
    return _confine(engine, faults)


def _confine(target: T, faults: tuple[Fault, ...]) -> T:
    """Give the object's class a twin whose methods all run under the faults."""
    cls = type(target)

    def __getattribute__(self: Any, name: str) -> Any:  # noqa: N807
        with only(faults):
            value = cls.__getattribute__(self, name)
        if name.startswith("_") or not inspect.ismethod(value):
            return value

        @functools.wraps(value)
        def call(*arguments: Any, **named: Any) -> Any:
            with only(faults):
                result = value(*arguments, **named)
            return _confine(result, faults) if isinstance(result, Session) else result

        return call

    twin = type(cls.__name__, (cls,), {"__getattribute__": __getattribute__, "__doc__": cls.__doc__})
    target.__class__ = twin
    return target
