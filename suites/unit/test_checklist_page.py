"""docs/INTEGRATION_CHECKLIST.md: current, whole, and every command on it proves what it stands beside."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from prill_harness.commands.gates.run import selected
from prill_harness.decide.checklist import Item, load_checklists
from prill_harness.decide.checklist_page import proof, render
from prill_harness.decide.explained import observes
from prill_harness.decide.templates import of_models, shown_id
from prill_harness.engines.features import having, traits

from .commandline import invoke

PAGE = Path(__file__).resolve().parents[2] / "docs" / "INTEGRATION_CHECKLIST.md"
LISTED = [(checklist, item) for checklist in load_checklists() for item in checklist.items]
ITEMS = [item for _, item in LISTED]


def test_the_page_is_current(tmp_path: Path) -> None:
    """What the command writes is what is committed; else write it again with `prill checklist --docs`."""
    target = tmp_path / "page.md"
    assert invoke("checklist", "--docs", str(target)).exit_code == 0
    assert target.read_text("utf-8") == PAGE.read_text("utf-8")


def test_every_item_is_explained_once() -> None:
    """Its title, its reason, its models, and each of its checks beside what that observes."""
    sections = PAGE.read_text("utf-8").split("\n### ")[1:]
    assert len(sections) == len(ITEMS)
    for checklist, item in LISTED:
        (mine,) = [s for s in sections if f"`{shown_id(checklist, item)}`" in s]
        assert of_models(item) in mine
        assert mine.startswith(item.title)
        assert f"**{item.severity}**" in mine
        assert item.why in mine
        for check in item.checks:
            assert f"- `{check}`: {observes(check)}" in mine
            assert observes(check)


@pytest.mark.parametrize("item", [item for item in ITEMS if item.checks], ids=lambda item: item.id)
def test_a_command_runs_the_checks_of_its_item(item: Item) -> None:
    """`prill run` knows every word of it, runs these checks and no others, on a model that it speaks of."""
    prill, run, option, model, *names = shlex.split(proof(item))
    assert (prill, run, option) == ("prill", "run", "--model")
    assert selected(names)[1] == item.checks
    assert f"Prove it: `{proof(item)}`" in PAGE.read_text("utf-8")
    if model == "MODEL":  # for whoever has one
        assert having(item.needs, item.lacks) is None
    else:
        assert traits(model).suits(item.needs, item.lacks)


def test_a_change_of_a_list_changes_the_page() -> None:
    """The page is made of the lists: without an item it is another page."""
    first, *others = load_checklists()
    import msgspec

    shorter = msgspec.structs.replace(first, items=first.items[1:])
    assert render([shorter, *others]) != render([first, *others])
