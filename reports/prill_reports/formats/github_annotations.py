"""A verdict as commands that GitHub Actions turns into annotations: at most ten, the worst first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from prill_harness.records.evidence import Status
from prill_harness.records.verdict import Verdict
from prill_reports import cases, view
from prill_reports.text import one_line

MOST = 10  # that GitHub shows of one step
LONGEST = 1000  # characters of one message


def render(verdict: Verdict, *, options: Mapping[str, str]) -> str:
    """The verdict, then what did not pass; where there is more than fits, the last line counts the rest.

    To be printed by a step: `prill report --format github-annotations`.
    """
    if verdict.status is Status.PASSED:
        return _line(Status.PASSED, f"prill gate {verdict.gate}", verdict.sentence, *cases.of_policy(verdict))
    found = list(_worst_first(verdict))
    shown = found if len(found) <= MOST else found[: MOST - 1]
    lines = [line for _, line in shown]
    if rest := Counter(status.value for status, _ in found[len(shown) :]):
        told = ", ".join(f"{count} {status}" for status, count in rest.items())
        said = f"{rest.total()} more: {told}; the reports hold all of them"
        lines.append(_line(Status.FAILED, f"prill gate {verdict.gate}", said, *cases.of_policy(verdict)))
    return "".join(lines)


def _worst_first(verdict: Verdict) -> Iterator[tuple[Status, str]]:
    """(status, line): the verdict, checks by severity and status, then what else the gate says."""
    first, *rest = cases.of_gate(verdict)
    policy = cases.of_policy(verdict)
    yield first.status, _line(first.status, f"prill gate {verdict.gate}", first.sentence, *policy)
    for result in view.open_checks(verdict):
        said = f"{result.sentence}\n{view.group(result.cell)}\nreproduce: {result.reproduce}"
        place = cases.place(result, verdict)
        yield result.status, _line(result.status, f"{result.check} {result.status.value}", said, *place)
    for said_by_gate in rest:
        if said_by_gate.status is not Status.PASSED:
            status = said_by_gate.status
            yield status, _line(status, said_by_gate.name, said_by_gate.sentence, *policy)


def _line(status: Status, title: str, message: str, file: str, line: int) -> str:
    kind = {Status.PASSED: "notice", Status.INCONCLUSIVE: "warning"}.get(status, "error")
    said = "\n".join(map(one_line, message.split("\n")))
    return f"::{kind} file={_property(file)},line={line},title={_property(title)}::{_data(said[:LONGEST])}\n"


def _data(text: str) -> str:
    """Text as a command carries it: nothing in it begins another command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(one_line(text)).replace(":", "%3A").replace(",", "%2C")
