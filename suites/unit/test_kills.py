"""The kill matrix as data: what it says of a check, how matrices join, and what is committed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prill_harness.faults.catalogue import catalogue
from prill_harness.faults.trial import kills as matrix
from prill_harness.faults.trial import page
from prill_harness.faults.trial.kills import Clean, FaultTrial, Kills
from prill_harness.faults.trial.matrix import claims
from prill_harness.records.catalog import check_ids, packaged
from prill_harness.run.checks import content_hash
from prill_runtime.errors import PolicyError

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = matrix.load()


def trial(*killed_by: str, blamed: str = "act", source: str = "s") -> FaultTrial:
    return FaultTrial(source, "feed-forward", "is wrong", ("act",), "m", (blamed,), killed_by)


SEEN = Kills({"bug": trial("ops.a")}, {"ops.a": "1", "ops.b": "2"})


@pytest.mark.parametrize(
    ("check", "contents", "claimed", "current"),
    [
        ("ops.a", {"1"}, {"bug"}, True),
        ("ops.a", {"1"}, {"bug", "other"}, False),
        ("ops.a", {"9"}, {"bug"}, False),
        ("ops.a", {"1", "9"}, {"bug"}, False),
        ("ops.a", set(), {"bug"}, False),
        ("ops.a", {"1"}, {"other"}, False),
        ("ops.a", {"1"}, set(), False),
        ("ops.b", {"2"}, {"bug"}, False),
        ("ops.c", {"1"}, {"bug"}, False),
    ],
)
def test_a_check_is_current_with_this_code_and_all_its_claims(
    check: str, contents: set[str], claimed: set[str], current: bool
) -> None:
    """Another code, one claim of two, an unclaimed fault, no hash at all: not seen."""
    assert SEEN.current(check, contents, claimed) is current


def test_nothing_is_current_in_an_empty_matrix() -> None:
    """Without a matrix nothing counts as seen."""
    assert not Kills().current("ops.a", set(), set())
    assert not Kills().current("ops.a", {"1"}, {"bug"})


def test_merging_forgets_what_older_code_killed() -> None:
    """A part that was run again replaces itself; a check whose code changed loses its other kills."""
    old = Kills({"a": trial("ops.a", "ops.b"), "b": trial("ops.a", "ops.b")}, {"ops.a": "1", "ops.b": "2"})
    made = matrix.merge(old, Kills({"b": trial("ops.a")}, {"ops.a": "changed"}))
    assert made.faults == {"a": trial("ops.b"), "b": trial("ops.a")}
    assert made.checks == {"ops.a": "changed", "ops.b": "2"}
    assert matrix.merge(old, old) == old


def test_merging_keeps_clean_runs_unless_there_are_newer_ones() -> None:
    """A part without clean runs leaves the figures alone."""
    old, new = Clean(200, 0, {"m": 0.5}, 9, 0), Clean(14, 1, {"m": 2.0}, 9, 0)
    assert matrix.merge(Kills(clean=old), Kills()).clean == old
    assert matrix.merge(Kills(clean=old), Kills(clean=new)).clean == new


def test_a_fault_whose_code_changed_is_dropped() -> None:
    """A kill of what the fault used to be says nothing of what it is."""
    known = catalogue()
    name = next(iter(known))
    source = matrix.digest(known[name])
    kept = Kills({name: trial("ops.a", source=source), "gone": trial("ops.a")})
    assert set(matrix.fresh(kept, known).faults) == {name}
    assert not matrix.fresh(Kills({name: trial("ops.a", source="old")}), known).faults


def test_a_helper_counts_in_the_digest_of_its_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fault only calls, and the constants it reads, make it what it is; other faults stay the same."""
    from prill_harness.faults.planted.serving import sampler

    known = catalogue()
    asked = ("seed_reused", "penalty_forgets", "topk_off_by_one")
    before = {name: matrix.digest(known[name]) for name in asked}

    def other_numbers(changed: Callable[..., Any]) -> Any:
        """Does nothing."""
        return changed

    monkeypatch.setattr(other_numbers, "__module__", sampler.__name__)
    monkeypatch.setattr(sampler, "other_numbers", other_numbers)
    monkeypatch.setattr(sampler, "LAST", 65)
    changed = [name for name in asked if matrix.digest(known[name]) != before[name]]
    assert changed == ["seed_reused", "penalty_forgets"]


@given(st.permutations(["c", "a", "b"]))
def test_the_file_does_not_depend_on_the_order_of_the_runs(order: list[str]) -> None:
    """The same matrix gives the same bytes."""

    def made(names: list[str]) -> Kills:
        worst = dict.fromkeys(names, 0.1)
        return Kills({n: trial("x") for n in names}, dict.fromkeys(names, "h"), Clean(3, 0, worst))

    assert matrix.encode(made(order)) == matrix.encode(made(["a", "b", "c"]))


def test_a_written_matrix_reads_back(tmp_path: Path) -> None:
    """Round trip; without a file beside the suites the matrix is empty."""
    (tmp_path / "kills.json").write_text(matrix.encode(SEEN))
    assert matrix.load(tmp_path / "kills.json") == matrix.load(folder=tmp_path) == SEEN
    assert matrix.load(folder=tmp_path / "absent") == Kills()


@pytest.mark.parametrize("text", [None, "", "[]", "{", '{"faults": {}, "unknown": 1}'])
def test_a_matrix_that_cannot_be_read_is_refused(text: str | None, tmp_path: Path) -> None:
    """A named file that is missing, torn or of another schema is one sentence, never an empty matrix."""
    file = tmp_path / "kills.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(PolicyError, match="kill matrix"):
        matrix.load(file)


def test_the_page_says_who_survives_and_who_is_blamed_wrongly() -> None:
    """Nothing that went wrong is rendered like what went right."""
    made = Kills(
        {"dead": trial("ops.a"), "alive": trial(), "other": trial("ops.a", blamed="embed")},
        {"ops.a": "1", "ops.b": "2"},
    )
    lines = {
        line.split("|")[1].strip(): line for line in page.render(made).splitlines() if line.startswith("| `")
    }
    assert "3 faults: 2 killed, 1 of them blamed rightly" in page.render(made)
    assert "survives" not in lines["`dead`"]
    assert "wrongly" not in lines["`dead`"]
    assert "**survives**" in lines["`alive`"]
    assert "**wrongly**" in lines["`other`"]
    assert "**nothing**" in lines["`ops.b`"]
    assert "`dead`" in lines["`ops.a`"]


# --- what is committed ------------------------------------------------------------------------------------


def functions() -> dict[str, tuple[Callable[..., object], dict[str, Any]]]:
    """Every check's function and marker, by id."""
    return {
        mark.kwargs["name"]: (function, mark.kwargs)
        for file in {file for file, _ in check_ids().values()}
        for function in vars(importlib.import_module(f"prill_suites.{file.stem}")).values()
        for mark in getattr(function, "pytestmark", [])
        if mark.name == "prill_check"
    }


CHECKS = functions()


def test_the_page_is_the_rendering_of_the_data() -> None:
    """docs/FAULTS.md is what the committed matrix says, byte for byte."""
    assert (ROOT / "docs" / "FAULTS.md").read_text("utf-8") == page.render(COMMITTED)
    assert (packaged() / "kills.json").read_text("utf-8") == matrix.encode(COMMITTED)


def test_every_fault_is_in_the_matrix() -> None:
    """At least sixty faults, and the matrix holds exactly the catalogue's."""
    assert set(COMMITTED.faults) == set(catalogue())
    assert len(COMMITTED.faults) >= 60


@pytest.mark.parametrize("name", catalogue())
def test_a_fault_is_killed_and_blamed_rightly(name: str) -> None:
    """As it is now, the fault was killed, and what it breaks was blamed."""
    fault, seen = catalogue()[name], COMMITTED.faults[name]
    assert seen.source == matrix.digest(fault), f"{name} changed: {matrix.remedy([name])}"
    assert (seen.area, seen.blames, seen.summary) == (fault.area, fault.blames, fault.summary)
    assert seen.killed_by
    assert seen.right, f"{name} is blamed on {seen.blamed}"


def test_claims_name_faults_that_exist() -> None:
    """A check cannot claim a fault that nobody can plant."""
    unknown = {(c, f) for c, (_, m) in CHECKS.items() for f in m["kills"] if f not in catalogue()}
    assert not unknown


def test_claims_are_read_from_the_text_as_they_are() -> None:
    """What the matrix plans by, without importing a suite, is what the markers say."""
    assert claims() == {check: marker["kills"] for check, (_, marker) in CHECKS.items()}


@pytest.mark.parametrize("check", sorted(CHECKS))
def test_a_check_was_seen_to_kill_with_its_present_code(check: str) -> None:
    """Every shipped check killed every fault that it claims; after a change, run the matrix again."""
    function, marker = CHECKS[check]
    assert COMMITTED.current(check, {content_hash(function)}, marker["kills"]), matrix.remedy(marker["kills"])


def test_clean_engines_never_alarm() -> None:
    """No alarm in at least two hundred clean runs, nor in the suites on clean engines."""
    clean = COMMITTED.clean
    assert clean.runs >= 200
    assert (clean.alarms, clean.suite_alarms) == (0, 0)
    assert clean.checks > 0
    assert max(clean.worst.values()) < 1
