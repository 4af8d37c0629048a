"""The commands `bisect` and `trace`: what they are asked, what they answer, and with which exit code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prill_harness.commands.engines.bisect import chart
from prill_harness.commands.shared.texts import ids_for
from prill_harness.faults.opening import open_engine
from prill_harness.stages import trace

from .commandline import emitted, invoke
from .tiny_gguf import tiny

LLAMA = "fixture:llama-tiny"


def bisected(*args: str) -> tuple[int, dict[str, object]]:
    done = invoke("bisect", "--model", LLAMA, "--json", *args)
    return done.exit_code, emitted(done.stdout)


def test_a_right_engine_has_no_finding() -> None:
    """Every stage of the float32 engine is within the noise measured for it, and each was looked at."""
    code, found = bisected("--tokens", "16")
    assert code == 0
    assert found["findings"] == []
    assert found["lane"] == "exact"
    assert len(found["ids"]) == 16  # type: ignore[arg-type]
    stages = found["stages"]
    assert len(stages) == 63  # type: ignore[arg-type]
    assert all(0 <= s["isolated"] <= s["bound"] and s["ok"] for s in stages)  # type: ignore[attr-defined]
    assert "all 63 stages agree" in str(found["sentence"])


def test_a_wrong_engine_is_explained() -> None:
    """One sentence names the first wrong stage and the mistake that makes the numbers agree."""
    done = invoke("bisect", "--model", LLAMA, "--engine", "numpy+fault:rope_pairing", "--tokens", "16")
    assert done.exit_code == 1
    last = done.stdout.splitlines()[-1]
    assert last.startswith("blk.0.q_rope is the first wrong stage: NMSE ")
    assert "explained by: pairs (i, i+d/2) instead of (2i, 2i+1)" in last
    wrong = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("wrong")]
    assert wrong == [f"blk.{n}.{kind}" for n in range(4) for kind in ("q_rope", "k_rope")]


def test_a_trace_from_a_file_is_judged(tmp_path: Path) -> None:
    """An engine that only dumps arrays is compared like one that runs: right is right, one value is found."""
    file = tmp_path / "t.npz"
    made = invoke("trace", "--model", LLAMA, "--ids", "1,5,9,300,12", "-o", str(file))
    assert made.exit_code == 0
    assert "63 stages over 5 ids" in made.stdout
    assert bisected("--trace", str(file))[0] == 0
    read = trace.load(file)
    assert read.ids == (1, 5, 9, 300, 12)
    stages = dict(read.stages)
    stages["blk.2.down"][3, 17] += 1.0
    trace.save(trace.Trace(read.ids, stages), file)
    code, found = bisected("--trace", str(file))
    assert code == 1
    assert str(found["sentence"]).startswith("blk.2.down is the first wrong stage")
    assert "only token 3, only element 17" in str(found["sentence"])


def test_a_trace_in_half_precision_has_its_own_lane(tmp_path: Path) -> None:
    """Arrays rounded to float16 are wrong in the exact lane and right in the lane of their arithmetic."""
    file = tmp_path / "half.npz"
    with open_engine("numpy", LLAMA) as engine:
        whole = trace.capture(engine, [1, 5, 9, 300, 12, 77, 40, 3])
    halves = {name: array.astype(np.float16).astype(np.float64) for name, array in whole.stages.items()}
    trace.save(trace.Trace(whole.ids, halves), file)
    assert bisected("--trace", str(file))[0] == 1
    code, found = bisected("--trace", str(file), "--arithmetic", "half")
    assert (code, found["lane"]) == (0, "f16")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--ids", "1,x"), "expected 0 to 1023, got 'x'"),
        (("--ids", "1,1024"), "expected 0 to 1023, got 1024"),
        (("--ids", " "), "no token ids"),
        (("--ids", "@nowhere.txt"), "nowhere.txt"),
        (("--ids", "1", "--prompt", "x"), "expected one of --prompt, --ids and --tokens"),
        (("--tokens", "9999"), "expected at most 1024, got 9999"),
        (("--trace", "nowhere.npz"), "no such trace file"),
        (("--trace", "nowhere.npz", "--tokens", "3"), "a trace file brings its own ids"),
        (("--engine", "numpy+fault:nobody"), "unknown planted fault"),
    ],
)
def test_a_wrong_request_is_one_sentence(args: tuple[str, ...], says: str) -> None:
    """What cannot be run is refused with exit code 4 and the word that was wrong."""
    done = invoke("bisect", "--model", LLAMA, *args)
    assert done.exit_code == 4
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_ids_from_a_file(tmp_path: Path) -> None:
    """@FILE reads ids separated in any usual way, a JSON list included."""
    file = tmp_path / "ids.json"
    file.write_text("[1, 5,\n 9]", encoding="utf-8")
    assert bisected("--ids", f"@{file}")[1]["ids"] == [1, 5, 9]


def test_a_long_text_is_continued() -> None:
    """More ids than the prompt has are the oracle's own greedy continuation."""
    with open_engine("numpy64", LLAMA) as oracle:
        short = ids_for(oracle, LLAMA, prompt=None, ids=None, tokens=8)
        whole = ids_for(oracle, LLAMA, prompt=None, ids=None, tokens=90)
        assert whole[:8] == short
        assert len(whole) == 90
        logits = oracle.logits(whole[:-1])
        assert int(logits[-1].argmax()) == whole[-1]


def test_a_user_file_is_bisected(tmp_path: Path) -> None:
    """A model that is no fixture needs nothing recorded before."""
    path = tiny(tmp_path / "user.gguf", context=64)
    done = invoke("bisect", "--model", str(path), "--ids", "1,2,3")
    assert done.exit_code == 0, done.stdout + done.stderr


def test_the_chart_is_logarithmic_around_the_bound() -> None:
    """At the bound the left half is full; a hundred times over adds four marks; beyond the scale it ends."""
    assert chart(1.0) == "##########|"
    assert chart(100.0) == "##########|####"
    assert chart(0.01) == "######    |"
    assert chart(0.0) == "          |"
    assert chart(float("inf")) == "##########|##########"
    assert chart(float("nan")) == "?"
