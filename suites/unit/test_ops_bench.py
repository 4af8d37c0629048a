"""The op suite's own instruments: frames in device memory, poison, sentinels, bounds and the cut."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from prill_harness.engines.base import Engine, EngineInfo
from prill_harness.faults.opening import open_engine
from prill_harness.run.checks import CheckFailed, Observer
from prill_runtime.errors import MissingCapability
from prill_runtime.ops.numpy import NumpyBackend
from prill_suites import ops_twins
from prill_suites.ops_bench import BORDER, Bench, DeviceBackend

OPS = (
    "rms_norm",
    "layer_norm",
    "linear",
    "rope",
    "softmax",
    "attention",
    "swiglu",
    "gelu_tanh",
    "add",
    "embed",
)


class Placed(np.ndarray[Any, Any]):
    """An array that knows its address, as an array of a device does."""

    @property
    def pointer(self) -> int:
        return self.ctypes.data


class Memory:
    """Copies bytes to an address."""

    def upload(self, pointer: int, array: NDArray[Any]) -> None:
        ctypes.memmove(pointer, np.ascontiguousarray(array).ctypes.data, array.nbytes)


class Raw(NumpyBackend):
    """A backend that writes every result into memory it was given; `spoil` is the bug it has.

    Args:
        spoil: gets the address and size of a result once it was written, and the first argument.
    """

    def __init__(self, spoil: Callable[[int, int, Any], None] | None = None) -> None:
        super().__init__("float32")
        self.device, self.spoil = Memory(), spoil

    def empty(self, *shape: int, purpose: str = "activations") -> Placed:
        return np.zeros(shape, np.float32).view(Placed)


def _op(name: str) -> Callable[..., Any]:
    compute = getattr(NumpyBackend, name)

    def run(self: Raw, *arguments: Any, **named: Any) -> Any:
        values = compute(
            self, *(np.asarray(a) if isinstance(a, np.ndarray) else a for a in arguments), **named
        )
        out = self.empty(*values.shape)
        out[...] = values
        if self.spoil is not None:
            self.spoil(out.pointer, out.size, arguments[0])
        return out

    return run


for _name in OPS:
    setattr(Raw, _name, _op(_name))


class Holder(Engine):
    """An engine with nothing but ops."""

    def __init__(self, backend: Any, arithmetic: str = "float32", name: str = "raw") -> None:
        self._backend = backend
        self._info = EngineInfo(name, "1", "thing", "m", "", arithmetic, frozenset())

    @property
    def info(self) -> EngineInfo:
        return self._info

    def ops(self) -> Any:
        return self._backend


def bench(spoil: Callable[[int, int, Any], None] | None = None, **named: str) -> Bench:
    return Bench(Holder(Raw(spoil), **named), ops_twins, Observer())


def add(held: Bench) -> None:
    held.hold("add", held.normal(3, 5), held.normal(3, 5), case="(3, 5)")


def store(address: int, value: float) -> None:
    ctypes.cast(address, ctypes.POINTER(ctypes.c_float))[0] = value


def past_the_end(pointer: int, size: int, first: Any) -> None:
    store(pointer + 4 * size, 1.0)


def before_the_start(pointer: int, size: int, first: Any) -> None:
    store(pointer - 4 * BORDER, 1.0)


def last_not_written(pointer: int, size: int, first: Any) -> None:
    store(pointer + 4 * (size - 1), float("nan"))  # what the poison would have left there


def argument_changed(pointer: int, size: int, first: Any) -> None:
    store(first.pointer, 7.0)


def read_too_far(pointer: int, size: int, first: Any) -> None:
    beyond = ctypes.cast(first.pointer + 4 * first.size, ctypes.POINTER(ctypes.c_float))[0]
    store(pointer, beyond * 0)


def test_results_lie_inside_sentinels() -> None:
    """A sound backend passes with every op, and each result was looked at with its border."""
    held = bench()
    assert isinstance(held.backend, DeviceBackend)
    x, w = held.normal(3, 8), held.normal(5, 8)
    held.hold("rms_norm", x, w[0], 1e-5, case="a")
    held.hold("layer_norm", x, w[0], w[1], 1e-5, case="b")
    held.hold("linear", x, w, held.normal(5), case="c")
    turn: dict[str, Any] = {"base": 1e4, "dim": 4, "layout": "norm"}
    held.hold("rope", held.normal(3, 2, 4), np.arange(3), case="d", **turn)
    held.hold("softmax", x, case="e")
    k = held.normal(1, 3, 4)
    held.hold("attention", held.normal(3, 2, 4), k, k, start=0, scale=0.5, case="f")
    held.hold("embed", w, np.array([4, 0]), case="g")
    held.hold("gelu_tanh", x, case="h")
    held.hold("swiglu", x, x, case="i")
    add(held)
    held.conclude()
    assert (held.cases, held.framed) == (10, 11), "attention makes a softmax besides its own result"
    assert "11 results inside sentinels" in held.observe.sentence
    assert "empty" not in vars(held.backend), "the frames are gone after each op"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (past_the_end, "1 values behind a result of 15 were overwritten"),
        (before_the_start, "1 values before a result of 15 were overwritten"),
        (last_not_written, "NMSE inf"),
        (argument_changed, "argument 0 was written to on the device"),
        (read_too_far, "NMSE inf"),
    ],
)
def test_what_leaves_its_place_is_found(spoil: Callable[[int, int, Any], None], words: str) -> None:
    """A write behind or before a result or to an argument, a value never written, a read behind the input."""
    with pytest.raises(CheckFailed, match=words):
        add(bench(spoil))


def test_a_result_outside_all_frames_is_refused() -> None:
    """A backend that claims memory of a device but returns an array of its own was not looked at."""
    held = bench()
    held.backend.add = NumpyBackend("float32").add  # type: ignore[method-assign]
    with pytest.raises(CheckFailed, match="memory nobody can see"):
        add(held)


def test_a_host_backend_has_no_frames() -> None:
    """NumPy returns new arrays; nothing is claimed about their borders."""
    held = Bench(Holder(NumpyBackend("float32")), ops_twins, Observer())
    add(held)
    held.conclude()
    assert held.framed == 0
    assert "sentinels" not in held.observe.sentence


@pytest.mark.parametrize(("arithmetic", "passes"), [("float32", False), ("half", False), ("int8", True)])
def test_the_bound_follows_the_arithmetic(arithmetic: str, passes: bool) -> None:
    """An error of 1 % in amplitude, NMSE 1e-4, is noise of integer activations and of nothing else."""
    held = bench(arithmetic=arithmetic)
    original = held.backend.add
    held.backend.add = lambda a, b: original(a, b) * np.float32(1.01)  # type: ignore[method-assign]
    if passes:
        add(held)
        held.conclude()
    else:
        with pytest.raises(CheckFailed, match="at most"):
            add(held)


def test_an_unknown_arithmetic_has_no_bound() -> None:
    """Nothing is judged by a bound that somebody guessed."""
    with pytest.raises(MissingCapability, match="arithmetic 'unknown'"):
        bench(arithmetic="unknown")


def test_a_device_engine_gives_ops_memory_of_their_own_and_its_arithmetic() -> None:
    """The model's arena is full to the byte: checks get another, one for all, that goes with the engine."""
    with open_engine("emu:fast", "fixture:llama-tiny") as engine:
        ops: Any = engine.ops()
        assert ops is engine.ops() is not engine.model.backend  # type: ignore[attr-defined]
        assert ops.mode == engine.model.options.mode == "fast"  # type: ignore[attr-defined]
        assert ops.arena.blocks()
    assert not ops.arena.blocks()


def test_weights_in_float32_keep_their_range_in_fast_arithmetic() -> None:
    """Inputs far below half's smallest number give float32's products, also in prompts of many rows."""
    random = np.random.default_rng(0)
    x = (random.standard_normal((33, 31)) * 1e-37).astype(np.float32)
    weight = random.standard_normal((65, 31)).astype(np.float32)
    with open_engine("emu:fast", "fixture:llama-tiny") as engine:
        got = np.asarray(engine.ops().linear(x, weight))
    assert np.allclose(got, x.astype(np.float64) @ weight.T.astype(np.float64), rtol=1e-4, atol=1e-42)


def test_a_host_engine_gives_the_ops_it_computes_with() -> None:
    """NumPy's ops are the model's own; an engine without any says so."""
    with open_engine("numpy", "fixture:llama-tiny") as engine:
        assert engine.ops() is engine.model.backend  # type: ignore[attr-defined]
        assert engine.phases() == {}
        assert engine.copy_bandwidth() is None
    with pytest.raises(MissingCapability, match="ops"):
        Engine.ops(Holder(None))
