"""Evidence: no pass without an oracle, a count and a kill; ledgers survive a torn line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prill_harness.records.evidence import (
    Cell,
    CellEnded,
    CellStarted,
    CheckStarted,
    Evidence,
    Metric,
    Record,
    Status,
    builtin,
    checks,
)
from prill_harness.records.ledger import Ledger, read
from prill_runtime.errors import PolicyError

CELL = Cell("m", "numpy", "tokens")


def record(status: Status = Status.PASSED, **changes: object) -> Evidence:
    base = Evidence("tokens.a[1]", "c", CELL, Status.FAILED, 3, "seen", "numpy64", ("fault",), "prill run")
    return msgspec.structs.replace(base, status=status, **changes)


@pytest.mark.parametrize("lacking", [{"observed": 0}, {"observed": -1}, {"oracle": ""}, {"kills": ()}])
def test_a_pass_needs_a_count_an_oracle_and_a_kill(lacking: dict[str, object]) -> None:
    """Passed evidence lacking any of the three cannot be made, nor read from a ledger."""
    with pytest.raises(ValueError, match="cannot pass"):
        record(**lacking)
    plain = msgspec.to_builtins(record()) | lacking
    with pytest.raises(msgspec.ValidationError, match="cannot pass"):
        msgspec.convert(plain, Evidence)
    assert record(Status.INCONCLUSIVE, **lacking).status is Status.INCONCLUSIVE


def test_a_ledger_gives_back_what_was_written(tmp_path: Path) -> None:
    """Every kind of record survives the file, in order; the last evidence of a check is found."""
    records: tuple[Record, ...] = (
        CellStarted(CELL, ("tokens.a[1]",), 1.0, {"prill": "1"}),
        CheckStarted(CELL, "tokens.a[1]", 1.0),
        record(metrics=(Metric("kl", 0.5, 1.0), Metric("inf", None)), detail={"x": [1, "\n"]}),
        record(Status.FAILED),
        CellEnded(CELL, 1, 0.5, 2.0),
    )
    with Ledger(tmp_path / "deep/ledger.jsonl") as ledger:
        for one in records:
            ledger.append(one)
    assert read(tmp_path / "deep/ledger.jsonl") == records
    assert checks(records) == {(CELL.id, "tokens.a[1]"): records[3]}
    assert record().base == "tokens.a"


@given(st.integers(1, 400))
@example(13)  # in the middle of a number: "at":0.
@example(22)
def test_a_torn_last_line_loses_that_record_alone(cut: int) -> None:
    """Cut anywhere in its last record, the ledger reads as what came before, and writing goes on."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "l")
        with Ledger(path) as ledger:
            ledger.append(CheckStarted(CELL, "a", 1.0))
            keep = path.stat().st_size
            ledger.append(record())
        whole = path.read_bytes()
        path.write_bytes(whole[: max(keep + 1, len(whole) - 1 - cut)])
        before = read(path)
        with Ledger(path) as ledger:
            ledger.append(CheckStarted(CELL, "b", 2.0))
        after = read(path)
    assert before == (CheckStarted(CELL, "a", 1.0),)
    assert after == (*before, CheckStarted(CELL, "b", 2.0))


@pytest.mark.parametrize("line", ["nonsense", '{"kind":"other"}', '{"kind":"start","cell":1}', "[1]"])
def test_a_whole_line_that_is_no_record_is_an_error(tmp_path: Path, line: str) -> None:
    """What no kill can have torn is refused with its line number; a ledger is not guessed at."""
    (tmp_path / "l").write_text(f"\n{line}\n")
    with pytest.raises(PolicyError, match="line 2"):
        read(tmp_path / "l")


@pytest.mark.parametrize(
    ("metric", "holds"),
    [
        (Metric("a", 1.0, 1.0), True),
        (Metric("a", 1.1, 1.0), False),
        (Metric("a", 0.9, 1.0, ">="), False),
        (Metric("a", 1.0, 1.0, ">="), True),
        (Metric("a", 1.0, 1.0, "=="), True),
        (Metric("a", 1.1, 1.0, "=="), False),
        (Metric("a", None, 1.0), False),
        (Metric("a", None), False),
        (Metric("a", math.nan, 1.0), False),
        (Metric("a", math.nan, 1.0, ">="), False),
        (Metric("a", 5.0), True),
    ],
)
def test_a_metric_holds_within_its_bound_alone(metric: Metric, holds: bool) -> None:
    """At the bound it holds, beyond it not, and NaN or infinity never."""
    assert metric.holds is holds


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(st.characters())
    | st.sampled_from(["\ud800", "a\udfffb", b"\xff", np.float32(1.5), np.float64("nan"), np.int8(3)])
    | st.sampled_from([np.bool_(True), np.arange(3), np.array([np.inf]), Path("x"), {1, 2}, (1, 2)]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()) | st.integers(), inner),
    max_leaves=8,
)


@given(VALUES)
def test_anything_becomes_builtins_that_json_carries(value: object) -> None:
    """Whatever a check notes is reduced to what both JSON encoders take, strictly, and reads back equal."""
    plain = builtin(value)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert msgspec.json.decode(msgspec.json.encode(plain)) == plain
    assert type(builtin(np.float64(1))) is float
