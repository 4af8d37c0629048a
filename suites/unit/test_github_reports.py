"""What GitHub Actions is told: a summary that fits, ten annotations at most, and no command but those."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prill_harness.records.evidence import Status
from prill_harness.records.verdict import Verdict
from prill_reports import view
from prill_reports.formats import github_annotations, github_summary, markdown

from .sample import VERDICT

# As the runner reads a line of a step's output (actions/runner, ActionCommand.cs).
COMMAND = re.compile(r"^::(?P<name>[a-z-]+)(?: (?P<properties>[^:]*))?::(?P<data>.*)$")
BROKEN = next(r for r in VERDICT.checks if r.check == "tokens.greedy")
TEXT = st.text(max_size=40) | st.sampled_from(
    ["\r\n::stop-commands::x", "a%0Ab", "x,line=9", "t::u", "\x1b]0;", "\ud800", "\u2028::error::", "100 %"]
)


def unescaped(text: str, *, of_property: bool = False) -> str:
    """What the runner makes of it."""
    for code, char in (("%3A", ":"), ("%2C", ",")) if of_property else ():
        text = text.replace(code, char)
    return text.replace("%0D", "\r").replace("%0A", "\n").replace("%25", "%")


def annotations(verdict: Verdict) -> list[dict[str, str]]:
    """The annotations as the runner reads them; every line is one."""
    found = []
    lines = github_annotations.render(verdict, options={}).split("\n")
    assert lines.pop() == ""
    for line in lines:
        command = COMMAND.match(line)
        assert command, line
        pairs = [pair.split("=", 1) for pair in command["properties"].split(",")]
        read = {name: unescaped(value, of_property=True) for name, value in pairs}
        assert list(read) == ["file", "line", "title"]
        found.append(read | {"kind": command["name"], "message": unescaped(command["data"])})
    return found


def crowded(count: int) -> Verdict:
    """The sample with so many more checks that failed, of no item."""
    failed = msgspec.structs.replace(BROKEN, detail={})
    many = (msgspec.structs.replace(failed, check=f"other.x[{n}]") for n in range(count))
    return msgspec.structs.replace(VERDICT, checks=(*VERDICT.checks, *many))


def test_the_verdict_and_then_the_worst_are_annotated() -> None:
    """The verdict on the policy; checks on the file and line of their item, with what reproduces them."""
    first, second, *rest = annotations(msgspec.structs.replace(VERDICT, policy="ci/gates.toml"))
    assert (first["kind"], first["file"], first["title"]) == (
        "error", "ci/gates.toml", "prill gate architectures",
    )  # fmt: skip
    assert "rule critical-items broke" in first["message"]
    assert (second["file"], second["line"], second["title"]) == (
        "suites/prill_suites/checklists/model.toml", "12", "tokens.greedy failed",
    )  # fmt: skip
    assert BROKEN.reproduce in second["message"]
    kinds = {a["title"]: a["kind"] for a in rest}
    assert kinds["properties.batch inconclusive"] == "warning"
    order = [a["title"].split()[0] for a in rest if a["title"].startswith(("tokens", "stages", "properties"))]
    assert order == ["tokens.teacher_forced", "stages.trace[blk.0.q_rope]", "properties.batch"]


@pytest.mark.parametrize("count", [0, 1, 5, 3000])
def test_ten_are_the_most_and_the_rest_is_counted(count: int) -> None:
    """GitHub drops what exceeds ten; so the last of ten says how many more there are, by status."""
    whole = 1 + len(view.open_checks(crowded(count))) + 5  # the verdict, and two rules, a waiver, two cells
    found = annotations(crowded(count))
    assert len(found) == min(whole, 10)
    if whole > 10:
        (told,) = re.findall(r"^(\d+) more: (.*); the reports", found[-1]["message"])
        assert int(told[0]) == whole - 9
        assert sum(map(int, re.findall(r"\d+", told[1]))) == whole - 9
        assert "critical-items" in found[0]["message"]


def test_a_pass_is_one_notice() -> None:
    """A green gate says so once."""
    passed = msgspec.structs.replace(VERDICT, status=Status.PASSED, sentence="gate passed: 9 checks")
    (only,) = annotations(passed)
    assert (only["kind"], only["message"]) == ("notice", "gate passed: 9 checks")


@settings(max_examples=60, deadline=None)
@given(sentence=TEXT, name=TEXT, file=TEXT)
def test_no_text_becomes_a_command(sentence: str, name: str, file: str) -> None:
    """Nothing in a name, a path or a sentence ends its command, begins another or adds a property."""
    check = msgspec.structs.replace(BROKEN, check=name, sentence=sentence, reproduce=sentence)
    verdict = msgspec.structs.replace(
        VERDICT,
        gate=name,
        sentence=sentence,
        policy=file,
        checks=(check, *(r for r in VERDICT.checks if r is not BROKEN)),
        items=(),
    )
    found = annotations(verdict)
    assert len(found) == len(annotations(msgspec.structs.replace(VERDICT, items=())))
    assert {a["kind"] for a in found} <= {"error", "warning"}


def test_the_summary_is_the_report_with_more_room() -> None:
    """Where the report of a comment has to count, the summary shows; a crowded one fits into a mebibyte."""
    assert github_summary.render(VERDICT, options={}) == markdown.render(VERDICT, options={})
    some, many = crowded(500), crowded(6000)
    assert "… and" in markdown.render(some, options={})
    assert "… and" not in github_summary.render(some, options={})
    text = github_summary.render(many, options={})
    assert 65_536 < len(text.encode()) < 1_048_576
    assert "6000" not in text.split("\n", 1)[0]
    assert "… and" in text
