"""Evidence of a run in which checks failed in; the stage or part that is to blame out.

The order is that of a diagnosis: what comes first in the walk of data explains what fails after it. A file
that is read wrong makes every stage wrong, and a wrong stage every token; not the other way round.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prill_harness.faults.trial.forgotten import LEAST_SHARE
from prill_harness.records.evidence import Evidence, Status

_FIRST_WRONG = re.compile(r"(?:^|[\s:])(?:blk\.\d+\.)?(\w+) is the first wrong stage")
# Which stages an op computes, for faults that only its own test shapes show.
OPS = {
    "embed": ("embed",),
    "rms_norm": ("attn_norm", "ffn_norm", "output_norm"),
    "layer_norm": ("attn_norm", "ffn_norm", "output_norm"),
    "linear": ("q", "k", "v", "attn_out", "gate", "up", "down", "logits"),
    "matvec": ("q", "k", "v", "attn_out", "gate", "up", "down", "logits"),
    "rope": ("q_rope", "k_rope"),
    "softmax": ("attn",),
    "attention": ("attn",),
    "swiglu": ("act",),
    "gelu_tanh": ("act",),
    "add": ("ffn_in", "out"),
}
# Goes through the whole engine, so whatever else fails explains it.
WHOLE_STEP = "ops.decode"
# Parts by what fails, beginnings of check ids; the first that fails explains those below it.
BEFORE_STAGES = (
    ("blocks", ("blocks.",)),
    ("tokenizer", ("tokenizer.", "tokens.prompt_ids")),
)
AFTER_STAGES = (
    ("sampler", tuple(f"sampler.{name}" for name in ("philox", "greedy", "not_a_number", "filters", "penalty",
                                                     "full_vocabulary", "draw", "backend"))),
    ("memory", ("memory.",)),
    ("state", ("cache.exactly_full", "cache.context_full", "cache.sessions_apart", "cache.cleared",
               "cache.reset", "properties.prefill_decode", "properties.chunking",
               "properties.switching", "properties.offset", "properties.position_offset")),
    # What one sequence does wrong by itself, it does wrong in company too.
    ("batch", ("properties.batch",)),
    # A capacity that is wrong is a wrong size too, and not the other way round.
    ("memory", ("cache.",)),
    ("generate", ("properties.", "requests.")),
    ("sampler", ("sampler.",)),
    ("file", ("errors.model_file",)),
    ("errors", ("errors.",)),
    ("file", ("file.configuration", "tokens.config")),
)  # fmt: skip
# Whom a text blames that parts from the golden, by the cause that the comparison found for it.
CAUSES = {"batch": "batch", "chance": "state", "cache": "state", "sampler": "sampler", "length": "generate",
          "logits": "logits", "golden": "harness"}  # fmt: skip
WHOLE = (("logits", ("tokens.", WHOLE_STEP)),)
# What is wrong may cost more too; what costs more and is right is to blame for that alone.
COST = (("cost", ("cost.",)),)
# The oracle and the golden are the harness's own: an engine cannot make them disagree.
HARNESS = ("harness.", "tokens.golden_is_current")
# A second reading of the file contradicts the oracle: what it shares with the engine is wrong.
WITNESS = ("witness.",)
TRACE = ("stages.complete", "stages.untouched")
# A trace is wrong, and not the model, when the logits themselves are seen to be right.
LOGITS = ("ops.", "tokens.", "properties.", "cache.")


@dataclass(frozen=True)
class Blame:
    """Stage kinds or parts, of which one is broken, and the check whose finding says so."""

    parts: tuple[str, ...]
    check: str
    sentence: str


def kills(faulty: Iterable[Evidence], clean: Iterable[Evidence], *, silence: bool = False) -> list[Evidence]:
    """What counts as a kill: a check that failed here, by its own judgement, and passes without the fault.

    An error is no kill: something crashed, and nobody looked. When the engine refuses to open, every check
    that needs one fails with the loader's sentence; the refusal is then credited to the `file` suite alone,
    or to one check when that suite was not run.

    Args:
        silence: for faults of the harness, which have to be noticed and cannot always be measured. What
            passes and saw less than it owes counts too, as it does in a gate; and where nothing else does,
            checks that passed before and say now that they saw nothing.
    """
    sound = {(e.cell.model, e.check): e.observed for e in clean if e.status is Status.PASSED}
    among = [e for e in faulty if (e.cell.model, e.check) in sound]
    seen = [e for e in among if e.status is Status.FAILED]
    if silence:
        owed = {key: LEAST_SHARE * observed for key, observed in sound.items()}
        seen += [e for e in among if e.status is Status.PASSED and e.observed < owed[e.cell.model, e.check]]
        seen = seen or [e for e in among if e.status is Status.INCONCLUSIVE]
    return _one_refusal(sorted(seen, key=lambda e: (e.cell, e.check)))


def refusals(seen: Sequence[Evidence]) -> set[str]:
    """Sentences with which an engine refused to open: those of several suites' checks that saw nothing."""
    suites = Counter(s for s, _ in {(e.sentence, e.cell.suite) for e in seen if not e.observed})
    return {sentence for sentence, count in suites.items() if count > 1}


def _one_refusal(seen: list[Evidence]) -> list[Evidence]:
    shared = refusals(seen)
    refused = [e for e in seen if e.status is Status.FAILED and not e.observed and e.sentence in shared]
    credited = [e for e in refused if e.cell.suite == "file"] or refused[:1]
    return [e for e in seen if e not in refused or e in credited]


def blame(killed: Sequence[Evidence]) -> Blame | None:
    """Who is to blame, from the checks that count as kills; None when there are none."""
    late = (_parts(AFTER_STAGES), _text, _parts(WHOLE), _parts(COST))
    for step in (_harness, _file, _parts(BEFORE_STAGES), _trace, _stage, _op, *late):
        found = step(killed)
        if found is not None:
            return found
    return None


def _made(evidence: Evidence, *parts: str) -> Blame:
    return Blame(parts, evidence.check, evidence.sentence)


def _first(killed: Sequence[Evidence], *beginnings: str) -> Evidence | None:
    return next((e for b in beginnings for e in killed if e.check.startswith(b)), None)


def _harness(killed: Sequence[Evidence]) -> Blame | None:
    """The harness's own checks, an oracle that a second reading contradicts, a golden that is not that of
    the oracle, or checks that passed before and now say that they saw nothing, or saw much less."""
    witness = _first(killed, *WITNESS)
    if witness is not None and not _first(killed, HARNESS[0]):
        return _made(witness, "oracle")
    found = _first(killed, *HARNESS) or next((e for e in killed if e.status is not Status.FAILED), None)
    if found is None:
        return None
    return _made(found, "file" if found.detail.get("side") == "file" else "harness")


def _file(killed: Sequence[Evidence]) -> Blame | None:
    """A file read wrong, unless its blocks are decoded wrong, or the engine only uses another setting."""
    found = next(
        (e for e in killed if e.cell.suite == "file" and not e.check.startswith("file.configuration")), None
    )
    if found is None or _first(killed, "blocks."):
        return None
    return _made(found, "file")


def _parts(rows: Sequence[tuple[str, tuple[str, ...]]]) -> Callable[[Sequence[Evidence]], Blame | None]:
    def step(killed: Sequence[Evidence]) -> Blame | None:
        for part, beginnings in rows:
            if found := _first(killed, *beginnings):
                return _made(found, part)
        return None

    return step


def _trace(killed: Sequence[Evidence]) -> Blame | None:
    found = _first(killed, *TRACE)
    return _made(found, "trace") if found and not _first(killed, *LOGITS) else None


def _stage(killed: Sequence[Evidence]) -> Blame | None:
    """The first wrong stage on the early positions; on the late ones where those were right. Stages before it
    that nobody saw come first: what is not computed is not shown either."""
    for beginning in ("stages.early", "stages."):
        for found in killed:
            if found.check.startswith(beginning) and (match := _FIRST_WRONG.search(found.sentence)):
                unseen = (name.rpartition(".")[2] for name in found.detail.get("unseen", ()))
                return _made(found, *dict.fromkeys((*unseen, match[1])))
    return None


def _text(killed: Sequence[Evidence]) -> Blame | None:
    """A text that parts from the golden, with the cause of the first that noise does not excuse."""
    found = _first(killed, "tokens.greedy", "tokens.sampled")
    if found is None:
        return None
    wrong = (each["cause"] for each in found.detail.get("divergences", ()) if not each["near_tie"])
    return _made(found, CAUSES[next(wrong, "sampler" if found.base == "tokens.sampled" else "logits")])


def _op(killed: Sequence[Evidence]) -> Blame | None:
    found = _first([e for e in killed if e.base != WHOLE_STEP], "ops.")
    return _made(found, *OPS.get(found.base.removeprefix("ops."), ("ops",))) if found else None
