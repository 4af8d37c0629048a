"""What an engine says that it lacks holds no gate shut where the policy allows it, and is told everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from prill_harness.plan.policy import load_policy
from prill_harness.records.catalog import packaged
from prill_harness.records.evidence import Evidence, Record, Status
from prill_harness.records.verdict import ItemStatus, Severity, Verdict
from prill_reports.formats import ctrf, html, in_toto, junit, markdown, sarif
from prill_runtime.errors import PolicyError

from .test_gate import CELLS, checklist, decide, item, whole
from .test_plugin import run as suite_run
from .test_policy import SOUND, write
from .test_rules import broken

BATCH = frozenset({"batch"})
SAID = "missing capability: engine numpy does not offer batch"
BOTH = checklist(item("demo.repeatable", "tokens.exact", "tokens.greedy"))


def run(*lacks: str, check: str = "tokens.greedy", sentence: str = SAID) -> list[Record]:
    """A whole run in which one check saw nothing in either cell, for lack of this."""
    return [
        msgspec.structs.replace(
            each, status=Status.INCONCLUSIVE, observed=0, sentence=sentence, lacks=lacks, kills=each.kills
        )
        if isinstance(each, Evidence) and each.check == check
        else each
        for each in whole()
    ]


def test_a_lack_that_the_policy_allows_is_counted_and_told() -> None:
    """The gate is green, the item names the check that was not asked, and the verdict says what is lacking;
    the record itself stays inconclusive, and counts as executed nowhere."""
    found = decide(run("batch"), lists=BOTH, may_lack=BATCH)
    assert (found.exit_code, broken(found)) == (0, [])
    assert found.sentence == (
        "gate demo passed: 2 checks in 2 cells, 1 of 1 items proven, 2 not asked of engines that lack batch"
    )
    (only,) = found.items
    assert only.sentence == "2 checks passed in 2 cells; lacking: tokens.greedy"
    assert found.counts["lacking"] == found.counts["inconclusive"] == found.counts["passed"] == 2
    assert {c.lacking for c in found.checks if c.check == "tokens.greedy"} == {("batch",)}
    assert [c.executed for c in found.cells] == [1, 1]
    few = decide(run("batch"), lists=BOTH, may_lack=BATCH, minimum_executed=3)
    assert broken(few) == ["executed"]


@pytest.mark.parametrize(
    ("lacks", "may_lack"),
    [
        ((), BATCH),  # nothing was declared: it could not be observed
        (("batch",), frozenset()),
        (("batch", "trace"), BATCH),
        (("trace",), BATCH),
    ],
)
def test_what_the_policy_does_not_allow_keeps_the_gate_shut(
    lacks: tuple[str, ...], may_lack: frozenset[str]
) -> None:
    """A check that saw nothing without a declared lack, or for lack of something else, blocks as ever."""
    lists = checklist(*BOTH.items, item("demo.exact", "tokens.exact"))
    found = decide(run(*lacks), lists=lists, may_lack=may_lack)
    assert found.exit_code == 10
    assert broken(found) == ["items", "inconclusive"]
    assert (found.counts["lacking"], found.counts["inconclusive"]) == (0, 2)


def test_nothing_is_proven_by_lacks() -> None:
    """An item that counts nothing else in a cell stays unproven there, though another cell proves it."""
    alone = checklist(item("demo.greedy", "tokens.greedy"), item("demo.exact", "tokens.exact"))
    found = decide(run("batch"), lists=alone, may_lack=BATCH)
    assert [i.status for i in found.items] == [ItemStatus.UNPROVEN, ItemStatus.PROVEN]
    assert broken(found) == ["items"]
    half = [r for r in run("batch") if r.cell == CELLS[0]] + [r for r in whole() if r.cell == CELLS[1]]
    found = decide(half, lists=alone, may_lack=BATCH)
    assert [i.status for i in found.items] == [ItemStatus.UNPROVEN, ItemStatus.PROVEN]


def test_a_finding_beside_a_lack_is_one() -> None:
    """The item of which a check is lacking fails by its other check."""
    records = [
        msgspec.structs.replace(r, status=Status.FAILED, sentence="KL is above 1")
        if isinstance(r, Evidence) and r.check == "tokens.exact"
        else r
        for r in run("batch")
    ]
    assert decide(records, lists=BOTH, may_lack=BATCH).exit_code == 1


@pytest.mark.parametrize("status", [Status.PASSED, Status.FAILED, Status.ERROR])
def test_no_other_record_lacks_anything(status: Status) -> None:
    """A record that says both cannot be made, and none that observed something lacked what it needs."""
    sound = next(r for r in whole() if isinstance(r, Evidence))
    with pytest.raises(ValueError, match="cannot have lacked batch"):
        msgspec.structs.replace(sound, status=status, observed=0 if status is not Status.PASSED else 5,
                                lacks=("batch",))  # fmt: skip
    with pytest.raises(ValueError, match="cannot have lacked batch"):
        msgspec.structs.replace(sound, status=Status.INCONCLUSIVE, lacks=("batch",))


def test_a_policy_names_what_may_be_lacking(tmp_path: Path) -> None:
    """A gate has its parent's lacks until it names its own; a capability that is none is one sentence. Of the
    packaged gates those that ask the contract let an engine lack one thing: requests at one time."""
    text = SOUND.replace("max_flaky = 2", 'max_flaky = 2\nmay_lack = ["batch"]')
    assert load_policy(write(tmp_path, text)).gate("child").may_lack == BATCH
    other = text.replace("max_inconclusive = 1", "max_inconclusive = 1\nmay_lack = []")
    policy = load_policy(write(tmp_path, other))
    assert (policy.gate("child").may_lack, policy.gate("parent").may_lack) == (frozenset(), BATCH)
    with pytest.raises(PolicyError, match=r"may_lack`: no such capability of an engine.*'bach'"):
        load_policy(write(tmp_path, text.replace('"batch"', '"bach"')))
    gates = load_policy(packaged() / "gates.toml").gates
    assert {gate.may_lack for gate in gates.values()} == {frozenset(), BATCH}
    lenient = {name for name, gate in gates.items() if gate.may_lack}
    assert lenient == {name for name, gate in gates.items() if "contract" in gate.checklists}


def test_every_report_tells_it() -> None:
    """Markdown and HTML have a table of what was not asked and no finding of it; JUnit skips it."""
    low = checklist(item("demo.repeatable", "tokens.exact", "tokens.greedy", severity=Severity.LOW))
    shown = {
        allowed: decide(run("batch"), lists=low, may_lack=BATCH if allowed else frozenset())
        for allowed in (True, False)
    }
    heading = "## Not asked: 2 checks"
    assert told(shown[True], heading) == told(shown[True], SAID) == (True, True)
    assert told(shown[False], heading) == (False, False)
    assert "What did not pass" not in markdown.render(shown[True], options={})
    xml = {allowed: junit.render(verdict, options={}) for allowed, verdict in shown.items()}
    assert xml[True].count("<skipped") == xml[True].count('type="prill.lacking"') == 2
    assert xml[False].count("<skipped") == 0
    assert "<error" in xml[False]
    assert "<error" not in xml[True]
    skipped = {allowed: ctrf.render(verdict, options={}) for allowed, verdict in shown.items()}
    assert [skipped[allowed].count('"status": "skipped"') for allowed in (True, False)] == [2, 0]
    assert [sarif.render(shown[allowed], options={}).count('"ruleId"') for allowed in (True, False)] == [0, 2]
    said = {allowed: json.loads(in_toto.render(each, options={})) for allowed, each in shown.items()}
    found = {allowed: each["predicate"] for allowed, each in said.items()}
    assert [found[allowed]["result"] for allowed in (True, False)] == ["WARNED", "FAILED"]
    assert [len(found[allowed]["warnedTests"]) for allowed in (True, False)] == [2, 0]


def told(verdict: Verdict, text: str) -> tuple[bool, bool]:
    """Whether the Markdown and the HTML of a verdict say so."""
    page = html.render(verdict, options={})
    plain = text.removeprefix("## ").split(":")[0] if text.startswith("##") else text
    return text in markdown.render(verdict, options={}), plain in page


SUITE = """
import pytest
from types import SimpleNamespace
from prill_harness.run.checks import check
from prill_harness.engines.base import Capability
from prill_runtime.errors import MissingCapability

@pytest.fixture(scope="session")
def engine():
    return SimpleNamespace(info=SimpleNamespace(name="fake", capabilities=frozenset({Capability.LOGITS})))

@pytest.fixture
def broken_end():
    yield
    raise OSError("disk full")

@check("demo.declared", kills=("rope_pairing",), needs=(Capability.LOGITS, Capability.BATCH))
def test_declared(observe):
    observe.saw(1, oracle="numpy64")

@check("demo.met_later", kills=("rope_pairing",))
def test_met_later(observe):
    raise MissingCapability("engine fake does not take stop")

@check("demo.broken_as_well", kills=("rope_pairing",), needs=(Capability.BATCH,))
def test_broken_as_well(observe, broken_end):
    observe.saw(1, oracle="numpy64")
"""


def test_a_lack_is_recorded_where_the_engine_declared_it(tmp_path: Path) -> None:
    """What a check needs and the engine says that it has not is named; not what turns out to be missing in
    the middle of a check, nor where anything else went wrong."""
    code, records, _ = suite_run(tmp_path, SUITE)
    found = {r.check: (r.status, r.lacks) for r in records if isinstance(r, Evidence)}
    assert found == {
        "demo.declared": (Status.INCONCLUSIVE, ("batch",)),
        "demo.met_later": (Status.INCONCLUSIVE, ()),
        "demo.broken_as_well": (Status.INCONCLUSIVE, ()),
    }
    assert code == 10
