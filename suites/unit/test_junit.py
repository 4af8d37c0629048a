"""The JUnit report: valid for its readers, never greener than the verdict, the same bytes every time."""

from __future__ import annotations

import datetime as dt
import re
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, xunit2
from lxml import etree

from prill_harness.records.evidence import Status, badness
from prill_harness.records.verdict import AttemptResult, Verdict
from prill_reports.cases import GATE
from prill_reports.formats import junit
from prill_runtime.errors import InvalidParameter

DATA = Path(__file__).parent / "data"
VERDICT = msgspec.json.decode((DATA / "verdict.json").read_bytes(), type=Verdict)
PUBLIC = etree.XMLSchema(etree.parse(Path(__file__).parent / "schemas" / "junit-10.xsd"))
"""The schema of Jenkins's xUnit plugin, which pytest holds its `junit_family=xunit2` to as well."""


def valid(xml: str, dialect: str) -> None:
    """The strict dialect follows the public schema; the default one does when what it adds is taken away: the
    properties of a case, its file and line, and the document's count of skips."""
    tree = etree.fromstring(xml.encode())
    if dialect == "default":
        del tree.attrib["skipped"]
        for case in tree.iter("testcase"):
            del case.attrib["file"], case.attrib["line"]
            for properties in case.findall("properties"):
                case.remove(properties)
    PUBLIC.assertValid(tree)


def parse(verdict: Verdict, dialect: str = "default") -> Any:
    return JUnitXml.fromstring(junit.render(verdict, options={"dialect": dialect}).encode())


def cases(verdict: Verdict, dialect: str = "default") -> dict[tuple[str, str], TestCase]:
    found = [((s.name, c.name), c) for s in parse(verdict, dialect) for c in s]
    assert len(found) == len(dict(found)), "case names repeat within a suite"
    return dict(found)


def repeated(*statuses: Status, counted: Status | None = None) -> Verdict:
    """The sample verdict, its first check with an attempt of each status; the worst of them counts."""
    attempts = tuple(AttemptResult(n, s, f"found {n}", 0.5) for n, s in enumerate(statuses, 1))
    return with_check(attempts=attempts, status=counted or min(statuses, key=badness))


def with_check(**changes: object) -> Verdict:
    """The sample verdict with its first check changed."""
    first = msgspec.structs.replace(VERDICT.checks[0], **changes)
    return msgspec.structs.replace(VERDICT, checks=(first, *VERDICT.checks[1:]))


@pytest.mark.parametrize("dialect", junit.DIALECTS)
def test_the_schema_accepts_each_dialect(dialect: str) -> None:
    """Both dialects follow the public schema, the default one but for what it adds."""
    for verdict in (VERDICT, repeated(Status.FAILED, Status.PASSED), repeated(Status.FAILED, Status.ERROR)):
        valid(junit.render(verdict, options={"dialect": dialect, "folder": "out"}), dialect)


def test_the_strict_schema_refuses_the_default_dialect() -> None:
    """The schema can refuse: properties, file and line are no part of the strict dialect."""
    xml = junit.render(VERDICT, options={}).encode()
    assert not PUBLIC.validate(etree.fromstring(xml))
    strict = junit.render(VERDICT, options={"dialect": "jenkins-strict"})
    assert "<properties" not in strict
    assert " file=" not in strict
    assert " line=" not in strict


def test_every_status_has_its_one_child() -> None:
    """Failed is a failure; error and inconclusive are errors, as a skip is shown green; waived skips."""
    expected = {
        Status.PASSED: [],
        Status.FAILED: [Failure],
        Status.ERROR: [Error],
        Status.INCONCLUSIVE: [Error],
        Status.WAIVED: [Skipped],
    }
    found = cases(VERDICT)
    for result in VERDICT.checks:
        suite = f"{result.cell.model}.{result.cell.engine}.{result.cell.device}"
        assert [type(r) for r in found[suite, result.check].result] == expected[result.status], result.check
    assert {r.status for r in VERDICT.checks} == set(expected), "the sample shows every status"


def test_counts_are_those_of_the_cases() -> None:
    """The counts of suites and document equal a recount of the parsed cases, and of the verdict's checks."""
    document = parse(VERDICT)
    total: Counter[str] = Counter()
    for suite in document:
        kinds = Counter(type(r).__name__ for c in suite for r in c.result)
        assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (
            len(list(suite)), kinds["Failure"], kinds["Error"], kinds["Skipped"],
        )  # fmt: skip
        total.update(kinds, tests=len(list(suite)))
    assert (document.tests, document.failures, document.errors, document.skipped) == (
        total["tests"], total["Failure"], total["Error"], total["Skipped"],
    )  # fmt: skip
    checks = sum(suite.tests for suite in document if suite.name != GATE)
    assert checks == len(VERDICT.checks)


def test_the_gate_has_cases_of_its_own() -> None:
    """Verdict, rules, expired waivers and missing or dead cells are cases; a used waiver is not."""
    found = {name: case for (suite, name), case in cases(VERDICT).items() if suite == GATE}
    kinds = {name: [type(r) for r in case.result] for name, case in found.items()}
    assert kinds == {
        "prill.gate.verdict": [Failure],
        "prill.gate.rule critical-items": [Failure],
        "prill.gate.rule minimum-executed": [],
        "prill.gate.rule cells": [Error],
        "prill.gate.waiver W-3": [Failure],
        "prill.gate.cell fixture:gpt2-tiny/numpy/properties/cpu": [Error],
        "prill.gate.cell fixture:llama-tiny/numpy/stages/cpu": [Error],
    }


@pytest.mark.parametrize(("status", "code"), [(Status.FAILED, 1), (Status.INCONCLUSIVE, 10)])
def test_never_greener_than_the_verdict(status: Status, code: int) -> None:
    """A verdict that did not pass has a red case even when nothing else tells why."""
    bare = msgspec.structs.replace(
        VERDICT, status=status, exit_code=code, rules=(), items=(), cells=(), checks=(), waivers=()
    )
    document = parse(bare)
    assert document.failures + document.errors == 1
    green = parse(msgspec.structs.replace(bare, status=Status.PASSED, exit_code=0))
    assert (green.tests, green.failures, green.errors) == (1, 0, 0)


def test_a_case_says_where_its_item_stands() -> None:
    """The default dialect carries file and line of the checklist item, the oracle and the command."""
    case = cases(VERDICT)["fixture:llama-tiny.numpy.cpu", "tokens.greedy"]
    assert case._elem.get("file") == "suites/prill_suites/checklists/model.toml"
    assert case._elem.get("line") == "12"
    facts = {p.get("name"): p.get("value") for p in case._elem.iter("property")}
    assert facts["reproduce"] == "prill run --engine numpy --model fixture:llama-tiny tokens.greedy"
    assert facts["observed"] == "2400"
    assert facts["item"].startswith("llama.greedy-tokens")


def test_every_suite_has_a_time_and_every_case_a_place() -> None:
    """Suites carry the start of their first cell in ISO 8601, in both dialects; cases a file: of their item,
    of their check where no item counts it, of the policy where the gate itself speaks."""
    began = {"fixture:llama-tiny": 1_767_225_600.0, "fixture:gpt2-tiny": 1_767_225_660.5}
    cells = tuple(msgspec.structs.replace(c, at=began.get(c.cell.model, 0.0)) for c in VERDICT.cells)
    first, second, *rest = VERDICT.checks
    checks = (
        msgspec.structs.replace(first, check="harness.new", file="suites/prill_suites/harness.py", line=7),
        msgspec.structs.replace(second, check="harness.process"),
        *rest,
    )
    verdict = msgspec.structs.replace(VERDICT, cells=cells, checks=checks, policy="ci/gates.toml")
    for dialect in junit.DIALECTS:
        times = {suite.name: dt.datetime.fromisoformat(suite.timestamp) for suite in parse(verdict, dialect)}
        assert times["fixture:llama-tiny.numpy.cpu"] == dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
        assert times["fixture:gpt2-tiny.numpy.cpu"] == dt.datetime(2026, 1, 1, 0, 1, tzinfo=dt.UTC)
        assert times[GATE] == min(times.values())
    places = {name: (c._elem.get("file"), c._elem.get("line")) for (_, name), c in cases(verdict).items()}
    assert all(file and line for file, line in places.values())
    assert places["harness.new"] == ("suites/prill_suites/harness.py", "7")
    assert places["harness.process"] == places["prill.gate.verdict"] == ("ci/gates.toml", "1")
    assert {file for name, (file, _) in places.items() if name.startswith("prill.gate.")} == {"ci/gates.toml"}


def test_a_verdict_of_no_cell_is_of_its_day() -> None:
    """Where nothing ran, the suite's time is the day on which it was decided."""
    bare = msgspec.structs.replace(VERDICT, cells=(), checks=())
    (suite,) = parse(bare)
    assert suite.timestamp == f"{VERDICT.as_of}T00:00:00+00:00"


def test_the_digest_stands_beside_the_models_name() -> None:
    """A suite says under which name its model was given, and which file it was; the strict one does not."""
    verdict = msgspec.structs.replace(VERDICT, models={"fixture:llama-tiny": "ab" * 32})
    facts = {
        suite.name: {p.name: p.value for p in suite.properties()}
        for suite in parse(verdict)
        if suite.name != GATE
    }
    assert facts["fixture:llama-tiny.numpy.cpu"] == {"model": "fixture:llama-tiny", "model_sha256": "ab" * 32}
    assert "ab" * 32 not in junit.render(verdict, options={"dialect": "jenkins-strict"})


def test_every_suite_names_its_hosts() -> None:
    """A suite whose cells ran on two machines names both, in both dialects; one that knows none, none."""
    hosts = {"tokens": "one", "cache": "two"}
    cells = tuple(msgspec.structs.replace(c, host=hosts.get(c.cell.suite, "")) for c in VERDICT.cells)
    assert {c.host for c in cells if c.cell.model == "fixture:llama-tiny"} >= {"one", "two"}
    for dialect in junit.DIALECTS:
        found = {s.name: s.hostname for s in parse(msgspec.structs.replace(VERDICT, cells=cells), dialect)}
        assert found["fixture:llama-tiny.numpy.cpu"] == found[GATE] == "one, two"
        assert {s.hostname for s in parse(VERDICT, dialect)} == {None}


RERUN = {"rerunFailure", "rerunError"}


@pytest.mark.parametrize(
    ("statuses", "tags"),
    [
        ("failed passed", ["failure"]),
        ("error passed failed", ["failure", "rerunFailure"]),
        ("failed failed", ["failure", "rerunFailure"]),
        ("failed inconclusive error", ["failure", "rerunError", "rerunError"]),
        ("passed passed", []),
        ("failed", ["failure"]),
    ],
)
def test_every_attempt_is_told(statuses: str, tags: list[str]) -> None:
    """The second and later attempts that did not pass are reruns, as junitparser's reader of that flavour
    sees them; the text tells every attempt, and the counts are those of the results alone."""
    verdict = repeated(*map(Status, statuses.split()))
    xml = junit.render(verdict, options={"dialect": "jenkins-strict"})
    llama = next(s for s in xunit2.JUnitXml.fromstring(xml.encode()) if "llama" in s.name)
    (case,) = (each for each in llama if each.name == verdict.checks[0].check)
    assert [child.tag for child in case._elem] == tags
    assert len(case.interim_result) == sum(tag in RERUN for tag in tags)
    told = re.findall(r"^attempt \d: (\w+):", case.result[0].text, re.MULTILINE) if tags else []
    assert told == (statuses.split() if tags else [])
    assert all(each.message.startswith("found ") and each.text for each in case.interim_result)
    assert JUnitXml.fromstring(xml.encode()).failures == parse(VERDICT).failures + bool(tags) - (
        VERDICT.checks[0].status is Status.FAILED
    )


def test_only_a_pass_that_counts_has_flakes() -> None:
    """To readers that follow Surefire a flaky child makes its case green: a check that counts as failed has
    none, one that counts as passed has no result child and all its flakes."""
    verdict = repeated(Status.FAILED, Status.PASSED, counted=Status.PASSED)
    case = cases(verdict)["fixture:llama-tiny.numpy.cpu", verdict.checks[0].check]
    assert case.result == []
    assert [child.tag for child in case._elem if child.tag != "properties"] == ["flakyFailure"]


@pytest.mark.parametrize("dialect", junit.DIALECTS)
def test_the_verdict_has_the_files_of_the_gate_attached(dialect: str) -> None:
    """One line for each, as Jenkins's and GitLab's readers look for them; none where no folder is known."""
    xml = junit.render(VERDICT, options={"dialect": dialect, "folder": "engine/out"})
    found = re.findall(r"^(?:.*>)?\[\[ATTACHMENT\|(.*?)\]\]$", xml, re.MULTILINE)
    assert found == ["engine/out/ledger.jsonl", "engine/out/verdict.json", "engine/out/report.html"]
    (owner,) = (c for s in JUnitXml.fromstring(xml.encode()) for c in s if c.system_out)
    assert owner.name == "prill.gate.verdict"
    assert "ATTACHMENT" not in junit.render(VERDICT, options={"dialect": dialect})


def test_a_waived_case_gives_the_reason() -> None:
    """Whoever reads the skip learns who it was waived by, why and until when."""
    case = cases(VERDICT)["fixture:llama-tiny.numpy.cpu", "cache.reuse"]
    message = case.result[0].message
    assert all(word in message for word in ("W-7", "the fix waits for a review", "2026-08-20"))


def test_the_class_has_three_parts() -> None:
    """Dots and slashes of a model's path do not become levels of packages."""
    cell = msgspec.structs.replace(VERDICT.checks[0].cell, model="/models/a.b.gguf")
    names = {s.name for s in parse(with_check(cell=cell))}
    assert "_models_a_b_gguf.numpy.cpu" in names


def test_same_verdict_same_bytes() -> None:
    """Rendering is deterministic, also when the checks arrive in another order."""
    turned = msgspec.structs.replace(VERDICT, checks=VERDICT.checks[::-1])
    assert junit.render(VERDICT, options={}) == junit.render(turned, options={})


def test_an_unknown_dialect_is_named() -> None:
    """A dialect nobody knows is a usage error that lists the known ones."""
    with pytest.raises(InvalidParameter, match=r"default or jenkins-strict.*'nunit'"):
        junit.render(VERDICT, options={"dialect": "nunit"})


ANY_TEXT = st.text(st.characters(), max_size=40) | st.sampled_from(
    ["\x00\x1b[31m", "\ud800", "]]>", "\ufffe\uffff", "<&\"'>", "a\r\nb", "\x85\u2028"]
)


@settings(max_examples=60, deadline=None)
@given(sentence=ANY_TEXT, name=ANY_TEXT, reproduce=ANY_TEXT, status=st.sampled_from(Status))
def test_any_text_gives_sound_xml(sentence: str, name: str, reproduce: str, status: Status) -> None:
    """Whatever an engine puts into a sentence, the XML is well-formed and no case is lost or doubled."""
    verdict = with_check(sentence=sentence, check=f"tokens.{name}", reproduce=reproduce, status=status)
    for dialect in junit.DIALECTS:
        xml = junit.render(verdict, options={"dialect": dialect})
        valid(xml, dialect)
        document = JUnitXml.fromstring(xml.encode())
        red = sum(c.is_failure or c.is_error for s in document if s.name != GATE for c in s)
        bad = {Status.FAILED, Status.ERROR, Status.INCONCLUSIVE}
        assert red == sum(r.status in bad for r in verdict.checks)
        assert sum(s.tests for s in document if s.name != GATE) == len(verdict.checks)


@pytest.mark.parametrize("duration", [1e-9, 0.0, float("nan"), float("inf"), -1.0, 1e-5, 12345.678])
def test_durations_are_plain_decimals(duration: float) -> None:
    """No exponent, no NaN and no minus reaches a time attribute."""
    xml = junit.render(with_check(duration_s=duration), options={"dialect": "jenkins-strict"})
    valid(xml, "jenkins-strict")
    times = re.findall(r' time="([^"]*)"', xml)
    assert len(times) > len(VERDICT.checks)
    assert all(re.fullmatch(r"\d+(\.\d+)?", time) for time in times), times
