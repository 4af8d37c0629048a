"""A verdict in the Common Test Report Format (CTRF), JSON that many readers of test results take."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Mapping
from typing import Any

from prill_harness.numbers.compare import largest, smallest
from prill_harness.records.evidence import Status
from prill_harness.records.verdict import AttemptResult, CheckResult, Verdict
from prill_reports import cases, view
from prill_reports.text import bound, one_line, seconds, visible

FILE = "ctrf.json"
VERSION = "0.0.0"  # of the format, as its specification shows it
STATUS: Mapping[str, str] = {
    "passed": "passed", "failed": "failed", "error": "failed", "inconclusive": "other", "waived": "skipped",
}  # fmt: skip
"""An inconclusive check is neither red nor green here; that it held the gate shut, the gate's cases say."""
Json = dict[str, Any]


def render(verdict: Verdict, *, options: Mapping[str, str]) -> str:
    """One test for each check, then those of the gate itself, which is red unless it passed; `rawStatus` is
    prill's own word. Times are milliseconds. The same verdict gives the same bytes."""
    tests = [_check(r, verdict) for r in view.every_check(verdict)]
    tests += [_gate_test(said, verdict) for said in cases.of_gate(verdict)]
    document = {
        "reportFormat": "CTRF",
        "specVersion": VERSION,
        "reportId": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{verdict.ledger_sha256} {json.dumps(tests)}")),
        "generatedBy": f"prill {one_line(verdict.prill_version)}",
        "results": {
            "tool": {"name": "prill", "version": one_line(verdict.prill_version)},
            "summary": _summary(tests, verdict),
            "tests": tests,
            "environment": {
                "reportName": one_line(f"prill gate {verdict.gate}"),
                "healthy": verdict.status is Status.PASSED,
                "extra": {
                    "asOf": verdict.as_of,
                    "exitCode": verdict.exit_code,
                    "models": {one_line(name): digest for name, digest in sorted(verdict.models.items())},
                    "policySha256": verdict.policy_sha256,
                    "ledgerSha256": verdict.ledger_sha256,
                },
            },
        },
    }
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"


def _summary(tests: list[Json], verdict: Verdict) -> Json:
    counts = Counter(test["status"] for test in tests)
    began = [cell.at for cell in verdict.cells if cell.at > 0]
    ended = [cell.at + seconds(cell.duration_s) for cell in verdict.cells if cell.at > 0]
    return {
        "tests": len(tests),
        **{status: counts[status] for status in ("passed", "failed", "skipped", "pending", "other")},
        "flaky": sum(bool(test.get("flaky")) for test in tests),
        "suites": len({tuple(test["suite"]) for test in tests}),
        "start": _ms(smallest(*began) if began else 0.0),
        "stop": _ms(largest(0.0, *ended)),
        "duration": _ms(verdict.duration_s),
    }


def _check(result: CheckResult, verdict: Verdict) -> Json:
    cell, (file, line) = result.cell, cases.place(result, verdict)
    test: Json = {
        "testId": one_line(f"{cell.id}/{result.check}"),
        "name": one_line(result.check) or "check",
        "status": "skipped" if result.lacking else STATUS[result.status],
        "rawStatus": result.status.value,
        "duration": _ms(result.duration_s),
        "suite": [one_line(part) for part in (cell.model, cell.engine, cell.device, cell.suite)],
        "message": one_line(cases.sentence(result, verdict)),
        "filePath": one_line(file),
        "line": line,
        "tags": [view.severity(result, verdict).value],
        "extra": {
            "observed": result.observed,
            "oracle": one_line(result.oracle),
            "reproduce": one_line(result.reproduce),
            "metrics": [bound(metric) for metric in result.metrics],
        },
    }
    if result.status is not Status.PASSED:
        test["trace"] = visible(cases.body(result))
    if tried := view.attempts(result):
        test |= {"retries": len(tried) - 1, "flaky": cases.flaky(result)}
        test["retryAttempts"] = [_attempt(each) for each in tried]
    return test


def _attempt(tried: AttemptResult) -> Json:
    return {
        "attempt": tried.attempt,
        "status": STATUS[tried.status],
        "duration": _ms(tried.duration_s),
        "message": one_line(tried.sentence),
    }


def _gate_test(said: cases.GateResult, verdict: Verdict) -> Json:
    file, line = cases.of_policy(verdict)
    return {
        "testId": one_line(said.name),
        "name": one_line(said.name),
        "status": "passed" if said.status is Status.PASSED else "failed",
        "rawStatus": said.status.value,
        "duration": 0,
        "suite": [cases.GATE],
        "message": one_line(said.sentence),
        "filePath": one_line(file),
        "line": line,
    }


def _ms(value: float) -> int:
    return round(seconds(value) * 1000)
