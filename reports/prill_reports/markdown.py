"""A verdict as Markdown for a pull request or a CI step summary, under one mebibyte."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prill_harness.records.evidence import Status
from prill_harness.records.verdict import CheckResult, ItemStatus, Verdict
from prill_reports import view
from prill_reports.text import bound, figure, one_line

LIMIT = 1_000_000  # bytes; GitHub accepts 1,048,576
LONGEST = 400  # characters of one sentence
HEADLINE = {Status.PASSED: "PASSED", Status.FAILED: "FAILED", Status.INCONCLUSIVE: "INCONCLUSIVE"}
# An underscore inside a word is not emphasis; a dash, plus, hash or equals sign matters only at the start.
_SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])|^[-+#=]")
# What a forge would turn into a mention of a person or an issue: @name, owner/repo#2, #2, GH-2.
_LINKED = re.compile(r"@|#(?=\d)|\bGH-(?=\d)", re.IGNORECASE)
Lines = Iterator[str]


def render(verdict: Verdict, *, options: Mapping[str, str]) -> str:
    """The verdict line first, then the rule that broke, items, failures, figures, cells, models, waivers.

    Whatever exceeds the size limit is left out from the end, with a note that says so.
    """
    parts = [_head(verdict), _rules(verdict), _items(verdict), _failures(verdict), _figures(verdict)]
    parts += [_lacking(verdict), _cells(verdict), _models(verdict), _assumptions(verdict)]
    parts += [_forgotten(verdict), _waivers(verdict), _foot(verdict)]
    kept: list[str] = []
    size = 0
    for line in (line for part in parts for line in part):
        size += len(line.encode("utf-8")) + 1
        if size > LIMIT - 200:
            return "\n".join([*kept, "", "The rest does not fit; the HTML report holds all of it.", ""])
        kept.append(line)
    return "\n".join(kept).rstrip("\n") + "\n"


def text(value: str, longest: int = LONGEST) -> str:
    """Text shown literally: no markup, no HTML, no mention, on one line, safe in a table."""
    short = one_line(value)
    short = short if len(short) <= longest else f"{short[:longest]}…"
    short = short.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _LINKED.sub("\\g<0>\u2060", _SPECIAL.sub(r"\\\g<0>", short))


def code(value: str, longest: int = LONGEST) -> str:
    """Text as a code span, safe in a table: the fence is longer than any run of backticks inside."""
    short = one_line(value)[:longest]
    if "\\|" in short:  # inside a code span this pipe cannot be escaped, and would end the cell
        return text(short)
    runs = [len(run) for run in re.findall("`+", short)]
    fence = "`" * (max(runs, default=0) + 1)
    pad = " " if runs or short != short.strip() or not short else ""
    return f"{fence}{pad}{short}{pad}{fence}".replace("|", r"\|")


def block(value: str) -> list[str]:
    """Text as a fenced block."""
    lines = [one_line(line) for line in value.split("\n")]
    fence = "`" * max(3, *(len(run) + 1 for line in lines for run in ["", *re.findall("`+", line)]))
    return [f"{fence}sh", *lines, fence]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Lines:
    """A table; the cells are Markdown already."""
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _head(verdict: Verdict) -> Lines:
    yield f"# {HEADLINE.get(verdict.status, verdict.status.value)}: gate {text(verdict.gate)}"
    yield ""
    yield f"{text(verdict.sentence, 2000)} (exit code {verdict.exit_code})"
    yield ""


def _rules(verdict: Verdict) -> Lines:
    broken = [rule for rule in verdict.rules if rule.status is not Status.PASSED]
    if broken:
        yield "## Rules that broke"
        yield ""
        for rule in broken:
            yield f"- **{text(rule.id)}** ({rule.status.value}): {text(rule.sentence, 2000)}"
        yield ""


def _items(verdict: Verdict) -> Lines:
    counts = ", ".join(
        f"{sum(i.status is status for i in verdict.items)} {status.value}" for status in ItemStatus
    )
    yield f"## Items: {counts}"
    yield ""
    yield from table(
        ("item", "status", "severity", "what", "evidence"),
        (
            (code(i.id), i.status.value, i.severity.value, text(i.title), text(i.sentence))
            for i in view.items(verdict)
        ),
    )


def _failures(verdict: Verdict) -> Lines:
    found = view.open_checks(verdict)
    if found:
        yield f"## What did not pass: {len(found)} checks"
        yield ""
    for result in found:
        yield from _failure(result, verdict)


def _failure(result: CheckResult, verdict: Verdict) -> Lines:
    where = code(view.group(result.cell))
    yield f"### {code(result.check)} {result.status.value} on {where}"
    yield ""
    yield f"{text(result.sentence, 2000)} (severity {view.severity(result, verdict).value})"
    yield ""
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
    if result.reproduce:
        yield from block(result.reproduce)
        yield ""


def _lacking(verdict: Verdict) -> Lines:
    found = view.lacking_checks(verdict)
    if found:
        yield f"## Not asked: {len(found)} checks of what the policy lets an engine lack"
        yield ""
        yield from table(
            ("check", "where", "why"),
            ((code(r.check), text(view.group(r.cell)), text(r.sentence)) for r in found),
        )


def _figures(verdict: Verdict) -> Lines:
    found = view.figures(verdict)
    if found:
        yield "## Figures beside their bounds"
        yield ""
        yield from table(
            ("check", "where", "figure", "value", "bound", "holds"),
            (
                (
                    code(f.check),
                    text(f.where),
                    text(f.name),
                    figure(f.value),
                    f"{text(f.relation)} {figure(f.bound)}",
                    "yes" if f.holds else "**no**",
                )
                for f in found
            ),
        )


def _cells(verdict: Verdict) -> Lines:
    yield f"## Cells: {len(verdict.cells)} planned"
    yield ""
    yield from table(
        ("cell", "status", "planned", "executed", "passed", "seconds", "remark"),
        (
            (
                code(c.cell.id),
                text(c.status),
                str(c.planned),
                str(c.executed),
                str(c.passed),
                f"{c.duration_s:.1f}",
                text(c.sentence),
            )
            for c in sorted(verdict.cells, key=lambda c: (c.status == "complete", c.cell))
        ),
    )


def _assumptions(verdict: Verdict) -> Lines:
    if verdict.assumptions:
        yield "## Assumed where files are silent and engines disagree"
        yield ""
        yield from table(
            ("key", "assumed", "because", "models"),
            (
                (code(a.key), text(a.assumed), text(a.why), text(", ".join(a.models)))
                for a in verdict.assumptions
            ),
        )


def _forgotten(verdict: Verdict) -> Lines:
    if verdict.forgotten:
        yield f"## What checks no longer owe: {len(verdict.forgotten)}"
        yield ""
        yield from table(
            ("check", "no longer owes", "reason"),
            ((code(f.check), text(f.what), text(f.reason)) for f in verdict.forgotten),
        )


def _models(verdict: Verdict) -> Lines:
    yield f"## Models: {len(verdict.models)}"
    yield ""
    yield from table(
        ("model", "sha256 of its file"),
        (
            (code(name), code(digest or "could not be read"))
            for name, digest in sorted(verdict.models.items())
        ),
    )


def _waivers(verdict: Verdict) -> Lines:
    found = view.waivers(verdict)
    if found:
        yield "## Waivers"
        yield ""
        yield from table(
            ("days left", "waiver", "item", "state", "owner", "reason"),
            (
                (
                    str(w.days_left),
                    code(w.id),
                    code(w.item),
                    text(w.state),
                    text(w.owner),
                    text(w.sentence or w.reason),
                )
                for w in found
            ),
        )


def _foot(verdict: Verdict) -> Lines:
    yield (
        f"prill {text(verdict.prill_version)}, policy {code(verdict.policy_sha256[:12])}, "
        f"as of {text(verdict.as_of)}, {verdict.duration_s:.1f} s"
    )
