"""The cases of a verdict that lists of tests are made of: its checks, and what the gate itself has to say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prill_harness.records.evidence import Status
from prill_harness.records.verdict import CheckResult, Verdict
from prill_reports.text import bound
from prill_reports.view import proven_by

GATE = "prill.gate"


@dataclass(frozen=True)
class GateResult:
    """What the gate says, beside its checks: the verdict, a rule, a waiver that is over, a cell without all
    its records. Without these a list of checks is greener than the verdict."""

    name: str
    status: Status
    sentence: str


def of_gate(verdict: Verdict) -> Iterator[GateResult]:
    """The verdict first, its rules, its broken waivers, then planned cells that did not report."""
    said = f"{verdict.sentence} (exit code {verdict.exit_code})"
    yield GateResult(f"{GATE}.verdict", verdict.status, said)
    for rule in verdict.rules:
        yield GateResult(f"{GATE}.rule {rule.id}", rule.status, rule.sentence)
    for waiver in verdict.waivers:
        if waiver.state in ("expired", "refused"):
            sentence = waiver.sentence or f"waiver {waiver.id} is {waiver.state} (expires {waiver.expires})"
            yield GateResult(f"{GATE}.waiver {waiver.id}", Status.FAILED, sentence)
    for cell in verdict.cells:
        if cell.status != "complete":
            sentence = cell.sentence or f"{cell.executed} of {cell.planned} planned checks reported"
            yield GateResult(
                f"{GATE}.cell {cell.cell.id}", Status.ERROR, f"cell is {cell.status}: {sentence}"
            )


def flaky(result: CheckResult) -> bool:
    """Whether the check passed in one attempt and did not in another."""
    passed = [each.status is Status.PASSED for each in result.attempts]
    return any(passed) and not all(passed)


def place(result: CheckResult, verdict: Verdict) -> tuple[str, int]:
    """File and line that a check is about: of the worst checklist item that it proves, else of its own
    declaration, else of the policy."""
    here = [item for item in proven_by(result, verdict) if item.file]
    if here:
        worst = min(here, key=lambda item: item.severity.rank)
        return worst.file, max(worst.line, 1)
    return (result.file, max(result.line, 1)) if result.file else of_policy(verdict)


def of_policy(verdict: Verdict) -> tuple[str, int]:
    """File and line of what the gate itself says."""
    return verdict.policy or GATE, 1


def sentence(result: CheckResult, verdict: Verdict) -> str:
    """What a check found; for a waived one first why it is let off, and until when."""
    if result.status is not Status.WAIVED:
        return result.sentence
    reasons = [f"{w.reason} (until {w.expires})" for w in verdict.waivers if w.id == result.waiver]
    return (
        f"waived by {result.waiver}: {'; '.join(reasons) or 'no reason recorded'}; found: {result.sentence}"
    )


def body(result: CheckResult) -> str:
    """All that a list of tests has room for: sentence, metrics, oracle, command; one a line."""
    lines = [result.sentence, *map(bound, result.metrics)]
    lines += [f"attempt {each.attempt}: {each.status.value}: {each.sentence}" for each in result.attempts]
    lines += [f"compared with: {result.oracle}"] if result.oracle else []
    return "\n".join([*lines, f"reproduce: {result.reproduce}"] if result.reproduce else lines)
