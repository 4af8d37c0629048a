"""Clean runs: a sound engine on random text, judged like any other engine.

A check that fails on a sound engine is as useless as one that never fails. Every run takes a text that is in
no golden, and a window of it at a random place and of random length, and holds the logits to the lane's
bounds and every stage, free and isolated, to its NMSE.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from prill_fixtures import corpus
from prill_harness.engines.models import resolve_model
from prill_harness.faults.opening import open_engine
from prill_harness.faults.trial.kills import Clean
from prill_harness.numbers import lanes
from prill_harness.numbers.compare import largest
from prill_harness.numbers.lanes import Figures, Lane
from prill_harness.planting import faults
from prill_harness.run import cells
from prill_harness.run.children import python
from prill_harness.run.outcomes import one_line
from prill_harness.stages import trace
from prill_harness.stages.bisect import bisect
from prill_harness.stages.bounds import stage_bounds
from prill_harness.stages.subject import open_subject
from prill_harness.tokens.golden import golden_for
from prill_runtime.errors import PrillError
from prill_runtime.ops.rounded import RoundedBackend
from prill_runtime.run.model import Model

NAMES = ("llama-tiny", "gpt2-tiny")
TYPES = ("f16", "f32", "bf16", "q8_0", "q4_0", "q4_k", "q6_k")
SPECIAL = ("fixture:llama-window", "fixture:llama-long", "fixture:gpt-oss-tiny", "fixture:gemma3-tiny")
MODELS = (
    *(f"fixture:{name}" + f":{kind}" * (kind != "f16") for kind in TYPES for name in NAMES),
    *SPECIAL,
)
SHORTEST, LONGEST = 2, 320  # positions
# Figures of noise that are compared with their bounds; agreements and ranks are counts, and can only alarm.
MEASURED = ("nmse", "kl_p99", "kl_max", "dlogprob_max")
STREAM = 7_000  # first of the corpus seeds that neither training nor goldens used


class CleanRun(msgspec.Struct, frozen=True):
    """One clean run: `ratio` is its largest figure over that figure's bound; `alarm` says what was wrong."""

    model: str
    seed: int
    positions: int
    ratio: float
    alarm: str = ""


def runs(model: str, seeds: Sequence[int]) -> list[CleanRun]:
    """Run the engine on one window for each seed."""
    golden, path = golden_for(model), resolve_model(model)
    found = []
    with (
        open_engine("numpy", model) as engine,
        open_engine("numpy64", model) as oracle,
        open_subject(path) as subject,
    ):
        lane = lanes.lane_for(golden.type, engine.info.arithmetic)
        for seed in seeds:
            ids = window(engine.tokenize(corpus.document(STREAM + seed, 0)), seed)
            got, expected = trace.capture(engine, ids), trace.capture(oracle, ids)
            floor = with_own_buckets(golden.floors[lane.name], path, lane, ids, expected.stages["logits"])
            bound = lanes.bounds(lane, floor)
            tally = lanes.LogitTally()
            tally.add(expected.stages["logits"], got.stages["logits"])
            figures = tally.figures()
            limits = stage_bounds(path, lane, ids, expected.stages)
            report = bisect(engine, oracle, ids, subject, limits)
            rows = lanes.judged(figures, bound)
            ratios = [value / limit for name, value, limit, _ in rows if name in MEASURED]
            ratios += [stage.free / bound.nmse for stage in report.stages]
            ratios += [stage.isolated / stage.bound for stage in report.stages]
            broken = [f"{n} {v:.3g}, bound {limit:.3g}" for n, v, limit, _ in lanes.broken(figures, bound)]
            broken += [f"{s.stage} NMSE {s.free:.3g}" for s in report.stages if not s.free <= bound.nmse]
            broken += [report.sentence] * (not report.ok)
            found.append(CleanRun(model, seed, len(ids), max(ratios), broken[0] if broken else ""))
    return found


def with_own_buckets(
    floor: Figures, path: Path, lane: Lane, ids: Sequence[int], truth: NDArray[np.floating]
) -> Figures:
    """A golden's floor with its buckets raised to those of this window, as a golden of the window would have.

    A bucket's floor is the maximum over a few positions of one text, and a window of another text may well
    exceed it. A gate compares the very text whose floor it has.
    """
    moved = "single" if lane.activations == "f32" else lane.activations
    with faults.only(()), Model.load(path, backend=RoundedBackend("float64", moved)) as model:  # type: ignore[arg-type]
        tally = lanes.LogitTally()
        tally.add(truth, model.forward([(model.new_cache(len(ids)), list(ids))])[0])
    own = tally.figures().buckets
    return replace(floor, buckets={k: largest(v, own.get(k, 0.0)) for k, v in floor.buckets.items()})


def window(ids: Sequence[int], seed: int) -> list[int]:
    """A piece at a random place, of random length."""
    rng = random.Random(f"window/{seed}")
    length = min(len(ids), rng.randint(SHORTEST, LONGEST))
    start = rng.randint(0, len(ids) - length)
    return list(ids[start : start + length])


def run(count: int, jobs: int, progress: Callable[[str], None]) -> list[CleanRun]:
    """At least `count` runs, spread over all models, those of each model in a process of its own."""
    each = -(-count // len(MODELS))

    def one(number: int) -> list[CleanRun]:
        model, first = MODELS[number], number * each
        words = [*python(__spec__.name), model, str(first), str(first + each)]
        done = subprocess.run(words, capture_output=True, env=cells.environment(2), check=False)
        if done.returncode:
            lines = done.stderr.decode("utf-8", "backslashreplace").strip().splitlines() or ["no output"]
            raise PrillError("clean runs ended", where=model, got=one_line(lines[-1]))
        made = msgspec.json.decode(done.stdout, type=list[CleanRun])
        progress(model)
        return made

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        return [found for made in pool.map(one, range(len(MODELS))) for found in made]


def summary(drawn: Sequence[CleanRun], checks: int, suite_alarms: int) -> Clean:
    """The clean runs as kept in kills.json; two digits, so that machines' last bits do not show."""
    worst: dict[str, float] = {}
    for each in drawn:
        worst[each.model] = largest(worst.get(each.model, 0.0), float(f"{each.ratio:.2g}"))
    return Clean(len(drawn), sum(bool(each.alarm) for each in drawn), worst, checks, suite_alarms)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one model, and print the runs as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("first", type=int)
    parser.add_argument("end", type=int)
    asked = parser.parse_args(arguments)
    sys.stdout.buffer.write(msgspec.json.encode(runs(asked.model, range(asked.first, asked.end))))


if __name__ == "__main__":
    main()
