"""Judge one op of a backend against its float64 twin.

Arrays go in as views of a frame of NaN: a read outside shows in the result, a write in the frame. A backend
that owns the memory of its results gets frames there too: they are poisoned with NaN before the op, and what
is written outside a result is found on both sides of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from prill_harness.engines.base import Engine
from prill_harness.numbers.compare import nmse
from prill_harness.run.checks import Observer
from prill_runtime.errors import MissingCapability
from prill_suites.ops_shapes import sizes

SEED = 7
# NMSE by the engine's arithmetic (docs/adr/0002-lanes.md, ops).
BOUND = {"float32": 1e-10, "float64": 1e-22, "half": 1e-5, "int8": 5e-4}
TWIN = "naive float64 twin"
BORDER = 64  # values on either side of a result: 256 bytes, which keeps every alignment
SENTINEL = np.float32(-1.9375e23)
# Ops whose float arrays a device takes as they are, and ops of which it takes the first so.
PLACED = ("rms_norm", "layer_norm", "softmax", "swiglu", "gelu_tanh", "add", "swiglu_clamped", "geglu",
          "gelu_erf", "scale", "softcap", "route", "mix")  # fmt: skip
PLACED_FIRST = ("linear", "rope", "attention", "temper", "expert_linear")
FEW = 8
Array = NDArray[Any]


@runtime_checkable
class DeviceBackend(Protocol):
    """A backend whose results lie in memory of a device: a check can own what lies around them.

    Attributes:
        device: copies an array's bytes to an address with `upload(pointer, array)`.
    """

    device: Any

    def empty(self, *shape: int) -> Any:
        """float32 memory for a result, with a `pointer`, that slices, reshapes and converts to NumPy."""
        ...


class Frames:
    """Every array that a device backend makes, inside a border, until the end of one op."""

    def __init__(self, backend: Any) -> None:
        self._backend, self._original = backend, backend.empty
        self.frames: list[tuple[Any, int]] = []  # the whole memory, values inside

    def empty(self, *shape: int, **named: Any) -> Any:
        """As the backend's own, poisoned, inside a border of sentinels."""
        poison = np.full(shape, np.nan, np.float32)
        whole, view = self._inside(poison, SENTINEL, **named)
        self.frames.append((whole, poison.size))
        return view

    def place(self, values: Array) -> Any:
        """A copy of an array in device memory, inside a border of NaN."""
        return self._inside(values, np.float32(np.nan))[1]

    def _inside(self, values: Array, border: np.float32, **named: Any) -> tuple[Any, Any]:
        whole = self._original(values.size + 2 * BORDER, **named)
        self._backend.device.upload(whole.pointer, np.pad(values.ravel(), BORDER, constant_values=border))
        return whole, whole[BORDER : BORDER + values.size].reshape(*values.shape)

    def broken(self) -> list[str]:
        """One clause for every frame that was written to."""
        found = []
        for whole, size in self.frames:
            values = np.asarray(whole)
            for side, border in (("before", values[:BORDER]), ("behind", values[BORDER + size :])):
                wrong = int(np.count_nonzero(border != SENTINEL))
                if wrong:
                    found.append(f"{wrong} values {side} a result of {size} were overwritten")
        return found


@contextmanager
def framing(backend: Any) -> Iterator[Frames | None]:
    """Frames around all results inside the block; None for a backend on the host."""
    if not isinstance(backend, DeviceBackend):
        yield None
        return
    frames = Frames(backend)
    backend.empty = frames.empty  # type: ignore[method-assign]
    try:
        yield frames
    finally:
        del backend.empty


class Bench:
    """Runs one op of the engine's backend on framed inputs and holds the result to the twin of its name.

    Args:
        twins: given by the suite, so that they count in the content of its checks.
    """

    def __init__(self, engine: Engine, twins: ModuleType, observe: Observer) -> None:
        self.backend, self.twins, self.observe = engine.ops(), twins, observe
        self.bound = bound_of(engine)
        self.random = np.random.default_rng(SEED)
        self.worst, self.cases, self.case = 0.0, 0, ""
        self.framed = 0
        self.shapes: dict[str, set[int]] = {}
        observe.seed = SEED

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        """Random values in the backend's own type, so that twin and backend get the same numbers."""
        return (self.random.standard_normal(shape) * scale).astype(self.backend.dtype)

    def beside(self, rows: int, weight: Array) -> Array:
        """As `normal`; where few results come out, rows that are not orthogonal to the first of the weight's:
        a sum that all but cancels is known to no float32."""
        x, outputs = self.normal(rows, weight.shape[1]), len(weight)
        if rows * outputs < FEW:
            x += (weight[0] / np.sqrt(np.mean(weight[0] ** 2) or 1.0)).astype(x.dtype)
        return x

    def hold(
        self,
        op: str,
        *arguments: Any,
        case: str,
        twin: tuple[Any, ...] = (),
        made: Callable[..., Any] | None = None,
        **named: Any,
    ) -> None:
        """Compare every element of the op's result with the twin's.

        Args:
            twin: the twin's arguments, where they are not the op's own.
            made: what is run in the op's place, its first argument the backend: a node made of ops.
        """
        frames = [framed(a) if isinstance(a, np.ndarray) else (a, None) for a in arguments]
        wide = {key: widened(value) for key, value in named.items()}
        expected = getattr(self.twins, op)(*map(widened, twin or arguments), **wide)
        what = f"{op} at {case}"
        got = self._run(op, what, [view for view, _ in frames], named, made)
        self.observe.saw(got.size, oracle=TWIN)
        self.observe.expect(
            got.shape == expected.shape and got.dtype == self.backend.dtype,
            f"{what}: expected {self.backend.dtype} {expected.shape}, got {got.dtype} {got.shape}",
        )
        for number, (given, (view, frame)) in enumerate(zip(arguments, frames, strict=True)):
            if frame is not None:
                intact = np.array_equal(given, view) and border_is_nan(frame)
                self.observe.expect(bool(intact), f"{what}: argument {number} was written to")
                self.observe.expect(
                    not np.shares_memory(got, frame), f"{what}: the result aliases argument {number}"
                )
        error = nmse(expected, got)
        self.observe.expect(
            error <= self.bound, f"{what}: NMSE {error:.3g}, at most {self.bound:.0e}", case=case
        )
        for axis, size in sizes(op, twin or arguments, named, bool(twin)).items():
            self.shapes.setdefault(axis, set()).add(size)
        self.cases += 1
        if error >= self.worst:
            self.worst, self.case = error, case

    def _run(
        self,
        op: str,
        what: str,
        arguments: list[Any],
        named: dict[str, Any],
        made: Callable[..., Any] | None = None,
    ) -> Array:
        """The result on the host; on a device, arguments and results lie in frames there."""
        call = getattr(self.backend, op) if made is None else partial(made, self.backend)
        with framing(self.backend) as frames:
            if frames is None:
                return np.asarray(call(*arguments, **named))
            given = [self._placed(frames, op, number, a) for number, a in enumerate(arguments)]
            result = call(*given, **named)
            got = np.array(result)
            self.observe.expect(bool(frames.frames), f"{what}: the result lies in memory nobody can see")
            for number, (before, after) in enumerate(zip(arguments, given, strict=True)):
                if before is not after:
                    same = np.array_equal(before, np.asarray(after), equal_nan=True)
                    self.observe.expect(same, f"{what}: argument {number} was written to on the device")
            broken = frames.broken()
            self.observe.expect(not broken, f"{what}: {'; '.join(broken)}")
            self.framed += len(frames.frames)
            return got

    @staticmethod
    def _placed(frames: Frames, op: str, number: int, argument: Any) -> Any:
        """The argument inside a frame on the device, where it has no layout of its own, as matrices do."""
        floats = isinstance(argument, np.ndarray) and argument.dtype == np.float32
        plain = op in PLACED or (op in PLACED_FIRST and number == 0)
        return frames.place(argument) if floats and plain else argument

    def conclude(self) -> None:
        """Record the worst figure and the sizes of all cases, and say it."""
        self.observe.note(shapes={axis: sorted(seen) for axis, seen in sorted(self.shapes.items())})
        self.observe.metric("worst NMSE", self.worst, at_most=self.bound)
        inside = f", {self.framed} results inside sentinels" if self.framed else ""
        self.observe.say(
            f"{self.cases} cases, {self.observe.observed} values{inside}, "
            f"worst NMSE {self.worst:.2g} at {self.case}"
        )


def bound_of(engine: Engine) -> float:
    """The NMSE that an engine's arithmetic is allowed.

    Raises:
        MissingCapability: the engine does not say what it computes in.
    """
    if engine.info.arithmetic not in BOUND:
        raise MissingCapability(f"no bound for the arithmetic {engine.info.arithmetic!r}")
    return BOUND[engine.info.arithmetic]


def widened(value: Any) -> Any:
    """Float arrays in float64; integer arrays as lists; the rest as it is."""
    if not isinstance(value, np.ndarray):
        return value
    return value.astype(np.float64) if value.dtype.kind == "f" else value.tolist()


def framed(array: Array) -> tuple[Array, Array | None]:
    """A copy of a float array inside a border of NaN, and the whole frame."""
    if array.dtype.kind != "f":
        return array, None
    frame = np.full([n + 2 for n in array.shape], np.nan, array.dtype)
    view = frame[tuple(slice(1, -1) for _ in array.shape)]
    view[...] = array
    return view, frame


def border_is_nan(frame: Array) -> bool:
    """Whether no value of the border was overwritten."""
    inner = np.zeros(frame.shape, bool)
    inner[tuple(slice(1, -1) for _ in frame.shape)] = True
    return bool(np.isnan(frame[~inner]).all())
