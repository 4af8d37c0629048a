"""What a matrix owes: kills and amounts that are on record, until a line gives a reason."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prill_harness.faults.catalogue import known
from prill_harness.faults.trial import forgotten
from prill_harness.faults.trial import kills as matrix
from prill_harness.faults.trial.forgotten import Amount, Forgotten, Kill
from prill_harness.faults.trial.kills import FaultTrial, Kills
from prill_harness.records.catalog import check_ids
from prill_harness.records.evidence import Cell, Evidence, Status
from prill_reports.formats import html, markdown
from prill_runtime.errors import KillsError

from .test_gate import decide, whole

NAMES, CHECKS, CELLS = ("one", "two", "three"), ("ops.a", "ops.b", "ops.c"), ("x/numpy", "y/numpy")
NONE = Forgotten()


def trial(killed_by: set[str]) -> FaultTrial:
    return FaultTrial("s", "norm", "is wrong", ("act",), "m", ("act",), tuple(sorted(killed_by)))


def drawn() -> st.SearchStrategy[Kills]:
    killed = st.dictionaries(st.sampled_from(NAMES), st.sets(st.sampled_from(CHECKS)).map(trial))
    counts = st.dictionaries(st.sampled_from(CHECKS), st.integers(1, 1000))
    observed = st.dictionaries(st.sampled_from(CELLS), counts)
    return st.builds(Kills, faults=killed, observed=observed)


@given(drawn(), drawn())
def test_nothing_on_record_is_lost(old: Kills, new: Kills) -> None:
    """Whatever a new matrix did not see, the kept one still owes; what it saw, it owes no longer."""
    kept = forgotten.kept(old, new, NONE)
    assert kept.pairs == old.pairs | new.pairs
    assert not {(name, c) for name, checks in kept.owed.items() for c in checks} & new.pairs
    assert forgotten.kept(old, kept, NONE).pairs == kept.pairs
    for cell, checks in old.observed.items():
        for check, values in checks.items():
            assert kept.observed[cell][check] >= values
    assert forgotten.kept(kept, kept, NONE) == kept


@given(drawn(), drawn())
def test_a_line_for_each_loss_settles_all(old: Kills, new: Kills) -> None:
    """With a reason for every lost kill and every smaller amount nothing is owed, and nothing has fallen."""
    lost = forgotten.kept(old, new, NONE)
    kills = tuple(Kill(name, c, "so") for name, checks in lost.owed.items() for c in checks)
    fell = forgotten.fallen(lost.observed, new.observed, absent=True)
    lines = Forgotten(kills, tuple(Amount(f.cell, f.check, f.seen, "so") for f in fell))
    kept = forgotten.kept(old, new, lines)
    assert not kept.owed
    assert not forgotten.fallen(kept.observed, new.observed, absent=True)
    assert bool(fell) == bool(lines.observed)


def test_a_fall_below_nine_tenths_is_told() -> None:
    """89 of 100 is a fall, 90 is none; a check that was not run is one where its cell was."""
    recorded = {"x/numpy": {"ops.a": 100, "ops.b": 100}, "y/numpy": {"ops.a": 100}}
    assert not forgotten.fallen(recorded, {"x/numpy": {"ops.a": 90, "ops.b": 200}}, absent=True)
    (fall,) = forgotten.fallen(recorded, {"x/numpy": {"ops.a": 89}})
    assert (fall.check, fall.seen, fall.recorded) == ("ops.a", 89, 100)
    assert "observed 89 values in x/numpy, less than 90% of the 100 on record" in fall.sentence
    told = forgotten.fallen(recorded, {"x/numpy": {"ops.a": 100}}, absent=True)
    assert [(f.check, f.seen) for f in told] == [("ops.b", 0)]


def test_many_small_falls_are_one() -> None:
    """The largest amount stays on record, so that 95 % of 95 % is held against what was first seen."""
    first = Kills(observed={"x/numpy": {"ops.a": 100}})
    second = forgotten.kept(first, Kills(observed={"x/numpy": {"ops.a": 95}}), NONE)
    assert second.observed["x/numpy"]["ops.a"] == 100
    assert forgotten.fallen(second.observed, {"x/numpy": {"ops.a": 89}})


def test_only_passes_of_clean_engines_on_packaged_models_are_recorded() -> None:
    """A user's model has no record, a faulty engine's amounts are not held against anybody."""

    def seen(model: str, engine: str, status: Status = Status.PASSED) -> Evidence:
        cell = Cell(model, engine, "ops")
        return Evidence("ops.a[q8_0]", "", cell, status, 7, "seen", "o", ("x",), "")

    records = [
        seen("fixture:llama-tiny", "numpy"), seen("my-model", "numpy"),
        seen("fixture:llama-tiny", "numpy+fault:x"), seen("fixture:gpt2-tiny", "numpy", Status.FAILED),
    ]  # fmt: skip
    assert forgotten.amounts(records) == {"fixture:llama-tiny/numpy/ops/cpu": {"ops.a[q8_0]": 7}}


def test_a_gate_lets_off_what_a_line_names_and_nothing_else() -> None:
    """Of two owed kills and two amounts the lines take one each."""
    kills = Kills(owed={"one": ("ops.a", "ops.b")}, observed={"x/numpy": {"ops.a": 100, "ops.b": 100}})
    lines = Forgotten((Kill("one", "ops.a", "so"),), (Amount("x/numpy", "ops.b", 50, "so"),))
    left = forgotten.excused(kills, lines)
    assert left.owed == {"one": ("ops.b",)}
    assert left.observed == {"x/numpy": {"ops.a": 100, "ops.b": 50}}


@pytest.mark.parametrize(
    "text",
    [
        '[[kills]]\nfault = "x"\ncheck = "ops.a"\n',
        '[[kills]]\nfault = "x"\ncheck = "ops.a"\nreason = " "\n',
        '[[observed]]\ncell = "c"\ncheck = "ops.a"\nvalues = "few"\nreason = "so"\n',
        "[[forgiven]]\n",
        "[",
    ],
)
def test_a_line_without_a_reason_is_refused(text: str, tmp_path: Path) -> None:
    """A missing or empty reason, another key, a text for a number: one sentence that names the file."""
    file = tmp_path / "forgotten.toml"
    file.write_text(text)
    with pytest.raises(KillsError, match=r"forgotten\.toml"):
        forgotten.load(file)


def test_what_is_forgotten_stands_in_verdict_and_reports() -> None:
    """Check, what it no longer owes, and the reason: in the verdict, in Markdown and in HTML."""
    lines = Forgotten(
        (Kill("one", "ops.a", "the reason given"),), (Amount("x/numpy", "ops.b", 50, "shorter"),)
    )
    verdict = decide(whole(), forgotten=lines)
    assert [(f.check, f.what, f.reason) for f in verdict.forgotten] == [
        ("ops.a", "the kill of one", "the reason given"),
        ("ops.b", "all but 50 values in x/numpy", "shorter"),
    ]
    for render in (markdown.render, html.render):
        text, quiet = render(verdict, options={}), render(decide(whole()), options={})
        assert all(word in text for word in ("no longer owe", "ops.a", "the kill of one", "the reason given"))
        assert "no longer owe" not in quiet


def test_every_packaged_line_is_needed() -> None:
    """A line speaks of a fault, or a check, that exists and does not do what the line lets it off."""
    lines, committed = forgotten.load(), matrix.load()
    for line in lines.kills:
        assert line.fault not in committed.faults or line.check not in committed.faults[line.fault].killed_by
        assert line.fault in known() or line.check in check_ids()
    for amount in lines.observed:
        assert amount.check not in committed.observed.get(amount.cell, {}) or amount.values > 0
    assert msgspec.structs.asdict(lines)
