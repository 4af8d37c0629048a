"""Open random sound models on an engine and check what it computes, a JSON line each.

    python ci/openings.py --engine cuda:fast --models 500 --seed 3 --seconds 600 --out openings.jsonl

Shapes are chosen to strain an arena: vocabularies that are large compared with the width, prompts as long as
the context, batches of 2 to 20, two chunks, a text. Logits are compared with numpy64 within the bound of the
engine's arithmetic. Exit code: 0 if every opening was right, 1 if one was not, 2 if there was none.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prill_fixtures import sound
from prill_fixtures.sound import Recipe
from prill_fixtures.sound_blocks import TYPES
from prill_fixtures.sound_vocab import SoundVocabulary
from prill_harness import open_engine
from prill_harness.engines.base import Engine
from prill_harness.engines.embedded import Embedded
from prill_harness.numbers import lanes
from prill_runtime.device.memory.arena import OutOfDeviceMemory
from prill_runtime.errors import PrillError
from prill_suites import ops_models
from prill_suites.ops_bench import BOUND

KINDS = ("vocabulary", "prompt", "batch", "any")
MEASURED = 32  # positions on which the noise of a lane is measured
LOGITS = {True: 1 << 18, False: 1 << 24}
"""Most logits of one prompt, by whether models are small."""
Logits = NDArray[np.floating[Any]]


def recipe(random: Random, kind: str, small: bool) -> Recipe:
    """A sound model whose logits differ from row to row; `small`: for an emulated engine."""
    r = random
    if kind == "any":
        return replace(
            sound.draw(r, small=small), weights="random", norms="random", head="random", pruned=0.0
        )
    family = r.choice(sound.FAMILIES)
    heads, dim = r.choice((1, 2, 3, 6)), r.choice((16, 32, 48, 64, 128, 256)[: 4 if small else 6])
    width = heads * dim if family == "gpt2" else r.choice((16, 32, 48, 96, 288, 512)[: 3 if small else 6])
    vocabularies = (4099, 9000) if small else (32_000, 50_257, 128_256, 200_000)
    context = {"vocabulary": 256, "prompt": 128 if small else r.choice((512, 1025, 3000, 4096)), "batch": 24}
    return Recipe(
        seed=r.randrange(1 << 31),
        family=family,
        vocabulary=SoundVocabulary(
            "bpe" if family == "gpt2" else "spm",
            r.choice(vocabularies) if kind == "vocabulary" else r.choice((7, 300, 1000)),
        ),
        context=context[kind],
        layers=1 if small else r.randint(1, 6),
        width=width,
        heads=heads,
        kv_heads=heads if family == "gpt2" else r.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        head_dim=dim,
        rope_dim=dim,
        ffn=r.choice((32, 96, 256, 768)[: 2 if small else 4]),
        type=r.choice(TYPES).name,
        tied=r.random() < 0.5,
    )


def difference(got: Logits, expected: Logits) -> tuple[float, float]:
    """NMSE relative to each row's mean, and the largest absolute difference."""
    if got.shape != expected.shape or not np.isfinite(got).all():
        return float("inf"), float("inf")
    error, wide = got.astype(np.float64) - expected, expected.astype(np.float64)
    scale = max(float(wide.var(axis=-1).mean()), 1e-3 * float((wide**2).mean()))
    square = float((error**2).mean())
    without_scale = float("inf") if square else 0.0  # rows of zeros must be matched exactly
    return (square / scale if scale else without_scale), float(np.abs(error).max())


def runs(engine: Engine, oracle: Embedded, r: Random, most: int) -> Iterator[tuple[str, Logits, Logits]]:
    """Every way to compute logits: its name, the engine's result and the oracle's."""
    config = engine.info.config
    vocabulary, context = int(config["vocab_size"]), int(config["context_length"])

    def ids(length: int) -> list[int]:
        return [r.randrange(vocabulary) for _ in range(length)]

    prompt = ids(max(2, min(context, most // vocabulary)))
    expected = oracle.logits(prompt)
    yield f"prompt of {len(prompt)}", engine.logits(prompt), expected
    cut = r.randrange(1, len(prompt))
    session = engine.session(len(prompt))
    rows = np.concatenate([session.feed(prompt[:cut]), session.feed(prompt[cut:])])
    session.close()
    yield f"chunks of {cut} and {len(prompt) - cut}", rows, expected
    longest = max(1, min(context, 24, most // vocabulary))
    batch = [ids(r.randint(1, longest)) for _ in range(r.randint(2, 20))]
    for n, (got, alone) in enumerate(zip(engine.logits_batch(batch), map(oracle.logits, batch), strict=True)):
        yield f"sequence {n} of {len(batch)}", got, alone
    start = prompt[: max(1, min(len(prompt), context - 5))]
    text = engine.generate(start, max_tokens=4, ignore_eos=True)
    after = ops_models.logprobs(oracle.logits([*start, *text.ids])[len(start) - 1 : -1])
    chosen = after[np.arange(len(text.ids)), list(text.ids)]
    # Relative to the row's mean, as for a row of logits: one logprob alone has no scale.
    around = np.stack([chosen, after.mean(axis=-1)], axis=-1)
    yield "text of 4", np.stack([np.array(text.logprobs), after.mean(axis=-1)], axis=-1), around


def opening(spec: str, made: Recipe, folder: Path, r: Random, most: int) -> dict[str, Any]:
    """Open and try one model: what was wrong, or the worst difference."""
    file = sound.build(made, folder / "model.gguf")
    done: dict[str, Any] = {"status": "right", "nmse": 0.0, "largest": 0.0}
    stage = "opening"
    try:
        with open_engine(spec, file) as engine, open_engine("numpy64", file) as oracle:
            assert isinstance(oracle, Embedded)
            bound, stage = bound_of(engine, oracle, file, made), "prompt"
            for stage, got, expected in runs(engine, oracle, r, most):
                nmse, largest = difference(got, expected)
                done["nmse"], done["largest"] = max(done["nmse"], nmse), max(done["largest"], largest)
                if not nmse <= bound:
                    return done | {"status": "wrong", "stage": stage, "bound": bound}
    except OutOfDeviceMemory as error:
        return done | {"status": "out of memory", "stage": f"after {stage}", "error": str(error)}
    except Exception as error:  # whatever it is, go on with the next model
        said = str(error) if isinstance(error, PrillError) else repr(error)
        return done | {"status": "error", "stage": f"after {stage}", "error": said}
    return done | {"bound": bound}


def bound_of(engine: Engine, oracle: Embedded, file: Path, made: Recipe) -> float:
    """The NMSE bound of the engine's arithmetic on this file: its lane's ratio times the rounding noise."""
    lane = lanes.lane_for(made.type, engine.info.arithmetic)
    length = min(MEASURED, oracle.model.context_length - 1)
    ids = [n * 7 % oracle.model.vocab_size for n in range(length + 1)]
    noise = ops_models.noise(file, lane, ids, oracle.logits(ids)[:-1])
    return max(BOUND[engine.info.arithmetic], lane.ratio * noise)


def tried(spec: str, models: int, seed: int, seconds: float, small: bool) -> Iterator[dict[str, Any]]:
    """A record for each opening, until the time is up."""
    began = time.monotonic()
    for number in range(models):
        if (spent := time.monotonic() - began) > seconds:
            return
        random = Random(f"{seed}/{number}")
        kind = KINDS[number % len(KINDS)]
        made = recipe(random, kind, small)
        print(f"{number}: {made}", file=sys.stderr, flush=True)  # in case the process dies
        with tempfile.TemporaryDirectory() as folder:
            done = opening(spec, made, Path(folder), random, LOGITS[small])
        took = time.monotonic() - began - spent
        yield {"model": number, "kind": kind, **done, "seconds": round(took, 2), "recipe": asdict(made)}


def summary(spec: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a run."""
    status = Counter(record["status"] for record in records)
    compared = [record for record in records if record["status"] == "right"]
    worst = max(compared, key=lambda record: record["nmse"] / record["bound"], default=None)
    return {
        "engine": spec,
        "openings": len(records),
        "right": status["right"],
        "out_of_memory": status["out of memory"],
        "errors": status["error"],
        "wrong": status["wrong"],
        "largest": max((record["largest"] for record in compared), default=None),
        "worst": worst and {name: worst[name] for name in ("model", "kind", "nmse", "bound", "largest")},
        "seconds": round(sum(record["seconds"] for record in records), 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", default="emu")
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=300.0, help="no model is begun after so many")
    parser.add_argument("--out", type=Path, help="a file for the lines, besides standard output")
    parser.add_argument("--small", action="store_true", help="as for an engine that emulates")
    chosen = parser.parse_args(arguments)
    small = chosen.small or chosen.engine.startswith("emu")
    records = []
    with (chosen.out or Path("/dev/null")).open("w") as out:
        for record in tried(chosen.engine, chosen.models, chosen.seed, chosen.seconds, small):
            records.append(record)
            print(line := json.dumps(record), flush=True)
            print(line, file=out, flush=True)
        figures = summary(chosen.engine, records)
        for target in (sys.stdout, out):
            print(json.dumps(figures), file=target, flush=True)
    if not records:
        return 2
    return 0 if figures["right"] == len(records) else 1


if __name__ == "__main__":
    sys.exit(main())
