"""Attention of one row, as a decode step runs it, on the emulator against NumPy in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prill_runtime.device.machine.emulator import EmuDevice
from prill_runtime.device.memory.slot import SEQUENCE_DTYPE
from prill_runtime.device.steps.launches import attend, team_of
from prill_runtime.models.nodes.attention import Attention
from prill_runtime.ops.numpy import NumpyBackend

from .networks import network

ORACLE = NumpyBackend("float64")
LAYERS, KV_HEADS, CAPACITY = 2, 2, 800


@pytest.fixture(scope="module")
def device() -> Iterator[EmuDevice]:
    made = EmuDevice()
    made.module("attention_decode")
    yield made
    made.close()


def attention(group: int, dim: int, window: int = 0) -> Attention:
    """The second layer's, of a Llama with these heads."""
    heads = KV_HEADS * group
    made = network(layers=LAYERS, heads=heads, kv_heads=KV_HEADS, size=dim, context=CAPACITY, window=window)
    return made.layers[1].attention


def both(device: EmuDevice, a: Attention, length: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(head * dim,) of the oracle and of the kernel, for the row at position `length` of layer 1."""
    rng = np.random.default_rng([length, a.heads, a.size])
    keys, values = rng.standard_normal((2, LAYERS, KV_HEADS, CAPACITY, a.size)).astype(np.float32)
    q = (scale * rng.standard_normal((1, a.heads, a.size))).astype(np.float32)
    keys[:, :, length + 1 :] = values[:, :, length + 1 :] = np.nan  # nobody may look ahead
    held = [device.alloc(array.nbytes) for array in (keys, values, q, q)]
    for pointer, array in zip(held, (keys, values, q), strict=False):
        device.upload(pointer, array)
    slot = device.alloc(SEQUENCE_DTYPE.itemsize)
    device.upload(slot, np.array([(held[0], held[1], CAPACITY, length, 0, 0, 0)], SEQUENCE_DTYPE))
    attend(device, a, slot, held[2], held[3])
    got = device.download(held[3], (q.size,), np.float32)
    for pointer in (*held, slot):
        device.free(pointer)
    wide = (q.astype(np.float64), *(kv[1, :, : length + 1].astype(np.float64) for kv in (keys, values)))
    expected = ORACLE.attention(*wide, start=length, scale=a.size**-0.5, window=a.window)
    return np.asarray(expected).ravel(), got


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("dim", [4, 32, 64, 80, 128, 132, 256])
def test_a_row_attends_to_all_before_it(device: EmuDevice, group: int, dim: int) -> None:
    """Every count of heads that share keys, heads of any width, more keys than a warp takes at a time."""
    expected, got = both(device, attention(group, dim), 300)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 255, 256, 257, 799])
def test_a_row_at_any_position(device: EmuDevice, length: int) -> None:
    """Fewer keys than warps, a last warp with one key or none, a full cache; large scores do not overflow."""
    expected, got = both(device, attention(4, 64), length, scale=40.0)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [1, 16, 100, 700])
def test_a_window_hides_what_lies_before_it(device: EmuDevice, window: int) -> None:
    """Of 400 positions the last `window` count."""
    expected, got = both(device, attention(2, 64, window), 400)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


def test_the_order_of_threads_does_not_matter(device: EmuDevice) -> None:
    """Threads and blocks from last to first give the same bits: no barrier is missing."""
    first = both(device, attention(4, 128), 500)[1]
    device.reverse = True
    try:
        assert both(device, attention(4, 128), 500)[1].tobytes() == first.tobytes()
    finally:
        device.reverse = False


@given(st.integers(1, 6000), st.integers(1, 30), st.sampled_from([1, 2, 132]), st.sampled_from([2, 8, 16]))
def test_teams_take_every_step_of_every_group(groups: int, steps: int, grid: int, warps: int) -> None:
    """Where placing a group costs a step, there are never more rounds, but maybe more steps; so it is
    for q, k and v of 5,120 rows of 2,880 in Q8_0 on 132 multiprocessors."""
    plain, placed = (team_of(groups, steps, grid, warps, placing) for placing in (0, 1))
    for team, each, rounds in (plain, placed):
        assert team * each >= steps
        assert grid * (warps // team) * rounds >= groups
    assert placed[2] <= plain[2]
    assert plain[1] * plain[2] <= placed[1] * placed[2]
    assert team_of(1280, 6, 132, 16) == (8, 1, 5)
    assert team_of(1280, 6, 132, 16, 1) == (1, 6, 1)
