"""Two traces go in, a candidate's and the oracle's; the first wrong stage, and why it is wrong, comes out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cupel_harness.compare import nmse
from cupel_harness.engines.base import Capability, Engine
from cupel_harness.hypotheses import Case, Explanation, explain
from cupel_harness.localise import localise
from cupel_harness.stages import Stage, stage_table
from cupel_harness.trace import Trace, capture
from cupel_runtime.errors import Inconclusive

Array = NDArray[np.float64]
Weight = Callable[[str], Array | None]
Raw = Callable[[str], tuple[NDArray[np.uint8], str] | None]


@dataclass(frozen=True)
class StageResult:
    """One stage under both walks.

    Attributes:
        free: NMSE of the two free runs here; isolated: NMSE given the right input; bound: what the lane's
            own noise may leave in isolation.
    """

    stage: str
    free: float
    isolated: float
    bound: float
    observed: int

    @property
    def ok(self) -> bool:
        return self.isolated <= self.bound


@dataclass(frozen=True)
class Finding:
    """One cause: the stages it makes wrong, first first, and the clauses that explain it."""

    stages: tuple[str, ...]
    nmse: float
    where: str
    explanation: Explanation | None
    sentence: str


@dataclass(frozen=True)
class Report:
    """What the walk found. `missing` are stages the candidate did not show."""

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
    """What the walk knows of the model: configuration, weights as float64, bytes as they lie in the file."""

    config: Mapping[str, int | float | str | bool]
    weight: Weight
    raw: Raw

    @property
    def table(self) -> dict[str, Stage]:
        return stage_table(str(self.config["architecture"]), int(self.config["n_layers"]))


def bisect(
    candidate: Engine | Trace,
    oracle: Engine,
    ids: Sequence[int],
    subject: Subject,
    bounds: Mapping[str, float],
) -> Report:
    """Walk the stages free-running, then isolated.

    An engine that can take a stage's value from outside is fed the oracle's. A trace from a file cannot be:
    there the oracle's stages are fed the candidate's values, which judges the same stages by the same
    inputs.

    Args:
        bounds: stage -> NMSE that the lane's noise may leave in isolation.

    Raises:
        Inconclusive: the two have no stage in common.
    """
    truth = capture(oracle, ids)
    free = candidate if isinstance(candidate, Trace) else capture(candidate, ids)
    replaceable = isinstance(candidate, Engine) and Capability.REPLACE in candidate.info.capabilities
    if replaceable:
        assert isinstance(candidate, Engine)
        got, want, inputs = capture(candidate, ids, truth.stages).stages, truth.stages, truth.stages
    else:
        own = {name: array.reshape(truth.stages[name].shape) for name, array in _shared(free, truth).items()}
        got, want, inputs = own, capture(oracle, ids, own).stages, {**truth.stages, **own}
    shared = _shared(free, truth)
    if not shared:
        raise Inconclusive(
            "the traces have no stage in common", expected=list(truth.stages)[:3], got=list(free.unknown)[:3]
        )
    results, cases = [], []
    for name in shared:
        there, here = want[name], np.asarray(got[name]).reshape(want[name].shape)
        result = StageResult(
            name, nmse(truth.stages[name], shared[name].reshape(truth.stages[name].shape)), nmse(there, here),
            bounds.get(name, max(bounds.values())), int(there.size),
        )  # fmt: skip
        results.append(result)
        if not result.ok:
            stage = subject.table[name]
            sources = tuple(inputs[source] for source in stage.inputs)
            known = (subject.weight, subject.raw)
            cases.append((result, Case(stage, subject.config, tuple(ids), sources, there, here, *known)))
    findings = _group([(result, *_diagnose(case, result.bound)) for result, case in cases])
    missing = tuple(name for name in truth.stages if name not in shared)
    observed = sum(result.observed for result in results)
    return Report(tuple(results), findings, missing, observed, _sentence(results, findings, missing))


def _shared(candidate: Trace, truth: Trace) -> dict[str, Array]:
    """The candidate's arrays of stages the oracle has, of equal size, in the oracle's order."""
    return {
        name: candidate.stages[name]
        for name, array in truth.stages.items()
        if name in candidate.stages and candidate.stages[name].size == array.size
    }


def _diagnose(case: Case, bound: float) -> tuple[str, Explanation | None]:
    if not np.isfinite(case.got).all():
        count = int((~np.isfinite(case.got)).sum())
        return f"{count} values are NaN or infinite although the input is finite", None
    heads = int(case.number("n_heads")) if case.stage.kind == "attn" else 0
    return localise(case.got, case.want, heads), explain(case, bound)


def _group(found: Sequence[tuple[StageResult, str, Explanation | None]]) -> tuple[Finding, ...]:
    """Stages with the same explanation in several blocks, or in q and k, are one cause."""
    groups: dict[str, list[tuple[StageResult, str, Explanation | None]]] = {}
    for result, where, explanation in found:
        kind = result.stage.rpartition(".")[2]
        clause = re.sub(r"blk\.\d+", "", explanation.clause) if explanation else f"{kind}: {where}"
        groups.setdefault(clause, []).append((result, where, explanation))
    return tuple(_finding(group) for group in groups.values())


def _finding(group: Sequence[tuple[StageResult, str, Explanation | None]]) -> Finding:
    first, where, explanation = group[0]
    clauses = [f"NMSE {first.isolated:.2g}, at most {first.bound:.2g}", "its input was right"]
    if where:
        clauses.append(where)
    if explanation:
        clauses.append(f"explained by: {explanation.clause} (NMSE left {explanation.nmse:.1g})")
    stages = tuple(result.stage for result, _, _ in group)
    if len(stages) > 1:
        clauses.append(f"the same in {', '.join(stages[1:4])}{' …' if len(stages) > 4 else ''}")
    sentence = f"{first.stage} is wrong: {'; '.join(clauses)}"
    return Finding(stages, first.isolated, where, explanation, sentence)


def _sentence(results: Sequence[StageResult], findings: Sequence[Finding], missing: Sequence[str]) -> str:
    gap = f" ({len(missing)} stages not shown, {missing[0]} the first)" if missing else ""
    if not findings:
        worst = max(results, key=lambda r: r.isolated / r.bound)
        return (
            f"all {len(results)} stages agree; {worst.stage} comes closest to its bound, "
            f"NMSE {worst.isolated:.2g} of {worst.bound:.2g}{gap}"
        )
    first = findings[0].sentence.replace(" is wrong:", " is the first wrong stage:", 1)
    others = "; ".join(finding.sentence for finding in findings[1:3])
    more = f"; and {len(findings) - 1} more: {others}" if others else ""
    return first + more + gap
