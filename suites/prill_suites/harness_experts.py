"""An engine that has another expert at one position: sound where noise decides, and wrong just beyond it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.embedded import Embedded
from prill_harness.engines.models import resolve_model
from prill_harness.faults.opening import open_engine
from prill_harness.planting import faults
from prill_harness.run.checks import Observer
from prill_harness.stages import routing
from prill_harness.tokens.golden import golden_for
from prill_runtime.ops.rounded import RoundedBackend
from prill_runtime.run.model import Model
from prill_suites import stages

MODEL, IDS = "fixture:gpt-oss-tiny", 48
ROUTED, ROUTER = "blk.0.routed", "blk.0.router"  # nothing before them depends on a choice
# As the documents have it (docs/adr/0002): an engine's error is at most three times the lane's own.
ALLOWED = 3.0


def exchanged(model: Model, ids: Sequence[int], at: int) -> dict[str, NDArray[np.float64]]:
    """Every stage of a pass that in the first mixture, at one position, has the first expert that is left out
    instead of the last one chosen."""

    def choose(stage: str, logits: NDArray[np.float64], own: routing.Chosen) -> routing.Chosen:
        chosen = own.copy()
        if stage == ROUTED:
            used = int(own[at].sum())
            chosen[at, np.argsort(-logits[at], kind="stable")[used - 1 : used + 1]] = False, True
        return chosen

    return routing.through(model, ids, choose)


class Exchanging(Embedded):
    """Rounds as the lane does, with one expert exchanged. It shows what it chose, not by which logits."""

    dtype = "float32"
    at = 0

    def trace(
        self, ids: Sequence[int], replace: Mapping[str, NDArray[np.float64]] | None = None
    ) -> Iterator[tuple[str, NDArray[np.floating]]]:
        found = exchanged(self.model, ids, self.at)
        return ((name, array) for name, array in found.items() if not name.endswith(".router"))


@contextmanager
def exchanging() -> Iterator[Exchanging]:
    """The engine, in the integers of the file's own lane, without what is planted in engines."""

    def opened() -> Exchanging:
        backend = RoundedBackend("float32", "q8_0")
        engine = Exchanging(Model.load(resolve_model(MODEL), backend=backend), MODEL)
        engine._info = replace(engine.info, arithmetic="int8")
        return engine

    with faults.scoped(opened, ()) as engine:
        assert isinstance(engine, Exchanging)
        yield engine


def borderline(oracle: Embedded, ids: Sequence[int]) -> tuple[int, int]:
    """The positions whose margins in the first router lie next to what noise explains, below and above."""

    def logits(model: Model) -> NDArray[np.float64]:
        return routing.through(model, ids)[ROUTER]

    truth, used = logits(oracle.model), int(oracle.info.config["n_experts_used"])
    with Model.load(resolve_model(MODEL), backend=RoundedBackend("float64", "q8_0")) as rounded:
        noise = ALLOWED * float(np.ptp(logits(rounded) - truth, axis=1).max())
    ordered = np.sort(truth, axis=1)
    over = ordered[:, -used] - ordered[:, -used - 1] - noise
    return int(np.where(over < 0, over, -np.inf).argmax()), int(np.where(over > 0, over, np.inf).argmin())


def judge(observe: Observer, wrong: bool) -> None:
    """Hold the stages of such an engine to the oracle's."""
    golden = golden_for(MODEL)
    ids = golden.prompts[0].sequence[:IDS]
    with exchanging() as engine, open_engine("numpy64", MODEL) as oracle:
        assert isinstance(oracle, Embedded)
        with faults.only(()):
            below, above = borderline(oracle, ids)
        engine.at = above if wrong else below
        stages.compare_stages(observe, engine, oracle, golden, resolve_model(MODEL), ids, [range(len(ids))])
