"""A verdict as Markdown for a pull request, always under 64 KB: a comment's limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

from prill_harness.records.evidence import Status
from prill_harness.records.verdict import CheckResult, ItemStatus, RuleResult, Verdict
from prill_reports import view
from prill_reports.fitting import Passage, Section, fitted, weight
from prill_reports.markup import block, code, head, row, table, text
from prill_reports.text import bound, figure

FILE = "report.md"
LIMIT = 65_000  # bytes; GitHub's comments take 65,536 characters
LONG = 2000  # characters of a sentence that matters most
LONGEST_COMMAND = 1000  # characters; a longer one is left to the other reports, for half of it is useless
HEADLINE = {Status.PASSED: "PASSED", Status.FAILED: "FAILED", Status.INCONCLUSIVE: "INCONCLUSIVE"}
Lines = Iterator[str]
T = TypeVar("T")


def render(verdict: Verdict, *, options: Mapping[str, str]) -> str:
    """The verdict line first, then the rule that broke, items, failures, figures, cells, models, waivers.

    The worst comes first in each part; what does not fit is counted by status.
    """
    return document(verdict, LIMIT)


def document(verdict: Verdict, limit: int) -> str:
    """The report in fewer than `limit` bytes, of which the verdict and the last line take up to 20 KB."""
    first, last = [*_head(verdict)], [*_foot(verdict)]
    sections = [_rules(verdict), _items(verdict), _failures(verdict), _figures(verdict), _lacking(verdict)]
    sections += [
        _cells(verdict),
        _models(verdict),
        _assumptions(verdict),
        _forgotten(verdict),
        _incidents(verdict),
        _waivers(verdict),
    ]
    room = limit - weight(first) - weight(last) - 1
    middle = fitted([section for section in sections if section.entries], room)
    return "\n".join([*first, *middle, *last]) + "\n"


def _tabled(
    title: str,
    columns: Sequence[str],
    found: Iterable[T],
    kind: Callable[[T], str],
    cells: Callable[[T], Sequence[str]],
) -> Section:
    """A section that is a table: a row of cells for each of `found`, and what it counts as."""
    entries = [Passage(kind(each), partial(lambda one: [row(cells(one))], each)) for each in found]
    return Section([title, "", *head(columns)], entries)


def _head(verdict: Verdict) -> Lines:
    yield f"# {HEADLINE.get(verdict.status, verdict.status.value)}: gate {text(verdict.gate)}"
    yield ""
    yield f"{text(verdict.sentence, LONG)} (exit code {verdict.exit_code})"
    yield ""
    if verdict.lead:
        if verdict.lead.cause:
            yield f"Root cause: {text(verdict.lead.cause, LONG)}"
            yield ""
        for what, words in (("Reproduce", verdict.lead.reproduce), ("Next", verdict.lead.following)):
            if len(words) <= LONGEST_COMMAND:
                yield f"{what}: {code(words)}"
                yield ""


def _rules(verdict: Verdict) -> Section:
    broken = [rule for rule in verdict.rules if rule.status is not Status.PASSED]
    return Section(
        ["## Rules that broke", ""],
        [Passage(r.status.value, partial(_rule, r)) for r in broken],
    )


def _rule(rule: RuleResult) -> list[str]:
    return [f"- **{text(rule.id)}** ({rule.status.value}): {text(rule.sentence, LONG)}"]


def _items(verdict: Verdict) -> Section:
    statuses = Counter(item.status for item in verdict.items)
    counts = ", ".join(f"{statuses[status]} {status.value}" for status in ItemStatus)
    return _tabled(
        f"## Items: {counts}",
        ("item", "status", "severity", "what", "evidence"),
        view.items(verdict),
        lambda i: i.status.value,
        lambda i: (code(i.id), i.status.value, i.severity.value, text(i.title), text(i.sentence)),
    )


def _failures(verdict: Verdict) -> Section:
    found = view.open_checks(verdict)
    entries = [
        Passage(r.status.value, partial(_failure, r, verdict), partial(_failure, r, verdict, brief=True))
        for r in found
    ]
    return Section([f"## What did not pass: {len(found)} checks", ""], entries)


def _failure(result: CheckResult, verdict: Verdict, *, brief: bool = False) -> list[str]:
    return [*_told(result, verdict, brief)]


def _told(result: CheckResult, verdict: Verdict, brief: bool) -> Lines:
    where = code(view.group(result.cell))
    yield f"### {code(result.check)} {result.status.value} on {where}"
    yield ""
    severity = view.severity(result, verdict).value
    yield f"{text(result.sentence, *([] if brief else [LONG]))} (severity {severity})"
    yield ""
    if not brief:
        yield from _finding(result)
    if result.reproduce and len(result.reproduce) <= LONGEST_COMMAND:
        yield from block(result.reproduce)
        yield ""


def _finding(result: CheckResult) -> Lines:
    if result.standing:
        yield f"- {text(view.standing(result.standing))}"
    for tried in view.attempts(result):
        yield f"- attempt {tried.attempt}: {tried.status.value}: {text(tried.sentence)}"
    found = view.kept(result)
    for name, value in found.facts:
        yield f"- {text(name)}: {code(value)}"
    for metric in result.metrics:
        yield f"- {text(bound(metric))}"
    yield ""
    for part in found.tables:
        yield f"{text(part.name)}:"
        yield ""
        yield from table([text(c) for c in part.columns], [[code(c) for c in row] for row in part.rows])


def _lacking(verdict: Verdict) -> Section:
    found = view.lacking_checks(verdict)
    return _tabled(
        f"## Not asked: {len(found)} checks of what the policy lets an engine lack",
        ("check", "where", "why"),
        found,
        lambda r: "not asked",
        lambda r: (code(r.check), text(view.group(r.cell)), text(r.sentence)),
    )


def _figures(verdict: Verdict) -> Section:
    return _tabled(
        "## Figures beside their bounds",
        ("check", "where", "figure", "value", "bound", "holds"),
        view.figures(verdict),
        lambda f: "within its bound" if f.holds else "out of bound",
        lambda f: (
            code(f.check),
            text(f.where),
            text(f.name),
            figure(f.value),
            f"{text(f.relation)} {figure(f.bound)}",
            "yes" if f.holds else "**no**",
        ),
    )


def _cells(verdict: Verdict) -> Section:
    return _tabled(
        f"## Cells: {len(verdict.cells)} planned",
        ("cell", "status", "planned", "executed", "passed", "seconds", "remark"),
        sorted(verdict.cells, key=lambda c: (c.status == "complete", c.cell)),
        lambda c: c.status,
        lambda c: (
            code(c.cell.id),
            text(c.status),
            str(c.planned),
            str(c.executed),
            str(c.passed),
            f"{c.duration_s:.1f}",
            text(c.sentence),
        ),
    )


def _assumptions(verdict: Verdict) -> Section:
    return _tabled(
        "## Assumed where files are silent and engines disagree",
        ("key", "assumed", "because", "models"),
        verdict.assumptions,
        lambda a: "assumed",
        lambda a: (code(a.key), text(a.assumed), text(a.why), text(", ".join(a.models))),
    )


def _forgotten(verdict: Verdict) -> Section:
    return _tabled(
        f"## What checks no longer owe: {len(verdict.forgotten)}",
        ("check", "no longer owes", "reason"),
        verdict.forgotten,
        lambda f: "forgotten",
        lambda f: (code(f.check), text(f.what), text(f.reason)),
    )


def _models(verdict: Verdict) -> Section:
    return _tabled(
        f"## Models: {len(verdict.models)}",
        ("model", "sha256 of its file"),
        sorted(verdict.models.items()),
        lambda model: "models",
        lambda model: (code(model[0]), code(model[1] or "could not be read")),
    )


def _incidents(verdict: Verdict) -> Section:
    return _tabled(
        "## Open incidents",
        ("incident", "severity", "state", "component", "opened", "symptom"),
        view.unsolved(verdict),
        lambda i: i.severity.value,
        lambda i: (
            code(i.id),
            i.severity.value,
            i.state.value,
            text(i.component),
            i.opened,
            text(i.symptom),
        ),
    )


def _waivers(verdict: Verdict) -> Section:
    return _tabled(
        "## Waivers",
        ("days left", "waiver", "item", "state", "owner", "reason", "the failure"),
        view.waivers(verdict),
        lambda w: w.state,
        lambda w: (
            str(w.days_left),
            code(w.id),
            code(w.item),
            text(w.state),
            text(w.owner),
            text(w.sentence or w.reason),
            text(view.standing(w.standing)) if w.standing else "",
        ),
    )


def _foot(verdict: Verdict) -> Lines:
    yield (
        f"prill {text(verdict.prill_version)}, policy {code(verdict.policy_sha256[:12])}, "
        f"as of {text(verdict.as_of)}, {verdict.duration_s:.1f} s"
    )
