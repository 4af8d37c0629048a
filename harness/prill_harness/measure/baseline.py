"""Time an engine as a multiple of a calibration load, and hold that to a baseline of the same machine.

Load and engine are timed in turn, so that a machine that is slower today is so for both, and what is
compared between two runs are ratios. On a device that can say its copy bandwidth the load is a copy there, on
any other it is NumPy's on this host: three matrices streamed, a product, and a loop of the interpreter.
"""

from __future__ import annotations

import datetime as dt
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import psutil  # type: ignore[import-untyped]
from numpy.typing import NDArray

from prill_harness.engines.base import Engine
from prill_harness.engines.models import resolve_model
from prill_harness.faults.opening import open_engine
from prill_harness.measure import bench
from prill_harness.measure.bench import Clock, Contender, Settings, Tell
from prill_harness.records.files import read_text
from prill_harness.records.verdict import SpeedResult
from prill_harness.version import version
from prill_runtime.errors import UsageError
from prill_runtime.gguf.file import open_gguf

FEWEST = 8  # repetitions: of fewer the interval says nothing
RESAMPLES, LEVEL = 4000, 95.0
DRIVER = Path("/proc/driver/nvidia/version")
COPIED = float(1 << 30)  # bytes: the unit of a calibration by a device's bandwidth


class Machine(msgspec.Struct, frozen=True):
    """What times depend on besides prill, engine and model; a container changes the host's name."""

    processor: str
    cores: int
    memory_gib: int
    system: str
    driver: str
    device: str


class Baseline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run, as multiples of its calibration; ratios by phase, one for each repetition."""

    engine: str
    model: str
    model_sha256: str
    machine: Machine
    calibration: str
    prompt: int
    tokens: int
    seed: int
    ratios: dict[str, tuple[float, ...]]
    calibrations_s: tuple[float, ...]
    prill: str
    at: str
    schema: int = 1


class HostLoad:
    """A fixed amount of what an engine on a processor does; calling it takes some tens of milliseconds."""

    name = "NumPy on this host"

    def __init__(self) -> None:
        self._matrix = np.ones((2048, 8192), np.float32)  # 64 MiB, more than a cache holds
        self._row, self._square = np.ones(8192, np.float32), np.ones((384, 384), np.float32)

    def __call__(self) -> None:
        for _ in range(3):
            self._matrix @ self._row
        self._square @ self._square
        sum(range(50_000))


def measured(
    model: str,
    spec: str,
    settings: Settings,
    *,
    clock: Clock = time.perf_counter,
    open_engine: Callable[[str, str], Engine] = open_engine,
    load: Callable[[], None] | None = None,
    tell: Tell = lambda sentence: None,
) -> Baseline:
    """Time the engine: before and after each repetition the load.

    Raises:
        UsageError: too few repetitions.
        As `bench.measure`.
    """
    if settings.repeat < FEWEST:
        raise UsageError("too few repetitions", where="--repeat", expected=f"{FEWEST}", got=settings.repeat)
    with open_gguf(resolve_model(model)) as file:
        tokens = file.metadata.get("tokenizer.ggml.tokens", ())
        vocabulary = len(tokens) if isinstance(tokens, Sequence) else 0
    with ExitStack() as stack:
        contender = bench.load(spec, model, settings, clock, open_engine, stack)
        contender.vocabulary = vocabulary or None
        tell(f"{spec}: opened in {contender.loading[-1]['open']:.2f} s")
        bench.fits(contender, settings)
        bench.warm(contender, settings, clock)
        name, calibrate = _calibration(contender.engine, load, clock)
        calibrate()  # the first one touches its pages
        tell(f"{spec}: warm, calibrated by {name}")
        calibrations = [calibrate()]
        for repetition in range(settings.repeat):
            bench.repeat(contender, settings, repetition, clock)
            calibrations.append(calibrate())
            tell(f"{spec}: {1 / contender.decode[-1]:,.1f} tokens/s")
        return Baseline(
            engine=spec,
            model=model,
            model_sha256=contender.engine.info.model_sha256,
            machine=_machine(contender.engine.info.device),
            calibration=name,
            prompt=settings.prompt,
            tokens=settings.tokens,
            seed=settings.seed,
            ratios=_ratios(contender, calibrations),
            calibrations_s=tuple(calibrations),
            prill=version(),
            at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        )


def _calibration(
    engine: Engine, load: Callable[[], None] | None, clock: Clock
) -> tuple[str, Callable[[], float]]:
    """The load's name, and a call that gives its seconds."""
    if load is None and engine.info.device != "cpu" and engine.copy_bandwidth() is not None:
        return f"copies on {engine.info.device}", lambda: COPIED / (engine.copy_bandwidth() or np.nan)
    work = load or HostLoad()

    def timed() -> float:
        began = clock()
        work()
        return clock() - began

    return HostLoad.name, timed


def _ratios(contender: Contender, calibrations: Sequence[float]) -> dict[str, tuple[float, ...]]:
    beside = [(before + after) / 2 for before, after in pairwise(calibrations)]
    phases = {"prompt": contender.first, "decode": contender.decode}
    return {
        name: tuple(seconds / one for seconds, one in zip(taken, beside, strict=True))
        for name, taken in phases.items()
    }


def _machine(device: str) -> Machine:
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        told = Path("/proc/cpuinfo").read_text("utf-8", "replace")
        names = (
            line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("model name")
        )
        processor = next(names, processor)
    driver = ""
    with suppress(OSError):
        driver = DRIVER.read_text("utf-8", "replace").splitlines()[0]
    memory = round(psutil.virtual_memory().total / 2**30)
    return Machine(processor, psutil.cpu_count() or 0, memory, platform.system(), driver, device)


def compared(baseline: Baseline, now: Baseline) -> tuple[SpeedResult, ...]:
    """How much slower each phase is, with the 95 % interval of the ratio of medians by a bootstrap over the
    repetitions of both runs.

    Raises:
        UsageError: of another machine, model or engine, or of other work: it says nothing about this run.
    """
    for what in ("engine", "model_sha256", "machine", "calibration", "prompt", "tokens", "seed"):
        then, here = getattr(baseline, what), getattr(now, what)
        if isinstance(then, Machine) and isinstance(here, Machine):
            parts = msgspec.structs.asdict(then), msgspec.structs.asdict(here)
            what = next((name for name in parts[0] if parts[0][name] != parts[1][name]), what)
            then, here = (part.get(what) for part in parts)
        if then != here:
            raise UsageError(
                "the baseline is of another run than this one",
                where=f"--baseline, {what}",
                expected=repr(then),
                got=repr(here),
                hint="record one here with --record",
            )
    return tuple(_result(now, name, baseline.ratios[name], mine) for name, mine in now.ratios.items())


def _result(now: Baseline, name: str, then: Sequence[float], mine: Sequence[float]) -> SpeedResult:
    random = np.random.default_rng(0)

    def medians(values: Sequence[float]) -> NDArray[np.float64]:
        drawn = random.integers(0, len(values), (RESAMPLES, len(values)))
        return np.asarray(np.median(np.asarray(values)[drawn], axis=1))

    tail = (100 - LEVEL) / 2
    low, high = np.percentile(medians(mine) / medians(then), [tail, 100 - tail])
    ratio = float(np.median(mine) / np.median(then))
    return SpeedResult(now.engine, now.model, name, ratio, float(low), float(high))


def noise(calibrations: Sequence[float]) -> float:
    """How far the load itself went apart: half of the middle nine tenths, over the median."""
    low, middle, high = np.percentile(calibrations, [5, 50, 95])
    return float((high - low) / 2 / middle)


def read(path: Path) -> Baseline:
    """A baseline that `prill bench --record` wrote.

    Raises:
        UsageError: it cannot be read, is none of this version, or lacks a phase.
    """
    text = read_text(path, "baseline")
    try:
        found = msgspec.json.decode(text, type=Baseline, strict=True)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError("not a baseline of this version", where=str(path), got=str(error)) from error
    short = {name: len(found.ratios.get(name, ())) for name in ("prompt", "decode")}
    numbers = [value for several in found.ratios.values() for value in several]
    if min(short.values()) < FEWEST or not all(value > 0 and np.isfinite(value) for value in numbers):
        expected = f"at least {FEWEST} ratios above 0 of prompt and decode"
        raise UsageError("not a baseline", where=str(path), expected=expected, got=short)
    return found


def results(paths: Sequence[Path]) -> tuple[SpeedResult, ...]:
    """What `prill bench --baseline FILE -o RESULT` wrote, of several files.

    Raises:
        UsageError: a file cannot be read, or holds something else.
    """
    found: list[SpeedResult] = []
    for path in paths:
        try:
            told: Mapping[str, list[SpeedResult]] = msgspec.json.decode(
                read_text(path, "result of a bench"), type=dict[str, list[SpeedResult]]
            )
        except (msgspec.DecodeError, RecursionError) as error:
            hint = "write it with prill bench --baseline FILE -o RESULT"
            raise UsageError(
                "not the result of a bench", where=str(path), got=str(error), hint=hint
            ) from error
        found += told.get("speeds", [])
    return tuple(found)
