"""The sample verdict, which shows every status, and a ledger that agrees with it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from prill_harness.plan.provenance import file_digest
from prill_harness.records import ledger as ledgers
from prill_harness.records.evidence import Evidence, Metric, Status
from prill_harness.records.verdict import Verdict

VERDICT = msgspec.json.decode((Path(__file__).parent / "data/verdict.json").read_bytes(), type=Verdict)


def laid(folder: Path, verdict: Verdict = VERDICT) -> Path:
    """Write verdict.json and ledger.jsonl into a folder; returns the ledger."""
    target = folder / "ledger.jsonl"
    with ledgers.Ledger(target) as ledger:
        for check in verdict.checks:
            ledger.append(
                Evidence(
                    check=check.check,
                    content="",
                    cell=check.cell,
                    status=Status.FAILED if check.status is Status.WAIVED else check.status,
                    observed=check.observed,
                    sentence=check.sentence,
                    oracle=check.oracle,
                    kills=("rope_pairing",),
                    reproduce=check.reproduce,
                    metrics=tuple(msgspec.convert(each, Metric) for each in check.metrics),
                    detail=check.detail,
                )
            )
    (folder / "verdict.json").write_bytes(msgspec.json.encode(verdict.sealed(file_digest(target))))
    return target
