"""The Markdown report: the verdict first, every failure with its command, and text that stays text."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from prill_harness.records.evidence import Status
from prill_harness.records.verdict import (
    AssumptionResult,
    IncidentResult,
    IncidentState,
    Severity,
    StandingResult,
    Verdict,
)
from prill_reports import markup, view
from prill_reports.formats import html, markdown

VERDICT = msgspec.json.decode((Path(__file__).parent / "data/verdict.json").read_bytes(), type=Verdict)

# As GitHub reads a row: a backslash takes the next punctuation with it, in code spans as well.
CELL = re.compile(r"\|((?:\\[!-/:-@\[-`{-~]|[^|\n])+)(?=\|)")


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table under the heading, its head left out."""
    section = text.split(heading, 1)[1]
    table = re.search(r"\n\| .*?\n\|---.*?\n((?:\|.*\n)*)", section)
    assert table, f"no table under {heading}"
    return [[cell.strip() for cell in CELL.findall(line)] for line in table[1].splitlines()]


def test_the_verdict_comes_first_and_names_the_rule() -> None:
    """The first line is the verdict, the next its sentence, then the rules that broke and only those."""
    text = markdown.render(VERDICT, options={})
    assert text.startswith("# FAILED: gate architectures\n\nrule critical-items broke")
    head = text.split("## Items")[0]
    assert "2 critical items failed" in head
    assert "1 of 6 planned cells is missing" in head
    assert "minimum" not in head


@pytest.mark.parametrize(
    ("status", "word"), [(Status.PASSED, "PASSED"), (Status.INCONCLUSIVE, "INCONCLUSIVE")]
)
def test_the_headline_follows_the_status(status: Status, word: str) -> None:
    """A passed and an inconclusive verdict say so in the first word."""
    text = markdown.render(msgspec.structs.replace(VERDICT, status=status), options={})
    assert text.startswith(f"# {word}: ")


def test_items_are_all_there_worst_first() -> None:
    """Each item has one row with its status and severity; failures lead and proven items close."""
    found = rows(markdown.render(VERDICT, options={}), "## Items")
    assert {(r[0].strip("`"), r[1], r[2]) for r in found} == {
        (i.id, i.status.value, i.severity.value) for i in VERDICT.items
    }
    statuses = [r[1] for r in found]
    assert statuses == sorted(statuses, key=["failed", "unproven", "waived", "proven"].index)
    assert found[0][2] == "critical"


def test_each_failure_has_its_command_and_its_finding() -> None:
    """Every check that did not pass shows its sentence, first divergence and how to reproduce it."""
    text = markdown.render(VERDICT, options={})
    section = text.split("## What did not pass")[1].split("## Figures")[0]
    opened = [r for r in VERDICT.checks if r.status in ("failed", "error", "inconclusive")]
    assert len(opened) == 4
    for result in opened:
        assert f"`{result.check}` {result.status.value}" in section
        assert result.reproduce in section
    assert section.index("tokens.greedy") < section.index("properties.batch"), "worst first"
    assert "cache.reuse" not in section, "waived checks are no failures"
    assert "' der'" in section or " der" in section


def test_figures_stand_beside_their_bounds() -> None:
    """Figures out of bound come first and are marked, in bound ones are not."""
    found = rows(markdown.render(VERDICT, options={}), "## Figures")
    assert [r[5] for r in found] == ["**no**"] * 3 + ["yes"] * 2
    assert [found[1][0], found[1][2], found[1][3]] == ["`tokens.teacher_forced`", "kl_max", "0.087"]


def test_waivers_are_ordered_by_days_left() -> None:
    """The waiver that is over or runs out first comes first."""
    assert [r[0] for r in rows(markdown.render(VERDICT, options={}), "## Waivers")] == ["-7", "12", "53"]


def test_cells_that_did_not_report_come_first() -> None:
    """Missing and dead cells lead the table."""
    found = rows(markdown.render(VERDICT, options={}), "## Cells")
    assert {r[1] for r in found[:2]} == {"missing", "incomplete"}
    assert len(found) == len(VERDICT.cells)


def test_each_model_stands_beside_the_digest_of_its_file() -> None:
    """A model is called as it was given; what could not be read is said to be so."""
    verdict = msgspec.structs.replace(VERDICT, models={"own.gguf": "ab" * 32, "lost.gguf": ""})
    found = rows(markdown.render(verdict, options={}), "## Models: 2")
    assert found == [["`lost.gguf`", "`could not be read`"], ["`own.gguf`", f"`{'ab' * 32}`"]]


NASTY = [
    "a|b",
    "`x`",
    "``",
    "\n# heading",
    "<script>",
    "[l](http://x)",
    "@user",
    "\\|",
    "**b**",
    "`\\|",
    "\x1b[0m",
]


def crowded(failed: int, lost: int, sentence: str = "seen") -> Verdict:
    """The sample with so many more failed checks and lost cells."""
    check = next(r for r in VERDICT.checks if r.status is Status.FAILED)
    cell = next(c for c in VERDICT.cells if c.status == "missing")
    checks = (
        msgspec.structs.replace(
            check,
            check=f"tokens.x[{n}]",
            sentence=sentence,
            reproduce=f"prill run {sentence}",
            status=(Status.FAILED, Status.ERROR)[n % 2],
        )
        for n in range(failed)
    )
    cells = (
        msgspec.structs.replace(
            cell, cell=msgspec.structs.replace(cell.cell, model=f"{n}"), sentence=sentence
        )
        for n in range(lost)
    )
    return msgspec.structs.replace(
        VERDICT, checks=(*VERDICT.checks, *checks), cells=(*VERDICT.cells, *cells), sentence=sentence
    )


def rest(section: str) -> dict[str, int]:
    """What a section says it left out: status -> how many; empty where it left nothing out."""
    told = re.search(r"^… and (\d+) more: ([^;]*);", section, re.MULTILINE)
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) ([a-z ]+)", told[2])} if told else {}
    assert not told or sum(counts.values()) == int(told[1])
    return counts


@settings(max_examples=8, deadline=None)
@example(failed=2000, lost=700, sentence="&" * 5000)
@given(
    failed=st.sampled_from([0, 1, 60, 300]),
    lost=st.sampled_from([0, 700]),
    sentence=st.text(max_size=20) | st.sampled_from(NASTY) | st.sampled_from(["&" * 5000, "𝄞" * 5000]),
)
def test_it_always_fits_into_a_comment(failed: int, lost: int, sentence: str) -> None:
    """However many checks fail and cells are lost: under 64 KB, verdict first, the worst shown, every other
    one counted by its status, and no part crowds out another."""
    verdict = crowded(failed, lost, sentence)
    text = markdown.render(verdict, options={})
    assert len(text.encode()) < 65_536
    assert text.startswith("# FAILED: gate architectures\n")
    broken = text.split("## What did not pass")[1].split("\n## Figures")[0]
    shown = [line.rsplit(" on ", 1)[0].split()[-1] for line in broken.splitlines() if line.startswith("### ")]
    assert shown[0] == "failed"
    opened = Counter(r.status.value for r in view.open_checks(verdict))
    assert Counter(shown) + Counter(rest(broken)) == opened
    cells = text.split("## Cells")[1].split("\n## ")[0]
    assert len(rows(text, "## Cells")) + sum(rest(cells).values()) == len(verdict.cells)
    assert rows(text, "## Cells")[0][1] in ("missing", "incomplete")
    assert "## Waivers" in text
    assert text.splitlines()[-1].startswith("prill ")


def test_what_fits_is_whole() -> None:
    """A report of ordinary size leaves nothing out and counts nothing."""
    text = markdown.render(VERDICT, options={})
    assert "… and" not in text
    assert len(rows(text, "## Figures")) == len(view.figures(VERDICT))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30) | st.sampled_from(NASTY))
def test_any_text_keeps_the_tables(sentence: str) -> None:
    """Whatever a sentence or an id holds, tables keep their columns and no line is added."""
    first = msgspec.structs.replace(VERDICT.items[0], sentence=sentence, id=sentence, title=sentence)
    text = markdown.render(msgspec.structs.replace(VERDICT, items=(first, *VERDICT.items[1:])), options={})
    found = rows(text, "## Items")
    assert [len(r) for r in found] == [5] * len(VERDICT.items)


def test_text_is_no_markup() -> None:
    """Markup, HTML, mentions and control characters lose their power."""
    assert markup.text("a|b") == "a\\|b"
    assert markup.text("<b>&") == "&lt;b&gt;&amp;"
    assert markup.text("`x`\n*y*") == "\\`x\\`\\\\n\\*y\\*"
    assert "@user" not in markup.text("@user")
    assert markup.text("_a_b_") == "\\_a_b\\_"
    assert markup.text("- x - y") == "\\- x - y"
    assert markup.text("\x1b") == "\\\\x1b"
    assert markup.code("a`b|c") == "`` a`b\\|c ``"
    assert markup.code("a\\|b") == "a\\\\\\|b", "in a code span the backslash would free the pipe"


def test_what_was_assumed_is_a_table_of_text() -> None:
    """Each assumption has a row with key, value, reason and models; a verdict without any has no table."""
    odd = AssumptionResult(
        "tokenizer.ggml.pre", "<b>|default|</b>", "@none *is* named", ("a|b.gguf", "c.gguf")
    )
    made = markdown.render(msgspec.structs.replace(VERDICT, assumptions=(odd,)), options={})
    (row,) = rows(made, "## Assumed")
    assert row[0] == "`tokenizer.ggml.pre`"
    assert row[1] == r"&lt;b&gt;\|default\|&lt;/b&gt;"
    assert row[2] == "@\u2060none \\*is\\* named"
    assert row[3] == r"a\|b.gguf, c.gguf"
    assert "## Assumed" not in markdown.render(VERDICT, options={})


def test_open_incidents_and_what_the_history_says_are_shown() -> None:
    """The first due first, without those that are closed; beside each waiver and failure, how often and since
    when, as on the page."""
    entries = (("1", "low", "open"), ("2", "high", "closed"), ("3", "critical", "fixed"))
    incidents = tuple(
        IncidentResult(name, Severity(severity), "cache", "a | b", IncidentState(state), "2026-08-01")
        for name, severity, state in entries
    )
    standing = StandingResult(8, 2, True, "2026-08-03", 1)
    told = "2 of 8 runs on these digests failed: flaky, 25 %; failing since 2026-08-03, 1 run in a row"
    first, *others = VERDICT.waivers
    failed = next(c for c in VERDICT.checks if c.status is Status.FAILED)
    shown = msgspec.structs.replace(
        VERDICT,
        incidents=incidents,
        waivers=(replace(first, standing=standing), *others),
        checks=tuple(
            msgspec.structs.replace(c, standing=standing) if c is failed else c for c in VERDICT.checks
        ),
    )
    text = markdown.render(shown, options={})
    assert [r[:3] for r in rows(text, "## Open incidents")] == [
        ["`3`", "critical", "fixed"],
        ["`1`", "low", "open"],
    ]
    assert told in [r[6] for r in rows(text, "## Waivers")]
    assert f"- {told}" in text.splitlines()
    page = html.render(shown, options={})
    assert page.count(told) == 2
    assert page.index('<th scope="row">3</th>') < page.index('<th scope="row">1</th>')
    assert "## Open incidents" not in markdown.render(VERDICT, options={})
    assert "Open incidents" not in html.render(VERDICT, options={})


def test_what_is_left_out_is_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of thousands of failures those that cannot be shown cost nothing: nobody looks at their findings."""
    looked: list[str] = []
    whole = view.kept
    monkeypatch.setattr(view, "kept", lambda result: (looked.append(result.check), whole(result))[1])
    text = markdown.render(crowded(2000, 0), options={})
    shown = text.count("\n### ")
    assert 0 < shown < 300
    assert shown <= len(looked) < 400
