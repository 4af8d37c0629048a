"""SARIF, CTRF, in-toto and badges: valid by what their readers publish, never greener than the verdict."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st
from in_toto_attestation.predicates.test_result.v0 import test_result_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from lxml import etree

from prill_harness.records.evidence import Status
from prill_harness.records.verdict import AttemptResult, Verdict
from prill_reports import view
from prill_reports.cases import of_gate
from prill_reports.formats import badge, ctrf, in_toto, sarif, shields

from .sample import VERDICT

HERE = Path(__file__).parent
PASSED = msgspec.structs.replace(
    VERDICT,
    status=Status.PASSED,
    exit_code=0,
    rules=(),
    items=(),
    waivers=(),
    cells=tuple(c for c in VERDICT.cells if c.status == "complete"),
    checks=tuple(r for r in VERDICT.checks if r.status is Status.PASSED),
)
INCONCLUSIVE = msgspec.structs.replace(PASSED, status=Status.INCONCLUSIVE, exit_code=10)
DIGESTS = {"b.gguf": "cd" * 32, "a.gguf": "ab" * 32, "lost.gguf": ""}
BROKEN = next(r for r in VERDICT.checks if r.status is Status.FAILED)
WAIVED = next(r for r in VERDICT.checks if r.status is Status.WAIVED)
NASTY = st.text(max_size=30) | st.sampled_from(
    ["\x00\x1b[0m", "\ud800", "a\r\nb\u202e", "%0A::error::", "<&>\"'"]
)


def validator(name: str) -> jsonschema.protocols.Validator:
    schema = json.loads((HERE / "schemas" / name).read_text("utf-8"))
    checked = jsonschema.validators.validator_for(schema)
    return checked(schema, format_checker=checked.FORMAT_CHECKER)


SARIF, CTRF = validator("sarif-schema-2.1.0.json"), validator("ctrf.schema.json")


def read_sarif(verdict: Verdict) -> dict[str, Any]:
    """The one run of the document, which follows OASIS's schema."""
    document = json.loads(sarif.render(verdict, options={}))
    SARIF.validate(document)
    (run,) = document["runs"]
    return dict(run)


def read_ctrf(verdict: Verdict) -> dict[str, Any]:
    """The results of the document, which follows the format's schema."""
    document = json.loads(ctrf.render(verdict, options={}))
    CTRF.validate(document)
    return dict(document["results"])


def read_statement(verdict: Verdict) -> tuple[Any, Any]:
    """Statement and predicate, read by the published protocol buffers, which refuse a field they lack."""
    made = json_format.Parse(in_toto.render(verdict, options={}), statement_pb2.Statement())
    Statement.copy_from_pb(made).validate()
    predicate = json_format.ParseDict(json_format.MessageToDict(made.predicate), test_result_pb2.TestResult())
    return made, predicate


def altered(**changes: Any) -> Verdict:
    first = msgspec.structs.replace(BROKEN, **changes)
    others = (r for r in VERDICT.checks if r is not BROKEN)
    return msgspec.structs.replace(VERDICT, checks=(first, *others))


@pytest.mark.parametrize("checked", [SARIF, CTRF], ids=["sarif", "ctrf"])
def test_the_schemas_can_refuse(checked: jsonschema.protocols.Validator) -> None:
    """Neither schema takes the other's document, nor one with a field too many."""
    documents = {id(SARIF): sarif.render(VERDICT, options={}), id(CTRF): ctrf.render(VERDICT, options={})}
    mine = json.loads(documents.pop(id(checked)))
    assert checked.is_valid(mine)
    assert not checked.is_valid(mine | {"surplus": 1})
    assert not checked.is_valid(json.loads(next(iter(documents.values()))))


def test_sarif_has_every_finding_where_it_is_declared() -> None:
    """What did not pass is a result with file and line, worst first; a waived one is suppressed, with why."""
    run = read_sarif(VERDICT)
    opened = [r for r in VERDICT.checks if r.status is not Status.PASSED]
    assert len(run["results"]) == len(opened) == 5
    first = run["results"][0]
    place = first["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "suites/prill_suites/checklists/model.toml"
    assert place["region"] == {"startLine": 12}
    assert (first["ruleId"], first["level"]) == ("tokens.greedy", "error")
    assert "reproduce: prill run --engine numpy" in first["message"]["text"]
    levels = Counter(r["level"] for r in run["results"])
    assert levels == {"error": 4, "warning": 1}
    (waived,) = (r for r in run["results"] if "suppressions" in r)
    assert waived["ruleId"] == "cache.reuse"
    assert "W-7" in waived["suppressions"][0]["justification"]
    rules = {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    assert rules == {r["ruleId"] for r in run["results"]}


def test_sarif_keeps_the_prints_of_a_finding() -> None:
    """Code scanning knows a finding again in the next run by its check and cell, whatever it says."""
    prints = [r["partialFingerprints"]["prillCheck/v1"] for r in read_sarif(VERDICT)["results"]]
    assert len(set(prints)) == len(prints)
    again = [r["partialFingerprints"]["prillCheck/v1"] for r in read_sarif(altered(sentence="x"))["results"]]
    assert again == prints


def test_sarif_says_what_the_gate_says() -> None:
    """The verdict, broken rules and lost cells are notifications; a run that lost a cell was no success."""
    invocation = read_sarif(VERDICT)["invocations"][0]
    told = [n["descriptor"]["id"] for n in invocation["toolExecutionNotifications"]]
    assert told == [said.name for said in of_gate(VERDICT) if said.status is not Status.PASSED]
    assert (invocation["executionSuccessful"], invocation["exitCode"]) == (False, 1)
    clean = read_sarif(PASSED)
    assert clean["results"] == clean["invocations"][0]["toolExecutionNotifications"] == []
    assert clean["invocations"][0]["executionSuccessful"]


def test_sarif_counts_what_github_would_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst results are there, as many as GitHub shows, and a notification counts the others."""
    assert sarif.MOST == 5000
    monkeypatch.setattr(sarif, "MOST", 60)
    many = [msgspec.structs.replace(BROKEN, check=f"tokens.x[{n}]", detail={}) for n in range(sarif.MOST)]
    run = read_sarif(msgspec.structs.replace(VERDICT, items=(), checks=(*VERDICT.checks, *many)))
    assert len(run["results"]) == sarif.MOST
    last = run["invocations"][0]["toolExecutionNotifications"][-1]["message"]["text"]
    assert last == "5 more results: 2 failed, 1 error, 1 inconclusive, 1 waived"


def test_ctrf_has_every_check_and_its_own_word() -> None:
    """Counts are those of the tests; `rawStatus` keeps prill's word; the gate's cases stand among them."""
    results = read_ctrf(VERDICT)
    tests, summary = results["tests"], results["summary"]
    counts = Counter(test["status"] for test in tests)
    assert {kind: summary[kind] for kind in ("passed", "failed", "skipped", "pending", "other")} == {
        "passed": counts["passed"], "failed": counts["failed"], "skipped": 1, "pending": 0, "other": 1,
    }  # fmt: skip
    own = [said.name for said in of_gate(VERDICT)]
    assert summary["tests"] == len(tests) == len(VERDICT.checks) + len(own)
    assert [t["name"] for t in tests[-len(own) :]] == own
    raw = Counter(t["rawStatus"] for t in tests if t["suite"] != ["prill.gate"])
    assert raw == Counter(r.status.value for r in VERDICT.checks)
    assert len({t["testId"] for t in tests}) == len(tests)
    assert not results["environment"]["healthy"]


def test_ctrf_tells_every_attempt() -> None:
    """Retries, each with its status; flaky where an attempt passed and another did not."""

    tried = (AttemptResult(1, Status.FAILED, "no", 0.25), AttemptResult(2, Status.PASSED, "yes", 0.5))
    check = msgspec.structs.replace(BROKEN, attempts=tried)
    results = read_ctrf(msgspec.structs.replace(VERDICT, checks=(check,)))
    test = results["tests"][0]
    assert (test["status"], test["flaky"], test["retries"], results["summary"]["flaky"]) == (
        "failed", True, 1, 1,
    )  # fmt: skip
    assert [(a["attempt"], a["status"], a["duration"]) for a in test["retryAttempts"]] == [
        (1, "failed", 250), (2, "passed", 500),
    ]  # fmt: skip


def test_ctrf_times_are_those_of_the_cells() -> None:
    """Start of the first cell and end of the last, in milliseconds."""
    cells = tuple(
        msgspec.structs.replace(cell, at=1000.0 + n, duration_s=2.5) for n, cell in enumerate(PASSED.cells)
    )
    summary = read_ctrf(msgspec.structs.replace(PASSED, cells=cells))["summary"]
    assert (summary["start"], summary["stop"]) == (1_000_000, 1_002_500 + 1000 * (len(cells) - 1))


def test_a_statement_is_about_the_models_that_ran() -> None:
    """Each model that could be read is a subject by its digest; policy and ledger are the configuration."""
    verdict = msgspec.structs.replace(VERDICT, models=DIGESTS).sealed("ef" * 32)
    statement, predicate = read_statement(verdict)
    assert [(s.name, s.digest["sha256"]) for s in statement.subject] == [
        ("a.gguf", "ab" * 32), ("b.gguf", "cd" * 32),
    ]  # fmt: skip
    assert statement.predicate_type == "https://in-toto.io/attestation/test-result/v0.1"
    assert [(c.name, c.digest["sha256"]) for c in predicate.configuration] == [
        ("gates.toml", verdict.policy_sha256), ("ledger.jsonl", "ef" * 32),
    ]  # fmt: skip
    assert predicate.configuration[0].annotations["asOf"] == VERDICT.as_of


def test_a_statement_without_a_readable_model_is_about_its_evidence() -> None:
    """There is a subject with a digest in any case, as the framework demands."""
    statement, _ = read_statement(msgspec.structs.replace(VERDICT, models={"x": ""}).sealed("ef" * 32))
    assert [(s.name, s.digest["sha256"]) for s in statement.subject] == [("ledger.jsonl", "ef" * 32)]
    statement, _ = read_statement(VERDICT)
    assert [s.name for s in statement.subject] == ["verdict"]


@pytest.mark.parametrize(
    ("verdict", "result"),
    [
        (VERDICT, "FAILED"),
        (PASSED, "PASSED"),
        (INCONCLUSIVE, "FAILED"),
        (msgspec.structs.replace(PASSED, checks=(WAIVED,)), "WARNED"),
    ],
    ids=["failed", "passed", "inconclusive", "waived"],
)
def test_a_statement_is_never_better_than_the_verdict(verdict: Verdict, result: str) -> None:
    """Only a pass without waivers is PASSED; every check and every word of the gate is in one list."""
    _, predicate = read_statement(verdict)
    assert predicate.result == result
    lists = [predicate.passed_tests, predicate.warned_tests, predicate.failed_tests]
    names = [name for each in lists for name in each]
    assert len(names) == len(set(names)) == len(verdict.checks) + len(list(of_gate(verdict)))
    assert bool(predicate.failed_tests) == (result == "FAILED")


@pytest.mark.parametrize(
    ("verdict", "message", "colour"),
    [
        (VERDICT, "failed: critical-items", "red"),
        (PASSED, "passed: 4 checks", "brightgreen"),
        (INCONCLUSIVE, "inconclusive: 4 checks", "orange"),
    ],
    ids=["failed", "passed", "inconclusive"],
)
def test_a_badge_says_the_verdict(verdict: Verdict, message: str, colour: str) -> None:
    """Picture and endpoint say the same; what did not pass is marked as an error, so that it stays red."""
    counts = {**verdict.counts, "passed": sum(r.status is Status.PASSED for r in verdict.checks)}
    verdict = msgspec.structs.replace(verdict, counts=counts)
    shown = json.loads(shields.render(verdict, options={}))
    assert (shown["label"], shown["message"], shown["color"]) == ("prill architectures", message, colour)
    assert shown["schemaVersion"] == 1
    assert shown.get("isError", False) == (verdict.status is not Status.PASSED)
    picture = etree.fromstring(badge.render(verdict, options={}).encode())
    assert picture.get("aria-label") == f"prill architectures: {message}"
    fills = {rect.get("fill") for rect in picture.iterfind("{*}rect")}
    assert badge.COLOUR[verdict.status] in fills


@settings(max_examples=25, deadline=None)
@given(said=NASTY, name=NASTY, status=st.sampled_from(Status))
def test_any_text_is_sound(said: str, name: str, status: Status) -> None:
    """Whatever an engine or a file puts into names and sentences, every format is valid and loses nothing."""
    rules = tuple(msgspec.structs.replace(rule, id=name, sentence=said) for rule in VERDICT.rules)
    changed = altered(check=f"tokens.{name}", sentence=said, reproduce=said, oracle=name, status=status)
    verdict = msgspec.structs.replace(
        changed,
        ledger_sha256="ef" * 32,
        gate=name,
        sentence=said,
        rules=rules,
        models={name: "ab" * 32},
        policy=name,
    )
    assert len(read_sarif(verdict)["results"]) == sum(
        r.status is Status.WAIVED or r.status in view.OPEN for r in verdict.checks
    )
    assert read_ctrf(verdict)["summary"]["tests"] == len(verdict.checks) + len(list(of_gate(verdict)))
    assert read_statement(verdict)[1].result == "FAILED"
    etree.fromstring(badge.render(verdict, options={}).encode())
    assert json.loads(shields.render(verdict, options={}))["isError"]
