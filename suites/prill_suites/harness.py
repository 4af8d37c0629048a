"""Is the judge honest? The harness's own oracle, golden, comparisons and records, put to the test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from prill_harness.engines.base import Capability, Engine
from prill_harness.engines.embedded import Embedded
from prill_harness.engines.models import resolve_model
from prill_harness.numbers import compare, lanes
from prill_harness.numbers.lanes import Figures
from prill_harness.planting import faults
from prill_harness.records.evidence import CellEnded, Evidence, Status
from prill_harness.run.checks import Observer, check
from prill_harness.stages import trace
from prill_harness.tokens import divergence, sides
from prill_harness.tokens.golden import Golden
from prill_harness.tokens.golden_pack import Packed
from prill_runtime.errors import EngineError
from prill_runtime.run.model import Model
from prill_suites import harness_gate, harness_probes, harness_specimens
from prill_suites.harness_probes import OWED, SEEN

NEAR = 0.99  # of a bound is within it
EXACT = 100.0  # what the exact lane allows over its floor (docs/adr/0002-lanes.md)
BY_HAND = "arithmetic by hand"
LEAST_BEYOND = 0.9  # share of a float64 array's values that float32 cannot hold
ROOTS = np.sqrt(np.arange(2.0, 1026.0)).reshape(64, 16)
LEAST_NOISE = 1e-20  # NMSE that float64 logits can hold to a hundredth
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
    arrays = {"its logits": oracle.logits(ids)} | dict(trace.capture(oracle, ids).stages)
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

    with Model.load(resolve_model(oracle.info.model), dtype="float64") as model:
        logits = model.forward([(model.new_cache(len(ids)), ids)], trace=keep)[0]
    return found | ({"its logits": np.array(logits, np.float64)} if "logits" in found else {})


@check("harness.golden", kills=("golden_of_another_model", "stale_golden_unnoticed"))
def test_golden(observe: Observer, oracle: Embedded, golden: Golden) -> None:
    """The golden names the oracle's file, and one that is off by 1e-4 anywhere is called stale."""
    said, found = golden.fingerprint.model_sha256, oracle.info.model_sha256
    first = harness_specimens.cut(golden.prompts[0])  # whose tokens are decoded one by one
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
    kills=(
        "expected_is_actual",
        "nan_is_no_difference",
        "truncated_comparison",
        "truncated_tokens_agree",
        "sixty_four_values_only",
        "nan_lost_in_maximum",
        "last_bucket_lost",
        "last_rows_forgotten",
    ),
)
def test_comparisons(observe: Observer) -> None:
    """Two arrays that differ, in a value, in a NaN or in their length, are told apart by the right figure."""
    ones, other = np.ones((333, 3)), np.ones((333, 3))
    other[-1, -1] = 2
    told = {
        "one value of two": (compare.nmse([3.0, 4.0], [3.0, 5.0]), 1 / 25),
        "the last of 999 values": (compare.nmse(ones, other), 1 / 999),
        "equal arrays": (compare.nmse([3.0, 4.0], [3.0, 4.0]), 0.0),
        "a NaN": (compare.nmse([3.0, 4.0], [3.0, math.nan]), math.inf),
    }
    tally = lanes.LogitTally()
    tally.add(np.log([[0.5, 0.5]]), np.log([[0.75, 0.25]]))
    rows, bad = np.zeros((300, 4)), np.zeros((300, 4))
    bad[-1, -1] = math.nan
    late = lanes.LogitTally()
    late.add(rows, bad)
    figures = late.figures()
    one = np.zeros((300, 4))
    one[-1, 1] = 1.0
    last = lanes.LogitTally()
    last.add(rows, one)
    moved = math.log((3 + math.e) / 4)  # of the logprobs of all but the one, KL and |Δ logprob| alike
    told["KL of the last position"] = (last.figures().kl_max, moved - 0.25)
    told["Δ logprob of the last position"] = (last.figures().dlogprob_max, 1 - moved)
    told["KL past 256"] = (last.figures().buckets.get("257+", 0.0), moved - 0.25)
    told |= {f"a NaN, {name}": (getattr(figures, name), math.inf) for name in ("kl_max", "dlogprob_max")}
    told["a NaN at the last position"] = (figures.buckets.get("257+", 0.0), math.inf)
    told["KL of (1/2, 1/2) and (3/4, 1/4)"] = (tally.figures().kl_max, 0.5 * math.log(4 / 3))
    try:
        shorter = f"a figure: {compare.nmse([3.0, 4.0, 5.0], [3.0, 4.0]):g}"
    except EngineError:
        shorter = ""
    texts = {
        "a text cut short": (divergence.first_difference([1, 2, 3], [1, 2]), 2),
        "a text gone on": (divergence.first_difference([1, 2], [1, 2, 3]), 2),
        "the last of 999 tokens": (divergence.first_difference([1] * 999, [*[1] * 998, 2]), 998),
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
    kills=(
        "bounds_widened",
        "bounds_tripled",
        "near_ties_unbudgeted",
        "every_flip_is_a_tie",
    ),
)
def test_bounds(observe: Observer, golden: Golden) -> None:
    """Noise at its bound is told from noise beyond it, by every figure; the bounds are those by hand."""
    floor = golden.floors["exact"]
    if not LEAST_NOISE < EXACT * floor.nmse < 1:  # a model without noise, or without anything else
        floor = replace(floor, nmse=USUAL)
    bound = lanes.bounds(lanes.EXACT, floor)
    rng = np.random.default_rng(7)
    logits = rng.standard_normal((300, 512)) * 4
    noise = rng.standard_normal(logits.shape)
    noise *= np.sqrt(np.sum(logits**2) / np.sum(noise**2))
    found = {}
    for times in (0.5, NEAR, 1 / NEAR):
        tally = lanes.LogitTally()
        tally.add(logits, logits + noise * math.sqrt(times * EXACT * floor.nmse))
        found[times] = "nmse" in broken_names(tally.figures(), bound)
    by_hand = {name: EXACT * getattr(floor, name) for name in ("nmse", "kl_p99", "kl_max")}
    by_hand |= {"dlogprob_max": math.sqrt(EXACT) * floor.dlogprob_max}
    edges = {
        name: [
            name in broken_names(replace(bound, **{name: times * value}), bound) for times in (NEAR, 1 / NEAR)
        ]
        for name, value in by_hand.items()
        if value
    }
    buckets = {label: EXACT * value for label, value in floor.buckets.items()}
    late = {label: 1.01 * value for label, value in bound.buckets.items()}
    over = broken_names(replace(bound, buckets=late), bound)
    allowed = [lanes.poisson_upper(mean) for mean in (0.0, 0.01, 1.0, 4.0)]
    margins = [compare.margin_of([5.0, 1.0], 1, tau=gap).near_tie for gap in (3.9, 4.0)]
    with faults.only(()):
        observe.saw(logits.size, oracle="noise of a known NMSE")
        told = [found[times] for times in (0.5, NEAR, 1 / NEAR)]
        observe.expect(
            told == [False, False, True],
            f"noise of 0.5, {NEAR} and {1 / NEAR:.3f} times the exact lane's bound is out of bound: {told}",
        )
        for name, out in edges.items():
            observe.saw(2, oracle=BY_HAND)
            sentence = f"{name} of {NEAR} and {1 / NEAR:.3f} times its bound is out of bound: {out}"
            observe.expect(out == [False, True], sentence)
        observe.saw(len(buckets), oracle=BY_HAND)
        observe.expect(bound.buckets == buckets, f"the buckets' bounds are {bound.buckets}, not {buckets}")
        lost = [label for label, value in late.items() if value and f"kl_max[{label}]" not in over]
        observe.expect(not lost, f"a KL of 1.01 times its bound is within it at {', '.join(lost)}")
        observe.saw(len(allowed), oracle="quantiles of the Poisson distribution at 0.999")
        observe.expect(allowed == [0, 1, 5, 11], f"flips allowed at 0, 0.01, 1 and 4 expected: {allowed}")
        observe.expect(margins == [False, True], f"a margin of 4 at 3.9 and 4.0 explained: {margins}")
    observe.say(f"what is {1 / NEAR:.3f} times its bound is out of it; flips are budgeted: {allowed}")


def broken_names(figures: Figures, bound: Figures) -> list[str]:
    """The figures that are out of bound, by name."""
    return [name for name, _, _, _ in lanes.broken(figures, bound)]


@check(
    "harness.records",
    kills=(
        "silence_passes",
        "expectations_ignored",
        "metrics_unbounded",
        "crash_is_failure",
        "exit_code_lost",
        "failure_is_skip",
        "metric_bounds_loose",
        "seen_counted_twice",
        "dead_cells_forgotten",
    ),
)
def test_records(observe: Observer, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """Dishonest checks in processes of their own: each is recorded as what it is, and the run is red."""
    records = harness_probes.run(tmp_path, pytestconfig.getoption("prill_engine"))
    with faults.only(()):
        told = {record.check: record for record in records if isinstance(record, Evidence)}
        codes = [record.exit_code for record in records if isinstance(record, CellEnded)]
        observe.saw(len(told), oracle="what each of the checks deserves")
        lost = sorted(OWED.keys() - told.keys())
        observe.expect(not lost, f"{len(OWED)} checks were run, and {', '.join(lost)} left no evidence")
        for name, owed in OWED.items():
            found = told[name].status
            observe.expect(found is owed, f"{name} deserves to be {owed}, and was recorded as {found}")
        seen = {name: told[name].observed for name in SEEN}
        observe.expect(seen == SEEN, f"checks that saw {SEEN} were recorded as having seen {seen}")
        observe.expect(codes == [1], f"the run of failing checks ended with exit code {codes}")
    observe.say(f"{len(told)} checks, two of them sound, each recorded as what it is; exit code 1")


@check(
    "harness.gate",
    kills=(
        "gathering_drops_failures",
        "merge_prefers_passed",
        "last_attempt_counts",
        "errors_are_nothing",
        "cells_always_complete",
        "kills_not_asked_for",
        "one_kill_is_enough",
        "lost_kills_forgiven",
        "open_incidents_let_through",
        "amounts_not_held",
    ),
)
def test_gate(observe: Observer, tmp_path: Path) -> None:
    """Of runs with one thing wrong none passes the gate, and the rule that is broken says so."""
    cases = list(harness_gate.cases(tmp_path))
    with faults.only(()):
        for what, owed, verdict in cases:
            observe.saw(1, oracle="the one thing that is wrong with the run")
            broken = [result.id for result in verdict.rules if result.status is not Status.PASSED]
            shut = verdict.exit_code != 0
            observe.expect(
                shut is bool(owed) and set(owed.split()) <= set(broken),
                f"with {what} the gate says {verdict.status}, and breaks {', '.join(broken) or 'no rule'}; "
                f"expected {owed or 'none'}",
            )
    observe.say(f"{len(cases)} runs decided, green where nothing is wrong")


@check(
    "harness.specimens",
    kills=(
        "first_row_only",
        "sixty_four_values_only",
        "one_stage_recorded",
        "noise_explains_all",
        "choices_excused_too_far",
        "choices_not_followed",
        "engine_errors_pass",
        "batch_exception_swallowed",
        "non_ascii_skipped",
        "weights_sixty_four",
        "own_sha",
        "op_bounds_tripled",
        "refused_by_anything",
        "controls_excused",
    ),
)
def test_specimens(observe: Observer, tmp_path: Path) -> None:
    """What is wrong where it is hard to see is found by the suites' own code, and what is sound passes."""
    with harness_specimens.opened(tmp_path) as specimens:
        told = [(each.name, wrong, *each.verdict(wrong)) for each in specimens for wrong in (False, True)]
    with faults.only(()):
        for name, wrong, found, sentence in told:
            observe.saw(1, oracle="what was made wrong, and what was not")
            owed = Status.FAILED if wrong else Status.PASSED
            case = f"{name}, {'wrong' if wrong else 'sound'}"
            observe.expect(found is owed, f"{case}: expected {owed}, was found {found}: {sentence}")
    observe.say(f"{len(told) // 2} cases, each passed as it is and failed with one thing wrong")
