"""A verdict as an unsigned in-toto statement with a test-result predicate, v0.1, for others to sign."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from prill_harness.records.evidence import Status
from prill_harness.records.verdict import Verdict
from prill_reports import cases
from prill_reports.text import one_line

FILE = "in-toto.json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://in-toto.io/attestation/test-result/v0.1"


def render(verdict: Verdict, *, options: Mapping[str, str]) -> str:
    """The models that ran are the subjects; where none could be read, the evidence is.

    PASSED is a verdict that passed with nothing waived or lacking, WARNED any other that passed; an
    inconclusive one is FAILED, as WARNED means that the tests passed. Policy and evidence are the
    configuration, by their digests.
    """
    names: dict[str, list[str]] = {"passed": [], "warned": [], "failed": []}
    for result in verdict.checks:
        kind = {Status.PASSED: "passed", Status.WAIVED: "warned"}.get(result.status, "failed")
        kind = "warned" if result.lacking else kind
        names[kind].append(one_line(f"{result.cell.id}/{result.check}"))
    for said in cases.of_gate(verdict):
        names["passed" if said.status is Status.PASSED else "failed"].append(one_line(said.name))
    ledger = verdict.ledger_sha256
    evidence = _resource("ledger.jsonl", ledger) if ledger else _resource("verdict", verdict.digest_of_all())
    subjects = [_resource(name, digest) for name, digest in sorted(verdict.models.items()) if digest]
    policy = _resource(verdict.policy or "gates.toml", verdict.policy_sha256)
    about = {"prill": verdict.prill_version, "gate": verdict.gate, "asOf": verdict.as_of}
    predicate = {
        "result": _result(verdict, bool(names["warned"])),
        "configuration": [policy | {"annotations": {k: one_line(v) for k, v in about.items()}}, evidence],
        **{f"{kind}Tests": sorted(names[kind]) for kind in names},
    }
    statement = {
        "_type": STATEMENT,
        "subject": subjects or [evidence],
        "predicateType": PREDICATE,
        "predicate": predicate,
    }
    return json.dumps(statement, ensure_ascii=False, indent=1) + "\n"


def _result(verdict: Verdict, warned: bool) -> str:
    if verdict.status is not Status.PASSED:
        return "FAILED"
    return "WARNED" if warned else "PASSED"


def _resource(name: str, sha256: str) -> dict[str, Any]:
    return {"name": one_line(name), "digest": {"sha256": sha256}}
