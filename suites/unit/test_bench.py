"""Timing with a clock that the engines move: what is measured, in which order, and what is never made up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import Result as Said

from prill_harness.commands.engines.bench import figure
from prill_harness.engines.base import Engine, EngineInfo, Generation
from prill_harness.measure import bench
from prill_harness.measure.bench import BenchResult, Ratio, Row, Sample, Settings, Timed, measure
from prill_runtime.errors import EngineError, Inconclusive, InvalidParameter, MissingCapability
from prill_runtime.gguf.file import open_gguf

from .commandline import emitted, invoke
from .tiny_gguf import tiny

SMALL = Settings(prompt=8, tokens=4, repeat=3, copy_bytes=1 << 12)


class Clock:
    """Stands still but for what engines add, and a thousandth of a second per reading when it ticks."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


class Staged(Engine):
    """Takes exactly the seconds it is told to, and remembers every request.

    Args:
        opening: seconds to open. prompt: per answer. token: per generated token, by the number of the answer.
    """

    def __init__(
        self,
        clock: Clock,
        log: list[tuple[str, tuple[int, ...], int]],
        *,
        name: str = "staged",
        opening: float = 1.0,
        prompt: float = 0.5,
        token: Callable[[int], float] = lambda answer: 0.25,
        phases: Mapping[str, float] | None = None,
        copy: float | None = None,
        device: str = "thing",
        config: Mapping[str, int] | None = None,
        short: int = 0,
    ) -> None:
        self.clock, self.log, self.answers = clock, log, 0
        self.prompt, self.token, self.short = prompt, token, short
        self._phases, self._copy, self.closed = dict(phases or {}), copy, False
        config = {"vocab_size": 99, "context_length": 64} if config is None else config
        self._info = EngineInfo(name, "1", device, "m", "ab" * 32, "float32", frozenset(), config)
        clock.now += opening

    @property
    def info(self) -> EngineInfo:
        return self._info

    def generate(self, ids: Sequence[int], *, max_tokens: int, **rest: Any) -> Generation:
        assert rest == {"ignore_eos": True}
        self.log.append((self._info.name, tuple(ids), max_tokens))
        self.clock.now += self.prompt + (max_tokens - 1) * self.token(self.answers)
        self.answers += 1
        made = max_tokens - self.short
        return Generation((1,) * made, (0.0,) * made, "length" if not self.short else "context")

    def phases(self) -> Mapping[str, float]:
        return self._phases

    def copy_bandwidth(self) -> float | None:
        return self._copy

    def close(self) -> None:
        self.closed = True


class Stage:
    """Opens staged engines by name and measures them."""

    def __init__(self, path: Path, **engines: Mapping[str, Any]) -> None:
        self.path, self.engines = path, engines
        self.log: list[tuple[str, tuple[int, ...], int]] = []
        self.opened: list[Staged] = []
        self.told: list[str] = []

    def __call__(self, settings: Settings = SMALL, tick: float = 0.0) -> BenchResult:
        clock = Clock(tick)

        def opened(spec: str, model: str) -> Engine:
            self.opened.append(Staged(clock, self.log, name=spec, **self.engines[spec]))
            return self.opened[-1]

        specs = tuple(self.engines)
        return measure(
            str(self.path), specs, settings, clock=clock, open_engine=opened, tell=self.told.append
        )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("bench") / "model.gguf")


def test_seconds_become_medians_and_rates(path: Path) -> None:
    """8 ids in 0.5 s are 16 tokens/s; 4 tokens at 0.1, 0.2 and 0.4 s are 10, 5 and 2.5 tokens/s."""
    times = {3: 0.1, 5: 0.2, 7: 0.4}  # answers 0 and 1 warm up; 2, 4 and 6 have one token
    result = Stage(path, it={"token": lambda answer: times.get(answer, 0.0)})()
    timed = result.engines[0]
    assert timed.row("open").sample == Sample("s", 1.0, 1.0, 1.0, 1)
    assert timed.row("first token, cold").sample == Sample("s", 0.5, 0.5, 0.5, 1)
    assert timed.row("first token").sample == Sample("s", 0.5, 0.5, 0.5, 3)
    assert timed.row("prompt").sample == Sample("tokens/s", 16.0, 16.0, 16.0, 3)
    decode = timed.row("decode").sample
    assert decode is not None
    assert (decode.median, decode.low, decode.high) == pytest.approx((5.0, 2.5, 10.0))
    assert (result.prompt, result.tokens, result.model_sha256, result.ratios) == (8, 4, "ab" * 32, ())


def test_what_is_not_reported_is_not_nought(path: Path) -> None:
    """Absent phases, and a bandwidth that nobody can measure, have no sample; what is reported is kept."""
    phases = {"upload and repack": 0.75, "warming the plates": 0.1}
    timed = Stage(path, it={"phases": phases})().engines[0]
    assert [row.name for row in timed.rows if row.sample is None] == [
        "copy", "init", "module load", "capture",
    ]  # fmt: skip
    assert timed.row("upload and repack").sample == Sample("s", 0.75, 0.75, 0.75, 1)
    assert timed.row("warming the plates").sample == Sample("s", 0.1, 0.1, 0.1, 1)
    assert timed.row("decode").share is None
    assert timed.row("no such row") == Row("no such row", None)


def test_what_is_made_on_first_use_is_a_phase_of_the_last_load(path: Path) -> None:
    """An engine that captures its graph with the first answer reports it then, for the last load alone."""

    class Late(Staged):
        def phases(self) -> Mapping[str, float]:
            return {"init": 0.25} | ({"capture": 0.125} if self.answers > 1 else {})

    clock, log = Clock(), list[tuple[str, tuple[int, ...], int]]()
    settings = Settings(prompt=8, tokens=4, repeat=1, loads=2)
    made = measure(str(path), ["it"], settings, clock=clock, open_engine=lambda spec, model: Late(clock, log))
    assert made.engines[0].row("init").sample == Sample("s", 0.25, 0.25, 0.25, 2)
    assert made.engines[0].row("capture").sample == Sample("s", 0.125, 0.125, 0.125, 1)


def test_the_share_is_of_the_bandwidth_measured_in_this_run(path: Path) -> None:
    """4 tokens/s of all weights but the embedding, over what the engine's own copy gave."""
    with open_gguf(path) as file:
        read = sum(info.nbytes for info in file.tensors.values()) - file.tensors["token_embd.weight"].nbytes
    result = Stage(path, it={"copy": 1e6})()
    assert result.weight_bytes == read
    assert result.engines[0].row("copy").sample == Sample("B/s", 1e6, 1e6, 1e6, 5)
    assert result.engines[0].row("decode").share == pytest.approx(4 * read / 1e6)


def test_the_processors_memory_is_copied_for_engines_on_it(path: Path) -> None:
    """Device "cpu" without a hook: 4 KiB read and written in one tick of the clock, five times."""
    timed = Stage(path, it={"device": "cpu"})(tick=0.001).engines[0]
    copy = timed.row("copy").sample
    assert copy is not None
    assert copy.runs == 5
    assert copy.median == pytest.approx(2 * 4096 / 0.001)
    assert timed.row("decode").share is not None


def test_two_engines_take_turns_on_the_same_prompts(path: Path) -> None:
    """A B, B A, A B: neighbours answer the same new prompts, and no engine sees a prompt twice."""
    stage = Stage(path, a={}, b={})
    stage()
    assert [name for name, _, _ in stage.log] == [*"aabb", *"aabb", *"bbaa", *"aabb"]
    for name in "ab":
        asked = [(ids, tokens) for who, ids, tokens in stage.log if who == name]
        assert len({ids for ids, _ in asked}) == len(asked) == 8
        assert [tokens for _, tokens in asked] == [1, 5, 1, 5, 1, 5, 1, 5]
    a, b = ([ask for ask in stage.log if ask[0] == name] for name in "ab")
    assert [ask[1:] for ask in a] == [ask[1:] for ask in b]
    assert all(len(ids) == 8 and 0 <= min(ids) <= max(ids) < 99 for _, ids, _ in stage.log)
    assert len(stage.told) == bench.steps(SMALL, 2)
    assert all(engine.closed for engine in stage.opened)


def test_a_ratio_is_of_neighbours(path: Path) -> None:
    """A twice as slow engine has ratio 2 in every pair, even when both slow down together."""
    stage = Stage(
        path,
        slow={"prompt": 1.5, "token": lambda answer: 0.2 * (1 + answer)},
        quick={"prompt": 0.5, "token": lambda answer: 0.1 * (1 + answer)},
    )
    result = stage()
    assert [(r.name, r.runs) for r in result.ratios] == [("prompt", 3), ("decode", 3)]
    assert [r.median for r in result.ratios] == pytest.approx([3.0, 2.0])
    assert [r.high for r in result.ratios] == pytest.approx([3.0, 2.0])


def test_loading_is_repeated_when_asked_for(path: Path) -> None:
    """Three loads give three samples; all but the last engine are closed before the next is opened."""
    stage = Stage(path, it={"phases": {"init": 0.25}})
    timed = stage(Settings(prompt=8, tokens=4, repeat=1, loads=3)).engines[0]
    opened, init = timed.row("open").sample, timed.row("init").sample
    assert opened is not None
    assert init is not None
    assert (opened.runs, init.runs, len(stage.opened)) == (3, 3, 3)
    assert all(engine.closed for engine in stage.opened)


@pytest.mark.parametrize(
    ("engine", "error", "words"),
    [
        ({"short": 1}, EngineError, "ended by 'context': expected 1 tokens, got 0"),
        ({"token": lambda answer: 0.0}, Inconclusive, "no longer than one of a single token.*--tokens"),
        ({"config": {"vocab_size": 99, "context_length": 12}}, InvalidParameter, "at most 12.*got 8 and 4"),
        ({"config": {}}, MissingCapability, "vocab_size"),
    ],
)
def test_what_cannot_be_timed_is_an_error(
    path: Path, engine: dict[str, Any], error: type[Exception], words: str
) -> None:
    """A short answer, one that took no time, too small a context, an unknown vocabulary: no figure."""
    stage = Stage(path, it=engine)
    with pytest.raises(error, match=words):
        stage()
    assert all(opened.closed for opened in stage.opened)


def test_a_tied_table_is_read_and_experts_are_read_in_part(tmp_path: Path) -> None:
    """Without an output matrix the embedding is one; 2 of 8 experts are a quarter of their bytes."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "moe")
    writer.add_expert_count(8)
    writer.add_expert_used_count(2)
    for name, shape in {
        "token_embd.weight": (10, 32),
        "position_embd.weight": (7, 32),
        "blk.0.ffn_up_exps.weight": (8, 16, 32),
        "blk.0.attn_q.weight": (32, 32),
    }.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(tmp_path / "m.gguf") as file:
        assert bench.weight_bytes(file) == 4 * 32 * (10 + 32 + 8 * 16 // 4)


def said(*options: str) -> Said:
    return invoke("bench", "--model", "fixture:llama-tiny", "--prompt", "8", "--tokens", "6", *options)


def result(ratio: float) -> BenchResult:
    """Two engines of which the first takes `ratio` times as long to decode."""
    rows = (Row("copy", None), Row("prompt", Sample("tokens/s", 9, 9, 9, 1)), Row("decode", None))
    timed = tuple(Timed(name, name, "1", "cpu", "float32", rows) for name in ("numpy", "numpy64"))
    ratios = (Ratio("prompt", 0.5, 0.5, 0.5, 1), Ratio("decode", ratio, ratio, ratio, 1))
    return BenchResult("m", "ab" * 32, 10, 8, 6, 0, timed, ratios)


@pytest.mark.parametrize(("ratio", "code"), [(1.11, 1), (1.1, 0), (0.4, 0)])
def test_a_budget_is_kept_or_exit_1(ratio: float, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the budget the command fails and says by which phase; without a budget nothing is judged."""
    monkeypatch.setattr("prill_harness.commands.engines.bench.measure", lambda *a, **k: result(ratio))
    judged = said("--engine", "numpy", "--against", "numpy64", "--budget", "1.10")
    assert judged.exit_code == code
    assert ("over the budget of 1.1: decode" in judged.stdout) == bool(code)
    assert f"decode: numpy takes {ratio:.3f} times as long as numpy64" in judged.stdout
    assert "not reported" in judged.stdout
    assert said("--engine", "numpy", "--against", "numpy64").exit_code == 0
    shown = emitted(said("--against", "numpy64", "--budget", "1.1", "--json").stdout)
    assert shown["over"] == (["decode"] if code else [])


def test_a_budget_alone_is_a_usage_error() -> None:
    """There is nothing to hold it against."""
    refused = said("--budget", "1.1")
    assert refused.exit_code == 4
    assert "--against" in refused.stderr


def test_the_command_times_a_real_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy against itself: every figure that it can have is there, with as many runs as asked for."""
    readings = (number**2 / 1e3 for number in count())  # every interval is longer than the one before
    monkeypatch.setattr(bench, "memory_copies", lambda nbytes, count, clock: [1e9] * count)
    monkeypatch.setattr(
        "prill_harness.commands.engines.bench.measure", partial(measure, clock=lambda: next(readings))
    )
    done = said("--against", "numpy", "--repeat", "3", "--json")
    assert done.exit_code == 0, done.stderr
    shown = emitted(done.stdout)["result"]
    rows = {row["name"]: row["sample"] for row in shown["engines"][0]["rows"]}
    assert {name for name, sample in rows.items() if sample is None} == set(bench.LOAD_PHASES)
    assert {name: rows[name]["runs"] for name in ("open", "first token", "prompt", "decode", "copy")} == {
        "open": 1, "first token": 3, "prompt": 3, "decode": 3, "copy": 5,
    }  # fmt: skip
    assert [ratio["name"] for ratio in shown["ratios"]] == ["prompt", "decode"]
    assert len(done.stderr.splitlines()) == bench.steps(Settings(repeat=3), 2)


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [
        ("s", 0.0123, "12.3 ms"),
        ("s", 12.34, "12.3 s"),
        ("B/s", 4.28e12, "4,280.0 GB/s"),
        ("tokens/s", 47_500.4, "47,500 tokens/s"),
        ("tokens/s", 25.04, "25.0 tokens/s"),
    ],
)
def test_figures_are_for_people(unit: str, value: float, text: str) -> None:
    """Small times in milliseconds, bandwidth in GB/s, large rates without decimals."""
    assert figure(unit, value) == text
