"""Where generated tokens part from the expected ones, and whether noise explains it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.base import Capability, Engine
from prill_harness.engines.embedded import Embedded
from prill_harness.numbers import compare as measure
from prill_harness.numbers import lanes
from prill_harness.numbers.compare import REORDERED_ERROR
from prill_harness.numbers.draws import boundary_distance, equally_likely, share_distance
from prill_harness.numbers.lanes import Figures, Lane
from prill_harness.planting import faults
from prill_harness.tokens.choices import SAID, Part, culprit
from prill_harness.tokens.golden_pack import Golden, GoldenPrompt
from prill_harness.tokens.sides import oracle_logits, since
from prill_runtime.errors import Inconclusive, MissingCapability, UsageError
from prill_runtime.sampling import philox, sampler  # as modules: suspending a fault must take effect
from prill_runtime.sampling.sampler import SamplingParams

CONTEXT_TOKENS = 8
SHOWN_CANDIDATES = 5
Row = NDArray[np.floating]


def lane_of(engine: Engine, golden: Golden) -> tuple[Lane, Figures, Figures]:
    """The engine's lane for this golden's model, the lane's noise floor, and its bounds.

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
    """Index of the first id that differs or that only one of them has; None if they are equal."""
    for at, (a, b) in enumerate(zip(expected, got, strict=False)):
        if a != b:
            return at
    return None if len(expected) == len(got) else min(len(expected), len(got))


@dataclass(frozen=True)
class Parting:
    """Where one run departs from what was expected: after `at` right tokens, with the id `taken`.

    Attributes:
        run: its name in a sentence. ids: its prompt. params: how it draws.
    """

    run: str
    ids: Sequence[int]
    tokens: Sequence[int]
    at: int
    taken: int
    params: SamplingParams
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def expected(self) -> int:
        return self.tokens[self.at]

    @property
    def prefix(self) -> list[int]:
        return [*self.ids, *self.tokens[: self.at]]


@dataclass
class Divergences:
    """First divergences of several generations, sorted into ties, near ties, wrong ones, and those where the
    oracle contradicts itself."""

    engine: Engine
    golden: Golden
    oracle: Embedded
    observed: int = 0
    runs: int = 0
    ties: list[str] = field(default_factory=list)
    near: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    details: list[Mapping[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lane, self.floor, self.bound = lane_of(self.engine, self.golden)
        self.largest = lanes.tau(self.lane, self.floor, 0.0)

    def greedy(self, number: int, prompt: GoldenPrompt, got: Sequence[int]) -> None:
        """Judge one greedy continuation."""
        parting = self._parted(f"prompt {number}", prompt.ids, prompt.tokens, got, SamplingParams())
        if parting is None:
            return
        row, own = self._rows(parting.prefix)
        largest = float(np.abs(row).max())
        margin = measure.margin_of(row, parting.taken, lanes.tau(self.lane, self.floor, largest))
        self._describe(parting, number, prompt, got, row, own)
        parting.detail.update(margin=margin.margin, tau=margin.tau)
        today = int(measure.best_ids(row))
        if (
            today != parting.expected
            and not measure.margin_of(row, parting.expected, REORDERED_ERROR).near_tie
        ):
            self._doubt(parting, today, f"puts {named(self.oracle, [today], 0)} first")
        elif margin.margin <= REORDERED_ERROR:
            self._tie(parting)
        elif own_fault := self._own_choice(own, parting, margin.tau):
            self._misplaced(parting, own_fault)
        elif margin.near_tie:
            fact = f"the oracle puts its token {margin.margin:.2g} above the candidate's"
            self._excuse(parting, f"{fact} (near tie, tau {margin.tau:.2g})")
        else:
            fact = f"the oracle's margin {margin.margin:.3g} is no near tie (tau {margin.tau:.2g})"
            self._unexplained(parting, fact, own)

    def sampled(
        self,
        number: int,
        prompt: GoldenPrompt,
        tokens: Sequence[int],
        got: Sequence[int],
        params: SamplingParams,
    ) -> None:
        """Judge one continuation drawn with these parameters, by the sampler with faults suspended."""
        with faults.only(()):
            self._sampled(number, prompt, tokens, got, params)

    def _sampled(
        self,
        number: int,
        prompt: GoldenPrompt,
        tokens: Sequence[int],
        got: Sequence[int],
        params: SamplingParams,
    ) -> None:
        parting = self._parted(f"prompt {number}, seed {params.seed}", prompt.ids, tokens, got, params)
        if parting is None:
            return
        prefix, expected, taken = parting.prefix, parting.expected, parting.taken
        row, own = self._rows(prefix)
        uniform = philox.philox_uniform(params.seed, len(prefix))
        reach = math.sqrt(self.bound.kl_max / 2)
        tau = self.largest
        inside = boundary_distance(row, params, prefix, expected, uniform, tau)
        distance = measure.smallest(inside, share_distance(row, params, prefix, taken, uniform, reach, tau))
        self._describe(parting, number, prompt, got, row, own)
        parting.detail.update(uniform=uniform, boundary_distance=distance, reach=reach)
        drawn = None if own is None else sampler.sample(own, params, len(prefix), prefix)
        to = "the boundary of the expected token" if distance == inside else "the drawn token's reach"
        draw = f"u = {uniform:.6f} lies {distance:.2g} from {to}"
        if equally_likely(row, params, prefix, expected, taken):  # a filter may keep either
            self._tie(parting)
        elif share_distance(row, params, prefix, expected, uniform, REORDERED_ERROR) > REORDERED_ERROR:
            self._doubt(parting, sampler.sample(row, params, len(prefix), prefix), "draws another token")
        elif drawn == taken:
            self._excuse(parting, f"{draw}, and the candidate's own logits give what it drew")
        elif distance <= reach:
            self._excuse(parting, f"{draw} (noise reaches {reach:.2g})")
        elif drawn == expected:
            self._misplaced(parting, f"{draw}; its own logits give the expected token")
        else:
            self._unexplained(parting, f"{draw}, further than noise reaches ({reach:.2g})", own)

    def result(self, predicted: float) -> tuple[bool, str, dict[str, Any]]:
        """ok, sentence and detail, given how many near ties noise predicts.

        Raises:
            Inconclusive: nothing is wrong, but the oracle contradicts itself where a run parts.
        """
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
        if self.undecided:
            raise Inconclusive(self.undecided[0])
        equal = self.runs - len(self.near) - len(self.ties)
        sentence = f"{equal} of {self.runs} runs equal the golden's, {self.observed} tokens"
        if self.ties:
            sentence += f"; {len(self.ties)} part at ties: {self.ties[0]}"
        if self.near:
            sentence += f"; {len(self.near)} near ties of {allowed} allowed: {self.near[0]}"
        return True, sentence, detail

    def _parted(
        self,
        run: str,
        ids: Sequence[int],
        expected: Sequence[int],
        got: Sequence[int],
        params: SamplingParams,
    ) -> Parting | None:
        """Where they part; a run that merely ends too early or too late is recorded as wrong at once."""
        self.runs += 1
        self.observed += len(expected)
        at = first_difference(expected, got)
        if at is None:
            return None
        if at < len(expected) and at < len(got):
            here = (
                f"{run}: first divergence at token {at}: expected {named(self.oracle, expected, at)}, "
                f"got {named(self.oracle, got, at)}"
            )
            return Parting(here, ids, expected, at, int(got[at]), params)
        sentence = f"{run}: the output has {len(got)} of {len(expected)} tokens, equal up to there"
        self.wrong.append(sentence)
        texts = {"expected": list(expected), "got": list(map(int, got))}
        self.details.append({**texts, "cause": "length", "sentence": sentence, "near_tie": False})
        return None

    def _rows(self, prefix: Sequence[int]) -> tuple[Row, Row | None]:
        """The oracle's logits after the common prefix, and the engine's own if it offers them."""
        row = oracle_logits(self.oracle, prefix)[-1]
        if Capability.LOGITS not in self.engine.info.capabilities:
            return row, None
        try:
            own = np.asarray(self.engine.logits(prefix))[-1]
        except MissingCapability:  # of these ids alone
            return row, None
        return row, own if own.shape == row.shape and np.isfinite(own).all() else None

    @staticmethod
    def _own_choice(own: Row | None, parting: Parting, tau: float) -> str:
        """What is wrong with the choice itself, judged by the engine's own logits; empty if nothing is."""
        if own is None or not 0 <= parting.taken < own.size:
            return ""
        gap = float(own[parting.expected]) - float(own[parting.taken])
        above = f"its own logits put the expected token {gap:.3g} above it: the choice is wrong"
        return "" if gap <= tau else above

    def _tie(self, parting: Parting) -> None:
        self._sort(self.ties, "tie", parting, "the oracle's logits of the two are equal")

    def _excuse(self, parting: Parting, fact: str) -> None:
        self._sort(self.near, "near tie", parting, fact)

    def _doubt(self, parting: Parting, today: int, said: str) -> None:
        """Record that today's oracle chooses `today`, not the golden's token, in one pass."""
        drawn = asdict(parting.params)
        again = self.oracle.generate(parting.ids, max_tokens=parting.at + 1, ignore_eos=True, **drawn)
        if again.ids == tuple(parting.tokens[: parting.at + 1]):
            fact = f"today's oracle contradicts itself: in one pass it {said}, token by token it does not"
            fact += "; neither the golden nor the engine can be judged by it"
            self._sort(self.undecided, "oracle", parting, fact)
            return
        side = "so does the candidate" if parting.taken == today else "the candidate agrees with neither"
        fact = f"the golden is stale: today's oracle {said}, {side}{since(self.golden)}"
        self._sort(self.wrong, "golden", parting, fact)

    def _misplaced(self, parting: Parting, fact: str) -> None:
        """Record that the engine's logits are right and its token is not: the choice went wrong."""
        part = self._part(parting)
        self._sort(self.wrong, part, parting, f"{fact}: {SAID[part]}")

    def _unexplained(self, parting: Parting, fact: str, own: Row | None) -> None:
        """Record a token that no noise explains; ask an engine that shows no logits again."""
        cause, more = "logits", ""
        if own is None:
            part = self._part(parting)
            cause, more = ("logits", "") if part == "sampler" else (part, f"; {SAID[part]}")
        self._sort(self.wrong, cause, parting, f"{fact}: wrong numbers{more}")

    def _part(self, parting: Parting) -> Part:
        """Which part of the engine chose wrongly; the sampler, of one that cannot be asked again."""
        with suppress(MissingCapability):
            return culprit(self.engine, parting.ids, parting.tokens, parting.at, parting.params)
        return "sampler"

    def _sort(self, into: list[str], cause: str, parting: Parting, fact: str) -> None:
        sentence = f"{parting.run}; {fact}"
        into.append(sentence)
        excused = into is self.near or into is self.ties
        self.details.append({**parting.detail, "cause": cause, "sentence": sentence, "near_tie": excused})

    def _describe(
        self,
        parting: Parting,
        number: int,
        prompt: GoldenPrompt,
        got: Sequence[int],
        row: Row,
        own: Row | None,
    ) -> None:
        """Keep what a report needs to show the place."""
        around = slice(max(0, parting.at - CONTEXT_TOKENS), parting.at + CONTEXT_TOKENS + 1)
        expected = parting.tokens[around]

        def text(ids: Sequence[int]) -> str:
            known = [token for token in ids if 0 <= token < self.oracle.model.vocab_size]
            return self.oracle.detokenize(known).decode("utf-8", "backslashreplace")

        def top(logits: Row) -> list[list[Any]]:
            logprobs = measure.log_softmax(logits)
            best = measure.top_ids(logits, SHOWN_CANDIDATES).tolist()
            return [[token, named(self.oracle, [token], 0), float(logprobs[token])] for token in best]

        parting.detail.update(
            prompt=number,
            text=prompt.text,
            position=parting.at,
            expected=[*map(int, expected)],
            got=[*map(int, got[around])],
            expected_text=text(expected),
            got_text=text(got[around]),
            oracle_top=top(row),
            candidate_top=[] if own is None else top(own),
        )
