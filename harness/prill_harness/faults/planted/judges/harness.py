"""Faults of the harness itself: of its oracle, its goldens, its judges and what it counts as seen."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from prill_harness.engines.embedded import Embedded
from prill_harness.engines.models import resolve_model
from prill_harness.numbers import compare
from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ANOTHER, ONE
from prill_harness.records.evidence import Status
from prill_harness.tokens import golden
from prill_harness.tokens.golden_pack import Packed
from prill_runtime.ops.numpy import NumpyBackend
from prill_runtime.run.model import Model

OPEN = "prill_harness.faults.opening:open_engine"
GOLDEN = "prill_harness.tokens.golden:golden_for"
PAIR = "prill_harness.numbers.compare:pair"
SQUARES = "prill_harness.numbers.compare:squares"
LANES = "prill_harness.numbers.lanes"
BLAMES = ("harness",)
OTHER = dict(zip(ONE, ANOTHER, strict=True))


# On llama-tiny, float32's rounding gives the golden's numbers token by token on some machines.
@fault(area="harness", blames=BLAMES, models=ANOTHER)
def oracle_is_candidate() -> Iterator[Patch]:
    """Where the oracle is asked for, another copy of the engine under test is opened."""

    def wrap(open_engine: Any) -> Any:
        return lambda spec, model: open_engine("numpy" if spec == "numpy64" else spec, model)

    yield Patch(OPEN, wrap)


class Single(Embedded):
    """An oracle that computes in the candidate's precision."""

    dtype = "float32"


@fault(area="harness", blames=BLAMES)
def oracle_in_single_precision() -> Iterator[Patch]:
    """The float64 oracle computes in float32."""

    def wrap(open_engine: Any) -> Any:
        return lambda spec, model: Single.open("", model) if spec == "numpy64" else open_engine(spec, model)

    yield Patch(OPEN, wrap)


@fault(area="harness", blames=BLAMES)
def expected_is_actual() -> Iterator[Patch]:
    """What is expected is cloned from what the engine gave."""

    def wrap(pair: Any) -> Any:
        def cloned(oracle: Any, candidate: Any) -> Any:
            _, b = pair(oracle, candidate)
            return b.copy(), b

        return cloned

    yield Patch(PAIR, wrap)


@fault(area="harness", blames=BLAMES)
def expected_trace_is_actual() -> Iterator[Patch]:
    """The stages that are expected are those of the engine under test."""
    kept: dict[tuple[int, ...], Any] = {}

    def wrap(capture: Any) -> Any:
        return lambda engine, ids, *rest: kept.setdefault(tuple(ids), capture(engine, ids, *rest))

    yield Patch("prill_harness.stages.trace:capture", wrap)


@fault(area="harness", blames=BLAMES)
def check_body_empty() -> Iterator[Patch]:
    """No check has a body."""

    def wrap(check: Any) -> Any:
        def marking(*given: Any, **named: Any) -> Any:
            mark = check(*given, **named)
            return lambda function: mark(functools.wraps(function)(lambda **fixtures: None))

        return marking

    yield Patch("prill_harness.run.checks:check", wrap)


@fault(area="harness", blames=BLAMES)
def model_missing_skipped() -> Iterator[Patch]:
    """A model file that is not there makes every check that needs it a skip."""

    def missing(*given: Any) -> Any:
        pytest.skip(f"{given[-1]} is not there")

    for target in (OPEN, GOLDEN):
        yield Patch(target, lambda original: missing)


class WrongEpsilon(NumpyBackend):
    """An engine whose norms add ten times the epsilon."""

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return super().rms_norm(x, weight, 10 * eps)

    def layer_norm(self, x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return super().layer_norm(x, weight, bias, 10 * eps)


@fault(area="harness", blames=BLAMES)
def golden_from_broken_engine() -> Iterator[Patch]:
    """The golden was recorded from an engine with a wrong epsilon."""

    def broken(model: Any, prompt: Any) -> Any:
        rows = golden.forced(model, prompt.sequence)[len(prompt.ids) - 1 :]
        logprobs = np.take_along_axis(compare.log_softmax(rows), prompt.top_ids.array, axis=-1)
        return msgspec.structs.replace(prompt, top_logprobs=Packed.of(logprobs.astype(np.float32)))

    def wrap(golden_for: Any) -> Any:
        def recorded(spec: Any, *rest: Any) -> Any:
            sound = golden_for(spec, *rest)
            with Model.load(resolve_model(spec), backend=WrongEpsilon("float64")) as model:
                return msgspec.structs.replace(sound, prompts=[broken(model, p) for p in sound.prompts])

        return recorded

    yield Patch(GOLDEN, wrap)


@fault(area="harness", blames=BLAMES, models=ONE)
def golden_of_another_model() -> Iterator[Patch]:
    """The golden in use was recorded from another model's file."""
    yield Patch(GOLDEN, lambda golden_for: lambda spec, *rest: golden_for(OTHER.get(str(spec), spec), *rest))


@fault(area="harness", blames=BLAMES)
def stale_golden_unnoticed() -> Iterator[Patch]:
    """Whether a golden is still what the oracle says is never looked at."""
    yield Patch("prill_harness.tokens.sides:check_stale", lambda check: lambda golden, oracle, *rest: None)
    yield Patch("prill_harness.tokens.sides:gap_at", lambda gap: lambda number, prompt, logits: None)


@fault(area="harness", blames=BLAMES)
def nan_is_no_difference() -> Iterator[Patch]:
    """Values that are not finite are left out of the difference."""

    def wrap(squares: Any) -> Any:
        def without(oracle: Any, candidate: Any) -> Any:
            finite = np.isfinite(oracle) & np.isfinite(candidate)
            return squares(oracle[finite], candidate[finite])

        return without

    yield Patch(SQUARES, wrap)


@fault(area="harness", blames=BLAMES)
def truncated_comparison() -> Iterator[Patch]:
    """Of two lengths the shorter one is compared."""

    def wrap(pair: Any) -> Any:
        def shorter(oracle: Any, candidate: Any) -> Any:
            rows = min(len(oracle), len(candidate))
            return pair(oracle[:rows], candidate[:rows])

        return shorter

    yield Patch(PAIR, wrap)


@fault(area="harness", blames=BLAMES)
def truncated_tokens_agree() -> Iterator[Patch]:
    """A text that stops early agrees with the golden as far as it goes."""

    def wrap(first_difference: Any) -> Any:
        def shorter(expected: Any, got: Any) -> Any:
            count = min(len(expected), len(got))
            return first_difference(expected[:count], got[:count])

        return shorter

    for module in ("divergence", "judge"):
        yield Patch(f"prill_harness.tokens.{module}:first_difference", wrap)


@fault(area="harness", blames=BLAMES)
def bounds_widened() -> Iterator[Patch]:
    """Every bound is ten times what the noise asks for."""

    def wrap(bounds: Any) -> Any:
        return lambda lane, floor: bounds(replace(lane, ratio=10 * lane.ratio), floor)

    yield Patch(f"{LANES}:bounds", wrap)


@fault(area="harness", blames=BLAMES)
def near_ties_unbudgeted() -> Iterator[Patch]:
    """Any number of flipped tokens is as good as the margin profile's."""
    yield Patch(f"{LANES}:poisson_upper", lambda upper: lambda expected, *rest: 1_000_000)


@fault(area="harness", blames=BLAMES)
def every_flip_is_a_tie() -> Iterator[Patch]:
    """A wrong token counts as a near tie, however far it is from the best."""
    yield Patch("prill_harness.numbers.compare:Margin.near_tie", lambda near: property(lambda self: True))


@fault(area="harness", blames=BLAMES)
def silence_passes() -> Iterator[Patch]:
    """A check that saw nothing is written down as one that saw something and passed."""

    def wrap(finished: Any) -> Any:
        def passed(observer: Any) -> tuple[Status, str]:
            observer.observed, observer.oracle = max(1, observer.observed), observer.oracle or "nothing"
            return finished(observer)  # type: ignore[no-any-return]

        return passed

    yield Patch("prill_harness.run.outcomes:finished", wrap)


@fault(area="harness", blames=BLAMES)
def expectations_ignored() -> Iterator[Patch]:
    """What a check expects is not looked at."""
    yield Patch("prill_harness.run.checks:Observer.expect", lambda expect: lambda *given, **detail: None)


@fault(area="harness", blames=BLAMES)
def metrics_unbounded() -> Iterator[Patch]:
    """A measured value is noted beside its bound and never held to it."""

    def wrap(metric: Any) -> Any:
        return lambda self, name, value, **bound: metric(self, name, value)

    yield Patch("prill_harness.run.checks:Observer.metric", wrap)


@fault(area="harness", blames=BLAMES)
def crash_is_failure() -> Iterator[Patch]:
    """A crash of the check itself counts as a finding about the engine."""

    def wrap(raised: Any) -> Any:
        def found(*given: Any, **named: Any) -> tuple[Status, str]:
            status, sentence = raised(*given, **named)
            return (Status.FAILED if status is Status.ERROR else status), sentence

        return found

    yield Patch("prill_harness.run.outcomes:raised", wrap)


@fault(area="harness", blames=BLAMES)
def exit_code_lost() -> Iterator[Patch]:
    """A run ends with exit code 0 whatever its checks came to."""
    yield Patch("prill_harness.recording.recorder:Recorder._exit_code", lambda code: lambda self, own: 0)
