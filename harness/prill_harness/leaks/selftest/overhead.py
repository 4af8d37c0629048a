"""Measure how much the preloaded ledger slows the embedded engine's decode loop."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

import msgspec

from prill_harness.leaks.ledgers import build
from prill_harness.numbers.compare import smallest
from prill_harness.run import cells
from prill_harness.run.children import python
from prill_runtime.errors import PrillError

MODEL = "fixture:llama-tiny"
TOKENS = 48
PAIRS, QUICK_PAIRS, LOOPS, ROUNDS = 7, 5, 5, 3
MOST, NEAR = 1.05, 1.01
TIMEOUT_S = 120.0


class Cost(msgspec.Struct, frozen=True):
    """CPU seconds of the fastest loop, without and with the ledger."""

    plain: float
    preloaded: float
    pairs: int

    @property
    def ratio(self) -> float:
        return self.preloaded / self.plain

    @property
    def holds(self) -> bool:
        return self.ratio < MOST

    @property
    def sentence(self) -> str:
        more = f"{100 * (self.ratio - 1):+.1f} %"
        each = f"{1e3 * self.preloaded / TOKENS:.3f} and {1e3 * self.plain / TOKENS:.3f} ms a token"
        return f"{more} ({each}, the fastest of {self.pairs * LOOPS} loops each, in turn)"


def measured(quick: bool = False) -> Cost:
    """Time the loop with and without the ledger in turn, each time in a fresh process.

    Other load on the machine only adds time, so the fastest loop of either kind is closest to its true time.
    That is known once a second process comes as close; until then both are timed again, whatever the ratio
    is so far.
    """
    pairs = QUICK_PAIRS if quick else PAIRS
    plain, preloaded = list[float](), list[float]()
    for _ in range(ROUNDS):
        for _ in range(pairs):
            plain.append(_timed({}))
            with build.preloaded() as (preload, files):
                preloaded.append(_timed({"LD_PRELOAD": preload}, files))
        if _known(plain) and _known(preloaded):
            break
    return Cost(min(plain), min(preloaded), len(plain))


def _known(times: Sequence[float]) -> bool:
    fastest, second = sorted(times)[:2]
    return second <= NEAR * fastest


def _timed(extra: dict[str, str], files: Sequence[int] = ()) -> float:
    done = subprocess.run(
        python(__spec__.name),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=cells.environment(2) | extra,
        pass_fds=tuple(files),
        check=False,
    )
    if done.returncode:
        raise PrillError("the decode loop could not be timed", got=done.stderr.strip().splitlines()[-1:])
    return float(done.stdout)


def main(arguments: Sequence[str] = ()) -> int:
    """Print the CPU seconds of the fastest decode loop."""
    from prill_harness.faults.opening import open_engine

    best = float("inf")
    with open_engine("numpy", MODEL) as engine:
        ids = engine.tokenize("the quick brown fox")
        for _ in range(LOOPS + 1):
            began = time.process_time()
            engine.generate(ids, max_tokens=TOKENS, ignore_eos=True)
            best = smallest(best, time.process_time() - began)
    print(best)
    return 0


if __name__ == "__main__":
    sys.exit(main())
