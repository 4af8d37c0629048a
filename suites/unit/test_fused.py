"""Attention of one row, as a decode step runs it, on the emulator against NumPy in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prill_runtime.device.machine.emulator import EmuDevice
from prill_runtime.device.memory.slot import SEQUENCE_DTYPE
from prill_runtime.device.steps.launches import NO_HEAD_NORMS, HeadNorms, attend, team_of
from prill_runtime.models.nodes.attention import Attention
from prill_runtime.models.nodes.norms import RmsNorm
from prill_runtime.models.nodes.rope import Rope
from prill_runtime.ops import rotary
from prill_runtime.ops.numpy import NumpyBackend
from prill_runtime.ops.protocol import RopeLayout

from .networks import network

ORACLE = NumpyBackend("float64")
LAYERS, KV_HEADS, CAPACITY = 2, 2, 800
OFFSET = 5  # position of the first row


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
    """What the row at position `length` of layer 1 mixes (head * dim,), and behind it its key in the cache
    (kv_head * dim,): of the oracle and of the kernel."""
    random = np.random.default_rng([length, a.heads, a.size])
    drawn = {
        "keys": random.standard_normal((LAYERS, KV_HEADS, CAPACITY, a.size)),
        "values": random.standard_normal((LAYERS, KV_HEADS, CAPACITY, a.size)),
        "q": scale * random.standard_normal((1, a.heads, a.size)),
        "norms": 1 + 0.3 * random.standard_normal((2, a.size)),
        "sinks": 3 * random.standard_normal(a.heads),
    }
    there = min(length, CAPACITY - 1)
    for name in ("keys", "values"):
        drawn[name][:, :, there + 1 :] = np.nan  # nobody may look ahead
    given = {name: array.astype(np.float32) for name, array in drawn.items()}
    mixed, cache = launched(device, a, length, given)
    own = cache[1, :, there].copy()
    cache[1, :, there] = given["keys"][1, :, there]
    assert np.array_equal(cache, given["keys"], equal_nan=True)  # but for this one it is as it was
    wide = {name: array.astype(np.float64) for name, array in given.items()}
    return np.concatenate(reference(a, length, wide)), np.append(mixed, own)


def launched(device: EmuDevice, a: Attention, length: int, given: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """One launch: what it mixes, and the keys of the whole cache."""
    turns = np.zeros((1, 1, 2), np.float64)
    if a.rope is not None:
        turns = rotary.frequencies(a.rope.base, a.rope.dim) * (OFFSET + length)
    angles = np.stack([np.cos(turns), np.sin(turns)], axis=-1)
    held = {name: device.alloc(array.nbytes) for name, array in given.items()}
    held |= {"angles": device.alloc(angles.nbytes), "out": device.alloc(given["q"].nbytes)}
    slot = device.alloc(SEQUENCE_DTYPE.itemsize)
    for name, array in (*given.items(), ("angles", angles.astype(np.float32))):
        device.upload(held[name], array)
    sequence = held["keys"], held["values"], CAPACITY, length, OFFSET, 0, 0
    device.upload(slot, np.array([sequence], SEQUENCE_DTYPE))
    norms = NO_HEAD_NORMS
    if a.q_norm is not None and a.rope is not None:
        weights = held["norms"], held["norms"] + 4 * a.size
        pairs, neox = a.rope.dim // 2, int(a.rope.layout == "neox")
        norms = HeadNorms(*weights, held["angles"], a.q_norm.eps, pairs, neox)
    attend(device, a, slot, held["q"], held["out"], sinks=held["sinks"] if a.sinks else 0, norms=norms)
    mixed = device.download(held["out"], given["q"].shape, np.float32)
    cache = device.download(held["keys"], given["keys"].shape, np.float32)
    for pointer in (*held.values(), slot):
        device.free(pointer)
    return mixed, cache


def reference(a: Attention, length: int, given: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """As `both`, by the oracle's ops one by one; past the end nothing is put into the cache."""
    there, at = min(length, CAPACITY - 1), np.array([OFFSET + length])
    q, new = given["q"], given["keys"][1, :, there][None]
    if a.q_norm is not None and a.rope is not None:
        turn: Any = {"layout": a.rope.layout, "dim": a.rope.dim, "base": a.rope.base}
        q, turned = (
            ORACLE.rope(ORACLE.rms_norm(x, weight, a.q_norm.eps), at, **turn)
            for x, weight in zip((q, new), given["norms"], strict=True)
        )
        new = turned if length < CAPACITY else new
    if a.temper is not None:
        q = ORACLE.temper(q, at, beta=a.temper[0], original=a.temper[1])
    keys = np.concatenate([given["keys"][1, :, :there], new[0][:, None]], axis=1)
    mixed = ORACLE.attention(
        q, keys, given["values"][1, :, : there + 1], start=there, scale=a.scale, window=a.window,
        softcap=a.softcap, sinks=given["sinks"] if a.sinks else None,
    )  # fmt: skip
    return np.ravel(mixed), np.ravel(new)


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


def normed(a: Attention, dim: int, layout: RopeLayout = "neox") -> Attention:
    """The same with norms of heads, of which the first `dim` components are turned."""
    q_norm, k_norm = (RmsNorm(name, a.size, 1e-2) for name in "qk")
    return replace(a, rope=Rope(layout, dim, 100.0), q_norm=q_norm, k_norm=k_norm)


@pytest.mark.parametrize("layout", ["norm", "neox"])
@pytest.mark.parametrize(
    ("dim", "turned"), [(4, 2), (32, 32), (64, 20), (80, 80), (128, 128), (132, 66), (256, 256)]
)
def test_heads_are_normalised_and_turned_on_their_way_in(
    device: EmuDevice, layout: RopeLayout, dim: int, turned: int
) -> None:
    """Queries and the new key come as they were projected: all of a head turned or a part of it, fewer pairs
    than lanes and more; the key lies in the cache as the next step needs it."""
    expected, got = both(device, normed(attention(3, dim), turned, layout), 300)
    np.testing.assert_allclose(got, expected, rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize("group", [1, 2, 7, 8])
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 255, 256, 799])
def test_the_new_key_is_whole_wherever_it_comes(device: EmuDevice, group: int, length: int) -> None:
    """First of all, first and last of a tile, read at once or from the cache; large queries stay in range."""
    expected, got = both(device, normed(attention(group, 64), 64), length, scale=1e4)
    np.testing.assert_allclose(got, expected, rtol=3e-5, atol=3e-6)


def test_a_step_past_the_end_changes_no_key(device: EmuDevice) -> None:
    """A graph that is replayed once more finds a full cache, whose last key is whole already."""
    expected, got = both(device, normed(attention(2, 64), 64), CAPACITY)
    assert expected[-128:].astype(np.float32).tobytes() == got[-128:].astype(np.float32).tobytes()


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("length", [90, 127, 128, 129, 130, 300])
@pytest.mark.parametrize("window", [127, 128, 129])
def test_sinks_beside_a_window(device: EmuDevice, window: int, length: int, norms: bool) -> None:
    """gpt-oss's window and those beside it, with a sink for each head: fewer keys than it shows, as many, one
    more and many more."""
    a = replace(attention(4, 64, window), sinks="sinks")
    expected, got = both(device, normed(a, 64) if norms else a, length)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)
    without, _ = both(device, replace(normed(a, 64) if norms else a, sinks=None), length)
    assert np.abs(without - expected).max() > 1e-3  # a sink left out would be seen


@pytest.mark.parametrize(("cap", "temper"), [(5.0, None), (None, (0.1, 64)), (2.0, (0.1, 306))])
def test_scores_are_capped_and_late_queries_sharpened(device: EmuDevice, cap: Any, temper: Any) -> None:
    """Scores within a cap; queries sharper at each multiple of the original length, here 4 and 1 of them."""
    a = replace(attention(2, 64), softcap=cap, temper=temper)
    expected, got = both(device, a, 301, scale=4.0)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    for other in (replace(a, softcap=None), replace(a, temper=None)):
        without, _ = both(device, other, 301, scale=4.0)
        assert other == a or np.abs(without - expected).max() > 1e-3


@pytest.mark.parametrize("norms", [False, True])
def test_the_order_of_threads_does_not_matter(device: EmuDevice, norms: bool) -> None:
    """Threads and blocks from last to first give the same bits: no barrier is missing."""
    a = normed(attention(4, 128), 128) if norms else attention(4, 128)
    first = both(device, a, 500)[1]
    device.reverse = True
    try:
        assert both(device, a, 500)[1].tobytes() == first.tobytes()
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
