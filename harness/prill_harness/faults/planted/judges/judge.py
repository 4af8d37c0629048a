"""Faults of the harness that weaken a judge and leave it looking whole: comparer, recorder, gatherer, gate,
and what the suites share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from prill_harness.planting.faults import Patch, fault
from prill_harness.planting.tools import ONE, around
from prill_harness.records.evidence import CellEnded, Evidence, Status
from prill_harness.records.ledger import Ledger, read
from prill_harness.stages.trace import Trace
from prill_harness.tokens.steps import StepResult
from prill_runtime.errors import EngineError

BLAMES = ("harness",)
COMPARE = "prill_harness.numbers.compare"
ROUTING = "prill_harness.stages.routing"
WIDER = 3.0

# --- the comparer -----------------------------------------------------------------------------------------


@fault(area="harness", blames=BLAMES)
def first_row_only() -> Iterator[Patch]:
    """Of arrays with several rows the first is compared."""

    def first(pair: Any, oracle: Any, candidate: Any) -> Any:
        a, b = pair(oracle, candidate)
        return (a[:1], b[:1]) if a.ndim > 1 else (a, b)

    yield around(f"{COMPARE}:pair", first)


@fault(area="harness", blames=BLAMES)
def sixty_four_values_only() -> Iterator[Patch]:
    """Of an array the first 64 values are compared."""
    yield around(f"{COMPARE}:squares", lambda squares, a, b: squares(a.ravel()[:64], b.ravel()[:64]))


@fault(area="harness", blames=BLAMES)
def last_rows_forgotten() -> Iterator[Patch]:
    """The last tenth of a sequence is left out of its figures."""

    def most(add: Any, self: Any, oracle: Any, candidate: Any, *rest: Any) -> None:
        rows = len(oracle) - len(oracle) // 10
        add(self, oracle[:rows], candidate[:rows], *rest)

    yield around("prill_harness.numbers.lanes:LogitTally.add", most)


@fault(area="harness", blames=BLAMES)
def nan_lost_in_maximum() -> Iterator[Patch]:
    """A position whose logits are not finite drops out of every maximum."""

    def spread(original: Any, self: Any, values: Any) -> Any:
        found = original(self, values)
        return np.where(self.sound, found, 0.0)

    yield around(f"{COMPARE}:Logprobs.spread", spread)
    yield around("prill_harness.tokens.judge:_golden_gap", lambda gap, prompt, forced: 0.0)
    yield around(f"{COMPARE}:squares", _finite_squares)


def _finite_squares(squares: Any, oracle: Any, candidate: Any) -> Any:
    finite = np.isfinite(oracle) & np.isfinite(candidate)
    return squares(oracle[finite], candidate[finite])


@fault(area="harness", blames=BLAMES)
def last_bucket_lost() -> Iterator[Patch]:
    """Positions past 256 are in no bucket."""

    def early(bucket_max: Any, values: Any, positions: Any) -> Any:
        return {k: v for k, v in bucket_max(values, positions).items() if k != "257+"}

    yield around(f"{COMPARE}:bucket_max", early)


@fault(area="harness", blames=BLAMES)
def bounds_tripled() -> Iterator[Patch]:
    """Every bound is three times what the noise asks for."""
    yield around(
        "prill_harness.numbers.lanes:bounds",
        lambda bounds, lane, floor: bounds(replace(lane, ratio=WIDER * lane.ratio), floor),
    )


@fault(area="harness", blames=BLAMES)
def metric_bounds_loose() -> Iterator[Patch]:
    """A measured value may be three times its bound."""

    def loose(metric: Any, self: Any, name: str, value: float, **bound: Any) -> None:
        if bound.get("at_most") is not None:
            bound["at_most"] *= WIDER
        metric(self, name, value, **bound)

    yield around("prill_harness.run.checks:Observer.metric", loose)


@fault(area="harness", blames=BLAMES)
def one_stage_recorded() -> Iterator[Patch]:
    """Of an engine's trace the first stage alone is kept."""

    def first(capture: Any, *given: Any) -> Trace:
        trace: Trace = capture(*given)
        return replace(trace, stages=dict(list(trace.stages.items())[:1]))

    yield around("prill_harness.stages.trace:capture", first)


@fault(area="harness", blames=BLAMES)
def noise_explains_all() -> Iterator[Patch]:
    """Whatever is out of bound is taken for noise."""
    yield around("prill_suites.stages_noise:Noise.explains", lambda explains, *given: True)


@fault(area="harness", blames=BLAMES)
def choices_excused_too_far() -> Iterator[Patch]:
    """The oracle follows an engine's choice of experts across twice the gap that noise explains."""
    yield around(f"{ROUTING}:noise_of", lambda noise_of, *given: {
        stage: 2 * noise for stage, noise in noise_of(*given).items()})  # fmt: skip


@fault(area="harness", blames=BLAMES)
def choices_not_followed() -> Iterator[Patch]:
    """An engine is held to the oracle's experts also where noise decides between them and others."""
    yield around(f"{ROUTING}:follow", lambda follow, *given: None)


# --- what a check's end comes to ---------------------------------------------------------------------------


@fault(area="harness", blames=BLAMES)
def engine_errors_pass() -> Iterator[Patch]:
    """An engine that stops in the middle of a check has passed it."""

    def passed(raised: Any, error: BaseException, **named: Any) -> tuple[Status, str]:
        stops = isinstance(error, EngineError)
        return (Status.PASSED, "stopped") if stops else raised(error, **named)

    yield around("prill_harness.run.outcomes:raised", passed)


@fault(area="harness", blames=BLAMES)
def failure_is_skip() -> Iterator[Patch]:
    """A check that fails is written down as one that was skipped."""

    def skipped(raised: Any, *given: Any, **named: Any) -> tuple[Status, str]:
        status, sentence = raised(*given, **named)
        return (Status.INCONCLUSIVE if status is Status.FAILED else status), sentence

    yield around("prill_harness.run.outcomes:raised", skipped)


@fault(area="harness", blames=BLAMES)
def seen_counted_twice() -> Iterator[Patch]:
    """What a check saw counts double, so that half of it is enough."""
    yield around(
        "prill_harness.run.checks:Observer.saw",
        lambda saw, self, count, **named: saw(self, 2 * count, **named),
    )


@fault(area="harness", blames=BLAMES)
def batch_exception_swallowed() -> Iterator[Patch]:
    """What a batch raises is taken for a batch that was right."""

    def quiet(compare: Any, *given: Any) -> Any:
        found = compare(*given)
        stopped = found.sentence.startswith("the engine stopped")
        return StepResult(found.step, True, "nothing stopped", 1) if stopped else found

    for step in ("greedy", "sampled"):
        yield around(f"prill_harness.tokens.judge:compare_{step}", quiet)


# --- what the suites share ---------------------------------------------------------------------------------


@fault(area="harness", blames=BLAMES)
def non_ascii_skipped() -> Iterator[Patch]:
    """Texts that are not ASCII are left out of what a tokenizer is tried on."""

    def plain(texts: Any) -> Any:
        return tuple(text for text in texts if text.isascii())

    yield Patch("prill_suites.tokenizer:HARD_TEXTS", plain)
    yield around("prill_suites.tokenizer:own_texts", lambda own, twin: list(plain(own(twin))))
    yield around("prill_suites.tokenizer:long_text", lambda long: "".join(filter(str.isascii, long())))


@fault(area="harness", blames=BLAMES)
def weights_sixty_four() -> Iterator[Patch]:
    """Of a tensor's weights the first 64 are compared with the file's."""

    def few(strips: Any, tensor: Any) -> Iterator[Any]:
        row, values = next(strips(tensor))
        yield row, values[: max(1, 64 // values.shape[1])]

    yield around("prill_suites.file:strips", few)


@fault(area="harness", blames=BLAMES)
def own_sha() -> Iterator[Patch]:
    """A packaged file is held against its own digest and not against the recorded one."""
    yield around("prill_suites.file:fixture_name", lambda fixture_name, spec: None)


@fault(area="harness", blames=BLAMES, models=ONE)
def golden_cut_short() -> Iterator[Patch]:
    """Of a golden's prompts the longest alone are looked at."""

    def cut(golden_for: Any, *given: Any) -> Any:
        golden = golden_for(*given)
        longest = max(len(p.ids) + len(p.tokens) for p in golden.prompts)
        kept = [p for p in golden.prompts if len(p.ids) + len(p.tokens) == longest]
        return msgspec.structs.replace(golden, prompts=kept)

    yield around("prill_harness.tokens.golden:golden_for", cut)


@fault(area="harness", blames=BLAMES)
def op_bounds_tripled() -> Iterator[Patch]:
    """An op may be three times as far from its twin as its arithmetic allows."""
    yield around("prill_suites.ops_bench:bound_of", lambda bound_of, engine: WIDER * bound_of(engine))


@fault(area="harness", blames=BLAMES)
def refused_by_anything() -> Iterator[Patch]:
    """Whatever is raised in the place of a refusal counts as one."""

    def any_end(refusal: Any, observe: Any, what: str, call: Any, *rest: Any) -> str:
        observe.saw(1, oracle="the end of the call")
        try:
            call()
        except Exception as error:
            return str(error)
        return "it was accepted"

    for module in ("common", "harness_specimens"):
        yield around(f"prill_suites.{module}:refusal", any_end)


@fault(area="harness", blames=BLAMES)
def controls_excused() -> Iterator[Patch]:
    """A control that does not differ is excused by the model, whatever the oracle says."""

    def excused(control: Any, self: Any, what: str, run: Any) -> str:
        return str(self.cannot_tell(what, 1, "nobody asked"))

    yield around("prill_suites.controls:Trial.control", excused)


# --- recorder, gatherer and gate ---------------------------------------------------------------------------


@fault(area="harness", blames=BLAMES)
def dead_cells_forgotten() -> Iterator[Patch]:
    """A cell that died is written down as one that ended."""

    def ended(account: Any, one: Any, cause: str) -> None:
        job = one.job
        records = read(job.ledger) if job.ledger.exists() else ()
        if not any(isinstance(record, CellEnded) for record in records):
            with Ledger(job.ledger) as ledger:
                ledger.append(CellEnded(job.cell, 0, 0.0, 0.0))

    yield around("prill_harness.run.pool:_account", ended)


@fault(area="harness", blames=BLAMES)
def gathering_drops_failures() -> Iterator[Patch]:
    """What failed is left out where the ledgers of cells are put together."""

    def kept(gather: Any, *given: Any) -> Any:
        records = gather(*given)
        return tuple(r for r in records if not isinstance(r, Evidence) or r.status is not Status.FAILED)

    yield around("prill_harness.run.gather:gather", kept)


@fault(area="harness", blames=BLAMES)
def merge_prefers_passed() -> Iterator[Patch]:
    """Of several records of one check the one that passed counts."""
    yield around("prill_harness.decide.gate:_badness", lambda badness, record: (-badness(record)[0], b""))


@fault(area="harness", blames=BLAMES)
def last_attempt_counts() -> Iterator[Patch]:
    """Of a check that was run again the last attempt counts, whatever came before."""
    yield around("prill_harness.decide.gate:_badness", lambda badness, record: (-record.attempt, b""))


@fault(area="harness", blames=BLAMES)
def errors_are_nothing() -> Iterator[Patch]:
    """Checks that ended in an error are left out of the verdict."""

    def without(decide: Any, policy: Any, plan: Any, records: Any, **named: Any) -> Any:
        found = tuple(records)
        broken = {(r.cell, r.check) for r in found if isinstance(r, Evidence) and r.status is Status.ERROR}
        whole = [r for r in found if not (isinstance(r, Evidence) and (r.cell, r.check) in broken)]
        return decide(policy, plan, [_planning(r, broken) for r in whole], **named)

    yield around("prill_harness.decide.gate:decide", without)


def _planning(record: Any, broken: Any) -> Any:
    """A cell's first record without the checks that broke."""
    if not hasattr(record, "planned"):
        return record
    planned = tuple(check for check in record.planned if (record.cell, check) not in broken)
    return msgspec.structs.replace(record, planned=planned)


@fault(area="harness", blames=BLAMES)
def cells_always_complete() -> Iterator[Patch]:
    """A cell that left half of its records, or none, counts as complete."""

    def complete(cell: Any, *given: Any) -> Any:
        return msgspec.structs.replace(cell(*given), status="complete", sentence="")

    yield around("prill_harness.decide.gate:_cell", complete)


@fault(area="harness", blames=BLAMES)
def kills_not_asked_for() -> Iterator[Patch]:
    """A check counts whether it was ever seen to fail or not."""
    yield around("prill_harness.faults.trial.kills:Kills.current", lambda current, *given: True)


@fault(area="harness", blames=BLAMES)
def one_kill_is_enough() -> Iterator[Patch]:
    """A check that was seen to kill one of the faults it claims need not kill the others."""

    def one(unkept: Any, self: Any, check: str, claimed: Any) -> Any:
        return () if set(claimed) & set(self.killed_by(check)) else unkept(self, check, claimed)

    yield around("prill_harness.faults.trial.kills:Kills.unkept", one)


@fault(area="harness", blames=BLAMES)
def lost_kills_forgiven() -> Iterator[Patch]:
    """A kill that was lost is asked for by nobody."""
    yield Patch(
        "prill_harness.decide.rules:RULES", lambda rules: {k: v for k, v in rules.items() if k != "owed"}
    )


@fault(area="harness", blames=BLAMES)
def open_incidents_let_through() -> Iterator[Patch]:
    """No gate waits for an incident."""
    yield Patch(
        "prill_harness.decide.rules:RULES", lambda rules: {k: v for k, v in rules.items() if k != "incidents"}
    )


@fault(area="harness", blames=BLAMES)
def amounts_not_held() -> Iterator[Patch]:
    """A check may see less than is on record."""
    yield around("prill_harness.decide.rules:fallen", lambda fallen, *given, **named: ())
