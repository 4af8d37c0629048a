"""The finding that explains a gate's other failures, and what to look at next."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from prill_harness.faults.trial.blame import blame
from prill_harness.numbers.compare import largest
from prill_harness.records.evidence import Evidence
from prill_harness.run import reproduce
from prill_harness.run.children import prill

LIMIT_S = 20.0
LENGTHS = (64, 300)  # ids of the text: what is wrong from the first, and what is wrong only late
# What no walk over the stages of a model explains. Everything else that can be blamed is one of them.
NO_STAGE = frozenset({
    "file", "blocks", "tokenizer", "sampler", "memory", "state", "batch", "generate", "errors", "trace",
    "boundary", "harness", "oracle",
})  # fmt: skip


@dataclass(frozen=True)
class Cause:
    """The check that explains the others.

    Attributes:
        sentence: what is wrong. reproduce, following: shell commands that show it again, and more of it.
    """

    check: str
    sentence: str
    reproduce: str
    following: str


def find(failed: Iterable[Evidence], specs: Mapping[str, str], *, ask: bool = True) -> Cause | None:
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
    if found.base.startswith("memory."):
        words = reproduce.words("leak", **place, path="all")
    elif not NO_STAGE & set(guilty.parts):
        late = found.base == "stages.late"
        words = reproduce.words("bisect", **place, tokens=LENGTHS[late])
        if ask and (told := _walked(place, LENGTHS[late:])):
            said, words = told
    return Cause(found.check, said, found.reproduce, reproduce.shell(words))


def _walked(place: Mapping[str, str], lengths: Iterable[int]) -> tuple[str, list[str]] | None:
    """The sentence of a bisect that finds something wrong in time, and its words; None where none does."""
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
            return str(msgspec.json.decode(done.stdout)["sentence"]), words
        if done.returncode != 0:
            return None
    return None
