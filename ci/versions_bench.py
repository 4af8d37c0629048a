"""Compare the speed of an installed version of prill with another version, or with another program.

    pip install --target before prill-OLD.whl && pip install --target after prill-NEW.whl
    python ci/versions_bench.py --before before --after after --engine cuda:fast --model synth:llama-1b:q8_0
    python ci/versions_bench.py --peer "./llama_cpp_bench LIBS" --after after --model FILE --least 1.5

Each runs in a process of its own and keeps its model open; they are timed alternately, each going first in
turn, two versions on the same random prompts. A peer is started with model, prompt and tokens as further
arguments; for each number on standard input it answers `{"prompt": SECONDS, "decode": SECONDS}`, the second
of one token (`ci/llama_cpp_bench.c` is one). A share is the first one's seconds over the second's, of
neighbouring measurements: below 1 the second is slower. Exit code: 0 if the median of every share is at
least `--least`, 1 if one is not, 2 if one could not be run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

TIMED = """
import json, sys, time
import numpy as np
from prill_harness import open_engine

def answer(engine, seed, prompt, tokens):
    drawn = np.random.default_rng(seed).integers(0, engine.info.config["vocab_size"], prompt)
    ids = [int(token) for token in drawn]
    began = time.perf_counter()
    made = engine.generate(ids, max_tokens=tokens, ignore_eos=True)
    took = time.perf_counter() - began
    assert len(made.ids) == tokens, f"expected {tokens} tokens, got {len(made.ids)}"
    return took, list(made.ids)

with open_engine(sys.argv[1], sys.argv[2]) as engine:
    prompt, tokens = map(int, sys.argv[3:])
    for number in range(2):  # makes what is made on first use: the second prompt of a length is captured
        answer(engine, [number], prompt, tokens + 1)
    for line in sys.stdin:
        first, _ = answer(engine, [int(line), 0], prompt, 1)
        whole, ids = answer(engine, [int(line), 1], prompt, tokens + 1)
        assert whole > first, "decoding cannot be told from noise: ask for more --tokens"
        took = {"prompt": first, "decode": (whole - first) / tokens}
        print(json.dumps({**took, "ids": ids}), flush=True)
"""
PHASES = ("prompt", "decode")


class TimedProcess:
    """What is timed, a version or a peer, in its own process."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts `command`; raises ChildProcessError if there is no such program."""
        self.name = name
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **environment},
            )
        except OSError as error:
            raise ChildProcessError(
                f"{name}: expected a program that starts, got {error.strerror}"
            ) from error

    def timed(self, number: int) -> dict[str, Any]:
        """Seconds of one prompt and of one decoded token, and a version's ids.

        Raises:
            ChildProcessError: the process ended; its own error is on stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{number}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its last answer is missing, which is reported below
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError(f"{self.name}: expected seconds, got exit code {self._process.wait()}")
        read: dict[str, Any] = json.loads(line)
        return read

    def close(self) -> None:
        self._process.communicate()


def version(site: Path, asked: argparse.Namespace, model: str) -> TimedProcess:
    """The version of prill that was installed into the folder `site`."""
    words = [sys.executable, "-P", "-c", TIMED, asked.engine, model, str(asked.prompt), str(asked.tokens)]
    return TimedProcess(str(site), words, {"PYTHONPATH": str(site.resolve())})


def peer(asked: argparse.Namespace, model: str) -> TimedProcess:
    """The other program."""
    return TimedProcess(
        asked.peer, [*shlex.split(asked.peer), model, str(asked.prompt), str(asked.tokens)], {}
    )


def compared(asked: argparse.Namespace, model: str) -> dict[str, Any]:
    """Both on one model: tokens per second of each, the shares, and whether two versions' ids are equal."""
    with ExitStack() as stack:
        first = version(asked.before, asked, model) if asked.before else peer(asked, model)
        stack.callback(first.close)
        second = version(asked.after, asked, model)
        stack.callback(second.close)
        before: list[dict[str, Any]] = []
        after: list[dict[str, Any]] = []
        for number in range(asked.repeat):
            for one in (first, second) if number % 2 == 0 else (second, first):
                (before if one is first else after).append(one.timed(number + 2))
    done: dict[str, Any] = {"engine": asked.engine, "model": model}
    if asked.before:
        done["equal ids"] = all(b["ids"] == a["ids"] for b, a in zip(before, after, strict=True))
    for phase, work in zip(PHASES, (asked.prompt, 1), strict=True):
        shares = [b[phase] / a[phase] for b, a in zip(before, after, strict=True)]
        rates = [work / statistics.median(run[phase] for run in runs) for runs in (before, after)]
        done[phase] = {
            "before": round(rates[0], 1),
            "after": round(rates[1], 1),
            "share": round(statistics.median(shares), 4),
            "from": round(min(shares), 4),
            "to": round(max(shares), 4),
        }
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    first = parser.add_mutually_exclusive_group(required=True)
    first.add_argument("--before", type=Path, help="folder that the first was installed into")
    first.add_argument("--peer", metavar="COMMAND", help="or another program, and the first of its arguments")
    parser.add_argument("--after", type=Path, required=True, help="and the second")
    parser.add_argument("--engine", default="cuda:fast")
    parser.add_argument("--model", action="append", required=True, help="may be given several times")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--least", type=float, default=0.98, help="share that every median has to reach")
    parser.add_argument("--out", type=Path, help="a file for the lines, besides standard output")
    asked = parser.parse_args(arguments)
    reached = True
    with (asked.out or Path(os.devnull)).open("w", encoding="utf-8") as out:
        for model in asked.model:
            try:
                done = compared(asked, model)
            except ChildProcessError as error:
                print(error, file=sys.stderr)
                return 2
            reached &= all(done[phase]["share"] >= asked.least for phase in PHASES)
            for target in (sys.stdout, out):
                print(json.dumps(done), file=target, flush=True)
    return int(not reached)


if __name__ == "__main__":
    sys.exit(main())
