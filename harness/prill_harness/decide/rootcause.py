"""The finding that explains a gate's other failures, and what to look at next."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from prill_harness.faults.trial.blame import blame
from prill_harness.numbers.compare import largest
from prill_harness.records.evidence import CauseFound, Evidence, Record, Status, badness
from prill_harness.records.verdict import CheckResult, LeadResult
from prill_harness.run import reproduce
from prill_harness.run.children import prill

LIMIT_S = 20.0
LENGTHS = (64, 300)  # ids of the text: what is wrong from the first, and what is wrong only late
SHOWN_OF_STAGES = ("stage", "isolated", "bound", "ok")
# What no walk over the stages of a model explains. Everything else that can be blamed is one of them.
NO_STAGE = frozenset({
    "file", "blocks", "tokenizer", "sampler", "memory", "state", "batch", "generate", "errors", "trace",
    "boundary", "harness", "oracle",
})  # fmt: skip


def lead(checks: Iterable[CheckResult], records: Iterable[Record]) -> LeadResult | None:
    """Where to look first: the cause on record, else the worst check that did not pass; None if all did."""
    found = next((r for r in records if isinstance(r, CauseFound)), None)
    if found is not None:
        return LeadResult(found.check, found.sentence, found.reproduce, found.following, found.stages)
    good = (Status.PASSED, Status.WAIVED)
    opened = [c for c in checks if c.status not in good and c.reproduce and not c.lacking]
    if not opened:
        return None
    first = min(opened, key=lambda check: badness(check.status))
    return LeadResult(first.check, "", first.reproduce, reproduce.line("explain", first.base))


def find(failed: Iterable[Evidence], specs: Mapping[str, str], *, ask: bool = True) -> CauseFound | None:
    """The cause of the failures of the first engine that has any; None when nobody is to blame.

    Args:
        failed: of one gate, in its order. specs: what opens a model here, by the name its cells carry.
        ask: have bisect name the first wrong stage, which takes `LIMIT_S` at most.
    """
    failed = list(failed)
    mine = [e for e in failed if e.cell.engine == failed[0].cell.engine]
    guilty = blame(mine)
    if guilty is None:
        return None
    found = next(e for e in mine if (e.check, e.sentence) == (guilty.check, guilty.sentence))
    spec = specs.get(found.cell.model, found.cell.model)
    place = {"engine": found.cell.engine, "model": spec}
    said, words = f"{found.check}: {found.sentence}", reproduce.words("explain", found.base)
    stages: tuple[dict[str, Any], ...] = ()
    if found.base.startswith("memory."):
        words = reproduce.words("leak", **place, path="all")
    elif not NO_STAGE & set(guilty.parts):
        late = found.base == "stages.late"
        words = reproduce.words("bisect", **place, tokens=LENGTHS[late])
        if ask and (told := _walked(place, LENGTHS[late:])):
            said, words, stages = told
    return CauseFound(found.cell, found.check, said, found.reproduce, reproduce.shell(words), stages)


def _walked(
    place: Mapping[str, str], lengths: Iterable[int]
) -> tuple[str, list[str], tuple[dict[str, Any], ...]] | None:
    """The sentence of a bisect that finds something wrong in time, its words, and the stages that it walked
    over; None where none does."""
    end = time.monotonic() + LIMIT_S
    for length in lengths:
        words = reproduce.words("bisect", **place, tokens=length)
        try:
            done = subprocess.run(
                prill(*words, "--json"),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=largest(0.0, end - time.monotonic()),
                check=False,
            )
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            return None
        if done.returncode == 1 and done.stdout:  # an engine that fails is told on stderr alone
            told = msgspec.json.decode(done.stdout)["data"]
            kept = tuple({name: one[name] for name in SHOWN_OF_STAGES} for one in told["stages"])
            return str(told["sentence"]), words, kept
        if done.returncode != 0:
            return None
    return None
