"""A verdict as the summary of a step of GitHub Actions: the Markdown report with sixteen times the room."""

from __future__ import annotations

from collections.abc import Mapping

from prill_harness.records.verdict import Verdict
from prill_reports.formats import markdown

LIMIT = 1_000_000  # bytes; GitHub takes 1,048,576 for each step, and drops the whole summary of one with more


def render(verdict: Verdict, *, options: Mapping[str, str]) -> str:
    """What to append to the file that `$GITHUB_STEP_SUMMARY` names."""
    return markdown.document(verdict, LIMIT)
