"""Compare a candidate's trace with the oracle's: the first wrong stage, and why it is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.base import Capability, Engine
from prill_harness.numbers.compare import nmse
from prill_harness.stages.bounds import Bound
from prill_harness.stages.findings import (
    Diagnosis,
    Finding,
    StageResult,
    figures,
    grouped,
    hidden,
    verdict,
)
from prill_harness.stages.hypotheses.known import Case, Raw, Weight, explain
from prill_harness.stages.localise import localise
from prill_harness.stages.trace import Trace, capture, fit
from prill_runtime.errors import EngineError, Inconclusive, NotANumber
from prill_runtime.models.base import Stage
from prill_runtime.models.nodes.attention import Attention
from prill_runtime.models.nodes.experts import ExpertLinear, Experts
from prill_runtime.models.nodes.network import Embed
from prill_runtime.models.nodes.rope import Rope

__all__ = ["Finding", "Report", "StageResult", "Subject", "bisect"]
Array = NDArray[np.float64]
# These depend on the position of a row, which a trace of only the last rows does not tell.
_PLACED = (Embed, Rope, Attention)


@dataclass(frozen=True)
class Report:
    """The result of a walk; `missing` are stages that the candidate did not show."""

    stages: tuple[StageResult, ...]
    findings: tuple[Finding, ...]
    missing: tuple[str, ...]
    observed: int
    sentence: str

    @property
    def ok(self) -> bool:
        return not self.findings


@dataclass(frozen=True)
class Subject:
    """What the walk knows of the model: weights as float64, bytes as they lie in the file, and every stage by
    name, in execution order."""

    weight: Weight
    raw: Raw
    table: Mapping[str, Stage]


@dataclass(frozen=True)
class Walk:
    """One isolated walk: what was computed, what should have been, and from which inputs, by stage.

    Attributes:
        unjudged: stages whose own input was not finite.
    """

    got: Mapping[str, Array]
    want: Mapping[str, Array]
    inputs: Mapping[str, Array]
    odd: Mapping[str, tuple[int, ...]]
    unjudged: frozenset[str] = frozenset()


def bisect(
    candidate: Engine | Trace,
    oracle: Engine,
    ids: Sequence[int],
    subject: Subject,
    bounds: Mapping[str, Bound],
) -> Report:
    """Walk the stages free-running, then isolated.

    An engine that accepts replacements for stages is fed the oracle's values. Any other engine, and a trace
    from a file, cannot be fed; then the oracle's stages are fed the candidate's values, which compares the
    same stages on the same inputs.

    Args:
        bounds: stage -> what the lane's noise may leave in isolation.

    Raises:
        Inconclusive: the two have no stage in common, or the candidate shows none.
    """
    truth = capture(oracle, ids).stages
    table = subject.table
    broken: NotANumber | None = None
    shown = candidate if isinstance(candidate, Trace) else Trace((), {})
    try:
        shown = candidate if isinstance(candidate, Trace) else capture(candidate, ids)
        free, odd = fit(shown, truth, table)
    except NotANumber as error:
        broken, free, odd = error, {}, {}
    if not (free or odd or broken):
        expected, got = ", ".join(list(truth)[:3]), ", ".join(shown.unknown[:3]) or "nothing"
        raise Inconclusive("the traces have no stage in common", expected=f"{expected} …", got=got)
    try:
        if isinstance(candidate, Engine) and Capability.REPLACE in candidate.info.capabilities:
            alone, odd = fit(capture(candidate, ids, truth), truth, table)
            walk = Walk(alone, truth, truth, odd)
        elif broken:
            raise broken
        else:
            walk = _fed(oracle, ids, truth, free, odd, table)
    except NotANumber as error:
        return _broken(error, truth)
    return _report(walk, free, truth, ids, subject, bounds)


def _fed(
    oracle: Engine,
    ids: Sequence[int],
    truth: Mapping[str, Array],
    own: Mapping[str, Array],
    odd: Mapping[str, tuple[int, ...]],
    table: Mapping[str, Stage],
) -> Walk:
    """Feed the candidate's values to the oracle's stages; the oracle computes those that it does not show."""
    whole: dict[str, Array] = {}
    for name, array in own.items():
        above = truth[name][: len(truth[name]) - len(array)]
        filled = np.concatenate([above, array])
        whole[name] = np.where(np.isfinite(filled), filled, truth[name])
    want = capture(oracle, ids, whole).stages
    spoiled = {name for name, array in own.items() if not np.isfinite(array).all()}
    unjudged = frozenset(
        name for name in own if spoiled & {*table[name].inputs, *hidden_sources(table[name], table, own)}
    )
    return Walk(own, want, {**want, **whole}, odd, unjudged)


def hidden_sources(stage: Stage, table: Mapping[str, Stage], shown: Mapping[str, object]) -> set[str]:
    """The shown stages that this one is computed from through stages that are not shown."""
    return {source for name in hidden(stage, table, shown) for source in table[name].inputs}


def _broken(error: NotANumber, truth: Mapping[str, Array]) -> Report:
    """The report for an engine that stopped at a value that is not finite, and shows no stages."""
    stage = error.where or "logits"
    sentence = f"{stage} is wrong: {error.what}, and the engine stopped there without showing its stages"
    finding = Finding((stage,), math.inf, error.what, None, sentence)
    said = verdict((), (finding,), ())
    return Report((), (finding,), tuple(truth), int(truth[stage].size) if stage in truth else 1, said)


def _report(
    walk: Walk,
    free: Mapping[str, Array],
    truth: Mapping[str, Array],
    ids: Sequence[int],
    subject: Subject,
    bounds: Mapping[str, Bound],
) -> Report:
    results: list[StageResult] = []
    wrong: list[Diagnosis] = []
    table, loosest = subject.table, Bound(max(bound.nmse for bound in bounds.values()))
    for name in truth:
        if name in walk.odd:
            fact = f"shape {walk.odd[name]}, expected {truth[name].shape}"
            wrong.append(Diagnosis(table[name], math.inf, fact))
        if name not in walk.got:
            continue
        got = walk.got[name]
        want = walk.want[name][-len(got) :]
        judged = name not in walk.unjudged
        apart = nmse(truth[name][-len(free[name]) :], free[name]) if name in free else math.nan
        bound = bounds.get(name, loosest)
        isolated = bound.apart(want, got) if judged else math.nan
        result = StageResult(name, apart, isolated, bound.nmse, int(got.size), judged)
        results.append(result)
        if not result.ok:
            fed = {source: array[-len(got) :] for source, array in walk.inputs.items()}
            inputs = tuple(fed[source] for source in table[name].inputs)
            case = Case(table[name], table, tuple(ids), inputs, want, got, subject.weight, subject.raw, fed)
            wrong.append(_diagnose(case, result, hidden(table[name], table, walk.got)))
    findings = grouped(wrong)
    if not results and not findings:
        raise EngineError("the engine shows other stages when some are replaced", expected="the same stages")
    missing = tuple(name for name in truth if name not in walk.got and name not in walk.odd)
    observed = sum(result.observed for result in results)
    return Report(tuple(results), findings, missing, observed, verdict(results, findings, missing))


def _diagnose(case: Case, result: StageResult, unseen: tuple[str, ...]) -> Diagnosis:
    fact = figures(result.isolated, result.bound)
    bad = ~np.isfinite(case.got)
    if bad.any():
        count = int(bad.sum())
        noun = "value is" if count == 1 else "values are"
        fact = f"{count} of {bad.size} {noun} NaN or infinite"
        return Diagnosis(case.stage, result.isolated, fact, localise(case.got, case.want), hidden=unseen)
    node = case.stage.node
    heads = node.heads if isinstance(node, Attention) else 0
    whole = len(case.got) == len(case.ids) or not isinstance(node, _PLACED)
    reason = explain(case, result.bound) if whole else None
    noun = "chosen expert" if isinstance(node, Experts | ExpertLinear) else "head"
    where = localise(case.got, case.want, heads, noun)
    return Diagnosis(case.stage, result.isolated, fact, where, reason, unseen)
