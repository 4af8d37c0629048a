"""What only some architectures ask of the ops, against numbers worked out by hand, on host and emulator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from prill_harness.numbers.sequential import SequentialBackend
from prill_runtime.device.ops.backend import CudaBackend
from prill_runtime.ops import rotary
from prill_runtime.ops.numpy import NumpyBackend
from prill_runtime.ops.protocol import Yarn
from prill_runtime.ops.rounded import RoundedBackend
from prill_runtime.quants.layouts import dequantize

from .test_kernels import backend

ORACLE = NumpyBackend("float64")
RANDOM = np.random.default_rng(11)
GPT_OSS = {"base": 150000.0, "dim": 64, "factor": 32.0}


@pytest.fixture(
    scope="module", params=["float64", "float32", "f16", "sequential", "emu", "emu reversed", "emu fast"]
)
def ops(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Every backend."""
    if request.param.startswith("float"):
        yield NumpyBackend(request.param)
    elif request.param == "f16":
        yield RoundedBackend("float32", "f16")
    elif request.param == "sequential":
        yield SequentialBackend()
    else:
        made = backend("reversed" in request.param, "fast" if "fast" in request.param else "exact")
        yield made
        made.device.close()


def close(ops: Any, got: Any, expected: Any, least: float = 0.0) -> None:
    """Within what the backend's numbers can hold; `least` where the expected ones have so many places."""
    halves = isinstance(ops, RoundedBackend) and not isinstance(ops, SequentialBackend)
    fast = isinstance(ops, CudaBackend) and ops.mode == "fast"
    exact = isinstance(ops, NumpyBackend) and ops.dtype == np.float64
    bound = 4e-3 if halves or fast else 1e-12 if exact and not isinstance(ops, SequentialBackend) else 3e-6
    got, bound = np.asarray(got, np.float64).reshape(np.shape(expected)), max(bound, least)
    np.testing.assert_allclose(got, expected, rtol=bound, atol=bound)


def values(ops: Any, *shape: int) -> NDArray[np.floating]:
    return RANDOM.standard_normal(shape).astype(ops.dtype)


def test_yarn_at_three_positions(ops: Any) -> None:
    """gpt-oss's frequencies, whose bounds are not rounded, and cosines and sines that carry its factor."""
    factor, yarn = 0.1 * math.log(32) + 1, Yarn(4096, truncate=False)
    assert factor == pytest.approx(1.34657359028)
    pairs, at = [0, 8, 12, 17, 31], np.array([1, 100, 5000])
    cos = [[0.727556815849, 1.34483554527, 1.34654250376, 1.34657357902, 1.34657359028],
           [1.16117581982, 0.485608860497, 1.04748554267, 1.3464609959, 1.34657358966],
           [0.208272391014, -1.23889254552, -1.1243458231, 1.07475524091, 1.34657205155]]  # fmt: skip
    sin = [[1.13310260513, 0.0683943727819, 0.00914984258523, 0.000174137147341, 4.07138063901e-07],
           [-0.681858599344, -1.25596356183, 0.846188201249, 0.0174132294279, 4.07138063839e-05],
           [-1.33036951453, 0.527641634719, 0.741017478957, 0.811271598278, 0.00203568954411]]  # fmt: skip
    ones = np.concatenate([np.ones((3, 1, 32)), np.zeros((3, 1, 32))], axis=-1).astype(ops.dtype)
    turned = np.asarray(ops.rope(ones, at, layout="neox", yarn=yarn, scale=factor, **GPT_OSS))
    close(ops, turned[:, 0, pairs], cos, 1e-9)
    close(ops, turned[:, 0, [32 + pair for pair in pairs]], sin, 1e-9)


def test_yarn_rounds_its_bounds_outwards() -> None:
    """Where it truncates, pairs 8 to 18 are between, without it 8.09 to 17.4."""
    rounded = rotary.frequencies(**GPT_OSS, yarn=Yarn(4096))[[0, 8, 12, 17, 31]]
    np.testing.assert_allclose(
        rounded, [1.0, 0.0508132748155, 0.0070157139105, 0.000227947795795, 3.02351142812e-07], rtol=1e-11
    )
    kept = rotary.ramp(150000.0, 64, Yarn(4096, truncate=False))
    assert np.flatnonzero(kept > 0)[0] == 9
    assert np.flatnonzero(kept == 1)[0] == 18


def test_long_divisors_count_by_the_length_so_far(ops: Any) -> None:
    """Of 4,096 positions the short divisors hold, of 4,097 the long ones, for every row of the call."""
    short, late = np.ones(48), np.ones(48)
    short[[0, 16, 47]], late[[0, 16, 47]] = [1.0, 1.02, 1.05], [1.08, 2.5, 60.0]
    x = np.concatenate([np.ones((2, 1, 48)), np.zeros((2, 1, 48))], axis=-1).astype(ops.dtype)
    for last, expected in (
        (4095, [1.0263647515, -0.191755085652, 1.19015884189]),
        (4096, [-0.100325827861, -0.335602748161, 1.19023804716]),
    ):
        turned = ops.rope(
            x, np.array([100, last]), base=10000.0, dim=96, layout="neox", scale=1.19023807142,
            freq_factors=short.astype(ops.dtype), long=(late.astype(ops.dtype), 4096),
        )  # fmt: skip
        # Float32 divisors, as a file has them, leave 4e-6 of an angle of 92.
        close(ops, np.asarray(turned)[0, 0, [0, 16, 47]], expected, 1e-5)


def test_late_queries_are_sharper(ops: Any) -> None:
    """Llama 4's factor at both sides of a border."""
    x = values(ops, 4, 2, 3)
    at = np.array([0, 8191, 8192, 20000])
    expected = x * np.array([1.0, 1.0, 1.06931471806, 1.10986122887])[:, None, None]
    close(ops, ops.temper(x, at, beta=0.1, original=8192), expected, 1e-11)


def scored(ops: Any, scores: list[float], **options: Any) -> NDArray[np.float64]:
    """Softmax weights of one query's scores, seen by values that are the unit vectors."""
    n = len(scores)
    q, k, v = np.zeros((1, 2, 4)), np.zeros((2, n, 4)), np.zeros((2, n, 4))
    q[..., 0], k[..., 0], v[:] = 1.0, scores, np.eye(n, 4)
    q, k, v = (array.astype(ops.dtype) for array in (q, k, v))
    return np.asarray(ops.attention(q, k, v, start=n - 1, scale=1.0, **options)).reshape(2, 4)


def test_a_sink_takes_its_part(ops: Any) -> None:
    """Each head has its own: the first one's 1.5, the second one's takes nothing."""
    got = scored(ops, [0.5, -1.25, 2.0], sinks=np.array([1.5, -1e4], ops.dtype))
    close(ops, got[:, :3], [[0.119420882632, 0.0207522377054, 0.535207264464],
                            [0.176820182107, 0.0307267403264, 0.792453077566]], 1e-11)  # fmt: skip


def test_scores_stay_within_their_cap(ops: Any) -> None:
    """50 tanh(s / 50), after the scale and before the softmax."""
    capped = np.array([4.98339973125, 26.8524783499, -47.3403006423])
    weights = np.exp(capped - capped.max())
    got = scored(ops, [5.0, 30.0, -90.0], softcap=50.0)
    close(ops, got[0, :3], weights / weights.sum(), 1e-9)


@pytest.mark.parametrize("size", [64, 20])
def test_attention_of_many_rows_has_all_options(ops: Any, size: int) -> None:
    """Cap, sinks and window together over a prompt, by the definition written out."""
    rows, heads, kv = 70, 4, 2
    q, k, v = values(ops, rows, heads, size), values(ops, kv, rows, size), values(ops, kv, rows, size)
    sinks = np.array([0.5, -1.0, 2.0, 0.0], ops.dtype)
    got = ops.attention(q, k, v, start=0, scale=0.3, window=40, softcap=2.0, sinks=sinks)
    expected = np.empty((rows, heads, size))
    for head in range(heads):
        for row in range(rows):
            seen = slice(max(0, row - 39), row + 1)
            scores = 2 * np.tanh(k[head // 2, seen].astype(float) @ q[row, head] * 0.3 / 2)
            weights = np.exp(np.append(scores, sinks[head]))
            expected[row, head] = weights[:-1] / weights.sum() @ v[head // 2, seen]
    close(ops, got, expected)


def test_a_cap_holds_values(ops: Any) -> None:
    """Gemma 2's logits."""
    got = ops.softcap(np.array([[5.0, 30.0, -90.0]], ops.dtype), 30.0)
    close(ops, got, [[4.95421238774, 22.8478246787, -29.8516426106]], 1e-11)


def test_both_forms_of_gelu(ops: Any) -> None:
    """By tanh and by erf: they part in the fourth place."""
    x = np.array([[-2.0, -0.5, 0.5, 2.0]], ops.dtype)
    erf = [[-0.0455002638964, -0.154268769363, 0.345731230637, 1.9544997361]]
    tanh = [[-0.0454023059122, -0.154285990175, 0.345714009825, 1.95459769409]]
    close(ops, ops.gelu_erf(x), erf, 1e-10)
    close(ops, ops.gelu_tanh(x), tanh, 1e-10)
    up = values(ops, 1, 4)
    close(ops, ops.geglu(x, up), np.array(tanh) * up, 1e-10)


def test_a_clamped_swiglu(ops: Any) -> None:
    """gpt-oss: the gate has no lower limit, and the linear half gets one added."""
    gate = np.array([[-3.0, 0.5, 7.5, 100.0]], ops.dtype)
    up = np.array([[2.0, -8.0, 1.0, 9.0]], ops.dtype)
    got = ops.swiglu_clamped(gate, up, limit=7.0, alpha=1.702)
    close(ops, got, [[-0.0542139291234, -2.10233061964, 13.9999062566, 55.9996250264]], 1e-11)


def test_a_multiple(ops: Any) -> None:
    """Gemma's embedding times the root of its width."""
    x = values(ops, 2, 48)
    close(ops, ops.scale(x, 48**0.5), x * 48**0.5)


def test_a_router_takes_the_lowest_id_of_equal_logits(ops: Any) -> None:
    """2 and 5 tie for the third place: 2 has it; and weights over the chosen are not those over all."""
    logits = np.array([[1.0, 3.0, 2.0, 3.0, -1.0, 2.0]], ops.dtype)
    got = ops.route(logits, used=3, normalised=True)
    close(ops, got, [[0, 0.422318798252, 0.155362403497, 0.422318798252, 0, 0]], 1e-11)
    assert np.count_nonzero(np.asarray(got)) == 3
    got = ops.route(logits, used=3, normalised=False)
    close(ops, got, [[0, 0.346091440007, 0.127319925544, 0.346091440007, 0, 0]], 1e-11)


@pytest.mark.parametrize("experts", [5, 150])
def test_experts_compute_their_rows_alone(ops: Any, experts: int) -> None:
    """Each row's own experts, with their biases, weighted and summed, as a loop over them says."""
    rows, used, cols, outs = 6, 3, 36, 10
    x, weight, bias = values(ops, rows, cols), values(ops, experts, outs, cols), values(ops, experts, outs)
    down = values(ops, experts, 8, outs)
    routed = np.asarray(ops.route(values(ops, rows, experts), used=used, normalised=True))
    up = np.asarray(ops.expert_linear(x, weight, routed, used=used, bias=bias))
    got = ops.mix(ops.expert_linear(up, down, routed, used=used), routed)
    expected, inner = np.zeros((rows, 8)), np.zeros((rows, used, outs))
    for row in range(rows):
        for place, expert in enumerate(np.flatnonzero(routed[row])):
            inner[row, place] = weight[expert].astype(float) @ x[row] + bias[expert]
            expected[row] += routed[row, expert] * (down[expert].astype(float) @ inner[row, place])
    scale = 20.0 if isinstance(ops, RoundedBackend) else 1.0  # sums of 36 products of rounded values
    close(ops, np.asarray(up) / scale / 5, inner / scale / 5)
    close(ops, np.asarray(got) / scale / 20, expected / scale / 20)


def test_an_expert_that_weighs_nothing_is_left_out(ops: Any) -> None:
    """A weight that came to 0 takes no place: those behind it move up, and what is left over is 0."""
    x, weight = values(ops, 1, 4), values(ops, 3, 4, 4)
    routed = np.array([[0.0, 0.0, 1.0]], ops.dtype)
    got = np.asarray(ops.expert_linear(x, weight, routed, used=2))
    close(ops, got[0, 0] / 5, weight[2] @ x[0] / 5)
    assert not got[0, 1].any()
    close(ops, ops.mix(got, routed), got[0, :1])


@pytest.mark.parametrize("rows", [1, 20])
def test_a_window_has_as_many_keys_as_it_says(ops: Any, rows: int) -> None:
    """Of 128: the key 127 back is seen, the one 128 back is not, by a single row and by a prompt's last."""
    length, size = 150, 64
    q, v = np.zeros((rows, 1, size), ops.dtype), np.zeros((1, length, size), ops.dtype)
    v[0, :, 0] = 128.0 * (np.arange(length) == length - 128)
    v[0, :, 1] = 128.0 * (np.arange(length) == length - 129)
    v[0, :, 2] = 1.0
    k = np.zeros((1, length, size), ops.dtype)
    got = np.asarray(ops.attention(q, k, v, start=length - rows, scale=1.0, window=128))[-1]
    close(ops, got[:3], [1.0, 0.0, 1.0])


@pytest.mark.parametrize("rows", [1, 60])
@pytest.mark.parametrize("more", [-30, -1, 0, 1, 70])
@pytest.mark.parametrize("window", [127, 128, 129])
def test_sinks_beside_a_window(ops: Any, window: int, more: int, rows: int) -> None:
    """Fewer keys than a window, as many, one more and many more: the first key that a row sees and the last
    that it does not, and the part of the softmax that each head's sink takes beside so many keys."""
    length, size, sinks = window + more, 64, np.array([-3.0, 1.0, 4.0, 5.0])
    q, v = np.zeros((rows, 4, size), ops.dtype), np.zeros((2, length, size), ops.dtype)
    seen = np.minimum(np.arange(length - rows, length) + 1, window)  # keys of each row
    first = max(length - window, 0)  # that the last row sees
    v[:, first, 0], v[:, :first, 1], v[:, :, 2] = 100.0, 100.0, 1.0
    given = {"start": length - rows, "scale": 1.0, "window": window, "sinks": sinks.astype(ops.dtype)}
    got = np.asarray(ops.attention(q, np.zeros_like(v), v, **given)).reshape(rows, 4, size)
    parts = 1 / (seen[:, None] + np.exp(sinks))  # of each key, by row and head
    close(ops, got[:, :, 2], seen[:, None] * parts)
    close(ops, got[-1, :, 0], 100 * parts[-1])
    close(ops, got[-1, :, 1], 0 * parts[-1])


def test_an_mxfp4_block_by_hand() -> None:
    """Low nibbles are elements 0 to 15, high ones 16 to 31; the exponent is 123 - 127."""
    raw = np.frombuffer(bytes.fromhex("7b0b30557a9fc4e90e33587da2c7ec1136"), np.uint8)
    expected = [
        -0.09375, 0.0, 0.1875, -0.0625, -0.375, 0.125, -0.03125, -0.25, 0.09375, -0.0, -0.1875, 0.0625, 0.375,
        -0.125, 0.03125, 0.25, 0.0, 0.09375, 0.1875, 0.375, -0.03125, -0.125, -0.25, 0.0, 0.09375, 0.1875,
        0.375, -0.0625, -0.125, -0.25, 0.03125, 0.09375,
    ]  # fmt: skip
    assert dequantize(raw, T.MXFP4, (32,)).tolist() == expected


def test_gemmas_norm_adds_nothing(ops: Any) -> None:
    """The file's weights are the published ones plus 1 already."""
    x = np.array([[1.0, -2.0, 3.0, 0.5]], ops.dtype)
    weight = np.array([1.1, 0.8, 1.0, 2.5], ops.dtype)
    expected = [[0.582794155313, -0.847700589546, 1.5894386054, 0.662266085583]]
    close(ops, ops.rms_norm(x, weight, 1e-6), expected, 1e-11)
