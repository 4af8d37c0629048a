"""Verify: the oracle reads what an engine wrote, in one pass a text, and judges it at every position.

A stored text says nothing behind the first token in which an engine differs from it. The oracle's logits on
the engine's own text do: each token is the oracle's best, or within the lane's noise of it, or wrong there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from prill_harness.engines.base import Engine, Generation
from prill_harness.engines.embedded import Embedded
from prill_harness.engines.others.passes import SavedPass
from prill_harness.numbers import compare, lanes
from prill_harness.numbers.compare import REORDERED_ERROR, TOP_K
from prill_harness.numbers.lanes import Figures, Lane
from prill_harness.tokens.divergence import Row, lane_of, named
from prill_harness.tokens.golden_pack import Golden
from prill_harness.tokens.sides import oracle_logits
from prill_harness.tokens.steps import StepResult, step
from prill_runtime.errors import Inconclusive, MissingCapability

TOKENS = 100
SHOWN = 5  # wrong places that evidence keeps
MOST = 4096  # logprobs of one position that are compared


@dataclass
class Verification:
    """Texts of one engine, read by the oracle.

    Args:
        lane, floor: what noise is allowed, as for logits.
        context: positions that the engine has; its texts may end there.
    """

    oracle: Embedded
    lane: Lane
    floor: Figures
    context: int
    texts: int = 0
    positions: int = 0
    respelled: int = 0
    flips: int = 0
    predicted: float = 0.0
    wrong: list[str] = field(default_factory=list)
    wrong_texts: list[dict[str, Any]] = field(default_factory=list)
    told: list[compare.TopN] = field(default_factory=list)
    _largest: float = 0.0
    _gaps: list[float] = field(default_factory=list)
    _places: list[tuple[str, int]] = field(default_factory=list)

    def read(self, run: str, ids: Sequence[int], made: Generation, asked: int) -> None:
        """Judge one greedy text.

        Args:
            run: its name in a sentence. ids: its prompt. asked: tokens asked for, no end ignored.

        Raises:
            Inconclusive: the engine tells neither ids nor a text that has only one spelling.
            EngineError: its logprobs are malformed.
        """
        self.texts += 1
        try:
            written, spelled = list(made.ids), True
        except MissingCapability:
            written, spelled = self._spelled(run, ids, str(getattr(made, "text", ""))), False
        vocabulary = self.oracle.model.vocab_size
        outside = next((at for at, token in enumerate(written) if not 0 <= token < vocabulary), None)
        if outside is not None:
            what = f"{run}: token {outside} is {named(self.oracle, written, outside)}"
            self.wrong.append(what)
            written = written[:outside]
        ended = made.finish_reason == "eos" and outside is None
        if fault := self._bad_end(ids, written, made, asked, spelled) if outside is None else "":
            self.wrong.append(f"{run}: {fault}")
        if not written and not ended:
            return
        rows = oracle_logits(self.oracle, [*ids, *written] if ended else [*ids, *written[:-1]])
        tops = getattr(made, "top", ()) if spelled else ()
        logprobs = self._logprobs(made) if spelled else ()
        for at, row in enumerate(rows[len(ids) - 1 :]):
            last = at == len(written)
            token = self._end(row, made) if last else written[at]
            own = dict(tops[at]) if at < len(tops) else {}
            self._choice(f"{run}, token {at}", row, token, own, last)
            if not own and at < len(logprobs):
                own = {token: logprobs[at]}
            if own and not last:
                self._numbers(f"{run}, token {at}", row, own, len(ids) + at)

    def forced(self, run: str, each: SavedPass) -> None:
        """Judge the numbers of a pass over ids that somebody else chose, its likeliest MOST at each position.

        A value that a file rounded is known to within that, and the one nearest to the oracle's is judged.

        Raises:
            EngineError: its logprobs are malformed.
        """
        self.texts += 1
        truth = oracle_logits(self.oracle, each.ids)[each.first :]
        for at, (row, told, off) in enumerate(zip(truth, each.rows, each.rounding, strict=False)):
            values, best = compare.log_softmax(told) if not off else told, compare.top_ids(told, MOST)
            best = best[np.isfinite(values[best])] if off else best
            logprobs = np.clip(compare.log_softmax(row)[best], values[best] - off, values[best] + off)
            logprobs -= np.clip(np.log(np.exp(logprobs).sum()), 0.0, 2 * off)
            self._largest = compare.largest(self._largest, float(np.abs(row).max()))
            own = dict(zip(best.tolist(), logprobs.tolist(), strict=True))
            self._numbers(f"{run}, position {each.first + at}", row, own, each.first + at + 1)

    def choices(self) -> StepResult:
        """Whether every token that was read is right."""
        allowed = lanes.poisson_upper(self.predicted)
        detail: dict[str, Any] = {
            "lane": self.lane.name, "texts": self.texts, "flips": self.flips, "flips_allowed": allowed,
            "wrong": self.wrong[:SHOWN], "wrong_places": len(self.wrong),
            "wrong_texts": self.wrong_texts[:SHOWN],
        }  # fmt: skip
        seen = max(self.positions, 1) if self.wrong else self.positions
        if self.wrong:
            more = f" ({len(self.wrong)} places are wrong)" if len(self.wrong) > 1 else ""
            return StepResult("verified", False, self.wrong[0] + more, seen, detail=detail)
        if not self.positions:
            raise Inconclusive("no token was written, so none was read")
        if self.flips > allowed:
            sentence = f"{self.flips} of {self.positions} tokens are not the oracle's best, though each is "
            sentence += f"near it; noise explains at most {allowed}"
            return StepResult("verified", False, sentence, seen, detail=detail)
        sentence = (
            f"{self.positions} tokens of {self.texts} texts read by the oracle: {self.flips} near ties of "
            f"{allowed} that the {self.lane.name} lane allows, every other one its best"
        )
        if self.respelled:
            sentence += f"; {self.respelled} texts without ids, spelled as the oracle would"
        return StepResult("verified", True, sentence, seen, detail=detail)

    def numbers(self) -> StepResult:
        """Whether the logprobs that the engine told are right; what it did not tell is bounded.

        Raises:
            Inconclusive: it told none.
        """
        if not self.told:
            raise MissingCapability("the engine tells no logprobs, so its numbers were not seen")
        bound = lanes.bounds(self.lane, lanes.stored(self.floor, self._largest))
        lows = np.array([each.kl_low for each in self.told])
        places = np.array([place for _, place in self._places])
        figures = {
            "KL p99 at least": (compare.p99(lows), bound.kl_p99),
            "KL max at least": (float(lows.max()), bound.kl_max),
            "|Δ logprob|": (compare.largest(*self._gaps), bound.dlogprob_max),
        }
        for label, value in compare.bucket_max(lows, places).items():
            limit = bound.buckets.get(label, compare.largest(0.0, *bound.buckets.values()))
            figures[f"KL max at {label} at least"] = value, limit
        broken = [
            f"{name} {value:.3g}, at most {limit:.3g} allowed"
            for name, (value, limit) in figures.items()
            if not value <= limit
        ]
        unseen = compare.largest(*(each.candidate_tail for each in self.told))
        fewest = min(each.ids for each in self.told)
        detail = {
            "lane": self.lane.name, "positions": len(self.told), "ids": fewest, "unseen": unseen,
            "total_variation": compare.largest(*(each.distance_high for each in self.told)),
            "figures": {name: list(pair) for name, pair in figures.items()},
        }  # fmt: skip
        seen, tail = sum(each.ids for each in self.told), f"not seen: at most {unseen:.2g} of its probability"
        if broken:
            at = int(np.argmax(self._gaps))
            where = f"worst at {self._places[at][0]}"
            sentence = f"its logprobs are off in the {self.lane.name} lane: {'; '.join(broken[:3])}; {where}"
            return StepResult("told", False, f"{sentence}; {tail}", seen, detail=detail)
        sentence = (
            f"{len(self.told)} positions, at least {fewest} ids each: |Δ logprob| at most "
            f"{figures['|Δ logprob|'][0]:.2g} of {bound.dlogprob_max:.2g}, KL at least {lows.max():.2g} of "
            f"{bound.kl_max:.2g}; {tail}"
        )
        return StepResult("told", True, sentence, seen, detail=detail)

    def _choice(self, where: str, row: Row, token: int, own: Mapping[int, float], end: bool) -> None:
        largest = float(np.abs(row).max())
        tau = lanes.tau(self.lane, self.floor, largest)
        self.positions += 1
        self._largest = compare.largest(self._largest, largest)
        margin = compare.margin_of(row, token, tau)
        best = np.partition(row.astype(np.float64), -2)[-2:] if row.size > 1 else np.array([0.0, np.inf])
        self.predicted += lanes.expected_flips(np.array([best[1] - best[0]]), tau)
        self.flips += margin.margin > REORDERED_ERROR
        if margin.near_tie:
            return
        first = int(compare.best_ids(row))
        what = "the text ends at" if end else "got"
        sentence = (
            f"{where}: expected {named(self.oracle, [first], 0)}, {what} {named(self.oracle, [token], 0)}; "
            f"the oracle's margin {margin.margin:.3g} is no near tie (tau {tau:.2g})"
        )
        if token in own and first in own:
            chosen = own[first] - own[token] > tau
            sentence += ": its own logprobs agree with the oracle, the choice is wrong" if chosen else ""
        self.wrong.append(sentence)

    def _numbers(self, where: str, row: Row, own: Mapping[int, float], position: int) -> None:
        """Compare the logprobs of the ids that were told; those that were not are at most the least told."""
        ids, values = list(own), list(own.values())
        self.told.append(compare.top_n(row, ids, values))
        logprobs, best = compare.log_softmax(row), compare.top_ids(row, TOP_K).tolist()
        gaps = [abs(float(logprobs[token]) - own[token]) for token in best if token in own]
        if len(ids) > 1:
            missing = (token for token in best[: len(ids)] if token not in own)
            least = compare.smallest(*values)
            gaps += [compare.largest(0.0, float(logprobs[token]) - least) for token in missing]
        self._gaps.append(compare.largest(0.0, *gaps))
        self._places.append((where, position))

    def _end(self, row: Row, made: Generation) -> int:
        """The id that ended a text: as the engine says, else the likeliest of the file's ends."""
        if made.end_id is not None:
            return made.end_id
        ends = sorted(self.oracle.model.tokenizer.eog_ids)
        return max(ends, key=lambda token: float(row[token])) if ends else -1

    def _bad_end(
        self, ids: Sequence[int], written: Sequence[int], made: Generation, asked: int, spelled: bool
    ) -> str:
        """What is wrong with where a text ends; empty if nothing is."""
        ends = self.oracle.model.tokenizer.eog_ids
        reason, count = made.finish_reason, len(written)
        inside = next((at for at, token in enumerate(written) if token in ends), None)
        if inside is not None:
            return f"token {inside} is the end of the text, and it went on"
        if reason == "eos" and made.end_id is not None and made.end_id not in ends:
            return f"it ended at {named(self.oracle, [made.end_id], 0)}, which ends no text"
        if reason in ("stop", "cancelled"):
            return f"it ended by {reason}, and nothing was asked to end it"
        if count > asked or (spelled and reason == "length" and count != asked):
            return f"it wrote {count} tokens of {asked} and calls that {reason}"
        if spelled and reason == "context" and len(ids) + count < self.context:
            return f"it ended by context with {len(ids) + count} of {self.context} positions"
        return ""

    @staticmethod
    def _logprobs(made: Generation) -> Sequence[float]:
        try:
            return made.logprobs
        except MissingCapability:
            return ()

    def _spelled(self, run: str, ids: Sequence[int], text: str) -> list[int]:
        """Ids that spell a text, each the oracle's best or within noise of it; up to where there is none.

        Where several do, the likeliest is followed first and the others behind a dead end.
        """
        if "\ufffd" in text:
            raise Inconclusive(f"{run}: the engine tells no ids, and its text has characters replaced")
        self.respelled += 1
        data, piece = text.encode(), self.oracle.model.tokenizer.piece
        session, fed = self.oracle.session(len(ids) + len(data) + 1), list[int]()
        open_ends: list[tuple[int, list[int]]] = [(0, [])]
        furthest: tuple[int, list[int], Row] | None = None
        while open_ends:
            at, written = open_ends.pop()
            if at == len(data):
                return written
            if fed and written[:-1] == fed[len(ids) :]:
                row = session.feed(written[-1:])[-1]
            else:
                session.reset()
                row = session.feed([*ids, *written])[-1]
            fed = [*ids, *written]
            if furthest is None or at > furthest[0]:
                furthest = at, written, row
            tau = lanes.tau(self.lane, self.floor, float(np.abs(row).max()))
            near = np.flatnonzero(row.max() - row <= tau)
            for token in near[np.argsort(row[near])].tolist():
                if (spelled := piece(token)) and data.startswith(spelled, at):
                    open_ends.append((at + len(spelled), [*written, token]))
        assert furthest is not None
        self.wrong_texts.append({"ids": [*ids], "text": text})
        at, written, row = furthest
        rest = data[at : at + 20].decode("utf-8", "replace")
        best = named(self.oracle, [int(compare.best_ids(row))], 0)
        self.wrong.append(
            f"{run}, token {len(written)}: expected {best}, the text goes on with {rest!r}, and nothing that "
            "noise allows begins so; the engine's own ids of the prompt were not seen"
        )
        return written


def verified(engine: Engine, golden: Golden, oracle: Embedded, tokens: int = TOKENS) -> Verification:
    """The engine's free continuations of a golden's prompts, read by the oracle.

    Raises:
        Inconclusive, EngineError: as the engine's calls.
    """
    lane, floor, _ = lane_of(engine, golden)
    context = int(engine.info.config.get("served_context", oracle.model.context_length))
    reading = Verification(oracle, lane, floor, context)
    for number, prompt in enumerate(golden.prompts):
        count = min(tokens, context - len(prompt.ids))
        if count > 0:
            made = engine.generate(prompt.ids, max_tokens=count)
            reading.read(f"prompt {number}", prompt.ids, made, count)
    return reading


def unasked(engine: Engine, golden: Golden) -> Sequence[SavedPass]:
    """The passes that an engine saved over ids of its own choice; none if it has those of the golden."""
    passes = getattr(engine, "passes", ())
    own = {each.ids for each in passes if each.whole}
    return () if own.issuperset(tuple(prompt.sequence) for prompt in golden.prompts) else passes


def compare_passes(engine: Engine, golden: Golden, oracle: Embedded) -> StepResult:
    """The numbers of passes that were saved elsewhere, against the oracle's over the same ids."""
    lane, floor, _ = lane_of(engine, golden)
    reading = Verification(oracle, lane, floor, oracle.model.context_length)
    for number, each in enumerate(unasked(engine, golden)):
        reading.forced(f"pass {number}", each)
    return replace(reading.numbers(), step="logits")


def compare_texts(engine: Engine, golden: Golden, oracle: Embedded) -> list[StepResult]:
    """The steps "verified", the tokens of a free run, and "told", the logprobs beside them."""
    found: list[Verification] = []

    def choices(engine: Engine, golden: Golden, oracle: Embedded) -> StepResult:
        found.append(verified(engine, golden, oracle, TOKENS))
        return found[0].choices()

    def numbers(engine: Engine, golden: Golden, oracle: Embedded) -> StepResult:
        return found[0].numbers()

    first = step("verified")(choices)(engine, golden, oracle)
    return [first, step("told")(numbers)(engine, golden, oracle)] if found else [first]
