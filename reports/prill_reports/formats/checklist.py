"""The integration checklist as Markdown, with its evidence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prill_harness.records.verdict import CheckResult, ItemResult, ItemStatus, Verdict
from prill_reports.markup import code, text

BOX = {
    ItemStatus.PROVEN: "[x]",
    ItemStatus.FAILED: "[ ]",
    ItemStatus.UNPROVEN: "[ ]",
    ItemStatus.WAIVED: "[ ]",
}


def render(verdict: Verdict, *, options: Mapping[str, str]) -> str:
    """One section per checklist, one box per item, ticked only if the item is proven."""
    lines = [f"# Integration checklist: {text(verdict.gate)}", "", text(verdict.sentence), ""]
    for name in dict.fromkeys(item.checklist for item in verdict.items):
        mine = [item for item in verdict.items if item.checklist == name]
        proven = sum(item.status is ItemStatus.PROVEN for item in mine)
        lines += [f"## {text(name)}: {proven} of {len(mine)} proven", ""]
        for item in sorted(mine, key=lambda i: (i.severity.rank, i.id)):
            lines += [*_item(item, verdict), ""]
    lines.append(f"prill {text(verdict.prill_version)}, as of {text(verdict.as_of)}")
    return "\n".join(lines) + "\n"


def _item(item: ItemResult, verdict: Verdict) -> Iterator[str]:
    state = f"({item.severity.value}, {item.status.value})"
    yield f"- {BOX[item.status]} **{text(item.title)}** {state} {code(item.id)}"
    yield f"  - why: {text(item.why)}"
    yield f"  - {text(item.sentence)}"
    for result in verdict.checks:
        if result.base in item.checks and result.cell.id in item.cells:
            yield f"  - {_evidence(result)}"
    if not any(result.cell.id in item.cells for result in verdict.checks):
        for check in item.checks:
            yield f"  - prove it: {code(f'prill run {check}')}"
    if item.docs:
        yield f"  - see {code(item.docs)}"


def _evidence(result: CheckResult) -> str:
    seen = (
        f"{result.observed} values compared with {text(result.oracle)}"
        if result.oracle
        else "nothing compared"
    )
    told = f"{code(result.check)} {result.status.value} on {code(result.cell.id)}: {text(result.sentence)}"
    return f"{told} ({seen}; {code(result.reproduce)})"
