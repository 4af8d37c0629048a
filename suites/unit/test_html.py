"""The HTML report: one file, no network, no script, readable structure, text that stays text."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree
from lxml import html as parser

from prill_harness.records.evidence import Status
from prill_harness.records.verdict import AssumptionResult, LeadResult, StandingResult, Verdict
from prill_reports import stages, view
from prill_reports.formats import html

VERDICT = msgspec.json.decode((Path(__file__).parent / "data/verdict.json").read_bytes(), type=Verdict)


def page(verdict: Verdict = VERDICT) -> etree._Element:
    return parser.document_fromstring(html.render(verdict, options={}))


def words(element: etree._Element) -> str:
    return re.sub(r"\s+", " ", element.text_content()).strip()


def test_it_needs_nothing_but_itself() -> None:
    """No link but to itself, no image, no import, no URL; the one script is that of the search, whose field
    is hidden until it runs: the file works offline and without JavaScript."""
    text = html.render(VERDICT, options={})
    assert not page().xpath(
        "//link|//img|//iframe|//object|//*[@src]|//*[@href][not(starts-with(@href, '#'))]"
    )
    assert len(page().xpath("//script")) == 1
    assert [words(one) for one in page().xpath("//*[@hidden]//label")] == ["Search"]
    assert not re.search(r"url\(|@import|https?://", text)
    assert not any(name.startswith("on") for node in page().iter() for name in node.attrib)
    assert len(text.encode()) < 50_000


def test_the_verdict_comes_first() -> None:
    """The first thing on the page is the verdict, the rule that broke, the cause, and what to do; other rules
    are folded below. Without a cause on record the rule stands alone."""
    lead = LeadResult("stages.early", "blk.0.q_rope is wrong", "prill run stages.early", "prill bisect")
    for led in (None, lead):
        header = page(msgspec.structs.replace(VERDICT, lead=led)).xpath("//main/*")[0]
        assert header.tag == "header"
        assert words(header).startswith("Failed: gate architectures exit code 1")
        told = {words(dt): words(dt.getnext()) for dt in header.xpath(".//dt")}
        rule = "failed critical-items: 2 critical items failed: llama.greedy-tokens, llama.logits"
        assert told.pop("Rule that broke") == rule
        assert told == ({} if led is None else {
            "Root cause": lead.cause, "Reproduce": lead.reproduce, "Next": lead.following,
        })  # fmt: skip
        assert [words(li) for li in header.xpath(".//details//li")] == [
            "inconclusive cells: 1 of 6 planned cells is missing",
        ]


def test_what_did_not_pass_comes_before_what_did() -> None:
    """Findings and open items stand open; proven items, figures and complete cells are folded behind them."""
    heads = page().xpath("//h2/@id")
    assert heads.index("findings") < heads.index("items") < heads.index("figures")
    folded = [words(one) for one in page().xpath("//section/details[not(@open)]/summary")]
    assert any("proven" in text for text in folded)
    assert any("figures" in text for text in folded)
    assert page().xpath("//section[@aria-labelledby='cells']/details/@open")  # one of them is missing


def test_the_walk_shows_the_first_wrong_stage() -> None:
    """A bar for each stage; one beyond its bound reaches over the line, one within stays under it, whether
    exact or not finite."""
    figures = [("embed", 0.0), ("blk.0.q", 1e-14), ("blk.0.q_rope", 1.5), ("blk.1.q", None)]
    told = tuple(
        {"stage": name, "isolated": error, "bound": 1e-12, "ok": error is not None and error < 1e-12}
        for name, error in figures
    )
    walk = stages.drawn(told)
    assert walk is not None
    assert [bar.y >= walk.limit for bar in walk.bars] == [True, True, False, False]
    assert (walk.first[1], walk.wrong) == ("blk.0.q_rope", 2)  # type: ignore[index]
    lead = LeadResult("stages.early", "wrong", "a", "b", told)
    svg = page(msgspec.structs.replace(VERDICT, lead=lead)).xpath("//h2[@id='walk']/following::svg[1]")[0]
    assert [rect.get("class") for rect in svg.xpath("./rect")] == ["within", "within", "beyond", "beyond"]
    assert svg.xpath("./rect/title")[2].text == "blk.0.q_rope: NMSE 1.5, at most 1e-12"
    assert stages.drawn(()) is None


@given(st.text(max_size=12), st.text(max_size=6), st.text(max_size=6))
def test_texts_are_marked_where_they_part(common: str, expected: str, got: str) -> None:
    """Both are whole, begin alike, and no character after the mark's beginning is the same in both."""
    parted = view._texts({"expected_text": common + expected, "got_text": common + got})
    if expected == got:
        assert parted is None
        return
    assert parted is not None
    assert (parted.common + parted.expected, parted.common + parted.got) == (common + expected, common + got)
    assert parted.expected[:1] != parted.got[:1]
    assert len(parted.common) >= len(common)


def test_the_matrix_has_every_item_and_column() -> None:
    """Item x cell: each item has a row, each model, engine and device a column, each field its status."""
    tables = page().xpath("//section[@aria-labelledby='items']//table")
    for table in tables:  # the open ones, and the proven ones
        heads = [words(th) for th in table.xpath("./thead//th")]
        assert heads[3:] == ["fixture:gpt2-tiny · numpy · cpu", "fixture:llama-tiny · numpy · cpu"]
    assert len(tables) == 2
    shown = {r.xpath("./th/code")[0].text: r.xpath("./td") for t in tables for r in t.xpath("./tbody/tr")}
    rows = {name: [words(td) for td in cells] for name, cells in shown.items()}
    assert set(rows) == {i.id for i in VERDICT.items}
    assert rows["llama.greedy-tokens"] == ["failed", "critical", "–", "✗"]
    assert rows["gpt2.positions"] == ["unproven", "high", "∅", "–"]
    spoken = {name: [td.xpath("string(.//@aria-label)") for td in cells] for name, cells in shown.items()}
    assert spoken["llama.greedy-tokens"] == ["", "", "", "failed"]
    assert spoken["gpt2.positions"] == ["", "", "missing", ""]


def test_the_worst_cell_decides_a_field() -> None:
    """One failing suite among passing ones makes the field failed, whatever their order."""
    ids = [c.cell.id for c in VERDICT.cells[:3]]
    for states in (("passed", "failed", "waived"), ("failed", "waived", "passed")):
        item = msgspec.structs.replace(VERDICT.items[0], cells=dict(zip(ids, states, strict=True)))
        assert view.matrix_row(item, VERDICT) == {"fixture:llama-tiny · numpy · cpu": "failed"}


def test_each_model_stands_beside_the_digest_of_its_file() -> None:
    """A model is called as it was given; what could not be read is said to be so."""
    page = html.render(
        msgspec.structs.replace(VERDICT, models={"own.gguf": "ab" * 32, "lost.gguf": ""}), options={}
    )
    assert f"<code>own.gguf</code></th><td><code>{'ab' * 32}</code>" in page
    assert "<code>lost.gguf</code></th><td><code>could not be read</code>" in page


def test_findings_show_divergence_and_command() -> None:
    """Each check that did not pass has its sentence, the tokens around the divergence and the command."""
    articles = {words(a.xpath("./summary/h3")[0]): a for a in page().xpath("//details[@class='finding']")}
    assert len(articles) == 4
    greedy = articles["tokens.greedy"]
    around = greedy.xpath(".//table[contains(caption, 'tokens around the first divergence')]/tbody/tr")
    assert len(around) == 17
    assert [words(r) for r in around if r.get("class") == "here"] == ["18131177"]
    assert len(greedy.xpath(".//table[contains(caption, 'oracle top')]/tbody/tr")) == 2
    assert (
        greedy.xpath("./pre")[0].text == "prill run --engine numpy --model fixture:llama-tiny tokens.greedy"
    )


def test_bars_stand_at_the_bound_and_beyond() -> None:
    """The share is one half at the bound, more beyond it, for both directions; what is not finite is full."""
    assert view._share(0.002, 0.002, "<=") == pytest.approx(0.5)
    assert view._share(0.087, 0.002, "<=") > 0.5 > view._share(1e-12, 2e-12, "<=")
    assert view._share(0.995, 0.999, ">=") > 0.5
    assert view._share(None, 1.0, "<=") == 1.0
    assert view._share(0.0, 0.0, "<=") == 0.0
    bars = page().xpath("//h2[@id='figures']/following::table[1]/tbody/tr//rect[2]")
    assert [b.get("class") for b in bars] == ["beyond"] * 3 + ["within"] * 2
    assert all(float(b.get("width")) > 80 for b in bars[:3])


def test_structure_serves_screen_readers() -> None:
    """One h1, headings without gaps, heads with a scope, tables with a caption, a language."""
    tree = page()
    levels = [int(h.tag[1]) for h in tree.xpath("//h1|//h2|//h3")]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert not tree.xpath("//th[not(@scope)]")
    assert not tree.xpath("//table[not(caption)]")
    assert not tree.xpath("//svg[not(@role) or not(@aria-label)]")
    assert tree.get("lang") == "en"


def luminance(colour: str) -> float:
    digits = colour.strip("#")
    digits = "".join(c * 2 for c in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_is_enough_in_light_and_dark() -> None:
    """Every text colour on every ground it stands on reaches 4.5:1 in both schemes (WCAG AA)."""
    style = page().xpath("//style")[0].text
    schemes = re.findall(r":root \{(.*?)\}", style, re.S)
    assert len(schemes) == 3  # the third is for paper
    for scheme in schemes[:2]:
        colour = dict(re.findall(r"--([a-z-]+): (#\w+)", scheme))
        pairs = [(ink, ground) for ink in ("ink", "soft") for ground in ("page", "panel")]
        pairs += [(name, f"{name}-bg") for name in ("good", "bad", "care")]
        pairs += [(ink, f"{name}-bg") for ink in ("ink", "soft") for name in ("good", "bad", "care")]
        for ink, ground in pairs:
            light, dark = sorted((luminance(colour[ink]), luminance(colour[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


@settings(max_examples=60, deadline=None)
@given(
    st.text(max_size=40)
    | st.sampled_from(["<script>alert(1)</script>", "</style>", "\x00\x1b", "\ud800", "{{ 1 }}"])
)
def test_any_text_stays_text(sentence: str) -> None:
    """Whatever an engine says, no element is added and the page encodes."""
    first = msgspec.structs.replace(
        VERDICT.checks[1],
        sentence=sentence,
        check=sentence,
        reproduce=sentence,
        detail={sentence: [sentence, 1]},
    )
    changed = msgspec.structs.replace(VERDICT, sentence=sentence, checks=(first,))
    plain = msgspec.structs.replace(
        changed,
        sentence="x",
        checks=(
            msgspec.structs.replace(first, sentence="x", check="x", reproduce="x", detail={"x": ["x", 1]}),
        ),
    )
    tree = parser.document_fromstring(html.render(changed, options={}).encode())
    tags = [e.tag for e in tree.iter() if e.tag != "pre"]
    assert tags == [e.tag for e in page(plain).iter() if e.tag != "pre"]


def test_same_verdict_same_bytes() -> None:
    """Rendering is deterministic."""
    assert html.render(VERDICT, options={}) == html.render(VERDICT, options={})


def test_a_passed_verdict_has_no_findings() -> None:
    """Nothing red appears on the page of a verdict in which all passed."""
    good = tuple(c for c in VERDICT.checks if c.status is Status.PASSED)
    proven = tuple(i for i in VERDICT.items if i.status.value == "proven")
    cells = tuple(c for c in VERDICT.cells if c.status == "complete")
    verdict = msgspec.structs.replace(
        VERDICT, status=Status.PASSED, exit_code=0, rules=VERDICT.rules[1:2], checks=good, items=proven,
        cells=cells, waivers=(),
    )  # fmt: skip
    tree = page(verdict)
    assert not tree.xpath("//article")
    assert not tree.xpath("//span[contains(@class, 'failed') or contains(@class, 'missing')]")
    assert words(tree.xpath("//h1")[0]) == "Passed: gate architectures"


def test_the_divergence_is_found_in_unequal_lists() -> None:
    """A truncated text parts where it ends; equal lists part nowhere and stay facts."""
    cut = view.finding({"expected": [1, 2, 3], "got": [1, 2], "position": 7}).tables[0]
    assert cut.rows == (("5", "1", "1"), ("6", "2", "2"), ("7", "3", "nothing"))
    assert cut.here == 2
    same = view.finding({"expected": [1], "got": [1]})
    assert (same.tables, dict(same.facts)) == ((), {"expected": "1", "got": "1"})
    long = view.finding({"expected": list(range(100)), "got": [*range(50), -1, *range(51, 100)]}).tables[0]
    assert [row[0] for row in long.rows] == [str(n) for n in range(42, 59)]


def test_what_was_assumed_is_a_table_of_text() -> None:
    """Each assumption has a row that says key, value, reason and models, as text."""
    odd = AssumptionResult("tokenizer.ggml.pre", "<b>default</b>", "none & nothing", ("a<b.gguf", "c.gguf"))
    found = page(msgspec.structs.replace(VERDICT, assumptions=(odd,)))
    cells = found.xpath("//h2[@id='assumptions']/following::table[1]/tbody/tr/*")
    assert [words(cell) for cell in cells] == [odd.key, odd.assumed, odd.why, "a<b.gguf, c.gguf"]
    assert not page().xpath("//h2[@id='assumptions']")


def test_the_history_of_a_failure_is_drawn_and_told() -> None:
    """A mark for each run, high where it did not pass, and the same in words: how often, since when."""
    standing = StandingResult(9, 3, True, "2026-05-01", 2, "PPIFPEFF")
    failed = msgspec.structs.replace(VERDICT.checks[1], status=Status.FAILED, standing=standing)
    finding = page(msgspec.structs.replace(VERDICT, checks=(failed,))).xpath("//details[@class='finding']")[0]
    (spark,) = finding.xpath(".//svg[@class='spark']")
    heights = [int(rect.get("height")) for rect in spark.xpath("./rect")]
    assert [height > 10 for height in heights] == [letter != "P" for letter in standing.recent]
    assert spark.get("aria-label").startswith("the last 8 runs: passed, passed, inconclusive, failed,")
    told = "3 of 9 runs on these digests failed: flaky, 33 %; failing since 2026-05-01, 2 runs in a row"
    assert told in words(finding)
