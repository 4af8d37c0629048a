"""A plan is shown before it runs, and the ledgers of its parts are put together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prill_harness.plan import plan, policy
from prill_harness.records import ledger as ledgers
from prill_harness.records.evidence import Cell, CellEnded, CellStarted, Evidence, Status
from prill_harness.records.ledger import Ledger
from prill_harness.run import executor

from .commandline import emitted, invoke

POLICY = """default = "small"
[gates.small]
checklists = ["foundation"]
[[gates.small.plan]]
models = ["fixture:llama-tiny"]
engines = ["numpy"]
suites = ["blocks", "cache"]
[gates.whole]
extends = "small"
[[gates.whole.plan]]
models = ["fixture:gpt2-tiny"]
engines = ["numpy", "cuda"]
suites = ["cache", "sampler"]
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gates.toml").write_text(POLICY)


def write(path: Path, *cells: Cell, seconds: float = 3.0) -> Path:
    with Ledger(path) as ledger:
        for cell in cells:
            check = f"{cell.suite}.one"
            ledger.append(CellStarted(cell, (check,), 1.0))
            ledger.append(
                Evidence(
                    check, "c", cell, Status.PASSED, 1, "seen", "numpy64", ("rope_pairing",), "prill run"
                )
            )
            ledger.append(CellEnded(cell, 0, seconds, 2.0))
    return path


def planned(*words: str) -> dict[str, object]:
    result = invoke("plan", *words, "--policy", "gates.toml", "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, object] = emitted(result.stdout)
    return found


def test_a_plan_says_what_runs_why_and_how_long() -> None:
    """Each cell with the gate that asks for it, the items its suite has checks for, and the time it took; one
    that never ran as long as its suite elsewhere; what nobody knows is said to be unknown."""
    write(Path("out/ledger.jsonl"), Cell("fixture:llama-tiny", "numpy", "cache"), seconds=7.0)
    found = planned("whole", "-j", "1")
    rows = {tuple(row["cell"].values())[:3]: row for row in found["cells"]}  # type: ignore[attr-defined]
    assert len(rows) == 6
    seen, other = rows["fixture:llama-tiny", "numpy", "cache"], rows["fixture:gpt2-tiny", "numpy", "cache"]
    assert (seen["seconds"], seen["by"], seen["gate"]) == (7.0, "its last run", "small")
    assert (other["seconds"], other["by"], other["gate"]) == (7.0, "its suite on other models", "small")
    sampler = rows["fixture:gpt2-tiny", "cuda", "sampler"]
    assert (sampler["seconds"], sampler["gpu"], sampler["gate"]) == (None, True, "whole")
    assert "foundation.kernels.blocks" in rows["fixture:llama-tiny", "numpy", "blocks"]["items"]
    assert (found["run"], found["unknown"]) == (6, 2)
    assert found["expected_s"] == pytest.approx(7.0 + 7.0 + 0.2 + 0.9)
    assert [path.name for path in Path("out").iterdir()] == ["ledger.jsonl"]


def test_a_plan_in_words_and_in_parts() -> None:
    """The table names cell, gate, items and time, the last line the whole; shards part the same cells."""
    result = invoke("plan", "--policy", "gates.toml", "-j", "2")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[1].split()[:3] == [
        "fixture:llama-tiny/numpy/blocks/cpu",
        "small",
        "foundation.kernels.blocks",
    ]
    assert lines[-1].startswith("gate small: 2 cells, 2 at a time; about 1 s")
    parts = [planned("whole", "--shard", f"{n}/4")["cells"] for n in range(1, 5)]
    ids = [json.dumps(row["cell"]) for part in parts for row in part]  # type: ignore[attr-defined]
    assert sorted(ids) == sorted(json.dumps(r["cell"]) for r in planned("whole")["cells"])  # type: ignore[attr-defined]


def test_a_plan_knows_what_a_resume_would_keep() -> None:
    """A cell that ended with the code and model of now is kept and takes no time; the other is run."""
    work = plan.build(policy.load_policy(Path("gates.toml")).gate())
    one = plan.Plan(work.gate, work.cells[:1])
    executor.run(one, Path("out"), jobs=1)
    found = planned("--resume")
    assert [row["kept"] for row in found["cells"]] == [True, False]  # type: ignore[attr-defined]
    assert found["run"] == 1
    assert [row["kept"] for row in planned()["cells"]] == [False, False]  # type: ignore[attr-defined]


CELLS = (Cell("fixture:llama-tiny", "numpy", "blocks"), Cell("fixture:llama-tiny", "numpy", "cache"))


def test_ledgers_of_shards_become_one() -> None:
    """Every record once, in an order that does not depend on how they are given; again, and with the result
    among them, the same bytes."""
    shards = [write(Path(f"{n}.jsonl"), cell) for n, cell in enumerate(CELLS)]
    result = invoke("merge", *map(str, shards), "--gate", "small", "--policy", "gates.toml", "--json")
    assert result.exit_code == 0, result.stderr
    target = Path("out/ledger.jsonl")
    first = target.read_bytes()
    assert emitted(result.stdout)["checks"] == 2
    assert len(ledgers.audited(target)) == 6
    assert invoke("merge", str(target), *map(str, reversed(shards))).exit_code == 0
    assert invoke("merge", str(target)).exit_code == 0
    assert target.read_bytes() == first


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("0.jsonl", "absent.jsonl"), "no such ledger"),
        (("0.jsonl", "other.jsonl"), "a cell was run twice"),
        (("0.jsonl", "--gate", "small", "--policy", "gates.toml"), "planned cells are missing"),
        (
            ("0.jsonl", "1.jsonl", "2.jsonl", "--gate", "small", "--policy", "gates.toml"),
            "are not in the plan",
        ),
        (("torn.jsonl",), "torn.jsonl line 1"),
    ],
)
def test_what_does_not_belong_together_is_refused(words: tuple[str, ...], told: str) -> None:
    """A missing ledger, two that differ, a cell too few or too many, and what is no ledger: exit 4, one
    sentence, nothing written."""
    for n, cell in enumerate((*CELLS, Cell("m", "numpy", "cache"))):
        write(Path(f"{n}.jsonl"), cell)
    write(Path("other.jsonl"), CELLS[0], seconds=9.0)
    Path("torn.jsonl").write_text("not a ledger\n")
    result = invoke("merge", *words)
    assert (result.exit_code, result.stderr.count("\n")) == (4, 1)
    assert told in result.stderr
    assert not Path("out").exists()
