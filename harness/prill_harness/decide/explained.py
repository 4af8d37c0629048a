"""What a check observes, which mistakes it is known to find, and what it proves."""

from __future__ import annotations

import ast
from functools import cache

import msgspec

from prill_harness.decide.checklist import Checklist, load_checklists
from prill_harness.decide.templates import of_models, shown_id
from prill_harness.faults.catalogue import catalogue
from prill_harness.faults.trial import kills
from prill_harness.records.catalog import check_ids, shown
from prill_harness.records.names import base_of, look_up


class Mistake(msgspec.Struct, frozen=True):
    """A planted fault that the check was seen to kill.

    Attributes:
        where: the stages or parts that it breaks. others: checks that kill it too. engine, model: show it.
    """

    fault: str
    summary: str
    where: tuple[str, ...]
    others: int
    engine: str
    model: str


class Proves(msgspec.Struct, frozen=True):
    """A checklist's item that the check stands for; `models`: of those with or without a feature alone."""

    item: str
    title: str
    why: str
    severity: str
    docs: str
    models: str


class Explanation(msgspec.Struct, frozen=True):
    """All that is known of one check without running it; the most telling mistakes come first."""

    check: str
    file: str
    line: int
    observes: str
    mistakes: tuple[Mistake, ...]
    proves: tuple[Proves, ...]


def explain(check: str) -> Explanation:
    """What is known of the packaged check of that id, a parameter in brackets left aside.

    Raises:
        UsageError: no suite declares it.
    """
    name, declared = base_of(check), check_ids()
    look_up(name, declared, "no such check", hint="prill checklist lists them beside what they prove")
    file, line = declared[name]
    return Explanation(name, shown(file), line, observes(name), _mistakes(name), _proves(name))


def observes(check: str) -> str:
    """The docstring of a check, in one line."""
    file, _ = check_ids()[check]
    return _docstrings(file.read_bytes(), str(file)).get(check, "")


@cache
def _docstrings(source: bytes, file: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(source, file)):
        if isinstance(node, ast.FunctionDef):
            told = " ".join((ast.get_docstring(node) or "").split())
            names = [n.value for d in node.decorator_list if isinstance(d, ast.Call) for n in d.args[:1]
                     if isinstance(n, ast.Constant)]  # fmt: skip
            found |= {str(name): told for name in names}
    return found


def _mistakes(check: str) -> tuple[Mistake, ...]:
    """What few other checks find says most about this one."""
    known = catalogue()
    seen = [
        Mistake(
            name,
            trial.summary,
            trial.blames,
            len(trial.killed_by) - 1,
            known[name].engine,
            trial.model,
        )
        for name, trial in _matrix().faults.items()
        if check in trial.killed_by and name in known
    ]
    return tuple(sorted(seen, key=lambda mistake: (mistake.others, mistake.fault)))


@cache
def _checklists() -> tuple[Checklist, ...]:
    return load_checklists()


@cache
def _matrix() -> kills.Kills:
    return kills.load()


def _proves(check: str) -> tuple[Proves, ...]:
    return tuple(
        Proves(shown_id(checklist, i), i.title, i.why, i.severity.value, i.docs, of_models(i))
        for checklist in _checklists()
        for i in checklist.items
        if check in i.checks
    )
