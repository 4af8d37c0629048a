"""Read what a gate decided, and hold it to the ledger that it was decided on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from prill_harness.plan.provenance import file_digest
from prill_harness.records import ledger as ledgers
from prill_harness.records.evidence import Evidence, Status
from prill_harness.records.files import read_text
from prill_harness.records.verdict import Verdict
from prill_runtime.errors import UsageError, VerdictError

F = TypeVar("F", bound=Callable[..., Any])


def ledger_option(function: F) -> F:
    """Add --ledger and --verdict, as `decided` takes them."""
    function = click.option(
        "--verdict",
        "verdict_file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="What the gate decided; default: verdict.json beside the ledger.",
    )(function)
    return click.option(
        "--ledger",
        type=click.Path(path_type=Path, dir_okay=False),
        default=Path("out/ledger.jsonl"),
        show_default=True,
        help="What the cells saw.",
    )(function)


def decided(ledger: Path, verdict_file: Path | None = None) -> Verdict:
    """The verdict on a ledger, from verdict.json beside it where no other file is named.

    Raises:
        UsageError: there is no ledger, or the verdict cannot be read.
        LedgerError: the ledger was altered.
        VerdictError: the verdict was altered, is of another version, or is of another ledger.
    """
    if not ledger.is_file():
        raise UsageError(
            "no such ledger", where=str(ledger), hint="run prill gate first, or name one with --ledger"
        )
    verdict = read_verdict(verdict_file or ledger.with_name("verdict.json"))
    _agree(verdict, ledger)
    return verdict


def read_verdict(path: Path) -> Verdict:
    """Read a verdict that a gate wrote.

    Raises:
        UsageError: the file cannot be read.
        VerdictError: it is not a verdict of this version, or was altered.
    """
    text = read_text(path, "verdict")
    try:
        verdict = msgspec.json.decode(text.encode("utf-8", "replace"), type=Verdict, strict=True)
    except (msgspec.DecodeError, RecursionError) as error:
        raise VerdictError("not a verdict of this version", where=str(path), got=str(error)) from error
    if verdict.digest != (expected := verdict.digest_of_all()):
        raise VerdictError(
            "the verdict was altered after the gate wrote it",
            where=str(path),
            expected=f"digest {expected[:16]}…",
            got=f"{verdict.digest[:16]}…" if verdict.digest else "none",
            hint="run prill gate again, or decide anew with prill gate --from",
        )
    return verdict


def _agree(verdict: Verdict, ledger: Path) -> None:
    """Check that the verdict was computed from this ledger.

    Raises:
        VerdictError: it is another ledger, or a check in the verdict differs from the ledger.
    """
    digest = file_digest(ledger)
    if verdict.ledger_sha256 != digest:
        raise VerdictError(
            "the verdict is of another ledger",
            where=str(ledger),
            expected=f"sha256 {verdict.ledger_sha256[:16]}…",
            got=f"{digest[:16]}…",
            hint="run prill gate again, or decide anew with prill gate --from",
        )
    records = [r for r in ledgers.audited(ledger) if isinstance(r, Evidence)]
    seen = {(r.cell.id, r.check, r.status, r.sentence) for r in records}
    for result in verdict.checks:
        expected = Status.FAILED if result.status is Status.WAIVED else result.status
        if (result.cell.id, result.check, expected, result.sentence) not in seen:
            found = sorted(
                {s for cell, check, s, _ in seen if (cell, check) == (result.cell.id, result.check)}
            )
            raise VerdictError(
                "the verdict is of another run than the ledger",
                where=f"{ledger}, {result.check} in {result.cell.id}",
                expected=f"{expected}: {result.sentence}",
                got=" and ".join(found) or "no record",
                hint="run prill gate again",
            )
