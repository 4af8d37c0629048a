"""Are the tokens right? The five steps of the comparison with the golden, each stopping the next."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prill_harness.engines.base import Capability, Engine
from prill_harness.engines.embedded import Embedded
from prill_harness.records.evidence import Status
from prill_harness.run.checks import Observer, check
from prill_harness.tokens import judge as tokens
from prill_harness.tokens import sides
from prill_harness.tokens.golden import Golden
from prill_harness.tokens.steps import StepResult
from prill_runtime.errors import Inconclusive
from prill_suites.sequences import context_of

ORACLE = "golden of the float64 oracle"
LATE = "257+"


class Steps:
    """The findings of one engine against one golden; a step runs once, and only after the ones before it."""

    def __init__(self, engine: Engine, golden: Golden, oracle: Engine) -> None:
        self._given = (engine, golden, oracle)
        self._found: dict[str, StepResult] = {}
        self._steps: dict[str, Callable[..., StepResult]] = {
            "tokenizer": tokens.compare_prompt_ids,
            "config": tokens.compare_config,
            "logits": tokens.compare_teacher_forced,
            "greedy": tokens.compare_greedy,
            "sampled": tokens.compare_sampled,
        }

    def finding(self, wanted: str) -> StepResult:
        """The finding of a step.

        Raises:
            Inconclusive: an earlier step failed, so this one was not compared.
        """
        for step, compare in self._steps.items():
            if step not in self._found:
                self._found[step] = compare(*self._given)
            found = self._found[step]
            if step == wanted:
                return found
            if found.status is Status.FAILED:
                raise Inconclusive(f"{wanted} not compared, because {step} failed: {found.sentence}")
        raise KeyError(wanted)


@pytest.fixture(scope="module")
def steps(engine: Engine, golden: Golden, oracle: Engine) -> Steps:
    return Steps(engine, golden, oracle)


def judge(observe: Observer, finding: StepResult) -> None:
    """Turn a finding into evidence; step 3's figures become metrics."""
    observe.saw(finding.observed, oracle=ORACLE)
    observe.note(**finding.detail)
    if finding.inconclusive:
        raise Inconclusive(finding.sentence)
    observe.expect(finding.ok, finding.sentence)
    observe.say(finding.sentence)


@check(
    "tokens.golden_is_current",
    kills=("golden_from_broken_engine", "golden_of_another_model", "oracle_is_candidate"),
)
def test_golden_is_current(observe: Observer, golden: Golden, oracle: Embedded) -> None:
    """The golden is of this very file, and today's oracle gives it (one prompt here, all in step 3).

    Where the oracle contradicts itself, nothing can be said of the golden.
    """
    first = golden.prompts[0]
    doubt = sides.check_stale(golden, oracle, 1)
    observe.saw(len(first.tokens), oracle="the float64 oracle, run now")
    if doubt is not None and doubt.side == "oracle":
        raise Inconclusive(doubt.sentence)
    if doubt is not None:
        observe.fail(doubt.sentence, side=doubt.side)
    observe.say(
        f"{len(first.tokens)} tokens of the golden agree with today's oracle, "
        f"model {oracle.info.model_sha256[:12]}…"
    )


@check(
    "tokens.prompt_ids",
    kills=("bos_missing", "bos_twice", "space_prefix_lost", "merge_order"),
    needs=(Capability.TOKENIZE,),
)
def test_prompt_ids(observe: Observer, steps: Steps) -> None:
    """Step 1: the engine turns every golden prompt into exactly the golden ids."""
    judge(observe, steps.finding("tokenizer"))


@check("tokens.config", kills=("rms_eps_from_wrong_key",))
def test_config(observe: Observer, steps: Steps) -> None:
    """Step 2: the configuration the engine works with is the file's."""
    judge(observe, steps.finding("config"))


@check(
    "tokens.teacher_forced",
    kills=("rms_eps_too_small", "rope_pairing", "gqa_interleaved", "mask_off_by_one", "q4_k_min_sign"),
    needs=(Capability.LOGITS,),
)
def test_teacher_forced(observe: Observer, steps: Steps) -> None:
    """Step 3: on the golden continuation the logits stay within the lane's bound at every position."""
    judge(observe, steps.finding("logits"))


@check(
    "tokens.late_positions",
    kills=("cache_evicts", "rope_late_positions_stuck", "late_keys_shifted", "late_rows_unmasked"),
    needs=(Capability.LOGITS,),
)
def test_late_positions(observe: Observer, steps: Steps, golden: Golden) -> None:
    """Past 256 positions, or half of a shorter context, the worst KL divergence is within bound too."""
    finding, context = steps.finding("logits"), context_of(golden)
    first = min(256, context // 2)
    late = sum(max(0, len(p.ids) + len(p.tokens) - first) for p in golden.prompts)
    observe.saw(late, oracle=ORACLE)
    observe.expect(late > 0, f"no golden prompt runs past {first} positions")
    figures, bounds = finding.figures, finding.bounds
    if figures is None or bounds is None:
        raise Inconclusive("the logits were not comparable, so no bucket was measured")
    for label, worst in figures.buckets.items():
        observe.metric(
            f"KL max at {label}",
            worst,
            at_most=bounds.buckets[label],
            otherwise=f"positions {label}: worst KL {worst:.3g}, at most {bounds.buckets[label]:.3g}",
        )
    longest = max(len(p.ids) + len(p.tokens) for p in golden.prompts)
    whole = LATE in figures.buckets or longest == context
    observe.expect(whole, f"no figure for positions {LATE}: the golden ends at {longest} of {context}")
    label, worst = list(figures.buckets.items())[-1]
    # The last token has no position of its own.
    of = f", up to {longest - 1} of {context}" if label == LATE else f", all that a context of {context} has"
    observe.say(f"{late} positions past {first}{of}; worst KL at {label} {worst:.3g}")


@check(
    "tokens.greedy",
    kills=(
        "temperature_zero_sampled",
        "penalty_by_default",
        "cache_rows_overwritten",
        "late_decode_sees_less",
    ),
    needs=(Capability.GENERATE,),
)
def test_greedy(observe: Observer, steps: Steps) -> None:
    """Step 4: free-running greedy tokens are the golden's, near ties within their budget."""
    judge(observe, steps.finding("greedy"))


@check(
    "tokens.sampled",
    kills=("temperature_twice", "seed_reused", "late_penalty_forgets", "late_draws_repeat"),
    needs=(Capability.GENERATE,),
)
def test_sampled(observe: Observer, steps: Steps) -> None:
    """Step 5: the same seed gives the golden's sampled tokens."""
    judge(observe, steps.finding("sampled"))
