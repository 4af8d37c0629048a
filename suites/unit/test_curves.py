"""Readings from a probe through the ledger into the page of a gate: curve, slope and interval, or nothing."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree
from lxml import html as parser

from prill_harness.leaks.reports import curves
from prill_harness.leaks.reports.report import JudgedSeries, LeakReport, LeakVerdict, PathReport
from prill_harness.leaks.reports.verdict import WINDOWS, shape
from prill_harness.records.evidence import Status
from prill_harness.records.verdict import Verdict as GateVerdict
from prill_reports import leaks
from prill_reports.curves import SMALL, WHOLE, drawn
from prill_reports.formats import html, markdown

VERDICT = msgspec.json.decode((Path(__file__).parent / "data/verdict.json").read_bytes(), type=GateVerdict)
LEAK = tuple(1000 + 48 * n for n in range(41))
FLAT = (1000,) * 41
RAGGED = tuple(1000 + (n % 3) * 16 for n in range(101))


def judged(series: str, values: tuple[int, ...], verdict: LeakVerdict) -> JudgedSeries:
    seen = shape(values)
    grown = sum(g > 0 for g in seen.grown)
    return JudgedSeries(
        *series.split(" "), "B", verdict, f"{series}: {verdict.value}", values,
        seen.slope, seen.low, seen.high, seen.growth, seen.fall, grown, WINDOWS,
    )  # fmt: skip


def path(*seen: JudgedSeries, verdict: LeakVerdict = LeakVerdict.CLEAN) -> PathReport:
    return PathReport("success", verdict, "a sentence", 50, 11, True, seen)


LEAKING = path(
    judged("python blocks", FLAT, LeakVerdict.CLEAN),
    judged("host bytes", LEAK, LeakVerdict.LEAK),
    judged("process unattributed", RAGGED[:41], LeakVerdict.CLEAN),
    verdict=LeakVerdict.LEAK,
)
CLEAN = path(judged("python blocks", FLAT, LeakVerdict.CLEAN), judged("host bytes", FLAT, LeakVerdict.CLEAN))


def gate(detail: Any, status: Status) -> GateVerdict:
    """The verdict of a gate whose only check is of memory; its detail went through JSON, as in a ledger."""
    kept = msgspec.json.decode(msgspec.json.encode(detail))
    check = msgspec.structs.replace(
        VERDICT.checks[0], check="memory.success", status=status, detail=kept, metrics=(), sentence="seen"
    )
    return msgspec.structs.replace(VERDICT, checks=(check,))


def page(verdict: GateVerdict) -> etree._Element:
    return parser.document_fromstring(html.render(verdict, options={}))


def words(element: etree._Element) -> str:
    return re.sub(r"\s+", " ", element.text_content()).strip()


def points(figure: etree._Element) -> list[tuple[float, float]]:
    text = figure.xpath(".//polyline/@points")[0]
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in text.split(" "))]


def test_a_leak_in_the_ledger_is_drawn_with_slope_and_interval() -> None:
    """The failed check's article holds the curve of what leaked first: every reading, slope, interval."""
    article = page(gate(curves.noted(LEAKING), Status.FAILED)).xpath("//details[@class='finding']")[0]
    first, second = article.xpath(".//figure")
    assert words(first.xpath("./figcaption")[0]) == (
        "leak success: host bytes: 48 B per call (48 B to 48 B), 5 of 5 windows grew"
    )
    assert first.get("class") == "failed"
    drawn = points(first)
    assert len(drawn) == 41
    steps = {round(a[1] - b[1], 1) for a, b in itertools.pairwise(drawn)}
    assert max(steps) - min(steps) <= 0.2 < min(steps), "a steady leak rises by the same at every call"
    assert first.xpath(".//line[@class='slope']")
    assert first.xpath(".//polygon[@class='band']/@points")
    assert len(first.xpath(".//line[@class='grid']")) == WINDOWS - 1 + 2
    assert first.xpath("./svg/@aria-label") == ["host bytes: leak"]
    assert second.get("class") == "passed"


def test_a_clean_path_has_a_small_flat_picture() -> None:
    """A check that passed is drawn outside the findings, in the small frame: the host's bytes, level."""
    tree = page(gate(curves.noted(CLEAN), Status.PASSED))
    assert not tree.xpath("//details[@class='finding']")
    (figure,) = tree.xpath("//section[@aria-labelledby='readings']//figure")
    assert "host bytes: 0 B per call (0 B to 0 B), 0 of 5 windows grew" in words(figure)
    assert figure.xpath("./svg/@viewbox") == [f"0 0 {SMALL.width} {SMALL.height}"]
    assert len({y for _, y in points(figure)}) == 1
    assert not tree.xpath("//link|//img|//*[@src]|//*[@href][not(starts-with(@href, '#'))]")


def test_both_pages_draw_the_same_curve() -> None:
    """The page of a probe and that of a gate hold the very same shapes of a failing series."""
    report = LeakReport("numpy", "fixture:llama-tiny", LeakVerdict.LEAK, "a leak", (LEAKING,))
    own = parser.document_fromstring(leaks.render(report)).xpath("//figure/svg")
    gates = page(gate(curves.noted(LEAKING), Status.FAILED)).xpath("//details[@class='finding']//figure/svg")
    assert [etree.tostring(svg) for svg in own] == [etree.tostring(svg) for svg in gates]


def test_what_a_ledger_keeps_is_bounded() -> None:
    """Of a thousand calls and thirty series eight curves of 41 points are kept, ends and level with them."""
    long = tuple(16 * n for n in range(1001))
    many = path(*(judged(f"engine counter_{n}", long, LeakVerdict.CLEAN) for n in range(30)),
                judged("host bytes", long, LeakVerdict.LEAK))  # fmt: skip
    detail = curves.noted(many)
    kept = curves.recalled(detail)["success"]
    assert len(kept) == curves.MOST_SERIES
    assert kept[0].series == "host bytes"
    assert {len(curve.at) for curve in kept} == {curves.MOST_POINTS}
    assert (kept[0].at[0], kept[0].at[-1], kept[0].values[-1]) == (0, 1000, 16000)
    assert {1000 * k // WINDOWS for k in range(WINDOWS + 1)} <= set(kept[0].at), "window borders are kept"
    assert len(msgspec.json.encode(detail)) < 8192


def test_thinning_keeps_what_is_short() -> None:
    """Every reading of a probe of 50 calls is kept; of 101 readings those asked for."""
    short, long = (curves.curves(path(judged("host bytes", v, LeakVerdict.LEAK)))[0] for v in (LEAK, RAGGED))
    assert curves.thinned(short) is short
    assert curves.thinned(long, 5).at == (0, 25, 50, 75, 100)
    assert drawn(curves.thinned(long), WHOLE).last == drawn(long, WHOLE).last == 110


def test_parts_of_a_detail_are_found_by_name() -> None:
    """A check that ran two probes shows the curves of both under the names it gave them."""
    detail = {"leaking control": curves.noted(LEAKING), "sound control": curves.noted(CLEAN)}
    assert {name: len(found) for name, found in curves.recalled(detail).items()} == {
        "leaking control": 2, "sound control": 1,
    }  # fmt: skip


def test_markdown_has_the_figures_and_not_the_readings() -> None:
    """Text reports show the curves' figures as a table, not their points."""
    text = markdown.render(gate(curves.noted(LEAKING), Status.FAILED), options={})
    assert "48 B to 48 B" in text
    assert "[0, 48, 96" not in text
    assert "0, 48, 96" not in text


ROW = curves.noted(LEAKING)[curves.DETAIL_KEY][0]
WRONG = {
    "no list": 7,
    "text": "curves",
    "old form": {"host bytes": [1, 2, 3]},
    "rows of text": ["x"],
    "empty rows": [{}],
    "one point": [ROW | {"at": [0], "values": [0]}],
    "fewer readings than calls": [ROW | {"values": [0, 1]}],
    "calls that fall": [ROW | {"at": ROW["at"][::-1]}],
    "a reading of text": [ROW | {"values": ["<script>"] * 41}],
    "a huge reading": [ROW | {"values": [0] * 40 + [10**400]}],
    "a slope that is no number": [ROW | {"slope": None}],
    "a huge slope": [ROW | {"slope": 1e300}],
    "a thousand million windows": [ROW | {"of": 10**9}],
    "an unknown verdict": [ROW | {"verdict": "fine"}],
}


@pytest.mark.parametrize("status", [Status.FAILED, Status.PASSED])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_malformed_detail_breaks_no_report(wrong: str, status: Status) -> None:
    """What is no curve is not drawn; the page stands, and so does a sound curve beside it."""
    bad: Any = WRONG[wrong]
    detail = {"path": "success", curves.DETAIL_KEY: bad}
    kept = VERDICT.checks[0]
    check = msgspec.structs.replace(kept, check="memory.success", status=status, detail=detail)
    verdict = msgspec.structs.replace(VERDICT, checks=(check,))
    assert not page(verdict).xpath("//figure")
    assert markdown.render(verdict, options={})
    if isinstance(bad, list):
        mixed = msgspec.structs.replace(check, detail={curves.DETAIL_KEY: [*bad, ROW]})
        assert len(page(msgspec.structs.replace(VERDICT, checks=(mixed,))).xpath("//figure")) == 1


def test_numbers_that_are_none_are_no_curve() -> None:
    """NaN and infinity, which JSON in Python may carry, are not drawn."""
    for value in (float("nan"), float("inf"), -float("inf")):
        assert curves.recalled({curves.DETAIL_KEY: [ROW | {"slope": value}]}) == {}


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(field=st.sampled_from(sorted(ROW)), value=ANY, whole=ANY)
def test_any_detail_can_be_shown(field: str, value: Any, whole: Any) -> None:
    """One field of a curve, or all of them, replaced by anything: the page renders and stays well-formed."""
    for detail in (
        {curves.DETAIL_KEY: [ROW | {field: value}]},
        {curves.DETAIL_KEY: whole},
        {"part": {curves.DETAIL_KEY: whole}},
    ):
        check = msgspec.structs.replace(VERDICT.checks[0], status=Status.FAILED, detail=detail)
        tree = page(msgspec.structs.replace(VERDICT, checks=(check,)))
        assert len(tree.xpath("//script")) == 1  # the page's own
        assert all(0 <= x <= WHOLE.width for figure in tree.xpath("//figure") for x, _ in points(figure))
