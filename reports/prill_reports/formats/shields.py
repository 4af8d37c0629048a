"""A verdict as the JSON that shields.io's endpoint badge reads."""

from __future__ import annotations

import json
from collections.abc import Mapping

from prill_harness.records.evidence import Status
from prill_harness.records.verdict import Verdict
from prill_reports.text import one_line

COLOUR = {Status.PASSED: "brightgreen", Status.FAILED: "red", Status.INCONCLUSIVE: "orange"}
LONGEST = 40  # characters of a gate's or a rule's name


def render(verdict: Verdict, *, options: Mapping[str, str]) -> str:
    """Label, message and colour; one that did not pass is an error, which no setting of a page greens."""
    label, message = words(verdict)
    colour = COLOUR.get(verdict.status, "red")
    shown = {"schemaVersion": 1, "label": label, "message": message, "color": colour}
    if verdict.status is not Status.PASSED:
        shown["isError"] = True
    return json.dumps(shown, ensure_ascii=False, indent=1) + "\n"


def words(verdict: Verdict) -> tuple[str, str]:
    """What a badge says: `prill GATE` and the status with the rule that broke, or how many checks passed."""
    broken = [rule.id for rule in verdict.rules if rule.status is not Status.PASSED]
    why = _cut(broken[0]) if broken else f"{verdict.counts.get('passed', 0)} checks"
    return _cut(f"prill {verdict.gate}"), f"{verdict.status.value}: {why}"


def _cut(name: str) -> str:
    line = one_line(name)
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"
