"""The commands that look into what a gate left: badge, and every format of a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lxml import etree

from prill_harness.commands.shared import reporters
from prill_harness.commands.shared.verdicts import decided

from .commandline import invoke
from .sample import laid


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return laid(tmp_path_factory.mktemp("judged"))


@pytest.mark.parametrize("form", sorted(reporters.installed()))
def test_report_prints_what_the_format_renders(judged: Path, form: str) -> None:
    """Of every installed format, by its name."""
    result = invoke("report", "--ledger", str(judged), "--format", form)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == reporters.render(form, decided(judged), reporters.beside(judged.parent))


def test_badge_draws_the_verdict(judged: Path, tmp_path: Path) -> None:
    """A picture on stdout, an endpoint into a file; both say that the gate failed and by which rule."""
    drawn = etree.fromstring(invoke("badge", "--ledger", str(judged)).stdout.encode())
    assert drawn.get("aria-label") == "prill architectures: failed: critical-items"
    target = tmp_path / "badge.json"
    result = invoke("badge", "--ledger", str(judged), "--shields", "-o", str(target))
    assert (result.exit_code, result.stdout) == (0, "")
    assert json.loads(target.read_text())["message"] == "failed: critical-items"


def test_badge_refuses_what_was_altered(judged: Path, tmp_path: Path) -> None:
    """A verdict turned green by hand is no badge but exit 4, in one sentence."""
    altered = (
        (judged.with_name("verdict.json")).read_text().replace('"status":"failed"', '"status":"passed"', 1)
    )
    (tmp_path / "verdict.json").write_text(altered)
    result = invoke("badge", "--ledger", str(judged), "--verdict", str(tmp_path / "verdict.json"))
    assert (result.exit_code, result.stdout) == (4, "")
    assert "the verdict was altered after the gate wrote it" in result.stderr
    assert invoke("badge", "--ledger", str(tmp_path / "nosuch.jsonl")).exit_code == 4
