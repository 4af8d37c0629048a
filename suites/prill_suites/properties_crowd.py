"""A trial comes in; whether more prompts in one step than a tile has rows are each as alone goes out."""

from __future__ import annotations

from prill_harness.numbers.compare import largest
from prill_runtime.errors import MissingCapability
from prill_suites.common import SAME, embedded, rounding
from prill_suites.controls import Trial

CROWD = 20
ALONE = "each prompt alone"


def crowded(trial: Trial, bound: float) -> float:
    """Hold CROWD prompts of 1 to CROWD ids in one step, and their first decoded token, to each alone.

    Args:
        bound: how far two ways to one logprob may be apart.

    Returns:
        The worst NMSE of the prompts. A token decoded after another first one, at a tie, is not compared.
    """
    observe, engine, texts = trial.observe, trial.engine, trial.texts
    # One position is left for the token that is decoded.
    longest = max(1, trial.context - 1)
    prompts = [texts[n % len(texts)][: min(n + 1, longest)] for n in range(CROWD)]
    worst, apart = 0.0, 0.0
    # An engine that rounds activations may flip a near tie where a batch rounds elsewhere.
    exact = rounding(engine) <= SAME["float32"]
    for n, got in enumerate(engine.logits_batch(prompts)):
        expected = engine.logits(prompts[n])
        observe.saw(expected.size, oracle=ALONE)
        worst = largest(worst, trial.same(f"prompt {n} of {CROWD}", prompts[n], expected, got))
    for n, text in enumerate(engine.generate_batch(prompts, max_tokens=2, ignore_eos=True)):
        own = engine.generate(prompts[n], max_tokens=2, ignore_eos=True)
        lengths = len(own.ids), len(text.ids)
        observe.expect(
            lengths[0] == lengths[1], f"prompt {n} of {CROWD} wrote {lengths[1]} tokens, {lengths[0]} alone"
        )
        if exact and own.ids[:1] != text.ids[:1]:
            near = trial.tied(prompts[n], own.ids[0], text.ids[0])
            observe.expect(near, f"prompt {n} of {CROWD} begins with {text.ids[0]}, alone with {own.ids[0]}")
        if own.ids[:1] == text.ids[:1] and lengths[0] > 1:
            observe.saw(1, oracle=ALONE)
            apart = largest(apart, abs(own.logprobs[1] - text.logprobs[1]))
    observe.metric(
        f"largest difference of a logprob in {CROWD} texts",
        apart,
        at_most=bound,
        otherwise=f"a token of {CROWD} texts written together is {apart:.3g} off its logprob alone",
    )
    return worst


def mingled(trial: Trial) -> tuple[float, str]:
    """Hold one step of CROWD sequences, of which some begin, some go on and some decode, to each alone.

    Returns:
        The worst NMSE, and a clause; an engine that is not embedded puts its steps together itself.
    """
    observe, engine, texts = trial.observe, trial.engine, trial.texts
    try:
        model = embedded(engine)
    except MissingCapability:
        return 0.0, "steps of prompts and single ids are the engine's own to make"
    step, worst, singles = [], 0.0, 0
    for n in range(CROWD):
        ids = texts[n % len(texts)][: min(3 * n + 2, trial.context)]
        held = (0, len(ids) - 1, len(ids) // 2)[n % 3]
        cache = model.new_cache(len(ids))
        if held:
            model.forward([(cache, ids[:held])])
        step.append((cache, ids, held))
    together = model.forward([(cache, ids[held:]) for cache, ids, held in step])
    observe.expect(len(together) == CROWD, f"{CROWD} sequences gave {len(together)} results")
    for n, ((_, ids, held), got) in enumerate(zip(step, together, strict=True)):
        expected = engine.logits(ids)[held:]
        observe.saw(expected.size, oracle=ALONE)
        singles += len(ids) - held == 1
        what = f"ids {held} to {len(ids)} of sequence {n} in a mixed step"
        worst = largest(worst, trial.same(what, ids, expected, got))
    return worst, f"so do {singles} single ids and {CROWD - singles} pieces in one step"
