"""Is the judge honest? The harness's own oracle, golden, comparisons and records, put to the test."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from prill_harness import cells, compare, divergence, engines, faults, lanes, sides, trace
from prill_harness import ledger as ledgers
from prill_harness.checks import Observer, check
from prill_harness.engines.base import Capability, Engine
from prill_harness.engines.embedded import Embedded
from prill_harness.evidence import Cell, CellEnded, Evidence, Status
from prill_harness.golden import Golden
from prill_harness.golden_pack import Packed
from prill_runtime.engine import Model
from prill_runtime.errors import EngineError

EXACT = 100.0  # what the exact lane allows over its floor (docs/adr/0002-lanes.md)
BY_HAND = "arithmetic by hand"
LONGEST_S = 120.0
LEAST_BEYOND = 0.9  # share of a float64 array's values that float32 cannot hold
ROOTS = np.sqrt(np.arange(2.0, 1026.0)).reshape(64, 16)
USUAL = 1e-13  # the exact lane's floor of an ordinary model


def beyond_float32(values: NDArray[np.floating]) -> float:
    """The share of values that float32 cannot hold."""
    return float(np.mean(values.astype(np.float32).astype(np.float64) != values))


@check(
    "harness.oracle",
    kills=("oracle_is_candidate", "oracle_in_single_precision", "expected_trace_is_actual"),
)
def test_oracle(observe: Observer, engine: Engine, oracle: Embedded, golden: Golden) -> None:
    """The oracle computes in float64, logits and stages alike: no copy of the engine's numbers."""
    ids = golden.prompts[0].ids[:24]
    if Capability.TRACE in engine.info.capabilities:
        trace.capture(engine, ids)  # what was captured first must not be what is expected afterwards
    arrays = {"its logits": oracle.exact_logits(ids)} | dict(trace.capture(oracle, ids).stages)
    product = oracle.ops().linear(ROOTS[:1], ROOTS)
    with faults.only(()):
        arrays |= {"a product of roots": np.asarray(product, np.float64)}
        plain = short_values(oracle, ids)
        for name, array in arrays.items():
            observe.saw(array.size, oracle="the bits of float32")
            share = beyond_float32(np.asarray(array, np.float64))
            # Zeros, the file's own numbers and what passes them on are held by float32 as well.
            if name in plain and np.array_equal(array, plain[name]):
                continue
            observe.metric(
                f"share of {name} beyond float32",
                share,
                at_least=LEAST_BEYOND,
                otherwise=f"{name} of the oracle: {share:.0%} of the values have bits beyond float32's",
            )
        observe.expect(oracle is not engine, "the oracle is the engine under test itself")
    told = len(arrays) - len(plain)
    observe.say(f"{observe.observed} values of {len(arrays)} arrays, {told} of them computed in float64")


def short_values(oracle: Embedded, ids: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """The arrays of a float64 pass, by another copy of the model, that float32 nearly holds on this model."""
    found: dict[str, NDArray[np.float64]] = {}

    def keep(name: str, array: NDArray[np.floating]) -> None:
        if beyond_float32(np.asarray(array, np.float64)) < LEAST_BEYOND:
            found[name] = np.array(array, np.float64)

    with Model.load(engines.resolve_model(oracle.info.model), dtype="float64") as model:
        logits = model.forward([(model.new_cache(len(ids)), ids)], trace=keep)[0]
    return found | ({"its logits": np.array(logits, np.float64)} if "logits" in found else {})


@check("harness.golden", kills=("golden_of_another_model", "stale_golden_unnoticed"))
def test_golden(observe: Observer, oracle: Embedded, golden: Golden) -> None:
    """The golden names the oracle's file, and one that is off by 1e-4 anywhere is called stale."""
    said, found = golden.fingerprint.model_sha256, oracle.info.model_sha256
    first = golden.prompts[0]
    wrong = first.top_logprobs.array.copy()
    wrong[-1, 0] -= 1e-4
    moved = msgspec.structs.replace(first, top_logprobs=Packed.of(wrong))
    stale = sides.check_stale(msgspec.structs.replace(golden, prompts=[moved]), oracle)
    sound = sides.check_stale(golden, oracle, 1)
    with faults.only(()):
        observe.saw(wrong.size, oracle="the golden with one logprob moved by 1e-4")
        observe.expect(
            said == found, f"the golden is of sha256 {said[:12]}…, the oracle's file has {found[:12]}…"
        )
        observe.expect(stale is not None, "a golden with one wrong logprob was not called stale")
        observe.expect(sound is None, f"the control failed: {sound.sentence if sound else ''}")
    observe.say(
        f"of {wrong.size} logprobs one that is 1e-4 off makes the golden stale; as it is, it is current"
    )


@check(
    "harness.comparisons",
    kills=("expected_is_actual", "nan_is_no_difference", "truncated_comparison", "truncated_tokens_agree"),
)
def test_comparisons(observe: Observer) -> None:
    """Two arrays that differ, in a value, in a NaN or in their length, are told apart by the right figure."""
    told = {
        "one value of two": (compare.nmse([3.0, 4.0], [3.0, 5.0]), 1 / 25),
        "equal arrays": (compare.nmse([3.0, 4.0], [3.0, 4.0]), 0.0),
        "a NaN": (compare.nmse([3.0, 4.0], [3.0, math.nan]), math.inf),
    }
    tally = lanes.Tally()
    tally.add(np.log([[0.5, 0.5]]), np.log([[0.75, 0.25]]))
    told["KL of (1/2, 1/2) and (3/4, 1/4)"] = (tally.figures().kl_max, 0.5 * math.log(4 / 3))
    try:
        shorter = f"a figure: {compare.nmse([3.0, 4.0, 5.0], [3.0, 4.0]):g}"
    except EngineError:
        shorter = ""
    texts = {
        "a text cut short": (divergence.first_difference([1, 2, 3], [1, 2]), 2),
        "a text gone on": (divergence.first_difference([1, 2], [1, 2, 3]), 2),
        "another token": (divergence.first_difference([1, 2, 3], [1, 7, 3]), 1),
        "equal texts": (divergence.first_difference([1, 2], [1, 2]), None),
    }
    with faults.only(()):
        for what, (got, expected) in told.items():
            observe.saw(1, oracle=BY_HAND)
            near = got == expected or abs(got - expected) < 1e-12
            observe.expect(near, f"{what}: expected {expected:.6g}, got {got:.6g}")
        observe.expect(not shorter, f"3 values and 2: expected a refusal, got {shorter}")
        for what, (at, place) in texts.items():
            observe.saw(1, oracle=BY_HAND)
            observe.expect(at == place, f"{what}: expected the first difference at {place}, got {at}")
    observe.say(f"{observe.observed} known answers, and two lengths are never compared")


@check(
    "harness.bounds",
    kills=("bounds_widened", "near_ties_unbudgeted", "every_flip_is_a_tie"),
)
def test_bounds(observe: Observer, golden: Golden) -> None:
    """Noise three times beyond what the exact lane allows is out of bound, half of the floor is within."""
    floor = golden.floors["exact"]
    if not EXACT * floor.nmse < 1 or not floor.nmse:  # a model without noise, or without anything else
        floor = replace(floor, nmse=USUAL)
    bound = lanes.bounds(lanes.EXACT, floor)
    rng = np.random.default_rng(7)
    logits = rng.standard_normal((300, 512)) * 4
    noise = rng.standard_normal(logits.shape)
    noise *= np.sqrt(np.sum(logits**2) / np.sum(noise**2))
    found = {}
    for times in (0.5, 3 * EXACT):
        tally = lanes.Tally()
        tally.add(logits, logits + noise * math.sqrt(times * floor.nmse))
        rows = {name: value for name, value, _, _ in lanes.broken(tally.figures(), bound)}
        found[times] = "nmse" in rows
    allowed = [lanes.poisson_upper(mean) for mean in (0.0, 0.01, 1.0, 4.0)]
    margins = [compare.margin_of([5.0, 1.0], 1, tau=gap).near_tie for gap in (3.9, 4.0)]
    with faults.only(()):
        observe.saw(logits.size, oracle="noise of a known NMSE")
        observe.expect(not found[0.5], "noise of half the floor is out of the exact lane's bound")
        observe.expect(
            found[3 * EXACT], f"noise of {3 * EXACT:g} times the floor is within the exact lane's bound"
        )
        observe.saw(len(allowed), oracle="quantiles of the Poisson distribution at 0.999")
        observe.expect(allowed == [0, 1, 5, 11], f"flips allowed at 0, 0.01, 1 and 4 expected: {allowed}")
        observe.expect(margins == [False, True], f"a margin of 4 at 3.9 and 4.0 explained: {margins}")
    observe.say(
        f"half the floor passes, {3 * EXACT:g} times the floor does not; flips are budgeted: {allowed}"
    )


PROBES = '''
import pytest
from prill_harness.checks import check

LAW = dict(kills=("probe",))

@check("probes.sound", **LAW)
def test_sound(observe):
    observe.saw(1, oracle="itself")

@check("probes.expects", **LAW)
def test_expects(observe):
    observe.saw(1, oracle="itself")
    observe.expect(False, "wrong")

@check("probes.measures", **LAW)
def test_measures(observe):
    observe.saw(1, oracle="itself")
    observe.metric("two", 2.0, at_most=1.0)

@check("probes.not_a_number", **LAW)
def test_not_a_number(observe):
    observe.saw(1, oracle="itself")
    observe.metric("nothing", float("nan"), at_most=1.0)

@check("probes.sees_nothing", **LAW)
def test_sees_nothing(observe):
    """Nothing is done here."""

@check("probes.no_oracle", **LAW)
def test_no_oracle(observe):
    observe.saw(1, oracle="")

@check("probes.skips", **LAW)
def test_skips(observe):
    observe.saw(1, oracle="itself")
    pytest.skip("the model is not there")

@check("probes.expected_to_fail", **LAW)
@pytest.mark.xfail
def test_expected_to_fail(observe):
    observe.saw(1, oracle="itself")
    observe.expect(False, "wrong")

@check("probes.crashes", **LAW)
def test_crashes(observe):
    observe.saw(1, oracle="itself")
    raise RuntimeError("crashed")
'''
OWED = {
    "probes.sound": Status.PASSED,
    "probes.expects": Status.FAILED,
    "probes.measures": Status.FAILED,
    "probes.not_a_number": Status.FAILED,
    "probes.sees_nothing": Status.INCONCLUSIVE,
    "probes.no_oracle": Status.INCONCLUSIVE,
    "probes.skips": Status.INCONCLUSIVE,
    "probes.expected_to_fail": Status.INCONCLUSIVE,
    "probes.crashes": Status.ERROR,
}


@check(
    "harness.records",
    kills=(
        "silence_passes",
        "expectations_ignored",
        "metrics_unbounded",
        "crash_is_failure",
        "exit_code_lost",
    ),
)
def test_records(observe: Observer, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """Dishonest checks in a process of their own: each is recorded as what it is, and the run is red."""
    (tmp_path / "probes.py").write_text(PROBES, "utf-8")
    ledger = tmp_path / "probes.jsonl"
    cell = Cell("none", pytestconfig.getoption("prill_engine"), "probes")
    words: Sequence[str] = cells.command(cell, ledger, tmp_path)
    environment = cells.environment(2)
    with faults.only(()):
        quiet = subprocess.DEVNULL
        with subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, env=environment
        ) as process:
            process.wait(LONGEST_S)  # a cell ends with its parent, whose end of stdin stays open till here
        records = ledgers.read(ledger) if ledger.exists() else ()
        found = {record.check: record.status for record in records if isinstance(record, Evidence)}
        codes = [record.exit_code for record in records if isinstance(record, CellEnded)]
        observe.saw(len(found), oracle="what each of the checks deserves")
        observe.expect(set(found) == set(OWED), f"{len(OWED)} checks were run, {len(found)} left evidence")
        for name, owed in OWED.items():
            observe.expect(
                found[name] is owed, f"{name} deserves to be {owed}, and was recorded as {found[name]}"
            )
        observe.expect(codes == [1], f"the run of failing checks ended with exit code {codes}")
    observe.say(f"{len(found)} checks, one of them sound, each recorded as what it is; exit code 1")
