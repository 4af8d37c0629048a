"""The gate: pure, independent of order, and never green beside anything missing, broken or unproven."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prill_harness.decide import gate
from prill_harness.decide.checklist import Checklist, Item
from prill_harness.decide.waivers import Conditions, Waiver
from prill_harness.faults.trial.forgotten import Forgotten
from prill_harness.faults.trial.kills import FaultTrial, Kills
from prill_harness.plan.plan import Plan
from prill_harness.plan.policy import Gate, Policy
from prill_harness.records.evidence import (
    Cell,
    CellEnded,
    CellStarted,
    CheckStarted,
    Evidence,
    Record,
    Status,
)
from prill_harness.records.verdict import (
    IncidentResult,
    ItemStatus,
    Severity,
    SpeedResult,
    StandingResult,
    Verdict,
)
from prill_runtime.errors import PolicyError

TODAY = dt.date(2026, 6, 1)
CHECKS = ("tokens.exact", "tokens.greedy")
CELLS = (Cell("llama", "numpy", "tokens"), Cell("gpt", "numpy", "tokens"))
ARCHITECTURES = {"llama": "llama", "gpt": "gpt2"}
# Both checks were seen to kill the fault they claim.
TRIAL = FaultTrial("", "head", "", ("logits",), "llama", ("logits",), CHECKS)
KILLS = Kills({"fault": TRIAL}, dict.fromkeys(CHECKS, "c" * 64))


def policy(**changes: object) -> Policy:
    base = Gate("demo", ("demo",), ("demo",), frozenset(), (), Severity.MEDIUM, 1, 0, 0)
    return Policy(Path("gates.toml"), "0" * 64, "demo", {"demo": msgspec.structs.replace(base, **changes)})


def item(id: str, *checks: str, severity: Severity = Severity.CRITICAL) -> Item:
    return Item(id, id.title(), "so", severity, checks)


def checklist(*items: Item, template: bool = False) -> Checklist:
    return Checklist("demo", "Demo", items, Path("demo.toml"), tuple(range(1, len(items) + 1)), template)


ALL = checklist(item("demo.exact", "tokens.exact"), item("demo.greedy", "tokens.greedy"))


def record(cell: Cell, check: str, status: Status = Status.PASSED, sentence: str = "seen") -> Evidence:
    return Evidence(check, "c" * 64, cell, status, 5, sentence, "numpy64", ("fault",), f"prill run {check}")


def started(cell: Cell, planned: tuple[str, ...] = CHECKS, **versions: str) -> CellStarted:
    facts = {"prill": "1", "model_sha256": cell.model, "architecture": ARCHITECTURES.get(cell.model, "")}
    return CellStarted(cell, planned, 0.0, facts | versions)


def whole(
    statuses: dict[tuple[str, str], tuple[Status, str]] | None = None, cells: tuple[Cell, ...] = CELLS
) -> list[Record]:
    """A complete run; `statuses` overrides (model, check)."""
    records: list[Record] = []
    for cell in cells:
        records.append(started(cell))
        for check in CHECKS:
            status, sentence = (statuses or {}).get((cell.model, check), (Status.PASSED, "seen"))
            records += [CheckStarted(cell, check, 0.0), record(cell, check, status, sentence)]
        records.append(CellEnded(cell, 0, 0.1, 1.0))
    return records


def decide(
    records: list[Record],
    *,
    lists: Checklist = ALL,
    waivers: tuple[Waiver, ...] = (),
    cells: tuple[Cell, ...] = CELLS,
    as_of: dt.date = TODAY,
    kills: Kills = KILLS,
    forgotten: Forgotten = gate.NOTHING,
    standings: Mapping[tuple[str, str], StandingResult] = gate.NO_HISTORY,
    incidents: tuple[IncidentResult, ...] = (),
    speeds: tuple[SpeedResult, ...] = (),
    there: tuple[str, ...] = (),
    **changes: object,
) -> Verdict:
    work = Plan("demo", cells)
    return gate.decide(
        policy(**changes),
        work,
        records,
        checklists=(lists,),
        kills=kills,
        waivers=waivers,
        as_of=as_of,
        forgotten=forgotten,
        standings=standings,
        incidents=incidents,
        speeds=speeds,
        documents=there,
    )


def waiver(**changes: object) -> Waiver:
    base = Waiver(
        id="W-1",
        item="demo.exact",
        conditions=Conditions("numpy", "cpu"),
        check="tokens.exact",
        signature="KL is above",
        owner="ada",
        issue="17",
        reason="known",
        created=dt.date(2026, 1, 1),
        expires=dt.date(2026, 12, 31),
    )
    return msgspec.structs.replace(base, **changes)


# The same items below critical, which is what a waiver may let through.
EXCUSABLE = checklist(
    item("demo.exact", "tokens.exact", severity=Severity.HIGH),
    item("demo.greedy", "tokens.greedy", severity=Severity.HIGH),
)
FAILURE = {("llama", "tokens.exact"): (Status.FAILED, "KL is above 1 at blk.0")}


def rules(found: Verdict) -> dict[str, Status]:
    return {r.id: r.status for r in found.rules if r.status is not Status.PASSED}


def test_a_complete_clean_run_passes() -> None:
    """Every cell complete and every item proven: passed, exit 0, with the counts in the sentence."""
    found = decide(whole())
    assert (found.status, found.exit_code, rules(found)) == (Status.PASSED, 0, {})
    assert found.sentence == "gate demo passed: 4 checks in 2 cells, 2 of 2 items proven"


def test_a_failure_is_told_with_item_cell_and_its_own_sentence() -> None:
    """The one line says which item, how severe, which check, where, and what was seen."""
    found = decide(whole(FAILURE))
    assert found.exit_code == 1
    assert found.sentence == (
        "gate demo failed: demo.exact (critical): tokens.exact failed in llama/numpy/tokens/cpu: "
        "KL is above 1 at blk.0"
    )


def test_the_worst_item_is_named_first() -> None:
    """A failed low item does not hide a failed critical one."""
    lists = checklist(
        item("a.low", "tokens.greedy", severity=Severity.LOW), item("z.critical", "tokens.exact")
    )
    failures = FAILURE | {("gpt", "tokens.greedy"): (Status.FAILED, "flip")}
    found = decide(whole(failures), lists=lists, blocks_at=Severity.LOW)
    assert "z.critical (critical)" in found.sentence
    assert "1 more item" in found.sentence


def test_severity_below_the_bar_does_not_block() -> None:
    """A failed low item leaves a medium gate open, and is still reported as failed."""
    lists = checklist(item("a.low", "tokens.exact", severity=Severity.LOW), item("b.high", "tokens.greedy"))
    found = decide(whole(FAILURE), lists=lists)
    assert found.status is Status.PASSED
    assert [i.status.value for i in found.items] == ["failed", "proven"]
    assert decide(whole(FAILURE), lists=lists, blocks_at=Severity.LOW).exit_code == 1


def test_a_failure_on_no_checklist_still_fails() -> None:
    """What no item counts cannot pass unseen."""
    found = decide(whole(FAILURE), lists=checklist(item("demo.greedy", "tokens.greedy")))
    assert found.exit_code == 1
    assert "tokens.exact (on no checklist) failed" in found.sentence


def drop(records: list[Record], *kinds: type, model: str = "gpt") -> list[Record]:
    return [r for r in records if not (isinstance(r, kinds) and r.cell.model == model)]


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([], "0 checks"),
        (drop(whole(), CellStarted, CheckStarted, Evidence, CellEnded), "left no ledger"),
        (drop(whole(), CellEnded), "did not finish"),
        (drop(whole(), Evidence), "left no evidence"),
        (drop(whole(), CellStarted), "left no ledger"),
        ([*whole(), record(CELLS[0], "tokens.extra")], "had not planned"),
        ([r for r in whole() if not (isinstance(r, Evidence) and r.check == CHECKS[1])], "left no evidence"),
        (whole({("gpt", "tokens.exact"): (Status.ERROR, "boom")}), "boom"),
        (whole({("gpt", "tokens.exact"): (Status.INCONCLUSIVE, "noisy")}), "noisy"),
    ],
)
def test_nothing_missing_or_broken_is_green(records: list[Record], told: str) -> None:
    """Lost cells, unfinished cells, lost or unplanned evidence, errors and doubts are inconclusive: 10."""
    found = decide(records)
    assert (found.status, found.exit_code) == (Status.INCONCLUSIVE, 10)
    assert any(told in rule.sentence for rule in found.rules)


def test_a_failure_outweighs_what_is_missing() -> None:
    """A missing cell beside a real failure is a failure: exit 1."""
    found = decide(drop(whole(FAILURE), CellStarted, CheckStarted, Evidence, CellEnded))
    assert found.exit_code == 1
    assert rules(found)["cells"] is Status.INCONCLUSIVE


def test_the_minimum_and_maxima_of_the_policy() -> None:
    """Too few executed or too many inconclusive break their own rules; within the limits they hold."""
    assert rules(decide(whole(), minimum_executed=5)) == {"executed": Status.INCONCLUSIVE}
    doubt = whole({("gpt", "tokens.exact"): (Status.INCONCLUSIVE, "noisy")})
    low = checklist(item("a", "tokens.exact", severity=Severity.LOW), item("b", "tokens.greedy"))
    assert rules(decide(doubt, lists=low)) == {"inconclusive": Status.INCONCLUSIVE}
    assert rules(decide(doubt, lists=low, max_inconclusive=1)) == {}


def test_contradicting_evidence_counts_as_the_worst_of_it() -> None:
    """A check that failed once and passed once has failed, and is flaky."""
    records = [*whole(), record(CELLS[0], "tokens.exact", Status.FAILED, "sometimes")]
    found = decide(records)
    assert found.exit_code == 1
    assert set(rules(found)) == {"items", "flaky"}


@pytest.mark.parametrize("changed", [{"prill": "2"}, {"model_sha256": "other"}])
def test_mixed_provenance_is_inconclusive(changed: dict[str, str]) -> None:
    """Cells of another prill, or of another file under the same model name, do not add up."""
    cells = (*CELLS, Cell("gpt", "numpy", "tokens", "cuda"))
    records = [
        started(r.cell, **changed) if isinstance(r, CellStarted) and r.cell == cells[2] else r
        for r in whole(cells=cells)
    ]
    assert rules(decide(whole(cells=cells), cells=cells)) == {}
    assert rules(decide(records, cells=cells)) == {"provenance": Status.INCONCLUSIVE}


def test_mixed_check_code_is_inconclusive() -> None:
    """Evidence made by two versions of one check does not add up."""
    changed = [
        msgspec.structs.replace(r, content="d" * 64) if isinstance(r, Evidence) and r.cell == CELLS[0] else r
        for r in whole()
    ]
    assert rules(decide(changed)) == dict.fromkeys(("provenance", "kills"), Status.INCONCLUSIVE)


@pytest.mark.parametrize("kills", [
    Kills(),
    msgspec.structs.replace(KILLS, checks={**KILLS.checks, "tokens.greedy": "d" * 64}),
    Kills({"another": TRIAL}, KILLS.checks),
    Kills({"fault": msgspec.structs.replace(TRIAL, killed_by=("tokens.exact",))}, KILLS.checks),
])  # fmt: skip
def test_a_required_check_without_a_current_kill_is_inconclusive(kills: Kills) -> None:
    """No kill, one of other code, or of a fault the check does not claim: the gate says which, and how."""
    found = decide(whole(), kills=kills)
    assert rules(found) == {"kills": Status.INCONCLUSIVE}
    assert found.exit_code == 10
    assert "was not seen to kill fault with its present code" in found.sentence
    assert "see it with `prill faults matrix --only fault`" in found.sentence


def test_a_check_on_no_checklist_needs_no_kill() -> None:
    """Only what is required has to have been seen to fail."""
    lists = checklist(item("demo.exact", "tokens.exact"))
    only = Kills({"fault": msgspec.structs.replace(TRIAL, killed_by=("tokens.exact",))}, KILLS.checks)
    assert rules(decide(whole(), lists=lists, kills=only)) == {}


def test_a_checklist_the_gate_names_must_be_given() -> None:
    """A gate without its checklist is an invalid policy, not an empty success."""
    with pytest.raises(PolicyError, match="names a checklist"):
        decide(whole(), checklists=("demo", "absent"))


# --- properties -----------------------------------------------------------------------------------------

STATUSES = st.sampled_from([Status.PASSED, Status.FAILED, Status.ERROR, Status.INCONCLUSIVE])
KEYS = [(cell.model, check) for cell in CELLS for check in CHECKS]
RUNS = st.tuples(*[STATUSES for _ in KEYS]).map(
    lambda s: whole({k: (status, f"KL is above {status}") for k, status in zip(KEYS, s, strict=True)})
)


@settings(max_examples=60, deadline=None)
@given(RUNS, st.randoms(use_true_random=False), st.integers(1, 3))
def test_order_and_repetition_change_no_byte(records: list[Record], random: object, times: int) -> None:
    """The same records in any order, any number of times, give the same verdict byte for byte."""
    shuffled = records * times
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = decide(records, waivers=(waiver(),)), decide(shuffled, waivers=(waiver(),))
    assert msgspec.json.encode(one) == msgspec.json.encode(other)


@settings(max_examples=100, deadline=None)
@given(RUNS, st.data())
def test_a_verdict_with_anything_missing_never_passes(records: list[Record], data: st.DataObject) -> None:
    """Without any one start, end or evidence of a planned cell the verdict is not passed."""
    droppable = [r for r in records if not isinstance(r, CheckStarted)]
    lost = data.draw(st.sampled_from(droppable))
    found = decide([r for r in records if r is not lost], waivers=(waiver(),))
    assert found.status is not Status.PASSED
    assert found.exit_code in (1, 10)


@settings(max_examples=100, deadline=None)
@given(RUNS)
def test_waivers_turn_nothing_but_failures(records: list[Record]) -> None:
    """A waiver that matches every sentence leaves errors and doubts what they are, and the gate not green; a
    gate opens on waived failures only where some item is proven, and none of the waived is critical."""
    waivers = tuple(
        waiver(id=f"W-{n}", item=f"demo.{name}", check=f"tokens.{name}", signature="KL is above")
        for n, name in enumerate(("exact", "greedy"))
    )
    found = decide(records, lists=EXCUSABLE, waivers=waivers)
    before = {(r.cell, r.check): r.status for r in records if isinstance(r, Evidence)}
    for check in found.checks:
        status = before[check.cell, check.check]
        assert check.status is (Status.WAIVED if status is Status.FAILED else status)
    broken = {Status.ERROR, Status.INCONCLUSIVE} & set(before.values())
    proven = any(item.status is ItemStatus.PROVEN for item in found.items)
    assert (found.status is Status.PASSED) == (not broken and proven)
    green = decide(records, waivers=waivers).status is Status.PASSED
    assert green == (set(before.values()) == {Status.PASSED})


@settings(max_examples=100, deadline=None)
@given(RUNS)
def test_green_means_that_everything_passed(records: list[Record]) -> None:
    """Without waivers the gate passes exactly when every record passed, and fails when any failed."""
    found, seen = decide(records), {r.status for r in records if isinstance(r, Evidence)}
    assert (found.exit_code == 0) == (seen == {Status.PASSED})
    assert (found.exit_code == 1) == (Status.FAILED in seen)


def test_what_files_leave_open_is_in_the_verdict() -> None:
    """Each assumption once, with the models it was made of, whatever the order of the records."""
    records = whole()
    pre, bos = ("pre", "default", "none is named"), ("add_bos_token", "true", "the file does not say")
    open_ = {"llama": (bos,), "gpt": (pre, bos)}
    told: list[Record] = [
        msgspec.structs.replace(r, assumptions=open_[r.cell.model]) if isinstance(r, CellStarted) else r
        for r in records
    ]
    found = decide(told).assumptions
    assert [(a.key, a.assumed, a.why, a.models) for a in found] == [
        (*bos, ("gpt", "llama")),
        (*pre, ("gpt",)),
    ]
    assert decide(told[::-1]).assumptions == found
    assert decide(records).assumptions == ()
