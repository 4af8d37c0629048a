"""An engine on a model of any size in; whether its batches write what each prompt does alone, out."""

from __future__ import annotations

from collections.abc import Callable

from prill_harness.engines.base import Engine
from prill_harness.numbers.compare import largest
from prill_harness.tokens.divergence import first_difference
from prill_suites.common import SAME, rounding
from prill_suites.controls import Pair, Texts, Trial

TEXT, LATE = 230, 256  # tokens; positions, of which the last bucket begins after LATE


def compositions(trial: Trial) -> tuple[float, Callable[[Engine], Pair]]:
    """Hold four prompts in batches of several orders to each alone; the worst NMSE, and a control's run."""
    observe, engine = trial.observe, trial.engine
    sizes = ((0, 90), (1, 1), (2, 17), (0, 33))
    batch = [trial.texts[which][: min(size, trial.context)] for which, size in sizes]
    alone = [engine.logits(ids) for ids in batch]
    worst = 0.0
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2,), (1, 3)):
        together = engine.logits_batch([batch[i] for i in order])
        observe.expect(len(together) == len(order), f"{len(order)} prompts gave {len(together)} results")
        for place, i in enumerate(order):
            observe.saw(alone[i].size, oracle="each prompt alone")
            what = f"prompt {i} in batch {order}"
            worst = largest(worst, trial.same(what, batch[i], alone[i], together[place]))

    def neighbour(engine: Engine) -> Pair:
        return engine.logits(batch[0])[: len(batch[2])], engine.logits(batch[2])

    return worst, neighbour


def texts_alone(trial: Trial) -> str:
    """Texts that are written in a batch are those that each prompt is answered with alone; a clause."""
    observe, engine = trial.observe, trial.engine
    wanted = (
        (0, max(1, min(40, trial.context // 4))),
        (1, max(1, min(70, trial.context // 3))),
        (2, max(1, min(5, trial.context // 4))),
    )
    prompts = [trial.texts[which][:size] for which, size in wanted]
    count, late = trial.room(prompts[1], TEXT), min(LATE, trial.context // 2)
    written = engine.generate_batch(prompts, max_tokens=count, ignore_eos=True)
    # An engine that rounds activations may flip a near tie where a batch rounds elsewhere.
    exact = rounding(engine) <= SAME["float32"]
    for place, prompt in enumerate(prompts[:2]):
        own = engine.generate(prompt, max_tokens=count, ignore_eos=True)
        observe.saw(len(own.ids), oracle="each prompt alone")
        last = len(prompt) + len(own.ids)
        observe.expect(last > late, f"asked for {count} tokens, got {len(own.ids)}: none is late")
        batched = written[place].ids
        parted = first_difference(own.ids, batched)
        if parted is None or not exact:
            continue
        both = parted < min(len(own.ids), len(batched))
        near = both and trial.tied([*prompt, *own.ids[:parted]], own.ids[parted], batched[parted])
        observe.expect(near, f"prompt {place} in a batch of 3 parts from itself alone at token {parted}")

    def two(writer: Engine) -> Texts:
        own = writer is engine
        made = written if own else writer.generate_batch(prompts, max_tokens=count, ignore_eos=True)
        return made[0].ids, made[1].ids

    other = trial.two_texts("two prompts wrote one text", prompts, two)
    told = f"2 texts of {count} tokens in a batch are those alone" if exact else "texts are not compared"
    return f"{told}; another prompt's text: {other}"
