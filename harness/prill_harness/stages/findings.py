"""Group wrong stages into findings, one for each cause, and put them into a sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prill_harness.stages.hypotheses.known import Explanation
from prill_runtime.models.base import Stage

SAID_FINDINGS = 3  # in the sentence; the report has all of them


@dataclass(frozen=True)
class StageResult:
    """One stage under both walks.

    Attributes:
        free: NMSE of the two free runs here; isolated: NMSE given the right input; bound: what the lane's
            own noise may leave in isolation. NaN where a walk could not be made.
        judged: False when the candidate's own input to this stage was not finite.
    """

    stage: str
    free: float
    isolated: float
    bound: float
    observed: int
    judged: bool = True

    @property
    def ok(self) -> bool:
        return self.isolated <= self.bound or not self.judged


@dataclass(frozen=True)
class Diagnosis:
    """A wrong stage: where it is wrong, why, and which stages before it are not shown.

    Attributes:
        fact: the number that condemns it ("NMSE 0.31, at most 2e-11", "shape (3, 4), expected (3, 5)").
        where: a clause ("only tokens 128 to 299"); empty if it is wrong everywhere.
        hidden: stages between this one and the inputs it was judged by, which the candidate does not show.
    """

    stage: Stage
    nmse: float
    fact: str
    where: str = ""
    explanation: Explanation | None = None
    hidden: tuple[str, ...] = ()

    @property
    def cause(self) -> str:
        """A key that is equal for stages made wrong by one mistake, in whatever block or projection."""
        if self.explanation is None:
            return f"{family(self.stage.kind)}: {self.where or 'everywhere'}"
        clause = self.explanation.clause
        for stem in sorted(self.stage.tensors, key=len, reverse=True):
            clause = clause.replace(stem, "·")
        if clause.startswith("scaled by "):  # the factor may differ from block to block
            return f"{family(self.stage.kind)}: scaled"
        return re.sub(r"blk\.\d+\.", "", clause)


def family(kind: str) -> str:
    """The family of a kind of stage: kinds that one op computes share it."""
    return {"q": "qkv", "k": "qkv", "v": "qkv", "k_rope": "q_rope", "ffn_norm": "attn_norm",
            "output_norm": "attn_norm", "out": "ffn_in"}.get(kind, kind)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One cause: the stages that it makes wrong, in execution order, and the clauses that explain it."""

    stages: tuple[str, ...]
    nmse: float
    where: str
    explanation: Explanation | None
    sentence: str


def grouped(wrong: Iterable[Diagnosis]) -> tuple[Finding, ...]:
    """One finding for each cause, in the order of their first stages."""
    causes: dict[str, list[Diagnosis]] = {}
    for diagnosis in wrong:
        causes.setdefault(diagnosis.cause, []).append(diagnosis)
    return tuple(_finding(cause) for cause in causes.values())


def _finding(cause: Sequence[Diagnosis]) -> Finding:
    first = cause[0]
    clauses = [first.fact, "its input was right"]
    if first.hidden:
        either = " or ".join(filter(None, (", ".join(first.hidden[:-1]), first.hidden[-1])))
        clauses.append(f"the mistake may also be in {either}, which the candidate does not show")
    if first.where:
        clauses.append(first.where)
    if first.explanation:
        clauses.append(f"explained by: {first.explanation.clause}")
    others = [diagnosis.stage for diagnosis in cause[1:]]
    if others:
        clauses.append(f"the same in {also(first.stage, others)}")
    stages = tuple(diagnosis.stage.name for diagnosis in cause)
    sentence = f"{first.stage.name} is wrong: {'; '.join(clauses)}"
    return Finding(stages, first.nmse, first.where, first.explanation, sentence)


def also(first: Stage, others: Sequence[Stage]) -> str:
    """The other stages of a cause in few words: "k_rope and in blk.1–blk.3", "blk.2", "output_norm"."""
    layers: dict[str, set[int]] = {}
    outside = [stage.name for stage in others if stage.layer is None]
    for stage in (first, *others):
        if stage.layer is not None:
            layers.setdefault(stage.kind, set()).add(stage.layer)
    kinds, every = list(layers), [tuple(sorted(found)) for found in layers.values()]
    words: list[str] = []
    if first.layer is not None and len(set(every)) == 1:
        words = [kind for kind in kinds if kind != first.kind]
        if rest := [layer for layer in every[0] if layer != first.layer]:
            words.append(("in " if words else "") + _blocks(rest))
    else:
        for kind, found in layers.items():
            left = sorted(found - {first.layer} if kind == first.kind else found)
            if left:
                words.append(f"{kind} of {_blocks(left)}")
    words += outside
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _blocks(layers: Sequence[int]) -> str:
    if len(layers) > 2 and layers[-1] - layers[0] + 1 == len(layers):
        return f"blk.{layers[0]}–blk.{layers[-1]}"
    return ", ".join(f"blk.{layer}" for layer in layers)


def verdict(results: Sequence[StageResult], findings: Sequence[Finding], missing: Sequence[str]) -> str:
    """The whole walk in one sentence."""
    gap = ""
    if missing:
        named = f"{len(missing)} stages were not shown, {missing[0]} the first"
        gap = f" ({missing[0]} was not shown)" if len(missing) == 1 else f" ({named})"
    if not findings:
        worst = max(results, key=lambda r: r.isolated / r.bound if r.judged else 0.0)
        if len(results) == 1:
            return f"{worst.stage} agrees: {figures(worst.isolated, worst.bound)}{gap}"
        return (
            f"all {len(results)} stages agree; {worst.stage} comes closest to its bound: "
            f"{figures(worst.isolated, worst.bound)}{gap}"
        )
    first = findings[0].sentence.replace(" is wrong:", " is the first wrong stage:", 1)
    others = "; ".join(finding.sentence for finding in findings[1:SAID_FINDINGS])
    left = len(findings) - SAID_FINDINGS
    more = f"; and {len(findings) - 1} more: {others}" if others else ""
    return first + more + (f"; and {left} others" if left > 1 else "; and another" if left == 1 else "") + gap


def figures(value: float, bound: float) -> str:
    """A measured NMSE and its bound, as a clause."""
    return f"NMSE {'infinite' if math.isinf(value) else f'{value:.2g}'}, at most {bound:.2g}"


def hidden(stage: Stage, table: Mapping[str, Stage], shown: Mapping[str, object]) -> tuple[str, ...]:
    """Stages between this one and the nearest shown ones, in execution order."""
    found: set[str] = set()
    pending = [name for name in stage.inputs if name not in shown]
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += [source for source in table[name].inputs if source not in shown]
    return tuple(name for name in table if name in found)
