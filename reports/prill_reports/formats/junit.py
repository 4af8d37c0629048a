"""A verdict as JUnit XML, with one flat suite per model, engine and device."""

from __future__ import annotations

import datetime as dt
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from junitparser import Error, Failure, JUnitXml, Properties, Property, Skipped, TestCase, TestSuite
from junitparser.junitparser import FinalResult
from junitparser.xunit2 import FlakyError, FlakyFailure, InterimResult, RerunError, RerunFailure

from prill_harness.records.evidence import Cell, Status
from prill_harness.records.verdict import CellResult, CheckResult, Verdict
from prill_reports import cases, view
from prill_reports.cases import GATE, GateResult
from prill_reports.text import bound, one_line, seconds, unique, visible
from prill_runtime.errors import InvalidParameter

FILE = "junit.xml"
LACKING = "lacking"
DIALECTS = ("default", "jenkins-strict")
ATTACHED = ("ledger.jsonl", "verdict.json", "report.html")
"""Files of a gate that Jenkins's and GitLab's readers attach to its verdict."""


def render(verdict: Verdict, *, options: Mapping[str, str]) -> str:
    """JUnit XML of a verdict; the same verdict gives the same bytes.

    A passing case has no result child, any other exactly one: a failed check is a failure; an inconclusive
    one and an error of harness or machine are errors, because consumers show a skip as green; a waived one,
    and one that needs what the policy lets an engine lack, is skipped with its reason. The policy's rules,
    expired or refused waivers, cells without a complete ledger and the verdict itself are cases of the suite
    `prill.gate`, so the file is never greener than the verdict. What a check came to in other
    attempts stands beside its result: as flaky beside a pass, else as reruns.

    Args:
        options: `dialect` "default" (properties, file and line of the checklist item, check or policy) or
            "jenkins-strict" (what the schema of Jenkins's xUnit plugin allows, nothing else); `folder`, where
            the files of the gate lie, which are then attached to the case of the verdict.

    Raises:
        InvalidParameter: no such dialect.
    """
    dialect = options.get("dialect", "default")
    if dialect not in DIALECTS:
        raise InvalidParameter(
            "unknown JUnit dialect", where="--dialect", expected=" or ".join(DIALECTS), got=repr(dialect)
        )
    rich = dialect == "default"
    document = JUnitXml(one_line(f"prill gate {verdict.gate}"))
    names: set[str] = set()
    cells = defaultdict(list)
    for cell in verdict.cells:
        cells[_group(cell.cell)].append(cell)
    for group, results in _groups(verdict.checks).items():
        name = unique(_class(group), names)
        suite = _suite(name, verdict, cells[group])
        if rich:
            _say_model(suite, group.model, verdict.models.get(group.model, ""))
        document.append(_filled(suite, (_check_case(r, verdict, name, rich) for r in results)))
    gate = _suite(unique(GATE, names), verdict, verdict.cells)
    document.append(_filled(gate, _gate_cases(verdict, rich, options.get("folder", ""))))
    document.update_statistics()
    if not rich:
        del document._elem.attrib["skipped"]
    xml: str = document.tostring().decode("utf-8")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{xml}\n'


def _groups(checks: Iterable[CheckResult]) -> dict[Cell, list[CheckResult]]:
    """Checks by model, engine and device; the suite in the key is empty."""
    groups: dict[Cell, list[CheckResult]] = {}
    for result in sorted(checks, key=lambda r: (r.cell, r.check)):
        groups.setdefault(_group(result.cell), []).append(result)
    return groups


def _group(cell: Cell) -> Cell:
    return Cell(cell.model, cell.engine, "", cell.device)


def _suite(name: str, verdict: Verdict, cells: Sequence[CellResult]) -> TestSuite:
    """An empty suite that says when and on which hosts its cells ran."""
    suite = TestSuite(name)
    suite.timestamp = _began(verdict, cells)
    if hosts := sorted({one_line(cell.host) for cell in cells if cell.host}):
        suite.hostname = ", ".join(hosts)
    return suite


def _began(verdict: Verdict, cells: Iterable[CellResult]) -> str:
    """The start of the first cell, in ISO 8601; the day of the verdict if none started."""
    starts = [cell.at for cell in cells if cell.at > 0]
    if not starts:
        return f"{verdict.as_of}T00:00:00+00:00"
    return dt.datetime.fromtimestamp(min(starts), dt.UTC).isoformat(timespec="seconds")


def _say_model(suite: TestSuite, name: str, sha256: str) -> None:
    """Add the model's name as it was given, and the digest of its file."""
    suite.add_property("model", one_line(name))
    if sha256:
        suite.add_property("model_sha256", one_line(sha256))


def _class(cell: Cell) -> str:
    """`model.engine.device`, with dots and slashes inside a part replaced: they would mean packages."""
    return ".".join(re.sub(r"[^\w:+-]", "_", one_line(p)) for p in (cell.model, cell.engine, cell.device))


def _filled(suite: TestSuite, filling: Iterable[TestCase]) -> TestSuite:
    """The suite with its cases, each under a unique name."""
    taken = set[str]()
    for case in filling:
        case.name = unique(case.name, taken)
        suite.append(case)
    return suite


def _check_case(result: CheckResult, verdict: Verdict, classname: str, rich: bool) -> TestCase:
    case = TestCase(one_line(result.check), classname, seconds(result.duration_s))
    if rich:
        _enrich(case, result, verdict)
    if result.status is not Status.PASSED:
        status = LACKING if result.lacking else result.status.value
        case.append(_result(status, cases.sentence(result, verdict), cases.body(result)))
    case.extend(_interim(result))
    return case


def _interim(result: CheckResult) -> Iterable[InterimResult]:
    """Attempts that did not pass and are not the case's result: flaky beside a pass, else reruns.

    A case with a flaky child is green to readers that follow Surefire, whatever else it has, so a check that
    counts as failed has none, even if an attempt passed: its text tells that.
    """
    passed, attempts = result.status is Status.PASSED, view.attempts(result)
    kinds = (FlakyFailure, FlakyError) if passed else (RerunFailure, RerunError)
    missed = [each for each in attempts if each.status is not Status.PASSED]
    for each in missed if passed else missed[1:]:
        child = kinds[each.status is not Status.FAILED](
            one_line(each.sentence) or each.status.value, f"prill.{each.status.value}"
        )
        child.text = f"attempt {each.attempt} of {len(attempts)}, {seconds(each.duration_s)} s"
        yield child


def _enrich(case: TestCase, result: CheckResult, verdict: Verdict) -> None:
    """Add file and line of the checklist item or the check as attributes, and evidence as properties."""
    proving = sorted(view.proven_by(result, verdict), key=lambda i: i.severity.rank)
    facts = [
        ("suite", result.cell.suite),
        ("status", result.status.value),
        ("observed", str(result.observed)),
        ("oracle", result.oracle),
        ("sentence", result.sentence),
        ("reproduce", result.reproduce),
        *(("item", f"{i.id}: {i.title}") for i in proving),
        *(("metric", bound(m)) for m in result.metrics),
    ]
    _place(case, *cases.place(result, verdict))
    properties = Properties()
    for name, value in facts:
        if value:
            properties.add_property(Property(name, one_line(value)))
    case.append(properties)


def _place(case: TestCase, file: str, line: int) -> None:
    """Set the file and line that the case is about; CI services also split runs by it."""
    case._elem.set("file", one_line(file))
    case._elem.set("line", str(line))


def _result(status: str, sentence: str, body: str = "") -> FinalResult:
    """The one result child of a case that did not pass."""
    kind = {Status.FAILED: Failure, Status.WAIVED: Skipped, LACKING: Skipped}.get(status, Error)
    child = kind(one_line(sentence) or status, f"prill.{status}")
    if body:
        child.text = visible(body)
    return child


def _gate_cases(verdict: Verdict, rich: bool, folder: str) -> Iterable[TestCase]:
    """The gate's own cases; their place is the policy file; the first, the verdict, has the attachments."""
    for number, said in enumerate(cases.of_gate(verdict)):
        case = _gate_case(said)
        if rich:
            _place(case, *cases.of_policy(verdict))
        if folder and number == 0:
            case.system_out = "".join(f"[[ATTACHMENT|{one_line(folder)}/{name}]]\n" for name in ATTACHED)
        yield case


def _gate_case(said: GateResult) -> TestCase:
    case = TestCase(one_line(said.name), GATE, 0.0)
    if said.status is not Status.PASSED:
        case.append(_result(said.status, said.sentence))
    return case
