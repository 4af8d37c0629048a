"""Gate random sound models, each by itself: a sound model must be green.

    python ci/sound_gates.py --models 200 --seed 0 --jobs 16 --out sound.jsonl

Any other verdict is printed with the recipe from which `prill_fixtures.sound.build` writes the model, and the
last line counts the gates by what they said:

    green    the gate passed
    stale    every check passed, and the gate does not count them (exit code 10): the kills on record were
             seen with other code of the checks. It says nothing of the model; record the kills with
             `prill faults matrix -o`, and gate the models again
    alarm    a check failed, broke or could not tell: a false alarm, to be mended
    broken   the gate gave no verdict

Exit code: 0 if every gate was green, 1 if one was an alarm or broken, 2 if there was none, 10 if everything
that is wrong is stale.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gated

from prill_fixtures import sound

STALE = "kills"  # the rule by which a check counts only with kills seen with its present code


def said(verdict: dict[str, Any]) -> str:
    """What a verdict says of a model, in one of the words above."""
    broken = {rule["id"] for rule in verdict["rules"] if rule["status"] != "passed"}
    if verdict["exit_code"] == 0:
        return "green"
    return "stale" if broken == {STALE} else "alarm"


def gate(seed: int, small: bool, engine: str) -> dict[str, Any]:
    """Write and gate one model: exit code, the verdict's sentence, and the checks that are not green."""
    recipe = sound.draw(seed, small=small)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = sound.build(recipe, folder / f"sound{seed}.gguf")
        asked = ("--engine", engine, "--model", file.name)
        ran = gated.gate(folder, *asked, PRILL_CACHE=str(folder / "cache"))
    done = {
        "seed": seed,
        "said": said(ran.verdict) if ran.verdict else "broken",
        "exit_code": ran.exit_code,
        "sentence": ran.sentence,
        "red": [
            f"{c['check']} {c['status']}: {c['sentence']}"
            for c in (ran.verdict or {"checks": ()})["checks"]
            if c["status"] != "passed"
        ],
    }
    seconds = round(time.monotonic() - began, 1)
    return done | {"seconds": seconds, "recipe": asdict(recipe)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the first; the next ones count up")
    parser.add_argument("--jobs", type=int, default=2, help="gates at a time")
    parser.add_argument("--engine", default="numpy")
    parser.add_argument("--seconds", type=float, default=3600.0, help="no gate is begun after so many")
    parser.add_argument("--small", action="store_true", help="smaller models")
    parser.add_argument("--out", type=Path, help="a file for the lines, besides standard output")
    asked = parser.parse_args(arguments)
    deadline = time.monotonic() + asked.seconds
    words: Counter[str] = Counter()

    def one(seed: int) -> dict[str, Any] | None:
        return gate(seed, asked.small, asked.engine) if time.monotonic() < deadline else None

    with ThreadPoolExecutor(asked.jobs) as pool, (asked.out or Path(os.devnull)).open("w") as out:
        waiting = [pool.submit(one, asked.seed + n) for n in range(asked.models)]
        for done in (future.result() for future in as_completed(waiting)):
            if done is not None:
                words[done["said"]] += 1
                for target in (sys.stdout, out):
                    print(json.dumps(done), file=target, flush=True)
    print(json.dumps({"gates": words.total(), **words}), flush=True)
    if not words:
        return 2
    return 0 if set(words) == {"green"} else 10 if set(words) <= {"green", "stale"} else 1


if __name__ == "__main__":
    sys.exit(main())
