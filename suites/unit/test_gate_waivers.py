"""Waivers at the gate: what one covers, what it never does, and that it proves nothing."""

from __future__ import annotations

import datetime as dt

import pytest

from prill_harness.decide.waivers import Conditions
from prill_harness.records.evidence import Status

from .test_gate import (
    CELLS,
    CHECKS,
    EXCUSABLE,
    FAILURE,
    checklist,
    decide,
    item,
    record,
    rules,
    waiver,
    whole,
)


def test_a_waiver_covers_its_failure_alone() -> None:
    """The named failure is waived and counted; the gate passes and says which waiver was used, and that the
    item is not proven."""
    found = decide(whole(FAILURE), lists=EXCUSABLE, waivers=(waiver(),))
    assert found.exit_code == 0
    assert found.sentence == (
        "gate demo passed: 3 checks in 2 cells, 1 of 2 items proven, 1 waived and not proven"
    )
    assert found.counts["waived"] == 1
    assert [i.status.value for i in found.items] == ["waived", "proven"]
    assert found.items[0].waivers == ("W-1",)
    assert [(w.state, w.days_left) for w in found.waivers] == [("used", 213)]


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"signature": "another failure"}, "unused"),
        ({"conditions": Conditions("cuda", "cpu")}, "unused"),
        ({"conditions": Conditions("numpy", "gpu")}, "unused"),
        ({"conditions": Conditions("numpy", "cpu", "gpt")}, "unused"),
        ({"check": "tokens.greedy"}, "unused"),
        ({"item": "demo.greedy"}, "unused"),
        ({"expires": dt.date(2026, 5, 31)}, "expired"),
        ({"created": dt.date(2026, 6, 2)}, "refused"),
    ],
)
def test_a_waiver_covers_nothing_else(changes: dict[str, object], state: str) -> None:
    """Another signature, engine, device, model, check, item or day: the failure fails."""
    found = decide(whole(FAILURE), waivers=(waiver(**changes),))
    assert found.exit_code == 1
    assert [w.state for w in found.waivers] == [state]


def test_the_last_day_of_a_waiver_is_its_expiry() -> None:
    """A waiver holds on the day it expires and not on the next, whatever today is."""
    day = dt.date(2026, 12, 31)
    for today, code in ((day, 0), (day + dt.timedelta(1), 1)):
        assert decide(whole(FAILURE), lists=EXCUSABLE, waivers=(waiver(),), as_of=today).exit_code == code


def test_a_waived_critical_item_holds_the_gate_shut() -> None:
    """A waiver turns its failure into no failure and into no proof: inconclusive, whatever else is proven."""
    found = decide(whole(FAILURE), waivers=(waiver(),))
    assert (found.status, found.exit_code) == (Status.INCONCLUSIVE, 10)
    assert rules(found) == {"items": Status.INCONCLUSIVE}
    assert "demo.exact (critical) is waived, which proves nothing" in found.sentence
    assert found.counts["waived"] == 1


def test_everything_failed_and_everything_waived_is_not_green() -> None:
    """Nothing but waived failures proves nothing and executed nothing, even where nothing is critical."""
    failed = {(cell.model, check): (Status.FAILED, "KL is above 1") for cell in CELLS for check in CHECKS}
    waivers = tuple(
        waiver(id=f"W-{name}", item=f"demo.{name}", check=f"tokens.{name}") for name in ("exact", "greedy")
    )
    found = decide(whole(failed), lists=EXCUSABLE, waivers=waivers)
    assert found.exit_code == 10
    assert rules(found) == dict.fromkeys(("proof", "executed"), Status.INCONCLUSIVE)
    assert "none of 2 items is proven" in found.sentence


def test_a_record_cannot_waive_itself() -> None:
    """Waived is what a gate makes of a failure; a record that says it of itself is none."""
    with pytest.raises(ValueError, match="cannot be waived by its own record"):
        record(CELLS[0], "tokens.exact", Status.WAIVED)


def test_an_item_on_the_never_list_cannot_be_waived() -> None:
    """A waiver of such an item is refused, and refusing it is a rule of its own."""
    found = decide(whole(FAILURE), waivers=(waiver(),), never_waive=frozenset({"demo.exact"}))
    assert found.exit_code == 1
    assert set(rules(found)) == {"items", "waivers"}


def test_a_check_is_waived_only_for_the_item_that_the_waiver_names() -> None:
    """Two items count one check; a waiver for one leaves the other failed."""
    lists = checklist(item("demo.exact", "tokens.exact"), item("demo.other", "tokens.exact"))
    found = decide(whole(FAILURE), lists=lists, waivers=(waiver(),))
    assert (found.exit_code, found.counts["waived"]) == (1, 0)
    assert [i.status.value for i in found.items] == ["waived", "failed"]
