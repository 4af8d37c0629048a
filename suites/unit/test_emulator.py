"""What the emulator makes of values that nobody wrote: wherever they lie, they are never zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from prill_runtime.device.machine import compile as kernels
from prill_runtime.device.machine.emulator import EmuDevice
from prill_runtime.errors import EngineError
from prill_runtime.user_cache import CACHE_VARIABLE

COUNT = 64
Run = Callable[..., NDArray[np.float32]]
PROBE = """
#include "common.cuh"
struct ProbeArgs {
    const float* x;
    float* out;
    int count;
};
template <class T>
static T* of_a_template() {
    __shared__ T kept[64];
    return kept;
}
KERNEL(probe, ProbeArgs, 64) {
    const int i = threadIdx.x, block = blockIdx.x;
    float* out = a.out + block * blockDim.x;
    BODY
}
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """Runs the body of a kernel of 64 threads a block, so many times: what the last run left in `out`."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    devices = []

    def probe(
        body: str, blocks: int = 1, times: int = 1, shared: int = 0, fields: tuple[int, int] = (0, COUNT)
    ) -> NDArray[np.float32]:
        monkeypatch.setattr(kernels, "source", lambda name: PROBE.replace("BODY", body))
        devices.append(device := EmuDevice())
        device.module("probe")
        out = device.alloc(4 * COUNT * blocks)
        for _ in range(times):
            device.fill(out, 4 * COUNT * blocks)
            args = {"x": fields[0], "out": out, "count": fields[1]}
            device.launch("probe", (blocks,), COUNT, args, shared=shared)
        return device.download(out, (blocks, COUNT), np.float32)

    yield probe
    for device in devices:
        device.close()


MEMORIES = {
    "static shared memory": "__shared__ float kept[64];",
    "a template's static shared memory": "float* kept = of_a_template<float>();",
    "dynamic shared memory": "float* kept = reinterpret_cast<float*>(dynamic_shared_memory());",
    "a static": "static float kept[64];",
    "a static that says zero": "static float kept[64] = {};",
}


@pytest.mark.parametrize("where", MEMORIES)
def test_memory_of_a_block_starts_as_nan(run: Run, where: str) -> None:
    """Shared memory and statics hold NaN in every thread of every block, whatever blocks and calls before
    have written there."""
    got = run(f"{MEMORIES[where]} out[i] = kept[i]; kept[i] = 1.0f;", blocks=3, times=2, shared=4 * COUNT)
    assert got.shape == (3, COUNT)
    assert np.isnan(got).all()


@pytest.mark.parametrize("where", MEMORIES)
def test_memory_of_a_block_that_is_never_written_is_nan(run: Run, where: str) -> None:
    """The compiler must not take what nobody writes for zero."""
    assert np.isnan(run(f"{MEMORIES[where]} out[i] = kept[(i + 1) % 64];", shared=4 * COUNT)).all()


@pytest.mark.parametrize("where", MEMORIES)
def test_memory_of_a_block_keeps_what_it_wrote(run: Run, where: str) -> None:
    """The control: behind a barrier a block reads its own values."""
    got = run(
        f"{MEMORIES[where]} kept[i] = block + i; __syncthreads(); out[i] = kept[63 - i];",
        blocks=2, shared=4 * COUNT,
    )  # fmt: skip
    assert np.array_equal(got, np.arange(2)[:, None] + np.arange(COUNT)[::-1])


def test_local_variables_start_as_a_huge_value(run: Run) -> None:
    """A sum, an array, a value assigned on one path alone: what was not written is not zero.

    The compiler has one pattern of bytes for all types; as a float it is no NaN, but nobody takes it for one
    of a model's numbers, and as two halves it is NaN.
    """
    pattern = np.full(4, 0xFE, np.uint8).view(np.float32)[0]
    bodies = (
        "float sum; for (int n = 0; n < a.count; ++n) sum += 1.0f; out[i] = sum;",
        "float some[4]; for (int n = 0; n < a.count; ++n) some[n] = n; out[i] = some[i % 4];",
        "float x; if (i < a.count) x = i; out[i] = x;",
    )
    for body in bodies:
        assert (run(body, fields=(0, 0)) == pattern).all(), body
    assert pattern < -1e38
    assert np.isnan(np.full(2, 0xFE, np.uint8).view(np.float16))


def test_fresh_device_memory_is_nan_to_a_kernel(run: Run) -> None:
    """Memory that was given back with values in it, too."""
    device = EmuDevice()
    for _ in range(2):
        fresh = device.alloc(4 * COUNT)
        assert np.isnan(run("out[i] = a.x[i];", fields=(fresh, COUNT))).all()
        device.fill(fresh, 4 * COUNT)
        device.free(fresh)
    device.close()


def test_a_lane_that_is_gone_gives_nan(run: Run) -> None:
    """A shuffle from a lane that returned, or was never there, gets no value of an earlier shuffle."""
    body = (
        "float own = __shfl_xor_sync(0xFFFFFFFFu, i + 1.0f, 1); if (i == 5) { out[i] = own; return; }"
        "out[i] = __shfl_xor_sync(0xFFFFFFFFu, own, 1);"
    )
    got = run(body)[0]
    assert np.isnan(got[4])
    assert got[5] == 5
    others = np.delete(np.arange(COUNT), (4, 5))
    assert np.array_equal(got[others], others + 1)


@pytest.mark.parametrize("place", [0, 255])
def test_a_write_behind_dynamic_shared_memory_is_reported(run: Run, place: int) -> None:
    """The next value and one some way off: the kernel's name, and what it did."""
    body = f"reinterpret_cast<float*>(dynamic_shared_memory())[a.count + {place}] = 1.0f; out[i] = 1.0f;"
    assert (run(body, shared=4 * (COUNT + 256)) == 1).all()
    with pytest.raises(EngineError, match="probe: a thread block wrote behind its dynamic shared memory"):
        run(body, shared=4 * COUNT)
