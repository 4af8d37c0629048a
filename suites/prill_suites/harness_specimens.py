"""Specimens with a known verdict, judged by the suites' own code.

Each specimen is a sound case, and the same with one thing wrong that is hard to see: in the last row, the
last value, one kind of character, one text of a batch, or by one and a half of what is allowed. The sound one
has to pass and the wrong one to fail. Whatever is weakened on the way from an engine's numbers to a check's
verdict lets a wrong one pass, or no longer a sound one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import ReaderTensor
from numpy.typing import NDArray

from prill_harness.engines.base import Engine, EngineInfo, Generation
from prill_harness.engines.embedded import Embedded
from prill_harness.engines.models import resolve_model
from prill_harness.faults.opening import open_engine
from prill_harness.numbers.compare import largest
from prill_harness.planting import faults
from prill_harness.records.evidence import Status
from prill_harness.run import outcomes
from prill_harness.run.checks import Observer
from prill_harness.tokens import judge as tokens
from prill_harness.tokens.golden import Golden, golden_for
from prill_harness.tokens.golden_pack import GoldenPrompt, Packed
from prill_harness.tokens.steps import StepResult
from prill_harness.witness.reading import read
from prill_runtime.errors import EngineError, UsageError
from prill_runtime.ops.numpy import NumpyBackend
from prill_suites import blocks, file, harness_answers, harness_experts, ops_twins, stages, tokenizer, witness
from prill_suites.common import file_fields, file_tensors, refusal
from prill_suites.controls import Trial
from prill_suites.ops_bench import Bench
from prill_suites.properties_batch import texts_alone
from prill_suites.tokenizer_twins import Twin
from prill_suites.tokens import judge as judge_finding

MODEL = "fixture:llama-tiny"
# Bounds as the documents have them (docs/adr/0002, 0009, 0010), not as the suites do: NMSE of one op in
# float32 and of two ways to one result, times the exact lane's floor, of two float64 passes.
ROUNDING, EXACT, SUMMED = 1e-10, 100.0, 2.0**-88
SHORT, FEW, CONTEXT = 24, 8, 48  # ids of a stage trace, tokens of a golden, positions of a batch
BEYOND, WITHIN = 1.5, 0.5  # times what is allowed
# Texts that only a suite with such characters finds wrong.
CHARACTERS = {
    "two bytes": "\u00e9", "three bytes": "\u65e5", "from right to left": "\u05e9",
    "four bytes": "\U0001f9ea", "a carriage return": "\r", "a control character": "\x7f",
    "no width": "\u200b",
}  # fmt: skip


class Astray(Embedded):
    """A sound engine that is wrong where `wrong` says, and nowhere else."""

    dtype = "float32"
    wrong = ""

    @property
    def info(self) -> EngineInfo:
        found = super().info
        eps = {"norm_eps": BEYOND * float(found.config["norm_eps"])} if self.wrong == "eps" else {}
        return replace(found, config={**found.config, **eps})

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        ids = list(self._ids(text, add_special))
        return [*ids[:-1], ids[-1] ^ 1] if self.wrong and self.wrong in text else ids

    def detokenize(self, ids: Sequence[int]) -> bytes:
        return self._bytes(tuple(ids))

    # What the sound engine says of a text does not change: many specimens ask for the same.
    @cached_property
    def _ids(self) -> Callable[[str, bool], list[int]]:
        return cache(super().tokenize)

    @cached_property
    def _bytes(self) -> Callable[[tuple[int, ...]], bytes]:
        return cache(super().detokenize)

    def logits_batch(self, batch: Sequence[Sequence[int]]) -> list[NDArray[np.floating]]:
        found = super().logits_batch(batch)
        if self.wrong == "last row":
            found[-1][-1] *= 1.01
        if self.wrong == "not a number":
            found[-1][-1, -1] = np.nan
        return found

    def trace(
        self, ids: Sequence[int], replace: Mapping[str, NDArray[np.float64]] | None = None
    ) -> Iterator[tuple[str, NDArray[np.floating]]]:
        found = [(name, array.copy()) for name, array in super().trace(ids, replace)]
        for name, array in found:
            if self.wrong == f"last row of {name}":
                array[-1, ..., -1] *= 1.01
        return iter(found)

    def generate_batch(self, prompts: Sequence[Sequence[int]], **named: Any) -> list[Generation]:
        if self.wrong == "batch" and len(prompts) > 1:
            raise EngineError("planted: a batch is refused")
        found = super().generate_batch(prompts, **named)
        if self.wrong == "last token":
            last = found[-1]
            found[-1] = replace(last, ids=(*last.ids[:-1], last.ids[-1] ^ 1))
        return found


@dataclass(frozen=True)
class Specimen:
    """One case: `judge(observer, wrong)` runs the suites' code on the sound or on the wrong one."""

    name: str
    judge: Callable[[Observer, bool], object]

    def verdict(self, wrong: bool) -> tuple[Status, str]:
        """What a check with this body would be recorded as."""
        observe = Observer()
        try:
            self.judge(observe, wrong)
        except Exception as error:
            return outcomes.raised(error, phase="call")
        return outcomes.finished(observe)


@dataclass
class SpecimenParts:
    """What the specimens share: the engine that goes astray, and what judges it."""

    engine: Astray
    oracle: Embedded
    golden: Golden

    def astray(self, wrong: str) -> Astray:
        self.engine.wrong = wrong
        return self.engine


def cut(prompt: GoldenPrompt) -> GoldenPrompt:
    """A golden prompt with the first few of its tokens."""
    rows = {name: Packed.of(getattr(prompt, name).array[:FEW]) for name in ("top_ids", "top_logprobs")}
    sampled = [msgspec.structs.replace(run, tokens=run.tokens[:FEW]) for run in prompt.sampled[:1]]
    return msgspec.structs.replace(prompt, tokens=prompt.tokens[:FEW], sampled=sampled, **rows)


@contextmanager
def opened(folder: Path) -> Iterator[tuple[Specimen, ...]]:
    """The specimens, on engines that stay open as long as the context; files are written into the folder.

    What is planted in the code of engines is not in theirs: it is the judge that is on trial here.
    """
    whole = golden_for(MODEL)
    shortest = sorted(whole.prompts, key=lambda prompt: len(prompt.ids))[:2]
    golden = msgspec.structs.replace(whole, prompts=[cut(prompt) for prompt in shortest])
    with (
        faults.scoped(lambda: Astray.open("", MODEL), ()) as engine,
        open_engine("numpy64", MODEL) as oracle,
    ):
        assert isinstance(engine, Astray)
        assert isinstance(oracle, Embedded)
        made = SpecimenParts(engine, oracle, golden)
        yield (*of_stages(made), *of_tokens(made), *of_text(made, whole), *of_parts(made), of_file(folder))


def of_stages(at: SpecimenParts) -> Iterator[Specimen]:
    """The last value of the last row of a stage, of the first and of the last one."""
    ids = at.golden.prompts[0].sequence[:SHORT]

    def of(stage: str) -> Callable[[Observer, bool], object]:
        return lambda observe, wrong: stages.compare_stages(
            observe,
            at.astray(f"last row of {stage}" * wrong),
            at.oracle,
            at.golden,
            resolve_model(MODEL),
            ids,
            [range(len(ids))],
        )

    for stage in ("embed", "blk.3.q_rope", "logits"):
        yield Specimen(f"the last row of {stage}", of(stage))
    yield Specimen("an expert exchanged", harness_experts.judge)


def of_tokens(at: SpecimenParts) -> Iterator[Specimen]:
    """What each step of the comparison has to see."""
    last = at.golden.prompts[-1].text

    def of(step: Callable[..., StepResult], what: str) -> Callable[[Observer, bool], object]:
        return lambda observe, wrong: judge_finding(
            observe, step(at.astray(what * wrong), at.golden, at.oracle)
        )

    yield Specimen("the last prompt's ids", of(tokens.compare_prompt_ids, last))
    yield Specimen("an eps of the configuration", of(tokens.compare_config, "eps"))
    yield Specimen("the last row of logits", of(tokens.compare_teacher_forced, "last row"))
    yield Specimen("a logit that is not a number", of(tokens.compare_teacher_forced, "not a number"))
    yield Specimen("the last greedy token", of(tokens.compare_greedy, "last token"))
    yield Specimen("the last sampled token", of(tokens.compare_sampled, "last token"))
    yield Specimen("a batch that is refused", of(tokens.compare_greedy, "batch"))

    config = at.golden.config | {"context_length": CONTEXT}
    small = msgspec.structs.replace(at.golden, config=config)

    def batch(observe: Observer, wrong: bool) -> str:
        return texts_alone(Trial(observe, at.astray("batch" * wrong), at.oracle, small))

    yield Specimen("a batch of texts that is refused", batch)


def of_text(at: SpecimenParts, golden: Golden) -> Iterator[Specimen]:
    """Texts with one kind of character, and the last answer that a check asks for."""
    twin = Twin(file_fields(resolve_model(MODEL)))

    def of(character: str) -> Callable[[Observer, bool], object]:
        return lambda observe, wrong: tokenizer.test_round_trip(observe, at.astray(character * wrong), twin)

    for kind, character in CHARACTERS.items():
        yield Specimen(f"a text with {kind}", of(character))
    for check, judge in harness_answers.cases(lambda: at.astray(""), golden, twin):
        yield Specimen(f"the last answer that {check} asks for", judge)


def of_parts(at: SpecimenParts) -> Iterator[Specimen]:
    """The last value of an op, a block, a tensor and the oracle; refusals that are none."""

    def op(observe: Observer, wrong: bool) -> None:
        times = BEYOND if wrong else WITHIN

        class LastSum(NumpyBackend):
            def add(self, a: Any, b: Any) -> Any:
                got = super().add(a, b)
                got[-1, -1] += np.sqrt(times * ROUNDING * np.sum(np.square(got, dtype=np.float64)))
                return got

        engine: Any = SimpleNamespace(ops=lambda: LastSum("float32"), info=at.oracle.info)
        engine.info = replace(at.oracle.info, arithmetic="float32")
        bench = Bench(engine, ops_twins, observe)
        bench.hold("add", bench.normal(3, 33), bench.normal(3, 33), case="(3, 33)")

    def block(observe: Observer, wrong: bool) -> None:
        class LastWeight(NumpyBackend):
            def weight(self, raw: Any, info: Any) -> Any:
                got = np.array(super().weight(raw, info), order="C").reshape(-1)
                got.view(np.uint32)[np.flatnonzero(np.isfinite(got))[-1]] ^= wrong
                return got.reshape(info.shape)

        engine: Any = SimpleNamespace(ops=lambda: LastWeight("float32"), info=at.oracle.info)
        blocks.test_dequantize(observe, engine, Type.Q8_0.name)

    @cache
    def last_matrix() -> ReaderTensor:
        return next(t for t in reversed(file_tensors(resolve_model(MODEL))) if len(t.shape) == 2)

    def weights(observe: Observer, wrong: bool) -> None:
        tensor = last_matrix()
        held = at.engine.model.weights
        changed = np.array(held[tensor.name])
        changed[-1, -1] += wrong
        model = SimpleNamespace(backend=at.engine.ops(), weights={tensor.name: changed})
        with replaced(file, "embedded", lambda engine: model):
            file.test_weights(observe, at.engine, [tensor], [])

    def second(observe: Observer, wrong: bool) -> None:
        def logits(ids: Sequence[int]) -> NDArray[np.floating]:
            got = np.array(at.oracle.logits(ids))
            times = BEYOND if wrong else WITHIN
            got[-1, -1] += np.sqrt(times * SUMMED * np.sum(got**2))
            return got

        engine: Any = SimpleNamespace(logits=logits)
        path = resolve_model(MODEL)
        witness.test_logits(observe, engine, at.golden, read(path), path)

    yield Specimen("the last value of an op", op)
    yield Specimen("the last bit of a block", block)
    yield Specimen("the last weight of a tensor", weights)
    yield Specimen("the last logit of the oracle", second)
    yield from of_refusals()
    yield from of_controls(at)


def of_file(folder: Path) -> Specimen:
    """A packaged file with another last byte."""

    def judge(observe: Observer, wrong: bool) -> None:
        data = resolve_model(MODEL).read_bytes()
        copy = folder / "copy.gguf"
        copy.write_bytes(data[:-1] + bytes([data[-1] ^ wrong]))
        with replaced(file, "resolve_model", lambda spec: copy):
            file.test_digest(observe, MODEL)

    return Specimen("the last byte of a packaged file", judge)


def of_refusals() -> Iterator[Specimen]:
    """What is no refusal: another error, none, the wrong exit code, a sentence that says something else."""
    right = UsageError("the number is too large", expected="at most 7", got="8")

    def of(wrong_one: Exception | None) -> Callable[[Observer, bool], object]:
        def judge(observe: Observer, wrong: bool) -> str:
            def call() -> None:
                if (error := wrong_one if wrong else right) is not None:
                    raise error

            return refusal(observe, "a number", call, right.exit_code, "at most 7")

        return judge

    yield Specimen("a crash for a refusal", of(ValueError("at most 7")))
    yield Specimen("an acceptance for a refusal", of(None))
    yield Specimen("another exit code", of(EngineError("the number is too large", expected="at most 7")))
    yield Specimen("another sentence", of(UsageError("the number is too large", got="8")))


def of_controls(at: SpecimenParts) -> Iterator[Specimen]:
    """A control that did not differ, and one result that is not the other by more than rounding."""
    ones = np.ones(4)

    def control(observe: Observer, wrong: bool) -> str:
        observe.saw(4, oracle="ones")
        trial = Trial(observe, at.astray(""), at.oracle, at.golden)

        def run(engine: Engine) -> tuple[NDArray[Any], NDArray[Any]]:
            return ones, ones if wrong and engine is at.engine else 2 * ones

        return trial.control("ones and twos", run)

    def same(observe: Observer, wrong: bool) -> float:
        trial = Trial(observe, at.astray(""), at.oracle, at.golden)
        ids = at.golden.prompts[0].ids[:4]
        right = np.asarray(at.oracle.logits(ids), np.float64)
        observe.saw(right.size, oracle="the same logits")
        off = right.copy()
        limit = largest(ROUNDING, EXACT * at.golden.floors["exact"].nmse)
        off[-1, -1] += np.sqrt(np.sum(right**2) * limit * (BEYOND if wrong else WITHIN))
        return trial.same("logits", ids, right, off)

    yield Specimen("a control that did not differ", control)
    yield Specimen("two results that are not the same", same)


@contextmanager
def replaced(module: Any, name: str, value: object) -> Iterator[None]:
    """A module's name bound to something else for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
