"""Expected and generated tokens come in; where they part, and whether noise explains it, goes out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prill_harness import compare as measure
from prill_harness import lanes
from prill_harness.engines.base import Capability, Engine
from prill_harness.engines.embedded import Embedded
from prill_harness.golden_pack import Golden, GoldenPrompt
from prill_harness.lanes import Figures, Lane
from prill_runtime.errors import UsageError
from prill_runtime.philox import philox_uniform
from prill_runtime.sampler import SamplingParams, filtered_distribution, sample

CONTEXT = 8
SHOWN = 5
REORDERED = 1e-9  # what float64 sums in another order may leave of a tie
Row = NDArray[np.floating]


def lane_of(engine: Engine, golden: Golden) -> tuple[Lane, Figures, Figures]:
    """The engine's lane on this golden's model, the lane's floor, and its bounds.

    Raises:
        UsageError: the golden has no floor for the lane.
    """
    lane = lanes.lane_for(golden.type, engine.info.arithmetic)
    if lane.name not in golden.floors:
        raise UsageError(
            "the golden has no noise floor for this lane",
            where=golden.name,
            expected=lane.name,
            got=" and ".join(golden.floors),
            hint="record it again",
        )
    floor = golden.floors[lane.name]
    return lane, floor, lanes.bounds(lane, floor)


def named(oracle: Embedded, ids: Sequence[int], at: int) -> str:
    """`412 " key"`: an id with its text, or "nothing" past the end."""
    if at >= len(ids):
        return "nothing"
    token = int(ids[at])
    if not 0 <= token < oracle.model.vocab_size:
        return f"{token} (outside the vocabulary)"
    text = oracle.model.tokenizer.piece(token).decode("utf-8", "backslashreplace")
    return f'{token} "{text}"'


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """Index of the first id that differs or that only one of them has; None when they are equal."""
    for at, (a, b) in enumerate(zip(expected, got, strict=False)):
        if a != b:
            return at
    return None if len(expected) == len(got) else min(len(expected), len(got))


@dataclass
class Divergences:
    """First divergences of several generations, sorted into ties, near ties and wrong ones."""

    engine: Engine
    golden: Golden
    oracle: Embedded
    observed: int = 0
    runs: int = 0
    ties: list[str] = field(default_factory=list)
    near: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    details: list[Mapping[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lane, self.floor, self.bound = lane_of(self.engine, self.golden)
        self.largest = lanes.tau(self.lane, self.floor, 0.0)

    def greedy(self, number: int, prompt: GoldenPrompt, got: Sequence[int]) -> None:
        """Judge one greedy continuation."""
        at = self._parted(f"prompt {number}", prompt.tokens, got)
        if at is None:
            return
        expected, taken = prompt.tokens[at], int(got[at])
        prefix = prompt.ids + prompt.tokens[:at]
        row, own = self._rows(prefix)
        here = f"prompt {number}: {self._first(at, prompt.tokens, got)}"
        margin = measure.margin_of(row, taken, lanes.tau(self.lane, self.floor, float(np.abs(row).max())))
        detail = self._detail(number, prompt, at, prompt.tokens, got, row, own)
        detail |= {"margin": margin.margin, "tau": margin.tau}
        today = int(measure.best_ids(row))
        if today != expected and not measure.margin_of(row, expected, REORDERED).near_tie:
            best = named(self.oracle, [today], 0)
            self._blame(f"{here}; the golden is stale: today's oracle puts {best} first", detail)
            return
        if margin.margin <= REORDERED:
            self._tie(here, detail)
            return
        own_fault = self._own_choice(own, expected, taken, margin.tau)
        if own_fault:
            self._blame(f"{here}; {own_fault}", detail)
        elif margin.near_tie:
            self._excuse(
                f"{here}; the oracle puts its token {margin.margin:.2g} above the candidate's "
                f"(near tie, tau {margin.tau:.2g})",
                detail,
            )
        else:
            self._blame(
                f"{here}; the oracle's margin {margin.margin:.3g} is no near tie (tau {margin.tau:.2g}): "
                "wrong numbers",
                detail,
            )

    def sampled(
        self,
        number: int,
        prompt: GoldenPrompt,
        tokens: Sequence[int],
        got: Sequence[int],
        given: dict[str, Any],
    ) -> None:
        """Judge one sampled continuation, drawn with these parameters."""
        params = SamplingParams(**given)
        at = self._parted(f"prompt {number}, seed {params.seed}", tokens, got)
        if at is None:
            return
        prefix = [*prompt.ids, *tokens[:at]]
        row, own = self._rows(prefix)
        here = f"prompt {number}, seed {params.seed}: {self._first(at, tokens, got)}"
        uniform = philox_uniform(params.seed, len(prefix))
        reach = math.sqrt(self.bound.kl_max / 2)
        inside = boundary_distance(row, params, prefix, tokens[at], uniform)
        distance = min(inside, share_distance(row, params, prefix, int(got[at]), uniform, reach))
        detail = self._detail(number, prompt, at, tokens, got, row, own)
        detail |= {"uniform": uniform, "boundary_distance": distance, "reach": reach}
        if share_distance(row, params, prefix, tokens[at], uniform, REORDERED) > REORDERED:
            self._blame(f"{here}; the golden is stale: today's oracle draws another token", detail)
            return
        if equally_likely(row, params, prefix, tokens[at], int(got[at])):
            self._tie(here, detail)
            return
        drawn = None if own is None else sample(own, params, len(prefix), prefix)
        to = "the boundary of the expected token" if distance == inside else "the drawn token's reach"
        draw = f"u = {uniform:.6f} lies {distance:.2g} from {to}"
        if drawn == int(got[at]):
            self._excuse(f"{here}; {draw}, and the candidate's own logits give what it drew", detail)
        elif distance <= reach:
            self._excuse(f"{here}; {draw} (noise reaches {reach:.2g})", detail)
        elif drawn == tokens[at]:
            self._blame(f"{here}; {draw}; its own logits give the expected token: the sampler", detail)
        else:
            self._blame(f"{here}; {draw}, further than noise reaches ({reach:.2g}): wrong numbers", detail)

    def result(self, predicted: float) -> tuple[bool, str, dict[str, Any]]:
        """ok, sentence and detail, when noise predicts this many near ties."""
        allowed = min(lanes.poisson_upper(predicted), self.runs)
        detail = {
            "divergences": self.details,
            "ties": len(self.ties),
            "near_ties": len(self.near),
            "near_ties_allowed": allowed,
            "near_ties_predicted": predicted,
        }
        if self.wrong:
            more = f" ({len(self.wrong)} of {self.runs} runs are wrong)" if len(self.wrong) > 1 else ""
            return False, self.wrong[0] + more, detail
        if len(self.near) > allowed:
            return (
                False,
                f"{len(self.near)} of {self.runs} runs part at near ties, at most {allowed} predicted: "
                f"{self.near[0]}",
                detail,
            )
        equal = f"{self.runs - len(self.near) - len(self.ties)} of {self.runs} runs equal the golden's, "
        equal += f"{self.observed} tokens"
        if self.ties:
            equal += f"; {len(self.ties)} part at ties: {self.ties[0]}"
        if self.near:
            equal += f"; {len(self.near)} near ties of {allowed} allowed: {self.near[0]}"
        return True, equal, detail

    def _parted(self, here: str, expected: Sequence[int], got: Sequence[int]) -> int | None:
        """Where they part, unless one merely ends before the other: that is wrong by itself."""
        self.runs += 1
        self.observed += len(expected)
        at = first_difference(expected, got)
        if at is None or (at < len(expected) and at < len(got)):
            return at
        self._blame(
            f"{here}: the output has {len(got)} of {len(expected)} tokens, equal up to there",
            {"expected": list(expected), "got": list(map(int, got))},
        )
        return None

    def _rows(self, prefix: Sequence[int]) -> tuple[Row, Row | None]:
        """The oracle's and, where it offers them, the engine's own logits after the common prefix."""
        row = self.oracle.exact_logits(prefix)[-1]
        if Capability.LOGITS not in self.engine.info.capabilities:
            return row, None
        own = np.asarray(self.engine.logits(prefix))[-1]
        return row, own if own.shape == row.shape and np.isfinite(own).all() else None

    @staticmethod
    def _own_choice(own: Row | None, expected: int, taken: int, tau: float) -> str:
        """What is wrong with the choice itself, judged by the engine's own logits; empty when nothing."""
        if own is None or not 0 <= taken < own.size:
            return ""
        gap = float(own[expected]) - float(own[taken])
        if gap == 0 and expected < taken:
            return "its own logits of the two are equal: a tie goes to the lowest id"
        if gap > tau:
            return f"its own logits put the expected token {gap:.3g} above it: the choice is wrong"
        return ""

    def _first(self, at: int, expected: Sequence[int], got: Sequence[int]) -> str:
        return (
            f"first divergence at token {at}: expected {named(self.oracle, expected, at)}, "
            f"got {named(self.oracle, got, at)}"
        )

    def _tie(self, here: str, detail: Mapping[str, Any]) -> None:
        """Rows of the head that are equal give equal logits, whose last bits any order of sums decides."""
        sentence = f"{here}; the oracle's logits of the two are equal"
        self.ties.append(sentence)
        self.details.append({**detail, "sentence": sentence, "near_tie": True})

    def _excuse(self, sentence: str, detail: Mapping[str, Any]) -> None:
        self.near.append(sentence)
        self.details.append({**detail, "sentence": sentence, "near_tie": True})

    def _blame(self, sentence: str, detail: Mapping[str, Any]) -> None:
        self.wrong.append(sentence)
        self.details.append({**detail, "sentence": sentence, "near_tie": False})

    def _detail(
        self,
        number: int,
        prompt: GoldenPrompt,
        at: int,
        expected: Sequence[int],
        got: Sequence[int],
        row: Row,
        own: Row | None,
    ) -> dict[str, Any]:
        around = slice(max(0, at - CONTEXT), at + CONTEXT + 1)

        def text(ids: Sequence[int]) -> str:
            known = [token for token in ids if 0 <= token < self.oracle.model.vocab_size]
            return self.oracle.detokenize(known).decode("utf-8", "backslashreplace")

        def top(logits: Row) -> list[list[Any]]:
            logprobs = measure.log_softmax(logits)
            best = measure.top_ids(logits, SHOWN).tolist()
            return [[token, named(self.oracle, [token], 0), float(logprobs[token])] for token in best]

        return {
            "prompt": number,
            "text": prompt.text,
            "position": at,
            "expected": [*map(int, expected[around])],
            "got": [*map(int, got[around])],
            "expected_text": text(expected[around]),
            "got_text": text(got[around]),
            "oracle_top": top(row),
            "candidate_top": [] if own is None else top(own),
        }


def boundary_distance(
    row: Row, params: SamplingParams, history: Sequence[int], token: int, uniform: float
) -> float:
    """How far the draw lies inside the token's share of the cumulative distribution, 0 when outside it."""
    ids, probabilities = filtered_distribution(row, params, history)
    place = np.flatnonzero(ids == token)
    if not place.size:
        return 0.0
    upper = np.cumsum(probabilities)
    at = int(place[0])
    low, high = (float(upper[at - 1]) if at else -math.inf), float(upper[at])
    high = math.inf if at == ids.size - 1 else high
    return max(0.0, min(uniform - low, high - uniform))


def share_distance(
    row: Row, params: SamplingParams, history: Sequence[int], token: int, uniform: float, noise: float = 0.0
) -> float:
    """How far the draw lies outside the share of the cumulative distribution that the token may have.

    Probabilities that move by a total variation of `noise` let two ids change places in the order of drawing
    when theirs differ by at most twice as much; a share then begins elsewhere altogether. Its own borders
    move by `noise` besides, which is for the caller to allow. Infinite for an id that is filtered out.
    """
    ids, probabilities = filtered_distribution(row, params, history)
    place = np.flatnonzero(ids == token)
    if not place.size:
        return math.inf
    at = int(place[0])
    own, before, after = probabilities[at], probabilities[:at], probabilities[at + 1 :]
    low = float(before[before > own + 2 * noise].sum() if noise else before.sum())
    high = float(before.sum() + own + after[after >= own - 2 * noise].sum() if noise else before.sum() + own)
    return max(0.0, low - uniform, uniform - high)


def equally_likely(
    row: Row, params: SamplingParams, history: Sequence[int], expected: int, taken: int
) -> bool:
    """Whether two ids tie before any filter, so that only their order decides which of them is drawn."""
    if not 0 <= taken < len(row):
        return False
    plain = SamplingParams(temperature=1.0, repetition_penalty=params.repetition_penalty)
    ids, probabilities = filtered_distribution(row, plain, history)
    of = {token: float(probabilities[ids == token].sum()) for token in (expected, taken)}
    return of[taken] > 0 and abs(math.log(of[expected] / of[taken])) <= REORDERED
