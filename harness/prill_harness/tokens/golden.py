"""Goldens: a model's expected tokens, logprobs, margins and noise floors, recorded or read from disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.models import fixture_name, resolve_model
from prill_harness.numbers import compare
from prill_harness.numbers.lanes import Figures, LogitTally, type_lane
from prill_harness.records.evidence import builtin
from prill_harness.stages import routing
from prill_harness.tokens import golden_prompts
from prill_harness.tokens.golden_pack import (
    FOLLOWED,
    SCHEMA,
    Fingerprint,
    Golden,
    GoldenPrompt,
    Margins,
    Packed,
    SampledGolden,
    load,
    save,
)
from prill_runtime import user_cache
from prill_runtime.errors import ModelFileError, NotANumber, UsageError
from prill_runtime.gguf.file import GGUFFile, open_gguf
from prill_runtime.ops.rounded import RoundedBackend
from prill_runtime.run.model import Model
from prill_runtime.sampling.sampler import SamplingParams, sample

__all__ = ["Golden", "GoldenPrompt", "golden_for", "load", "record", "save"]

TOKENS = 300
SAMPLED_TOKENS = 32
SAMPLERS = (
    SamplingParams(temperature=0.8, seed=1),
    SamplingParams(temperature=1.0, top_k=40, top_p=0.95, seed=20),
    SamplingParams(temperature=0.7, min_p=0.05, repetition_penalty=1.1, seed=300),
    SamplingParams(temperature=1.3, top_p=0.9, seed=2**63 + 4),
)
PROMPTS = (
    "The quick brown fox jumps over the lazy dog. The dog",
    "Once upon a time there was a small village at the edge of a forest.",
    "Question: What is the capital of France?\nAnswer:",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 4, 5, 6, 7,",
    "Dear Sir or Madam,\n\nI am writing to",
    "Water boils at a temperature of 100 degrees Celsius, which is 212 degrees",
    '{"name": "Alice", "age": 30, "city": "',
)

Rows = NDArray[np.floating]
Progress = Callable[[int, int], None]


def record(
    model_path: str | Path,
    prompts: Sequence[str] = PROMPTS,
    *,
    tokens: int = TOKENS,
    progress: Progress | None = None,
    name: str = "",
) -> Golden:
    """Run the float64 oracle over the prompts and measure the noise floors of the file's lanes.

    Prompts that leave too little of the context free, or that the vocabulary cannot spell, are replaced.
    End-of-text does not stop a continuation, so each has `tokens` ids, or as many as the context holds.

    Args:
        progress: called with the steps done and their total.

    Raises:
        UsageError: a context of one position, or `tokens` below 1.
        ModelFileError, UnsupportedModel: as Model.load; or the oracle, or a lane's engine, fails on it.
    """
    path = Path(model_path)
    with open_gguf(path) as file:
        kind = file_type(file)
    with Model.load(path, dtype="float64") as oracle:
        context = oracle.context_length
        fitting = golden_prompts.choose(oracle.tokenizer, prompts, context)
        unspelled = not fitting
        if unspelled:
            fitting = golden_prompts.given(oracle.vocab_size, len(prompts), context)
        if not fitting or tokens < 1:
            raise UsageError(
                "nothing to record",
                where=str(path),
                expected="a prompt, at least one token, and a context of at least 2 positions",
                got=f"{len(prompts)} prompts, {tokens} tokens, a context of {context}",
            )
        longest = max(len(ids) for _, ids in fitting)
        count = min(tokens, context - longest)
        drawn = min(count, SAMPLED_TOKENS)
        total = count + drawn + len(fitting)
        step = _counter(progress, total)
        with _blaming(path, "the float64 oracle"):
            recorded = _greedy(oracle, fitting, count, step, unspelled)
            _sampled(oracle, recorded, drawn, step)
        floors = _floors(path, kind, oracle, recorded, step)
        return Golden(
            schema=SCHEMA,
            name=name or builtin(path.stem),
            type=kind,
            fingerprint=Fingerprint(
                oracle.sha256,
                oracle.tokenizer.digest,
                oracle.backend.name,
                versions(),
            ),
            config=dict(oracle.config),
            prompts=recorded,
            margins=Margins.of(np.concatenate([prompt.margins for prompt in recorded])),
            floors=floors,
        )


@contextmanager
def _blaming(path: Path, who: str) -> Iterator[None]:
    """Blame the file for errors while a golden is recorded: no engine is under test then."""
    try:
        yield
    except NotANumber as error:
        raise ModelFileError(
            f"no golden can be recorded, {who} stops on this file",
            where=str(path),
            expected="finite numbers",
            got=f"{error.what} in {error.where}",
            hint="the suite `file` looks for the tensor that is damaged",
        ) from error


def versions() -> dict[str, str]:
    """Versions of the packages that a golden's numbers depend on."""
    return {package: version(package) for package in ("prill", "numpy", "gguf")}


def file_type(file: GGUFFile) -> str:
    """The type that most bytes of a file's matrices have, in lower case."""
    weight: Counter[str] = Counter()
    for tensor in file.tensors.values():
        if len(tensor.shape) > 1:
            weight[tensor.type.name.lower()] += tensor.nbytes
    return weight.most_common(1)[0][0] if weight else "f32"


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return step


def _decode(
    model: Model, prompts: Sequence[list[int]], count: int, choose: Callable[[int, int, Rows], int]
) -> None:
    """Continue all prompts together: `choose(prompt, step, row of logits)` gives each next id."""
    caches = [model.new_cache(len(ids) + count) for ids in prompts]
    fresh: list[list[int]] = [*prompts]
    for step in range(count):
        logits = model.forward(list(zip(caches, fresh, strict=True)), last_only=True)
        fresh = [[choose(number, step, rows[-1])] for number, rows in enumerate(logits)]


def _greedy(
    oracle: Model,
    prompts: list[tuple[str, list[int]]],
    count: int,
    step: Callable[[], None],
    unspelled: bool = False,
) -> list[GoldenPrompt]:
    k = min(compare.TOP_K, oracle.vocab_size)
    ids = np.zeros((len(prompts), count, k), np.int64)
    logprobs = np.zeros((len(prompts), count, k), np.float32)

    def best(prompt: int, at: int, row: Rows) -> int:
        top = compare.top_ids(row, k)
        ids[prompt, at], logprobs[prompt, at] = top, compare.log_softmax(row)[top]
        if prompt == 0:
            step()
        return int(top[0])

    _decode(oracle, [encoded for _, encoded in prompts], count, best)
    eog = oracle.tokenizer.eog_ids
    out = []
    for number, (text, encoded) in enumerate(prompts):
        tokens = ids[number, :, 0].tolist()
        first_eos = next((at for at, token in enumerate(tokens) if token in eog), None)
        packed = Packed.of(ids[number]), Packed.of(logprobs[number])
        out.append(GoldenPrompt(text, encoded, tokens, first_eos, *packed, sampled=[], unspelled=unspelled))
    return out


def _sampled(oracle: Model, prompts: list[GoldenPrompt], count: int, step: Callable[[], None]) -> None:
    """Draw with two settings per prompt, so that every setting is used on several prompts."""
    runs = [
        (prompt, SAMPLERS[(2 * number + way) % len(SAMPLERS)], number)
        for number, prompt in enumerate(prompts)
        for way in range(2)
    ]
    settings = [replace(params, seed=params.seed + number) for _, params, number in runs]
    histories = [[*prompt.ids] for prompt, _, _ in runs]

    def draw(run: int, at: int, row: Rows) -> int:
        history = histories[run]
        history.append(sample(row, settings[run], len(history), history))
        if run == 0:
            step()
        return history[-1]

    _decode(oracle, [[*history] for history in histories], count, draw)
    for (prompt, _, _), params, history in zip(runs, settings, histories, strict=True):
        prompt.sampled.append(SampledGolden(tokens=history[len(prompt.ids) :], **asdict(params)))


def _floors(
    path: Path, kind: str, oracle: Model, prompts: list[GoldenPrompt], step: Callable[[], None]
) -> dict[str, Figures]:
    """Each lane's distance from the oracle at every position of the forced sequences; of a model with experts
    also on those that the oracle chose, for an exchanged one is no rounding."""
    lane, routed = type_lane(kind), bool(routing.routers(oracle.network))
    models = {
        "exact": Model.load(path, dtype="float32"),
        lane.name: Model.load(path, backend=RoundedBackend("float32", lane.activations)),  # type: ignore[arg-type]
    }
    tallies = {name + behind: LogitTally() for name in models for behind in ("", FOLLOWED)[: 1 + routed]}
    for prompt in prompts:
        ids = prompt.sequence
        with _blaming(path, "the float64 oracle"):
            expected = forced(oracle, ids)
            chosen = routing.choices(oracle.network, routing.through(oracle, ids)) if routed else {}
        for name, model in models.items():
            with _blaming(path, f"the lane {name}"):
                tallies[name].add(expected, forced(model, ids))
                if routed:
                    followed = routing.through(model, ids, routing.fixed(chosen))["logits"]
                    tallies[name + FOLLOWED].add(expected, followed)
        step()
    return {name: tally.figures() for name, tally in tallies.items()}


def forced(model: Model, ids: Sequence[int]) -> Rows:
    """Logits (len(ids), vocab) of a sequence in one step."""
    return model.forward([(model.new_cache(len(ids)), ids)])[0]


def prompts_for(model_spec: str | Path) -> tuple[str, ...]:
    """The prompts that a model's golden is recorded with: a fixture's own, PROMPTS for any other file."""
    named = fixture_name(model_spec)
    if named is None:
        return PROMPTS
    import prill_fixtures

    return tuple(prill_fixtures.prompts(named[0]))


def golden_for(model_spec: str | Path, progress: Progress | None = None) -> Golden:
    """A fixture's committed golden; a user file's from the cache folder, recorded on first use.

    Raises:
        UsageError: unknown fixture, or a golden that cannot be read.
        ModelFileError, UnsupportedModel: the file cannot be recorded.
    """
    named = fixture_name(model_spec)
    if named is not None:
        return _committed(*named)
    path = resolve_model(model_spec)
    kept = kept_at(path)
    user_cache.kept(kept, lambda fresh: save(record(path, progress=progress), fresh))
    # The same bytes may have been recorded under another name.
    return msgspec.structs.replace(load(kept), name=builtin(path.stem))


def kept_at(path: Path) -> Path:
    """Path of the golden of a user's file, recorded or not."""
    with open_gguf(path) as file:
        return user_cache.folder("goldens") / f"{file.sha256}.{SCHEMA}.json"


def _committed(name: str, kind: str) -> Golden:
    import prill_fixtures

    golden = load(prill_fixtures.golden_path(name, kind))
    if golden.type == kind:
        return golden
    # F32 holds the same numbers as F16 and shares its golden; only the file's digest differs.
    mark = msgspec.structs.replace(golden.fingerprint, model_sha256=prill_fixtures.sha256(name, kind))
    return msgspec.structs.replace(golden, type=kind, fingerprint=mark)
