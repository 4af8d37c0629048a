"""Judge an engine against a golden in five steps: are its tokens right, and if not, why not?

Prompt ids, configuration, teacher-forced logits, greedy tokens, sampled tokens. A step that fails ends the
comparison, because later steps would only show its consequences. The texts of an engine that shows no logits
are read by the oracle instead.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np

from prill_harness.engines.base import Capability, Engine
from prill_harness.engines.embedded import Embedded
from prill_harness.engines.models import resolve_model
from prill_harness.numbers import compare as measure
from prill_harness.numbers import lanes
from prill_harness.numbers.draws import expected_swaps
from prill_harness.planting import faults
from prill_harness.records.evidence import Status
from prill_harness.tokens.divergence import Divergences, Row, first_difference, lane_of, named
from prill_harness.tokens.experts import Experts
from prill_harness.tokens.golden import PROMPTS
from prill_harness.tokens.golden_pack import Golden, GoldenPrompt, SampledGolden
from prill_harness.tokens.sides import Gap, allowed, explained, gap_at, oracle_logits, since
from prill_harness.tokens.steps import StepResult, oracle_for, step
from prill_harness.tokens.verify import compare_passes, compare_texts, unasked
from prill_harness.witness.declared import declared, same
from prill_runtime.errors import EngineError, Inconclusive, InvalidParameter, MissingCapability
from prill_runtime.gguf.file import open_gguf

SHOWN_FIGURES = 3  # figures out of bound that a sentence names


@step("tokenizer")
def compare_prompt_ids(engine: Engine, golden: Golden, oracle: Embedded) -> StepResult:
    """Step 1: the engine's ids of every prompt are the golden's, special tokens included."""
    if golden.prompts[0].unspelled:
        return _compare_refusals(engine, oracle)
    observed = 0
    for number, prompt in enumerate(golden.prompts):
        got, expected = list(engine.tokenize(prompt.text)), prompt.ids
        observed += len(expected)
        today = list(oracle.tokenize(prompt.text))
        if got == expected == today:
            continue
        detail = {"expected": expected, "got": got, "today": today}
        if today == expected:
            at = first_difference(expected, got) or 0
            sentence = (
                f"tokenizer: prompt {number} differs at id {at}: expected {named(oracle, expected, at)}, "
                f"got {named(oracle, got, at)}"
            )
            return StepResult("tokenizer", False, sentence, observed, detail=detail)
        at = first_difference(expected, today) or 0
        side = "the golden" if got == expected else "today's oracle" if got == today else "neither"
        sentence = (
            f"the golden is stale: prompt {number} has {named(oracle, expected, at)} at id {at}, today's "
            f"tokenizer gives {named(oracle, today, at)}; the candidate agrees with {side}"
        )
        return StepResult("tokenizer", False, sentence + since(golden), observed, detail=detail)
    return StepResult(
        "tokenizer", True, f"{observed} ids of {len(golden.prompts)} prompts equal the golden's", observed
    )


def _compare_refusals(engine: Engine, oracle: Embedded) -> StepResult:
    """For a vocabulary that spells no text: the engine, like the oracle, gives no ids or refuses."""
    for text in PROMPTS:
        expected, got = _ids_of(oracle, text), _ids_of(engine, text)
        if expected != got:
            found = "refuses it" if got is None else f"gives {len(got)} ids"
            wanted = "a refusal" if expected is None else f"{len(expected)} ids"
            sentence = f"tokenizer: {text[:20]!r}: expected {wanted}, the engine {found}"
            return StepResult("tokenizer", False, sentence, len(PROMPTS), detail={"got": got})
    sentence = f"the vocabulary spells no text: {len(PROMPTS)} give no ids, as they give the oracle none"
    return StepResult("tokenizer", True, sentence, len(PROMPTS))


def _ids_of(engine: Engine, text: str) -> list[int] | None:
    """Ids of a text, None if the engine refuses it."""
    try:
        return list(engine.tokenize(text))
    except (EngineError, InvalidParameter):
        return None


@step("config")
def compare_config(engine: Engine, golden: Golden, oracle: Embedded) -> StepResult:
    """Step 2: the configuration that the engine reports is the one that the file declares."""
    with open_gguf(resolve_model(oracle.info.model)) as file:
        expected = declared(file)
    reported = engine.info.config
    seen = [key for key in expected if key in reported]
    unseen = sorted(set(expected) - set(reported))
    wrong = [key for key in seen if not same(expected[key], reported[key])]
    # The file declares no window, so an engine that reports one hides keys that should be seen.
    wrong += [key for key in ("window",) if key in reported and key not in expected]
    detail = {"expected": expected, "reported": dict(reported), "unseen": unseen}
    if wrong:
        facts = "; ".join(
            f"{key}: the file says {expected.get(key, 'nothing')}, the engine uses {reported[key]}"
            for key in wrong
        )
        return StepResult("config", False, f"configuration: {facts}", len(seen), detail=detail)
    if unseen:
        sentence = f"{len(seen)} values agree with the file; the engine does not report {', '.join(unseen)}"
        return StepResult("config", False, sentence, len(seen), inconclusive=True, detail=detail)
    return StepResult("config", True, f"{len(seen)} values equal the file's", len(seen), detail=detail)


@step("logits")
def compare_teacher_forced(engine: Engine, golden: Golden, oracle: Embedded) -> StepResult:
    """Step 3: logits on the golden continuation, against the live oracle and the golden's own logprobs; or
    those of the passes that an engine has saved, over ids of its own."""
    if unasked(engine, golden):
        return compare_passes(engine, golden, oracle)
    lane, _, _ = lane_of(engine, golden)
    experts = Experts(engine, oracle, lane, golden)
    tally, flips, gap, largest = lanes.LogitTally(), 0, 0.0, 0.0
    stale: Gap | None = None
    worst: tuple[float, int, int] = (-1.0, 0, 0)
    for number, prompt in enumerate(golden.prompts):
        own = oracle_logits(oracle, prompt.sequence)
        got = np.asarray(engine.logits(prompt.sequence))
        stale = stale or gap_at(number, prompt, own)
        expected = experts.expected(prompt.sequence, own, got)
        tally.add(expected, got)
        largest = measure.largest(largest, float(np.abs(expected).max()))
        forced = got[len(prompt.ids) - 1 :]
        if expected is own:
            flips += _flips(own[len(prompt.ids) - 1 :], forced, prompt.top_ids.array[:, 0])
            gap = measure.largest(gap, _golden_gap(prompt, forced))
        else:  # the golden has the oracle's experts, which are not the engine's
            rows = expected[len(prompt.ids) - 1 :]
            flips += _flips(rows, forced, measure.best_ids(rows))
        at = int(np.argmax(tally.kl[-1]))
        if not tally.kl[-1][at] <= worst[0]:
            worst = float(tally.kl[-1][at]), number, at
    floor = experts.floor
    figures, bound = tally.figures(), lanes.bounds(lane, lanes.stored(floor, largest))
    margins = np.concatenate([prompt.margins for prompt in golden.prompts])
    tau = lanes.tau(lane, floor, largest)
    allowed = lanes.poisson_upper(lanes.expected_flips(margins, tau))
    broken = [
        f"{name} {value:.3g}, {'at least' if relation == '>=' else 'at most'} {limit:.3g} allowed"
        for name, value, limit, relation in (*lanes.broken(figures, bound), *experts.broken(largest))
    ]
    broken = experts.wrong + broken
    if flips > allowed:
        broken.append(f"{flips} best tokens flipped, at most {allowed} predicted by the margin profile")
    off_golden = not gap <= bound.dlogprob_max
    observed = figures.positions * oracle.model.vocab_size
    detail = {
        "lane": lane.name,
        "figures": lanes.summary(figures),
        "bounds": lanes.summary(bound),
        "flips": flips,
        "flips_allowed": allowed,
        "golden_dlogprob_max": gap,
        "worst": {"kl": worst[0], "prompt": worst[1], "position": worst[2] + 1},
    }

    def made(ok: bool, sentence: str) -> StepResult:
        return StepResult("logits", ok, sentence, observed, figures=figures, bounds=bound, detail=detail)

    where = f"worst at prompt {worst[1]}, position {worst[2] + 1}"
    facts = "; ".join(broken[:SHOWN_FIGURES]) + (
        f"; {len(broken) - SHOWN_FIGURES} more" if len(broken) > SHOWN_FIGURES else ""
    )
    if stale:
        doubt = explained(stale, golden, oracle)
        detail["side"] = doubt.side
        if doubt.side == "oracle":
            raise Inconclusive(doubt.sentence)
        if not broken:
            side = "today's oracle" + ("" if off_golden else " and, within the lane's noise, with the golden")
        elif off_golden:
            side = f"neither: {facts} against the oracle, {where}"
        else:
            side = "the golden: what has changed is the oracle, not the engine"
        return made(False, f"{doubt.sentence}; the candidate agrees with {side}")
    if broken:
        return made(False, f"regressed in the {lane.name} lane: {facts}; {where}")
    if off_golden:
        limit = bound.dlogprob_max
        return made(False, f"regressed: logprobs are {gap:.3g} off the golden's, at most {limit:.3g} allowed")
    return made(
        True,
        f"{figures.positions} positions within the {lane.name} lane: KL max {figures.kl_max:.2g} "
        f"of {bound.kl_max:.2g}, NMSE {figures.nmse:.2g} of {bound.nmse:.2g}" + experts.said(),
    )


@step("greedy")
def compare_greedy(engine: Engine, golden: Golden, oracle: Embedded) -> StepResult:
    """Step 4: free-running greedy tokens; each first divergence is a near tie within budget, or wrong.

    The prompts run as one batch if the engine can; that a batch gives what each prompt gives alone is checked
    elsewhere (suite `properties`).
    """
    judged = Divergences(engine, golden, oracle)
    count = len(golden.prompts[0].tokens)
    needs = max(len(prompt.ids) for prompt in golden.prompts) + count - 1
    if (have := engine.info.config.get("served_context", needs)) < needs:  # type: ignore[operator]
        raise Inconclusive(f"the golden fills {needs} positions, the engine was started with {have}")
    together = engine.generate_batch([p.ids for p in golden.prompts], max_tokens=count, ignore_eos=True)
    for number, (prompt, made) in enumerate(zip(golden.prompts, together, strict=True)):
        judged.greedy(number, prompt, made.ids)
    # Each prompt parts at most once, and does so with the probability of at least one flip.
    flips = [lanes.expected_flips(prompt.margins, judged.largest) for prompt in golden.prompts]
    return _of("greedy", judged, float(np.sum(-np.expm1(np.negative(flips)))))


@step("sampled")
def compare_sampled(engine: Engine, golden: Golden, oracle: Embedded) -> StepResult:
    """Step 5: the same seed draws the same tokens; draws next to a boundary are budgeted like near ties."""
    if engine.info.draws != "philox":
        raise MissingCapability(
            f"engine {engine.info.name} draws numbers of its own: no seed has the golden's text"
        )
    judged = Divergences(engine, golden, oracle)
    runs = [(number, run) for number, prompt in enumerate(golden.prompts) for run in prompt.sampled]
    steps = sum(len(run.tokens) for _, run in runs)
    made = engine.generate_batch(
        [golden.prompts[number].ids for number, _ in runs],
        max_tokens=max((len(run.tokens) for _, run in runs), default=0),
        ignore_eos=True,
        sampling=[run.params for _, run in runs],
    )
    for (number, run), text in zip(runs, made, strict=True):
        judged.sampled(number, golden.prompts[number], run.tokens, text.ids, run.params)
    # Noise of this KL moves a boundary by at most the total variation distance, √(KL/2) (Pinsker).
    predicted = steps * float(np.sqrt(judged.bound.kl_p99 / 2))
    if len(judged.near) > lanes.poisson_upper(predicted):
        predicted += sum(_swaps(judged, golden.prompts[number], run) for number, run in runs)
    return _of("sampled", judged, predicted)


def _swaps(judged: Divergences, prompt: GoldenPrompt, run: SampledGolden) -> float:
    """`draws.expected_swaps` of one run, by the oracle and the sampler with faults suspended."""
    with faults.only(()):
        rows = oracle_logits(judged.oracle, [*prompt.ids, *run.tokens[:-1]])[len(prompt.ids) - 1 :]
        return expected_swaps(rows, prompt.ids, run.tokens, run.params, judged.largest)


def _of(step: str, judged: Divergences, predicted: float) -> StepResult:
    ok, sentence, detail = judged.result(predicted)
    return StepResult(step, ok, sentence, judged.observed, bounds=judged.bound, detail=detail)


STEPS: tuple[Callable[..., StepResult], ...] = (
    compare_prompt_ids,
    compare_config,
    compare_teacher_forced,
    compare_greedy,
    compare_sampled,
)


def compare(engine: Engine, golden: Golden, oracle: Embedded | None = None) -> list[StepResult]:
    """All steps in order, up to and including the first that fails; an inconclusive one does not end them."""
    findings: list[StepResult] = []
    with ExitStack() as stack:
        judge = oracle or stack.enter_context(oracle_for(engine))
        for step in STEPS:
            findings.append(step(engine, golden, judge))
            if step is compare_teacher_forced and Capability.LOGITS not in engine.info.capabilities:
                findings += compare_texts(engine, golden, judge)
            if findings[-1].status is Status.FAILED:
                break
    return findings


def _flips(expected: Row, forced: Row, right: measure.Ints) -> int:
    """How often the best token differs from the right one without being equally likely to the oracle."""
    best = measure.best_ids(forced)
    rows = np.arange(len(right))
    return int(
        np.count_nonzero(
            (best != right) & (np.abs(expected[rows, right] - expected[rows, best]) > measure.REORDERED_ERROR)
        )
    )


def _golden_gap(prompt: GoldenPrompt, forced: Row) -> float:
    """max |Δ logprob| over the golden's best ids; infinite if anything is not finite.

    A golden stores float32, so a difference within that rounding counts as none.
    """
    if not np.isfinite(forced).all():
        return float("inf")
    own = np.take_along_axis(measure.log_softmax(forced), prompt.top_ids.array, axis=-1)
    stored = prompt.top_logprobs.array.astype(np.float64)
    gap = np.abs(own - stored)
    return float(np.where(gap <= allowed(stored), 0.0, gap).max())
