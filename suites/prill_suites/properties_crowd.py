"""A trial comes in; whether more prompts in one step than a warp holds are each as alone goes out."""

from __future__ import annotations

from prill_suites.controls import Trial

CROWD = 20
ALONE = "each prompt alone"


def crowded(trial: Trial, bound: float) -> float:
    """Hold CROWD prompts of 1 to CROWD ids in one step, and their first decoded token, to each alone.

    Args:
        bound: how far two ways to one logprob may be apart.

    Returns:
        The worst NMSE of the prompts. A token decoded after another first one, at a tie say, is not compared.
    """
    observe, engine, texts = trial.observe, trial.engine, trial.texts
    # One position is left for the token that is decoded.
    longest = max(1, trial.context - 1)
    prompts = [texts[n % len(texts)][: min(n + 1, longest)] for n in range(CROWD)]
    worst, apart = 0.0, 0.0
    for n, got in enumerate(engine.logits_batch(prompts)):
        expected = engine.logits(prompts[n])
        observe.saw(expected.size, oracle=ALONE)
        worst = max(worst, trial.same(f"prompt {n} of {CROWD}", prompts[n], expected, got))
    for n, text in enumerate(engine.generate_batch(prompts, max_tokens=2, ignore_eos=True)):
        own = engine.generate(prompts[n], max_tokens=2, ignore_eos=True)
        lengths = len(own.ids), len(text.ids)
        observe.expect(
            lengths[0] == lengths[1], f"prompt {n} of {CROWD} wrote {lengths[1]} tokens, {lengths[0]} alone"
        )
        if own.ids[:1] == text.ids[:1] and lengths[0] > 1:
            observe.saw(1, oracle=ALONE)
            apart = max(apart, abs(own.logprobs[1] - text.logprobs[1]))
    observe.metric(
        f"largest difference of a logprob in {CROWD} texts",
        apart,
        at_most=bound,
        otherwise=f"a token of {CROWD} texts written together is {apart:.3g} off its logprob alone",
    )
    return worst
