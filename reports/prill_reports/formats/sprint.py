"""The summary of a sprint as Markdown: its metrics beside their goals, and its days."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prill_harness.incidents import history, lint, sprint
from prill_harness.records.verdict import Verdict
from prill_reports import view
from prill_reports.markup import table, text

MET = {True: "yes", False: "**no**", None: "–"}


def render(verdict: Verdict, *, options: Mapping[str, str]) -> str:
    """What the verdict, the history and a linter say; what nobody observed meets no goal.

    Args:
        options: `history`, a file or folder of earlier gates, and `lint`, a SARIF file; both may lack.

    Raises:
        UsageError: the SARIF file is none.
    """
    found = lint.read_sarif(Path(options["lint"])) if options.get("lint") else None
    runs, notes = history.read(Path(options["history"])) if options.get("history") else ([], [])
    measures = sprint.measures(verdict, found)
    asked = [m for m in measures if m.goal]
    reached = sum(m.met is True for m in asked)
    lines = [f"# Sprint: {reached} of {len(asked)} goals met", "", text(verdict.sentence, 2000), ""]
    lines += ["## Metrics", ""]
    rows = ((text(m.name), text(m.goal) or "–", text(m.measured), MET[m.met]) for m in measures)
    lines += table(("metric", "goal", "measured", "met"), rows)
    open_ones = view.unsolved(verdict)
    if open_ones:
        lines += ["## Open incidents", ""]
        told = ((text(i.id), i.severity.value, i.state.value, text(i.component), i.opened, text(i.symptom))
                for i in open_ones)  # fmt: skip
        lines += table(("incident", "severity", "state", "component", "opened", "symptom"), told)
    lines += ["## Days", ""]
    lines += table(
        ("day", "gates", "passed", "failed", "other", "opened", "closed", "open then"),
        (
            (str(d.day), *map(str, (d.gates, d.passed, d.failed, d.other, d.opened, d.closed)), d.unsolved)
            for d in sprint.days(verdict, runs)
        ),
    )
    lines += [f"- {text(note)}" for note in notes]
    lines.append(f"prill {text(verdict.prill_version)}, as of {text(verdict.as_of)}")
    return "\n".join(lines) + "\n"
