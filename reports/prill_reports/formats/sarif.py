"""A verdict as SARIF 2.1.0: what did not pass, each where it is declared, for code scanning."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from prill_harness.records.evidence import Status
from prill_harness.records.verdict import CheckResult, Verdict
from prill_reports import cases, view
from prill_reports.text import one_line, visible

FILE = "report.sarif"
SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
HOME = "https://github.com/prill-dev/prill"
MOST = 5000  # results that GitHub shows of one file; it refuses one with more than 25,000
Json = dict[str, Any]


def render(verdict: Verdict, *, options: Mapping[str, str]) -> str:
    """One result for each check that did not pass, the worst first; a waived one is suppressed, with why.

    What the gate itself says (the verdict, broken rules, lost cells) are notifications of the run, which was
    executed successfully only if no cell is lost.
    """
    waived = [r for r in view.quiet_checks(verdict) if r.status is Status.WAIVED]
    found = [*view.open_checks(verdict), *waived]
    run = {
        "tool": {"driver": _driver(found, verdict)},
        "automationDetails": {"id": f"prill/{one_line(verdict.gate)}/"},
        "invocations": [_invocation(verdict, found[MOST:])],
        "results": [_result(result, verdict) for result in found[:MOST]],
    }
    document = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"


def _driver(found: Iterable[CheckResult], verdict: Verdict) -> Json:
    titles = {check: item for item in reversed(verdict.items) for check in item.checks}
    rules = []
    for check in sorted({result.base for result in found}):
        rule: Json = {"id": one_line(check)}
        if check in titles:
            rule["shortDescription"] = {"text": one_line(titles[check].title) or check}
            rule["fullDescription"] = {"text": one_line(titles[check].why) or check}
        rules.append(rule)
    return {
        "name": "prill", "version": one_line(verdict.prill_version), "informationUri": HOME, "rules": rules,
    }  # fmt: skip


def _invocation(verdict: Verdict, left_out: Iterable[CheckResult]) -> Json:
    starts = [cell.at for cell in verdict.cells if cell.at > 0]
    told = [
        _notification(said.name, said.sentence)
        for said in cases.of_gate(verdict)
        if said.status is not Status.PASSED
    ]
    counts = Counter(result.status.value for result in left_out)
    if counts:
        more = ", ".join(f"{count} {status}" for status, count in counts.items())
        told.append(_notification("prill.gate.left_out", f"{counts.total()} more results: {more}"))
    invocation: Json = {
        "executionSuccessful": all(cell.status == "complete" for cell in verdict.cells),
        "exitCode": verdict.exit_code,
        "toolExecutionNotifications": told,
    }
    if starts:
        began = dt.datetime.fromtimestamp(min(starts), dt.UTC)
        invocation["startTimeUtc"] = began.strftime("%Y-%m-%dT%H:%M:%SZ")
    return invocation


def _notification(name: str, sentence: str) -> Json:
    said = one_line(sentence) or one_line(name)
    return {"descriptor": {"id": one_line(name)}, "level": "error", "message": {"text": said}}


def _result(result: CheckResult, verdict: Verdict) -> Json:
    file, line = cases.place(result, verdict)
    where = f"{result.cell.id}/{result.check}"
    made: Json = {
        "ruleId": one_line(result.base),
        "level": "warning" if result.status is Status.INCONCLUSIVE else "error",
        "message": {"text": visible(cases.body(result)) or result.status.value},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": quote(one_line(file)), "uriBaseId": "%SRCROOT%"},
                    "region": {"startLine": line},
                },
                "logicalLocations": [{"fullyQualifiedName": one_line(where), "kind": "test"}],
            }
        ],
        "partialFingerprints": {"prillCheck/v1": hashlib.sha256(one_line(where).encode()).hexdigest()},
        "properties": {
            "status": result.status.value,
            "severity": view.severity(result, verdict).value,
            "observed": result.observed,
            "reproduce": one_line(result.reproduce),
        },
    }
    if result.status is Status.WAIVED:
        why = one_line(cases.sentence(result, verdict))
        made["suppressions"] = [{"kind": "external", "status": "accepted", "justification": why}]
    return made
