"""What the meter counts is exact, the same every time, and leaves what it looks at as it was."""

from __future__ import annotations

import cProfile
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pstats import Stats
from types import FrameType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prill_harness import Engine, open_engine
from prill_harness.measure import reach
from prill_harness.measure.cost import OUTSIDE, Meter, Spent, average, slopes
from prill_harness.measure.interpreter import Monitored
from prill_runtime.errors import Inconclusive
from prill_runtime.ops.numpy import NumpyBackend

PICO = "synth:llama-pico:f16"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with open_engine("numpy", PICO) as opened:
        yield opened


def steps(count: int) -> int:
    total = 0
    for n in range(count):
        total += n
    return total


def grown(count: int) -> list[bytes]:
    return [bytes(10_000) for _ in range(count)]


def test_instructions_are_counted_by_function() -> None:
    """A loop costs the same number of instructions for every turn, and its function is named."""
    with Meter() as meter:
        spent = [meter.spent(partial(steps, count)).instructions["steps"] for count in (10, 20, 30)]
    assert spent[2] - spent[1] == spent[1] - spent[0] > 20


def test_whoever_watched_before_watches_again() -> None:
    """A profiler of Python's or of C's, a tracer, and a trace of memory go on once the meter has stopped."""
    seen: list[str] = []

    def profile(frame: FrameType, event: str, argument: object) -> None:
        seen.append(frame.f_code.co_name)

    before, tracer = sys.getprofile(), sys.gettrace()
    counted = cProfile.Profile()
    tracemalloc.start()
    try:
        sys.setprofile(profile)
        with Meter() as meter:
            meter.spent(partial(steps, 3))
        assert sys.getprofile() is profile
        assert "steps" not in seen
        steps(3)
        assert "steps" in seen
        counted.enable()
        with Meter() as meter:
            meter.spent(partial(steps, 3))
        grown(1)
        counted.disable()
        assert "grown" in {name for *_, name in Stats(counted).stats}  # type: ignore[attr-defined]
        assert sys.gettrace() is tracer
        assert tracemalloc.is_tracing()
    finally:
        sys.setprofile(before)
        tracemalloc.stop()


def test_a_number_that_another_tool_has_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instructions are monitored under a free number, one that no kind of tool has by name if there is one;
    where all are taken that is said."""
    tools: dict[int, str] = {0: "a debugger", 3: "somebody"}
    events = [f"PY_{name}" for name in ("START", "RESUME", "THROW", "RETURN", "YIELD", "UNWIND")]
    numbers = {name: 1 << at for at, name in enumerate([*events, "INSTRUCTION"])}
    fake = SimpleNamespace(
        events=SimpleNamespace(**numbers),
        get_tool=tools.get,
        use_tool_id=tools.__setitem__,
        free_tool_id=tools.__delitem__,
        register_callback=lambda tool, event, function: tools[tool],
        set_events=lambda tool, events: tools[tool],
    )
    monkeypatch.setattr(sys, "monitoring", fake, raising=False)
    watched = Monitored(*3 * [lambda code: None], frozenset())
    watched.start()
    assert [n for n in tools if n not in (0, 3)] == [4]
    watched.stop()
    assert tools == {0: "a debugger", 3: "somebody"}
    tools.update(dict.fromkeys(range(6), "others"))
    with pytest.raises(Inconclusive, match="all six"):
        watched.start()
    watched.stop()
    assert tools == dict.fromkeys(range(6), "others")


def test_a_function_that_is_met_first_counts_as_ever_after() -> None:
    """The first call of new code costs the instructions that each later one does."""
    found: dict[str, object] = {}
    exec(compile("def fresh(n):\n    for _ in range(n): pass\n", __file__, "exec"), found)
    fresh = found["fresh"]
    assert callable(fresh)
    with Meter() as meter:
        first, second = (meter.spent(partial(fresh, 9)) for _ in range(2))
    assert first.instructions == second.instructions
    assert first.instructions["fresh"] > 20


@pytest.mark.parametrize("counts", [(2, 4), (10, 60), (60, 300)])
def test_what_the_meter_notes_is_in_no_count(counts: tuple[int, int]) -> None:
    """Work that keeps nothing keeps as much whether it is short or long: numbers that grow take no memory."""
    with Meter() as meter:
        for count in counts:
            meter.spent(partial(steps, count))
        kept = [meter.spent(partial(steps, count)).kept for count in counts]
    assert kept[0] == kept[1]


def test_who_reads_the_meter_takes_nothing_by_it() -> None:
    """However many functions there are to tell of, telling is not the reader's work."""
    found: dict[str, Callable[[], object]] = {}
    source = "\n".join(f"def part{n}():\n    return [{n}]" for n in range(40))
    exec(compile(source, __file__, "exec"), found)
    read: list[Spent] = []

    def reads() -> None:
        read.append(meter.read())

    def works(count: int) -> None:
        for n in range(count):
            found[f"part{n}"]()
        reads()

    with Meter() as meter:
        for count in (40, 2, 40):
            meter.start()
            works(count)
            meter.stop()
    few, many = (spent.allocated.get(reads.__qualname__, 0) for spent in read[1:])
    assert len(read[2].instructions) - len(read[1].instructions) == 38
    assert few == many


def test_a_librarys_work_is_its_callers() -> None:
    """Functions of NumPy's own, written in Python, count for whoever called them."""

    def sorts(count: int) -> None:
        for _ in range(count):
            np.median([3.0, 1.0, 2.0])

    with Meter() as meter:
        meter.spent(partial(sorts, 1))
        one, two = (meter.spent(partial(sorts, count)) for count in (1, 2))
    assert {name.rpartition(".")[2] for name in one.instructions} == {"sorts"}
    assert two.steps - one.steps > 100


def test_numpy_is_a_library_wherever_it_is_installed() -> None:
    """In a user's folder, or in the environment below this one: its functions' work is their caller's."""
    source = """
import sysconfig
paths = sysconfig.get_paths()
sysconfig.get_paths = lambda: {**paths, "purelib": "/nowhere", "platlib": "/nowhere"}
from functools import partial
import numpy as np
from prill_harness.measure.cost import Meter
work = partial(np.unique, np.arange(100)[::-1])
work()  # what NumPy imports late, it has from here on
with Meter() as meter:
    print(*meter.spent(work).instructions, sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [OUTSIDE]


def test_bytes_are_counted_by_function_whether_kept_or_not() -> None:
    """What is let go of again was taken all the same."""

    def taken(count: int) -> None:
        for _ in range(count):
            grown(1)

    with Meter() as meter:
        meter.spent(partial(taken, 1))
        spent = meter.spent(partial(taken, 20))
    assert 200_000 <= spent.allocated["grown"] + spent.allocated.get("grown.<locals>.<listcomp>", 0) < 240_000
    assert 10_000 <= spent.transient < 25_000
    assert spent.kept < 2_000


@pytest.mark.parametrize(
    ("work", "items"),
    [
        (lambda ids: 7 in ids, 50),
        (lambda ids: ids.count(3), 50),
        (lambda ids: ids.index(0), 50),
        (sum, 50),
        (set, 50),
        (lambda ids: ids.append(1), 0),
        (len, 0),
        (lambda ids: bytearray(30).find(b"x"), 30),
        (lambda ids: "abc".replace("b", "d"), 3),
    ],
)
def test_what_c_goes_over_is_counted(work: Callable[[list[int]], object], items: int) -> None:
    """Of a text's ids when they are searched or walked, of a text when a method searches it; nothing else."""
    counted = reach.Walked([0] * 50)
    with Meter() as meter:
        counted.count_of = meter._walked
        assert sum(meter.spent(partial(work, counted)).reached.values()) == items


def test_what_is_written_into_a_cache_is_counted(engine: Engine) -> None:
    """A token writes its own row; whoever fills the rest of the rows, by any way to write, is seen."""
    session = engine.session(8)
    session.close()
    with Meter(engine) as meter:
        session = engine.session(8)
        session.feed([1])
        own = meter.spent(partial(session.feed, [2])).elements["cache"]
        keys = session._cache._keys  # type: ignore[attr-defined]
        for write in (partial(keys.__setitem__, ..., 0), partial(keys[..., 2:, :].fill, 0)):
            assert meter.spent(write).elements["cache"] in (keys.size, keys.size * 6 // 8)
        assert own == 2 * keys.size // 8
        session.close()


@given(rows=st.integers(1, 5), inner=st.integers(1, 7), columns=st.integers(1, 6))
def test_products_are_rows_times_weights(rows: int, inner: int, columns: int) -> None:
    """Multiply-adds of `linear` are those of the product; the result is what it is without a meter."""
    backend = NumpyBackend("float32")
    x, weight = np.ones((rows, inner), np.float32), np.full((columns, inner), 2, np.float32)
    plain = backend.linear(x, weight)

    with open_engine("numpy", PICO) as engine, Meter(engine) as meter:
        counted = engine.model.backend  # type: ignore[attr-defined]
        meter.start()
        got = counted.linear(x, weight)
        spent = meter.stop()
    assert spent.products == {"linear": rows * inner * columns}
    assert type(got) is np.ndarray
    assert np.array_equal(got, plain)


def test_a_metered_engine_gives_the_same_bits(engine: Engine) -> None:
    """Counting changes no logit."""
    before = engine.logits([1, 2, 3])
    with Meter(engine) as meter:
        meter.start()
        during = engine.logits([1, 2, 3])
        spent = meter.stop()
    assert np.array_equal(before, during)
    assert spent.products["linear"]
    assert spent.elements["rms_norm"]


def test_the_same_work_costs_the_same(engine: Engine) -> None:
    """Two runs agree in every operation and instruction."""
    work = partial(engine.generate, [1, 2], max_tokens=3, ignore_eos=True)
    with Meter(engine) as meter:
        meter.spent(work)
        one, two = meter.spent(work), meter.spent(work)
    assert (one.products, one.elements, one.instructions) == (two.products, two.elements, two.instructions)


def test_everything_is_as_before(engine: Engine) -> None:
    """After a meter, even one whose work failed, the backend and the interpreter are not watched any more."""
    backend, traced = engine.model.backend, sys.gettrace()  # type: ignore[attr-defined]
    own = dict(vars(backend))

    def fails() -> None:
        raise KeyError(1)

    with pytest.raises(KeyError), Meter(engine) as meter:
        meter.spent(fails)
    assert sys.gettrace() is traced
    assert vars(backend) == own


def test_nothing_counts_outside(engine: Engine) -> None:
    """What is done before `start` and after `stop` is no part of what was spent."""
    with Meter(engine) as meter:
        engine.logits([1, 2])
        meter.start()
        spent = meter.stop()
        engine.logits([1, 2])
        after = meter.spent(lambda: None)
    assert not spent.products
    assert not after.products


def test_growth_is_by_what_was_added() -> None:
    """Slopes come the fastest first; a count that is new or gone counts from nought."""
    first, last = average([Spent({"a": 1}), Spent({"a": 3})], lambda s: s.instructions), {"a": 12.0, "b": 5.0}
    assert first == {"a": 2.0}
    assert slopes(first, last, 5) == {"a": 2.0, "b": 1.0}


def test_launches_of_the_emulator_are_counted() -> None:
    """A replayed graph launches the same kernels with the same threads for every token."""
    seen: list[Spent] = []
    with open_engine("emu", "synth:llama-micro:f16") as engine, Meter(engine) as meter:

        def looked(token: int, logprob: float) -> None:
            if seen or meter.running:
                seen.append(meter.read())
            else:
                meter.start()

        engine.generate([1, 2], max_tokens=5, ignore_eos=True, on_token=looked)
    assert len(seen) == 4
    assert sum(seen[1].launches.values()) > 3
    assert seen[1].launches == seen[3].launches
    assert seen[1].threads == seen[3].threads
    assert all(threads >= seen[1].launches[kernel] for kernel, threads in seen[1].threads.items())
