"""Which stage or part is to blame for the checks that failed in a run.

The order is that of a diagnosis: a failure early in the flow of data explains later ones. A file that is read
wrong makes every stage wrong, and a wrong stage every token, but not the other way round.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prill_harness.faults.trial.forgotten import LEAST_SHARE
from prill_harness.records.evidence import Evidence, Status

_FIRST_WRONG = re.compile(r"(?:^|[\s:])(?:blk\.\d+\.)?(\w+) is the first wrong stage")
# Which stages an op computes, for faults that show only at the shapes of the suites `ops` and `options`.
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
    "route": ("routed",),
    "experts": ("expert_gate", "expert_up", "expert_down"),
    "mix": ("experts",),
    "clamped": ("expert_act",),
    "sinks": ("attn",),
    "window": ("attn",),
    "temper": ("attn",),
    "softcap": ("attn", "logits"),
    "stretched": ("q_rope", "k_rope"),
    "scale": ("embed",),
    "activations": ("act",),
    "branches": ("ffn_norm", "out"),
}
# Uses the whole engine, so any other failure explains it.
WHOLE_STEP = "ops.decode"
# Parts by prefixes of failing check ids; the first that fails explains those below it.
BEFORE_STAGES = (
    ("blocks", ("blocks.",)),
    ("tokenizer", ("tokenizer.", "tokens.prompt_ids")),
)
AFTER_STAGES = (
    ("sampler", tuple(f"sampler.{name}" for name in ("philox", "greedy", "not_a_number", "filters", "penalty",
                                                     "full_vocabulary", "draw", "backend"))),
    ("boundary", ("boundary.", "process.")),
    ("memory", ("memory.",)),
    ("state", ("cache.exactly_full", "cache.context_full", "cache.sessions_apart", "cache.cleared",
               "cache.reset", "properties.prefill_decode", "properties.chunking",
               "properties.switching", "properties.offset", "properties.position_offset")),
    # A sequence that is wrong alone is also wrong in a batch.
    ("batch", ("properties.batch",)),
    # A wrong capacity is also a wrong size, but not the other way round.
    ("memory", ("cache.",)),
    ("generate", ("properties.", "requests.")),
    ("sampler", ("sampler.",)),
    ("file", ("errors.model_file",)),
    ("errors", ("errors.",)),
    ("file", ("file.configuration", "tokens.config")),
)  # fmt: skip
# What is to blame for a text that parts from the golden, by the cause that the comparison found.
CAUSES = {"batch": "batch", "chance": "state", "cache": "state", "sampler": "sampler", "length": "generate",
          "logits": "logits", "golden": "harness"}  # fmt: skip
WHOLE = (("logits", ("tokens.", WHOLE_STEP)),)
# Something wrong may also cost more; something right that costs more is to blame for the cost only.
COST = (("cost", ("cost.",)),)
# Oracle and golden belong to the harness: an engine cannot make them disagree.
HARNESS = ("harness.", "tokens.golden_is_current")
# A second reading contradicts the oracle: code that oracle and engine share is wrong.
WITNESS = ("witness.",)
TRACE = ("stages.complete", "stages.untouched")
# If the logits are right, the trace is wrong and not the model.
LOGITS = ("ops.", "options.", "tokens.", "properties.", "cache.")


@dataclass(frozen=True)
class Blame:
    """Stage kinds or parts, one of which is broken, and the check that shows it."""

    parts: tuple[str, ...]
    check: str
    sentence: str


def kills(faulty: Iterable[Evidence], clean: Iterable[Evidence], *, silence: bool = False) -> list[Evidence]:
    """The checks that killed the fault: they failed here, by their own judgement, and pass without it.

    An error is not a kill: something crashed, and nothing was compared. If the engine refuses to open, every
    check that needs it fails with the loader's sentence; the refusal is then credited to the `file` suite
    alone, or to one check if that suite was not run.

    Args:
        silence: for faults of the harness, which must be noticed but cannot always be measured. A check that
            passes and saw less than it owes counts too, as in a gate; and if nothing else does, checks that
            passed before and now say that they saw nothing.
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
    """Sentences with which an engine refused to open: common to checks of several suites that saw nothing."""
    suites = Counter(s for s, _ in {(e.sentence, e.cell.suite) for e in seen if not e.observed})
    return {sentence for sentence, count in suites.items() if count > 1}


def _one_refusal(seen: list[Evidence]) -> list[Evidence]:
    shared = refusals(seen)
    refused = [e for e in seen if e.status is Status.FAILED and not e.observed and e.sentence in shared]
    credited = [e for e in refused if e.cell.suite == "file"] or refused[:1]
    return [e for e in seen if e not in refused or e in credited]


def blame(killed: Sequence[Evidence]) -> Blame | None:
    """What is to blame, by the checks that count as kills; None if there are none."""
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
    """Blame by the harness's own checks, an oracle that a second reading contradicts, a golden that the
    oracle contradicts, or checks that passed before and now saw nothing, or much less."""
    witness = _first(killed, *WITNESS)
    if witness is not None and not _first(killed, HARNESS[0]):
        return _made(witness, "oracle")
    found = _first(killed, *HARNESS) or next((e for e in killed if e.status is not Status.FAILED), None)
    if found is None:
        return None
    return _made(found, "file" if found.detail.get("side") == "file" else "harness")


def _file(killed: Sequence[Evidence]) -> Blame | None:
    """Blame for a file read wrong, unless blocks are decoded wrong or only another setting is used."""
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
    """The first wrong stage on the early positions, or on the late ones if those are right. Hidden stages
    before it come first: a stage that is not computed is not shown either."""
    for beginning in ("stages.early", "stages."):
        for found in killed:
            if found.check.startswith(beginning) and (match := _FIRST_WRONG.search(found.sentence)):
                unseen = (name.rpartition(".")[2] for name in found.detail.get("unseen", ()))
                return _made(found, *dict.fromkeys((*unseen, match[1])))
    return None


def _text(killed: Sequence[Evidence]) -> Blame | None:
    """Blame for a text that parts from the golden: the cause of the first parting beyond noise."""
    found = _first(killed, "tokens.greedy", "tokens.sampled")
    if found is None:
        return None
    wrong = (each["cause"] for each in found.detail.get("divergences", ()) if not each["near_tie"])
    return _made(found, CAUSES[next(wrong, "sampler" if found.base == "tokens.sampled" else "logits")])


def _op(killed: Sequence[Evidence]) -> Blame | None:
    found = _first([e for e in killed if e.base != WHOLE_STEP], "ops.", "options.")
    return _made(found, *OPS.get(found.base.partition(".")[2], ("ops",))) if found else None
