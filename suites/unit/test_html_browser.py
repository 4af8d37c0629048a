"""The HTML report in a real browser: its first screen, its search, its print, and what axe says of it."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from prill_harness.records.evidence import Cell, Status
from prill_harness.records.verdict import CheckResult, LeadResult, Verdict
from prill_reports.formats import html

from .browser import looked_at, printed

VERDICT = msgspec.json.decode((Path(__file__).parent / "data/verdict.json").read_bytes(), type=Verdict)
CAUSE = "blk.0.q_rope is the first wrong stage: NMSE 1.5, at most 9.7e-12; its input was right; " * 2
STAGES = tuple(
    {"stage": f"blk.{layer}.{name}", "isolated": 1.0 if wrong else 1e-15, "bound": 1e-12, "ok": not wrong}
    for layer in range(32)
    for name in ("attn_norm", "q", "q_rope", "attn", "ffn")
    for wrong in [layer == 7 and name == "q_rope"]
)
COMMAND = (
    "prill run --engine 'serve:./engine -m {model} --port {port}' --model ./models/mine.gguf stages.early"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A red gate of the default's size: 370 checks in 51 cells, a cause, stages, forty failures."""
    many = tuple(
        CheckResult(
            f"ops.check[{n}]", Cell(f"model{n % 17}", "numpy", "ops"), status, f"NMSE {n}", 9, 0.1, COMMAND,
            oracle="the oracle", metrics=({"name": "nmse", "value": n / 9, "bound": 1.0, "relation": "<="},),
        )
        for n in range(370)
        for status in [Status.FAILED if n % 9 == 0 else Status.PASSED]
    )  # fmt: skip
    cells = tuple(
        msgspec.structs.replace(VERDICT.cells[0], cell=Cell(f"model{n % 17}", "numpy", f"s{n}"))
        for n in range(51)
    )
    items = tuple(msgspec.structs.replace(VERDICT.items[n % 3], id=f"item.{n}") for n in range(97))
    verdict = msgspec.structs.replace(
        VERDICT, checks=VERDICT.checks + many, cells=cells, items=items,
        lead=LeadResult("stages.early", CAUSE, COMMAND, COMMAND, STAGES),
    )  # fmt: skip
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(html.render(verdict, options={}), encoding="utf-8")
    assert file.stat().st_size < 2_000_000
    return file


SEEN = """
const lead = page.querySelector(".lead"), words = lead.textContent;
const end = lead.getBoundingClientRect().bottom;
const wide = [...page.querySelectorAll("body *")].filter(one => !one.closest(".scroll")
  && one.checkVisibility() && one.getBoundingClientRect().right > view.innerWidth + 1);
const field = page.querySelector("#search");
view.document.dispatchEvent(new view.KeyboardEvent("keydown", {key: "/", bubbles: true}));
const focused = page.activeElement === field;
field.value = "ops.check[9]";
field.dispatchEvent(new view.Event("input"));
const shown = [...page.querySelectorAll(".finding")].filter(one => one.checkVisibility());
return {words, end, wide: wide.map(one => one.outerHTML.slice(0, 90)), focused,
  found: shown.map(one => one.textContent), count: page.querySelector("output").textContent,
  bars: page.querySelectorAll("rect.beyond").length};
"""


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 800)])
def test_the_first_screen_tells_everything(page: Path, tmp_path: Path, width: int, height: int) -> None:
    """On a telephone and on a desk: verdict, rule, cause, both commands on the first screen, nothing wider
    than it; the key / goes to the search, which leaves what it finds; the console stays empty."""
    seen, console = looked_at(page, width, height, SEEN, tmp_path)
    assert console == []
    for word in ("Rule that broke", "critical-items", "Root cause", "q_rope", "Reproduce", "Next", COMMAND):
        assert word in seen["words"]
    assert seen["end"] <= height
    assert seen["wide"] == []
    assert seen["focused"]
    assert seen["count"].endswith("found")
    assert [re.search(r"ops\.check\[\d+\]", text)[0] for text in seen["found"]] == ["ops.check[9]"]  # type: ignore[index]
    assert seen["bars"] >= 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(tmp_path: Path, scheme: str) -> None:
    """Structure and contrast, in both colour schemes, with everything unfolded."""
    lead = LeadResult("stages.early", CAUSE, COMMAND, COMMAND, STAGES[:50])
    page = html.render(msgspec.structs.replace(VERDICT, lead=lead), options={})
    axe = importlib.resources.files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    text = page.replace("(prefers-color-scheme: dark)", "all" if scheme == "dark" else "not all")
    judged = tmp_path / "judged.html"
    judged.write_text(
        text.replace("<details", "<details open").replace("<script>", f"<script>{axe}</script><script>", 1)
    )
    script = "return (await view.axe.run(page)).violations.map(v => [v.id, ...v.nodes.map(n => n.html)]);"
    violations: Any = looked_at(judged, 1280, 800, script, tmp_path)[0]
    assert violations == []


def test_a_print_has_ten_pages_at_most(page: Path, tmp_path: Path) -> None:
    """What passed stays folded on paper."""
    pages = re.findall(rb"/Type\s*/Page\b", printed(page, tmp_path))
    assert 1 <= len(pages) <= 10
