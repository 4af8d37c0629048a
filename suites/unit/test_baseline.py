"""Speed against a baseline: with clocks that stand still, so that what is decided is known beforehand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest

from prill_harness.engines.base import Engine
from prill_harness.measure import baseline
from prill_harness.measure.baseline import Baseline, compared, measured
from prill_harness.measure.bench import Settings
from prill_harness.records.verdict import SpeedResult
from prill_runtime.errors import UsageError

from .commandline import invoke
from .test_bench import Clock, Staged
from .tiny_gguf import tiny

SETTINGS = Settings(prompt=8, tokens=4, repeat=12)
QUICK = ("--prompt", "8", "--tokens", "32", "--repeat", "8")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("baseline") / "model.gguf")


def run(
    path: Path,
    *,
    slower: float = 1.0,
    machine: float = 1.0,
    noise: Callable[[int], float] = lambda answer: 1.0,
) -> Baseline:
    """A run in which the engine is slower by a factor, and everything, the load too, by another."""
    clock = Clock()

    def load() -> None:
        clock.now += 0.02 * machine

    def opened(spec: str, model: str) -> Engine:
        token = lambda answer: 0.25 * slower * machine * noise(answer)  # noqa: E731
        return Staged(clock, [], prompt=0.5 * slower * machine, token=token)

    return measured(str(path), "staged", SETTINGS, clock=clock, open_engine=opened, load=load)


def test_the_same_is_one(path: Path) -> None:
    """An engine as fast as it was takes 1 time its baseline, with no interval where there is no noise."""
    for found in compared(run(path), run(path)):
        assert (found.ratio, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))


def test_a_slower_machine_is_not_a_slower_engine(path: Path) -> None:
    """Load and engine both take three times as long: nothing changed. The engine alone: that much slower."""
    for found in compared(run(path), run(path, machine=3.0)):
        assert found.ratio == pytest.approx(1.0)
    for found in compared(run(path, machine=3.0), run(path, slower=1.2)):
        assert (found.ratio, found.low) == pytest.approx((1.2, 1.2))


def test_the_load_is_timed_between_the_answers(path: Path) -> None:
    """A machine that grows slower by the minute is so for the neighbours of each answer, too."""
    clock, done = Clock(), [0]

    def load() -> None:
        clock.now += 0.02 * (1 + done[0])

    def opened(spec: str, model: str) -> Engine:
        def token(answer: int) -> float:
            done[0] = answer // 2
            return 0.25 * (1 + answer // 2)

        return Staged(clock, [], prompt=0.5, token=token)

    drifting = measured(str(path), "staged", SETTINGS, clock=clock, open_engine=opened, load=load)
    ratios = drifting.ratios["decode"]
    raw = max(drifting.calibrations_s) / min(drifting.calibrations_s)
    assert raw > 10
    assert max(ratios) / min(ratios) < 1.6


def shaky(answer: int) -> float:
    """Answers that take up to twice as long as others, without a pattern in neighbours."""
    return 1.0 + (answer * 7 % 5) / 4


@pytest.mark.parametrize(
    ("slower", "noise", "budget", "status"),
    [
        (1.0, None, 1.1, "passed"),
        (1.09, None, 1.1, "passed"),
        (1.11, None, 1.1, "failed"),
        (1.0, shaky, 1.1, "inconclusive"),
        (9.0, shaky, 1.1, "failed"),
        (1.0, shaky, 3.0, "passed"),
    ],
)
def test_a_budget_is_failed_kept_or_lost_in_noise(
    path: Path, slower: float, noise: Callable[[int], float] | None, budget: float, status: str
) -> None:
    """More than the budget at 95 %: failed. An interval that reaches across it: inconclusive. Else passed."""
    from prill_harness.commands.engines.baseline import _judged

    then, now = (
        run(path, noise=noise or (lambda answer: 1.0)),
        run(path, slower=slower, noise=noise or (lambda a: 1.0)),
    )
    (decode,) = (found for found in compared(then, now) if found.name == "decode")
    assert decode.low <= decode.ratio <= decode.high
    assert _judged(decode, budget) == status


def another(of: Baseline, **machine: object) -> Baseline:
    return msgspec.structs.replace(of, machine=msgspec.structs.replace(of.machine, **machine))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (partial(another, processor="Another 9000"), "machine: expected|processor"),
        (partial(another, driver="NVRM version: 1.0"), "driver"),
        (partial(another, cores=999), "cores"),
        (partial(msgspec.structs.replace, model_sha256="0" * 64), "model_sha256"),
        (partial(msgspec.structs.replace, engine="cuda"), "engine"),
        (partial(msgspec.structs.replace, tokens=5), "tokens"),
        (partial(msgspec.structs.replace, calibration="copies on H200"), "calibration"),
    ],
)
def test_a_baseline_of_anything_else_is_refused(
    path: Path, change: Callable[[Baseline], Baseline], told: str
) -> None:
    """Another machine, driver, model, engine, work or load: exit 4, and which it is."""
    with pytest.raises(UsageError, match=told) as caught:
        compared(change(run(path)), run(path))
    assert caught.value.exit_code == 4


# --- the command ----------------------------------------------------------------------------------------

PROCESS = f"exec:{sys.executable} -m prill_harness.engines.channels.worker slow.py:Engine"
SLOW = """
import time

class Engine:
    arithmetic = "float64"

    def __init__(self, model):
        self.pause = float(open("pause").read())

    def tokenize(self, text, add_special=True):
        return [1]

    def logits(self, ids):
        raise NotImplementedError

    def generate(self, ids, max_tokens, ignore_eos=False, **rest):
        time.sleep(0.002 + self.pause * max_tokens)
        return {"ids": [1] * max_tokens, "logprobs": [0.0] * max_tokens, "finish_reason": "length"}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("slow.py").write_text(SLOW)
    Path("pause").write_text("0.0005")
    return tmp_path


@pytest.mark.parametrize("engine", ["numpy", "py:slow.py:Engine", "capi:example", PROCESS])
def test_any_connector_has_a_baseline(here: Path, engine: str) -> None:
    """Recorded, then read back: an engine in this process, a class, a library, a process behind pipes; the
    figures are those of this machine and model, and a comparison is written for the gate."""
    words = ("bench", "--engine", engine, "--model", "fixture:llama-tiny", *QUICK, "--baseline", "base.json")
    recorded = invoke(*words, "--record")
    assert recorded.exit_code == 0, recorded.stderr
    base = baseline.read(Path("base.json"))
    assert (base.engine, base.machine.cores > 0, len(base.ratios["decode"])) == (engine, True, 8)
    again = invoke(*words, "--budget", "1000", "-o", "result.json")
    assert again.exit_code == 0, again.stderr
    (prompt, decode) = baseline.results([Path("result.json")])
    assert [prompt.name, decode.name, decode.engine] == ["prompt", "decode", engine]


def test_an_engine_that_became_slower_fails(here: Path) -> None:
    """Ten times as long for each token: exit 1, whatever else the machine does; the figures are said."""
    words = ("bench", "--engine", "py:slow.py:Engine", "--model", "fixture:llama-tiny", *QUICK)
    assert invoke(*words, "--baseline", "base.json", "--record").exit_code == 0
    Path("pause").write_text("0.005")
    result = invoke(*words, "--baseline", "base.json", "--budget", "2")
    assert result.exit_code == 1, result.output
    assert "decode: " in result.stdout
    assert "at most 2: failed" in result.stdout
    assert "calibrated by NumPy on this host, which went apart by " in result.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--record",), "name a file with --baseline"),
        (("--baseline", "absent.json"), "cannot read the baseline"),
        (("--baseline", "broken.json"), "not a baseline of this version"),
        (("--baseline", "base.json", "--repeat", "3", "--record"), "too few repetitions"),
        (("--baseline", "base.json", "--against", "numpy64"), "one comparison at a time"),
    ],
)
def test_bad_input_is_one_sentence(here: Path, words: tuple[str, ...], told: str) -> None:
    """Exit 4, one sentence, and nothing is written."""
    Path("broken.json").write_text('{"engine": 3}')
    result = invoke("bench", "--model", "fixture:llama-tiny", *words)
    assert (result.exit_code, result.stdout) == (4, "")
    assert told in result.stderr.splitlines()[-1]
    assert not Path("base.json").exists()


GATE = """default = "quick"
[gates.quick]
checklists = ["foundation"]
blocks_at = "critical"
performance_budget = 10
documents = ["README.md", "NEWS.md"]
[[gates.quick.plan]]
models = ["fixture:llama-tiny"]
engines = ["numpy"]
suites = ["blocks"]
"""


def test_a_gate_takes_speeds_and_documents(here: Path) -> None:
    """What is given with --speed is held to the policy's budget; a document that is empty is not there."""
    Path("gates.toml").write_text(GATE)
    Path("README.md").write_text("text")
    Path("NEWS.md").write_text(" \n")
    Path("nothing.jsonl").touch()
    speeds = [SpeedResult("numpy", "m", "decode", 1.2, 1.15, 1.25)]
    Path("result.json").write_bytes(msgspec.json.encode({"speeds": speeds}))
    words = ("gate", "--policy", "gates.toml", "--from", "nothing.jsonl", "--json")

    def rules(*more: str) -> dict[str, str]:
        found = json.loads(invoke(*words, *more).stdout)
        return {rule["id"]: f"{rule['status']}: {rule['sentence']}" for rule in found["data"]["rules"]}

    without, given = rules(), rules("--speed", "result.json")
    assert without["performance"].startswith("inconclusive: numpy was not measured")
    assert given["performance"].startswith("failed: decode of numpy on m takes 1.200 times")
    assert given["documents"] == "failed: NEWS.md is not there, or empty"
    Path("NEWS.md").write_text("1.0: new")
    assert rules()["documents"].startswith("passed")
    refused = invoke(*words[:-1], "--speed", "README.md")
    assert (refused.exit_code, "not the result of a bench" in refused.stderr) == (4, True)
