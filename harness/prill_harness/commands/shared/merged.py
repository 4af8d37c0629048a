"""Put the ledgers of several shards into one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prill_harness.plan.plan import Plan
from prill_harness.records import ledger
from prill_harness.records.evidence import Record
from prill_harness.records.files import write_file
from prill_harness.run.gather import merge


def merged(ledgers: Sequence[Path], target: Path, plan: Plan | None = None) -> tuple[Record, ...]:
    """The records of all ledgers, each cell's once, which `target` holds afterwards; it may be one of them.

    Raises:
        LedgerError: as `gather.merge`.
        OutputError: it cannot be written.
    """
    records = merge(ledgers, plan)
    if [path.resolve() for path in ledgers] == [target.resolve()]:
        return ledger.audited(target)  # as it was written, byte for byte
    write_file(target, ledger.lines(records).decode())
    return records
