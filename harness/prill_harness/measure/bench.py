"""Time loading, first token, prompt and decoding of one engine, or of two in turn.

Two engines are timed alternately in one run, each going first in turn, on the same random prompts; ratios
are taken between neighbouring measurements. No prompt is used twice on one engine, so that a prompt cache
does not help. Decoding is the time of a long answer minus that of an answer of one token, so that an engine
may queue tokens ahead.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import msgspec
import numpy as np

from prill_harness.engines.base import LOAD_PHASES, Engine
from prill_harness.engines.models import resolve_model
from prill_harness.faults.opening import open_engine
from prill_runtime.errors import EngineError, Inconclusive, InvalidParameter, MissingCapability
from prill_runtime.gguf.file import GGUFFile, open_gguf

Clock = Callable[[], float]
Tell = Callable[[str], None]

LOADING = ("open", *LOAD_PHASES)
BANDWIDTH_COPIES = 5


@dataclass(frozen=True, slots=True)
class Settings:
    """prompt, tokens: of every answer. repeat: timed answers. loads: times each engine is opened.

    copy_bytes: size of the copy that measures the processor's memory.
    """

    prompt: int = 512
    tokens: int = 128
    repeat: int = 5
    loads: int = 1
    seed: int = 0
    copy_bytes: int = 1 << 28


class Sample(msgspec.Struct, frozen=True):
    """Repeated measurements; unit "s", "tokens/s" or "B/s"."""

    unit: str
    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, unit: str, values: Sequence[float]) -> Sample:
        """A sample of at least one value."""
        return cls(unit, statistics.median(values), min(values), max(values), len(values))


class Row(msgspec.Struct, frozen=True):
    """One figure of one engine.

    Attributes:
        sample: None if the engine does not report it, which is not 0.
        share: of the measured copy bandwidth, for decoding: weights of the file times tokens per second.
    """

    name: str
    sample: Sample | None
    share: float | None = None


class Timed(msgspec.Struct, frozen=True):
    """The figures of one engine; row "copy" is the measured bandwidth of the memory it computes from."""

    engine: str
    name: str
    version: str
    device: str
    arithmetic: str
    rows: tuple[Row, ...]

    def row(self, name: str) -> Row:
        """The row of this name; one without a sample if there is none."""
        return next((row for row in self.rows if row.name == name), Row(name, None))


class Ratio(msgspec.Struct, frozen=True):
    """Seconds of the engine over those of the one it is compared with: above 1 is slower."""

    name: str
    median: float
    low: float
    high: float
    runs: int


class BenchResult(msgspec.Struct, frozen=True):
    """All results of one run; `ratios` is empty without a second engine."""

    model: str
    model_sha256: str
    weight_bytes: int
    prompt: int
    tokens: int
    seed: int
    engines: tuple[Timed, ...]
    ratios: tuple[Ratio, ...]


@dataclass(slots=True)
class Contender:
    """One open engine, and the seconds it took."""

    spec: str
    engine: Engine
    loading: list[Mapping[str, float]]
    copies: list[float] = field(default_factory=list)  # bytes per second, read and written
    cold: float = 0.0
    first: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)  # per token
    vocabulary: int | None = None  # by the model's file, for an engine that does not report its own


def measure(
    model: str,
    specs: Sequence[str],
    settings: Settings,
    *,
    clock: Clock = time.perf_counter,
    open_engine: Callable[[str, str], Engine] = open_engine,
    tell: Tell = lambda sentence: None,
) -> BenchResult:
    """Time one engine, or the first against the second.

    Args:
        tell: called with a description after each of `steps(settings, len(specs))` steps.

    Raises:
        InvalidParameter: prompt and answer do not fit into the context.
        EngineError: an answer was shorter than asked for.
        Inconclusive: the time of decoding was lost in noise.
    """
    with open_gguf(resolve_model(model)) as file:
        read = weight_bytes(file)
    with ExitStack() as stack:
        contenders = []
        for spec in specs:
            contender = load(spec, model, settings, clock, open_engine, stack)
            tell(f"{spec}: opened in {contender.loading[-1]['open']:.2f} s")
            contenders.append(contender)
        for contender in contenders:
            fits(contender, settings)
            contender.copies = _copies(contender.engine, settings, clock)
            warm(contender, settings, clock)
            tell(f"{contender.spec}: warm")
        for repetition in range(settings.repeat):
            for contender in contenders[:: 1 if repetition % 2 == 0 else -1]:
                repeat(contender, settings, repetition, clock)
                tell(f"{contender.spec}: {1 / contender.decode[-1]:,.1f} tokens/s")
        timed = tuple(_timed(contender, settings, read) for contender in contenders)
        digest = contenders[0].engine.info.model_sha256
    return BenchResult(
        model,
        digest,
        read,
        settings.prompt,
        settings.tokens,
        settings.seed,
        timed,
        tuple(_ratios(contenders)),
    )


def steps(settings: Settings, count: int) -> int:
    """How often `measure` calls `tell`."""
    return count * (2 + settings.repeat)


def weight_bytes(file: GGUFFile) -> int:
    """Bytes of the file that one token reads: all matrices except tables of which one row is looked up; of
    experts only as many as are used."""
    used = file.metadata.get(f"{file.architecture}.expert_used_count", 1)
    experts = file.metadata.get(f"{file.architecture}.expert_count", 1)
    looked_up = {"position_embd.weight"}
    if "output.weight" in file.tensors:
        looked_up.add("token_embd.weight")
    total = 0.0
    for name, info in file.tensors.items():
        if name not in looked_up:
            routed = re.search(r"_exps\.", name) is not None
            total += info.nbytes * (int(str(used)) / int(str(experts)) if routed else 1)
    return round(total)


def memory_copies(nbytes: int, count: int, clock: Clock) -> list[float]:
    """Bytes per second, read and written, of copies by one thread in host memory."""
    source = np.arange(nbytes // 8)
    target = np.zeros_like(source)
    np.copyto(target, source)  # touch every page before the timing
    speeds = []
    for _ in range(count):
        began = clock()
        np.copyto(target, source)
        speeds.append(2 * source.nbytes / (clock() - began))
    return speeds


def load(
    spec: str,
    model: str,
    settings: Settings,
    clock: Clock,
    open_engine: Callable[[str, str], Engine],
    stack: ExitStack,
) -> Contender:
    """Open the engine as often as asked for; the last one stays open."""
    loading: list[Mapping[str, float]] = []
    for number in range(settings.loads):
        began = clock()
        engine = open_engine(spec, model)
        loading.append({"open": clock() - began, **engine.phases()})
        if number + 1 < settings.loads:
            engine.close()
    return Contender(spec, stack.enter_context(engine), loading)


def fits(contender: Contender, settings: Settings) -> None:
    context = contender.engine.info.config.get("context_length")
    needed = settings.prompt + settings.tokens + 1
    if isinstance(context, int) and needed > context:
        raise InvalidParameter(
            "prompt and tokens do not fit into the context",
            where=contender.spec,
            expected=f"at most {context} together, and one more",
            got=f"{settings.prompt} and {settings.tokens}",
        )


def _copies(engine: Engine, settings: Settings, clock: Clock) -> list[float]:
    """Bandwidths of several copies in the engine's memory; none if that cannot be measured."""
    own = [speed for _ in range(BANDWIDTH_COPIES) if (speed := engine.copy_bandwidth()) is not None]
    if own or engine.info.device != "cpu":
        return own
    return memory_copies(settings.copy_bytes, BANDWIDTH_COPIES, clock)


def _prompt(settings: Settings, contender: Contender, number: int) -> list[int]:
    """Random ids, the same for every engine with the same vocabulary."""
    size = contender.engine.info.config.get("vocab_size", contender.vocabulary)
    if size is None:
        raise MissingCapability(f"engine {contender.spec} does not report its vocab_size: no ids are known")
    random = np.random.default_rng([settings.seed, number])
    drawn = random.integers(0, int(size), settings.prompt)
    return [int(token) for token in drawn]


def _answer(contender: Contender, ids: Sequence[int], tokens: int, clock: Clock) -> float:
    """Seconds that an answer of so many tokens took."""
    began = clock()
    made = contender.engine.generate(ids, max_tokens=tokens, ignore_eos=True)
    took = clock() - began
    if len(made.ids) != tokens:
        raise EngineError(
            f"the answer ended by {made.finish_reason!r}",
            where=contender.spec,
            expected=f"{tokens} tokens",
            got=len(made.ids),
        )
    return took


def warm(contender: Contender, settings: Settings, clock: Clock) -> None:
    """Time a fresh engine's first token; then a whole answer, so that everything made on first use exists."""
    contender.cold = _answer(contender, _prompt(settings, contender, 0), 1, clock)
    _answer(contender, _prompt(settings, contender, 1), settings.tokens + 1, clock)
    contender.loading[-1] = {**contender.loading[-1], **contender.engine.phases()}


def repeat(contender: Contender, settings: Settings, repetition: int, clock: Clock) -> None:
    first = _answer(contender, _prompt(settings, contender, 2 + 2 * repetition), 1, clock)
    whole = _answer(contender, _prompt(settings, contender, 3 + 2 * repetition), settings.tokens + 1, clock)
    if whole <= first:
        raise Inconclusive(
            f"an answer of {settings.tokens + 1} tokens took no longer than one of a single token",
            where=contender.spec,
            expected=f"more than {first:.6f} s",
            got=f"{whole:.6f} s",
            hint="ask for more --tokens",
        )
    contender.first.append(first)
    contender.decode.append((whole - first) / settings.tokens)


def _timed(contender: Contender, settings: Settings, read: int) -> Timed:
    info = contender.engine.info
    copy = Sample.of("B/s", contender.copies) if contender.copies else None
    rates = Sample.of("tokens/s", [1 / seconds for seconds in contender.decode])
    rows = [Row("copy", copy)]
    reported = dict.fromkeys(LOADING) | dict.fromkeys(name for load in contender.loading for name in load)
    rows += [Row(name, _loaded(contender, name)) for name in reported]
    rows += [
        Row("first token, cold", Sample.of("s", [contender.cold])),
        Row("first token", Sample.of("s", contender.first)),
        Row("prompt", Sample.of("tokens/s", [settings.prompt / seconds for seconds in contender.first])),
        Row("decode", rates, read * rates.median / copy.median if copy else None),
    ]
    return Timed(contender.spec, info.name, info.version, info.device, info.arithmetic, tuple(rows))


def _loaded(contender: Contender, name: str) -> Sample | None:
    values = [load[name] for load in contender.loading if name in load]
    return Sample.of("s", values) if values else None


def _ratios(contenders: Sequence[Contender]) -> Iterable[Ratio]:
    """Ratios of the first engine over the second, between neighbouring measurements."""
    if len(contenders) != 2:
        return
    mine, other = contenders
    for name, a, b in (("prompt", mine.first, other.first), ("decode", mine.decode, other.decode)):
        sample = Sample.of("", [x / y for x, y in zip(a, b, strict=True)])
        yield Ratio(name, sample.median, sample.low, sample.high, sample.runs)
